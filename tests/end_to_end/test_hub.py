"""Adapters loaded by their names on the hub: real server, real workers, real fetchers, and a hub on
this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.waiting import wait_until
from broker.embedded import EmbeddedServer
from broker.fetches import FetchStatus
from producer.adapters import Change
from producer.client import Client
from schemas.errors import LorryError
from tests.end_to_end.test_workers import wait_for_workers
from tests.fake_hub import FakeHub, run_fake_hub
from tests.tiny_models import Oracle, make_adapter, make_llama

pytestmark = pytest.mark.slow

PROMPT = [5, 6, 7]
NUM_TOKENS = 8

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(model_folder, root / name, rank=4, seed=seed)
        for seed, name in enumerate(("sql", "sql-v2", "chat"))
    }


@pytest.fixture(scope="module")
def oracle(model_folder: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(model_folder, adapters)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with run_fake_hub() as hub:
        yield hub


@pytest.fixture
def start(redis_url: str, hub: FakeHub, queue_name: str, tmp_path: Path) -> Iterator[Start]:
    """Starts ``worker`` or ``fetcher`` for the test's queue, hub and cache; ends what still runs
    after the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(
        module: str, *flags: object, url: str = redis_url, **environment: str
    ) -> subprocess.Popen[bytes]:
        place = ("--redis-url", url, "--queue", queue_name)
        with (tmp_path / f"{len(processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, flags), *place],
                stderr=log,
                env={
                    **os.environ,
                    "HF_HOME": str(tmp_path / "hf"),
                    "HF_ENDPOINT": hub.url,
                    **environment,
                },
            )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


@pytest.fixture
def start_worker(start: Start, model_folder: Path) -> Start:
    def start_worker(*flags: object, **environment: str) -> subprocess.Popen[bytes]:
        limits = ("--max-lora-rank", 8, "--lora-target-modules", "all")
        size = ("--device", "cpu", "--max-total-tokens", 4096, "--max-loras-per-batch", 2)
        return start(
            "worker.cli", "--model-path", model_folder, *limits, *size, *flags, **environment
        )

    return start_worker


@pytest.fixture
def start_fetcher(start: Start, model_folder: Path) -> Start:
    return lambda *owners: start(
        "worker.hub.cli", "--model-path", model_folder, "--hub-owners", *owners
    )


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


def eventually(is_so: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.05)


def loads(client: Client, change: Change) -> dict[str, str]:
    """The adapters of the one worker once it has loaded this one."""
    eventually(client.has_fetcher)
    (answer,) = client.answers(change)
    assert (answer.success, answer.error_message) == (True, None)
    return answer.loaded_adapters


def answer(client: Client, lora: str) -> tuple[list[int] | None, str | None]:
    """What a job is answered, and by which revision."""
    job = {"prompt_token_ids": PROMPT, "lora": lora, "max_tokens": NUM_TOKENS}
    (result,) = client.follow(client.submit([job]))
    assert result.error is None
    return result.token_ids, result.revision


def source_of(client: Client, name: str) -> str:
    return next(adapter.source for adapter in client.adapters() if adapter.name == name)


def test_jobs_are_answered_by_an_adapter_that_was_loaded_by_its_name_on_the_hub(
    client: Client,
    hub: FakeHub,
    start_worker: Start,
    start_fetcher: Start,
    adapters: dict[str, Path],
    oracle: Oracle,
) -> None:
    """Told before anybody runs; then replaced by another revision; then evicted from memory."""
    first = hub.push("acme/sql", adapters["sql"], "v1")
    second = hub.push("acme/sql", adapters["sql-v2"])
    hub.push("acme/chat", adapters["chat"])
    change = client.load_adapter("sql", "acme/sql@v1")
    start_worker("--hub-owners", "acme", "--max-loaded-loras", 2)
    start_fetcher("acme")
    wait_for_workers(client, 1)

    assert list(loads(client, change)) == ["sql"]
    assert source_of(client, "sql") == f"hf:acme/sql@{first}"
    tokens, first_revision = answer(client, "sql")
    assert tokens == oracle.generate(PROMPT, "sql", NUM_TOKENS)

    loads(client, client.load_adapter("sql", "acme/sql"))
    assert source_of(client, "sql") == f"hf:acme/sql@{second}"
    tokens, second_revision = answer(client, "sql")
    assert tokens == oracle.generate(PROMPT, "sql-v2", NUM_TOKENS)
    assert second_revision != first_revision

    # Two more than host memory holds besides: what left comes back from the cache as it was.
    loads(client, client.load_adapter("chat", "acme/chat"))
    loads(client, client.load_adapter("old", f"acme/sql@{first}"))
    hub.repositories.clear()
    for name, twin in (("chat", "chat"), ("old", "sql"), ("sql", "sql-v2")):
        assert answer(client, name)[0] == oracle.generate(PROMPT, twin, NUM_TOKENS)
    assert answer(client, "sql")[1] == second_revision
    # What is only checked when it is loaded evicts another when it is read, and the next heartbeat
    # tells of that.
    wait_until(lambda: sum(adapter.evictions for adapter in client.adapters()) > 0)


def test_a_worker_with_a_fetcher_is_enough_for_one_machine(
    client: Client,
    hub: FakeHub,
    start_worker: Start,
    adapters: dict[str, Path],
    oracle: Oracle,
) -> None:
    hub.push("acme/sql", adapters["sql"])
    worker = start_worker("--hub-owners", "acme", "--with-fetcher")
    wait_for_workers(client, 1)
    loads(client, client.load_adapter("sql", "acme/sql"))
    assert answer(client, "sql")[0] == oracle.generate(PROMPT, "sql", NUM_TOKENS)
    worker.kill()  # Its fetcher must not stay behind.
    eventually(lambda: not client.has_fetcher())


def test_an_operator_names_repositories_at_the_start(
    client: Client,
    hub: FakeHub,
    start_worker: Start,
    adapters: dict[str, Path],
    oracle: Oracle,
) -> None:
    """Without a list of owners; and again offline, when the cache has to do."""
    first = hub.push("acme/sql", adapters["sql"], "v1")
    hub.push("acme/sql", adapters["sql-v2"])
    hub.push("acme/chat", adapters["chat"])
    paths = (
        "--lora-paths",
        "old=acme/sql@v1",
        "acme/sql",
        '{"lora_name":"c","lora_path":"acme/chat"}',
    )
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        hub.requests.clear()
        worker = start_worker(*paths, **environment)
        wait_for_workers(client, 1)
        assert source_of(client, "old") == f"hf:acme/sql@{first}"
        for name, twin in (("old", "sql"), ("sql", "sql-v2"), ("c", "chat")):
            assert answer(client, name)[0] == oracle.generate(PROMPT, twin, NUM_TOKENS)
        assert bool(hub.requests) == (not environment)
        worker.terminate()
        assert worker.wait(30) == 0


def test_a_fetch_whose_fetcher_was_killed_is_begun_anew(
    client: Client,
    hub: FakeHub,
    start_worker: Start,
    start_fetcher: Start,
    adapters: dict[str, Path],
) -> None:
    hub.push("acme/sql", adapters["sql"])
    hub.may_go_on.clear()
    start_worker("--hub-owners", "acme")
    killed = start_fetcher("acme")
    change = client.load_adapter("sql", "acme/sql")
    assert hub.is_waiting.wait(60)
    killed.kill()
    killed.wait()
    hub.may_go_on.set()
    start_fetcher("acme")
    wait_for_workers(client, 1)
    assert list(loads(client, change)) == ["sql"]


def test_a_server_that_is_killed_while_a_fetch_runs_does_not_stop_it(
    hub: FakeHub,
    start: Start,
    model_folder: Path,
    adapters: dict[str, Path],
    queue_name: str,
    tmp_path: Path,
) -> None:
    """The download ends while there is no server; what it brought is desired once there is one."""
    hub.push("acme/sql", adapters["sql"])
    hub.may_go_on.clear()
    folder = Path(tempfile.mkdtemp(prefix="lorry-"))  # A socket's path must be short.
    first = EmbeddedServer(folder)
    flags = ("--model-path", model_folder, "--hub-owners", "acme")
    fetcher = start("worker.hub.cli", *flags, url=first.url)
    with Client(first.url, queue_name) as client:
        client.load_adapter("sql", "acme/sql")
    assert hub.is_waiting.wait(60)
    os.kill(int((folder / "valkey.pid").read_text()), signal.SIGKILL)
    assert first._process
    first._process.wait()
    hub.may_go_on.set()
    eventually(lambda: b"redis_away" in (tmp_path / "0.log").read_bytes())
    with EmbeddedServer(folder), Client(first.url, queue_name) as client:
        eventually(lambda: source_of(client, "sql").startswith("hf:acme/sql@"))
        assert hub.downloads().count("adapter_model.safetensors") == 1
        fetcher.terminate()
        assert fetcher.wait(30) == 0
        first.close()
    shutil.rmtree(folder)


def test_a_fetcher_that_is_asked_to_end_breaks_off_and_hands_its_fetch_back(
    client: Client, hub: FakeHub, start_fetcher: Start, adapters: dict[str, Path]
) -> None:
    hub.push("acme/sql", adapters["sql"])
    hub.may_go_on.clear()
    asked = start_fetcher("acme")
    client.load_adapter("sql", "acme/sql")
    assert hub.is_waiting.wait(60)
    asked.send_signal(signal.SIGTERM)
    # What is on its way is read to its end first: the signal is looked at between two chunks.
    hub.may_go_on.set()
    assert asked.wait(30) == 0
    (adapter,) = client.adapters()
    fetch: FetchStatus | None = adapter.fetch
    assert fetch
    assert (fetch.state, fetch.attempt) == ("retrying", 1)
    assert fetch.reason == "its fetcher was stopped"


def test_what_a_worker_or_a_fetcher_was_not_allowed_is_refused_by_each(
    client: Client,
    hub: FakeHub,
    start_worker: Start,
    start_fetcher: Start,
    adapters: dict[str, Path],
) -> None:
    hub.push("acme/sql", adapters["sql"])
    hub.push("evil/sql", adapters["sql"])
    start_worker("--hub-owners", "other")
    start_fetcher("acme")
    wait_for_workers(client, 1)
    eventually(client.has_fetcher)
    (refused,) = client.answers(client.load_adapter("sql", "acme/sql"))
    assert refused.error_message
    assert "acme is not among the worker's --hub-owners (other)" in refused.error_message
    with pytest.raises(LorryError, match="evil is not among the owners that the fetcher's"):
        client.answers(client.load_adapter("evil", "evil/sql"))
    assert not any("evil" in line for line in hub.requests)
