"""Threads that talk to Redis while the engine computes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog
import torch

from broker.connection import may_pass

log = structlog.get_logger()

#: Seconds to the next try while the server cannot be used: doubled from the first to the last.
_FIRST_PAUSE, LAST_PAUSE = 0.2, 5.0


class BackgroundLoop(threading.Thread):
    """Calls ``turn`` again and again, ``interval`` seconds after its end, until it is stopped.

    While Redis is away, full or read-only it keeps trying; what the engine has goes on. Any other
    error is a bug: it is kept in ``failure`` and ``on_failure`` is called, so that the worker ends
    instead of hanging.
    """

    def __init__(
        self,
        name: str,
        turn: Callable[[], None],
        on_failure: Callable[[], None],
        *,
        interval: float = 0.0,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._turn = turn
        self._on_failure = on_failure
        self._interval = interval
        self._stopping = threading.Event()
        self.failure: Exception | None = None

    def run(self) -> None:
        torch.set_num_threads(1)  # Of this thread: the engine's need the cores.
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            try:
                self._turn()
                pause = _FIRST_PAUSE
                self._stopping.wait(self._interval)
            except Exception as error:
                if not may_pass(error):
                    log.exception("thread_failed", thread=self.name)
                    self.failure = error
                    self._on_failure()
                    return
                log.warning("redis_away", thread=self.name, error=str(error), next_try_in=pause)
                self._stopping.wait(pause)
                pause = min(2 * pause, LAST_PAUSE)

    def stop(self) -> None:
        """Ask for the end; ``join`` waits for it."""
        self._stopping.set()
