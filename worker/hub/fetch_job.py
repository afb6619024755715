"""An rq job as a fetcher reads it: it can name one function, and nothing that is looked up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog
from redis import Redis, RedisError
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer

from schemas.errors import LorryError
from schemas.hub import (
    FETCH_BACKOFF,
    FETCH_FUNCTION,
    FETCH_KEPT,
    FETCH_TIMEOUT,
    FetchProgress,
)

log = structlog.get_logger()


class JobRefused(LorryError):
    """A job on the rq queue that no producer of Lorry sends."""


class FetchJob(Job):
    """A job whose record decides nothing but which request is to be fetched.

    rq would import, from names in the record, the function and up to three callbacks, call up web
    addresses, and unpickle what its default serializer wrote; all a producer's to choose. Here
    ``read`` refuses such records, whatever serializer is asked for JSON is used, and ``func`` is
    what the fetcher has set.
    """

    def __init__(
        self, id_: str | None = None, connection: Redis | None = None, serializer: Any = None
    ) -> None:
        super().__init__(id_, connection, JSONSerializer)
        self.function: Callable[..., None] | None = None

    @property
    def func(self) -> Callable[..., None] | None:
        return self.function

    @classmethod
    def read(cls, id_: str, connection: Redis, rq_queue: str) -> FetchJob | None:
        """The job of that id on that queue; None if there is none. Raises JobRefused."""
        try:
            job = cls.fetch(id_, connection)
        except NoSuchJobError:
            return None
        except RedisError:
            raise
        except Exception as error:  # rq raises whatever the first damaged field makes Python raise.
            raise JobRefused(f"its record is damaged: {error}") from error
        assert isinstance(job, FetchJob)
        job._refuse_all_but_a_fetch(rq_queue)
        # How long and how often it is tried, and kept, is not for the record to say either.
        job.timeout, job.result_ttl, job.failure_ttl = FETCH_TIMEOUT, FETCH_KEPT, FETCH_KEPT
        job.retry_intervals = list(FETCH_BACKOFF)
        most = len(FETCH_BACKOFF)
        job.retries_left = most if job.retries_left is None else min(job.retries_left, most)
        return job

    @property
    def attempt(self) -> int:
        """Which try this is, from 1 on."""
        return len(FETCH_BACKOFF) + 1 - (self.retries_left or 0)

    def note_retry(self, attempt: int, reason: str) -> None:
        """Write down that it is tried again, as try number ``attempt``."""
        retry_at = time.time() + self.get_retry_interval()
        self.note(
            FetchProgress(state="retrying", attempt=attempt, retry_at=retry_at, reason=reason)
        )

    def note(self, progress: FetchProgress) -> None:
        """Write down how far the fetch is; that this fails is not worth a failure."""
        self.meta = progress.model_dump()
        try:
            self.save_meta()  # type: ignore[no-untyped-call]
        except RedisError as error:
            log.warning("redis_away", at="progress", error=str(error))

    def _refuse_all_but_a_fetch(self, rq_queue: str) -> None:
        try:
            name, instance, args, kwargs = self.func_name, self.instance, self.args, self.kwargs
        except Exception as error:
            raise JobRefused("what it asks for is not JSON of four parts.") from error
        if name != FETCH_FUNCTION or instance is not None:
            raise JobRefused(f"it asks for {name!r}; only {FETCH_FUNCTION!r} is run here.")
        are_texts = isinstance(args, list) and [type(arg) for arg in args] == [str, str]
        if not are_texts or kwargs:
            raise JobRefused("its arguments are not an adapter's name and the id of a request.")
        if args[1] != self.id:
            raise JobRefused(f"it is called {self.id!r} and is for request {args[1]!r}.")
        if self.origin != rq_queue:
            raise JobRefused(f"it says that it is of queue {self.origin!r}.")
        for what, is_given in (
            ("a callback", self._success_callback_name),
            ("a callback", self._failure_callback_name),
            ("a callback", self._stopped_callback_name),
            ("a web address to call", self.webhooks),
            ("other jobs to wait for", self._dependency_ids),
            ("repetitions", self.repeats_left),
            ("a group", self.group_id),
            ("a rate limit", self.rate_limit_key),
        ):
            if is_given:
                raise JobRefused(f"it names {what}.")
