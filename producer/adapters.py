"""Adapters while workers run: the commands that change them, and what workers answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from broker.fetches import Fetches, FetchStatus
from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from producer.advice import counted, known_adapters, listed
from schemas.adapter import AdapterRecord, is_adapter_name
from schemas.errors import BadInput, UnknownId
from schemas.worker_state import AdapterCounts, WorkerState

#: Seconds between two looks at the workers' heartbeats. A worker writes one once it has acted.
LOOK_SECONDS = 0.1

#: Seconds that a worker has for its answer, where nobody says otherwise.
ANSWER_SECONDS = 60.0

#: Of an adapter that a worker has never had.
_NOTHING_DONE = AdapterCounts()

#: Told before every pause how many jobs of the adapter are left.
OnPause = Callable[[int], None]


@dataclass(frozen=True)
class Change:
    """A command that the desired state holds."""

    action: Literal["load", "unload", "pin", "unpin"]
    name: str
    version: int
    """That of the desired state with it; 0 while the adapter is still to be fetched."""
    pinned: bool = False
    """Whether the adapter shall keep a slot."""
    is_retired: bool = False
    """Whether no job of an unloaded adapter was left, so that the queue knows it no more."""
    fetch: str | None = None
    """The request to fetch it from the hub, if it comes from there."""


@dataclass(frozen=True)
class Answer:
    """What became of a command on one worker."""

    worker: str
    success: bool
    error_message: str | None
    loaded_adapters: dict[str, str]
    """Name -> revision of all adapters that it serves."""


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
    """Living workers; the next two count some of them."""
    num_loaded: int
    num_resident: int
    """Workers on which its weights stand in a slot."""
    errors: dict[str, str]
    """Worker -> why it does not serve the adapter."""
    waiting: int
    """Jobs that nobody has claimed yet."""
    requests: int
    """Jobs that the living workers have answered, and with how many tokens."""
    output_tokens: int
    loads: int
    evictions: int
    mean_load_seconds: float | None
    fetch: FetchStatus | None = None
    """How its fetching from the hub is going, until it is loaded from there."""


def load(
    queue: JobQueue, reader: QueueReader, name: str, source: Path | str, *, pinned: bool
) -> Change:
    """Let every worker read an adapter from the folder, in place of one of that name."""
    folder = _folder(str(source))
    check_load(reader, name, pinned=pinned)
    return Change("load", name, queue.set_adapter(name, folder, pinned=pinned), pinned)


def check_load(reader: QueueReader, name: str, *, pinned: bool) -> None:
    """Raises BadInput for what cannot be a name, and if a worker has no slot left to keep."""
    require_name(name)
    if pinned:
        _require_slot_to_keep(reader, name)


def unload(queue: JobQueue, reader: QueueReader, name: str, *, force: bool) -> Change:
    """Take an adapter off all workers, once its waiting jobs are finished, or failed by force."""
    require_name(name)
    version = queue.unload_adapter(name, "force" if force else "drain")
    if version is None:
        raise unknown(reader, name)
    return Change("unload", name, version, is_retired=_retire(queue, reader, name))


def _retire(queue: JobQueue, reader: QueueReader, name: str) -> bool:
    """Do what workers do with an adapter that is unloading, as there may be none alive: fail its
    waiting jobs if that is by force, and take it off if no job is left."""
    left = reader.num_jobs_of(name)
    while not (is_retired := queue.retire_adapter(name)):
        before, left = left, reader.num_jobs_of(name)
        if left >= before:
            break
    return is_retired


def pin(queue: JobQueue, reader: QueueReader, name: str) -> Change:
    """Let an adapter keep a slot on every worker."""
    require_name(name)
    if record := reader.adapter(name):
        if record.unloading:
            raise BadInput(f"'{name}' is being unloaded; `producer lora load` brings it back.")
        _require_slot_to_keep(reader, name)
    version = queue.pin_adapter(name, True)
    if version is None:
        raise unknown(reader, name)
    return Change("pin", name, version, pinned=True)


def unpin(queue: JobQueue, reader: QueueReader, name: str) -> Change:
    """Let an adapter give up its slot like any other."""
    require_name(name)
    version = queue.pin_adapter(name, False)
    if version is None:
        raise unknown(reader, name)
    return Change("unpin", name, version)


def answers(
    reader: QueueReader, change: Change, *, timeout: float | None, on_pause: OnPause
) -> list[Answer]:
    """Waits until every living worker has answered; one that dies meanwhile drops out.

    A worker that has not by the end of ``timeout`` seconds answers so. Without a timeout each has
    ``ANSWER_SECONDS``, and an adapter that is unloaded as long as jobs of it are left and somebody
    serves them; if nobody does, that is the answer.
    """
    seconds = ANSWER_SECONDS if timeout is None else timeout
    if not seconds >= 0:  # Written so that it refuses NaN too.
        raise BadInput(f"A timeout is a number of seconds, not {timeout}.")
    deadline = time.monotonic() + seconds
    while True:
        workers = sorted(reader.workers(), key=lambda worker: worker.id)
        record = reader.adapter(change.name)
        num_jobs = reader.num_jobs_of(change.name)
        found = [(worker, _answer(change, record, worker)) for worker in workers]
        is_served = any(change.name in worker.adapters for worker in workers)
        now = time.monotonic()
        unloading = record.unloading if record and num_jobs else None
        if unloading and is_served and timeout is None:
            deadline = now + seconds
        if unloading == "drain" and not is_served and _have_followed(workers, change):
            deadline = now
        if now >= deadline or all(answer for _, answer in found):
            late = _why_late(change, seconds, num_jobs, is_served)
            return [answer or _failure(worker, late) for worker, answer in found]
        on_pause(num_jobs)
        time.sleep(LOOK_SECONDS)


def read_statuses(reader: QueueReader, fetches: Fetches) -> list[AdapterStatus]:
    """Every adapter that the queue knows or fetches, by name, in a few round trips however many
    there are."""
    records, workers = reader.adapters(), reader.workers()
    waiting = reader.num_waiting_by_adapter()
    resident = [set(worker.resident) for worker in workers]
    found = {
        name: _status(name, record, workers, sum(name in names for names in resident), waiting)
        for name, record in records.items()
    }
    for name, fetch in fetches.statuses().items():
        if fetch.state != "loaded":
            known = found.get(name) or _status(
                name, AdapterRecord(source=fetch.source, pinned=fetch.pinned), workers, 0, waiting
            )
            found[name] = replace(known, fetch=fetch)
    return [found[name] for name in sorted(found)]


def _status(
    name: str,
    record: AdapterRecord,
    workers: Sequence[WorkerState],
    num_resident: int,
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
        num_loaded=sum(name in worker.adapters for worker in workers),
        num_resident=num_resident,
        errors={w.id: w.adapter_errors[name] for w in workers if name in w.adapter_errors},
        waiting=waiting.get(name, 0),
        requests=sum(count.requests for count in counts),
        output_tokens=sum(count.output_tokens for count in counts),
        loads=loads,
        evictions=sum(count.evictions for count in counts),
        mean_load_seconds=load_seconds / loads if loads else None,
    )


def _answer(change: Change, record: AdapterRecord | None, worker: WorkerState) -> Answer | None:
    """What the worker's state says; None if it has not acted on the change yet."""
    name = change.name
    if change.action == "unload":
        if record and not record.unloading:
            return _failure(worker, "it was loaded again meanwhile")
        return None if record or name in worker.adapters else _success(worker)
    if not _has_followed(worker, change):
        return None
    if change.action == "unpin":
        is_pinned = name in worker.pinned
        return _failure(worker, "it is still pinned") if is_pinned else _success(worker)
    if name in worker.adapter_errors:
        return _failure(worker, worker.adapter_errors[name])
    if name not in worker.adapters:
        return _failure(worker, "it was unloaded meanwhile")
    if change.pinned and name not in worker.pinned:
        return _failure(
            worker,
            "it is loaded, but not pinned: others keep the slots, or it was unpinned meanwhile",
        )
    return _success(worker)


def _have_followed(workers: Sequence[WorkerState], change: Change) -> bool:
    return all(_has_followed(worker, change) for worker in workers)


def _has_followed(worker: WorkerState, change: Change) -> bool:
    """Whether the worker has acted on the change, though it may have other adapters to read."""
    has_all = worker.desired_version >= change.version
    has_this = worker.seen_version >= change.version and change.name not in worker.reading
    return has_all or has_this


def _success(worker: WorkerState) -> Answer:
    return Answer(worker.id, True, None, worker.adapters)


def _failure(worker: WorkerState, reason: str) -> Answer:
    return Answer(worker.id, False, reason, worker.adapters)


def _why_late(change: Change, timeout: float, num_jobs: int, is_served: bool) -> str:
    if change.action != "unload" or not num_jobs:
        return f"no answer in {timeout:g} s"
    left = f"{counted(num_jobs)} of it left"
    if is_served:
        return f"{left} after {timeout:g} s"
    return f"{left}, and no worker serves it; an unload by force lets them fail"


def require_name(name: str) -> None:
    if not is_adapter_name(name):
        raise BadInput(
            f"'{name}' cannot name an adapter: use up to 128 letters, digits and . _ - /"
            " beginning with a letter or digit."
        )


def _folder(source: str) -> str:
    """The folder as workers are told it: absolute, since theirs is another current folder."""
    try:
        source.encode()
    except UnicodeEncodeError:
        raise BadInput(f"'{source}' is not UTF-8, so workers cannot be told it.") from None
    if not source.strip() or "\0" in source or os.path.isfile(source):
        raise BadInput(f"'{source}' is no folder; an adapter is a folder with its PEFT files.")
    # Links are left to the workers, on whose file systems they may lead elsewhere.
    return os.path.abspath(source)


def unknown(reader: QueueReader, name: str) -> UnknownId:
    """The error that says so, with what may have been meant."""
    known = reader.adapters()
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else "."
    names = f" {known_adapters(known)}" if known else ""
    return UnknownId(f"Queue '{reader.name}' knows no adapter '{name}'{hint}{names}")


def _require_slot_to_keep(reader: QueueReader, name: str) -> None:
    """Raises BadInput if a worker has no slot left to keep for the adapter: one must stay free."""
    pinned = [
        other for other, record in reader.adapters().items() if record.pinned and other != name
    ]
    worker = min(reader.workers(), key=lambda w: w.max_loras_per_batch, default=None)
    if worker is None or len(pinned) < worker.max_loras_per_batch - 1:
        return
    limit = worker.max_loras_per_batch - 1
    raise BadInput(
        f"'{name}' cannot be pinned: worker {worker.id} can keep {counted(limit, 'adapter')} pinned"
        f" (--max-loras-per-batch {worker.max_loras_per_batch}, of which one slot stays free)"
        + (f", and pinned already: {listed(pinned)}." if pinned else ".")
    )
