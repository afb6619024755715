"""Brings this worker's adapters in line with the queue's desired state."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import structlog

from broker.job_queue import JobQueue
from schemas.adapter import AdapterRecord
from schemas.errors import BadInput, LorryError
from schemas.hub import HUB_PREFIX, HubSource
from worker.adapters.contained import contained
from worker.adapters.peft_config import CONFIG_FILE, WEIGHTS_FILE
from worker.adapters.registry import AdapterRegistry, ReadAdapter
from worker.hub.repository import HubRepository
from worker.reasons import kept

log = structlog.get_logger()

#: Seconds after which the desired state is looked at though no message said that it changed.
_INTERVAL = 2.0

#: Seconds that one turn waits for a message: a worker that ends waits for the turn to be over.
_LOOK_SECONDS = 0.5


class DesiredStateFollower:
    """Reads adapters that are wanted, forgets those that are not, and reports."""

    def __init__(
        self,
        queue: JobQueue,
        registry: AdapterRegistry,
        *,
        is_enabled: bool,
        own_folders: Collection[Path],
        roots: Collection[Path],
        max_pinned: int,
        report: Callable[[], None],
        own_repositories: Collection[str] = (),
        hub_owners: Collection[str] = (),
    ) -> None:
        """``own_folders`` and ``own_repositories`` are those of the command line; any other must
        stand below one of ``roots``, or belong to one of ``hub_owners``. ``report`` writes the
        worker's observed state."""
        self._is_enabled = is_enabled
        self._queue = queue
        self._registry = registry
        self._own_folders = frozenset(own_folders)
        self._roots = [root.resolve() for root in roots]
        self._own_repositories = frozenset(own_repositories)
        self._hub_owners = frozenset(hub_owners)
        self._max_pinned = max_pinned
        self._report = report
        self._nudges = queue.client.pubsub(ignore_subscribe_messages=True)
        self._next_look = time.monotonic()
        self.version = 0
        """Of the desired state that was followed last."""
        self._some_unload = False
        """Whether adapters were in it that go as soon as their jobs have ended."""

    def announce(self) -> None:
        """Add the adapters that this worker was started with to the desired state, as far as that
        does not say otherwise, and log where it does."""
        own = self._registry.records
        try:
            _, records = self._queue.desired_state()
        except LorryError:
            records = own  # Nothing can be compared; ``follow`` says what is damaged.
        self._queue.announce(own)
        for name, announced in own.items():
            record = records.get(name)
            if record is None:
                log.info("adapter_announced", adapter=name, source=announced.source)
            elif record.source != announced.source or record.unloading:
                log.warning(
                    "lora_path_overruled",
                    adapter=name,
                    lora_path=announced.source,
                    desired_source=record.source,
                    unloading=record.unloading,
                    remedy=f"producer lora load {name} {announced.source}",
                )
            elif announced.pinned and not record.pinned:
                log.warning(
                    "lora_path_not_pinned", adapter=name, remedy=f"producer lora pin {name}"
                )

    def turn(self) -> None:
        """Wait a little for a change, and look if there was one or it is time to."""
        if self._is_told() or time.monotonic() >= self._next_look:
            self.follow()
            self._next_look = time.monotonic() + _INTERVAL

    def follow(self) -> None:
        """Look at the desired state, and act on what has changed since the last look."""
        try:
            if self._is_up_to_date():
                return
            version, records = self._desired_state()
        except LorryError as error:
            log.error("desired_state_damaged", error=str(error))
            return
        self._some_unload = any(record.unloading for record in records.values())
        if version == self.version:
            return
        for name, record in records.items():
            if self._is_behind(name, record):
                self._load(name, record)
        self._registry.keep_only(records)
        self._pin(records)
        self.version = version
        self._report()

    def _is_up_to_date(self) -> bool:
        """Whether there is nothing to read: of 10,000 adapters that takes Python a quarter of a
        second. A version of 0 is that of a queue that has lost its desired state, or never had
        one."""
        is_followed = self.version > 0 and self._queue.desired_version() == self.version
        return is_followed and not self._some_unload

    def _desired_state(self) -> tuple[int, dict[str, AdapterRecord]]:
        version, records = self._queue.desired_state()
        if version < max(1, self.version):
            log.warning("desired_state_lost", version=version, followed=self.version)
            self._queue.announce(self._registry.records)
            return self._queue.desired_state()
        unloading = [name for name, record in records.items() if record.unloading]
        have_left = [self._queue.retire_adapter(name) for name in unloading]
        if any(have_left):
            return self._queue.desired_state()
        return version, records

    def _is_behind(self, name: str, record: AdapterRecord) -> bool:
        """Whether the record was loaded since the last look, or another worker has read of it what
        this one could not."""
        known = self._registry.known(name)
        is_superseded = known is not None and record.revision not in (None, known.revision)
        return is_superseded or self._registry.seen_version(name) != record.version

    def _load(self, name: str, record: AdapterRecord) -> None:
        known = self._registry.known(name)
        if known and (known.source, known.revision) == (record.source, record.revision):
            if record.previous:  # It was read before it was loaded, so nobody needs the old one.
                self._queue.adopt_revision(name, record.version, known.revision)
            self._registry.accept(name, record.version)
            return
        try:
            read = self._read(name, record.source, record.version)
            # Settled before anything is served, so that no two workers serve different weights.
            recorded = self._queue.adopt_revision(name, record.version, read.known.revision)
            if recorded is None:
                return  # It has gone or was loaded again: the next look finds that.
            if recorded != read.known.revision:
                raise BadInput(
                    f"{record.source} holds revision {read.known.revision} here, and {recorded}"
                    " where it was read first: the files differ between workers, or have changed."
                    " Load it again."
                )
        except BadInput as error:
            self._keep_previous(name, record)
            self._registry.refuse(name, record.version, str(error))
            return
        self._registry.serve(name, read)

    def _keep_previous(self, name: str, record: AdapterRecord) -> None:
        """Serve what a load that failed here was to replace, as the other workers do, or nothing
        once one of them has read the new source."""
        known, previous = self._registry.known(name), record.previous
        if previous and known and known.revision == previous.revision:
            return
        self._registry.forget(name)
        if not previous:
            return
        try:
            read = self._read(name, previous.source, record.version)
        except BadInput as error:
            reason = kept(str(error))
            log.warning("previous_adapter_unavailable", adapter=name, reason=reason)
            return
        if read.known.revision == previous.revision:
            self._registry.serve(name, read)

    def _read(self, name: str, source: str, version: int) -> ReadAdapter:
        with contained(name):
            return self._registry.read(name, self._allowed(source), version, source=source)

    def _allowed(self, source: str) -> Path:
        """Raises BadInput for a folder, or a file by a link, that commands may not name."""
        if not self._is_enabled:
            raise BadInput(
                "this worker serves no adapters; start it with --enable-lora, --lora-paths or"
                " --lora-root."
            )
        if source.startswith(HUB_PREFIX):
            return self._allowed_in_cache(source)
        try:
            # Not Path.resolve, which raises RuntimeError for links in a circle.
            folder = Path(os.path.realpath(source))
        except ValueError as error:
            raise BadInput(f"{source!r} cannot be a folder: {error}.") from error
        if folder in self._own_folders:
            return folder
        if not self._roots:
            raise BadInput(
                f"{source}: this worker was started without --lora-root, so commands can load no"
                " folder into it."
            )
        roots = ", ".join(map(str, self._roots))
        if not any(folder.is_relative_to(root) for root in self._roots):
            raise BadInput(f"{source} is not below --lora-root {roots}.")
        # Links between these folders are fine: the hub's cache consists of such.
        within = (*self._roots, *self._own_folders)
        for path in (folder / CONFIG_FILE, folder / WEIGHTS_FILE):
            if not any(Path(os.path.realpath(path)).is_relative_to(known) for known in within):
                raise BadInput(
                    f"{path} leads out of --lora-root {roots}, and is not read. Put the file itself"
                    " there, or start the worker with the folder that holds it as a further root."
                )
        return folder

    def _allowed_in_cache(self, source: str) -> Path:
        """Raises BadInput for a repository that commands may not name, or that is not cached."""
        repository = HubSource.parse(source)
        if repository is None:
            raise BadInput(f"{source} names no repository of the hub.")
        is_own = repository.repo in self._own_repositories
        if not is_own and repository.owner not in self._hub_owners:
            owners = ", ".join(sorted(self._hub_owners)) or "none"
            raise BadInput(
                f"{source}: {repository.owner} is not among the worker's --hub-owners ({owners})."
            )
        return HubRepository(repository).folder()

    def _pin(self, records: Mapping[str, AdapterRecord]) -> None:
        # Two commands at one moment may want too many, and other workers may have more slots: those
        # that are pinned stay so.
        wanted = (name for name, record in records.items() if record.pinned)
        kept = self._registry.pinned_names
        pinned = sorted(wanted, key=lambda name: (name not in kept, name))
        for name in pinned[self._max_pinned :]:
            log.warning("adapter_not_pinned", adapter=name, max_pinned=self._max_pinned)
        self._registry.pin(pinned[: self._max_pinned])

    def _is_told(self) -> bool:
        if not self._nudges.subscribed:
            self._nudges.subscribe(self._queue.keys.control)
        return self._nudges.get_message(timeout=_LOOK_SECONDS) is not None
