"""The rq job of a request to fetch an adapter."""

from __future__ import annotations

import time

import structlog
from redis import RedisError

from schemas.hub import (
    FETCH_BACKOFF,
    FETCH_FUNCTION,
    FETCH_KEPT,
    FETCH_TIMEOUT,
    FetchProgress,
)
from worker.rq_job import OneFunctionJob

log = structlog.get_logger()


class FetchJob(OneFunctionJob):
    """A job whose record decides nothing but which request is to be fetched."""

    name_of_function = FETCH_FUNCTION
    arguments = "an adapter's name and the id of a request"

    def _set_terms(self) -> None:
        self.timeout, self.result_ttl, self.failure_ttl = FETCH_TIMEOUT, FETCH_KEPT, FETCH_KEPT
        self.retry_intervals = list(FETCH_BACKOFF)
        most = len(FETCH_BACKOFF)
        self.retries_left = most if self.retries_left is None else min(self.retries_left, most)

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
