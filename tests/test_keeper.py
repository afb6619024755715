"""What a worker keeps up, against a real server."""

from __future__ import annotations

import time

import pytest

from broker.claims import Claim, ClaimRequest, Lease
from broker.job_queue import JobQueue
from schemas.job import Job
from schemas.worker_state import WorkerState
from worker.keeper import OUTAGE_GRACE_SECONDS, Keeper
from worker.leases import Leases

STATE = WorkerState(id="w", model="m", device="cpu", started=0, adapters={}, max_loras_per_batch=1)


def claim_again(queue: JobQueue) -> list[Claim]:
    """The job whose lease was lost."""
    claim = queue.claim_suspect("w", lease_seconds=60)
    return [claim] if claim else []


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
    queue.sweep()
    keeper.turn()
    assert leases.take_lost() == {lost}
    assert leases.take_lost() == set()
    assert len(leases) == 0


def test_every_lease_that_is_held_is_renewed_and_no_other(queue: JobQueue, leases: Leases) -> None:
    keeper = Keeper(queue, "w", leases, lambda: STATE, lease_seconds=600)
    keeper._next_renewal = time.monotonic()
    queue.submit("sub", "file", 3, 0, [Job(id=f"job-{i}", prompt="x") for i in range(3)])
    first, second, unseen = claim(queue, lease_seconds=60)
    leases.add([first, second])
    keeper.turn()
    (now, _), held = queue.client.time(), (first, second)
    ends = [queue.client.zscore(queue.keys.leases, job.lease.job_id) / 1000 for job in held]
    assert min(ends) > now + 500
    assert queue.client.zscore(queue.keys.leases, unseen.lease.job_id) / 1000 <= now + 61


def test_a_lease_lost_during_the_renewal_does_not_take_the_new_one_with_it(
    queue: JobQueue, keeper: Keeper, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.submit("sub", "file", 1, 0, [Job(id="job", prompt="x")])
    leases.add(claim(queue, lease_seconds=0.01))
    time.sleep(0.02)
    queue.sweep()
    renew = JobQueue.renew

    def claim_after_renewal(*args: object, **named: object) -> set[Lease]:
        lost = renew(queue, *args[1:], **named)
        leases.add(claim_again(queue))
        return lost

    monkeypatch.setattr(JobQueue, "renew", claim_after_renewal)
    keeper.turn()
    assert leases.take_lost() == set()
    assert len(leases.held()) == 1


class Clock:
    """Stands for ``time`` in the keeper, and goes on only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("worker.keeper.time", clock)
    return clock


def keeper_of(queue: JobQueue, worker: str, leases: Leases | None = None) -> Keeper:
    """That of a worker with leases of 30 s; it holds none if none are given."""
    if leases is None:  # An empty one is false.
        leases = Leases(max_jobs=10, max_adapters=1)
    return Keeper(queue, worker, leases, lambda: STATE, lease_seconds=30)


def claim_and_let_expire(queue: JobQueue) -> list[Claim]:
    """One job whose lease has expired while Redis was away."""
    queue.submit("sub", "file", 1, 0, [Job(id="job", prompt="x")])
    claimed = claim(queue, lease_seconds=30)
    queue.client.zadd(queue.keys.leases, {"job": 1})
    return claimed


def state_of_job(queue: JobQueue) -> str | None:
    return queue.client.hget(queue.keys.job("job"), "state")  # type: ignore[return-value]


@pytest.mark.parametrize("seconds", [15, 60])
def test_after_an_outage_other_workers_may_renew_before_their_leases_are_swept(
    queue: JobQueue, leases: Leases, clock: Clock, seconds: int
) -> None:
    """After 15 s they had 5 s left of leases of 30 s, and may have tried 5 s ago for the last
    time."""
    theirs, ours = keeper_of(queue, "w", leases), keeper_of(queue, "v")
    ours.turn()
    theirs.turn()
    leases.add(claim_and_let_expire(queue))
    clock.now += seconds
    ours.turn()
    theirs.turn()
    ours.turn()
    assert leases.take_lost() == set()
    assert queue.client.zscore(queue.keys.leases, "job") > 1
    assert state_of_job(queue) == "running"


def test_a_worker_that_starts_as_an_outage_ends_leaves_others_time_to_renew(
    queue: JobQueue, leases: Leases, clock: Clock
) -> None:
    theirs = keeper_of(queue, "w", leases)
    theirs.turn()
    leases.add(claim_and_let_expire(queue))
    clock.now += 60
    starting = keeper_of(queue, "v")
    starting.turn()
    assert not starting.found_nothing
    theirs.turn()
    starting.turn()
    assert starting.found_nothing
    assert leases.take_lost() == set()
    assert state_of_job(queue) == "running"


def test_a_worker_that_starts_sweeps_what_nobody_renews_once_others_had_the_time(
    queue: JobQueue, clock: Clock
) -> None:
    keeper = keeper_of(queue, "v")
    claim_and_let_expire(queue)
    keeper.turn()
    clock.now += OUTAGE_GRACE_SECONDS
    keeper.turn()
    assert not keeper.found_nothing, "the job that it swept is to be claimed first"
    assert state_of_job(queue) == "waiting"
    keeper.turn()
    assert keeper.found_nothing


def test_after_an_outage_leases_that_nobody_renews_are_swept_in_the_end(
    queue: JobQueue, clock: Clock
) -> None:
    keeper = keeper_of(queue, "v")
    keeper.turn()
    claim_and_let_expire(queue)
    clock.now += 60
    keeper.turn()
    assert state_of_job(queue) == "running"
    clock.now += OUTAGE_GRACE_SECONDS
    keeper.turn()
    assert state_of_job(queue) == "waiting"
