"""A real worker around an engine that computes nothing: what is left is the queue.

    python -m benchmarks.null_worker [--queue NAME] [--redis-url URL] [--adapters a b] [--burst]

Claims, leases, results and commits are those of `worker`; every answer is empty.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence as Sequences
from pathlib import Path
from typing import NamedTuple

import torch

from broker.server import use_server
from schemas.errors import JobError
from schemas.job import Job
from worker.adapters.loader import AdapterLoader
from worker.adapters.peft_format import Adapter
from worker.adapters.registry import AdapterRegistry
from worker.config import WorkerConfig
from worker.engine import Engine, EngineCounters
from worker.kv_cache import PagePool
from worker.logs import configure_logs
from worker.scheduler import Scheduler
from worker.sequence import Sequence
from worker.text import Tokenizer
from worker.worker import Worker

#: Jobs that the worker holds at once.
MAX_RUNNING = 1024


class NullBatch(NamedTuple):
    """What `Worker.step` reads of a batch."""

    sequences: list[Sequence]
    adapters: frozenset[Adapter]


class NullLoader(AdapterLoader):
    """Finds an adapter without weights in every folder."""

    def __init__(self) -> None:
        pass

    def load(self, name: str, folder: Path) -> Adapter:
        return Adapter(name, str(folder), "null", rank=1, factors={})

    def revision(self, folder: Path) -> str:
        return "null"


class NullEngine(Engine):
    """Finishes every sequence in the step after it came."""

    def __init__(self, adapters: Sequences[str]) -> None:
        self.device = torch.device("cpu")
        self.adapters = AdapterRegistry(NullLoader())
        for name in adapters:
            self.adapters.serve(name, self.adapters.read(name, Path("/null"), version=0))
        self.slots = None
        self.tokenizer = Tokenizer(Path("no-such-folder"), vocab_size=1)
        self.counters = EngineCounters()
        self._done: list[Sequence] = []
        self.scheduler = Scheduler(
            PagePool(1), max_running=MAX_RUNNING, max_prefill_tokens=1, max_adapters=8
        )

    def sequence_of(self, job: Job) -> Sequence:
        if job.lora is not None and self.adapters.get(job.lora) is None:
            raise JobError("unknown_adapter", f"no adapter is called '{job.lora}'")
        return Sequence(job, prompt_ids=[0], max_new_tokens=1)

    def schedule(self) -> NullBatch | None:  # type: ignore[override]
        sequences = list(self.scheduler.waiting)
        return NullBatch(sequences, frozenset()) if sequences else None

    def launch(self, batch: NullBatch) -> None:  # type: ignore[override]
        self.counters.batches += 1
        for sequence in batch.sequences:
            self.scheduler.finish(sequence)
            sequence.finish_reason = "stop"
        self._done = batch.sequences

    def collect(self, *, all_launched: bool = False) -> list[Sequence]:
        done, self._done = self._done, []
        return done


def main() -> None:
    """Run a null worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue", default="lorry")
    parser.add_argument("--redis-url")
    parser.add_argument("--adapters", nargs="*", default=[])
    parser.add_argument("--lease-seconds", type=float, default=30.0)
    parser.add_argument("--burst", action="store_true")
    flags = parser.parse_args()
    configure_logs()
    config = WorkerConfig(
        model_path=Path("null"),
        max_running_requests=MAX_RUNNING,
        queue=flags.queue,
        lease_seconds=flags.lease_seconds,
        burst=flags.burst,
        device="cpu",
    )
    with use_server(flags.redis_url) as server:
        worker = Worker(config, NullEngine(flags.adapters), server.url)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: worker.stop())
        status = worker.run()
    sys.exit(status)


if __name__ == "__main__":
    main()
