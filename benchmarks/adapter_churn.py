"""What loading adapters costs a GPU worker that generates meanwhile.

    python -m benchmarks.adapter_churn MODEL JOBS.jsonl --adapters FOLDER

While the jobs run, phases in which nothing is loaded alternate with phases in which adapters that
no job uses are loaded, from disk to page-locked memory in a thread and from there to a slot every
few steps. Prints how long steps without prompts take in both; then how long it takes from wanting
an adapter of each rank to its standing in the slot, while batches run, beside one copy of as many
bytes. Takes the flags of `benchmarks.workload`.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.workload import add_flags, configured, run
from schemas.errors import BadInput, LorryError
from schemas.job import Job
from worker.adapters.peft_format import Adapter
from worker.adapters.slots import AdapterSlots
from worker.background import change_threads_often
from worker.engine import Engine
from worker.host_memory import leave_alone_what_stays

#: Steps of a phase, and after how many of them the next adapter is brought to a slot.
PHASE, EVERY = 50, 5

#: Loads of each rank that are timed.
REPEATS = 15


class DiskReader:
    """A thread that reads adapters from disk into page-locked memory while it is told to."""

    def __init__(self, engine: Engine, slots: AdapterSlots, folders: Sequence[Path]) -> None:
        self._engine, self._slots, self._folders = engine, slots, folders
        self._on, self._ended = threading.Event(), threading.Event()
        self.num_read = 0
        self.is_reading = False
        """Also for a while after it was told to stop: it reads the adapter to its end."""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def run(self, on: bool) -> None:
        self._on.set() if on else self._on.clear()

    def end(self) -> None:
        self._ended.set()
        self._on.set()
        self._thread.join()

    def _read(self) -> None:
        torch.set_num_threads(1)  # As the worker's thread does.
        for folder in cycle(self._folders):
            self._on.wait()
            if self._ended.is_set():
                return
            self.is_reading = True
            self._slots.memory.prepare(self._engine.adapters.loader.load(folder.name, folder))
            self.is_reading = False
            self.num_read += 1


def step_times(
    engine: Engine, jobs: list[Job], bring: Callable[[], object], reader: DiskReader
) -> dict[bool, list[float]]:
    """Milliseconds between the ends of steps without prompts: calm ones, and those of phases with
    loads. Steps that may still have to do with the phase before do not count."""
    for sequence in [engine.sequence_of(job) for job in jobs]:
        engine.add(sequence)
    times: dict[bool, list[float]] = defaultdict(list)
    step, had_prompts, was_reading, ended = 0, True, False, time.perf_counter()
    while batch := engine.schedule():
        is_churning = step // PHASE % 2 == 1
        reader.run(is_churning)
        if is_churning and step % EVERY == 0:
            bring()
        engine.launch(batch)
        engine.collect()
        now = time.perf_counter()
        # What has just ended is the batch before, and the host launched one meanwhile, which takes
        # it longer with prompts.
        is_clear = step % PHASE > 3 and (is_churning or not was_reading)
        if not had_prompts and not batch.chunks and is_clear:
            times[is_churning].append(1000 * (now - ended))
        had_prompts, ended, step = bool(batch.chunks), now, step + 1
        was_reading = reader.is_reading
    engine.collect(all_launched=True)
    return times


def seconds_to_slot(
    engine: Engine, slots: AdapterSlots, jobs: list[Job], adapters: Sequence[Adapter]
) -> list[float]:
    """From wanting an adapter to its standing in the slot, while batches run."""
    assert slots.memory.stream is not None
    for sequence in [engine.sequence_of(job) for job in jobs]:
        engine.add(sequence)
    for _ in range(30):
        engine.step()
    times = []
    for adapter, _ in zip(cycle(adapters), range(REPEATS), strict=False):
        engine.step()
        began = time.perf_counter()
        slots.bring(adapter, engine.scheduler.adapters_in_use)
        slots.memory.stream.synchronize()
        times.append(time.perf_counter() - began)
        # Out again, so that the next one of the rank is a load too.
        slots.forget_all_but(engine.scheduler.adapters_in_use)
    for sequence in [*engine.scheduler.running, *engine.scheduler.waiting]:
        engine.drop(sequence)
    engine.collect(all_launched=True)
    return times


def seconds_to_copy(num_bytes: int, device: torch.device) -> float:
    """One copy of page-locked memory to the device; median of some."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times)


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def main() -> None:
    """Measure; a person's mistake is answered with a sentence."""
    try:
        _main()
    except (LorryError, OSError) as error:
        sys.exit(f"error: {error}")


def _main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    flags = vars(parser.parse_args())
    folder = flags["adapters"]
    if folder is None or len(flags["jobs"]) != 1:
        raise BadInput("Give one file of jobs, and by --adapters a folder of adapters.")
    config, workloads = configured(flags | {"disable_prefix_cache": True})
    (jobs,) = workloads.values()
    spare = sorted(set(folder.iterdir()) - {lora.folder for lora in config.lora_paths})
    if not spare:
        raise BadInput(f"{folder} has no adapter that the jobs do not use.")
    engine = Engine(config)
    slots = engine.slots
    if slots is None or slots.memory.stream is None:
        raise BadInput("Only a GPU worker with adapters loads them while it computes.")
    # As the command `worker` does.
    leave_alone_what_stays()
    change_threads_often()
    run(engine, jobs[: len(jobs) // 4])  # Warms up.
    adapters = [engine.adapters.loader.load(path.name, path) for path in spare]
    for adapter in adapters:
        slots.memory.prepare(adapter)
    reader = DiskReader(engine, slots, spare)
    following = cycle(adapters)
    loads_before = slots.num_loads
    try:
        times = step_times(
            engine,
            jobs,
            lambda: slots.bring(next(following), engine.scheduler.adapters_in_use),
            reader,
        )
    finally:
        reader.end()
    console = Console(width=110)
    console.print(_step_table(times))
    console.print(
        f"{reader.num_read} adapters read, {slots.num_loads - loads_before} sent to slots"
    )
    console.print(_load_table(engine, slots, jobs, adapters))


def _step_table(times: dict[bool, list[float]]) -> Table:
    table = Table("steps without prompts", "number", "p50 ms", "p90", "p99", "largest")
    for is_churning, name in ((False, "calm"), (True, "adapters are loaded")):
        of_kind = times[is_churning]
        shares = [f"{percentile(of_kind, share):.2f}" for share in (0.5, 0.9, 0.99, 1)]
        table.add_row(name, str(len(of_kind)), *shares)
    return table


def _load_table(
    engine: Engine, slots: AdapterSlots, jobs: list[Job], adapters: Sequence[Adapter]
) -> Table:
    table = Table("rank", "MB", "wanted to in slot, ms", "p90", "one copy, ms", "ratio")
    by_rank: dict[int, list[Adapter]] = defaultdict(list)
    for adapter in adapters:
        by_rank[adapter.rank].append(adapter)
    for rank, of_rank in sorted(by_rank.items()):
        times = seconds_to_slot(engine, slots, jobs, of_rank)
        num_bytes = slots.num_bytes(of_rank[0])
        copy = seconds_to_copy(num_bytes, engine.device)
        table.add_row(
            str(rank),
            f"{num_bytes / 1e6:.0f}",
            f"{1000 * median(times):.2f}",
            f"{1000 * percentile(times, 0.9):.2f}",
            f"{1000 * copy:.2f}",
            f"{median(times) / copy:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
