"""Adapters as a queue has them: what is wanted, where each is, and what it has done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from broker.fetches import Fetches, FetchStatus
from broker.queue_reader import QueueReader
from schemas.adapter import AdapterRecord
from schemas.worker_state import AdapterCounts, WorkerState

#: Of an adapter that a worker has never had.
_NOTHING_DONE = AdapterCounts()


@dataclass(frozen=True)
class AdapterStatus:
    """An adapter of the desired state, and what the living workers say of it."""

    name: str
    source: str
    revision: str | None
    """None until a worker has read it."""
    previous_revision: str | None
    """What the last load is to replace, served until a worker has read its source."""
    pinned: bool
    unloading: str | None
    """"drain" or "force"."""
    num_workers: int
    """Living workers; the next four count some of them."""
    num_loaded: int
    """Workers that serve it."""
    num_in_memory: int
    """Of those, workers that have its weights in host memory; the others read them again."""
    num_resident: int
    """Workers on which its weights stand in a slot."""
    num_pinned: int
    """Workers on which it keeps one."""
    errors: dict[str, str]
    """Worker -> why it does not serve the adapter."""
    waiting: int
    """Jobs that nobody has claimed yet."""
    requests: int
    """Jobs that the living workers have answered, and with how many tokens."""
    output_tokens: int
    loads: int
    """How often they have read it from its source."""
    evictions: int
    """How often it left host memory for another one."""
    slot_loads: int
    slot_evictions: int
    mean_load_seconds: float | None
    """Of reading it from its source."""
    fetch: FetchStatus | None = None
    """How its fetching from the hub is going, until it is loaded from there."""


def read_statuses(reader: QueueReader, fetches: Fetches) -> list[AdapterStatus]:
    """Every adapter that the queue knows or fetches, by name, in a few round trips however many
    there are."""
    records, workers = reader.adapters(), reader.workers()
    waiting = reader.num_waiting_by_adapter()
    places = _Places(workers)
    found = {
        name: _status(name, record, workers, places, waiting) for name, record in records.items()
    }
    for name, fetch in fetches.statuses().items():
        if fetch.state != "loaded":
            record = AdapterRecord(source=fetch.source, pinned=fetch.pinned)
            known = found.get(name) or _status(name, record, workers, places, waiting)
            found[name] = replace(known, fetch=fetch)
    return [found[name] for name in sorted(found)]


class _Places:
    """On how many workers each adapter is, by name: a list has thousands of them."""

    def __init__(self, workers: Sequence[WorkerState]) -> None:
        self.loaded = Counter(name for worker in workers for name in worker.adapters)
        self.in_memory = Counter(name for worker in workers for name in _in_memory(worker))
        self.resident = Counter(name for worker in workers for name in set(worker.resident))
        self.pinned = Counter(name for worker in workers for name in worker.pinned)


def _in_memory(worker: WorkerState) -> Sequence[str]:
    return list(worker.adapters) if worker.in_memory is None else worker.in_memory


def _status(
    name: str,
    record: AdapterRecord,
    workers: Sequence[WorkerState],
    places: _Places,
    waiting: dict[str, int],
) -> AdapterStatus:
    counts = [worker.adapter_counts.get(name, _NOTHING_DONE) for worker in workers]
    loads = sum(count.loads for count in counts)
    load_seconds = sum(count.load_seconds for count in counts)
    return AdapterStatus(
        name=name,
        source=record.source,
        revision=record.revision,
        previous_revision=record.previous.revision if record.previous else None,
        pinned=record.pinned,
        unloading=record.unloading,
        num_workers=len(workers),
        num_loaded=places.loaded[name],
        num_in_memory=places.in_memory[name],
        num_resident=places.resident[name],
        num_pinned=places.pinned[name],
        errors={w.id: w.adapter_errors[name] for w in workers if name in w.adapter_errors},
        waiting=waiting.get(name, 0),
        requests=sum(count.requests for count in counts),
        output_tokens=sum(count.output_tokens for count in counts),
        loads=loads,
        evictions=sum(count.evictions for count in counts),
        slot_loads=sum(count.slot_loads for count in counts),
        slot_evictions=sum(count.slot_evictions for count in counts),
        mean_load_seconds=load_seconds / loads if loads else None,
    )
