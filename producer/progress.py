"""Progress bars on stderr, for a person who waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class RateColumn(ProgressColumn):
    """How many a second, over the last half minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s", style="progress.data.speed")


class Bar:
    """One bar; it vanishes when it is left."""

    def __init__(self, what: str, total: int | None) -> None:
        """``total`` is None while nobody knows it."""
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn(what, markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("[red]{task.fields[note]}"),
            RateColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_interactive,  # A dumb terminal cannot take a bar away.
            redirect_stdout=False,  # What goes to stdout must stay there.
        )
        self._task = self._progress.add_task(what, total=total, note="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, completed: int, note: str = "") -> None:
        self._progress.update(self._task, completed=completed, note=note)

    @contextmanager
    def taken_away(self) -> Iterator[None]:
        """While others write to the terminal."""
        self._progress.stop()
        yield
        self._progress.start()
