"""Who is served first, and that nobody starves: priorities, submissions and adapters on a real
server."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

import pytest

from broker.claims import Claim, ClaimRequest
from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from schemas.job import PRIORITIES, Job, Priority
from schemas.keys import BASE
from tests.test_job_queue import join, keys_left, result


def submit(
    queue: JobQueue,
    submission: str,
    count: int,
    lora: str | None = None,
    priority: Priority = "normal",
) -> None:
    jobs = [
        Job(id=f"{submission}.{i}", lora=lora, prompt="x", priority=priority) for i in range(count)
    ]
    queue.submit(submission, "file", count, 0, jobs)


def claim(queue: JobQueue, num_jobs: int, free_slots: int = 8, patience: float = 60) -> list[Claim]:
    request = ClaimRequest(num_jobs, free_slots, in_use=())
    return queue.claim("w", request, lease_seconds=60, patience=patience).jobs


def submissions_of(claims: Iterable[Claim]) -> list[str]:
    return [claim.submission for claim in claims]


def commit(queue: JobQueue, claims: Iterable[Claim]) -> None:
    queue.commit("w", [(claim.lease, result(claim)) for claim in claims])


# Once in eight claims all priorities take turns, by lot; so these look at many claims.


def test_higher_priorities_are_served_first(queue: JobQueue) -> None:
    join(queue)
    for priority in reversed(PRIORITIES):
        submit(queue, priority, 20, priority=priority)
    order = [submissions_of(claim(queue, 1))[0] for _ in range(60)]
    mean = {p: sum(i for i, name in enumerate(order) if name == p) / 20 for p in PRIORITIES}
    assert mean["high"] < mean["normal"] < mean["low"]
    # Without the lots the first 20 are all high: 10 of them is far from any draw.
    assert Counter(order[:20])["high"] >= 10


def test_a_priority_holds_across_adapters(queue: JobQueue) -> None:
    join(queue)
    submit(queue, "many", 100, "a")
    submit(queue, "urgent", 20, "b", "high")
    order = [submissions_of(claim(queue, 1))[0] for _ in range(40)]
    assert Counter(order[:20])["urgent"] >= 10


def test_the_free_slot_is_for_the_adapter_with_jobs_of_a_higher_priority(queue: JobQueue) -> None:
    join(queue)
    submit(queue, "many", 100, "a")
    submit(queue, "few", 1, "b")
    submit(queue, "urgent", 2, "c", "high")
    assert {job.adapter for job in claim(queue, 10, free_slots=1)} == {"c"}


def test_low_priorities_have_a_share_beside_an_endless_stream_of_high_ones(
    queue: JobQueue,
) -> None:
    join(queue)
    submit(queue, "low", 100, priority="low")
    served: Counter[str] = Counter()
    for number in range(300):
        submit(queue, f"high-{number}", 1, priority="high")
        served.update(name.split("-")[0] for name in submissions_of(claim(queue, 1)))
    # An eighth of the claims is by lot, so about 37; below 10 comes once in ten million.
    assert 10 <= served["low"] <= 100


def test_what_waits_beyond_the_patience_is_served_whatever_its_priority(queue: JobQueue) -> None:
    join(queue)
    submit(queue, "low", 1, priority="low")
    time.sleep(0.05)
    submit(queue, "high", 10, priority="high")
    assert submissions_of(claim(queue, 2, patience=0.04)) == ["low", "high"]


def test_a_small_submission_does_not_wait_for_a_large_one_of_its_adapter(queue: JobQueue) -> None:
    join(queue)
    submit(queue, "large", 5000, "a")
    assert set(submissions_of(claim(queue, 10))) == {"large"}
    submit(queue, "small", 10, "a")
    order = [submissions_of(claim(queue, 1))[0] for _ in range(21)]
    assert Counter(order)["small"] == 10


def test_a_claim_shares_among_the_submissions_of_an_adapter(queue: JobQueue) -> None:
    join(queue)
    for name, count in (("one", 100), ("two", 100), ("three", 3)):
        submit(queue, name, count, "a")
    assert Counter(submissions_of(claim(queue, 33))) == {"one": 15, "two": 15, "three": 3}


def test_jobs_of_one_submission_keep_their_order(queue: JobQueue) -> None:
    join(queue)
    submit(queue, "sub", 30, "a")
    ids = [job.lease.job_id for _ in range(3) for job in claim(queue, 10)]
    assert ids == [f"sub.{i}" for i in range(30)]


def test_thousands_of_small_submissions_are_claimed_in_one_go(queue: JobQueue) -> None:
    join(queue)
    for number in range(2000):
        submit(queue, f"sub-{number}", 1, "a")
    claims = claim(queue, 1500)
    assert len(set(submissions_of(claims))) == 1500
    commit(queue, [*claims, *claim(queue, 1500)])
    assert keys_left(queue) == set()


@pytest.mark.parametrize("priority", PRIORITIES)
def test_numbers_of_waiting_and_running_jobs_follow_every_change(
    queue: JobQueue, reader: QueueReader, priority: Priority
) -> None:
    join(queue)
    submit(queue, "sub", 5, "a", priority)
    submit(queue, "base", 2, None, priority)
    assert reader.num_waiting_by_adapter() == {"a": 5, BASE: 2}
    assert int(queue.client.hget(queue.keys.backlog, "jobs") or 0) == 7
    running = claim(queue, 4)
    assert reader.num_jobs_of("a") + reader.num_jobs_of(BASE) == 7
    queue.release("w", [running[0].lease])
    assert sum(reader.num_waiting_by_adapter().values()) == 4
    commit(queue, running[1:])
    commit(queue, claim(queue, 9))
    assert reader.num_waiting_by_adapter() == {}
    for key in (queue.keys.waiting, queue.keys.running, queue.keys.backlog):
        assert not queue.client.exists(key)
    assert keys_left(queue) == set()
