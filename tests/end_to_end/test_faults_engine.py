"""Faults again, with the real engine on a CPU: what is answered in the end is what PEFT answers."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from benchmarks.ledger import Ledger
from benchmarks.own_server import OwnServer
from benchmarks.tcp_proxy import TcpProxy
from benchmarks.waiting import PATIENCE, wait_until
from broker.connection import connect
from producer.client import Client
from tests.end_to_end.at_work import (
    NUM_TOKENS,
    PROMPT,
    expected_tokens,
    wait_for_workers,
    wait_until_running,
)
from tests.end_to_end.conftest import StartWorker, bare_flags, running_workers
from tests.tiny_models import Oracle

pytestmark = pytest.mark.slow

#: Adapter of each third of the jobs.
LORAS = (None, "lora1", "lora2")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnServer]:
    with OwnServer(tmp_path / "server") as server:
        yield server


@pytest.fixture
def proxy(server: OwnServer) -> Iterator[TcpProxy]:
    with TcpProxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def client(server: OwnServer) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def start(model_folder: Path, root: Path, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts workers with two adapters; the server is named by a flag."""
    loras = [f"{name}={root / name}" for name in LORAS if name]
    with running_workers(model_folder, tmp_path) as start:
        yield partial(start, *bare_flags(root), "--lora-paths", *loras)


def jobs(count: int, *, max_tokens: int = NUM_TOKENS) -> list[dict[str, object]]:
    return [
        {
            "id": f"job-{max_tokens}-{i}",
            "prompt_token_ids": list(PROMPT),
            "lora": LORAS[i % 3],
            "max_tokens": max_tokens,
        }
        for i in range(count)
    ]


def finish(client: Client, ledger: Ledger, url: str, oracle: Oracle) -> None:
    """All jobs are answered, once, as PEFT answers them, and nothing is left."""
    for submission in ledger.acknowledged:
        client.wait(submission, timeout=PATIENCE)
        for result in client.results(submission):
            assert result.status == "done", result.error
            num_tokens = int(result.id.split("-")[1])
            assert result.token_ids == expected_tokens(oracle, result.lora, num_tokens)
    with connect(url) as connection:
        assert ledger.check_at_rest(connection, "lorry", timeout=PATIENCE) == []


def test_lost_replies_and_broken_connections_change_no_answer(
    client: Client,
    server: OwnServer,
    proxy: TcpProxy,
    ledger: Ledger,
    start: StartWorker,
    oracle: Oracle,
) -> None:
    start("--redis-url", proxy.url, "--max-running-requests", "8")
    wait_for_workers(client, 1)
    for command in ("claim", "commit", "renew"):
        proxy.lose_replies(command, times=2)
    ledger.submit(client, jobs(60))
    wait_until(lambda: proxy.commands["commit"] > 10, "no results came")
    proxy.reset()
    finish(client, ledger, server.url, oracle)


def test_a_worker_stopped_in_its_batch_for_longer_than_its_lease_changes_no_answer(
    client: Client, server: OwnServer, ledger: Ledger, start: StartWorker, oracle: Oracle
) -> None:
    sleeper = start("--redis-url", server.url, "--max-running-requests", "8")
    wait_for_workers(client, 1)
    submission = ledger.submit(client, jobs(30, max_tokens=200))
    assert submission
    wait_until_running(client, submission)
    os.kill(sleeper.pid, signal.SIGSTOP)
    start("--redis-url", server.url, "--max-running-requests", "8")
    client.wait(submission, timeout=PATIENCE)
    ledger.note(client.results(submission))
    os.kill(sleeper.pid, signal.SIGCONT)
    ledger.submit(client, jobs(30))
    finish(client, ledger, server.url, oracle)
    assert sleeper.is_alive()


def test_a_server_killed_in_the_middle_of_a_batch_changes_no_answer(
    client: Client, server: OwnServer, ledger: Ledger, start: StartWorker, oracle: Oracle
) -> None:
    worker = start("--redis-url", server.url, "--max-running-requests", "8")
    wait_for_workers(client, 1)
    submission = ledger.submit(client, jobs(30, max_tokens=100))
    assert submission
    wait_until(lambda: client.status(submission).counts["done"] > 0, "no results came")
    server.kill()
    server.start()
    finish(client, ledger, server.url, oracle)
    assert worker.is_alive()


def test_a_corrupt_adapter_is_refused_with_its_reason_and_the_others_go_on(
    client: Client,
    server: OwnServer,
    ledger: Ledger,
    start: StartWorker,
    oracle: Oracle,
    root: Path,
) -> None:
    corrupt = root / "corrupt"
    shutil.copytree(root / "lora1", corrupt)
    weights = corrupt / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    worker = start("--redis-url", server.url)
    wait_for_workers(client, 1)
    ledger.submit(client, jobs(30, max_tokens=100))
    (answer,) = client.answers(client.load_adapter("corrupt", corrupt))
    assert not answer.success
    assert "corrupt" in (answer.error_message or "")
    finish(client, ledger, server.url, oracle)
    assert worker.is_alive()
    shutil.rmtree(corrupt)
