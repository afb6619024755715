"""Real worker processes, a real server, a tiny real model with real adapters."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import pytest

from benchmarks.waiting import PATIENCE, wait_until
from producer.client import Client
from schemas.result import Result
from tests.end_to_end.at_work import wait_for_workers, wait_until_running
from tests.end_to_end.conftest import StartWorker, running_workers
from tests.tiny_models import Oracle, make_adapter

ADAPTERS = ("red", "blue")


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_adapter(model_folder, tmp_path_factory.mktemp(name), rank=4 + seed, seed=seed)
        for seed, name in enumerate(ADAPTERS)
    }


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


@pytest.fixture
def start_worker(
    redis_url: str,
    queue_name: str,
    model_folder: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
) -> Iterator[StartWorker]:
    """Starts workers, with more flags if wanted; ends those that still run after the test."""
    loras = [f"{name}={path}" for name, path in adapters.items()]
    place = ("--redis-url", redis_url, "--queue", queue_name)
    with running_workers(model_folder, tmp_path) as start:
        yield partial(start, "--lora-paths", *loras, *place)


def prompt(number: int) -> tuple[int, ...]:
    """Of a job: one of four, for PEFT takes seconds to answer."""
    return (number % 4, 7, 3)


def lines(count: int, *, max_tokens: int = 12) -> list[dict[str, object]]:
    loras = (None, *ADAPTERS)
    return [
        {
            "id": f"job-{i}",
            "prompt_token_ids": list(prompt(i)),
            "lora": loras[i % 3],
            "max_tokens": max_tokens,
            "metadata": {"line": i},
        }
        for i in range(count)
    ]


def wait_for_a_result(client: Client, submission: str, worker: str | None = None) -> None:
    """Return when a worker, or the one of that id, has finished a job."""
    for result in client.follow(submission):
        if worker in (None, result.worker):
            return


def assert_correct(
    results: list[Result], model_folder: Path, adapters: dict[str, Path], max_tokens: int
) -> None:
    """Every answer is the one that PEFT gives."""
    oracle = Oracle(model_folder, adapters)
    expected = cache(lambda prompt, lora: oracle.generate(prompt, lora, max_tokens))
    assert [result.status for result in results] == ["done"] * len(results)
    for number, result in enumerate(results):
        assert result.token_ids == expected(prompt(number), result.lora), result.id


def test_a_burst_worker_answers_every_job_and_ends(
    client: Client, start_worker: StartWorker, model_folder: Path, adapters: dict[str, Path]
) -> None:
    submission = client.submit(lines(30))
    worker = start_worker("--burst")
    worker.join(PATIENCE)
    assert worker.exitcode == 0
    results = list(client.results(submission))
    assert_correct(results, model_folder, adapters, 12)
    assert [result.metadata for result in results] == [{"line": i} for i in range(30)]
    assert {(r.lora is None, r.revision is None) for r in results} == {(True, True), (False, False)}
    for result in results:
        times = result.timings
        assert times.queued <= times.started <= times.first_token <= times.finished  # type: ignore[operator]
        assert result.usage.completion_tokens == 12
        assert result.usage.prompt_tokens == 3


def test_killing_a_worker_loses_no_job(
    client: Client, start_worker: StartWorker, model_folder: Path, adapters: dict[str, Path]
) -> None:
    # What ran in the killed one runs alone then, job by job: few, so that it takes no minute.
    flags = ("--lease-seconds", "2", "--max-running-requests", "4")
    victim = start_worker(*flags)
    (victim_id,) = wait_for_workers(client, 1)
    start_worker(*flags)
    wait_for_workers(client, 2)
    submission = client.submit(lines(40, max_tokens=40))
    wait_for_a_result(client, submission, victim_id)
    victim.kill()
    status = client.wait(submission, timeout=PATIENCE)
    assert status.counts["done"] == 40  # type: ignore[union-attr]
    results = list(client.results(submission))
    assert len({result.id for result in results}) == 40
    assert {result.worker for result in results} > {victim_id}
    assert_correct(results, model_folder, adapters, 40)
    queue = client._job_queue
    left = {name.rpartition("}:")[2] for name in queue.client.scan_iter(queue.keys.prefix + "*")}
    assert not {name for name in left if name.startswith(("stream:", "ready", "leases"))}


def test_a_seeded_job_draws_the_same_tokens_after_its_worker_was_killed(
    client: Client, start_worker: StartWorker
) -> None:
    def drawing(prefix: str) -> list[dict[str, object]]:
        """Jobs of the same content, called otherwise."""
        fields = {"temperature": 1.2, "presence_penalty": 0.5, "min_p": 0.02, "n": 2}
        return [
            {**line, **fields, "id": f"{prefix}-{i}", "seed": i}
            for i, line in enumerate(lines(4, max_tokens=200))
        ]

    flags = ("--lease-seconds", "1", "--max-running-requests", "4")
    victim = start_worker(*flags)
    wait_for_workers(client, 1)
    interrupted = client.submit(drawing("interrupted"))
    wait_until_running(client, interrupted)
    victim.kill()
    start_worker(*flags)
    client.wait(interrupted, timeout=200)
    assert any(client.attempts(f"interrupted-{i}") for i in range(4)), "none was run twice"
    calm = client.submit(drawing("calm"))
    client.wait(calm, timeout=200)
    once, twice = (
        [[choice.token_ids for choice in result.choices or []] for result in client.results(each)]
        for each in (calm, interrupted)
    )
    assert once == twice
    assert len({tuple(ids) for answers in once for ids in answers}) == 8


def test_sigterm_ends_a_worker_in_order_and_the_rest_of_the_work_goes_on_elsewhere(
    client: Client, start_worker: StartWorker
) -> None:
    first = start_worker("--max-running-requests", "4")
    wait_for_workers(client, 1)
    submission = client.submit(lines(60, max_tokens=40))
    wait_for_a_result(client, submission)
    first.terminate()
    first.join(PATIENCE)
    assert first.exitcode == 0
    counts = client.status(submission).counts  # type: ignore[union-attr]
    assert counts["running"] == 0
    assert counts["done"] + counts["waiting"] == 60
    assert counts["waiting"] > 0
    start_worker("--burst")
    assert client.wait(submission, timeout=PATIENCE).counts["done"] == 60  # type: ignore[union-attr]


def test_a_second_sigterm_hands_everything_back_at_once(
    client: Client, start_worker: StartWorker
) -> None:
    worker = start_worker("--max-running-requests", "2")
    wait_for_workers(client, 1)
    submission = client.submit(lines(6, max_tokens=500))
    wait_until_running(client, submission)
    worker.terminate()
    time.sleep(0.2)
    worker.terminate()
    worker.join(PATIENCE)
    assert worker.exitcode == 0
    assert client.status(submission).counts["running"] == 0  # type: ignore[union-attr]


def test_a_bad_job_fails_with_its_reason_and_no_other(
    client: Client, start_worker: StartWorker
) -> None:
    submission = client.submit(
        [
            {"prompt_token_ids": [1, 2], "max_tokens": 3},
            {"prompt": "text for a model without a tokenizer"},
            {"prompt_token_ids": [1, 2000], "max_tokens": 3},
            {"prompt_token_ids": [1] * 600, "max_tokens": 3},
            {"prompt_token_ids": [1], "lora": "nobody", "max_tokens": 3, "metadata": [1]},
            {"prompt_token_ids": [1, 2], "max_tokens": 3},
        ]
    )
    worker = start_worker("--burst")
    worker.join(PATIENCE)
    assert worker.exitcode == 0
    results = list(client.results(submission))
    assert [result.error.code if result.error else result.status for result in results] == [
        *("done", "no_tokenizer", "bad_prompt"),
        *("prompt_too_long", "unknown_adapter", "done"),
    ]
    assert results[4].metadata == [1]


def test_a_batch_holds_no_more_adapters_than_allowed(
    client: Client, start_worker: StartWorker
) -> None:
    start_worker("--max-loras-per-batch", "1", "--lora-target-modules", "all")
    submission = client.submit(lines(30))
    client.wait(submission, timeout=PATIENCE)
    wait_until(lambda: client.overview().workers[0].output_tokens == 360)
    assert client.overview().workers[0].max_adapters_in_batch == 1


def test_logs_are_json_and_hold_no_prompt(
    client: Client, start_worker: StartWorker, tmp_path: Path
) -> None:
    client.submit([{"prompt": "a secret recipe"}, {"prompt_token_ids": [1, 2], "max_tokens": 3}])
    worker = start_worker("--burst")
    worker.join(PATIENCE)
    assert worker.exitcode == 0
    log = (tmp_path / "worker-0.log").read_text()
    events = [json.loads(line)["event"] for line in log.splitlines()]
    started = [event for event in events if event not in ("adapter_read", "weights_read")]
    assert started[:5] == [
        *("queue_server", "engine_ready", "adapter_announced", "adapter_announced"),
        "worker_ready",
    ]
    assert "secret" not in log
