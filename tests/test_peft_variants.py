"""Adapters that change more than the layers' linear modules, mixed with others, against PEFT."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.job import Job
from tests.test_engine import expected, make_engine, random_jobs, run
from tests.tiny_models import ALL_MODULES, Oracle, OracleOfEach, make_adapter, make_llama
from worker.batch import Batch
from worker.engine import Engine
from worker.step_graphs import Output

ENDS = ("embed_tokens", "lm_head")

#: What ``make_adapter`` is told, beside a seed.
ADAPTERS: dict[str, dict[str, object]] = {
    "plain": {"rank": 3},
    "embeddings": {"rank": 5, "target_modules": ["embed_tokens"]},
    "head": {"rank": 13, "target_modules": ["lm_head"]},
    "all": {
        "rank": 7,
        "target_modules": [*ALL_MODULES, *ENDS],
        "rank_pattern": {"lm_head": 1, "embed_tokens": 19},
        "alpha_pattern": {"lm_head": -2, "embed_tokens": 30},
    },
    "rank-stabilized": {
        "rank": 33,
        "use_rslora": True,
        "target_modules": r".*embed_tokens|lm_head|.*[kv]_proj",
        "rank_pattern": {"model.embed_tokens": 2},
    },
    "dora": {"rank": 5, "use_dora": True},
    "dora-of-some": {
        "rank": 18,
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ["k_proj", "up_proj", "o_proj", "down_proj"],
        "rank_pattern": {"k_proj": 1, "1.mlp.up_proj": 33},
        "layers_to_transform": [0, 2],
    },
    "dora-of-all": {"rank": 4, "use_dora": True, "target_modules": [*ALL_MODULES, *ENDS]},
    "own-embeddings": {
        "rank": 6,
        "target_modules": ["v_proj"],
        "modules_to_save": ["embed_tokens"],
    },
    "own-head": {
        "rank": 3,
        "use_dora": True,
        "target_modules": ["embed_tokens", "o_proj"],
        "modules_to_save": ["lm_head"],
    },
    "own-ends": {"rank": 2, "target_modules": ["q_proj"], "modules_to_save": list(ENDS)},
    "tied-lora": {
        "rank": 9,
        "use_rslora": True,
        "target_modules": ["lm_head", "up_proj"],
        "ensure_weight_tying": True,
    },
    "tied-ends": {
        "rank": 2,
        "target_modules": ["k_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "plain-again": {"rank": 40, "target_modules": ["q_proj", "up_proj", "down_proj"]},
}

#: A logit ends a chain of about 30 products, each of at most 211 + 40 terms whose roundings in
#: float32 have random signs: 30 * sqrt(251) * 2^-24 of the largest is 2^-15, and this is twice it.
TOLERANCE = 2.0**-14


@contextmanager
def ignoring_warnings() -> Iterator[None]:
    """PEFT warns that it saves embeddings along, and that tied ones come apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with ignoring_warnings():
        return {
            name: make_adapter(
                model_folder, tmp_path_factory.mktemp("adapter"), seed=seed, **settings
            )
            for seed, (name, settings) in enumerate(ADAPTERS.items())
        }


@pytest.fixture(scope="module")
def oracle(model_folder: Path, adapters: dict[str, Path]) -> Oracle:
    with ignoring_warnings():
        return OracleOfEach(model_folder, adapters)


def jobs_of(names: list[str | None], count: int) -> list[Job]:
    jobs = random_jobs(count)
    return [
        job.model_copy(update={"lora": name}) for job, name in zip(jobs, cycle(names), strict=False)
    ]


@pytest.mark.parametrize(
    ("max_loras_per_batch", "max_loaded_loras"), [(len(ADAPTERS), None), (2, 3)]
)
def test_a_batch_of_all_kinds_gives_the_tokens_that_peft_gives(
    model_folder: Path,
    adapters: dict[str, Path],
    oracle: Oracle,
    max_loras_per_batch: int,
    max_loaded_loras: int | None,
) -> None:
    """With few slots adapters leave them and come back, and with a limit they are read again."""
    jobs = jobs_of([None, *ADAPTERS], 40)
    limits = {"max_loras_per_batch": max_loras_per_batch, "max_loaded_loras": max_loaded_loras}
    engine = make_engine(model_folder, adapters, chunked_prefill_size=256, **limits)
    assert run(engine, jobs, join_every=15) == expected(oracle, jobs)
    assert engine.counters.max_adapters_in_batch == max_loras_per_batch


def test_a_replaced_adapter_answers_as_the_new_one_and_what_runs_as_the_old_one(
    model_folder: Path, adapters: dict[str, Path], oracle: Oracle
) -> None:
    jobs = jobs_of(["dora-of-all"], 4)
    engine = make_engine(model_folder, adapters, max_loras_per_batch=3)
    old = [engine.sequence_of(job) for job in jobs]
    for sequence in old:
        engine.add(sequence)
    engine.step()
    engine.adapters.serve(
        "dora-of-all", engine.adapters.read("dora-of-all", adapters["all"], version=2)
    )
    new = [engine.sequence_of(job) for job in jobs]
    for sequence in new:
        engine.add(sequence)
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.step()
    assert {s.job.id: s.output_ids for s in old} == expected(oracle, jobs)
    as_new = [job.model_copy(update={"lora": "all"}) for job in jobs]
    assert {s.job.id: s.output_ids for s in new} == expected(oracle, as_new)


def test_weights_on_the_device_are_given_back_with_their_adapter(
    model_folder: Path, adapters: dict[str, Path]
) -> None:
    engine = make_engine(model_folder, adapters)
    jobs = jobs_of(["dora-of-all"], 3)
    run(engine, jobs)
    adapter = engine.adapters.get("dora-of-all")
    assert adapter
    gains = [weakref.ref(tensor) for tensor in adapter.on_device.gains.values()]
    assert len(gains) == 6
    del adapter
    engine.adapters.keep_only(["plain"])
    engine.step()
    gc.collect()
    assert [gain() for gain in gains] == [None] * 6


def test_a_batch_of_all_kinds_gives_the_logits_that_peft_gives(
    model_folder: Path,
    adapters: dict[str, Path],
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = [job.model_copy(update={"max_tokens": 1}) for job in jobs_of([None, *ADAPTERS], 24)]
    limits = {"chunked_prefill_size": 2048, "max_loras_per_batch": len(ADAPTERS)}
    engine = make_engine(model_folder, adapters, **limits)
    for job_id, found in logits_of(engine, jobs, monkeypatch).items():
        job = next(job for job in jobs if job.id == job_id)
        wanted = oracle.logits(job.prompt_token_ids or [], job.lora)
        atol = TOLERANCE * wanted.abs().max().item()
        torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def logits_of(
    engine: Engine, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """Of the first token of each job, all in one batch; by job id."""
    found = {}
    run_batch = engine._runner._run

    def recorded(batch: Batch, step: Any) -> Output:
        logits, tokens = run_batch(batch, step)
        found.update({s.job.id: row.cpu() for s, row in zip(batch.sampled, logits, strict=True)})
        return logits, tokens

    monkeypatch.setattr(engine._runner, "_run", recorded)
    run(engine, jobs, join_every=len(jobs))
    assert engine.counters.batches == 1
    return found


def test_all_kinds_answer_differently(oracle: Oracle) -> None:
    """Else a mix-up of adapters would go unseen in the tests above."""
    answers = {tuple(oracle.generate([5, 6, 7], name, 12)) for name in [None, *ADAPTERS]}
    assert len(answers) == len(ADAPTERS) + 1
