"""The workers of a soak, each behind a proxy of its own, and the faults that befall them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.context import ForkServerProcess

import psutil

from benchmarks.fault_bench import LEASE_SECONDS, FaultBench, is_stopped
from benchmarks.soak.plan import MAX_WORKERS, Fault

#: Seconds after which a worker that a job has stopped is woken.
WAKE_AFTER = 2 * LEASE_SECONDS

#: Ends a fault.
End = Callable[[], object]


class Crew:
    """As many workers as there are to be; one that ends is replaced."""

    def __init__(self, bench: FaultBench) -> None:
        self._bench = bench
        self.size = 3
        self.num_replaced = 0
        self._workers: list[ForkServerProcess | None] = [None] * MAX_WORKERS
        self._proxies = [bench.proxy() for _ in range(MAX_WORKERS)]
        self._stopped_since: dict[int, float] = {}
        self._held_down: set[int] = set()

    def supervise(self, *, may_start: bool) -> None:
        """Start workers that are missing, and wake those that a job has stopped."""
        now = time.monotonic()
        for number, process in enumerate(self._workers):
            if process is None or not process.is_alive():
                self._stopped_since.pop(number, None)
                if number < self.size and may_start:
                    self.num_replaced += process is not None
                    url = self._proxies[number].url
                    self._workers[number] = self._bench.workers.start(redis_url=url)
            elif number in self._held_down or not is_stopped(process):
                self._stopped_since.pop(number, None)
            elif now - self._stopped_since.setdefault(number, now) > WAKE_AFTER:
                os.kill(process.pid, signal.SIGCONT)

    def scale(self, size: int) -> None:
        """Let there be so many; those that are too many finish what runs."""
        for worker in self._workers[size:]:
            if worker and worker.is_alive():
                worker.terminate()
        self.size = size

    def befall(self, fault: Fault) -> Iterator[End]:
        """Let one of WORKER_FAULTS happen. Yields how it ends, which is for later, or nothing if
        it is over at once; raises LookupError if there is no worker for it."""
        number = (fault.worker - 1) % self.size
        proxy = self._proxies[number]
        match fault.kind:
            case "kill worker":
                self._alive(number).kill()
            case "end worker":
                self._alive(number).terminate()
            case "stop worker":
                yield self._stop(number)
            case "reset":
                proxy.reset()
            case "half-open":
                proxy.half_open()
            case "stall":
                proxy.stall()
                yield proxy.resume
            case "latency":
                proxy.latency = fault.seconds / 10
                yield lambda: setattr(proxy, "latency", 0.0)
            case "away":
                proxy.refuses = True
                proxy.reset()
                yield lambda: setattr(proxy, "refuses", False)
            case _:
                proxy.lose_replies(fault.kind.removeprefix("lose "), fault.times)

    def largest_bytes(self) -> int:
        """Resident memory of the largest worker."""
        sizes = [0]
        for worker in self._workers:
            if worker and worker.is_alive():
                with suppress(psutil.Error):
                    sizes.append(psutil.Process(worker.pid).memory_info().rss)
        return max(sizes)

    def _alive(self, number: int) -> ForkServerProcess:
        worker = self._workers[number]
        if worker is None or not worker.is_alive() or number in self._held_down:
            raise LookupError(f"there is no worker {number}")
        return worker

    def _stop(self, number: int) -> End:
        worker = self._alive(number)
        os.kill(worker.pid, signal.SIGSTOP)
        self._held_down.add(number)

        def wake() -> None:
            self._held_down.discard(number)
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGCONT)

        return wake
