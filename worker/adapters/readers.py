"""A few threads that read adapters while the engine runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

import torch

from worker.daemons import Daemon

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

#: Adapters that are read at a time beside batches. Page-locked memory is taken for them meanwhile,
#: which launches wait for: while four threads take it 2.5 times as long as for one (docs/gpu.md).
READERS = 2

#: Seconds after which a read is late: most likely its source does not answer. It computes nothing
#: then, so that another one may begin beside it.
LATE_SECONDS = 60.0

#: Threads at most, with those that are late.
_MOST = 8


@dataclass(frozen=True)
class _Read:
    thread: threading.Thread
    began: float


class Readers(Generic[K, T]):
    """Reads what is wanted, once however often that is.

    Used by one thread alone, which acts on what was read: no more is read ahead of it than is read
    at a time.
    """

    def __init__(
        self,
        on_read: Callable[[], None] = lambda: None,
        *,
        place_of: Callable[[K], Hashable] = lambda key: key,
        at_a_time: int = READERS,
    ) -> None:
        """``on_read`` is called, by another thread, once something was read. From one place, as
        ``place_of`` tells, no two are read at a time: where one hangs, others would."""
        self._on_read = on_read
        self._place_of = place_of
        self._at_a_time = at_a_time
        self._wanted: dict[K, Callable[[], T]] = {}
        self._under_way: dict[K, _Read] = {}
        """From its begin until it is done with."""
        self._outcomes: SimpleQueue[tuple[K, T | Exception]] = SimpleQueue()
        self._first: tuple[K, T | Exception] | None = None

    @property
    def keys(self) -> list[K]:
        """What is wanted and not done with; other threads may ask."""
        # In this order, since what begins is under way before it leaves the others.
        return list(dict.fromkeys([*list(self._wanted), *list(self._under_way)]))

    @property
    def threads(self) -> list[threading.Thread]:
        return [read.thread for read in list(self._under_way.values())]

    def want(self, key: K, read: Callable[[], T]) -> None:
        """Let ``read`` be called by a thread, unless it is for this key already."""
        if key not in self._under_way:
            self._wanted.setdefault(key, read)
        self._begin()

    def drop(self, is_outdated: Callable[[K], bool]) -> None:
        """Want no more what is not under way yet."""
        self._wanted = {key: read for key, read in self._wanted.items() if not is_outdated(key)}

    def began(self, key: K) -> float | None:
        """When a read began, on the monotonic clock; None if it has not."""
        read = self._under_way.get(key)
        return read.began if read else None

    def first(self, *, wait: float = 0.0) -> tuple[K, T | Exception] | None:
        """What was read first, or why it could not be, until it is ``done``; if there is nothing,
        waits up to so many seconds."""
        self._begin()
        with suppress(Empty):
            self._first = self._first or self._outcomes.get(block=wait > 0, timeout=wait)
        return self._first

    def done(self) -> None:
        """Go on to what was read next."""
        if self._first:
            del self._under_way[self._first[0]]
        self._first = None

    def _begin(self) -> None:
        # The thread at hand keeps the number of threads that it has: see `BackgroundLoop`.
        torch.get_num_threads()
        while self._has_room() and (key := self._next()) is not None:
            thread = Daemon(f"read {key}", partial(self._run, key, self._wanted[key]))
            self._under_way[key] = _Read(thread, time.monotonic())
            del self._wanted[key]
            thread.start()

    def _next(self) -> K | None:
        busy = {self._place_of(key) for key in self._under_way}
        return next((key for key in self._wanted if self._place_of(key) not in busy), None)

    def _has_room(self) -> bool:
        late = time.monotonic() - LATE_SECONDS
        num_on_time = sum(read.began > late for read in self._under_way.values())
        return num_on_time < self._at_a_time and len(self._under_way) < _MOST

    def _run(self, key: K, read: Callable[[], T]) -> None:
        torch.set_num_threads(1)  # The engine's thread needs the cores.
        try:
            self._outcomes.put((key, read()))
        except Exception as error:
            self._outcomes.put((key, error))
        self._on_read()
