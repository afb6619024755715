"""Adapters loaded, replaced, pinned and unloaded while two real workers run on a real server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from producer.adapters import Answer, Change
from producer.client import Client
from schemas.errors import BadInput, UnknownId
from tests.end_to_end.test_workers import wait_for_workers
from tests.tiny_models import ALL_MODULES, Oracle, OracleOfEach, make_adapter, make_llama

#: Rank and modules of each adapter: those of the page that describes SGLang's LoRA serving.
ADAPTERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "lora0": (4, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj")),
    "lora0-again": (256, ALL_MODULES),
    "lora1": (64, ALL_MODULES),
    "lora2": (3, ("v_proj", "down_proj")),
}
PROMPT = [5, 6, 7]
NUM_TOKENS = 12

StartWorker = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), hidden_size=192, intermediate_size=512)


@pytest.fixture(scope="module")
def root(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the adapters."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, (rank, modules)) in enumerate(ADAPTERS.items()):
        make_adapter(model_folder, root / name, rank=rank, seed=seed, target_modules=modules)
    return root


@pytest.fixture(scope="module")
def oracle(model_folder: Path, root: Path) -> Oracle:
    return Oracle(model_folder, {name: root / name for name in ADAPTERS})


@pytest.fixture(scope="module")
def start_worker(
    redis_url: str, model_folder: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartWorker]:
    """Starts workers of a queue, without adapters; ends those that still run after the tests."""
    processes = []
    logs = tmp_path_factory.mktemp("logs")

    def start(queue: str) -> subprocess.Popen[bytes]:
        with (logs / f"worker-{len(processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "worker.cli", "--model-path", str(model_folder)),
                    *("--enable-lora", "--max-lora-rank", "256", "--lora-target-modules", "all"),
                    *("--lora-root", str(root), "--max-loras-per-batch", "3"),
                    *("--redis-url", redis_url, "--queue", queue, "--lease-seconds", "2"),
                    *("--device", "cpu", "--max-total-tokens", "8192"),
                ],
                stderr=log,
            )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="module")
def two_workers(redis_url: str, start_worker: StartWorker) -> Iterator[Client]:
    """The client of a queue with two workers."""
    for _ in range(2):
        start_worker("two-workers")
    with Client(redis_url, "two-workers") as client:
        wait_for_workers(client, 2)
        yield client


@pytest.fixture
def client(two_workers: Client) -> Iterator[Client]:
    """Of that queue, which knows no adapter before and after the test."""
    yield two_workers
    for adapter in two_workers.adapters():
        two_workers.answers(two_workers.unload_adapter(adapter.name, force=True))


def answers(client: Client, change: Change, *, workers: int = 2) -> list[Answer]:
    found = client.answers(change, timeout=60)
    assert len(found) == workers
    return found


def succeed(client: Client, change: Change, *, workers: int = 2) -> dict[str, str]:
    """The adapters that all workers have after a command."""
    found = answers(client, change, workers=workers)
    assert [answer.error_message for answer in found] == [None] * workers
    assert all(answer.success for answer in found)
    loaded = [answer.loaded_adapters for answer in found]
    assert all(adapters == loaded[0] for adapters in loaded)
    return loaded[0]


def job(lora: str | None, max_tokens: int = NUM_TOKENS) -> dict[str, object]:
    return {"prompt_token_ids": PROMPT, "lora": lora, "max_tokens": max_tokens}


def assert_answers(client: Client, oracle: Oracle, expected: dict[str | None, str | None]) -> None:
    """Jobs of each name, in one submission, are answered as the oracle's adapter answers."""
    submission = client.submit([job(name) for name in expected for _ in range(3)])
    client.wait(submission, timeout=120)
    for result in client.results(submission):
        assert result.status == "done", result.error
        tokens = oracle.generate(PROMPT, expected[result.lora], NUM_TOKENS)
        assert result.token_ids == tokens, result.lora
        assert (result.revision is None) == (result.lora is None)


def test_adapters_come_change_and_go_while_jobs_run(
    client: Client, root: Path, oracle: Oracle
) -> None:
    assert_answers(client, oracle, {None: None})
    succeed(client, client.load_adapter("lora0", root / "lora0"))
    loaded = succeed(client, client.load_adapter("lora1", root / "lora1"))
    assert set(loaded) == {"lora0", "lora1"}
    assert_answers(client, oracle, {None: None, "lora0": "lora0", "lora1": "lora1"})

    assert set(succeed(client, client.unload_adapter("lora0"))) == {"lora1"}
    with pytest.raises(BadInput, match="unknown adapter 'lora0'"):
        client.submit([job("lora0")])
    again = succeed(client, client.load_adapter("lora0", root / "lora0-again"))
    assert again["lora0"] != loaded["lora0"]
    assert_answers(client, oracle, {None: None, "lora0": "lora0-again", "lora1": "lora1"})

    succeed(client, client.pin_adapter("lora1"))
    succeed(client, client.load_adapter("lora2", root / "lora2"))
    names: dict[str | None, str | None] = {
        "lora0": "lora0-again",
        "lora1": "lora1",
        "lora2": "lora2",
    }
    assert_answers(client, oracle, {None: None, **names})
    (status,) = [adapter for adapter in client.adapters() if adapter.name == "lora1"]
    assert status.pinned
    assert status.num_resident == 2
    assert status.num_loaded == 2


def test_a_replacement_lets_running_jobs_end_on_the_weights_they_began_with(
    client: Client, root: Path, oracle: Oracle
) -> None:
    succeed(client, client.load_adapter("lora0", root / "lora0"))
    before = client.submit([job("lora0", 400) for _ in range(8)])
    deadline = time.monotonic() + 60
    while not client.status(before).counts["running"]:  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    succeed(client, client.load_adapter("lora0", root / "lora1"))
    assert client.status(before).counts["done"] < 8  # type: ignore[union-attr]
    assert_answers(client, oracle, {"lora0": "lora1"})
    client.wait(before, timeout=120)
    revisions = set()
    for result in client.results(before):
        old, new = (oracle.generate(PROMPT, name, 400) for name in ("lora0", "lora1"))
        assert result.token_ids in (old, new)
        revisions.add((result.revision, result.token_ids == old))
    # No result of one revision has tokens of the other, nor a mixture.
    assert len({revision for revision, _ in revisions}) == len(revisions)
    assert any(is_old for _, is_old in revisions)


def test_an_adapter_with_dora_and_a_head_of_its_own_replaces_a_plain_one_by_command(
    client: Client, root: Path, model_folder: Path
) -> None:
    settings = {"use_dora": True, "modules_to_save": ["lm_head"]}
    modules = ["q_proj", "down_proj", "embed_tokens"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it saves embeddings along.
        make_adapter(
            model_folder, root / "whole", rank=6, seed=9, target_modules=modules, **settings
        )
    folders = {name: root / name for name in ("whole", "lora1", "lora2")}
    oracle = OracleOfEach(model_folder, folders)
    for name in ("lora1", "lora2"):
        succeed(client, client.load_adapter(name, root / name))
    assert_answers(client, oracle, {None: None, "lora1": "lora1", "lora2": "lora2"})
    succeed(client, client.load_adapter("lora1", root / "whole"))
    assert_answers(client, oracle, {None: None, "lora1": "whole", "lora2": "lora2"})
    succeed(client, client.load_adapter("lora1", root / "lora1"))
    assert_answers(client, oracle, {None: None, "lora1": "lora1", "lora2": "lora2"})


def test_a_folder_that_cannot_be_served_is_refused_by_each_worker_with_the_reason(
    client: Client, root: Path, oracle: Oracle, tmp_path: Path
) -> None:
    succeed(client, client.load_adapter("lora2", root / "lora2"))
    for folder, reason in ((tmp_path, "is not below --lora-root"), (root, "is no PEFT adapter")):
        found = answers(client, client.load_adapter("bad", folder))
        assert not any(answer.success for answer in found)
        assert all(reason in (answer.error_message or "") for answer in found)
        assert all(set(answer.loaded_adapters) == {"lora2"} for answer in found)
    assert_answers(client, oracle, {None: None, "lora2": "lora2"})


def test_pins_beyond_the_limit_and_unknown_names_are_refused_at_once(
    client: Client, root: Path
) -> None:
    for name in ("lora0", "lora1"):
        succeed(client, client.load_adapter(name, root / name, pinned=True))
    succeed(client, client.load_adapter("lora2", root / "lora2"))
    with pytest.raises(BadInput, match="2"):
        client.pin_adapter("lora2")
    succeed(client, client.unpin_adapter("lora0"))
    succeed(client, client.pin_adapter("lora2"))
    succeed(client, client.pin_adapter("lora2"))
    with pytest.raises(UnknownId, match="lora9"):
        client.unload_adapter("lora9")


def test_unload_finishes_what_waits_or_by_force_fails_it(client: Client, root: Path) -> None:
    succeed(client, client.load_adapter("lora1", root / "lora1"))
    drained = client.submit([job("lora1", 20) for _ in range(150)])
    assert succeed(client, client.unload_adapter("lora1")) == {}
    assert client.status(drained).counts["done"] == 150  # type: ignore[union-attr]

    succeed(client, client.load_adapter("lora1", root / "lora1"))
    forced = client.submit([job("lora1", 100) for _ in range(300)])
    assert succeed(client, client.unload_adapter("lora1", force=True)) == {}
    counts = client.wait(forced, timeout=60).counts  # type: ignore[union-attr]
    assert counts["done"] + counts["failed"] == 300
    assert counts["failed"] > 0
    codes = {result.error.code for result in client.results(forced) if result.error}
    assert codes == {"adapter_unloaded"}


def test_a_worker_that_was_down_has_the_same_adapters_once_it_is_back(
    redis_url: str, queue_name: str, start_worker: StartWorker, root: Path, oracle: Oracle
) -> None:
    with Client(redis_url, queue_name) as client:
        _down_and_back(client, lambda: start_worker(queue_name), root, oracle)


def _down_and_back(
    client: Client, start: Callable[[], subprocess.Popen[bytes]], root: Path, oracle: Oracle
) -> None:
    first = start()
    wait_for_workers(client, 1)
    succeed(client, client.load_adapter("lora0", root / "lora0"), workers=1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    change = client.load_adapter("lora1", root / "lora1")
    client.unload_adapter("lora0")
    start()
    start()
    deadline = time.monotonic() + 60
    while len(client.overview().workers) != 2:  # The killed one is forgotten after 10 seconds.
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert set(succeed(client, change)) == {"lora1"}
    assert_answers(client, oracle, {None: None, "lora1": "lora1"})
