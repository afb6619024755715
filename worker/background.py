"""What talks to Redis while the engine computes, and goes on trying while Redis is away."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import redis
import structlog
from redis.backoff import ExponentialWithJitterBackoff

from broker.connection import is_refusal, may_pass, server_errors
from broker.server import Server
from broker.server_settings import warnings
from worker.daemons import Daemon

log = structlog.get_logger()

T = TypeVar("T")

#: Seconds for which a thread that computes in Python keeps the others waiting, a tenth of Python's
#: own. The engine's lets others in at every call of CUDA: while one reads adapters, the 99th
#: percentile of an H100's step was 18.1 ms, so 14.6; without reading 14.2 (docs/gpu.md).
_SWITCH_INTERVAL = 0.0005

#: Seconds to the next try while the server cannot be used: drawn below a bound that doubles from
#: try to try up to the cap, so that a server which comes back is not met by all at once.
_PAUSES = ExponentialWithJitterBackoff(base=0.2, cap=5.0)


def change_threads_often() -> None:
    """Let the engine's thread go on soon after it has let another one in."""
    sys.setswitchinterval(_SWITCH_INTERVAL)


def keep_trying(action: Callable[[], T], *, at: str) -> T:
    """The action's result, once the server can be used; ``at`` says in the log what waits.

    Raises what is no use to wait for: a login, a right or a certificate that is refused.
    """
    failures = 0
    while True:
        try:
            return action()
        except redis.RedisError as error:
            if is_refusal(error):
                raise
            failures += 1
            time.sleep(_pause(failures, error, at=at))


def wait_for_server(server: Server) -> None:
    """Return once the server can be used; by which settings it may lose jobs goes into the log.

    Raises ServerUnavailable where it is no use to wait.
    """
    log.info("queue_server", server=server.description)
    with server_errors(server.url):
        settings = keep_trying(server.settings, at="start")
    for sentence in warnings(settings):
        log.warning("server_settings", problem=sentence)


class BackgroundLoop(Daemon):
    """Calls ``turn`` again and again, ``interval`` seconds after its end, until it is stopped.

    While Redis is away, full or read-only it keeps trying; what the engine has goes on. Any other
    error is kept in ``failure``, and ``on_failure`` is called, so that the worker ends instead of
    hanging.
    """

    def __init__(
        self,
        name: str,
        turn: Callable[[], None],
        on_failure: Callable[[], None],
        *,
        interval: float = 0.0,
    ) -> None:
        super().__init__(name)
        self._turn = turn
        self._on_failure = on_failure
        self._interval = interval
        self._stopping = threading.Event()
        self.failure: Exception | None = None

    def start(self) -> None:
        # Only now, since torch takes seconds, and processes that need none of it have no thread.
        import torch

        # What `run` sets holds for its own thread, and for every other that has not asked for its
        # number yet. The engine's, which starts this one, asks here, and keeps what it gets.
        torch.get_num_threads()
        super().start()

    def run(self) -> None:
        import torch

        torch.set_num_threads(1)  # The engine's thread needs the cores.
        failures = 0
        while not self._stopping.is_set():
            try:
                self._turn()
                failures = 0
                self._stopping.wait(self._interval)
            except Exception as error:
                if not may_pass(error):
                    self._fail(error)
                    return
                failures += 1
                self._stopping.wait(_pause(failures, error, at=self.name))

    def stop(self) -> None:
        """Ask for the end; ``join`` waits for it."""
        self._stopping.set()

    def _fail(self, error: Exception) -> None:
        if isinstance(error, redis.RedisError):  # The server's words say it: no right, most likely.
            log.error("redis_refused", thread=self.name, error=str(error))
        else:
            log.exception("thread_failed", thread=self.name)
        self.failure = error
        self._on_failure()


def _pause(failures: int, error: Exception, *, at: str) -> float:
    """Seconds to the next try, which are logged."""
    seconds = round(_PAUSES.compute(failures), 2)
    log.warning("redis_away", at=at, error=str(error), next_try_in=seconds)
    return seconds
