"""Prompts that kill the process that runs them."""

from __future__ import annotations

import json
import time

import pytest

from benchmarks.waiting import PATIENCE
from broker.job_queue import JobQueue
from producer.client import Client
from tests.end_to_end.conftest import StartMortal


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_prompt_that_kills_its_process_is_given_up_alone_and_its_neighbours_are_answered(
    redis_url: str,
    queue_name: str,
    queue: JobQueue,
    start_mortal: StartMortal,
    num_workers: int,
) -> None:
    prompts = [f"prompt {i}" for i in range(30)] + ["poison"] + [f"more {i}" for i in range(30)]
    with Client(redis_url, queue_name) as client:
        submission = client.submit(
            [{"id": p.replace(" ", "-"), "prompt": p, "max_tokens": 5} for p in prompts]
        )
        workers = [start_mortal() for _ in range(num_workers)]
        deadline, num_deaths = time.monotonic() + PATIENCE, 0
        while not client.status(submission).is_complete:  # type: ignore[union-attr]
            assert time.monotonic() < deadline, client.status(submission)
            for number, worker in enumerate(workers):
                if not worker.is_alive():
                    num_deaths += 1
                    workers[number] = start_mortal()
            time.sleep(0.05)
        counts = client.status(submission).counts  # type: ignore[union-attr]
    assert counts["done"] == 60
    assert counts["dead"] == 1
    # It ran once in company, and twice alone.
    lines = queue.client.hget(queue.keys.job("poison"), "history").splitlines()
    outcomes = [json.loads(line)["outcome"] for line in lines]
    assert outcomes == ["lease_expired"] * 3
    assert num_deaths <= 3  # The last death may not have been seen yet.
    attempts = {
        p: queue.client.hget(queue.keys.job(p.replace(" ", "-")), "attempts") for p in prompts
    }
    assert attempts.pop("poison") == "3"
    assert set(attempts.values()) <= {"1", "2"}
