"""Submissions that are on disk before their sender is told so."""

from __future__ import annotations

import time
from typing import Any

import redis
from redis.exceptions import NoPermissionError

from broker.connection import BLOCK_SECONDS
from broker.job_queue import JobQueue
from broker.server_settings import ServerSettings, read_settings
from schemas.errors import ServerUnavailable

#: Seconds in which a server must have written to disk what it was sent; it does so every second.
SYNC_SECONDS = 60.0


def require_durability(client: redis.Redis) -> None:
    """Raises ServerUnavailable, with what to set, if the server cannot keep what it is sent, or
    cannot say when it is on disk."""
    settings = read_settings(client)
    if settings.evicts:
        raise _refusal(
            f"it drops keys when it is full (maxmemory-policy {settings.evicts})",
            "CONFIG SET maxmemory-policy noeviction",
        )
    if settings.append_fsync == "no":
        raise _refusal(
            "it leaves it to the system when its append-only file is written to disk"
            " (appendfsync no)",
            "CONFIG SET appendfsync everysec",
        )
    try:
        _wait_for_disk(client, milliseconds=1)
    except NoPermissionError as error:
        raise _refusal(
            "this user may not WAITAOF", "an ACL rule +waitaof (docs/server.md)"
        ) from error
    except redis.ResponseError as error:
        if "appendonly is disabled" in str(error):
            raise _refusal("it keeps no append-only file", "CONFIG SET appendonly yes") from error
        if not _is_unknown_command(error):
            raise
        if not _writes_before_it_answers(settings):
            raise _refusal(
                "it has no WAITAOF (Redis 7.2 and Valkey have it), so it cannot say when jobs are"
                " on disk",
                "appendonly yes with appendfsync always, and let this user read them by INFO and"
                " CONFIG GET",
            ) from error


def sync(queue: JobQueue, submission: str, num_jobs: int) -> None:
    """Return once all jobs of a submission, which have been sent, are on the server's disk.

    Raises ServerUnavailable if it has lost some, or has not written them within ``SYNC_SECONDS``.
    """
    deadline = time.monotonic() + SYNC_SECONDS
    while not _is_synced(queue, submission, num_jobs):
        if time.monotonic() >= deadline:
            raise ServerUnavailable(
                f"The server has all jobs, but has not written them to disk in {SYNC_SECONDS:.0f}"
                " s: its log may tell why."
            )


def _is_synced(queue: JobQueue, submission: str, num_jobs: int) -> bool:
    with queue.client.pipeline(transaction=False) as pipeline:
        # Both over one connection: WAITAOF waits for what was written over its own.
        queue.add_sync(pipeline, submission, num_jobs)
        _wait_for_disk(pipeline, milliseconds=int(BLOCK_SECONDS * 1000))
        num_held, on_disk = pipeline.execute(raise_on_error=False)
    if isinstance(num_held, Exception):
        raise num_held
    if num_held != num_jobs:
        raise ServerUnavailable(
            f"The server has lost jobs while they were sent: it holds {num_held} of {num_jobs}."
            " Send them again."
        )
    if isinstance(on_disk, redis.ResponseError) and _is_unknown_command(on_disk):
        return True  # It writes before it answers: `require_durability` has seen to it.
    if isinstance(on_disk, Exception):
        raise on_disk
    return bool(on_disk[0])


def _wait_for_disk(client: redis.Redis, *, milliseconds: int) -> Any:
    """[1, ...] once what this connection has written is on the server's disk, [0, ...] if the time
    is over before."""
    return client.execute_command("WAITAOF", 1, 0, milliseconds)


def _is_unknown_command(error: redis.ResponseError) -> bool:
    return "unknown command" in str(error).lower()


def _writes_before_it_answers(settings: ServerSettings) -> bool:
    return bool(settings.has_append_only_file) and settings.append_fsync == "always"


def _refusal(reason: str, remedy: str) -> ServerUnavailable:
    return ServerUnavailable(
        f"The server cannot promise to keep jobs: {reason}. Nothing was sent."
        f" It needs {remedy}; or leave durable out."
    )
