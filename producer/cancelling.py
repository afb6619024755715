"""Jobs and submissions that shall not run any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice

from broker.job_queue import JobQueue
from broker.outcomes import Cancelled
from broker.queue_reader import QueueReader

#: Jobs that one script cancels, in some 10 ms, so that others are served in between.
CHUNK = 200

#: Told after every script how many jobs have been looked at.
OnProgress = Callable[[int], None]


def cancel(
    queue: JobQueue, reader: QueueReader, kinds: Mapping[str, bool], on_progress: OnProgress
) -> Cancelled:
    """Cancel what ``kinds`` names, True for a submission and False for a job, in pieces."""
    ids = chain.from_iterable(
        _jobs_of(queue, reader, id_) if is_submission else [id_]
        for id_, is_submission in kinds.items()
    )
    total, number = Cancelled(), 0
    while chunk := list(islice(ids, CHUNK)):
        total += queue.cancel(chunk)
        number += len(chunk)
        on_progress(number)
    return total


def _jobs_of(queue: JobQueue, reader: QueueReader, submission: str) -> Iterator[str]:
    queue.close_submission(submission)  # First, so that none is added behind what is read here.
    yield from reader.job_ids(submission)
