"""The threads that talk to Redis while the engine computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

from worker.background import BackgroundLoop

T = TypeVar("T")


def test_threads_that_compute_alone_leave_the_engines_thread_those_it_had() -> None:
    numbers: SimpleQueue[int] = SimpleQueue()
    loop = BackgroundLoop(
        "claim", lambda: numbers.put(torch.get_num_threads()), lambda: None, interval=0.01
    )

    def begin_and_count() -> tuple[int, int]:
        loop.start()
        return numbers.get(timeout=30), torch.get_num_threads()

    # Threads that torch does not know yet, as the worker's own is before it has computed.
    in_a_new_thread(lambda: torch.set_num_threads(2))
    try:
        assert in_a_new_thread(begin_and_count) == (1, 2)
    finally:
        loop.stop()
        loop.join()


def in_a_new_thread(action: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(action).result()
