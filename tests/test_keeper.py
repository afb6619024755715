"""What a worker keeps up, against a real server."""

from __future__ import annotations

import time

import pytest

from broker.job_queue import Claim, ClaimRequest, JobQueue, Lease
from schemas.job import Job
from schemas.worker_state import WorkerState
from worker.keeper import Keeper
from worker.leases import Leases

STATE = WorkerState(id="w", model="m", device="cpu", started=0, adapters={}, max_loras_per_batch=1)


def claim(queue: JobQueue, lease_seconds: float) -> list[Claim]:
    request = ClaimRequest(10, 0, in_use=[])
    return queue.claim("w", request, lease_seconds=lease_seconds, patience=60).jobs


@pytest.fixture
def leases() -> Leases:
    return Leases(max_jobs=10, max_adapters=1)


@pytest.fixture
def keeper(queue: JobQueue, leases: Leases) -> Keeper:
    """Its leases are so short that every turn renews them."""
    return Keeper(queue, "w", leases, lambda: STATE, lease_seconds=0)


def test_a_lost_lease_is_reported_once_and_no_longer_held(
    queue: JobQueue, keeper: Keeper, leases: Leases
) -> None:
    queue.submit("sub", "file", 1, 0, [Job(id="job", prompt="x")])
    leases.add(claim(queue, lease_seconds=0.01))
    (lost,) = leases.held()
    time.sleep(0.02)
    queue.sweep(max_attempts=3)
    keeper.turn()
    assert leases.take_lost() == {lost}
    assert leases.take_lost() == set()
    assert len(leases) == 0


def test_a_lease_lost_during_the_renewal_does_not_take_the_new_one_with_it(
    queue: JobQueue, keeper: Keeper, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.submit("sub", "file", 1, 0, [Job(id="job", prompt="x")])
    leases.add(claim(queue, lease_seconds=0.01))
    time.sleep(0.02)
    queue.sweep(max_attempts=3)
    renew = JobQueue.renew

    def claim_after_renewal(*args: object, **named: object) -> set[Lease]:
        lost = renew(queue, *args[1:], **named)
        leases.add(claim(queue, lease_seconds=60))
        return lost

    monkeypatch.setattr(JobQueue, "renew", claim_after_renewal)
    keeper.turn()
    assert leases.take_lost() == set()
    assert len(leases.held()) == 1
