"""Runs files of jobs through the engine, without a queue, and prints one JSON line a run.

    python -m benchmarks.workload MODEL JOBS.jsonl ... [--adapters FOLDER] [--load-format dummy]

A file has job lines as `producer submit` takes them; FOLDER holds PEFT folders, whose names are the
adapters'. All jobs of a file wait from the start. Of a file's runs the first warms up, and the last
is the one to quote. `benchmarks.make_model` makes a model and adapters.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import structlog
import torch

from producer.lines import numbered_lines, parse_line
from producer.problems import Problems
from schemas.errors import BadInput, LorryError
from schemas.job import Job
from worker.config import WorkerConfig
from worker.engine import Engine, EngineCounters
from worker.host_memory import leave_alone_what_stays
from worker.lora_path import LoraPath


def read_jobs(path: Path) -> list[Job]:
    """Raises BadInput with all bad lines."""
    problems, jobs = Problems(str(path)), []
    with path.open("rb") as stream:
        for number, line in numbered_lines(stream):
            try:
                jobs.append(parse_line(line, made_id=f"{path.stem}.{number}"))
            except BadInput as error:
                problems.add(number, str(error))
    problems.raise_if_any()
    return jobs


def lora_paths(folder: Path | None, jobs: list[Job]) -> tuple[LoraPath, ...]:
    """The adapters that the jobs name."""
    names = sorted({job.lora for job in jobs if job.lora})
    if names and folder is None:
        raise BadInput(
            f"The jobs name adapters ({names[0]}, ...): give their folder by --adapters."
        )
    return tuple(LoraPath(lora_name=n, lora_path=str((folder or Path()) / n)) for n in names)


def run(engine: Engine, jobs: list[Job]) -> dict[str, Any]:
    """One run over all jobs, from an empty engine to an empty engine."""
    engine.forget_prefixes()  # Of the run before, whose prompts were the same.
    engine.counters = EngineCounters()
    loads_before = engine.slots.num_loads if engine.slots else 0
    started = time.perf_counter()
    for sequence in [engine.sequence_of(job) for job in jobs]:
        engine.add(sequence)
    running, adapters = [], []
    num_left = len(jobs)
    while num_left:
        batch = engine.schedule()
        if batch:
            engine.launch(batch)
            running.append(len(batch.scheduled))
            adapters.append(len(batch.adapters))
        num_left -= len(engine.collect(all_launched=batch is None))
    engine.collect(all_launched=True)  # What a batch launched ahead of the last one's end left.
    seconds = time.perf_counter() - started
    counters = engine.counters
    return {
        "output_tokens_per_s": round(counters.output_tokens / seconds, 1),
        "total_tokens_per_s": round((counters.output_tokens + counters.prompt_tokens) / seconds, 1),
        "reused_tokens": counters.reused_tokens,
        "jobs_per_s": round(len(jobs) / seconds, 2),
        "seconds": round(seconds, 2),
        "steps": len(running),
        "gpu_busy": round(counters.device_seconds / seconds, 4),
        "mean_running": round(sum(running) / len(running), 1),
        "mean_adapters": round(sum(adapters) / len(adapters), 2),
        "slot_loads": (engine.slots.num_loads if engine.slots else 0) - loads_before,
    }


def measure(
    config: WorkerConfig, workloads: dict[str, list[Job]], runs: int
) -> Iterator[dict[str, Any]]:
    """The figures of each workload's runs."""
    started = time.perf_counter()
    engine = Engine(config)
    leave_alone_what_stays()  # As the command `worker` does.
    fixed = {"start_up_s": round(time.perf_counter() - started, 1), "kv_tokens": engine.kv_capacity}
    for name, jobs in workloads.items():
        for number in range(1, runs + 1):
            figures = {"workload": name, "run": number, **run(engine, jobs), **fixed}
            if engine.device.type == "cuda":
                # The allocator gives nothing back, so this is the most that was ever taken.
                free, total = torch.cuda.mem_get_info()
                figures["card_memory_gb"] = round((total - free) / 1e9, 2)
            yield figures


def main() -> None:
    """Run the workloads; a person's mistake is answered with a sentence."""
    try:
        _main()
    except (LorryError, OSError) as error:
        sys.exit(f"error: {error}")


def _main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.add_argument("--runs", type=int, default=2)
    flags = vars(parser.parse_args())
    runs = flags.pop("runs")
    config, workloads = configured(flags)
    for figures in measure(config, workloads, runs):
        print(json.dumps(figures), flush=True)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Model, job files, adapters, and those of the worker's flags that change its speed."""
    parser.add_argument("model", type=Path)
    parser.add_argument("jobs", type=Path, nargs="+")
    parser.add_argument("--adapters", type=Path, metavar="FOLDER")
    for name, kind in (
        *(("--load-format", str), ("--device", str), ("--dtype", str)),
        *(("--max-loras-per-batch", int), ("--max-running-requests", int)),
        *(("--mem-fraction-static", float), ("--chunked-prefill-size", int)),
        *(("--context-length", int), ("--max-lora-rank", int)),
    ):
        parser.add_argument(name, type=kind)
    parser.add_argument("--disable-prefix-cache", action="store_true")


def configured(flags: dict[str, Any]) -> tuple[WorkerConfig, dict[str, list[Job]]]:
    """The worker's settings, and the jobs of each file by its name; raises BadInput."""
    workloads = {path.stem: read_jobs(path) for path in flags.pop("jobs")}
    loras = lora_paths(flags.pop("adapters"), list(chain.from_iterable(workloads.values())))
    model = flags.pop("model")
    settings = {name: value for name, value in flags.items() if value is not None}
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    paths = [lora.model_dump_json() for lora in loras]
    return WorkerConfig.from_flags(
        {"model_path": model, "lora_paths": paths, **settings}
    ), workloads


if __name__ == "__main__":
    main()
