"""Replies that a network loses between a client and a real server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import redis

from broker.claims import ClaimRequest, Claims
from broker.connection import connect
from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from schemas.job import Job
from tests.lossy_proxy import LossyProxy
from tests.test_job_queue import result


@pytest.fixture
def proxy(redis_url: str) -> Iterator[LossyProxy]:
    with closing(LossyProxy(redis_url)) as proxy:
        yield proxy


@pytest.fixture
def behind_proxy(proxy: LossyProxy, queue_name: str) -> Iterator[JobQueue]:
    """The queue as a worker on the other side of the network sees it."""
    with connect(proxy.url) as client:
        yield JobQueue(client, queue_name)


def claim(queue: JobQueue) -> Claims:
    request = ClaimRequest(num_jobs=10, free_slots=0, in_use=[])
    return queue.claim("w", request, lease_seconds=600, patience=60)


def sha(queue: JobQueue, script: str) -> str:
    return str(queue._scripts[script].sha)


def send(queue: JobQueue) -> None:
    queue.submit("sub", "file", 2, 0, [Job(id=f"job-{i}", prompt="x") for i in range(2)])


def test_the_jobs_of_a_lost_claim_come_with_the_next_one(
    queue: JobQueue, reader: QueueReader, behind_proxy: JobQueue, proxy: LossyProxy
) -> None:
    send(queue)
    queue.client.script_load(behind_proxy._scripts["claim"].script)
    proxy.lose_reply(sha(behind_proxy, "claim"))
    with pytest.raises(redis.ConnectionError):
        claim(behind_proxy)
    assert reader.submission("sub").counts["running"] == 2
    found = claim(behind_proxy).jobs
    assert [(job.lease.job_id, job.attempts) for job in found] == [("job-0", 1), ("job-1", 1)]
    assert behind_proxy.commit("w", [(job.lease, result(job)) for job in found]) == [True, True]
    assert proxy.num_lost == 1


def test_a_commit_whose_reply_was_lost_is_repeated_and_counts_once(
    queue: JobQueue, reader: QueueReader, behind_proxy: JobQueue, proxy: LossyProxy
) -> None:
    send(queue)
    outcomes = [(job.lease, result(job)) for job in claim(behind_proxy).jobs]
    queue.client.script_load(behind_proxy._scripts["commit"].script)
    proxy.lose_reply(sha(behind_proxy, "commit"))
    with pytest.raises(redis.ConnectionError):
        behind_proxy.commit("w", outcomes)
    assert behind_proxy.commit("w", outcomes) == [True, True]
    assert reader.submission("sub").counts["done"] == 2
    (finished,) = reader.finished({"sub": "0"})
    assert sorted(finished.job_ids) == ["job-0", "job-1"]


def test_a_retry_whose_reply_was_lost_is_repeated_and_counts_once(
    queue: JobQueue, behind_proxy: JobQueue, proxy: LossyProxy
) -> None:
    send(queue)
    leases = [job.lease for job in claim(behind_proxy).jobs]
    queue.client.script_load(behind_proxy._scripts["retry"].script)
    proxy.lose_reply(sha(behind_proxy, "retry"))
    why = {"outcome": "out_of_memory", "message": "x"}
    with pytest.raises(redis.ConnectionError):
        behind_proxy.retry("w", leases, alone=True, **why)
    assert behind_proxy.retry("w", leases, alone=True, **why) == (0, 0)
    assert queue.client.zcard(queue.keys.suspects) == 2
    for i in range(2):
        history = queue.client.hget(queue.keys.job(f"job-{i}"), "history")
        assert len(history.splitlines()) == 1
