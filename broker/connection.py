"""Connections to the Redis server, and the conversion of its errors at this edge."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import redis
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    TryAgainError,
)
from redis.retry import Retry

from broker.address import parse_address, without_password
from broker.pools import connection_pool
from broker.server_settings import needs_cluster_url
from schemas.errors import ServerUnavailable

#: Seconds without an answer after which a command fails. Blocking reads wait for less than this.
SOCKET_TIMEOUT = 5.0

#: The longest that a blocking read waits, in seconds.
BLOCK_SECONDS = 2.0

#: Seconds after its first try from which a command is not repeated any more.
RETRY_SECONDS = 8.0

T = TypeVar("T")


def connect(
    url: str, queue: str = "", *, retries: int = 0, timeout: float = SOCKET_TIMEOUT
) -> redis.Redis:
    """A client of the server at ``url``; no connection is made before the first command.

    It has a pool of its own, for one thread: what waits in one thread delays no other. ``queue``
    is the one that it will be used for; on a Redis Cluster it decides which node that is.

    redis-py repeats a command up to ten times by default, also one whose reply was lost, and so
    executes it up to eleven times. Ask for ``retries`` only where every command is safe to repeat.
    """
    settings = {
        "protocol": 2,
        "decode_responses": True,
        # A foreign record that is not UTF-8 fails where it is validated, not while it is read.
        "encoding_errors": "replace",
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": _BoundedRetry(retries),
        "health_check_interval": 30,
    }
    return redis.Redis.from_pool(connection_pool(parse_address(url), queue, settings))


class _BoundedRetry(Retry):
    """Repeats a command a few times, with growing pauses of random length, and not for long.

    redis-py's own Retry also repeats the connecting that is part of each try, and so squares their
    number: 5 retries of a server that accepts and does not answer may take 180 s (reckoned).
    """

    def __init__(self, retries: int) -> None:
        backoff = ExponentialWithJitterBackoff(base=0.05, cap=1.0) if retries else NoBackoff()
        super().__init__(backoff, retries)
        self._is_trying = False

    def call_with_retry(
        self,
        do: Callable[[], T],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        if self._is_trying:
            return do()
        gives_up = time.monotonic() + RETRY_SECONDS

        def may_repeat(error: Exception) -> bool:
            return time.monotonic() < gives_up and (is_retryable is None or is_retryable(error))

        self._is_trying = True
        try:
            return super().call_with_retry(do, fail, may_repeat, with_failure_count)
        finally:
            self._is_trying = False


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
        return code.startswith("MISCONF") or isinstance(error, _PASSING_ERRORS)
    return isinstance(error, redis.ConnectionError | redis.TimeoutError)


#: Full; a replica; a cluster that elects, or moves the queue; a server started anew between the
#: look whether it knows a script and its use.
_PASSING_ERRORS = (
    redis.OutOfMemoryError,
    redis.ReadOnlyError,
    ClusterDownError,
    AskError,
    TryAgainError,
    NoScriptError,
)


@contextmanager
def server_errors(url: str) -> Iterator[None]:
    """Turns what the driver raises into one sentence with the server's name and the remedy."""
    try:
        yield
    except redis.RedisError as error:
        raise ServerUnavailable(_explanation(without_password(url), error)) from error


def is_refusal(error: redis.RedisError) -> bool:
    """Whether the server is there, and asking it again is in vain: login, rights, certificate."""
    is_login = isinstance(error, redis.AuthenticationError)
    tls_error = _tls_error(error)
    # A server that goes away while it shakes hands refuses nothing by that.
    is_tls = tls_error is not None and not isinstance(tls_error, ssl.SSLEOFError)
    return is_login or is_tls or not may_pass(error)


def _explanation(server: str, error: redis.RedisError) -> str:
    reason = str(error).rstrip(".")
    if isinstance(error, redis.AuthenticationError):
        return (
            f"The Redis server at {server} refused the login: {reason}. Check user and password, in"
            " the URL, in REDIS_PASSWORD, or in the file that --redis-password-file or"
            " REDIS_PASSWORD_FILE names."
        )
    if tls_error := _tls_error(error):
        return (
            f"No encrypted connection to the Redis server at {server}: {tls_error}. With rediss://,"
            " the server must speak TLS and show a certificate for that host name; if it is not"
            " from a public authority, name its CA by ?ssl_ca_certs=FILE behind the URL, and your"
            " own certificate, if one is wanted, by ssl_certfile and ssl_keyfile."
        )
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return (
            f"No Redis server answers at {server}: {reason}."
            " Start it, or name another one by --redis-url or REDIS_URL;"
            " with neither, an embedded server is used."
        )
    if _lacks_right(error):
        return (
            f"The Redis server at {server} does not let this user do that: {reason}."
            " docs/server.md lists what producers, workers and operators need."
        )
    if isinstance(error, MovedError):
        return needs_cluster_url(server)
    return f"The Redis server at {server} refused a command: {reason}"


#: How a server says that a script lacks a right: Valkey and newer Redis; Redis 7.0.
_FORBIDDEN_IN_SCRIPT = ("ACL failure in script", "The user executing the script can't")


def _lacks_right(error: redis.RedisError) -> bool:
    """Whether the server has refused a command for want of a right."""
    return isinstance(error, NoPermissionError) or str(error).startswith(_FORBIDDEN_IN_SCRIPT)


def _tls_error(error: BaseException | None) -> ssl.SSLError | None:
    """What went wrong with TLS, if that is what the driver's error comes from."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error
