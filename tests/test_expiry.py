"""Jobs and results are kept for a while, and then deleted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker import sweeping
from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from producer.client import Client
from schemas.errors import BadInput, UnknownId
from schemas.job import Job
from tests.test_job_queue import claim, join, result
from tests.test_producer_cli import Producer, Worker, prompts


@pytest.fixture
def producer(redis_url: str, queue_name: str) -> Producer:
    return Producer(redis_url, queue_name)


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


def submit(queue: JobQueue, submission: str, *ids: str, ttl: float = 0.01) -> None:
    jobs = [Job(id=id_, prompt="x") for id_ in ids]
    queue.submit(submission, "prompts.jsonl", len(ids), 0, jobs, result_ttl=ttl)


def finish(queue: JobQueue, count: int = 100) -> None:
    claims = claim(queue, count)
    queue.commit("w", [(job.lease, result(job)) for job in claims])


def expire(queue: JobQueue) -> int:
    time.sleep(0.02)
    return queue.expire_submissions()


def keys_of_jobs(queue: JobQueue) -> set[str]:
    names = queue.client.scan_iter(match=queue.keys.prefix + "*")
    found = {name.removeprefix(queue.keys.prefix) for name in names}
    return {name for name in found if name.startswith(("job:", "submission:"))}


def test_results_are_deleted_and_the_counts_stay(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    submit(queue, "sub", "a", "b")
    finish(queue, 1)
    assert expire(queue) == 0  # One of its jobs has not ended.
    finish(queue)
    assert expire(queue) == 2
    assert expire(queue) == 0
    status = reader.submission("sub")
    assert status.expired is not None
    assert status.is_complete
    assert (status.total, status.sent, status.counts["done"]) == (2, 2, 2)
    assert keys_of_jobs(queue) == {"submission:sub"}
    assert 0 < queue.client.ttl(queue.keys.submission("sub")) <= 30 * 86400
    assert reader.submissions(10) == []
    assert not queue.client.exists(queue.keys.expiry)


def test_results_are_kept_until_their_time(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    submit(queue, "sub", "a", ttl=60)
    finish(queue)
    assert expire(queue) == 0
    assert next(reader.results(["a"])).status == "done"


def test_a_job_is_kept_for_the_last_submission_that_sent_it(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, "short", "a", "b")
    submit(queue, "long", "b", "b", "c", ttl=60)
    finish(queue)
    assert expire(queue) == 2
    assert keys_of_jobs(queue) >= {"job:b", "job:c"}
    assert "job:a" not in keys_of_jobs(queue)
    assert [found.status for found in reader.results(["b"])] == ["done"]
    assert reader.submission("long").counts["done"] == 3


def test_a_submission_that_gets_more_jobs_does_not_expire(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    queue.submit("sub", "f", 2, 0, [Job(id="a", prompt="x")], result_ttl=0.01)
    finish(queue)
    queue.submit("sub", "f", 2, 1, [Job(id="b", prompt="x")], result_ttl=0.01)
    assert expire(queue) == 0
    finish(queue)
    assert expire(queue) == 2


@pytest.mark.parametrize("how", ["cancelled", "expired", "dead", "failed"])
def test_whatever_a_job_ends_as_it_expires(queue: JobQueue, how: str) -> None:
    join(queue)
    deadline = 0.001 if how == "expired" else None
    jobs = [Job(id="a", prompt="x", lora="a", deadline=deadline)]
    queue.submit("sub", "f", 1, 0, jobs, result_ttl=0.01)
    if how == "cancelled":
        queue.cancel(["a"])
    elif how == "expired":
        time.sleep(0.01)
        queue.expire_jobs()
    elif how == "dead":
        (job,) = claim(queue)
        queue.set_max_attempts(1)
        queue.retry("w", [job.lease], outcome="x", message="x", alone=True)
    else:
        queue.unload_adapter("a", "force")
        queue.retire_adapter("a")
    assert expire(queue) == 1
    assert keys_of_jobs(queue) == {"submission:sub"}


def test_a_large_submission_goes_in_pieces_and_its_counts_add_up_meanwhile(
    queue: JobQueue, reader: QueueReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    join(queue)
    submit(queue, "large", *(f"job-{i}" for i in range(250)))
    submit(queue, "small", "other")
    finish(queue, 300)
    time.sleep(0.02)
    monkeypatch.setattr(sweeping, "SWEEP_LIMIT", 100)
    sizes = []
    while number := queue.expire_submissions():
        sizes.append(number)
        status = reader.submission("large")
        assert (status.total, status.sent, status.counts["done"]) == (250, 250, 250)
    assert sizes == [100, 100, 51]
    assert keys_of_jobs(queue) == {"submission:large", "submission:small"}


def test_many_small_submissions_go_in_one_sweep(queue: JobQueue) -> None:
    join(queue)
    for number in range(50):
        submit(queue, f"sub-{number}", f"job-{number}")
    finish(queue)
    assert expire(queue) == 50


def test_an_id_is_free_again_once_its_job_has_expired(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    submit(queue, "sub", "a")
    finish(queue)
    expire(queue)
    queue.submit("again", "f", 1, 0, [Job(id="a", prompt="of other content")])
    assert reader.submission("again").counts["waiting"] == 1


def test_an_expired_submission_says_so(producer: Producer, queue: JobQueue, tmp_path: Path) -> None:
    worker = Worker(queue)
    file = prompts(tmp_path, '{"id": "a", "prompt": "x"}', '{"id": "b", "prompt": "x"}')
    sent = json.loads(producer("submit", file, "--result-ttl", "0.01s", "--json").stdout)
    worker.finish_all()
    expire(queue)
    for command in (("results",), ("results", "--follow")):
        outcome = producer(*command, sent["submission"])
        assert outcome.exit_code == 3
        assert f"{file}) are no longer kept: they expired at 20" in outcome.stderr
        assert "0.01 s after its last job had ended" in outcome.stderr
    status = producer("status", sent["submission"])
    assert status.exit_code == 0
    assert "2: 2 done" in status.stdout
    assert "expired at 20" in status.stdout
    assert producer("wait", sent["submission"]).exit_code == 0
    assert "results expire some time after" in producer("results", "a").stderr


def test_results_are_kept_for_seven_days_unless_another_time_is_given(
    client: Client, reader: QueueReader
) -> None:
    assert reader.submission(client.submit(["x"])).result_ttl == 7 * 86400
    assert reader.submission(client.submit(["x"], result_ttl=60)).result_ttl == 60
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(BadInput, match=r"^result_ttl: should be more than 0"):
            client.submit(["x"], result_ttl=wrong)


def test_who_follows_results_that_expire_meanwhile_is_told(client: Client, queue: JobQueue) -> None:
    join(queue)
    submission = client.submit(["x"], result_ttl=0.01)

    def finish_and_expire() -> None:
        finish(queue)
        expire(queue)

    with pytest.raises(UnknownId, match="no longer kept"):
        next(client.follow(submission, on_wake=finish_and_expire))
