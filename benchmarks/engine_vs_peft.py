"""This engine against transformers + PEFT: the same CPU, model, adapters and prompts, in one run.

    python -m benchmarks.engine_vs_peft [--jobs 48] [--tokens 64]

48 chat prompts, a third for each of the three example adapters (ranks 4, 8 and 32), 64 new tokens
each, greedy, float32. PEFT runs them as one batch by `generate(adapter_names=...)`, left-padded;
Lorry's engine runs the same prompts at once by continuous batching. Each side has a process of its
own; they run in turn, once to warm up and then three times. The table shows medians of output
tokens a second.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import structlog
import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2 import model_folder
from schemas.job import Job
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.host_memory import keep_freed_memory
from worker.lora_path import LoraPath

ADAPTERS = {
    path.name: path
    for path in sorted((Path(__file__).parent.parent / "examples" / "adapters").iterdir())
    if path.is_dir()
}
ROUNDS = 3

_TOPICS = ("bicycles", "tea", "volcanoes", "chess", "bridges", "owls", "glass", "tides")
_QUESTIONS = (
    "Explain in a few sentences what one should know about {}.",
    "Write a short story for children about {}.",
    "List the most common mistakes that beginners make with {}, and how to avoid them.",
    "How many {} are in a table called {} with the columns name, age and colour?",
    "My order of {} has not arrived yet. What should I do now?",
    "Compare {} of today with those of a hundred years ago, in a friendly tone.",
)


def make_jobs(count: int, num_tokens: int, loras: list[str | None]) -> list[Job]:
    """Chat prompts of different lengths, the adapters in turn."""
    questions = [q.format(t, t) for t in _TOPICS for q in _QUESTIONS]
    return [
        Job(
            id=f"{i}",
            lora=loras[i % len(loras)],
            messages=[{"role": "user", "content": questions[i % len(questions)]}],
            max_tokens=num_tokens,
            ignore_eos=True,
        )
        for i in range(count)
    ]


class Peft:
    """transformers + PEFT with all adapters loaded."""

    def __init__(self, folder: Path, num_jobs: int) -> None:
        """``num_jobs`` does not matter: a batch is as large as it is."""
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        (first, path), *others = ADAPTERS.items()
        self._model = PeftModel.from_pretrained(base, path, adapter_name=first).eval()
        for name, path in others:
            self._model.load_adapter(path, adapter_name=name)

    def tokens_per_second(self, jobs: list[Job], num_tokens: int) -> float:
        start = time.perf_counter()
        chats = [[message.model_dump() for message in job.messages or []] for job in jobs]
        inputs = self._tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        with torch.inference_mode():
            out = self._model.generate(
                **inputs,
                adapter_names=[job.lora or "__base__" for job in jobs],
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
            )
        new_tokens = (out.shape[1] - inputs["input_ids"].shape[1]) * len(jobs)
        return new_tokens / (time.perf_counter() - start)


class Lorry:
    """This engine, all prompts running at once."""

    def __init__(self, folder: Path, num_jobs: int) -> None:
        loras = tuple(LoraPath(lora_name=n, lora_path=str(p)) for n, p in ADAPTERS.items())
        self._engine = Engine(
            WorkerConfig(
                model_path=folder,
                lora_paths=loras,
                max_running_requests=num_jobs,
                device="cpu",
                disable_prefix_cache=True,  # The other side computes every prompt, every round.
            )
        )

    def tokens_per_second(self, jobs: list[Job], num_tokens: int) -> float:
        start = time.perf_counter()
        sequences = [self._engine.sequence_of(job) for job in jobs]
        for sequence in sequences:
            self._engine.add(sequence)
        finished = 0
        while finished < len(jobs):
            finished += len(self._engine.step())
        for sequence in sequences:
            self._engine.tokenizer.decode(sequence.output_ids)
        new_tokens = sum(len(sequence.output_ids) for sequence in sequences)
        return new_tokens / (time.perf_counter() - start)


SIDES = {"Lorry": Lorry, "transformers + PEFT": Peft}
MIXTURES: dict[str, list[str | None]] = {"3 adapters": list(ADAPTERS), "base model": [None]}


def serve(side: str, num_jobs: int, num_tokens: int) -> None:
    """Measure one side once for every line of standard input, the name of a mixture."""
    if side == "Lorry":
        keep_freed_memory()  # As the command `worker` does.
    engine = SIDES[side](model_folder(), num_jobs)
    for line in sys.stdin:
        jobs = make_jobs(num_jobs, num_tokens, MIXTURES[line.strip()])
        print(engine.tokens_per_second(jobs, num_tokens), flush=True)


def measure(num_jobs: int, num_tokens: int) -> dict[tuple[str, str], list[float]]:
    """Tokens a second by mixture and side, one figure a round."""
    sizes = ("--jobs", str(num_jobs), "--tokens", str(num_tokens))
    processes = {
        side: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine_vs_peft", *sizes, "--side", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side in SIDES
    }
    rates: dict[tuple[str, str], list[float]] = {}
    for number in range(ROUNDS + 1):
        for mixture in MIXTURES:
            for side, process in processes.items():
                assert process.stdin
                assert process.stdout
                print(mixture, file=process.stdin, flush=True)
                rate = float(process.stdout.readline())
                print(f"round {number} of {ROUNDS}, {mixture}, {side}: {rate:.0f}", file=sys.stderr)
                if number:
                    rates.setdefault((mixture, side), []).append(rate)
    for process in processes.values():
        process.communicate()
    return rates


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    if flags.side:
        serve(flags.side, flags.jobs, flags.tokens)
        return
    model_folder()
    rates = measure(flags.jobs, flags.tokens)
    table = Table("running", "adapters", *(f"{side}, tok/s" for side in SIDES), "ratio")
    for mixture in MIXTURES:
        ours, theirs = (statistics.median(rates[mixture, side]) for side in SIDES)
        table.add_row(
            f"{flags.jobs}", mixture, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f} x"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
