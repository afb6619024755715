"""What the queue does and costs by itself, with engines that compute nothing.

    python -m benchmarks.queue_rates [--jobs N]

Jobs a second against RQ and arq (`benchmarks.queue_vs_rq`); jobs a second by the number of adapters
and of workers, from the start of the submission to the last result; seconds from a worker's SIGKILL
until the last of its jobs has its result elsewhere; and what it costs to renew leases. Takes six
minutes on two cores that have nothing else to do.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.fault_bench import FaultBench, is_stopped, jobs
from benchmarks.own_server import OwnServer
from benchmarks.queue_vs_rq import compare
from benchmarks.waiting import wait_until
from broker.claims import ClaimRequest
from broker.connection import connect
from broker.job_queue import JobQueue
from schemas.job import Job

NUM_ADAPTERS = (1, 10, 100, 1_000, 10_000)
NUM_WORKERS = (1, 2, 4, 8)

#: Leases, in seconds, after which the jobs of a killed worker go to another one.
LEASES = (1.0, 5.0, 30.0)

#: Leases that one call renews.
RENEWED = (1, 64, 256, 1024)

ROUNDS = 3

_numbers = count()


def jobs_per_second(url: str, folder: Path, *, adapters: int, workers: int, num_jobs: int) -> float:
    """Jobs of all adapters in turn, from the start of their submission to the last result."""
    names = [f"adapter-{i}" for i in range(adapters)]
    with _bench(url, folder, adapters=names, lease_seconds=30.0, max_running=1024) as bench:
        for _ in range(workers):
            bench.start()
        lines = [
            {"prompt": f"Job number {i}", "lora": names[i % adapters]} for i in range(num_jobs)
        ]
        start = time.monotonic()
        bench.client.wait(bench.client.submit(lines))
        return num_jobs / (time.monotonic() - start)


def recovery_seconds(url: str, folder: Path, lease_seconds: float) -> float:
    """From SIGKILL of a worker that holds eight jobs until another one has finished them."""
    with _bench(url, folder, lease_seconds=lease_seconds, max_running=8) as bench:
        victim = bench.start()
        first = jobs(1, "first", at="generate", do="SIGSTOP", times=1)
        submission = bench.submit(*first, *jobs(7, "others"))
        wait_until(lambda: is_stopped(victim), "the worker did not begin")
        bench.start()
        victim.kill()
        start = time.monotonic()
        bench.client.wait(submission)
        return time.monotonic() - start


def renewal_microseconds(url: str, num_leases: int) -> float:
    """Of one call, by a worker that holds so many leases."""
    with connect(url) as client:
        queue = JobQueue(client, f"renewal{next(_numbers)}")
        sent = [Job(id=f"job-{i}", prompt="x") for i in range(num_leases)]
        queue.submit("s", "file", num_leases, 0, sent)
        request = ClaimRequest(num_leases, 8, ())
        claims = queue.claim("worker", request, lease_seconds=600, patience=30)
        leases = [claim.lease for claim in claims.jobs]
        if len(leases) != num_leases:
            raise RuntimeError(f"{len(leases)} of {num_leases} jobs were claimed")
        times = []
        for _ in range(50):
            start = time.perf_counter()
            queue.renew("worker", leases, lease_seconds=600)
            times.append(1e6 * (time.perf_counter() - start))
        return statistics.median(times)


def _bench(url: str, folder: Path, **settings: object) -> FaultBench:
    number = next(_numbers)
    return FaultBench(url, f"rates{number}", folder / f"rates{number}", **settings)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=10_000,
        help="against RQ and arq, and for each number of adapters and workers",
    )
    parser.add_argument("--adapters", type=int, nargs="+", default=NUM_ADAPTERS)
    parser.add_argument("--workers", type=int, nargs="+", default=NUM_WORKERS)
    parser.add_argument("--leases", type=float, nargs="+", default=LEASES, help="in seconds")
    flags = parser.parse_args()
    console = Console(width=110)
    for table in compare(flags.jobs):
        console.print(table)
    with tempfile.TemporaryDirectory(prefix="lorry-") as name:
        folder = Path(name)
        with OwnServer(folder / "server") as server:
            rates = Table("adapters", *(f"{n} workers, jobs/s" for n in flags.workers))
            for adapters in flags.adapters:
                cells = [
                    jobs_per_second(
                        server.url,
                        folder,
                        adapters=adapters,
                        workers=workers,
                        num_jobs=flags.jobs,
                    )
                    for workers in flags.workers
                ]
                rates.add_row(f"{adapters:,}", *(f"{rate:,.0f}" for rate in cells))
            console.print(rates)
            recovery = Table("lease, s", "SIGKILL to last result, s", "longest")
            for lease in flags.leases:
                found = [recovery_seconds(server.url, folder, lease) for _ in range(ROUNDS)]
                recovery.add_row(
                    f"{lease:g}", f"{statistics.median(found):.1f}", f"{max(found):.1f}"
                )
            console.print(recovery)
            renewal = Table("leases renewed", "a call, us", "a lease, us")
            for num_leases in RENEWED:
                call = renewal_microseconds(server.url, num_leases)
                renewal.add_row(f"{num_leases:,}", f"{call:,.0f}", f"{call / num_leases:.1f}")
            console.print(renewal)


if __name__ == "__main__":
    main()
