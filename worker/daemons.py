"""Threads that a process does not wait for: one that reads a file may hang for ever."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

import structlog

log = structlog.get_logger()


class Daemon(threading.Thread):
    """A thread that ends with the process, wherever it is."""

    def __init__(self, name: str, target: Callable[[], object] | None = None) -> None:
        super().__init__(name=name, target=target, daemon=True)


def join_within(seconds: float, threads: Iterable[threading.Thread]) -> None:
    """Wait until threads have ended, all together no longer than that; log which have not."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        if thread.is_alive():
            thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            log.warning("thread_hangs", thread=thread.name)


def end_process(status: int) -> NoReturn:
    """End this process, in order if no ``Daemon`` is left. Else at once: the interpreter's own end
    aborts the process where a thread is amid what torch does."""
    if any(isinstance(thread, Daemon) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
