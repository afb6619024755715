"""Where the time of the engine's steps goes on a GPU, by kernel, and how long the GPU idles.

    python -m benchmarks.step_profile MODEL JOBS.jsonl ... [--adapters FOLDER]

Runs a file's jobs once to warm up, then again, and records every kernel of some steps in the
middle. Takes the flags of `benchmarks.workload`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.workload import add_flags, configured, run
from schemas.errors import BadInput, LorryError
from schemas.job import Job
from worker.engine import Engine
from worker.host_memory import leave_alone_what_stays

#: What a kernel does, by its name; the first that matches.
KINDS = {
    "products (cuBLAS)": r"gemm|nvjet|cutlass|xmma|cublas|splitK",
    "decode attention": r"^_decode|^_merge",
    "prefill attention": r"^_prefill",
    "LoRA expand of q/k/v, o, down": r"^_expand",
    "SiLU-and-multiply, with LoRA expand": r"^_act_and_mul",
    "norm with residual": r"^_add_rms_norm",
    "rotary and KV write": r"^_rotary_kv_write",
    "choice of tokens": r"^_sample|^_largest_token",
    "copies": r"Memcpy|Memset",
    "other": r"",
}


class Kernel(NamedTuple):
    """One run of a kernel, or a copy; times in microseconds."""

    name: str
    stream: int
    start: float
    end: float


class Step(NamedTuple):
    """One step as the host saw it."""

    has_prompts: bool
    num_rows: int
    launch_us: float
    """What scheduling it, laying it out and launching it took."""


def record(
    engine: Engine, jobs: list[Job], first: int, count: int
) -> tuple[list[Kernel], list[Step]]:
    """The kernels of ``count`` steps of a run, after ``first`` steps of it."""
    for sequence in [engine.sequence_of(job) for job in jobs]:
        engine.add(sequence)
    for _ in range(first):
        engine.step()
    engine.collect(all_launched=True)
    steps = []
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            began = time.perf_counter()
            batch = engine.schedule()
            if batch is None:
                raise BadInput(f"The jobs are over before {first + count} steps; give more jobs.")
            engine.launch(batch)
            launch_us = 1e6 * (time.perf_counter() - began)
            steps.append(Step(bool(batch.chunks), batch.num_rows, launch_us))
            engine.collect()
        engine.collect(all_launched=True)
    for sequence in [*engine.scheduler.running, *engine.scheduler.waiting]:
        engine.drop(sequence)
    return kernels_of(profiler), steps


def kernels_of(profiler: profile) -> list[Kernel]:
    """Everything that ran on the GPU, in the order in which it began."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    kernels = [
        Kernel(e["name"], e["args"]["stream"], e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def by_step(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """The kernels of each step: it begins with the copy of its numbers to the device, and ends with
    that of its tokens to the host."""
    ((stream, _),) = Counter(kernel.stream for kernel in kernels).most_common(1)
    result: list[list[Kernel]] = []
    is_over = True
    for kernel in kernels:
        if kernel.stream == stream:
            if is_over and "HtoD" in kernel.name:
                result.append([])
                is_over = False
            if result and not is_over:
                result[-1].append(kernel)
            is_over = is_over or "DtoH" in kernel.name
    return result


def busy_us(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one of the kernels ran."""
    total, until = 0.0, float("-inf")
    for kernel in kernels:
        total += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


def kind_of(kernel: Kernel) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel.name))


def table(kernels: list[Kernel], steps: list[Step]) -> Table:
    """Microseconds and launches a step, by kind of kernel."""
    parts = by_step(kernels)
    if len(parts) != len(steps):
        raise BadInput(f"{len(steps)} steps left the traces of {len(parts)}.")
    columns = {
        name: [(s, k) for s, k in zip(steps, parts, strict=True) if s.has_prompts == has_prompts]
        for name, has_prompts in (("decode", False), ("with prompts", True))
    }
    result = Table("mean of a step")
    rows: dict[str, list[str]] = defaultdict(list)
    for name, pairs in columns.items():
        if not pairs:
            continue
        result.add_column(f"{len(pairs)} {name}: us", justify="right")
        result.add_column("launches", justify="right")
        for kind in KINDS:
            own = [[k for k in kernels if kind_of(k) == kind] for _, kernels in pairs]
            us = mean(sum(k.end - k.start for k in kernels) for kernels in own)
            rows[kind] += [f"{us:,.0f}", f"{mean(map(len, own)):.0f}"]
        rows["all"] += [f"{mean(busy_us(k) for _, k in pairs):,.0f}", ""]
        rows["idle between kernels"] += [
            f"{mean(k[-1].end - k[0].start - busy_us(k) for _, k in pairs):,.0f}",
            "",
        ]
        rows["rows"] += [f"{mean(s.num_rows for s, _ in pairs):,.0f}", ""]
        rows["host: schedule and launch"] += [f"{mean(s.launch_us for s, _ in pairs):,.0f}", ""]
    for name, cells in rows.items():
        result.add_row(name, *cells)
    return result


def main() -> None:
    """Print a table a file; a person's mistake is answered with a sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.add_argument("--first-step", type=int, default=150, metavar="N")
    parser.add_argument("--steps", type=int, default=100, metavar="N")
    flags = vars(parser.parse_args())
    first, count = flags.pop("first_step"), flags.pop("steps")
    try:
        config, workloads = configured(flags | {"disable_prefix_cache": True})
        if config.resolved_device.type != "cuda":
            raise BadInput("There is no GPU here to profile.")
        engine = Engine(config)
        leave_alone_what_stays()  # As the command `worker` does.
        console = Console(width=120)
        for name, jobs in workloads.items():
            run(engine, jobs)
            kernels, steps = record(engine, jobs, first, count)
            span = max(kernel.end for kernel in kernels) - kernels[0].start
            console.print(
                f"{name}: {count} steps in {span / 1000:.1f} ms; a kernel ran in"
                f" {busy_us(kernels) / span:.1%} of that time",
                table(kernels, steps),
            )
    except (LorryError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
