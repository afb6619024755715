"""Repositories of the hub: downloaded into its cache folder, and found there.

The cache is huggingface_hub's own (``HF_HOME``, ``HF_HUB_CACHE``), shared with every other program
that uses it; endpoint, token and offline mode are those of its environment variables too.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.utils.tqdm import tqdm

from schemas.errors import BadInput
from schemas.hub import HubSource
from worker.hub.contents import ADAPTER, Contents
from worker.hub.failures import HubUnavailable, explained, not_cached

log = structlog.get_logger()

_DEFAULT_REVISION = "main"

_SHA256, _GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")

#: Seconds without a byte after which no download is alive.
_LEFTOVER_SECONDS = 3600

#: Told how many bytes of how many have come.
OnBytes = Callable[[int, int], None]


class HubRepository:
    """One repository at one revision.

    Methods raise BadInput for what stays as it is until a person changes something, and
    HubUnavailable for what may pass.
    """

    def __init__(self, source: HubSource, contents: Contents = ADAPTER) -> None:
        self.source = source
        self._contents = contents
        self._revision = source.revision or _DEFAULT_REVISION
        self._cache = Path(constants.HF_HUB_CACHE)
        self._storage = self._cache / f"models--{source.owner}--{source.name}"

    def download(self, on_bytes: OnBytes | None = None) -> tuple[HubSource, Path]:
        """The folder in the cache with the files, and the source that names their commit.

        What the cache holds already is not loaded again. A file's content is held against the hash
        by which the hub names it. In offline mode the cache has to have them.
        """
        if constants.is_offline_mode():
            return self.find_cached()
        sizes, commit = self._ask_hub()
        source = self.source.at(commit)
        self._download_files(commit, sizes, on_bytes or _ignore_bytes)
        return source, self._at(source).folder()

    def download_or_find(self, on_bytes: OnBytes | None = None) -> tuple[HubSource, Path]:
        """``download``, or what the cache holds of the revision while the hub is unavailable."""
        try:
            return self.download(on_bytes)
        except HubUnavailable as error:
            try:
                found, folder = self.find_cached()
            except BadInput:
                raise error from None
            log.warning("hub_unavailable", reason=str(error), used=str(found))
            return found, folder

    def find_cached(self) -> tuple[HubSource, Path]:
        """What the cache holds of the revision, without asking the hub."""
        commit = self._revision
        if not self.source.is_commit:
            try:
                commit = (self._storage / "refs" / self._revision).read_text("utf-8").strip()
            except (OSError, ValueError):
                raise self._not_cached() from None
        source = self.source.at(commit)
        if not source.is_commit:
            raise self._not_cached()
        folder = self._at(source).folder()
        try:
            names = [name for name in os.listdir(folder) if self._has(commit, name)]
            self._contents.choose(source, names)
        except BadInput as error:  # A download was broken off, or another program's.
            raise self._not_cached(str(error)) from error
        return source, folder

    def folder(self) -> Path:
        """The folder in the cache that holds the files of the source, which names a commit."""
        folder = self._storage / "snapshots" / self._revision
        if not self.source.is_commit or not folder.is_dir():
            raise self._not_cached()
        cache = self._cache.resolve()
        for path in (folder, *folder.iterdir()):
            if not Path(os.path.realpath(path)).is_relative_to(cache):
                raise BadInput(f"{path} leads out of the hub cache {cache}, and is not read.")
        return folder

    def _at(self, source: HubSource) -> HubRepository:
        return HubRepository(source, self._contents)

    def _not_cached(self, reason: str = "") -> BadInput:
        return not_cached(self.source, self._contents.remedy, reason)

    def _ask_hub(self) -> tuple[dict[str, int], str]:
        """The sizes in bytes of the files that are wanted, by name, and the commit."""
        try:
            info = HfApi().model_info(
                self.source.repo, revision=self._revision, files_metadata=True, timeout=10
            )
        except Exception as error:
            raise explained(self.source, error) from error
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        chosen = self._contents.choose(self.source, sizes)
        if not info.sha or not self.source.at(info.sha).is_commit:
            raise HubUnavailable(f"{self.source}: the hub names no commit.")
        return {name: sizes[name] for name in chosen}, info.sha

    def _download_files(self, commit: str, sizes: dict[str, int], on_bytes: OnBytes) -> None:
        total, done = sum(sizes.values()), 0
        on_bytes(0, total)
        self._drop_leftovers()
        for name, size in sizes.items():
            counter = _byte_counter(partial(_tell, on_bytes, done, total))
            is_new, mark = not self._has(commit, name), self._mark(commit, name)
            try:
                if is_new:
                    mark.parent.mkdir(parents=True, exist_ok=True)
                    mark.touch()
                path = hf_hub_download(self.source.repo, name, revision=commit, tqdm_class=counter)
            except Exception as error:
                raise explained(self.source, error) from error
            if is_new or not self._contents.trusts_cache:
                self._check_content(Path(path))
            if is_new:
                mark.unlink(missing_ok=True)
            done += size
            on_bytes(done, total)
        self._note_revision(commit)

    def _has(self, commit: str, name: str) -> bool:
        """Whether the cache has a file, and no process has died before it had checked it."""
        is_there = (self._storage / "snapshots" / commit / name).exists()
        return is_there and not self._mark(commit, name).exists()

    def _mark(self, commit: str, name: str) -> Path:
        """Stands from before a file's download until the file has been checked."""
        return self._storage / ".unchecked" / commit / name

    def _drop_leftovers(self) -> None:
        """Delete what downloads whose process was killed have left half done."""
        for path in self._storage.glob("blobs/*.incomplete"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                    path.unlink()

    def _note_revision(self, commit: str) -> None:
        """Note which commit a branch or tag is, for whoever is offline later."""
        if self.source.is_commit:
            return
        path = self._storage / "refs" / self._revision
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(commit, "utf-8")
        except OSError as error:
            log.warning("hub_ref_not_written", path=str(path), error=error.strerror)

    def _check_content(self, path: Path) -> None:
        """Hold a file against the hash in the name of its blob; take both away if they differ."""
        if not path.is_symlink():
            return  # A file system without links: the cache does not keep the name.
        blob = path.parent / os.readlink(path)
        try:
            found = _hash_like(blob.name, path)
        except OSError as error:
            raise explained(self.source, error) from error
        if found not in (None, blob.name):
            blob.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise HubUnavailable(
                f"{self.source}: {path.name} is not what the hub announced: its hash is {found},"
                f" not {blob.name}. It has been deleted."
            )


def _hash_like(name: str, path: Path) -> str | None:
    """The hash of a file of the kind that ``name`` is: SHA-256 of what the hub keeps as a large
    file, git's of a small one; None if it is neither."""
    if _SHA256.fullmatch(name):
        digest = hashlib.sha256()
    elif _GIT_SHA1.fullmatch(name):
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        return None
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _byte_counter(on_bytes: Callable[[int], None]) -> type[tqdm]:
    """What huggingface_hub tells of a download's bytes where it would draw a bar."""

    class Counter(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(disable=True)  # type: ignore[no-untyped-call]
            self._done = 0

        def update(self, n: float | None = 1) -> None:
            self._done += int(n or 0)  # Less than zero if it begins anew.
            on_bytes(self._done)

    return Counter


def _tell(on_bytes: OnBytes, before: int, total: int, done: int) -> None:
    on_bytes(min(before + done, total), total)


def _ignore_bytes(done: int, total: int) -> None:
    pass
