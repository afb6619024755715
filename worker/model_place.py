"""Where the base model is: a folder, or a repository of the hub, downloaded into its cache."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from schemas.errors import BadInput, LorryError
from schemas.hub import HUB_PREFIX, HubSource

log = structlog.get_logger()

#: Seconds between two lines of the log that tell how far a download is.
_TOLD_EVERY = 5.0


@dataclass(frozen=True)
class ModelPlace:
    """A base model on this machine."""

    folder: Path
    source: HubSource | None = None
    """The repository of the hub whose commit the folder holds; None for any other folder."""

    @property
    def repository(self) -> str | None:
        """``OWNER/NAME``, likewise."""
        return self.source.repo if self.source else None

    def fetch_weights(self) -> None:
        """Download the weights, if the folder is of a repository and lacks them. Raises BadInput,
        or HubUnavailable for what may pass."""
        if not self.source:
            return
        from worker.hub.contents import MODEL
        from worker.hub.repository import HubRepository

        repository = HubRepository(self.source, MODEL)
        with suppress(BadInput):
            repository.find_cached()  # A commit never changes, so the hub need not be asked.
            return
        with _named():
            repository.download(_Progress(self.source))


def find_model(model_path: str) -> ModelPlace:
    """The folder of that name, or else what the hub's repository ``OWNER/NAME[@REVISION]`` holds,
    at first without its weights; with ``hf:`` before it, it is always the repository.

    Raises BadInput if there is neither, HubUnavailable for what may pass.
    """
    is_plain = not model_path.startswith(HUB_PREFIX)
    if is_plain and os.path.isdir(model_path):
        return ModelPlace(Path(model_path))
    no_folder = f"{model_path}: there is no folder of that name; " if is_plain else ""
    source = HubSource.parse(model_path)
    if source is None:
        raise BadInput(
            f"--model-path {no_folder or model_path + ': '}a repository of the hub is named"
            " OWNER/NAME[@REVISION]."
        )
    # Only now, since a folder needs none of it.
    from worker.hub.contents import MODEL_OUTLINE
    from worker.hub.repository import HubRepository

    with _named(no_folder):
        found, folder = HubRepository(source, MODEL_OUTLINE).download_or_find(_Progress(source))
    log.info("model_found", repository=str(found), folder=str(folder))
    return ModelPlace(folder, found)


def repository_in(folder: Path) -> str | None:
    """The repository that the config of a model's folder names, ``OWNER/NAME``."""
    name = json.loads((folder / "config.json").read_bytes()).get("_name_or_path")
    source = HubSource.parse(name) if isinstance(name, str) else None
    return source.repo if source else None


@contextmanager
def _named(no_folder: str = "") -> Iterator[None]:
    """Errors say which flag they are about."""
    try:
        yield
    except LorryError as error:
        raise type(error)(f"--model-path {no_folder}{error}") from error


class _Progress:
    """Tells of a download in the log, if it takes long."""

    def __init__(self, source: HubSource) -> None:
        self._source = source
        self._next = time.monotonic() + _TOLD_EVERY

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _TOLD_EVERY
        log.info(
            "model_downloading",
            repository=str(self._source),
            megabytes=done // 10**6,
            of=total // 10**6,
        )
