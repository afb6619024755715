"""Results as they come: every wait is one blocking read of the server, never a busy poll."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from broker.connection import BLOCK_SECONDS
from broker.queue_reader import READ_CHUNK, Finished, QueueReader
from schemas.result import TERMINAL_STATES, Result

#: Seconds between two reads while jobs finish: a fast queue is read in runs, not job by job.
GATHER_SECONDS = 0.05

#: Called before every wait, at least every ``BLOCK_SECONDS``: shows progress, looks for workers.
OnWake = Callable[[], None]


def finished_runs(
    reader: QueueReader, positions: dict[str, str], deadline: float | None = None
) -> Iterator[list[Finished]]:
    """What finishes in the submissions after their positions, for as long as there are any.

    Moves the positions on. Gives an empty list when nothing has finished for ``BLOCK_SECONDS``, or
    by the deadline (of ``time.monotonic``). Raises UnknownId if a submission or its results have
    gone meanwhile.
    """
    while positions:
        wait = BLOCK_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
        found = reader.finished(positions, wait=wait)
        for finished in found:
            positions[finished.submission] = finished.position
        if not found:
            for submission in positions:
                reader.require_results(submission)
        yield found
        if found and sum(len(finished.job_ids) for finished in found) < READ_CHUNK:
            time.sleep(GATHER_SECONDS)


def in_completion_order(
    reader: QueueReader, submissions: Sequence[str], jobs: Sequence[str], on_wake: OnWake
) -> Iterator[Result]:
    """The results of whole submissions and of single jobs, as they finish, until all have."""
    left = {id_: reader.submission(id_).total for id_ in submissions}
    # Positions are taken before states are read, so that nothing finishes unseen in between.
    start = positions_of_jobs(reader, jobs) | dict.fromkeys(submissions, "0")
    pending: set[str] = set()
    for result in reader.results(jobs):
        if result.status in TERMINAL_STATES:
            yield result
        else:
            pending.add(result.id)
    runs = finished_runs(reader, start)
    while pending or left:
        on_wake()
        for finished in next(runs):
            awaited = [id_ for id_ in dict.fromkeys(finished.job_ids) if id_ in pending]
            for result in _still_finished(reader, awaited):
                pending.discard(result.id)
                yield result
            if finished.submission in left:
                left[finished.submission] -= len(finished.job_ids)
                yield from _still_finished(reader, finished.job_ids)
        for id_ in [id_ for id_, number in left.items() if number <= 0]:
            if _has_ended(reader, id_, start[id_]):
                del left[id_]


def _still_finished(reader: QueueReader, job_ids: Sequence[str]) -> Iterator[Result]:
    """Results of jobs that have finished, without those that were dead and have been replayed."""
    return (result for result in reader.results(job_ids) if result.status in TERMINAL_STATES)


def _has_ended(reader: QueueReader, submission: str, position: str) -> bool:
    """Whether nothing will finish any more after a position: a job that was dead and has been
    replayed finishes twice."""
    # In this order, so that nothing can come between.
    is_complete = reader.submission(submission).is_complete
    return is_complete and reader.finished_position(submission) == position


def in_input_order(
    reader: QueueReader, submission: str, on_wake: OnWake, deadline: float | None = None
) -> Iterator[Result]:
    """A submission's results in the order of its jobs, each as soon as it and all before it have
    finished, in constant memory, until all have or the deadline (of ``time.monotonic``) is over.
    All jobs of the submission must have been sent."""
    runs = finished_runs(reader, {submission: reader.finished_position(submission)}, deadline)
    ids = reader.job_ids(submission)
    window: deque[str] = deque()
    while True:
        yield from _finished_head(reader, window, ids)
        head_is_finished = False
        while window and not head_is_finished:
            if deadline is not None and time.monotonic() >= deadline:
                return
            on_wake()
            head_is_finished = any(window[0] in finished.job_ids for finished in next(runs))
        if not window:
            return


def positions(reader: QueueReader, id_: str, is_submission: bool) -> dict[str, str]:
    """Where to read what finishes from now on of a submission, or of the one a job belongs to."""
    if is_submission:
        return {id_: reader.finished_position(id_)}
    return positions_of_jobs(reader, [id_])


def positions_of_jobs(reader: QueueReader, jobs: Sequence[str]) -> dict[str, str]:
    """Where the ends of the jobs will be told: their submissions, after what has finished now."""
    submissions = {result.submission for result in reader.results(jobs)}
    submissions.discard("")  # Of a damaged record, which tells none: its job will not end any more.
    return {id_: reader.finished_position(id_) for id_ in submissions}


def _finished_head(reader: QueueReader, window: deque[str], ids: Iterator[str]) -> Iterator[Result]:
    """The results up to the first unfinished job, which is then the first of ``window``."""
    ahead = 1  # Doubles while all are finished: little is read in vain when few are.
    while True:
        window.extend(islice(ids, max(0, ahead - len(window))))
        if not window:
            return
        for result in reader.results(list(islice(window, ahead))):
            if result.status not in TERMINAL_STATES:
                return
            window.popleft()
            yield result
        ahead = min(2 * ahead, READ_CHUNK)
