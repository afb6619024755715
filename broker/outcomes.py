"""What becomes of jobs that are sent to a queue, or cancelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Size(NamedTuple):
    """A number of jobs, and of the bytes of their records."""

    jobs: int
    bytes: int


NOTHING = Size(0, 0)


class Limits(NamedTuple):
    """How many jobs and bytes may wait in a queue; None is any number."""

    jobs: int | None = None
    bytes: int | None = None


class ConflictError(Exception):
    """Job ids that already name jobs of other content; nothing of the run was stored."""

    def __init__(self, indices: list[int]) -> None:
        super().__init__(f"{len(indices)} job ids are taken")
        self.indices = indices


class FullError(Exception):
    """The queue has no room for jobs; nothing of the run was stored."""

    def __init__(self, num_fitting: int, waiting: Size, limits: Limits) -> None:
        super().__init__(f"{waiting.jobs} jobs wait")
        self.num_fitting = num_fitting
        """So many of the run, the first ones, would find room."""
        self.waiting = waiting
        self.limits = limits


class SubmissionCancelled(Exception):
    """The submission was cancelled while it was sent, after ``num_sent`` of its jobs."""

    def __init__(self, num_sent: int) -> None:
        super().__init__(f"cancelled after {num_sent} jobs")
        self.num_sent = num_sent


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What became of jobs that were to be cancelled."""

    waiting: int = 0
    """Cancelled before they ran."""
    running: int = 0
    """Cancelled while they ran."""
    ended: int = 0
    """Those that had ended before, and keep their result."""

    def __add__(self, other: Cancelled) -> Cancelled:
        return Cancelled(
            self.waiting + other.waiting, self.running + other.running, self.ended + other.ended
        )
