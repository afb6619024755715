"""Brings this worker's adapters in line with the queue's desired state."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Thread

import structlog

from broker.job_queue import JobQueue
from schemas.adapter import AdapterRecord
from schemas.errors import BadInput, JobError, LorryError
from schemas.hub import HUB_PREFIX, HubSource
from worker.adapters.contained import contained
from worker.adapters.peft_config import CONFIG_FILE, WEIGHTS_FILE
from worker.adapters.readers import Readers
from worker.adapters.registry import AdapterRegistry, KnownAdapter, ReadAdapter
from worker.hub.repository import HubRepository
from worker.reasons import kept

log = structlog.get_logger()

#: Seconds after which the desired state is looked at though no message said that it changed.
_INTERVAL = 2.0

#: Seconds that one turn waits for a message: a worker that ends waits for the turn to be over.
_LOOK_SECONDS = 0.5

#: And one turn for an adapter that is being read, before it looks for a message.
_READ_SECONDS = 0.1


@dataclass(frozen=True)
class _Wanted:
    """What is to be read for a record of the desired state, as that was."""

    name: str
    version: int
    source: str
    revision: str | None
    why_not: str | None = None
    """Why that cannot be served, so that what it was to replace is read."""
    is_evicted: bool = False
    """Whether it is served, and its weights are read as it is pinned."""

    def __str__(self) -> str:
        return self.name


class DesiredStateFollower:
    """Has adapters read that are wanted, forgets those that are not, and reports."""

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
        #: What is read is None for an adapter that was evicted: the registry has it.
        self._readers: Readers[_Wanted, ReadAdapter | None] = Readers(
            place_of=lambda wanted: (wanted.name, wanted.source)
        )
        self._records: Mapping[str, AdapterRecord] = {}
        """The desired state, as it was seen last."""
        self.seen_version = 0
        """Its version."""
        self.version = 0
        """Of the desired state of which all has been read last."""
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

    @property
    def reading(self) -> list[str]:
        """Names of the adapters that are still to be read of what was seen."""
        return sorted({wanted.name for wanted in self._readers.keys})

    @property
    def threads(self) -> list[Thread]:
        return self._readers.threads

    def turn(self) -> None:
        """Wait a little for a change, or for an adapter that is being read, and act on it."""
        has_changed = self._take_in()
        if self._is_told() or time.monotonic() >= self._next_look:
            has_changed |= self._look()
            self._next_look = time.monotonic() + _INTERVAL
        if has_changed:
            self._report()

    def follow(self, *, is_ended: Callable[[], bool] = lambda: False) -> None:
        """Look at the desired state, and act on all that has changed since the last look; that
        takes as long as reading does, unless ``is_ended`` tells that there is no need any more."""
        has_changed = self._look()
        while self._readers.keys and not is_ended():
            has_changed |= self._take_in()
        if has_changed:
            self._report()

    def _look(self) -> bool:
        """Do what takes no reading, and let threads read the rest; whether anything has changed."""
        try:
            if self._is_up_to_date():
                return False
            version, records = self._desired_state()
        except LorryError as error:
            log.error("desired_state_damaged", error=str(error))
            return False
        self._some_unload = any(record.unloading for record in records.values())
        if version == self.seen_version:
            return False
        self._records = records
        self._readers.drop(lambda wanted: self._record_of(wanted) is None)
        being_read = {replace(wanted, why_not=None) for wanted in self._readers.keys}
        for name, record in records.items():
            if self._is_behind(name, record) and _wanted(name, record) not in being_read:
                self._load(name, record)
        self._registry.keep_only(records)
        self._pin(records)
        self.seen_version = version
        self._note_version()
        return True

    def _take_in(self) -> bool:
        """Act on what was read; if there is nothing, wait a little for it. Whether there was."""
        num_read, wait = 0, _READ_SECONDS if self._readers.keys else 0.0
        while read := self._readers.first(wait=wait):
            self._act_on(*read)
            if isinstance(read[1], ReadAdapter):
                self._read_pinned([read[0].name])
            self._readers.done()
            num_read, wait = num_read + 1, 0.0
        self._note_version()
        return num_read > 0

    def _note_version(self) -> None:
        if not self._readers.keys:
            self.version = self.seen_version

    def _is_up_to_date(self) -> bool:
        """Whether there is nothing to read: of 10,000 adapters that takes Python a quarter of a
        second. A version of 0 is that of a queue that has lost its desired state, or never had
        one."""
        seen = self.seen_version
        is_followed = seen > 0 and self._queue.desired_version() == seen
        return is_followed and not self._some_unload

    def _desired_state(self) -> tuple[int, dict[str, AdapterRecord]]:
        version, records = self._queue.desired_state()
        if version < max(1, self.seen_version):
            log.warning("desired_state_lost", version=version, followed=self.seen_version)
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
        self._readers.want(_wanted(name, record), partial(self._read_or_check, name, record))

    def _act_on(self, wanted: _Wanted, read: ReadAdapter | Exception | None) -> None:
        """Serve what was read, or tell why it cannot be, unless the name is not wanted any more or
        was loaded again meanwhile."""
        name, record = wanted.name, self._record_of(wanted)
        if record is None:
            return
        has_failed = wanted.why_not or isinstance(read, BadInput)
        if has_failed and record.revision != wanted.revision:
            return  # Another worker has read it meanwhile, so this one tries once more already.
        if isinstance(read, BadInput):
            self._refuse(wanted, record, str(read))
        elif isinstance(read, Exception):
            raise read
        elif read and wanted.why_not:
            if record.previous and record.previous.revision == read.known.revision:
                self._registry.serve(name, read)
            self._registry.refuse(name, record.version, wanted.why_not)
        elif read:
            self._serve(wanted, record, read)

    def _record_of(self, wanted: _Wanted) -> AdapterRecord | None:
        """What the desired state says, if it is what it said when this was wanted."""
        record = self._records.get(wanted.name)
        is_same = record and (record.version, record.source) == (wanted.version, wanted.source)
        return record if is_same else None

    def _serve(self, wanted: _Wanted, record: AdapterRecord, read: ReadAdapter) -> None:
        name, revision = wanted.name, read.known.revision
        # Settled before anything is served, so that no two workers serve different weights.
        recorded = self._queue.adopt_revision(name, wanted.version, revision)
        if recorded == revision:
            self._registry.serve(name, read)
        elif recorded:  # Else it has gone or was loaded again: the next look finds that.
            reason = (
                f"{record.source} holds revision {revision} here, and {recorded} where it was read"
                " first: the files differ between workers, or have changed. Load it again."
            )
            self._refuse(wanted, record, reason)

    def _refuse(self, wanted: _Wanted, record: AdapterRecord, reason: str) -> None:
        """Serve what a load that failed here was to replace, as the other workers do, or nothing
        once one of them has read the new source."""
        name, previous = wanted.name, record.previous
        if wanted.why_not:
            log.warning("previous_adapter_unavailable", adapter=name, reason=kept(reason))
            reason = wanted.why_not
        elif not previous:
            self._registry.forget(name)
        elif (known := self._registry.known(name)) is None or known.revision != previous.revision:
            self._registry.forget(name)
            read = partial(self._read, name, previous.source, record.version)
            self._readers.want(replace(wanted, why_not=reason), read)
            return
        self._registry.refuse(name, record.version, reason)

    def _read_or_check(self, name: str, record: AdapterRecord) -> ReadAdapter:
        """Weights for which another adapter would be evicted are not read before a job wants them,
        where it is settled which ones they are: a worker that starts would read all there are."""
        source, revision, version = record.source, record.revision, record.version
        if revision is None or record.pinned or self._registry.has_room_for(name):
            return self._read(name, source, version)
        with contained(name):
            known = KnownAdapter(source, self._allowed(source), revision, version)
            return self._registry.check(known)

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
        self._read_pinned(records)

    def _read_pinned(self, names: Collection[str]) -> None:
        """Have those read that are pinned and not in memory."""
        for name in self._registry.evicted_pins:
            if name in names and (record := self._records.get(name)):
                wanted = replace(_wanted(name, record), is_evicted=True)
                self._readers.want(wanted, partial(self._read_again, name))

    def _read_again(self, name: str) -> None:
        with suppress(JobError):  # The registry's ``errors`` tell of it.
            self._registry.get(name)

    def _is_told(self) -> bool:
        if not self._nudges.subscribed:
            self._nudges.subscribe(self._queue.keys.control)
        wait = 0.0 if self._readers.keys else _LOOK_SECONDS
        return self._nudges.get_message(timeout=wait) is not None


def _wanted(name: str, record: AdapterRecord) -> _Wanted:
    return _Wanted(name, record.version, record.source, record.revision)
