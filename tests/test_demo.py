"""The demo where the machine does not keep up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from broker.job_queue import JobQueue
from examples import demo
from producer.client import Client
from schemas.worker_state import WorkerState


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "COUNTERS_TIMEOUT", 0.0)


def test_a_worker_that_does_not_report_is_told_in_a_sentence(client: Client) -> None:
    with pytest.raises(demo.DemoError, match="does not report any more"):
        demo.final_state(client, output_tokens=10)


def test_counters_that_stay_behind_are_taken_as_they_are(client: Client, queue: JobQueue) -> None:
    state = WorkerState(
        id="worker-1",
        model="tiny-llama",
        device="cpu",
        started=0,
        adapters={},
        max_loras_per_batch=4,
        output_tokens=9,
    )
    queue.heartbeat(state, alive_seconds=60)
    assert demo.final_state(client, output_tokens=10) == state
