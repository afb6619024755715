"""Workers that stop for longer than their leases, and come back."""

from __future__ import annotations

import os
import signal
import time

from benchmarks.waiting import PATIENCE, wait_until
from broker.job_queue import JobQueue
from producer.client import Client
from tests.end_to_end.at_work import wait_for_workers, wait_until_running
from tests.end_to_end.conftest import StartMortal


def test_a_worker_that_wakes_after_its_leases_have_expired_changes_nothing_on_record(
    redis_url: str, queue_name: str, queue: JobQueue, start_mortal: StartMortal
) -> None:
    with Client(redis_url, queue_name) as client:
        stopped = start_mortal()
        (stopped_id,) = wait_for_workers(client, 1)
        submission = client.submit(
            [{"id": f"job-{i}", "prompt": "x", "max_tokens": 100} for i in range(6)]
        )
        wait_until_running(client, submission)
        os.kill(stopped.pid, signal.SIGSTOP)
        start_mortal()

        def is_taken_over() -> bool:
            workers = {result.worker for result in client.results(submission)}
            return bool(workers - {stopped_id, None})

        wait_until(is_taken_over)
        os.kill(stopped.pid, signal.SIGCONT)
        status = client.wait(submission, timeout=PATIENCE)
        time.sleep(1)  # For what the woken worker still has to say.
        assert status.counts["done"] == 6  # type: ignore[union-attr]
        assert client.status(submission).sent == 6  # type: ignore[union-attr]
        finished = queue.client.xrange(queue.keys.submission_finished(submission))
        assert sorted(fields["id"] for _, fields in finished) == [f"job-{i}" for i in range(6)]
        attempts = {queue.client.hget(queue.keys.job(f"job-{i}"), "attempts") for i in range(6)}
        assert attempts == {"2"}
    left = {name.rpartition("}:")[2] for name in queue.client.scan_iter(queue.keys.prefix + "*")}
    assert not left & {"ready", "leases", "suspects", "delayed", "stream:@base"}
