"""Job records of other versions, side by side with those of this one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from broker.claims import Claim, ClaimRequest, Claims
from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from producer.client import Client
from schemas import WIRE_VERSION
from schemas.job import Job
from schemas.result import Result, Timings
from tests.test_producer_cli import Producer

OLDER, NEWER = WIRE_VERSION - 1, WIRE_VERSION + 1


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


@pytest.fixture
def newer_queue(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> JobQueue:
    """The same queue as the next release sees it."""
    monkeypatch.setattr("broker.scripts.WIRE_VERSION", NEWER)
    return JobQueue(queue.client, queue.name)


def send(queue: JobQueue, *ids: str, version: object = WIRE_VERSION) -> None:
    """Jobs as a producer of that version writes them."""
    jobs = [Job(id=id_, prompt="x") for id_ in ids]
    queue.submit(f"sub-{ids[0]}", "file", len(jobs), 0, jobs)
    for id_ in ids:
        queue.client.hset(queue.keys.job(id_), "v", str(version))


def claim(queue: JobQueue, worker: str = "w", lease_seconds: float = 60) -> Claims:
    request = ClaimRequest(10, 0, in_use=[])
    return queue.claim(worker, request, lease_seconds=lease_seconds, patience=60)


def ids_of(claims: list[Claim]) -> list[str]:
    return [job.lease.job_id for job in claims]


def finish(queue: JobQueue, job: Claim) -> bool:
    done = Result(
        id=job.lease.job_id,
        submission=job.submission,
        lora=None,
        status="done",
        timings=Timings(queued=job.queued),
    )
    return queue.commit("w", [(job.lease, done)])[0]


def test_older_and_current_records_run_and_newer_ones_wait_without_holding_them_up(
    queue: JobQueue, reader: QueueReader
) -> None:
    send(queue, "newer", version=NEWER)
    send(queue, "older", version=OLDER)
    send(queue, "current")
    claims = claim(queue)
    assert ids_of(claims.jobs) == ["older", "current"]
    assert claims.num_set_aside == 1
    assert all(finish(queue, job) for job in claims.jobs)
    again = claim(queue)
    assert (again.jobs, again.num_set_aside, again.num_passed_over) == ([], 0, 0)
    assert queue.client.hget(queue.keys.job("newer"), "attempts") == "0"
    assert reader.submission("sub-newer").counts["waiting"] == 1
    assert reader.num_jobs_of("@base") == 1
    assert reader.num_set_aside() == {NEWER: 1}


def test_a_newer_worker_takes_up_what_older_ones_have_set_aside(
    queue: JobQueue, newer_queue: JobQueue
) -> None:
    send(queue, "newer", version=NEWER)
    send(queue, "far-away", version=NEWER + 5)
    assert claim(queue).num_set_aside == 2
    queue.sweep()
    assert claim(queue).jobs == []
    newer_queue.sweep()
    (job,) = claim(newer_queue).jobs
    assert job.lease.job_id == "newer"
    assert job.attempts == 1
    assert finish(newer_queue, job)
    assert QueueReader(queue.client, queue.name).num_set_aside() == {NEWER + 5: 1}


def test_a_lost_job_of_a_newer_worker_is_left_to_newer_workers(
    queue: JobQueue, newer_queue: JobQueue, reader: QueueReader
) -> None:
    send(queue, "newer", version=NEWER)
    claim(newer_queue, lease_seconds=0.01)
    time.sleep(0.02)
    assert queue.sweep() == (0, 0, 0)
    assert reader.submission("sub-newer").counts["running"] == 1
    assert newer_queue.sweep() == (1, 0, 0)
    assert newer_queue.claim_suspect("w", lease_seconds=60) is not None


def test_a_lost_job_that_a_worker_of_version_1_has_claimed_runs_again(queue: JobQueue) -> None:
    """Its hash names the entry, as that version's lease, and no claim."""
    send(queue, "older", version=1)
    (job,) = claim(queue, lease_seconds=0.01).jobs
    queue.client.hdel(queue.keys.job("older"), "claim")
    time.sleep(0.02)
    assert queue.sweep() == (1, 0, 0)
    suspect = queue.claim_suspect("w", lease_seconds=60)
    assert suspect is not None
    assert not finish(queue, job)
    assert finish(queue, suspect)


@pytest.mark.parametrize("version", ["", "two", "nan", "1.5", "inf", "-7"])
def test_what_is_no_version_is_set_aside_too(
    queue: JobQueue, reader: QueueReader, version: str
) -> None:
    send(queue, "odd", version=version)
    send(queue, "current")
    assert ids_of(claim(queue).jobs) == ["current"]
    queue.sweep()
    assert claim(queue).num_set_aside == 0
    assert sum(reader.num_set_aside().values()) == 1


DAMAGED = [
    *(("adapter", None), ("submissions", None), ("attempts", None), ("attempts", "x")),
    *(("attempts", "-1"), (None, None)),
]


def damage(queue: JobQueue, job_id: str, field: str | None, value: str | None) -> None:
    """Change or take away a field of a job, or all of them for a text."""
    key = queue.keys.job(job_id)
    if field is None:
        queue.client.set(key, "no hash")
    elif value is None:
        queue.client.hdel(key, field)
    else:
        queue.client.hset(key, field, value)


@pytest.mark.parametrize(("field", "value"), DAMAGED)
def test_a_damaged_record_stops_no_worker_and_fails_or_is_told(
    queue: JobQueue, reader: QueueReader, field: str | None, value: str | None
) -> None:
    send(queue, "waiting", "suspect", "delayed", "running", "last")
    leases = {job.lease.job_id: job.lease for job in claim(queue).jobs}
    queue.release("w", [leases["waiting"], leases["last"]])
    queue.retry("w", [leases["suspect"]], outcome="x", message="x", alone=True)
    queue.retry("w", [leases["delayed"]], outcome="x", message="x", alone=False, delay=60)
    queue.client.zadd(queue.keys.delayed, {"delayed": 1})
    queue.client.zadd(queue.keys.leases, {"running": 1})
    for id_ in ("waiting", "suspect", "delayed", "running"):
        damage(queue, id_, field, value)
    queue.sweep()
    assert ids_of(claim(queue).jobs) == ["last"]
    assert queue.claim_suspect("other", lease_seconds=60) is None
    queue.sweep()
    assert reader.num_set_aside() == {0: 3}, "whose lane is not known any more"
    (result,) = reader.results(["waiting"])
    assert result.error
    assert (result.status, result.error.code) == ("failed", "bad_record")
    assert reader.submission("sub-waiting").counts["failed"] == 1
    (finished,) = reader.finished({"sub-waiting": "0"})
    assert finished.job_ids == ["waiting"]


@pytest.mark.parametrize("field", ["job", "queued"])
def test_a_job_without_its_prompt_or_moment_is_lent_so_that_it_ends_with_a_reason(
    queue: JobQueue, field: str
) -> None:
    send(queue, "odd")
    queue.client.hdel(queue.keys.job("odd"), field)
    assert ids_of(claim(queue).jobs) == ["odd"]


def test_a_long_run_of_newer_records_is_passed_over_piece_by_piece(queue: JobQueue) -> None:
    newer = [f"newer-{i}" for i in range(2500)]
    send(queue, *newer, "current")
    for id_ in newer:
        queue.client.hset(queue.keys.job(id_), "v", NEWER)
    found, numbers = list[str](), list[int]()
    while not found:
        claims = claim(queue)
        found = ids_of(claims.jobs)
        numbers.append(claims.num_passed_over)
    assert found == ["current"]
    assert sum(numbers) == 2500
    assert max(numbers) < 1100


def test_unloading_by_force_leaves_newer_records_alone(queue: JobQueue) -> None:
    queue.set_adapter("a", "/a", pinned=False)
    queue.submit("sub", "file", 1, 0, [Job(id="newer", lora="a", prompt="x")])
    queue.client.hset(queue.keys.job("newer"), "v", NEWER)
    queue.unload_adapter("a", "force")
    assert queue.retire_adapter("a") is False
    assert queue.client.hget(queue.keys.job("newer"), "state") == "waiting"


def test_status_tells_of_jobs_that_are_left_alone_and_of_those_out_of_turn(
    client: Client, queue: JobQueue, redis_url: str
) -> None:
    producer = Producer(redis_url, queue.name)
    send(queue, "newer", "newer-too", version=NEWER)
    send(queue, "suspect", "delayed", "dead")
    leases = {job.lease.job_id: job.lease for job in claim(queue).jobs}
    why = {"outcome": "x", "message": "x"}
    queue.retry("w", [leases["suspect"]], alone=True, **why)
    queue.retry("w", [leases["delayed"]], alone=False, delay=60, **why)
    queue.set_max_attempts(1)
    queue.retry("w", [leases["dead"]], alone=False, **why)
    found = json.loads(producer("status", "--json").stdout)
    assert {name: found[name] for name in ("suspects", "delayed", "dead", "set_aside")} == {
        "suspects": 1,
        "delayed": 1,
        "dead": 1,
        "set_aside": {str(NEWER): 2},
    }
    text = " ".join(producer("status").stdout.split())
    assert f"2 jobs left alone: the record is of version {NEWER}" in text
    assert "1 job given up on: `producer dead list` says why" in text
