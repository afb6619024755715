"""Cancelling, against a real server, also while others claim, commit and send."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from benchmarks.waiting import PATIENCE
from broker.connection import connect
from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from producer.client import Client
from schemas.errors import LorryError, UnknownId
from schemas.job import Job
from schemas.result import TERMINAL_STATES
from tests.test_job_queue import claim, join, keys_left, result
from tests.test_producer_cli import Producer


@pytest.fixture
def producer(redis_url: str, queue_name: str) -> Producer:
    return Producer(redis_url, queue_name)


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


def submit(queue: JobQueue, number: int, submission: str = "sub") -> list[str]:
    jobs = [Job(id=f"{submission}.{i}", prompt="x") for i in range(number)]
    for start in range(0, number, 500):
        queue.submit(submission, "file", number, start, jobs[start : start + 500])
    return [job.id for job in jobs]


def test_a_waiting_job_is_cancelled_at_once(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    submit(queue, 3)
    assert queue.cancel(["sub.1"]).waiting == 1
    assert [job.lease.job_id for job in claim(queue)] == ["sub.0", "sub.2"]
    (cancelled,) = reader.results(["sub.1"])
    assert cancelled.status == "cancelled"
    assert cancelled.error is not None
    assert cancelled.error.message == "cancelled while it waited"


def test_the_worker_of_a_running_job_has_lost_it(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    submit(queue, 1)
    (running,) = claim(queue)
    assert queue.cancel(["sub.0"]).running == 1
    assert queue.commit("w", [(running.lease, result(running))]) == [False]
    assert queue.renew("w", [running.lease], lease_seconds=60) == {running.lease}
    assert queue.release("w", [running.lease]) == 0
    assert queue.sweep() == (0, 0, 0)
    (cancelled,) = reader.results(["sub.0"])
    assert (cancelled.status, cancelled.text) == ("cancelled", None)
    assert cancelled.error is not None
    assert cancelled.error.message == "cancelled while it ran on w"
    assert keys_left(queue) == set()


def test_a_job_that_has_ended_keeps_its_result(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    submit(queue, 1)
    (running,) = claim(queue)
    queue.commit("w", [(running.lease, result(running))])
    assert queue.cancel(["sub.0", "no-such-job"]).ended == 1
    assert next(reader.results(["sub.0"])).status == "done"


def test_a_cancelled_submission_is_complete_and_leaves_nothing_behind(
    client: Client, queue: JobQueue
) -> None:
    join(queue)
    submit(queue, 1200)
    done, *running = claim(queue, 300)
    queue.commit("w", [(done.lease, result(done))])
    seen: list[int] = []
    cancelled = client.cancel("sub", on_progress=seen.append)
    assert (cancelled.waiting, cancelled.running, cancelled.ended) == (900, 299, 1)
    assert seen == list(range(200, 1201, 200))
    status = client.status("sub")
    assert status.is_complete  # type: ignore[union-attr]
    assert status.counts["cancelled"] == 1199  # type: ignore[union-attr]
    assert not any(queue.commit("w", [(job.lease, result(job)) for job in running]))
    assert keys_left(queue) == set()
    for key in (queue.keys.waiting, queue.keys.running, queue.keys.backlog):
        assert not queue.client.exists(key)


def test_what_another_submission_waits_for_is_told_to_it_too(
    client: Client, queue: JobQueue
) -> None:
    submit(queue, 2)
    queue.submit("other", "file", 1, 0, [Job(id="sub.0", prompt="x")])
    client.cancel("sub")
    assert [found.status for found in client.follow("other")] == ["cancelled"]


def test_a_submission_cancelled_while_it_is_sent_takes_no_more(client: Client) -> None:
    cancel_once = iter([lambda: client.cancel(spool.submission)])

    def on_sent(number: int) -> None:
        for cancel in cancel_once:
            cancel()
            break

    with client.prepare(enumerate(["x"] * 700, 1), name="file") as spool:
        with pytest.raises(LorryError, match=r"while it was sent\. 500 of 700 jobs are known"):
            client.send(spool, on_sent)
        status = client.status(spool.submission)
    assert (status.total, status.counts["cancelled"]) == (500, 500)  # type: ignore[union-attr]
    assert status.is_complete  # type: ignore[union-attr]


def test_an_unknown_id_cancels_nothing(client: Client, queue: JobQueue) -> None:
    submit(queue, 2)
    with pytest.raises(UnknownId):
        client.cancel("sub", "nobody")
    assert client.status("sub").counts["waiting"] == 2  # type: ignore[union-attr]


def test_cancel_tells_what_it_did(producer: Producer, queue: JobQueue) -> None:
    join(queue)
    submit(queue, 4)
    claim(queue, 1)
    assert producer("cancel", "sub.3").stdout == "Cancelled 1 job (1 waiting, 0 running).\n"
    outcome = producer("cancel", "sub")
    assert outcome.exit_code == 0
    assert outcome.stdout == "Cancelled 3 jobs (2 waiting, 1 running); 1 had ended before.\n"
    again = producer("cancel", "sub", "--json")
    assert json.loads(again.stdout) == {"waiting": 0, "running": 0, "ended": 4}
    assert producer("cancel", "sub").stdout == "Cancelled 0 jobs; 4 had ended before.\n"
    assert producer("cancel", "nobody").exit_code == 3
    assert producer("wait", "sub").exit_code == 1


def test_every_job_ends_once_though_claims_commits_and_releases_race_with_cancelling(
    redis_url: str, queue: JobQueue, reader: QueueReader
) -> None:
    """Several workers and several who cancel, each on a connection of its own."""
    join(queue)
    ids = submit(queue, 3000)
    recorded: list[str] = []
    failures: list[Exception] = []

    def work(name: str, mine: JobQueue) -> None:
        for number in count():
            claims = claim(mine, 20, worker=name)
            if not claims:
                return
            if number % 5 == 0:  # One in five claims is handed back.
                leases = [job.lease for job in claims]
                mine.release(name, leases)
                continue
            kept = mine.commit(name, [(job.lease, result(job)) for job in claims])
            recorded.extend(
                j.lease.job_id for j, is_kept in zip(claims, kept, strict=True) if is_kept
            )

    def cancel(mine: JobQueue, step: int) -> None:
        for start in range(0, len(ids), 60):
            mine.cancel(ids[start : start + 60 : step])

    def run(action: Callable[[JobQueue], None]) -> threading.Thread:
        def act() -> None:
            try:
                with connect(redis_url) as connection:
                    action(JobQueue(connection, queue.name))
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=act)
        thread.start()
        return thread

    threads = [run(lambda mine, name=f"w{n}": work(name, mine)) for n in range(3)]  # type: ignore[misc]
    threads += [run(lambda mine, step=step: cancel(mine, step)) for step in (2, 3)]  # type: ignore[misc]
    for thread in threads:
        thread.join(timeout=PATIENCE)
    assert failures == []
    outcomes = {found.id: found.status for found in reader.results(ids)}
    states = Counter(outcomes.values())
    assert set(states) == {"done", "cancelled"}, states
    assert {id_ for id_, state in outcomes.items() if state == "done"} == set(recorded)
    assert len(recorded) == len(set(recorded))
    counts = reader.submission("sub").counts
    assert {state: number for state, number in counts.items() if number} == states
    finished = queue.client.xrange(queue.keys.submission_finished("sub"))
    assert Counter(fields["id"] for _, fields in finished) == dict.fromkeys(ids, 1)
    assert set(outcomes.values()) <= TERMINAL_STATES
    assert keys_left(queue) == set()
    for key in (queue.keys.waiting, queue.keys.running, queue.keys.backlog):
        assert not queue.client.exists(key)
