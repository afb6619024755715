"""Where the adapters of the command line are: folders, or repositories of the hub."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import BadInput, LorryError
from schemas.hub import HUB_PREFIX
from worker.hub.repository import HubRepository
from worker.lora_path import LoraPath


@dataclass(frozen=True)
class FoundAdapter:
    """A value of ``--lora-paths`` whose files are on this machine."""

    name: str
    source: str
    """As the desired state shall name it."""
    folder: Path
    pinned: bool


def find_adapters(lora_paths: Iterable[LoraPath]) -> list[FoundAdapter]:
    """Download what is on the hub; raises BadInput for the first that cannot be found."""
    found = []
    for lora in lora_paths:
        try:
            source, folder = _find(lora)
        except BadInput as error:
            raise BadInput(f"--lora-paths {lora.lora_name}: {error}") from error
        found.append(FoundAdapter(lora.lora_name, source, folder, lora.pinned))
    return found


def _find(lora: LoraPath) -> tuple[str, Path]:
    if lora.repository is None:
        return str(lora.folder), lora.folder
    try:
        source, folder = HubRepository(lora.repository).download_or_find()
    except LorryError as error:
        is_plain = not lora.lora_path.startswith(HUB_PREFIX)
        prefix = f"there is no folder {lora.lora_path}; " if is_plain else ""
        raise BadInput(f"{prefix}{error}") from error
    return str(source), folder
