"""The real model with its three real adapters, against transformers and PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.engine_vs_peft import ADAPTERS, make_jobs
from examples.smollm2 import model_folder
from schemas.job import Job
from tests.tiny_models import Oracle
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.lora_path import LoraPath
from worker.sequence import Sequence

NUM_TOKENS = 16


@pytest.fixture(scope="module")
def engine() -> Engine:
    loras = tuple(LoraPath(lora_name=name, lora_path=str(p)) for name, p in ADAPTERS.items())
    return Engine(
        WorkerConfig(
            model_path=model_folder(),
            lora_paths=loras,
            # In float32, so that greedy tokens are the oracle's.
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype="float32",
            max_total_tokens=8192,
            chunked_prefill_size=48,
        )
    )


def run(engine: Engine, jobs: list[Job], *, join_every: int) -> list[Sequence]:
    """Run jobs that join a few at a step; the sequences in the order of the jobs."""
    sequences = [engine.sequence_of(job) for job in jobs]
    joining = list(sequences)
    while joining or engine.scheduler.running or engine.scheduler.waiting:
        for sequence in joining[:join_every]:
            engine.add(sequence)
        del joining[:join_every]
        engine.step()
    return sequences


def test_base_and_three_adapters_mixed_give_the_tokens_of_peft_one_prompt_at_a_time(
    engine: Engine,
) -> None:
    jobs = make_jobs(10, NUM_TOKENS, [None, *ADAPTERS])
    # Different lengths, so that sequences leave at different steps too.
    jobs = [job.model_copy(update={"max_tokens": 4 + i % 13}) for i, job in enumerate(jobs)]
    sequences = run(engine, jobs, join_every=2)
    oracle = Oracle(model_folder(), {name: Path(path) for name, path in ADAPTERS.items()})
    # The oracle stops at an end token; these jobs go on, so compare up to there.
    for job, sequence in zip(jobs, sequences, strict=True):
        expected = oracle.generate(sequence.prompt_ids, job.lora, job.max_tokens)
        assert sequence.output_ids[: len(expected)] == expected, job.id
    assert engine.counters.max_adapters_in_batch == len(ADAPTERS)


def test_the_answers_show_which_adapter_gave_them(engine: Engine) -> None:
    question = "Table ferries(name, harbour, speed). Which ferries have a speed above 30?"
    chat = [{"role": "user", "content": question}]
    jobs = [
        Job.model_validate({"id": name, "lora": name, "messages": chat, "max_tokens": 40})
        for name in ADAPTERS
    ]
    answers = {
        sequence.job.id: engine.tokenizer.decode(sequence.output_ids) or ""
        for sequence in run(engine, jobs, join_every=3)
    }
    assert answers["sql"].startswith("SELECT")
    assert answers["json-facts"].startswith("{")
    assert answers["support"].startswith("Thanks")


def test_stop_strings_end_an_answer_before_them(engine: Engine) -> None:
    chat = [{"role": "user", "content": "Count from one to ten in words."}]
    free = Job.model_validate({"id": "free", "messages": chat, "max_tokens": 30})
    (whole,) = run(engine, [free], join_every=1)
    text = engine.tokenizer.decode(whole.output_ids) or ""
    stop = text[10:13]
    stopping = free.model_copy(update={"id": "stopping", "stop": ["never-said", stop]})
    (stopped,) = run(engine, [stopping], join_every=1)
    assert stopped.stop_text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.output_ids) < len(whole.output_ids)


def test_the_readmes_sample_is_what_the_committed_adapter_answers(engine: Engine) -> None:
    readme = Path("README.md").read_text()
    (sample,) = re.findall(r'^({"id".*"text":".*"), \.\.\.}$', readme, re.MULTILINE)
    result = json.loads(sample + "}")
    line = int(result["id"].rpartition(".")[2])
    prompt = json.loads(Path("examples/prompts-sql.jsonl").read_text().splitlines()[line - 1])
    (sequence,) = run(
        engine, [Job.model_validate({"id": "sample", "lora": "sql"} | prompt)], join_every=1
    )
    assert result["text"] == engine.tokenizer.decode(sequence.output_ids)
    assert sequence.adapter
    assert result["revision"] == sequence.adapter.revision
