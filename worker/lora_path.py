"""One value of ``--lora-paths``: an adapter's name, and where it is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from schemas.adapter import AdapterName
from schemas.errors import BadInput
from schemas.faults import first_fault
from schemas.hub import HUB_PREFIX, HubSource


class LoraPath(BaseModel):
    """One value of ``--lora-paths``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lora_name: AdapterName
    lora_path: str = Field(min_length=1)
    pinned: bool = False

    @property
    def folder(self) -> Path:
        return Path(os.path.realpath(self.lora_path))

    @property
    def repository(self) -> HubSource | None:
        """The repository of the hub that the path means; None for a folder.

        A folder of that name wins; with ``hf:`` before it, it is the repository.
        """
        if self.lora_path.startswith(HUB_PREFIX) or not os.path.isdir(self.folder):
            return HubSource.parse(self.lora_path)
        return None

    @model_validator(mode="after")
    def _names_a_source(self) -> LoraPath:
        if self.lora_path.startswith(HUB_PREFIX) and not self.repository:
            raise ValueError(f"{self.lora_path} is not hf:OWNER/NAME[@REVISION]")
        return self

    @classmethod
    def parse(cls, text: str) -> LoraPath:
        """Read ``PATH``, ``NAME=PATH`` or ``{"lora_name", "lora_path", "pinned"}``; a path may be a
        repository of the hub, ``OWNER/NAME[@REVISION]``.

        A bare path gets its last component as its name, a bare repository its name.
        """
        try:
            if text.lstrip().startswith("{"):
                return cls.model_validate_json(text)
            name, separator, path = text.partition("=")
            if not separator:
                source = HubSource.parse(text)
                name, path = source.name if source else Path(text).name, text
            return cls(lora_name=name, lora_path=path)
        except ValidationError as error:
            raise BadInput(
                f"--lora-paths {text}: {first_fault(error)}."
                " Give PATH, NAME=PATH, or JSON with lora_name, lora_path and pinned, with a folder"
                " or OWNER/NAME[@REVISION] of the hub as the path; a name begins with a letter or"
                " digit and goes on with those and . _ - /"
            ) from error


def check_folders(given: Iterable[str]) -> None:
    """Raises BadInput for the first value that names neither a folder nor what could be a
    repository."""
    for lora in map(LoraPath.parse, given):
        if lora.repository is None and not os.path.isdir(lora.folder):
            raise BadInput(f"--lora-paths {lora.lora_name}: there is no folder {lora.folder}.")
