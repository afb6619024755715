"""Jobs a second through the queue alone, against RQ's and arq's, in one run on one server.

    python -m benchmarks.queue_vs_rq [--jobs N]

Lorry's part goes the way a user goes: `producer submit FILE` in a process of its own, a worker in
another (real but for an engine that computes nothing), and the clock runs from the start of the
submission until the last result is on record. RQ's part enqueues empty jobs and works them off
with SimpleWorker, in one process; so does arq's, with a hundred at once. Each is run three times in
turn; the first table shows medians, the second the processor time of Lorry's processes, which other
work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis
from rich.console import Console
from rich.table import Table
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer

from broker.embedded import EmbeddedServer
from producer.client import Client

ROOT = Path(__file__).parents[1]

LORRY_JOBS = 20_000
RQ_JOBS = 1500
ARQ_JOBS = 3000
ROUNDS = 3


def nothing() -> None:
    """RQ's empty job."""


@dataclass(frozen=True)
class LorryRun:
    """Seconds from the start of a submission, and seconds of processor time."""

    until_sent: float
    until_finished: float
    of_producer: float
    of_server: float
    of_worker: float


def run_lorry(url: str, folder: Path, num_jobs: int, number: int) -> LorryRun:
    """Submit so many jobs, and wait for their results."""
    queue = f"bench{number}"
    prompts = folder / "prompts.jsonl"
    with prompts.open("w") as file:
        for i in range(num_jobs):
            prompt = f"Job number {i}: what is the shortest way from here to there?"
            file.write(json.dumps({"prompt": prompt, "max_tokens": 64}) + "\n")
    common = ["--redis-url", url, "--queue", queue]
    with (folder / "worker.log").open("w") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.null_worker", *common], stderr=log
        )
        try:
            with Client(url, queue) as client:
                while not client.has_worker():
                    time.sleep(0.05)
                of_server, of_worker = _server_seconds(url), _seconds_of(worker.pid)
                of_children = _children_seconds()
                start = time.monotonic()
                sent = subprocess.run(
                    [sys.executable, "-m", "producer.cli", "submit", *common, "--json", prompts],
                    check=True,
                    capture_output=True,
                )
                until_sent = time.monotonic() - start
                client.wait(json.loads(sent.stdout)["submission"])
                return LorryRun(
                    until_sent,
                    until_finished=time.monotonic() - start,
                    of_producer=_children_seconds() - of_children,  # The worker has not ended yet.
                    of_server=_server_seconds(url) - of_server,
                    of_worker=_seconds_of(worker.pid) - of_worker,
                )
        finally:
            worker.terminate()
            worker.wait()


def _seconds_of(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def _server_seconds(url: str) -> float:
    with redis.Redis.from_url(url) as connection:
        return _seconds_of(connection.info("server")["process_id"])


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def rq_seconds(url: str, number: int) -> float:
    """Seconds from the first enqueue to the end of RQ's last job."""
    with redis.Redis.from_url(url) as connection:
        queue = Queue(f"rq{number}", connection=connection, serializer=JSONSerializer)
        start = time.monotonic()
        for _ in range(RQ_JOBS):
            queue.enqueue("benchmarks.queue_vs_rq.nothing")
        worker = SimpleWorker([queue], connection=connection, serializer=JSONSerializer)
        worker.work(burst=True, logging_level="ERROR")
        return time.monotonic() - start


def arq_python() -> Path:
    """A Python that has arq, made on first use: its redis-py is older than Lorry's."""
    folder = ROOT / "build" / "arq"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        requirements = ROOT / "benchmarks" / "arq-requirements.txt"
        subprocess.run([python, "-m", "pip", "install", "-qr", requirements], check=True)
        (folder / "installed").touch()
    return python


def arq_seconds(python: Path, server: EmbeddedServer, number: int) -> float:
    """Seconds from the first enqueue to the end of arq's last job."""
    program = ROOT / "benchmarks" / "arq_jobs.py"
    socket = server.folder / "valkey.sock"
    done = subprocess.run(
        [python, program, socket, str(ARQ_JOBS), f"arq{number}"],
        check=True,
        stdout=subprocess.PIPE,
    )
    return float(done.stdout)


def compare(num_jobs: int) -> tuple[Table, Table]:
    """Jobs a second of Lorry, RQ and arq, and Lorry's processor time a job."""
    console = Console(stderr=True)
    runs, rq, arq = [], [], []
    python = arq_python()
    with tempfile.TemporaryDirectory(prefix="lorry-") as name:
        folder = Path(name)
        with EmbeddedServer(folder / "state") as server:
            for number in range(ROUNDS):
                console.print(f"round {number + 1} of {ROUNDS} ...", style="dim")
                runs.append(run_lorry(server.url, folder, num_jobs, number))
                rq.append(RQ_JOBS / rq_seconds(server.url, number))
                arq.append(ARQ_JOBS / arq_seconds(python, server, number))
    sent = [num_jobs / run.until_sent for run in runs]
    finished = [num_jobs / run.until_finished for run in runs]
    table = Table("queue", "jobs", "jobs/s", "to RQ", "to arq")
    rq_rate, arq_rate = statistics.median(rq), statistics.median(arq)
    table.add_row("producer submit: validated and sent", f"{num_jobs:,}", _rate(sent), "", "")
    for name, number, rates in (
        ("Lorry: submit to last result", num_jobs, finished),
        ("RQ SimpleWorker: enqueue to end", RQ_JOBS, rq),
        ("arq, 100 at once: enqueue to end", ARQ_JOBS, arq),
    ):
        rate = statistics.median(rates)
        table.add_row(
            *(name, f"{number:,}", _rate(rates)),
            *(f"{rate / rq_rate:.1f} x", f"{rate / arq_rate:.1f} x"),
        )
    costs = Table("processor time of", "a job, us")
    for name, seconds in (
        ("producer", [run.of_producer for run in runs]),
        ("server", [run.of_server for run in runs]),
        ("worker", [run.of_worker for run in runs]),
    ):
        costs.add_row(name, f"{1e6 * statistics.median(seconds) / num_jobs:.0f}")
    return table, costs


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=LORRY_JOBS)
    for table in compare(parser.parse_args().jobs):
        Console().print(table)


def _rate(rates: list[float]) -> str:
    return f"{statistics.median(rates):,.0f}"


if __name__ == "__main__":
    main()
