"""A real worker around an engine that computes nothing: what is left is the queue.

    python -m benchmarks.null_worker [--queue NAME] [--redis-url URL] [--adapters a b] [--burst]

Claims, leases, results and commits are those of `worker`; every answer is empty. A job can bring
its own fault, in its metadata, which the engine meets at an exact point:

    {"fault": {"at": "generate", "do": "SIGKILL", "times": 1}}

`at` is `read` (claimed, not prepared yet), `load` (while its adapter is read from its folder) or
`generate` (in a batch); `do` is the signal that the process sends itself, `raise`, `sleep` (of
`seconds`) or, when it is read, `fail`. Without `times` it happens whenever the job comes there.
`NullWorkers` runs such workers as processes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.fork_server import ForkedProcesses
from broker import scripts
from broker.server import find_server
from schemas import WIRE_VERSION
from schemas.errors import JobError, LorryError
from schemas.job import Job
from worker.adapters.loader import AdapterLoader
from worker.adapters.peft_format import Adapter
from worker.adapters.registry import AdapterRegistry
from worker.background import change_threads_often, wait_for_server
from worker.config import WorkerConfig
from worker.engine import Engine, EngineCounters
from worker.host_memory import leave_alone_what_stays
from worker.logs import configure_logs
from worker.page_pool import PagePool
from worker.scheduler import Scheduler
from worker.sequence import Sequence
from worker.text import Tokenizer
from worker.worker import Worker

#: Adapters of the command line stand below it; so may those that commands load. There is no such
#: folder: the revision of what is in it is its name.
FOLDERS = Path("/null")

#: What lets commands load adapters from there.
LORA_FLAGS: dict[str, Any] = {
    "lora_root": ["/"],
    "max_lora_rank": 1,
    "lora_target_modules": ["all"],
}

#: Why a job fails that asks for it.
BAD_PROMPT = "the prompt asks to fail"


@dataclass(frozen=True)
class NullSettings:
    """What a null worker is started with."""

    redis_url: str | None = None
    queue: str = "lorry"
    adapters: Sequences[str] = ()
    lease_seconds: float = 30.0
    max_running: int = 1024
    """Jobs that the worker runs at once."""
    max_loaded: int | None = None
    """Adapters in memory; another one is read when a job wants it."""
    burst: bool = False
    marks: Path | None = None
    """Folder where the jobs' faults are counted, for all workers together."""
    journal: Path | None = None
    """File that gets the id of each job whenever it is run."""
    clock_offset: float = 0.0
    """Seconds by which the clock of the process (``time.time``) is ahead."""
    wire_version: int = WIRE_VERSION
    """Of the records that the worker reads, and the one before."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Further fields of the worker's configuration."""


class NullBatch(NamedTuple):
    """What `Worker.step` reads of a batch."""

    sequences: list[Sequence]
    adapters: frozenset[Adapter]


class Faults:
    """Does what the jobs' metadata ask for."""

    def __init__(self, marks: Path | None) -> None:
        self._marks = marks

    def meet(self, job: Job, point: str) -> None:
        """Called when the engine comes to a point with a job."""
        metadata = job.metadata if isinstance(job.metadata, dict) else {}
        fault: Any = metadata.get("fault")
        if not fault or fault["at"] != point or not self._is_due(job.id, fault.get("times")):
            return
        if fault["do"] == "sleep":
            time.sleep(fault["seconds"])
        elif fault["do"] == "fail":
            raise JobError("bad_prompt", BAD_PROMPT)
        elif fault["do"] == "raise":
            raise RuntimeError(f"{job.id} breaks the engine at {point}")
        else:
            os.kill(os.getpid(), signal.Signals[fault["do"]])

    def _is_due(self, job_id: str, times: int | None) -> bool:
        if times is None:
            return True
        if self._marks is None:
            raise ValueError("a fault that happens so many times needs a folder for its marks")
        for number in range(times):
            try:
                (self._marks / f"{job_id}.{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False


class NullLoader(AdapterLoader):
    """Finds an adapter without weights in every folder."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        #: The job for which this thread reads an adapter, if it is for one.
        self.wanted_by = threading.local()

    def load(self, name: str, folder: Path) -> Adapter:
        if job := getattr(self.wanted_by, "job", None):
            self._faults.meet(job, "load")
        return Adapter(name, str(folder), self.revision(folder), rank=1, factors={})

    def check(self, folder: Path) -> None:  # type: ignore[override]
        pass

    def revision(self, folder: Path) -> str:
        return folder.name


class NullEngine(Engine):
    """Finishes every sequence in the step after it came."""

    def __init__(self, settings: NullSettings) -> None:
        self.device = torch.device("cpu")
        self._faults = Faults(settings.marks)
        self._loader = NullLoader(self._faults)
        self.adapters = AdapterRegistry(self._loader, max_loaded=settings.max_loaded)
        for name in settings.adapters:
            self.adapters.serve(name, self.adapters.read(name, FOLDERS / name, version=0))
        self.slots = None
        self.tokenizer = Tokenizer(Path("no-such-folder"), vocab_size=1)
        self.counters = EngineCounters()
        self._journal = settings.journal.open("a", buffering=1) if settings.journal else None
        self._done: list[Sequence] = []
        self.scheduler = Scheduler(
            PagePool(1), max_running=settings.max_running, max_prefill_tokens=1, max_adapters=8
        )

    def sequence_of(self, job: Job, adapter: Adapter | None = None) -> Sequence:
        self._faults.meet(job, "read")
        adapter = adapter or self.adapter_of(job)
        return Sequence(job, prompt_ids=[0], max_new_tokens=1, adapter=adapter)

    def adapter_of(self, job: Job) -> Adapter | None:
        self._loader.wanted_by.job = job
        try:
            return super().adapter_of(job)
        finally:
            self._loader.wanted_by.job = None

    def schedule(self) -> NullBatch | None:  # type: ignore[override]
        sequences = list(self.scheduler.waiting)
        return NullBatch(sequences, frozenset()) if sequences else None

    def launch(self, batch: NullBatch) -> None:  # type: ignore[override]
        self.counters.batches += 1
        for sequence in batch.sequences:
            sequence.started = time.monotonic()
            if self._journal:
                self._journal.write(f"{sequence.job.id}\n")
            self._faults.meet(sequence.job, "generate")
            self.scheduler.finish(sequence)
            sequence.finish_reason = "stop"
            sequence.first_token = sequence.finished = time.monotonic()
        self._done = batch.sequences

    def collect(self, *, all_launched: bool = False) -> list[Sequence]:
        done, self._done = self._done, []
        return done


class NullWorkers(ForkedProcesses):
    """Null workers as processes."""

    def __init__(self, settings: NullSettings, logs: Path) -> None:
        super().__init__(logs)
        self._settings = settings

    def start(self, **changes: Any) -> ForkServerProcess:
        """Start one; its log is ``null-<number>.log``."""
        return self.fork("null", run_and_exit, replace(self._settings, **changes))


def run_and_exit(settings: NullSettings) -> None:
    """Run a null worker and end this process with its exit status."""
    try:
        sys.exit(run(settings))
    except LorryError as error:
        print(f"null_worker: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def run(settings: NullSettings) -> int:
    """Run a null worker in this process; its exit status."""
    configure_logs()
    if settings.clock_offset:
        true_time = time.time
        time.time = lambda: true_time() + settings.clock_offset
    scripts.WIRE_VERSION = settings.wire_version
    config = WorkerConfig(
        model_path=Path("null"),
        max_running_requests=settings.max_running,
        queue=settings.queue,
        lease_seconds=settings.lease_seconds,
        burst=settings.burst,
        device="cpu",
        **{**LORA_FLAGS, **settings.flags},
    )
    with find_server(settings.redis_url) as server:
        wait_for_server(server)
        worker = Worker(config, NullEngine(settings), server.url)
        leave_alone_what_stays()
        change_threads_often()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: worker.stop())
        return worker.run()


def main() -> None:
    """Run a null worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue", default="lorry")
    parser.add_argument("--redis-url")
    parser.add_argument("--adapters", nargs="*", default=[])
    parser.add_argument("--lease-seconds", type=float, default=30.0)
    parser.add_argument("--burst", action="store_true")
    sys.exit(run(NullSettings(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
