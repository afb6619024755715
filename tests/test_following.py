"""Who waits for results sleeps inside the server, and is woken by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import redis

from benchmarks.waiting import PATIENCE, wait_until
from broker import queue_reader
from broker.claims import ClaimRequest
from broker.job_queue import JobQueue
from producer import following
from producer.client import Client
from schemas.result import Result, Timings
from tests.servers import ValkeyServer


@pytest.fixture
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobQueue]:
    """On a server that nobody else uses."""
    server = ValkeyServer(tmp_path_factory.mktemp("server"))
    with server.client() as client:
        yield JobQueue(client, "q")
    server.stop()


@contextmanager
def follower(queue: JobQueue, *ids: str) -> Iterator[Future[list[Result]]]:
    """Follows in a thread until all has finished; it is waiting when this is entered."""
    port = queue.client.connection_pool.connection_kwargs["port"]

    def follow() -> list[Result]:
        with Client(f"redis://127.0.0.1:{port}", "q") as client:
            return list(client.follow(*ids))

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(follow)
        wait_until(lambda: num_waiting(queue.client) == 1, "nobody waits")
        yield found


def num_waiting(client: redis.Redis) -> int:
    return int(client.info("clients")["blocked_clients"])


def num_calls(client: redis.Redis) -> Counter[str]:
    """Commands by name since the server started, other than those that ask for it."""
    stats = client.info("commandstats")
    calls = Counter({name.removeprefix("cmdstat_"): s["calls"] for name, s in stats.items()})
    return Counter({name: number for name, number in calls.items() if name != "info"})


def finish_all(queue: JobQueue) -> None:
    request = ClaimRequest(num_jobs=10, free_slots=1, in_use=())
    for claim in queue.claim("w", request, lease_seconds=9, patience=9).jobs:
        result = Result(
            id=claim.lease.job_id,
            submission=claim.submission,
            lora=None,
            status="done",
            timings=Timings(queued=claim.queued),
        )
        assert queue.commit("w", [(claim.lease, result)]) == [True]


def submit(queue: JobQueue) -> tuple[str, str]:
    """A submission's id, and that of its only job."""
    port = queue.client.connection_pool.connection_kwargs["port"]
    with Client(f"redis://127.0.0.1:{port}", "q") as client:
        submission = client.submit(["Hello"])
        return submission, next(client.results(submission)).id


@pytest.mark.parametrize("what", [0, 1], ids=["a submission", "a job"])
def test_while_nothing_finishes_one_blocking_read_follows_another(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch, what: int
) -> None:
    monkeypatch.setattr(queue_reader, "BLOCK_SECONDS", 0.2)
    monkeypatch.setattr(following, "BLOCK_SECONDS", 0.2)
    with follower(queue, submit(queue)[what]) as found:
        before = num_calls(queue.client)
        wait_until(
            lambda: num_calls(queue.client)["xread"] >= before["xread"] + 5, "it does not read on"
        )
        sent = num_calls(queue.client) - before
        # Between two reads it looks only whether the submission is still there.
        assert set(sent) == {"xread", "hgetall"}
        assert sent["hgetall"] <= sent["xread"] + 1
        finish_all(queue)
        assert len(found.result(timeout=PATIENCE)) == 1


def test_a_result_wakes_who_waits_for_it(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (queue_reader, following):
        monkeypatch.setattr(module, "BLOCK_SECONDS", 4.0)  # Below the socket's timeout.
    submission, _ = submit(queue)
    with follower(queue, submission) as found:
        before = num_calls(queue.client)
        finish_all(queue)
        assert [result.status for result in found.result(timeout=PATIENCE)] == ["done"]
        # The read that it waited in was the one that told it.
        assert (num_calls(queue.client) - before)["xread"] <= 1
