"""Requests to fetch adapters from the hub: what became of them, and their jobs for rq.

``{queue}:fetches`` says what is wanted; rq holds one job for each request that is not over, and
fetchers run those. Reading needs rq's key names alone; rq itself is imported where a job is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import redis

from broker.records import read_fetch
from broker.rq_queues import open_rq_queue, require_rq
from schemas.errors import LorryError
from schemas.hub import (
    FETCH_BACKOFF,
    FETCH_FUNCTION,
    FETCH_KEPT,
    FETCH_TIMEOUT,
    RQ_QUEUE_PREFIX,
    FetchProgress,
    FetchRecord,
    FetchState,
)
from schemas.keys import Keys

if TYPE_CHECKING:
    from rq import Queue


@dataclass(frozen=True)
class FetchStatus:
    """How far a request to fetch an adapter is."""

    name: str
    id: str
    source: str
    """As it was asked for: ``hf:owner/name[@revision]``."""
    pinned: bool
    state: FetchState
    done_bytes: int = 0
    total_bytes: int = 0
    attempt: int = 1
    """Which try this is; while ``retrying``, the next one."""
    retry_at: float | None = None
    """The moment of the next try, in seconds since 1970."""
    reason: str | None = None
    """Why it failed, or why the last try did."""
    version: int | None = None
    """Of the desired state in which it was loaded."""


class Fetches:
    """The requests of one queue."""

    def __init__(self, client: redis.Redis, queue: str) -> None:
        # As QueueReader: redis-py types a reply as everything it can be.
        self._client: Any = client
        self._keys = Keys(queue)
        self._rq_queue = RQ_QUEUE_PREFIX + queue

    def record(self, name: str) -> FetchRecord | None:
        """The newest request for an adapter of that name."""
        text = self._client.hget(self._keys.fetches, name)
        return None if text is None else read_fetch(name, text)

    def records(self) -> dict[str, FetchRecord]:
        """The newest request for each name; a damaged record is left out."""
        found = {}
        for name, text in sorted(self._client.hgetall(self._keys.fetches).items()):
            try:
                found[name] = read_fetch(name, text)
            except LorryError:
                continue  # Fetchers read it too; what somebody else broke must not stop the rest.
        return found

    def statuses(self) -> dict[str, FetchStatus]:
        """How far each request is, by the adapter's name, in two round trips."""
        records = self.records()
        with self._client.pipeline(transaction=False) as pipeline:
            for record in records.values():
                pipeline.hmget(f"rq:job:{record.id}", "status", "meta")
            replies = pipeline.execute(raise_on_error=False)
        return {
            name: _status(name, record, reply)
            for (name, record), reply in zip(records.items(), replies, strict=True)
        }

    def status(self, name: str) -> FetchStatus | None:
        """How far the newest request for an adapter is."""
        record = self.record(name)
        if record is None:
            return None
        try:
            reply = self._client.hmget(f"rq:job:{record.id}", "status", "meta")
        except redis.ResponseError as error:
            reply = error
        return _status(name, record, reply)

    def has_fetcher(self) -> bool:
        """Whether a fetcher of this queue is alive."""
        keys = self._client.smembers(f"rq:workers:{self._rq_queue}")
        return bool(keys) and bool(self._client.exists(*keys))

    def require_rq(self) -> None:
        """Raises ServerUnavailable if rq cannot use this server."""
        require_rq(
            self._client, "Fetching from the hub", "download the adapter, and load its folder"
        )

    def enqueue(self, name: str, id_: str) -> None:
        """Let a fetcher run a request. Safe to repeat: an id has one job."""
        from rq import Retry
        from rq.exceptions import DuplicateJobError

        try:
            self.rq_queue().enqueue_call(
                FETCH_FUNCTION,
                args=(name, id_),
                job_id=id_,
                description=f"fetch adapter '{name}'",
                timeout=FETCH_TIMEOUT,
                result_ttl=FETCH_KEPT,
                failure_ttl=FETCH_KEPT,
                retry=Retry(max=len(FETCH_BACKOFF), interval=FETCH_BACKOFF),
                unique=True,
            )
        except DuplicateJobError:
            return

    def rq_queue(self) -> Queue:
        """The rq queue."""
        return open_rq_queue(self._client, self._rq_queue)


def _status(name: str, record: FetchRecord, reply: Any) -> FetchStatus:
    """``reply``: rq's status of the job and its meta, or what went wrong in reading them."""
    job_status, meta = (None, None) if isinstance(reply, Exception) else reply
    status = FetchStatus(name, record.id, record.source, record.pinned, "queued")
    if record.error is not None:
        return replace(status, state="failed", reason=record.error)
    if record.version is not None:
        return replace(status, state="loaded", version=record.version)
    if job_status not in ("started", "scheduled"):
        return status
    try:
        progress = FetchProgress.model_validate_json(meta or "{}")
    except ValueError:
        return status
    return replace(status, **progress.model_dump())
