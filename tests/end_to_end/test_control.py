"""Cancelling, pausing, deadlines and priorities with real worker processes on a tiny real model."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from benchmarks.waiting import PATIENCE, wait_until
from producer.client import Client
from tests.end_to_end.at_work import wait_for_workers, wait_until_running
from tests.end_to_end.conftest import StartWorker, running_workers
from tests.test_job_queue import keys_left


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


@pytest.fixture
def start_worker(
    redis_url: str, queue_name: str, model_folder: Path, tmp_path: Path
) -> Iterator[StartWorker]:
    """Starts workers of the base model that run four jobs at once."""
    flags = ("--redis-url", redis_url, "--queue", queue_name, "--max-running-requests", "4")
    with running_workers(model_folder, tmp_path) as start:
        yield partial(start, *flags)


def lines(count: int, *, max_tokens: int, **fields: object) -> list[dict[str, object]]:
    return [
        {"prompt_token_ids": [i, 7, 3], "max_tokens": max_tokens, **fields} for i in range(count)
    ]


def counts(client: Client, submission: str) -> dict[str, int]:
    found = client.status(submission).counts  # type: ignore[union-attr]
    return {state: number for state, number in found.items() if number}


def test_a_worker_whose_jobs_are_cancelled_goes_on_with_others(
    client: Client, start_worker: StartWorker
) -> None:
    start_worker()
    wait_for_workers(client, 1)
    submission = client.submit(lines(300, max_tokens=500, ignore_eos=True))
    wait_until_running(client, submission)
    cancelled = client.cancel(submission)
    assert cancelled.waiting > 0
    assert cancelled.running > 0
    ended = counts(client, submission)
    other = client.submit(lines(4, max_tokens=5))
    assert client.wait(other, timeout=PATIENCE).counts["done"] == 4  # type: ignore[union-attr]
    assert counts(client, submission) == ended
    assert set(ended) <= {"cancelled", "done"}
    wait_until(lambda: client.overview().workers[0].running == 0)
    assert keys_left(client._job_queue) == set()


def test_a_worker_that_stood_still_while_its_jobs_were_cancelled_records_nothing(
    client: Client, start_worker: StartWorker
) -> None:
    worker = start_worker("--lease-seconds", "60")
    wait_for_workers(client, 1)
    submission = client.submit(lines(4, max_tokens=400, ignore_eos=True))
    wait_until_running(client, submission)
    os.kill(worker.pid, signal.SIGSTOP)
    client.cancel(submission)
    ended = counts(client, submission)
    os.kill(worker.pid, signal.SIGCONT)
    other = client.submit(lines(4, max_tokens=5))
    client.wait(other, timeout=PATIENCE)
    assert counts(client, submission) == ended
    assert all(r.text is None for r in client.results(submission) if r.status == "cancelled")


def test_a_paused_queue_finishes_what_runs_and_goes_on_when_it_is_resumed(
    client: Client, start_worker: StartWorker
) -> None:
    start_worker()
    wait_for_workers(client, 1)
    submission = client.submit(lines(24, max_tokens=60, ignore_eos=True))
    wait_until_running(client, submission)
    client.pause()
    wait_until(lambda: counts(client, submission).get("running", 0) == 0)
    stands_at = counts(client, submission)
    assert stands_at["waiting"] > 0
    late = client.submit(lines(1, max_tokens=5, deadline=0.2))
    assert [result.status for result in client.follow(late)] == ["expired"]
    assert counts(client, submission) == stands_at
    client.resume()
    assert client.wait(submission, timeout=PATIENCE).counts["done"] == 24  # type: ignore[union-attr]


def test_a_small_urgent_submission_overtakes_a_large_one(
    client: Client, start_worker: StartWorker
) -> None:
    large = client.submit(lines(200, max_tokens=6, ignore_eos=True))
    small = client.submit(lines(5, max_tokens=6, priority="high"))
    worker = start_worker("--burst")
    worker.join(PATIENCE)
    assert worker.exitcode == 0
    ended = {r.id: r.timings.finished for r in client.results(large, small)}
    last_small = max(ended[r.id] or 0 for r in client.results(small))
    before = sum((ended[r.id] or 0) < last_small for r in client.results(large))
    assert len(ended) == 205
    # Beside five urgent jobs at most those of a first claim, 8, and a few turns by lot.
    assert before < 60
