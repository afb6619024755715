"""Simulates how fast the engine works off the jobs of make_model, by the order in which they run.

    python -m benchmarks.simulate_schedule [--max-running 256 1024] [--no-queue]

The scheduler, the leases and the queue's scripts are real; the model is a table of measured times
(benchmarks/step_time.py), and a clock that stands still while Python computes. "engine" rows have
all jobs waiting in the scheduler from the start, as `benchmarks.workload` has; "queue" rows get
them from a queue on an embedded server, as a worker does.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from benchmarks.make_model import make_jobs
from benchmarks.step_time import step_seconds
from broker.claims import Claim
from broker.connection import connect
from broker.embedded import EmbeddedServer
from broker.job_queue import JobQueue
from schemas.adapter import AdapterRecord
from schemas.job import Job
from schemas.result import Result, Timings
from schemas.worker_state import WorkerState
from worker.adapters.peft_format import Adapter
from worker.config import PATIENCE
from worker.kv_cache import PAGE_SIZE
from worker.leases import Leases
from worker.page_pool import PagePool, prefix_keys
from worker.scheduler import Scheduler
from worker.sequence import Sequence

#: Those of docs/gpu.md; the others of make_model are about the cache and a thousand adapters.
WORKLOADS = ("base", "uniform8", "zipf32", "distinct32")

MAX_ADAPTERS = 8
MAX_PREFILL_TOKENS = 8192

#: What an H100 with 80 GB holds beside model and slots.
KV_TOKENS = 390_000

#: Seconds from one claim to the next, as in worker/claimer.py while sequences run.
CLAIM_INTERVAL = 0.05


@dataclass
class Run:
    """An engine whose batches take simulated time, and what it has counted."""

    max_running: int
    for_adapters: bool
    now: float = 0.0
    running: list[int] = field(default_factory=list)
    """Sequences in each batch."""
    adapters: list[int] = field(default_factory=list)
    """Distinct adapters in each batch."""
    slot_loads: int = 0
    output_tokens: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            PagePool(KV_TOKENS // PAGE_SIZE),
            max_running=self.max_running,
            max_prefill_tokens=MAX_PREFILL_TOKENS,
            max_adapters=MAX_ADAPTERS,
            clock=lambda: self.now,
        )
        self._launched: list[Sequence] = []
        self._resident: dict[Adapter, None] = {}
        """Adapters in a slot, least recently used first."""

    def step(self) -> list[Sequence]:
        """Launch a batch, and end the one before it; returns the sequences that it finished."""
        batch = self.scheduler.schedule()
        self.scheduler.pool.take_new()
        if batch:
            self.now += step_seconds(batch, for_adapters=self.for_adapters)
            self.running.append(len(batch))
            self._place({item.sequence.adapter for item in batch if item.sequence.adapter})
        launched_before, self._launched = self._launched, []
        for sequence, num_rows, _ in batch:
            sequence.num_cached += num_rows
            if sequence.num_cached == sequence.num_tokens:
                self._launched.append(sequence)
        for sequence in self._launched:
            sequence.num_in_flight += 1
        return [sequence for sequence in launched_before if self._is_finished(sequence)]

    def _is_finished(self, sequence: Sequence) -> bool:
        sequence.num_in_flight -= 1
        sequence.output_ids.append(0)
        self.output_tokens += 1
        if len(sequence.output_ids) < sequence.max_new_tokens:
            return False
        self.scheduler.finish(sequence)
        return True

    def _place(self, in_use: set[Adapter]) -> None:
        self.adapters.append(len(in_use))
        self.slot_loads += len(in_use - self._resident.keys())
        for adapter in in_use:
            self._resident.pop(adapter, None)
            self._resident[adapter] = None
        while len(self._resident) > MAX_ADAPTERS:
            del self._resident[next(iter(self._resident))]


class QueuedJobs:
    """Jobs on their way through a queue: what the worker's claimer and publisher do."""

    def __init__(self, queue: JobQueue, jobs: list[Job], max_running: int) -> None:
        names = sorted({job.lora for job in jobs if job.lora})
        self._queue = queue
        self._worker = "simulated"
        # As in worker/worker.py.
        max_jobs = max_running + max(4, max_running // 8)
        self._leases = Leases(max_jobs=max_jobs, max_adapters=MAX_ADAPTERS)
        self._claims: dict[str, Claim] = {}
        self._next_claim = 0.0
        queue.announce({name: AdapterRecord(source="", revision="") for name in names})
        state = WorkerState(
            id=self._worker,
            model="",
            device="",
            started=0,
            adapters=dict.fromkeys(names, ""),
            max_loras_per_batch=MAX_ADAPTERS,
        )
        queue.heartbeat(state, alive_seconds=600)
        queue.submit("simulated", "", len(jobs), 0, jobs)

    def claim(self, now: float) -> list[Job]:
        """The jobs that a claim brings, if it is time for one."""
        request = self._leases.request(())
        if now < self._next_claim or not request.num_jobs:
            return []
        self._next_claim = now + CLAIM_INTERVAL
        claims = self._queue.claim(self._worker, request, lease_seconds=600, patience=PATIENCE)
        self._leases.add(claims.jobs)
        self._claims |= {claim.lease.job_id: claim for claim in claims.jobs}
        return [Job.from_wire(claim.payload) for claim in claims.jobs]

    def commit(self, sequences: list[Sequence]) -> None:
        """Record the answers; their slots are free for the next claim."""
        claims = [self._claims.pop(sequence.job.id) for sequence in sequences]
        results = [
            Result(
                id=claim.lease.job_id,
                submission=claim.submission,
                lora=claim.adapter,
                status="done",
                text="",
                timings=Timings(queued=claim.queued),
            )
            for claim in claims
        ]
        self._queue.commit(
            self._worker, list(zip([claim.lease for claim in claims], results, strict=True))
        )
        self._leases.remove([claim.lease for claim in claims])


def make_sequence(job: Job, adapters: dict[str, Adapter]) -> Sequence:
    """A stand-in for the job's adapter is made when its first job comes."""
    adapter = None
    if job.lora:
        stand_in = Adapter(job.lora, source="", revision=job.lora, rank=1, factors={})
        adapter = adapters.setdefault(job.lora, stand_in)
    sequence = Sequence(job, job.prompt_token_ids or [], job.max_tokens, adapter)
    sequence.prefix_keys = prefix_keys(job.lora, sequence.prompt_ids, PAGE_SIZE)
    return sequence


def simulate(jobs: list[Job], max_running: int, queue: JobQueue | None) -> Run:
    """Work off the jobs, from ``queue`` if there is one."""
    run = Run(max_running, for_adapters=any(job.lora for job in jobs))
    queued = QueuedJobs(queue, jobs, max_running) if queue else None
    adapters: dict[str, Adapter] = {}
    num_left = len(jobs)
    arrived = [] if queued else jobs
    while num_left:
        if queued:
            arrived = queued.claim(run.now)
        for job in arrived:
            run.scheduler.add(make_sequence(job, adapters))
        arrived = []
        finished = run.step()
        num_left -= len(finished)
        if queued and finished:
            queued.commit(finished)
        if queued and not run.scheduler.running:
            run.now += CLAIM_INTERVAL
    return run


@contextmanager
def embedded_url() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="lorry-") as folder, EmbeddedServer(Path(folder)) as s:
        yield s.url


def main() -> None:
    """Simulate all workloads and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-running", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--no-queue", action="store_true", help="only with all jobs waiting")
    flags = parser.parse_args()
    table = Table("workload", "at most running", "jobs from", "tokens/s", "steps")
    for column in ("mean running", "mean adapters", "slot loads"):
        table.add_column(column)
    with embedded_url() as url, connect(url) as client:
        for max_running in flags.max_running:
            for workload in WORKLOADS:
                jobs = list(make_jobs(workload))
                queue = JobQueue(client, f"{workload}-{max_running}")
                for source in [None] if flags.no_queue else [None, queue]:
                    run = simulate(jobs, max_running, source)
                    table.add_row(
                        *(workload, str(max_running), "queue" if source else "engine"),
                        f"{run.output_tokens / run.now:,.0f}",
                        *(f"{len(run.running):,}", f"{mean(run.running):.0f}"),
                        *(f"{mean(run.adapters):.1f}", f"{run.slot_loads}"),
                    )
    Console().print(table)


if __name__ == "__main__":
    main()
