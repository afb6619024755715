"""Workers whose server is away: at their start, and while they run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from threading import Timer

import pytest
from structlog.testing import capture_logs

from benchmarks.waiting import PATIENCE, wait_until
from producer.client import Client
from tests.end_to_end.conftest import StartWorker, running_workers
from tests.servers import ValkeyServer, free_port
from tests.tiny_models import make_llama
from worker.batch import Batch
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.worker import Worker

PASSWORD = "correct-horse"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start_worker(model_folder: Path, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts workers whose logs are ``worker-0.log`` and so on; ends those that still run."""
    with running_workers(model_folder, tmp_path) as start:
        yield start


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Of the first of them."""
    return tmp_path / "worker-0.log"


def test_a_worker_waits_for_its_server_and_keeps_the_password_to_itself(
    model_folder: Path, tmp_path: Path
) -> None:
    server = ValkeyServer(tmp_path / "server", "--requirepass", PASSWORD)
    server.stop()
    log, password_file = tmp_path / "worker.log", tmp_path / "password"
    password_file.write_text(PASSWORD)
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "worker.cli", "--model-path", str(model_folder)),
                *("--device", "cpu", "--max-total-tokens", "1024", "--redis-url", server.url),
                *("--redis-password-file", str(password_file)),
            ],
            stderr=stderr,
        )
    try:
        wait_until(lambda: "redis_away" in log.read_text(), "the worker did not wait")
        server.start()
        with Client(server.url, password_file=password_file) as client:
            submission = client.submit([{"prompt_token_ids": [1, 2], "max_tokens": 2}])
            assert client.wait(submission, timeout=PATIENCE).counts["done"] == 1  # type: ignore[union-attr]
        assert PASSWORD not in Path(f"/proc/{process.pid}/cmdline").read_text()
        server.stop()
        wait_until(lambda: log.read_text().count("redis_away") > 2, "the outage is not in the log")
        assert PASSWORD not in log.read_text()
    finally:
        process.kill()
        process.wait()
        server.stop()


def test_a_worker_that_waits_for_its_server_ends_when_asked_to(
    start_worker: StartWorker, log: Path
) -> None:
    process = start_worker("--redis-url", f"redis://127.0.0.1:{free_port()}")
    wait_until(lambda: log.exists() and "redis_away" in log.read_text(), "the worker did not wait")
    process.terminate()
    process.join(PATIENCE)
    assert process.exitcode == 0


def test_a_worker_does_not_wait_where_its_login_is_refused(
    start_worker: StartWorker, log: Path, tmp_path: Path
) -> None:
    server = ValkeyServer(tmp_path / "server", "--requirepass", PASSWORD)
    try:
        process = start_worker("--redis-url", server.url)
        process.join(PATIENCE)
        assert process.exitcode == 4
    finally:
        server.stop()
    assert "refused the login" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_worker_finishes_what_it_has_while_its_server_is_away_and_commits_it_later(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ValkeyServer(tmp_path / "server")
    away_while = 3 * 1.0  # Three lease times: renewing in time is out of the question.
    launch, num_calls = Engine.launch, count()
    comes_back = Timer(away_while, server.start)

    def launch_with_an_outage(engine: Engine, batch: Batch) -> None:
        if next(num_calls) == 3:
            server.stop()
            comes_back.start()
        launch(engine, batch)

    monkeypatch.setattr(Engine, "launch", launch_with_an_outage)
    config = WorkerConfig(
        model_path=model_folder, device="cpu", max_total_tokens=1024, lease_seconds=1, burst=True
    )
    jobs = [{"id": f"job-{i}", "prompt_token_ids": [1, 2], "max_tokens": 8} for i in range(4)]
    try:
        with Client(server.url) as client:
            client.submit(jobs)
            worker = Worker(config, Engine(config), server.url)
            with capture_logs() as logs:
                assert worker.run() == 0
            comes_back.join()
            with server.client() as other:
                # The producer's and this one are left.
                wait_until(lambda: len(other.client_list()) <= 2, "the worker is still connected")
            assert {entry["at"] for entry in logs if entry["event"] == "redis_away"} >= {
                *("publish", "keep", "follow"),
            }
            for result in client.results(*(str(job["id"]) for job in jobs)):
                assert result.status == "done"
            for job in jobs:
                key = worker._queue.keys.job(str(job["id"]))
                assert worker._queue.client.hget(key, "attempts") == "1"
    finally:
        comes_back.cancel()
        server.stop()


def test_a_worker_whose_server_leaves_while_it_joins_the_queue_joins_later(
    model_folder: Path, tmp_path: Path
) -> None:
    config = WorkerConfig(model_path=model_folder, device="cpu", max_total_tokens=1024, burst=True)
    server = ValkeyServer(tmp_path / "server")
    worker = Worker(config, Engine(config), server.url)
    server.stop()
    comes_back = Timer(0.5, server.start)
    comes_back.start()
    try:
        with capture_logs() as logs:
            assert worker.run() == 0
        assert ("redis_away", "join") in {(entry["event"], entry.get("at")) for entry in logs}
    finally:
        comes_back.join()
        server.stop()
