"""Jobs that were given up on: listed, shown, replayed and dropped."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from broker.claims import ClaimRequest
from broker.job_queue import JobQueue
from producer.client import Client
from schemas.errors import BadInput, UnknownId
from tests.test_producer_cli import Producer, Worker


@pytest.fixture
def producer(redis_url: str, queue_name: str) -> Producer:
    return Producer(redis_url, queue_name)


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


def send(client: Client, *ids: str, lora: str | None = None) -> str:
    return client.submit([{"id": id_, "prompt": f"prompt of {id_}", "lora": lora} for id_ in ids])


def give_up(queue: JobQueue, *, attempts: int = 1) -> None:
    """All waiting jobs fail until they are given up."""
    queue.set_max_attempts(attempts)
    request = ClaimRequest(num_jobs=1000, free_slots=4, in_use=())
    for _ in range(attempts):
        claims = queue.claim("worker-1", request, lease_seconds=60, patience=60).jobs
        queue.retry(
            "worker-1",
            [claim.lease for claim in claims],
            outcome="adapter_unavailable",
            message="there is no folder /sql.",
            alone=False,
        )


def listed(producer: Producer, *ids: str) -> list[str]:
    outcome = producer("dead", "list", "--json", *ids)
    assert outcome.exit_code == 0
    return [letter["job_id"] for letter in json.loads(outcome.stdout)["dead"]]


def test_dead_jobs_are_listed_by_job_by_submission_and_all(
    producer: Producer, client: Client, queue: JobQueue
) -> None:
    Worker(queue)
    first = send(client, "one", "two", lora="sql")
    give_up(queue)
    send(client, "three")
    give_up(queue, attempts=2)
    assert listed(producer) == ["one", "two", "three"]
    assert listed(producer, first) == ["one", "two"]
    assert listed(producer, "three", "one") == ["one", "three"]
    table = " ".join(producer("dead", "list").stdout.split())
    assert "given up after 2 attempts; how the last one ended: there is no folder /sql." in table
    (letter, *_) = json.loads(producer("dead", "list", "--json").stdout)["dead"]
    assert (letter["lora"], letter["attempts"]) == ("sql", 1)
    assert letter["code"] == "adapter_unavailable"
    assert letter["submissions"] == [first]


def test_an_empty_list_says_so(producer: Producer, client: Client) -> None:
    assert producer("dead", "list").stdout == f"No dead jobs on queue '{client.queue}'.\n"
    assert listed(producer) == []


def test_a_dead_letter_whose_record_is_damaged_is_listed_beside_the_others(
    producer: Producer, client: Client, queue: JobQueue
) -> None:
    send(client, "gone", "odd", "endless", "sound")
    give_up(queue)
    fields = ("submissions", "attempts", "error_code", "error_message", "finished")
    queue.client.hdel(queue.keys.job("gone"), *fields)
    queue.client.hset(queue.keys.job("odd"), mapping={"attempts": "many", "finished": "never"})
    endless = dict.fromkeys(("attempts", "finished"), "9" * 5000)
    queue.client.hset(queue.keys.job("endless"), mapping=endless)
    assert listed(producer) == ["gone", "odd", "endless", "sound"]
    table = producer("dead", "list")
    assert table.exit_code == 0
    assert "bad_record" in table.stdout
    assert "why it was given up is gone" in " ".join(table.stdout.split())


def test_a_job_is_shown_with_the_end_of_every_attempt(
    producer: Producer, client: Client, queue: JobQueue
) -> None:
    send(client, "job")
    give_up(queue, attempts=2)
    shown = producer("dead", "show", "job").stdout
    assert "adapter_unavailable: given up after 2 attempts" in shown
    assert shown.count("adapter_unavailable: there is no folder /sql.") == 2
    assert producer("status", "job").stdout == shown
    found = json.loads(producer("dead", "show", "job", "--json").stdout)
    assert found["job"]["status"] == "dead"
    assert [attempt["attempt"] for attempt in found["attempts"]] == [1, 2]
    assert all(attempt["worker"] == "worker-1" for attempt in found["attempts"])
    for attempt in found["attempts"]:
        assert found["job"]["timings"]["queued"] <= attempt["started"] <= attempt["ended"]


def test_a_replayed_job_waits_with_fresh_attempts_and_its_history(
    producer: Producer, client: Client, queue: JobQueue
) -> None:
    worker = Worker(queue)
    submission = send(client, "job", "other")
    give_up(queue, attempts=2)
    outcome = producer("dead", "replay", "job", "--json")
    assert json.loads(outcome.stdout) == {"replayed": 1}
    assert client.status(submission).counts["waiting"] == 1  # type: ignore[union-attr]
    assert client.status(submission).counts["dead"] == 1  # type: ignore[union-attr]
    assert listed(producer) == ["other"]
    assert client.job("job").error is None
    assert worker.claim() == ["job"]
    assert queue.client.hget(queue.keys.job("job"), "attempts") == "1"
    worker.finish("job")
    assert [attempt.attempt for attempt in client.attempts("job")] == [1, 2]
    assert client.status(submission).is_complete  # type: ignore[union-attr]
    assert client.status(submission).sent == 2  # type: ignore[union-attr]


def test_a_submission_and_the_whole_queue_are_replayed(
    producer: Producer, client: Client, queue: JobQueue
) -> None:
    worker = Worker(queue)
    first = send(client, "one", "two")
    send(client, "three")
    give_up(queue)
    assert producer("dead", "replay", first).stderr.endswith("2 jobs replayed.\n")
    assert listed(producer) == ["three"]
    assert producer("dead", "replay", "--all").exit_code == 0
    assert sorted(worker.claim()) == ["one", "three", "two"]


def test_a_job_that_killed_its_workers_is_replayed_alone(client: Client, queue: JobQueue) -> None:
    worker = Worker(queue)
    send(client, "poison")
    queue.set_max_attempts(1)
    worker.claim()
    queue.client.zadd(queue.keys.leases, {"poison": 1})
    assert queue.sweep() == (0, 1, 0)
    client.replay_dead("poison")
    send(client, "other")
    assert worker.claim() == ["other"]
    claim = queue.claim_suspect("worker-1", lease_seconds=60)
    assert claim is not None
    assert claim.lease.job_id == "poison"


def test_who_follows_while_a_dead_job_is_replayed_sees_both_ends_and_all_other_jobs(
    client: Client, queue: JobQueue, redis_url: str
) -> None:
    worker = Worker(queue)
    submission = send(client, "job", "other")
    results = client.follow(submission)
    give_up_one = queue.retry
    queue.set_max_attempts(1)
    worker.claim()
    claims = {id_: worker._claims[id_].lease for id_ in ("job", "other")}
    give_up_one("worker-1", [claims["job"]], outcome="x", message="x", alone=False)
    assert next(results).status == "dead"
    client.replay_dead("job")
    worker.claim()
    threading.Timer(0.3, worker.finish, ["job"]).start()
    threading.Timer(0.6, worker.finish, ["other"]).start()
    assert [(result.id, result.status) for result in results] == [
        *(("job", "done"), ("other", "done")),
    ]
    # Who comes later sees every job once.
    with Client(redis_url, client.queue) as late:
        assert sorted(result.id for result in late.follow(submission)) == ["job", "other"]


def test_a_dropped_job_leaves_the_list_and_keeps_its_result(
    producer: Producer, client: Client, queue: JobQueue
) -> None:
    submission = send(client, "one", "two")
    give_up(queue)
    assert json.loads(producer("dead", "drop", "one", "--json").stdout) == {"dropped": 1}
    assert listed(producer) == ["two"]
    assert client.job("one").status == "dead"
    assert producer("dead", "drop", "--all").stderr.endswith("1 job dropped.\n")
    assert listed(producer) == []
    assert client.status(submission).counts["dead"] == 2  # type: ignore[union-attr]
    with pytest.raises(BadInput, match=r"'one' \(dead\)"):
        client.replay_dead("one")


def test_a_job_that_is_not_dead_is_refused_and_nothing_is_replayed(
    producer: Producer, client: Client, queue: JobQueue
) -> None:
    send(client, "dead")
    give_up(queue)
    send(client, "waiting")
    outcome = producer("dead", "replay", "dead", "waiting")
    assert outcome.exit_code == 2
    assert "'waiting' (waiting)" in outcome.stderr
    assert listed(producer) == ["dead"]
    with pytest.raises(UnknownId):
        client.drop_dead("nobody")


def test_what_is_no_job_is_not_shown_and_a_remedy_is(producer: Producer, client: Client) -> None:
    submission = send(client, "one")
    for id_, remedy in (
        ("nobody", "`producer status --queue NAME` lists the submissions"),
        (submission, f"`producer results {submission}` and"),
    ):
        outcome = producer("dead", "show", id_)
        assert outcome.exit_code == 3
        assert remedy in outcome.stderr


@pytest.mark.parametrize("command", ["replay", "drop"])
@pytest.mark.parametrize("args", [[], ["--all", "job"]])
def test_ids_and_all_exclude_each_other(
    producer: Producer, client: Client, command: str, args: list[str]
) -> None:
    outcome = producer("dead", command, *args)
    assert outcome.exit_code == 2
    assert "Name jobs or submissions, or give --all." in outcome.stderr
