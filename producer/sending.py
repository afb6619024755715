"""Sends a spool, run by run, as the queue has room."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from broker.job_queue import JobQueue
from broker.outcomes import NOTHING, ConflictError, FullError, Size, SubmissionCancelled
from broker.submissions import JobRecord
from producer import advice
from producer.limiting import describe
from producer.spool import Run, Spool
from schemas.errors import BadInput, LorryError, QueueFull

#: Seconds between two tries while a queue is full.
FULL_PAUSE = 0.25

#: Called with the reason before every pause.
OnFull = Callable[[str], None]


def send_run(
    queue: JobQueue, spool: Spool, run: Run, on_full: OnFull | None, deadline: float | None
) -> None:
    """Send a run, in pieces if there is not room for all of it, which is waited for until the
    deadline (of ``time.monotonic``). See ``Client.send``."""
    name = spool.name.encode(errors="replace").decode()  # A file name need not be UTF-8.
    start, end = 0, len(run.jobs)
    while start < len(run.jobs):
        offset, jobs = run.offset + start, run.jobs[start:end]
        try:
            queue.submit(
                *(spool.submission, name, spool.num_jobs, offset, jobs),
                result_ttl=spool.result_ttl,
                rest=_rest(spool, run) if offset == 0 else NOTHING,
                webhook=spool.webhook,
            )
            start, end = end, len(run.jobs)
        except ConflictError as error:
            indices = [start + index for index in error.indices]
            raise BadInput(_conflict(spool, run, indices)) from error
        except SubmissionCancelled as error:
            raise LorryError(
                f"Submission {spool.submission} was cancelled while it was sent."
                f" {sent(spool, error.num_sent)}"
            ) from error
        except FullError as full:
            if not full.num_fitting:  # The first job is a new one, then: what is stored has room.
                _require_smaller(full, spool, jobs[0], offset)
            if spool.when_full == "refuse":
                raise QueueFull(_refusal(full, spool, offset)) from full
            if full.num_fitting:
                end = start + full.num_fitting
            elif deadline is not None and time.monotonic() >= deadline:
                raise QueueFull(_given_up(full, spool, offset)) from full
            else:
                end = len(run.jobs)
                if on_full:
                    on_full(f"{describe(full.waiting, full.limits)}.")
                time.sleep(FULL_PAUSE)


def sent(spool: Spool, num_sent: int) -> str:
    """How many jobs are in the queue, as a sentence."""
    return (
        f"{num_sent} of {advice.counted(spool.num_jobs)} are known to have been sent,"
        f" as submission {spool.submission}."
    )


def _rest(spool: Spool, run: Run) -> Size:
    """What must find room behind the first run: all of it, or nothing is sent."""
    if spool.when_full == "wait":
        return NOTHING
    num_to_run = spool.num_jobs - spool.num_refused
    return Size(num_to_run - run.num_to_run, spool.num_bytes - run.num_bytes)


def _require_smaller(full: FullError, spool: Spool, job: JobRecord, num_sent: int) -> None:
    """Raises BadInput for a job that would never find room."""
    size, limit = len(job.payload.encode()), full.limits.bytes
    if limit is not None and size > limit:
        raise BadInput(
            f"Job '{job.id}' has {advice.exact_bytes(size)}, and at most"
            f" {advice.exact_bytes(limit)} may wait: shorten it, or raise the queue's bound with"
            f" `producer limits`. {sent(spool, num_sent)}"
        )


def _refusal(full: FullError, spool: Spool, num_sent: int) -> str:
    size = f"{advice.counted(spool.num_jobs)} ({advice.counted_bytes(spool.num_bytes)})"
    reason = f"{describe(full.waiting, full.limits)}, so there is no room for {size}"
    if not num_sent:
        return (
            f"{reason}; nothing was sent. `wait` instead of `refuse` sends them as there is room."
        )
    return (
        f"{reason}: others sent meanwhile. {sent(spool, num_sent)}"
        f" `producer cancel {spool.submission}` takes them back."
    )


def _given_up(full: FullError, spool: Spool, num_sent: int) -> str:
    reason = f"{describe(full.waiting, full.limits)}, and there was no room within the time given"
    if not num_sent:
        return f"{reason}; nothing was sent."
    return (
        f"{reason}. {sent(spool, num_sent)} Those run;"
        f" `producer cancel {spool.submission}` takes them back."
    )


def _conflict(spool: Spool, run: Run, indices: Sequence[int]) -> str:
    places = [f"{spool.name}:{run.lines[i]}: id '{run.jobs[i].id}'" for i in indices]
    return (
        "Somebody else has just sent other jobs under ids of this input:"
        f" {advice.listed(places)}. {sent(spool, run.offset)}"
    )
