"""Adapters while workers run: the commands that change them, and what workers answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from producer.advice import counted, known_adapters, listed
from schemas.adapter import AdapterRecord, is_adapter_name
from schemas.errors import BadInput, TooManyPinned, UnknownId
from schemas.keys import WHOLE_QUEUE
from schemas.worker_state import WorkerState

#: Seconds between two looks at the workers' heartbeats. A worker writes one once it has acted.
LOOK_SECONDS = 0.1

#: Seconds that a worker has for its answer, where nobody says otherwise.
ANSWER_SECONDS = 60.0

#: Told at every look how many jobs of the adapter are left, and what keeps workers from them,
#: which is empty if nothing does.
OnPause = Callable[[int, str], None]


@dataclass(frozen=True)
class Change:
    """A command that the desired state holds."""

    action: Literal["load", "unload", "pin", "unpin"]
    name: str
    version: int
    """That of the desired state with it; 0 while the adapter is still to be fetched."""
    pinned: bool = False
    """Whether it asks for a slot to keep; a load that does not leaves the pin as it is."""
    is_retired: bool = False
    """Whether no job of an unloaded adapter was left, so that the queue knows it no more."""
    is_withdrawn: bool = False
    """Whether nothing but a request to fetch it was there to be taken back."""
    num_failed: int = 0
    """Jobs of an adapter unloaded by force that waited for it, and have failed."""
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


def load(
    queue: JobQueue, reader: QueueReader, name: str, source: Path | str, *, pinned: bool
) -> Change:
    """Let every worker read an adapter from the folder, in place of one of that name; a pin of that
    stays."""
    folder = _folder(str(source))
    require_name(name)
    with slots_to_keep(reader, name, pinned) as limit:
        version = queue.set_adapter(name, folder, pinned=pinned, max_pinned=limit)
    return Change("load", name, version, pinned)


def unload(queue: JobQueue, reader: QueueReader, name: str, *, force: bool) -> Change:
    """Take an adapter off all workers, once its waiting jobs are finished, or failed by force."""
    require_name(name)
    was_known = reader.adapter(name) is not None
    # Workers fail them too, so the scripts' own numbers would tell of some of them.
    num_waiting = reader.num_waiting_of(name) if force else 0
    version = queue.unload_adapter(name, "force" if force else "drain")
    if version is None:
        raise unknown(reader, name)
    is_retired = _retire(queue, reader, name)
    is_withdrawn = not was_known and not is_retired and reader.adapter(name) is None
    num_failed = max(0, num_waiting - reader.num_waiting_of(name)) if num_waiting else 0
    return Change(
        "unload",
        name,
        version,
        is_retired=is_retired or is_withdrawn,
        is_withdrawn=is_withdrawn,
        num_failed=num_failed,
    )


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
    # All are read, so that a damaged one, with which workers follow none, is told.
    record = reader.adapters().get(name)
    if record and record.unloading:
        raise BadInput(f"'{name}' is being unloaded; `producer lora load` brings it back.")
    with slots_to_keep(reader, name) as limit:
        version = queue.pin_adapter(name, True, max_pinned=limit)
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
        obstacle = _pause_of(reader, change.name) if unloading == "drain" else ""
        if unloading == "drain" and not is_served and _have_followed(workers, change):
            deadline = now
        on_pause(num_jobs, obstacle)
        if now >= deadline or all(answer for _, answer in found):
            late = _why_late(change, seconds, num_jobs, is_served, obstacle)
            return [answer or _failure(worker, late) for worker, answer in found]
        time.sleep(LOOK_SECONDS)


def _answer(change: Change, record: AdapterRecord | None, worker: WorkerState) -> Answer | None:
    """What the worker's state says; None if it has not acted on the change yet."""
    name = change.name
    if change.action == "unload":
        if record and not record.unloading:
            return _failure(worker, "it was loaded again meanwhile")
        return None if record or name in worker.adapters else _success(worker)
    if change.action == "load" and record and record.version > change.version:
        # What the worker says is of that load, whatever became of this one.
        return _failure(worker, "it was loaded again meanwhile")
    if not _has_followed(worker, change):
        return None
    if change.action != "load" and (name in worker.pinned) == change.pinned:
        return _success(worker)  # Also where a load of it has failed, and the old one is pinned.
    if change.action == "unpin":
        return _failure(worker, "it is still pinned")
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


def _pause_of(reader: QueueReader, name: str) -> str:
    """By what pause jobs of an adapter wait, and what ends it; empty if by none."""
    paused = reader.paused()
    if name in paused:
        return f"'{name}' is paused: `producer resume {name}` lets its jobs be finished"
    if WHOLE_QUEUE in paused:
        return f"queue '{reader.name}' is paused: `producer resume` lets its jobs be finished"
    return ""


def _why_late(change: Change, timeout: float, num_jobs: int, is_served: bool, obstacle: str) -> str:
    if change.action != "unload" or not num_jobs:
        return f"no answer in {timeout:g} s"
    left = f"{counted(num_jobs)} of it left"
    if is_served:
        return f"{left} after {timeout:g} s" + (f"; {obstacle}" if obstacle else "")
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


@contextmanager
def slots_to_keep(reader: QueueReader, name: str, wanted: bool = True) -> Iterator[int | None]:
    """How many adapters every living worker can keep pinned, as one slot must stay free: the script
    that is to pin one more counts them. None if no worker is alive, or no pin is wanted.

    Raises BadInput if the script finds as many.
    """
    workers = reader.workers() if wanted else []
    worker = min(workers, key=lambda w: w.max_loras_per_batch, default=None)
    limit = worker.max_loras_per_batch - 1 if worker else None
    try:
        yield limit
    except TooManyPinned as error:
        if worker is None or limit is None:
            raise
        raise BadInput(
            f"'{name}' cannot be pinned: worker {worker.id} can keep {counted(limit, 'adapter')}"
            f" pinned (--max-loras-per-batch {worker.max_loras_per_batch}, of which one slot stays"
            " free)" + (f", and pinned already: {listed(error.pinned)}." if error.pinned else ".")
        ) from None
