"""What a worker asks a queue for, and what it gets."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's right to one delivery of a job, named by the number of the claim it came with."""

    job_id: str
    claim: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A job as a worker gets it."""

    lease: Lease
    adapter: str | None
    payload: str
    attempts: int
    submission: str
    queued: float
    claimed: float
    received: float
    """The moment ``claimed`` on this process's monotonic clock."""

    def server_time(self, moment: float | None) -> float | None:
        """A moment of the monotonic clock by the server's clock."""
        return None if moment is None else round(self.claimed + moment - self.received, 3)


@dataclass(frozen=True, slots=True)
class Claims:
    """What one claim brought."""

    jobs: list[Claim]
    starving: str | None
    """An adapter that has waited unserved beyond the worker's patience and found no slot."""
    suspect_waits: float | None
    """Seconds for which the first suspect that the worker can run waits; None if there is none."""
    num_delayed: int
    """Jobs of the queue that are to be tried again later."""
    num_set_aside: int
    """Jobs found now whose record is of a version that this one does not read."""
    num_passed_over: int
    """Stream entries that brought no job; there may be jobs behind them."""


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """What a worker can take now."""

    num_jobs: int
    free_slots: int
    in_use: Collection[str]
    """Adapters of the sequences that the worker holds."""
    draining: Collection[str] = ()
    """Those among them that get no new jobs, so that their slot becomes free."""
    resident: Collection[str] = ()
    """Adapters whose weights stand in a slot that is not in use."""
