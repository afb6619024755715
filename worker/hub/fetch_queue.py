"""The rq queue of a fetcher: takes jobs off, runs them, and sees that none is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

from rq.job import JobStatus

from broker.fetches import Fetches
from broker.job_queue import JobQueue
from schemas.hub import FetchRecord
from worker.hub.fetch_job import FetchJob
from worker.rq_place import RqPlace

#: Seconds between two signs of life, and after which a silent fetcher counts as gone.
HEARTBEAT_SECONDS, ALIVE_SECONDS = 3.0, 15

#: Seconds between two looks at what should be on the queue.
_LOOK_SECONDS = 2.0


class FetchQueue:
    """One fetcher's place at the rq queue of a Lorry queue."""

    def __init__(self, queue: JobQueue, run: Callable[[FetchJob, str, str], None]) -> None:
        """``run`` is given a job, and the adapter's name and the request's id that it names."""
        self._queue = queue
        self._run = run
        self.fetches = Fetches(queue.client, queue.name)
        self.fetches.require_rq()
        self.place = RqPlace(self.fetches.rq_queue(), FetchJob, alive_seconds=ALIVE_SECONDS)
        self._rq_queue, self._connection = self.place.queue, self.place.connection
        self._next_look = 0.0

    def turn(self) -> None:
        """Look after the rq queue if it is time, then take a job and run it, or wait for one."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            self.place.tidy()
            for name, record in self.fetches.records().items():
                if not record.is_over:
                    self._look_after(name, record)
        if job := self.place.take():
            job.function = lambda name, id_: self._run(job, name, id_)
            self.place.run(job)

    def _look_after(self, name: str, record: FetchRecord) -> None:
        """See that a request has an rq job that goes on: its producer, or a fetcher, may have died,
        and the time of the next try may have come."""
        if self._connection.type(f"rq:job:{record.id}") == b"none":
            self.fetches.enqueue(name, record.id)
            return
        job = self.place.read(record.id)
        if job is None:
            self._queue.fail_fetch(name, record.id, "its rq job is not one that a fetcher runs.")
            return
        status = job.get_status(refresh=False)
        if status == JobStatus.SCHEDULED:
            scheduled = self._rq_queue.scheduled_job_registry.key
            due = self._connection.zscore(scheduled, record.id)
            is_taken = due is None  # By a fetcher that may have died before it put the job back.
            if is_taken or (
                time.time() >= cast(float, due) and self._connection.zrem(scheduled, record.id)
            ):
                self._rq_queue.enqueue_job(job)
        elif status == JobStatus.QUEUED:
            # A fetcher that died had taken it off, or one has just taken it off, and then a second
            # run finds the request over.
            if not self.place.is_listed(record.id):
                self._rq_queue.push_job_id(record.id)
        elif status == JobStatus.STARTED:
            if not self.place.is_run_by_another(job):
                if job.should_retry:
                    job.note_retry(job.attempt + 1, "its fetcher died")
                self.place.bookkeeping.handle_job_failure(
                    job, self._rq_queue, exc_string="fetcher died"
                )
        elif job.should_retry:
            self._rq_queue.enqueue_job(job)
        else:
            self._queue.fail_fetch(name, record.id, "its fetcher died at every try.")
