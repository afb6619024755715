"""Queues and adapters that are paused for a while."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from producer.client import Client
from schemas.errors import UnknownId
from schemas.keys import BASE
from tests.test_job_queue import claim, jobs, join, keys_left, result, submit
from tests.test_producer_cli import Producer, Worker, prompts


@pytest.fixture
def producer(redis_url: str, queue_name: str) -> Producer:
    return Producer(redis_url, queue_name)


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


def test_nothing_is_claimed_of_a_paused_queue_and_what_runs_is_finished(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(3, "a"))
    (running,) = claim(queue, 1)
    assert queue.pause()
    assert not queue.pause()
    submit(queue, jobs(2), "more")
    assert claim(queue) == []
    assert queue.commit("w", [(running.lease, result(running))]) == [True]
    assert queue.resume()
    assert not queue.resume()
    assert len(claim(queue)) == 4


def test_a_paused_adapter_holds_up_no_other(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    submit(queue, jobs(9, "a"), "sub-a")
    queue.pause("a")
    submit(queue, jobs(9, "a", "later"), "later")
    submit(queue, jobs(1, "b"), "sub-b")
    submit(queue, jobs(1), "sub-base")
    assert {job.adapter for job in claim(queue, in_use=("a",))} == {None, "b"}
    queue.pause(BASE)
    submit(queue, jobs(1, None, "later"), "later-base")
    assert claim(queue) == []
    assert reader.num_waiting_by_adapter() == {"a": 18, BASE: 1}
    queue.resume("a")
    queue.resume(BASE)
    claims = claim(queue)
    assert len(claims) == 19
    queue.commit("w", [(job.lease, result(job)) for job in claims])


def test_a_job_that_comes_back_to_a_paused_adapter_waits(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(1, "a"))
    (job,) = claim(queue)
    queue.pause("a")
    queue.release("w", [job.lease])
    assert claim(queue) == []
    queue.resume("a")
    assert len(claim(queue)) == 1


def test_jobs_of_a_paused_adapter_can_be_cancelled(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(2, "a"))
    queue.pause("a")
    queue.cancel(["job-a-0", "job-a-1"])
    queue.resume("a")
    assert claim(queue) == []
    assert keys_left(queue) == set()


def test_an_adapter_that_is_gone_is_no_longer_paused(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    submit(queue, jobs(2, "a"))
    queue.pause("a")
    queue.unload_adapter("a", "force")
    assert queue.retire_adapter("a")
    assert reader.paused() == {}
    assert reader.submission("sub").counts["failed"] == 2


def test_submit_accepts_and_says_that_its_jobs_wait(
    producer: Producer, queue: JobQueue, tmp_path: Path
) -> None:
    Worker(queue)
    file = prompts(tmp_path, '{"prompt": "x", "lora": "sql"}', '"x"')
    queue.pause("json")
    assert "aused" not in producer("submit", file).stderr
    queue.pause("sql")
    outcome = producer("submit", file)
    assert outcome.exit_code == 0
    assert "warning: Paused, so that jobs wait until `producer resume NAME`: sql." in outcome.stderr
    queue.pause()
    assert f"Queue '{queue.name}' is paused" in producer("submit", file).stderr


def test_status_shows_what_is_paused(producer: Producer, queue: JobQueue) -> None:
    Worker(queue)
    queue.pause("sql")
    queue.pause(BASE)
    shown = producer("status").stdout
    assert "until `producer resume NAME`: the base model (@base), sql." in shown
    assert set(json.loads(producer("status", "--json").stdout)["paused"]) == {"sql", BASE}
    queue.pause()
    assert f"Queue '{queue.name}' is paused" in producer("status").stdout


def test_the_commands_say_what_they_did(producer: Producer, queue: JobQueue) -> None:
    Worker(queue)
    place = f"--queue {producer.queue} --redis-url {producer.redis_url}"
    assert producer("pause", "sql").stdout == (
        "Paused adapter 'sql': workers finish what runs and claim nothing new until"
        f" `producer resume sql {place}`.\n"
    )
    assert producer("pause", "sql").stdout.startswith("Paused already: adapter 'sql'.")
    assert producer("pause").stdout.startswith(f"Paused queue '{queue.name}':")
    resumed = producer("resume")
    assert resumed.stdout == f"Resumed queue '{queue.name}'.\n"
    assert "sql" in resumed.stderr
    assert producer("resume", "@base").stdout == "Not paused: the base model.\n"
    unknown = producer("pause", "sqll")
    assert unknown.exit_code == 3
    assert "did you mean 'sql'?" in unknown.stderr


def test_an_adapter_of_a_queue_that_no_worker_has_joined_can_be_paused(client: Client) -> None:
    assert client.pause("sql")
    assert client.overview().paused.keys() == {"sql"}
    assert client.resume("sql")


def test_pausing_an_adapter_that_nobody_can_know_yet_says_so(
    producer: Producer, queue: JobQueue
) -> None:
    outcome = producer("pause", "sqll")
    assert outcome.exit_code == 0
    assert outcome.stderr.splitlines()[-1] == (
        f"warning: No worker has ever joined queue '{queue.name}', so nobody could tell whether it"
        " has that adapter; the pause holds if one of that name comes."
    )
    assert "warning" not in producer("pause", "@base").stderr
    assert "warning" not in producer("pause").stderr
    Worker(queue)
    assert "warning" not in producer("pause", "sql").stderr


def test_what_cannot_be_an_adapters_name_is_not_paused(producer: Producer) -> None:
    outcome = producer("pause", "a b")
    assert outcome.exit_code == 2
    assert "'a b'" in outcome.stderr


def test_an_unknown_adapter_is_not_paused(client: Client, queue: JobQueue) -> None:
    join(queue)
    with pytest.raises(UnknownId):
        client.pause("nobody")
