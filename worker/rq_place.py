"""A process's place at an rq queue: it is known as alive there, takes jobs off, and runs them."""

from __future__ import annotations

import secrets
import socket
import time
from typing import Generic, TypeVar, cast

import redis
import structlog
from rq import Queue, SimpleWorker
from rq.job import JobStatus
from rq.serializers import JSONSerializer
from rq.worker_registration import clean_worker_registry, register

from worker.rq_job import JobRefused, OneFunctionJob

log = structlog.get_logger()

AnyJob = TypeVar("AnyJob", bound=OneFunctionJob)

#: Seconds for which an idle process waits for a job.
_IDLE_WAIT = 1


class Bookkeeping(SimpleWorker):
    """rq's own account of a worker and its jobs: who is alive, what runs, has failed, is retried.

    Its loop is not used. That quits when Redis is away, and what it does on the side (maintenance,
    commands by pub/sub) reads records with rq's default serializer, which unpickles.
    """

    #: Seconds after which the process counts as gone if it is silent.
    alive_seconds: int

    def get_heartbeat_ttl(self, job: object, working_time: float = 0.0) -> int:
        return self.alive_seconds

    def procline(self, message: str) -> None:
        """The process keeps its title."""


class RqPlace(Generic[AnyJob]):
    """One process at one rq queue."""

    def __init__(self, rq_queue: Queue, job_class: type[AnyJob], *, alive_seconds: int) -> None:
        """``alive_seconds``: after which it counts as gone if it is silent."""
        self.queue = rq_queue
        self.connection = rq_queue.connection
        self.bookkeeping = Bookkeeping(
            [rq_queue],
            name=f"{socket.gethostname()}-{secrets.token_hex(4)}",
            connection=self.connection,
            job_class=job_class,
            serializer=JSONSerializer,
            worker_ttl=16,  # rq derives the time after which a silent connection is dropped: 11 s.
        )
        self.bookkeeping.alive_seconds = alive_seconds
        self._job_class = job_class

    @property
    def name(self) -> str:
        """The process's own name."""
        return self.bookkeeping.name

    def join(self) -> None:
        """Be known as alive; ``beat`` keeps that up."""
        self.bookkeeping.register_birth()  # type: ignore[no-untyped-call]
        clean_worker_registry(self.queue)
        self.beat()

    def beat(self) -> None:
        """Give a sign of life."""
        with self.connection.pipeline() as pipeline:
            register(self.bookkeeping, pipeline)  # Again, should Redis have lost all.
            self.bookkeeping.heartbeat(self.bookkeeping.alive_seconds, pipeline=pipeline)
            pipeline.execute()

    def leave(self) -> None:
        self.bookkeeping.register_death()  # type: ignore[no-untyped-call]

    def tidy(self) -> None:
        """Shorten rq's list of what runs; rq itself would call back whatever jobs of the past
        name."""
        self.connection.zremrangebyscore(self.queue.started_job_registry.key, 0, time.time())

    def take(self) -> AnyJob | None:
        """The next job that is to be run, once there is one; None if there is none for a second, or
        the next is none to be run."""
        taken = self.connection.blpop([self.queue.key], _IDLE_WAIT)
        if not taken:
            return None
        job = self.read(cast(bytes, taken[1]).decode(errors="replace"))
        return None if job is None or self.is_run_by_another(job) else job

    def read(self, id_: str) -> AnyJob | None:
        """The job of that id; None, and a line in the log, if there is none to be run."""
        try:
            return self._job_class.read(id_, self.connection, self.queue.name)
        except (JobRefused, redis.ResponseError) as error:
            log.error("rq_job_refused", job=id_[:100], reason=str(error)[:500])
            return None

    def run(self, job: AnyJob) -> None:
        """Have the job's ``function`` run, and rq's records tell what became of it."""
        self.bookkeeping.execute_job(job, self.queue)

    def forget(self, id_: str) -> None:
        """Delete rq's record of a job that neither waits nor runs."""
        with self.connection.pipeline() as pipeline:
            pipeline.delete(f"rq:job:{id_}", f"rq:results:{id_}")
            pipeline.zrem(self.queue.failed_job_registry.key, id_)
            pipeline.zrem(self.queue.finished_job_registry.key, id_)
            pipeline.execute()

    def is_listed(self, id_: str) -> bool:
        """Whether a job waits on the queue."""
        return self.connection.lpos(self.queue.key, id_) is not None

    def is_run_by_another(self, job: AnyJob) -> bool:
        """Whether another process that is alive runs a job."""
        if job.get_status(refresh=False) != JobStatus.STARTED:
            return False
        if not job.worker_name or job.worker_name == self.name:
            return False  # This one is between two jobs.
        return bool(self.connection.exists(f"rq:worker:{job.worker_name}"))
