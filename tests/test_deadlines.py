"""Jobs that must have begun by some moment."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from producer.client import Client
from producer.quantities import parse_deadline, parse_duration
from schemas.errors import BadInput
from schemas.job import Job
from tests.test_job_queue import claim, join, keys_left, result
from tests.test_producer_cli import Producer, prompts


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


@pytest.fixture
def producer(redis_url: str, queue_name: str) -> Producer:
    return Producer(redis_url, queue_name)


def moment(seconds: float) -> str:
    """So many seconds from now."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def submit(queue: JobQueue, *deadlines: float | str | None) -> None:
    jobs = [Job(id=f"job-{i}", prompt="x", deadline=d) for i, d in enumerate(deadlines)]
    queue.submit("sub", "file", len(jobs), 0, jobs)


def let_deadline_come(queue: JobQueue) -> None:
    """Of the first job, which runs, without waiting for it."""
    queue.client.hset(queue.keys.job("job-0"), "deadline", 1)


def test_a_job_whose_deadline_has_come_is_not_run(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    submit(queue, 0.01, moment(-7), moment(60), 60, None)
    time.sleep(0.02)
    assert [job.lease.job_id for job in claim(queue)] == ["job-2", "job-3", "job-4"]
    status = reader.submission("sub")
    assert (status.counts["expired"], status.counts["running"]) == (2, 3)
    first, second = reader.results(["job-0", "job-1"])
    assert first.status == second.status == "expired"
    assert first.error is not None
    assert first.error.code == "expired"
    assert first.error.message == (
        "not run: its deadline, 0.0 s after it was sent, came while it waited"
    )
    assert second.error is not None
    assert second.error.message == "not run: its deadline, 7.0 s before it was sent"
    assert first.timings.finished is not None


def test_expired_jobs_are_found_though_nobody_claims_them(
    queue: JobQueue, reader: QueueReader
) -> None:
    submit(queue, 0.01, 60, None)
    time.sleep(0.02)
    assert queue.expire_jobs() == 1
    assert queue.expire_jobs() == 0
    assert reader.submission("sub").counts["expired"] == 1
    assert reader.finished({"sub": "0"})[0].job_ids == ["job-0"]


def test_a_job_that_runs_at_its_deadline_goes_on_to_its_end(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, 60)
    (job,) = claim(queue)
    let_deadline_come(queue)
    assert queue.expire_jobs() == 0
    assert queue.commit("w", [(job.lease, result(job))]) == [True]
    assert reader.submission("sub").counts["done"] == 1
    assert keys_left(queue) == set()


def test_a_job_handed_back_after_its_deadline_is_not_run_again(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, 60)
    (job,) = claim(queue)
    let_deadline_come(queue)
    queue.release("w", [job.lease])
    assert queue.expire_jobs() == 1
    assert claim(queue) == []
    assert reader.submission("sub").counts["expired"] == 1
    assert keys_left(queue) == set()
    assert not queue.client.exists(queue.keys.prefix + "deadlines")


def test_a_job_sent_again_is_the_same_and_keeps_its_deadline(
    queue: JobQueue, reader: QueueReader
) -> None:
    submit(queue, 60)
    first = queue.client.hget(queue.keys.job("job-0"), "deadline")
    time.sleep(0.01)
    queue.submit("again", "file", 1, 0, [Job(id="job-0", prompt="x", deadline=60)])
    assert queue.client.hget(queue.keys.job("job-0"), "deadline") == first
    assert reader.submission("again").counts["waiting"] == 1


def test_waiting_for_a_job_ends_with_its_deadline_though_no_worker_is_alive(
    client: Client,
) -> None:
    submission = client.submit([{"prompt": "x", "deadline": 0.5}])
    (result,) = client.follow(submission)
    assert result.status == "expired"
    assert client.wait(submission).counts["expired"] == 1  # type: ignore[union-attr]


def test_flags_serve_the_lines_that_say_nothing(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    file = prompts(
        tmp_path,
        '{"id": "a", "prompt": "x"}',
        '{"id": "b", "prompt": "x", "deadline": 5, "priority": "low"}',
        '{"id": "c", "prompt": "x", "deadline": null}',
    )
    outcome = producer("submit", file, "--deadline", "10m", "--priority", "high")
    assert outcome.exit_code == 0, outcome.output
    sent = [Job.from_wire(payload or "") for payload in reader.payloads(["a", "b", "c"])]
    assert [(job.priority, job.deadline) for job in sent] == [
        *(("high", 600), ("low", 5), ("high", None))
    ]


@pytest.mark.parametrize("value", ["0", "-1", "true", '"tomorrow"', '"2026-12-24T18:00"', "1e99"])
def test_a_line_with_a_wrong_deadline_is_refused(
    producer: Producer, tmp_path: Path, value: str
) -> None:
    outcome = producer("submit", prompts(tmp_path, f'{{"prompt": "x", "deadline": {value}}}'))
    assert outcome.exit_code == 2
    assert "prompts.jsonl:1: deadline: should be a number of seconds" in outcome.stderr


def test_a_wrong_flag_is_told_before_anything_is_read(producer: Producer, tmp_path: Path) -> None:
    outcome = producer("submit", str(tmp_path / "no-file"), "--deadline", "yesterday")
    assert outcome.exit_code == 2
    assert "--deadline 'yesterday': write how long from now" in outcome.stderr


def test_a_duration_is_seconds_or_has_a_unit() -> None:
    assert [parse_duration(t, "--x") for t in ("90", "1.5s", "15m", "2h", "7d")] == [
        *(90, 1.5, 900, 7200, 7 * 86400)
    ]
    for text in ("", "5 minutes", "-5", "1e3", "h"):
        with pytest.raises(BadInput, match="--x"):
            parse_duration(text, "--x")


def test_a_deadline_is_a_duration_or_a_moment_that_is_not_over() -> None:
    assert parse_deadline("2h") == 7200
    soon = datetime.now().replace(microsecond=0) + timedelta(days=1)
    assert datetime.fromisoformat(str(parse_deadline(soon.isoformat()))).tzinfo is not None
    with pytest.raises(BadInput, match="is over already"):
        parse_deadline("2020-01-01T00:00Z")
    with pytest.raises(BadInput, match="write how long"):
        parse_deadline("tomorrow")


def test_who_may_only_read_leaves_it_to_others_to_expire_jobs(
    client: Client, queue: JobQueue, redis_url: str
) -> None:
    submission = client.submit([{"prompt": "x", "deadline": 0.01}])
    time.sleep(0.02)
    server = queue.client
    server.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~*", "+@read", "+ping")
    try:
        url = redis_url.replace("unix://", "unix://reader:secret@")
        with Client(url, queue.name) as reader:
            assert reader.status(submission).counts["waiting"] == 1  # type: ignore[union-attr]
    finally:
        server.execute_command("ACL", "DELUSER", "reader")
    assert client.status(submission).counts["expired"] == 1  # type: ignore[union-attr]
