"""The adapters that this worker can run, by name, and those of them that are in host memory."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakValueDictionary

import structlog

from schemas.adapter import AdapterRecord
from schemas.errors import BadInput, JobError
from schemas.worker_state import AdapterCounts
from worker.adapters.contained import contained
from worker.adapters.loader import AdapterLoader
from worker.adapters.peft_format import Adapter
from worker.reasons import kept

log = structlog.get_logger()


@dataclass(frozen=True)
class KnownAdapter:
    """What stays of an adapter whether its weights are in memory or not."""

    source: str
    """As the desired state names it."""
    folder: Path
    """Where it is read from, and read again once it was evicted."""
    revision: str
    version: int
    """Of the desired state, when it was announced or loaded."""


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter that can be served under a name."""

    known: KnownAdapter
    adapter: Adapter | None
    """None if its weights are those that were served when it was read, or were not read."""


class AdapterRegistry:
    """Names and adapters; used by the threads that follow the desired state, claim and compute.

    With ``max_loaded`` adapters in memory the next one takes the place of one that no job held by
    this worker needs, the least recently used (``lru``) or the first loaded (``fifo``); it is read
    again when it is wanted.
    """

    def __init__(
        self, loader: AdapterLoader, *, max_loaded: int | None = None, policy: str = "lru"
    ) -> None:
        self.loader = loader
        self.prepare: Callable[[Adapter], None] = lambda adapter: None
        """What the slots need done to an adapter before it is placed."""
        self._max_loaded = max_loaded
        self._policy = policy
        #: By name and folder, as long as one is held or waited for: while files are read, so that
        #: no two threads read the same. A replacement does not wait for what it replaces.
        self._reading: WeakValueDictionary[tuple[str, Path], threading.Lock] = WeakValueDictionary()
        #: Held for a moment, while what follows is looked at or changed.
        self._lock = threading.RLock()
        self._known: dict[str, KnownAdapter] = {}
        #: In the order of eviction.
        self._loaded: dict[str, Adapter] = {}
        #: By revision: names of the same files share one adapter, and what was evicted or unloaded
        #: and is still held by a sequence is not laid out a second time.
        self._alive: WeakValueDictionary[str, Adapter] = WeakValueDictionary()
        self._names: defaultdict[str, set[str]] = defaultdict(set)
        """By revision, those of ``_known``."""
        self._pinned_names: frozenset[str] = frozenset()
        self._errors: dict[str, tuple[int, str]] = {}
        #: Why what was evicted could not be read again.
        self._unavailable_for: dict[str, str] = {}
        self._counts: dict[str, AdapterCounts] = {}
        self.in_use: Callable[[], Collection[str]] = frozenset
        """Names of the adapters of the jobs that this worker holds."""
        self.generation = 0
        """Rises when adapters come, go, or are pinned."""

    def get(self, name: str) -> Adapter | None:
        """The adapter, read from its source if it was evicted; None if the name is unknown.

        Raises JobError, of which ``errors`` tells too, if its source has gone or changed since.
        """
        adapter, known = self._get_loaded(name), self.known(name)
        if adapter or known is None:
            return adapter
        with self._reading_lock(name, known.folder):
            # Another thread may have read it meanwhile.
            adapter, known = self._get_loaded(name), self.known(name)
            if adapter or known is None:
                return adapter
            try:
                with contained(name):
                    adapter = self._alive.get(known.revision)
                    adapter = adapter or self._read(name, known.folder)
            except BadInput as error:
                raise self._unavailable(name, known, str(error), may_heal=True) from error
            if adapter.revision != known.revision:
                reason = (
                    f"{known.source} holds another revision now ({adapter.revision}) than when it"
                    f" was loaded ({known.revision}); load it again"
                )
                raise self._unavailable(name, known, reason, may_heal=False)
            with self._lock:
                # Else it was unloaded while it was read; the job at hand still runs with it.
                if self._known.get(name) is known:
                    adapter = self._keep(name, adapter)
            return adapter

    def is_loaded(self, name: str) -> bool:
        """Whether the adapter is in host memory, so that ``get`` reads nothing."""
        with self._lock:
            return name in self._loaded

    def read(
        self, name: str, folder: Path, version: int, *, source: str | None = None
    ) -> ReadAdapter:
        """Read an adapter, but no weights if they are those that are served; to be served by
        ``serve``. ``source`` is what the desired state calls the folder, if not by its path.
        Raises BadInput if it cannot be."""
        with self._reading_lock(name, folder):
            known, source = self.known(name), source or str(folder)
            if known and known.revision == self.loader.revision(folder):
                return ReadAdapter(KnownAdapter(source, folder, known.revision, version), None)
            adapter = self._read(name, folder)
            return ReadAdapter(KnownAdapter(source, folder, adapter.revision, version), adapter)

    def check(self, known: KnownAdapter) -> ReadAdapter:
        """Instead of ``read``, where others have settled the revision: served, it is like one that
        was evicted. Raises BadInput if it cannot be, as far as can be told without its weights."""
        self.loader.check(known.folder)
        return ReadAdapter(known, None)

    def has_room_for(self, name: str) -> bool:
        """Whether an adapter can be loaded, or loaded anew, while all others stay in memory."""
        with self._lock:
            is_full = self._max_loaded is not None and len(self._loaded) >= self._max_loaded
            return not is_full or name in self._loaded

    def serve(self, name: str, read: ReadAdapter) -> None:
        """Serve what was read, in place of what was served under the name."""
        with self._lock:
            self._errors.pop(name, None)
            self._unavailable_for.pop(name, None)
            self._know(name, read.known)
            former = self._loaded.get(name)
            if former and (read.adapter or former.revision != read.known.revision):
                del self._loaded[name]
                self.generation += 1
            if read.adapter:
                self._keep(name, read.adapter)

    def accept(self, name: str, version: int) -> None:
        """Note that what is served under a name is what the desired state of a version asks for."""
        with self._lock:
            self._errors.pop(name, None)
            self._unavailable_for.pop(name, None)
            self._known[name] = replace(self._known[name], version=version)

    def refuse(self, name: str, version: int, reason: str) -> None:
        """Note why the desired state of a version cannot be followed, so that a person can act on
        it. What is served under the name stays."""
        reason = kept(reason)
        with self._lock:
            self._errors[name] = version, reason
        log.warning("adapter_refused", adapter=name, reason=reason)

    def forget(self, name: str) -> None:
        """Serve nothing under a name; jobs that run finish on the weights they began with."""
        with self._lock:
            if name in self._known:
                self._know(name, None)
                self._loaded.pop(name, None)
                self._unavailable_for.pop(name, None)
                self.generation += 1
                log.info("adapter_unloaded", adapter=name)

    def keep_only(self, names: Collection[str]) -> None:
        """``forget`` every other name, its error and its counts."""
        with self._lock:
            for name in self._known.keys() - set(names):
                self.forget(name)
            self._errors = {name: error for name, error in self._errors.items() if name in names}
            self._counts = {name: count for name, count in self._counts.items() if name in names}

    def pin(self, names: Iterable[str]) -> None:
        """These adapters, and no others, hold a slot whether jobs use them or not, once they are in
        memory: ``get`` reads those that were evicted."""
        pinned = frozenset(names)
        with self._lock:
            if pinned != self._pinned_names:
                self._pinned_names = pinned
                self.generation += 1

    def seen_version(self, name: str) -> int:
        """Version of the desired state in which the name was loaded or refused; 0 if in none."""
        with self._lock:
            if error := self._errors.get(name):
                return error[0]
            return self._known[name].version if name in self._known else 0

    def known(self, name: str) -> KnownAdapter | None:
        return self._known.get(name)

    def count(self, name: str, *, output_tokens: int) -> None:
        """Count a job that was answered, unless its adapter has been forgotten meanwhile."""
        with self._lock:
            if name not in self._known:
                return
            counts = self._counts_of(name)
            self._counts[name] = counts.model_copy(
                update={
                    "requests": counts.requests + 1,
                    "output_tokens": counts.output_tokens + output_tokens,
                }
            )

    def count_in_slot(self, adapter: Adapter, *, loads: int = 0, evictions: int = 0) -> None:
        """Count that an adapter came into a slot or left one, unless it has been unloaded or
        replaced meanwhile: then nothing took its place."""
        more = {"slot_loads": loads, "slot_evictions": evictions}
        with self._lock:
            for name in self._names.get(adapter.revision, ()):
                counts = self._counts_of(name)
                self._counts[name] = counts.model_copy(
                    update={field: getattr(counts, field) + n for field, n in more.items() if n}
                )

    @property
    def revisions(self) -> dict[str, str]:
        """Name -> revision."""
        with self._lock:
            return {name: known.revision for name, known in self._known.items()}

    @property
    def errors(self) -> dict[str, str]:
        """Name -> why it cannot be served as the desired state says."""
        with self._lock:
            refused = {name: reason for name, (_, reason) in self._errors.items()}
            return self._unavailable_for | refused

    @property
    def counts(self) -> dict[str, AdapterCounts]:
        with self._lock:
            return dict(self._counts)

    @property
    def records(self) -> dict[str, AdapterRecord]:
        """What this worker adds to the queue's desired state."""
        with self._lock:
            return {
                name: AdapterRecord(
                    source=known.source,
                    revision=known.revision,
                    pinned=name in self._pinned_names,
                )
                for name, known in self._known.items()
            }

    @property
    def loaded(self) -> frozenset[Adapter]:
        """Those in host memory."""
        with self._lock:
            return frozenset(self._loaded.values())

    @property
    def in_memory(self) -> list[str] | None:
        """Names of those in host memory; None if that are all."""
        with self._lock:
            return None if len(self._loaded) == len(self._known) else list(self._loaded)

    @property
    def pinned(self) -> list[Adapter]:
        with self._lock:
            return [a for name, a in self._loaded.items() if name in self._pinned_names]

    def names_of(self, adapters: Iterable[Adapter]) -> list[str]:
        """The names under which they are in host memory."""
        with self._lock:
            return [
                name
                for adapter in adapters
                for name in self._names.get(adapter.revision, ())
                if self._loaded.get(name) is adapter
            ]

    @property
    def evicted_pins(self) -> list[str]:
        """Names of those that are to hold a slot and are not in memory."""
        return sorted(name for name in self.pinned_names if not self.is_loaded(name))

    @property
    def pinned_names(self) -> frozenset[str]:
        with self._lock:
            return self._pinned_names & self._known.keys()

    def _get_loaded(self, name: str) -> Adapter | None:
        with self._lock:
            adapter = self._loaded.get(name)
            if adapter and self._policy == "lru":
                self._loaded[name] = self._loaded.pop(name)
            return adapter

    def _reading_lock(self, name: str, folder: Path) -> threading.Lock:
        with self._lock:
            return self._reading.setdefault((name, folder), threading.Lock())

    def _read(self, name: str, folder: Path) -> Adapter:
        started = time.monotonic()
        adapter = self.loader.load(name, folder)
        if shared := self._alive.get(adapter.revision):
            adapter = shared
        else:
            self.prepare(adapter)
        seconds = time.monotonic() - started
        with self._lock:
            counts = self._counts_of(name)
            self._counts[name] = counts.model_copy(
                update={"loads": counts.loads + 1, "load_seconds": counts.load_seconds + seconds}
            )
        log.info(
            "adapter_read",
            adapter=name,
            revision=adapter.revision,
            seconds=round(seconds, 3),
            device_megabytes=round(adapter.on_device.num_bytes / 1e6, 1),
        )
        return adapter

    def _unavailable(
        self, name: str, known: KnownAdapter, reason: str, *, may_heal: bool
    ) -> JobError:
        reason = kept(reason)
        with self._lock:
            if self._known.get(name) is known:
                self._unavailable_for[name] = reason
        log.warning("adapter_unavailable", adapter=name, reason=reason)
        return JobError("adapter_unavailable", f"adapter '{name}': {reason}", may_heal=may_heal)

    def _know(self, name: str, known: KnownAdapter | None) -> None:
        if former := self._known.pop(name, None):
            names = self._names[former.revision]
            names.discard(name)
            if not names:
                del self._names[former.revision]
        if known:
            self._known[name] = known
            self._names[known.revision].add(name)

    def _keep(self, name: str, adapter: Adapter) -> Adapter:
        """The adapter, or that of the same files which another thread has read meanwhile."""
        adapter = self._alive.setdefault(adapter.revision, adapter)
        self._unavailable_for.pop(name, None)
        self._loaded[name] = adapter
        self.generation += 1
        self._evict(spare=name)
        return adapter

    def _evict(self, *, spare: str) -> None:
        """Make room for one adapter; while all others are in use, there is one too many."""
        if self._max_loaded is None or len(self._loaded) <= self._max_loaded:
            return
        kept = {spare, *self.in_use(), *self._pinned_names}
        for name in [*self._loaded]:
            if name not in kept and len(self._loaded) > self._max_loaded:
                del self._loaded[name]
                counts = self._counts_of(name)
                self._counts[name] = counts.model_copy(update={"evictions": counts.evictions + 1})
                log.info("adapter_evicted", adapter=name)

    def _counts_of(self, name: str) -> AdapterCounts:
        return self._counts.get(name) or AdapterCounts()
