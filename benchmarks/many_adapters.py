"""Whether the queue stays as fast with many adapters as with few.

    python -m benchmarks.many_adapters [--names 10 100 1000 10000]

On an embedded server: so many adapters are registered, each has jobs waiting, and one worker has
them all. Submitting is `JobQueue.submit` in runs of 500 jobs; a claim takes 4 jobs for a worker
with 8 adapters in use and no free slot, as in steady state, or 288 for an idle one with 8 free
slots; listing is what `producer lora list` reads. Medians of 20.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import track
from rich.table import Table

from broker.claims import ClaimRequest
from broker.embedded import EmbeddedServer
from broker.job_queue import JobQueue
from producer.client import Client
from schemas.adapter import AdapterRecord
from schemas.job import Job
from schemas.worker_state import WorkerState

RUN = 500
REPEATS = 20


def milliseconds(action: Callable[[], object]) -> float:
    """Median time of an action."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        times.append(1000 * (time.perf_counter() - started))
    return median(times)


def make_queue(client: Client, num_names: int) -> list[str]:
    """A queue of so many adapters, all served by one worker, each with two jobs waiting."""
    names = [f"adapter-{number}" for number in range(num_names)]
    queue = client._job_queue
    queue.announce({name: AdapterRecord(source=f"/adapters/{name}") for name in names})
    state = WorkerState(
        id="worker",
        model="",
        device="",
        started=0,
        adapters=dict.fromkeys(names, "revision"),
        max_loras_per_batch=8,
    )
    queue.heartbeat(state, alive_seconds=3600)
    jobs = [
        Job(id=f"{name}-{i}", lora=name, prompt="What is it?") for name in names for i in range(2)
    ]
    for start in range(0, len(jobs), RUN):
        part = jobs[start : start + RUN]
        queue.submit(f"first-{start}", "", len(part), 0, part)
    return names


def submitted_per_second(queue: JobQueue, names: list[str]) -> float:
    """Jobs a second, of all adapters in turn."""
    numbers = iter(range(10**9))

    def submit() -> None:
        jobs = [
            Job(id=f"more-{n}", lora=names[n % len(names)], prompt="What is it?")
            for n in (next(numbers) for _ in range(RUN))
        ]
        queue.submit(f"more-{jobs[0].id}", "", len(jobs), 0, jobs)

    return RUN / milliseconds(submit) * 1000


def claim_milliseconds(queue: JobQueue, request: ClaimRequest) -> float:
    """A claim whose jobs are handed back before the next one."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        claims = queue.claim("worker", request, lease_seconds=600, patience=30)
        times.append(1000 * (time.perf_counter() - started))
        leases = [claim.lease for claim in claims.jobs]
        queue.release("worker", leases)
    return median(times)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    table = Table("adapters")
    for column in ("submit, jobs/s", "claim 4, ms", "claim 288, ms", "list, ms"):
        table.add_column(column, justify="right")
    with (
        tempfile.TemporaryDirectory(prefix="lorry-") as folder,
        EmbeddedServer(Path(folder)) as server,
    ):
        for number in track(parser.parse_args().names, description="names", transient=True):
            with Client(server.url, f"names-{number}") as client:
                names, queue = make_queue(client, number), client._job_queue
                busy = ClaimRequest(num_jobs=4, free_slots=0, in_use=names[:8])
                idle = ClaimRequest(num_jobs=288, free_slots=8, in_use=[])
                table.add_row(
                    f"{number:,}",
                    f"{submitted_per_second(queue, names):,.0f}",
                    f"{claim_milliseconds(queue, busy):.2f}",
                    f"{claim_milliseconds(queue, idle):.2f}",
                    f"{milliseconds(client.adapters):.1f}",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
