"""A worker ends though a thread of it hangs in a read, or goes on reading."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

from structlog.testing import capture_logs

from benchmarks.waiting import PATIENCE
from broker.job_queue import JobQueue
from producer.client import Client
from tests.tiny_models import make_adapter, make_llama
from worker.daemons import Daemon, join_within

#: The command `worker`, that never reads ``{name}`` for the time number ``{number}``: it says so
#: and does something else for ever.
SCRIPT = """
import sys, threading, torch
from itertools import count
from worker import cli
from worker.adapters.loader import AdapterLoader

load, reads = AdapterLoader.load, count(1)

def compute():
    while True:
        torch.ones(300, 300).matmul(torch.ones(300, 300)).sum().item()

def load_or_not(loader, name, folder):
    if name == "evicted" and next(reads) == {number}:
        print("reads", flush=True)
        {action}
    return load(loader, name, folder)

AdapterLoader.load = load_or_not
cli.main()
"""
HANG = "threading.Event().wait()"
COMPUTE = "compute()"


def start(
    tmp_path: Path, redis_url: str, queue: str, *, number: int, action: str
) -> subprocess.Popen[str]:
    """A worker that has evicted the first of its adapters once it is ready."""
    make_llama(tmp_path / "model")
    names = ("evicted", "kept")
    # Of different weights, as names of the same share an adapter.
    for seed, name in enumerate(names):
        make_adapter(tmp_path / "model", tmp_path / name, rank=4, seed=seed)
    script = SCRIPT.format(number=number, action=action)
    place = ("--model-path", str(tmp_path / "model"), "--device", "cpu", "--redis-url", redis_url)
    loras = ("--lora-paths", *(f"{name}={tmp_path / name}" for name in names))
    limits = ("--max-loaded-loras", "1", "--max-loras-per-batch", "1", "--max-total-tokens", "4096")
    return subprocess.Popen(
        [sys.executable, "-c", script, *place, "--queue", queue, *loras, *limits],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_while_it_reads(process: subprocess.Popen[str]) -> str:
    """Its log, once it has ended as it was asked to."""
    with process:
        assert process.stdout
        assert process.stdout.readline() == "reads\n"
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told
    return told


def test_a_worker_ends_though_the_source_of_an_evicted_adapter_hangs(
    tmp_path: Path, redis_url: str, queue: JobQueue
) -> None:
    with Client(redis_url, queue.name) as client:
        client.submit([{"id": "job", "lora": "evicted", "prompt_token_ids": [1]}])
        process = start(tmp_path, redis_url, queue.name, number=2, action=HANG)
        told = end_while_it_reads(process)
    assert '"thread": "read evicted", "event": "thread_hangs"' in told
    assert queue.client.hmget(queue.keys.job("job"), "state", "attempts") == ["waiting", "0"]


def test_a_worker_that_is_ended_amid_a_long_read_is_not_aborted(
    tmp_path: Path, redis_url: str, queue: JobQueue
) -> None:
    with Client(redis_url, queue.name) as client:
        client.submit([{"id": "job", "lora": "evicted", "prompt_token_ids": [1]}])
        end_while_it_reads(start(tmp_path, redis_url, queue.name, number=2, action=COMPUTE))


def test_a_worker_ends_though_a_source_hangs_while_it_starts(
    tmp_path: Path, redis_url: str, queue_name: str
) -> None:
    told = end_while_it_reads(start(tmp_path, redis_url, queue_name, number=1, action=HANG))
    assert "Traceback" not in told


def test_threads_that_hang_are_waited_for_together_no_longer_than_told() -> None:
    never = Event()
    threads = [Daemon(f"hangs {number}", lambda: never.wait(60)) for number in range(3)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    with capture_logs() as logs:
        join_within(0.2, threads)
    assert time.monotonic() - began < 10
    assert [entry["thread"] for entry in logs] == ["hangs 0", "hangs 1", "hangs 2"]
    never.set()
    join_within(30, threads)
    assert not any(thread.is_alive() for thread in threads)
