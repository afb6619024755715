"""The rq queue of a fetcher: takes jobs off, runs them, and sees that none is lost."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from typing import cast

import redis
import structlog
from rq import SimpleWorker
from rq.job import JobStatus
from rq.serializers import JSONSerializer
from rq.worker_registration import clean_worker_registry, register

from broker.fetches import Fetches
from broker.job_queue import JobQueue
from schemas.hub import FetchRecord
from worker.hub.fetch_job import FetchJob, JobRefused

log = structlog.get_logger()

#: Seconds between two signs of life, and after which a silent fetcher counts as gone.
HEARTBEAT_SECONDS, ALIVE_SECONDS = 3.0, 15

#: Seconds between two looks at what should be on the queue.
_LOOK_SECONDS = 2.0

#: Seconds for which an idle fetcher waits for a job.
_IDLE_WAIT = 1


class _Bookkeeping(SimpleWorker):
    """rq's own account of a worker and its jobs: who is alive, what runs, has failed, is retried.

    Its loop is not used. That quits when Redis is away, and what it does on the side (maintenance,
    commands by pub/sub) reads records with rq's default serializer, which unpickles.
    """

    def get_heartbeat_ttl(self, job: object, working_time: float = 0.0) -> int:
        return ALIVE_SECONDS

    def procline(self, message: str) -> None:
        """The process keeps its title."""


class FetchQueue:
    """One fetcher's place at the rq queue of a Lorry queue."""

    def __init__(self, queue: JobQueue, run: Callable[[FetchJob, str, str], None]) -> None:
        """``run`` is given a job, and the adapter's name and the request's id that it names."""
        self._queue = queue
        self._run = run
        self.fetches = Fetches(queue.client, queue.name)
        self.fetches.require_rq()
        self._rq_queue = self.fetches.rq_queue()
        self._connection = self._rq_queue.connection
        self._worker = _Bookkeeping(
            [self._rq_queue],
            name=f"{socket.gethostname()}-{secrets.token_hex(4)}",
            connection=self._connection,
            job_class=FetchJob,
            serializer=JSONSerializer,
            worker_ttl=16,  # rq derives the time after which a silent connection is dropped: 11 s.
        )
        self._next_look = 0.0

    @property
    def fetcher(self) -> str:
        """The fetcher's own name."""
        return self._worker.name

    def join(self) -> None:
        """Be known as alive; ``beat`` keeps that up."""
        self._worker.register_birth()  # type: ignore[no-untyped-call]
        clean_worker_registry(self._rq_queue)
        self.beat()

    def beat(self) -> None:
        """Give a sign of life."""
        with self._connection.pipeline() as pipeline:
            register(self._worker, pipeline)  # Again, should Redis have lost all.
            self._worker.heartbeat(ALIVE_SECONDS, pipeline=pipeline)
            pipeline.execute()

    def leave(self) -> None:
        self._worker.register_death()  # type: ignore[no-untyped-call]

    def turn(self) -> None:
        """Look after the rq queue if it is time, then take a job and run it, or wait for one."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            # rq's list of what runs; rq itself would call back whatever jobs of the past name.
            running = self._rq_queue.started_job_registry.key
            self._connection.zremrangebyscore(running, 0, time.time())
            for name, record in self.fetches.records().items():
                if not record.is_over:
                    self._look_after(name, record)
        if taken := self._connection.blpop([self._rq_queue.key], _IDLE_WAIT):
            job = self._read(cast(bytes, taken[1]).decode(errors="replace"))
            if job and not self._is_run_by_another(job):
                self._worker.execute_job(job, self._rq_queue)

    def _read(self, id_: str) -> FetchJob | None:
        """The job of that id; None, and a line in the log, if there is none to be run."""
        try:
            job = FetchJob.read(id_, self._connection, self._rq_queue.name)
        except (JobRefused, redis.ResponseError) as error:
            log.error("rq_job_refused", job=id_[:100], reason=str(error)[:500])
            return None
        if job:
            job.function = lambda name, id_: self._run(job, name, id_)
        return job

    def _look_after(self, name: str, record: FetchRecord) -> None:
        """See that a request has an rq job that goes on: its producer, or a fetcher, may have died,
        and the time of the next try may have come."""
        if self._connection.type(f"rq:job:{record.id}") == b"none":
            self.fetches.enqueue(name, record.id)
            return
        job = self._read(record.id)
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
            if self._connection.lpos(self._rq_queue.key, record.id) is None:
                self._rq_queue.push_job_id(record.id)
        elif status == JobStatus.STARTED:
            if not self._is_run_by_another(job):
                if job.should_retry:
                    job.note_retry(job.attempt + 1, "its fetcher died")
                self._worker.handle_job_failure(job, self._rq_queue, exc_string="fetcher died")
        elif job.should_retry:
            self._rq_queue.enqueue_job(job)
        else:
            self._queue.fail_fetch(name, record.id, "its fetcher died at every try.")

    def _is_run_by_another(self, job: FetchJob) -> bool:
        if job.get_status(refresh=False) != JobStatus.STARTED:
            return False
        if not job.worker_name or job.worker_name == self._worker.name:
            return False  # This one is between two jobs.
        return bool(self._connection.exists(f"rq:worker:{job.worker_name}"))
