"""Worker processes on a tiny real model, and two of them that have adapters loaded by command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from benchmarks.fault_bench import LEASE_SECONDS, FaultBench
from benchmarks.fork_server import ForkedProcesses
from benchmarks.null_worker import NullSettings
from benchmarks.own_server import OwnServer
from producer.client import Client
from tests.end_to_end.at_work import wait_for_workers
from tests.end_to_end.command_worker import run_command
from tests.end_to_end.mortal_worker import run_mortal
from tests.tiny_models import ALL_MODULES, Oracle, make_adapter, make_llama

#: Starts a worker with these flags.
StartWorker = Callable[..., ForkServerProcess]

#: Starts a worker that computes nothing.
StartMortal = Callable[[], ForkServerProcess]

#: Rank and modules of each adapter: those of the page that describes SGLang's LoRA serving.
ADAPTERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "lora0": (4, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj")),
    "lora0-again": (256, ALL_MODULES),
    "lora1": (64, ALL_MODULES),
    "lora2": (3, ("v_proj", "down_proj")),
}


@contextmanager
def running_workers(model_folder: Path, logs: Path) -> Iterator[StartWorker]:
    """Starts workers whose logs are ``worker-0.log`` and so on; ends those that still run."""
    with ForkedProcesses(logs) as processes:

        def start(*flags: str) -> ForkServerProcess:
            place = ("--model-path", str(model_folder), "--device", "cpu")
            return processes.fork(
                "worker", run_command, *place, "--max-total-tokens", "8192", *flags
            )

        yield start


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Larger than need be: a batch must take long enough to be interrupted.
    return make_llama(tmp_path_factory.mktemp("model"), hidden_size=192, intermediate_size=512)


@pytest.fixture(scope="session")
def root(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the adapters that commands load."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, (rank, modules)) in enumerate(ADAPTERS.items()):
        make_adapter(model_folder, root / name, rank=rank, seed=seed, target_modules=modules)
    return root


@pytest.fixture(scope="session")
def oracle(model_folder: Path, root: Path) -> Oracle:
    return Oracle(model_folder, {name: root / name for name in ADAPTERS})


@pytest.fixture
def start_bare_worker(model_folder: Path, root: Path, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts workers without adapters, which commands may load from ``root``."""
    with running_workers(model_folder, tmp_path) as start:
        yield partial(start, *bare_flags(root))


@pytest.fixture(scope="package")
def two_workers(
    redis_url: str, model_folder: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """The client of a queue with two such workers."""
    place = ("--redis-url", redis_url, "--queue", "two-workers")
    with (
        running_workers(model_folder, tmp_path_factory.mktemp("logs")) as start,
        Client(redis_url, "two-workers") as client,
    ):
        for _ in range(2):
            start(*bare_flags(root), *place)
        wait_for_workers(client, 2)
        yield client


@pytest.fixture
def client(two_workers: Client) -> Iterator[Client]:
    """Of that queue, which knows no adapter before and after the test."""
    yield two_workers
    for adapter in two_workers.adapters():
        two_workers.answers(two_workers.unload_adapter(adapter.name, force=True))


def bare_flags(root: Path) -> tuple[str, ...]:
    return (
        *("--enable-lora", "--max-lora-rank", "256", "--lora-target-modules", "all"),
        *("--lora-root", str(root), "--max-loras-per-batch", "3", "--lease-seconds", "2"),
    )


@pytest.fixture
def start_mortal(redis_url: str, queue_name: str, tmp_path: Path) -> Iterator[StartMortal]:
    """Starts workers that the prompt "poison" kills; ends those that still run."""
    settings = NullSettings(redis_url, queue_name, lease_seconds=LEASE_SECONDS)
    with ForkedProcesses(tmp_path) as processes:
        yield partial(processes.fork, "worker", run_mortal, settings)


@pytest.fixture
def bench(redis_url: str, queue_name: str, tmp_path: Path) -> Iterator[FaultBench]:
    """Null workers on the tests' server."""
    with FaultBench(redis_url, queue_name, tmp_path) as bench:
        yield bench


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnServer]:
    """A server that the test may kill, fill and empty."""
    with OwnServer(tmp_path / "server") as server:
        yield server


@pytest.fixture
def frail(server: OwnServer, queue_name: str, tmp_path: Path) -> Iterator[FaultBench]:
    """A bench on that server."""
    with FaultBench(server.url, queue_name, tmp_path) as bench:
        yield bench
