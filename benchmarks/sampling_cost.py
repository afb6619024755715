"""What sampling fields add to a decode step.

    python -m benchmarks.sampling_cost MODEL [--load-format dummy] [--rows 256] [--steps 100]

For each field or few: as many jobs as `--rows` decode at once, on the base model, and either all of
them ask for it, or one does and the others ask for nothing. Steps are timed from where all have 10
tokens of their answers on: what passes from step to step, and what of it a GPU works. Turning
tokens into a result's text is done elsewhere, and not in it. Medians of `--rounds`, in each of
which every field has a turn. `benchmarks.make_model FOLDER --adapters 0` makes a model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

import structlog
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from schemas.errors import LorryError
from schemas.job import Job
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.host_memory import leave_alone_what_stays

PROMPT_TOKENS = 128

#: Tokens of each answer before steps are timed: by then what is compiled is compiled, and the
#: tokens of prompts are counted.
FIRST_TOKENS = 10

#: No answer comes to so many before its steps are timed.
MAX_TOKENS = 4096

#: By what the table calls them.
FIELDS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature": {"temperature": 0.8},
    "temperature, top_k, top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "temperature, min_p": {"temperature": 0.8, "min_p": 0.05},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "presence and frequency_penalty": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "logit_bias of 16 tokens": {"logit_bias": dict.fromkeys(range(100, 116), -5.0)},
    "min_tokens": {"min_tokens": MAX_TOKENS, "stop_token_ids": [2, 3]},
    "logprobs": {"logprobs": 0},
    "logprobs, 5 likeliest": {"logprobs": 5},
}
FIELDS["all of these"] = {name: value for each in FIELDS.values() for name, value in each.items()}


class StepTime(NamedTuple):
    """Milliseconds a step."""

    passed: float
    on_gpu: float


def make_jobs(fields: dict[str, Any], num_rows: int, num_asking: int) -> list[Job]:
    """Jobs that do not end by themselves; the first few ask for the fields."""
    random = Random(7)
    return [
        Job(
            id=f"job-{number}",
            prompt_token_ids=[random.randrange(10, 1000) for _ in range(PROMPT_TOKENS)],
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            seed=number,
            **(fields if number < num_asking else {}),
        )
        for number in range(num_rows)
    ]


def time_steps(engine: Engine, jobs: list[Job], steps: int) -> StepTime:
    """Of ``steps`` steps in which all jobs decode."""
    sequences = [engine.sequence_of(job) for job in jobs]
    for sequence in sequences:
        engine.add(sequence)
    while min(len(sequence.output_ids) for sequence in sequences) < FIRST_TOKENS:
        engine.step()
    device_seconds, started = engine.counters.device_seconds, time.perf_counter()
    for _ in range(steps):
        engine.step()
    passed = time.perf_counter() - started
    on_gpu = engine.counters.device_seconds - device_seconds
    for sequence in sequences:
        engine.drop(sequence)
    engine.collect(all_launched=True)
    return StepTime(1000 * passed / steps, 1000 * on_gpu / steps)


def main() -> None:
    """Measure and print the table; a person's mistake is answered with a sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    for name in ("--load-format", "--device", "--dtype"):
        parser.add_argument(name)
    for name, default in (("--rows", 256), ("--steps", 100), ("--rounds", 3)):
        parser.add_argument(name, type=int, default=default, metavar="N")
    flags = vars(parser.parse_args())
    rows, steps, rounds = flags.pop("rows"), flags.pop("steps"), flags.pop("rounds")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        # None of the jobs is to wait for room: pages of 16 tokens, and a step that is in flight.
        tokens = PROMPT_TOKENS + FIRST_TOKENS + steps + 32
        config = WorkerConfig.from_flags(
            {
                "model_path": given.pop("model"),
                "max_running_requests": rows,
                "max_total_tokens": max(rows * tokens, PROMPT_TOKENS + MAX_TOKENS),
                "context_length": PROMPT_TOKENS + MAX_TOKENS,
                "disable_prefix_cache": True,
                **given,
            }
        )
        engine = Engine(config)
        leave_alone_what_stays()  # As the command `worker` does.
    except LorryError as error:
        sys.exit(f"error: {error}")
    times: dict[tuple[str, int], list[StepTime]] = defaultdict(list)
    cases = [(name, asking) for _ in range(rounds) for name in FIELDS for asking in (rows, 1)]
    for name, asking in track(cases, description="fields", transient=True):
        jobs = make_jobs(FIELDS[name], rows, asking)
        times[name, asking].append(time_steps(engine, jobs, steps))
    table = Table(f"ms a step of {rows} rows")
    for column in (f"{rows} ask", "on the GPU", "1 asks", "on the GPU"):
        table.add_column(column, justify="right")
    for name in FIELDS:
        cells = []
        for asking in (rows, 1):
            cells += [f"{median(part):.2f}" for part in zip(*times[name, asking], strict=True)]
        table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
