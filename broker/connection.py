"""Connections to the Redis server, and the conversion of its errors at this edge."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.retry import Retry

from schemas.errors import ServerUnavailable

#: Seconds without an answer after which a command fails. Blocking reads wait for less than this.
SOCKET_TIMEOUT = 5.0

#: The longest that a blocking read waits, in seconds.
BLOCK_SECONDS = 2.0


def connect(url: str, *, retries: int = 0, timeout: float = SOCKET_TIMEOUT) -> redis.Redis:
    """A client of the server at ``url``; no connection is made before the first command.

    redis-py repeats a command up to ten times by default, also one whose reply was lost, and so
    executes it up to eleven times. Ask for ``retries`` only where every command is safe to repeat.
    """
    backoff = ExponentialWithJitterBackoff(base=0.05, cap=1.0) if retries else NoBackoff()
    try:
        return redis.Redis.from_url(
            url,
            protocol=2,
            decode_responses=True,
            # A foreign record that is not UTF-8 fails where it is validated, not while it is read.
            encoding_errors="replace",
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(backoff, retries),
            health_check_interval=30,
        )
    except ValueError as error:
        # The driver's own words may quote a part of the password.
        raise ServerUnavailable(
            "What --redis-url or REDIS_URL gives is not the URL of a Redis server. One looks like"
            " redis://[user:password@]host[:port][/database], rediss://... or unix:///path;"
            " in a password, write / ? # @ : % as %2F %3F %23 %40 %3A %25."
        ) from error


def undecoded(client: redis.Redis) -> redis.Redis:
    """Another client of the same server, with connections of its own, whose replies are bytes."""
    pool = client.connection_pool
    settings = {**pool.connection_kwargs, "decode_responses": False}
    return redis.Redis(
        connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **settings)
    )


def may_pass(error: Exception) -> bool:
    """Whether a command may succeed later: its server is away, full, or takes no writes for now."""
    if isinstance(error, redis.ResponseError):
        # A full disk (MISCONF) has no class; in a pipeline the driver puts its own words before.
        code = str(error).rpartition("caused error: ")[2]
        is_full = isinstance(error, redis.OutOfMemoryError) or code.startswith("MISCONF")
        return is_full or isinstance(error, redis.ReadOnlyError)
    return isinstance(error, redis.ConnectionError | redis.TimeoutError)


@contextmanager
def server_errors(url: str) -> Iterator[None]:
    """Turns what the driver raises into one sentence with the server's name and the remedy."""
    try:
        yield
    except redis.AuthenticationError as error:
        raise ServerUnavailable(
            f"The Redis server at {without_password(url)} refused the login: {error}."
            " Check the user and password in the URL."
        ) from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise ServerUnavailable(
            f"No Redis server answers at {without_password(url)}: {str(error).rstrip('.')}."
            " Start it, or name another one by --redis-url or REDIS_URL;"
            " with neither, an embedded server is used."
        ) from error
    except redis.RedisError as error:
        raise ServerUnavailable(
            f"The Redis server at {without_password(url)} refused a command: {error}"
        ) from error


def without_password(url: str) -> str:
    """The URL as it may be shown: user, password and query left out."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "that"
    host = parts.netloc.rpartition("@")[2]
    if "@" in parts.path + parts.query + parts.fragment:
        host = "..."  # A password with / ? or # in it: where it ends cannot be told.
        return f"{parts.scheme}://{host}"
    return f"{parts.scheme}://{host}{parts.path}"


def url_from_environment() -> str | None:
    """``REDIS_URL``, if it is set and not empty."""
    return os.environ.get("REDIS_URL") or None
