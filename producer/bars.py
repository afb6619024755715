"""What a waiting person sees on stderr: a bar on a terminal, and a word when no worker is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from producer.client import Client
from producer.messages import notice, warn
from producer.status import Status, by_state, num_not_done
from schemas.result import TERMINAL_STATES

if TYPE_CHECKING:
    from producer.progress import Bar

#: Seconds between two looks at a submission's counts, and at the workers.
LOOK_SECONDS = 0.2
WORKERS_LOOK_SECONDS = 5.0

#: Seconds between two lines where there is no bar.
LINE_SECONDS = 30.0

Line = TypeVar("Line")


class ProgressLines:
    """Stands for a bar where stderr is no terminal: a line now and then."""

    def __init__(self, what: str, total: int | None) -> None:
        self._what = what
        self._of_total = "" if total is None else f" of {total}"
        self._next_line = time.monotonic() + LINE_SECONDS

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, completed: int, note: str = "") -> None:
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            notice(f"{self._what}: {completed}{self._of_total}{note and f', {note}'}")

    def taken_away(self) -> AbstractContextManager[None]:
        return nullcontext()


def bar_for(what: str, total: int | None = None) -> Bar | ProgressLines:
    """A progress bar, if somebody can see it. Rich is imported only then: that takes 0.1 s."""
    if not sys.stderr.isatty():
        return ProgressLines(what, total)
    from producer.progress import Bar

    return Bar(what, total)


def shown(
    lines: Iterable[tuple[int, Line]], bar: Bar | ProgressLines
) -> Iterator[tuple[int, Line]]:
    """The numbered lines, counted on the bar."""
    for number, line in lines:
        if number % 1000 == 0:
            bar.update(number)
        yield number, line


def show(status: Status, bar: Bar | ProgressLines) -> None:
    """Show a status on a bar."""
    finished = sum(n for state, n in by_state(status).items() if state in TERMINAL_STATES)
    failed = num_not_done(status)
    bar.update(finished, f"{failed} failed" if failed else "")


class Watcher:
    """Looks after a queue while somebody waits for it."""

    def __init__(self, client: Client, adapters: Iterable[str | None] | None = None) -> None:
        """``adapters`` are those of the jobs that are waited for, if that is known."""
        self._client = client
        self._adapters = None if adapters is None else list(adapters)
        self._told: list[str] = []
        self._next_look = 0.0
        self._next_look_at_workers = 0.0

    def look(self) -> None:
        """Warn when there is no worker any more, or none that serves an adapter."""
        if time.monotonic() < self._next_look_at_workers:
            return
        self._next_look_at_workers = time.monotonic() + WORKERS_LOOK_SECONDS
        warnings = self._client.warnings(self._adapters)
        for sentence in warnings:
            if sentence not in self._told:
                warn(sentence)
        self._told = warnings

    def look_at(self, id_: str, bar: Bar | ProgressLines) -> None:
        """``look``, and show how far the submission is on the bar."""
        self.look()
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            show(self._client.status(id_), bar)
