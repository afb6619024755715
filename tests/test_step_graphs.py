"""Steps replayed from prepared numbers, without a GPU: what is recorded is run anew each time.

The kernels that graphs need are interpreted, and A stands under the base weights, as on a GPU.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.job import Job
from tests.tiny_models import ALL_MODULES, Oracle, OracleOfEach, make_adapter, make_llama
from worker import assembly
from worker.adapters.slots import rank_levels
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.lora_path import LoraPath
from worker.model_runner import ModelRunner
from worker.sequence import Sequence
from worker.step_graphs import Output, StepGraphs

if torch.cuda.is_available():
    pytest.skip("there tests/test_engine.py runs the real graphs", allow_module_level=True)

ADAPTERS = {"three": (3, ("q_proj", "up_proj", "down_proj")), "five": (5, ("v_proj", "o_proj"))}
MAX_RUNNING, MAX_PREFILL_TOKENS = 5, 24


def record(run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
    logits, tokens = run()

    def run_again() -> None:
        tokens.copy_(run()[1])

    return (logits, tokens), run_again


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_adapter(
            model_folder,
            tmp_path_factory.mktemp(name),
            rank=rank,
            seed=seed,
            target_modules=modules,
        )
        for seed, (name, (rank, modules)) in enumerate(ADAPTERS.items())
    }


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[bool, bool, bool]]:
    """Counts steps by (with prompts, with adapters, replayed)."""
    counts: Counter[tuple[bool, bool, bool]] = Counter()
    replay = StepGraphs.replay

    def counted(graphs: StepGraphs, step: Any, *, num_ranks: int) -> Output | None:
        output = replay(graphs, step, num_ranks=num_ranks)
        counts[len(step.prefill_tiles) > 0, num_ranks > 0, output is not None] += 1
        # The next replay overwrites them; a GPU has copied them to the host by then.
        return output and (output[0].clone(), output[1].clone())

    monkeypatch.setattr(StepGraphs, "replay", counted)
    return counts


@pytest.fixture
def engine(
    model_folder: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Engine:
    monkeypatch.setattr(assembly, "_stacks_adapters", lambda device: True)
    engine = Engine(
        WorkerConfig(
            model_path=model_folder,
            lora_paths=tuple(
                LoraPath(lora_name=name, lora_path=str(path)) for name, path in adapters.items()
            ),
            device="cpu",
            context_length=64,
            max_total_tokens=256,
            max_running_requests=MAX_RUNNING,
            chunked_prefill_size=MAX_PREFILL_TOKENS,
            max_loras_per_batch=2,
        )
    )
    make_graphs(engine)
    engine._max_launched = 1  # Launched ahead, as on a GPU.
    return engine


def make_graphs(engine: Engine) -> None:
    assert engine.slots
    engine._runner.make_graphs(
        record,
        max_prefill_tokens=MAX_PREFILL_TOKENS,
        max_adapters=2,
        rank_levels=rank_levels(engine.slots.capacity),
    )


def make_jobs(count: int) -> list[Job]:
    names = [None, *ADAPTERS]
    return [
        Job(
            id=f"job-{i}",
            lora=names[i % 3],
            prompt_token_ids=[(7 * i + j) % 211 for j in range(1 + 5 * i % 30)],
            max_tokens=3 + i % 5,
        )
        for i in range(count)
    ]


def finish(engine: Engine, jobs: list[Job]) -> list[Sequence]:
    sequences = [engine.sequence_of(job) for job in jobs]
    for sequence in sequences:
        engine.add(sequence)
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.step()
    return sequences


def run(engine: Engine, jobs: list[Job]) -> dict[str, list[int]]:
    return {sequence.job.id: sequence.output_ids for sequence in finish(engine, jobs)}


def expected(oracle: Oracle, jobs: list[Job]) -> dict[str, list[int]]:
    return {
        job.id: oracle.generate(job.prompt_token_ids or [], job.lora, job.max_tokens)
        for job in jobs
    }


def test_replayed_steps_give_the_tokens_that_peft_gives(
    engine: Engine,
    model_folder: Path,
    adapters: dict[str, Path],
    replays: Counter[tuple[bool, bool, bool]],
) -> None:
    jobs = make_jobs(9)
    assert run(engine, jobs) == expected(Oracle(model_folder, adapters), jobs)
    assert replays[True, True, True]
    assert replays[False, True, True]
    assert replays.keys() <= {(True, True, True), (False, True, True), (False, False, True)}
    assert engine.scheduler.pool.num_used == 0


def test_replayed_steps_of_the_base_model_leave_each_others_keys_alone(
    engine: Engine,
    model_folder: Path,
    adapters: dict[str, Path],
    replays: Counter[tuple[bool, bool, bool]],
) -> None:
    jobs = [job.model_copy(update={"lora": None}) for job in make_jobs(9)]
    assert run(engine, jobs) == expected(Oracle(model_folder, adapters), jobs)
    assert replays.keys() == {(True, False, True), (False, False, True)}


def test_replayed_steps_sample_and_score_as_those_without_graph_do(
    engine: Engine,
    model_folder: Path,
    adapters: dict[str, Path],
    replays: Counter[tuple[bool, bool, bool]],
) -> None:
    fields: list[dict[str, Any]] = [
        {"temperature": 1.0, "n": 2},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "prompt_logprobs": 2},
        {"logprobs": 3, "prompt_logprobs": 0},
        {"temperature": 2.0, "min_p": 0.1, "presence_penalty": 1.0, "logprobs": 1},
        {},
    ]
    jobs = [
        job.model_copy(update={"max_tokens": 6} | fields[number % len(fields)])
        for number, job in enumerate(make_jobs(10))
    ]
    loras = tuple(LoraPath(lora_name=name, lora_path=str(path)) for name, path in adapters.items())
    plain = Engine(
        WorkerConfig(model_path=model_folder, lora_paths=loras, device="cpu", max_total_tokens=1024)
    )
    found, wanted = ({s.job.id: s for s in finish(e, jobs)} for e in (engine, plain))
    assert replays[True, True, True]
    assert replays[False, True, True]
    for job in jobs:
        for one, other in zip(found[job.id].answers, wanted[job.id].answers, strict=True):
            assert one.output_ids == other.output_ids
            for told, expected_ in (
                (one.logprobs, other.logprobs),
                (one.prompt_logprobs, other.prompt_logprobs),
            ):
                numbers = [number.logprob for number in expected_]
                assert [number.logprob for number in told] == pytest.approx(numbers, abs=1e-4)
                assert [n.top_ids for n in told] == [n.top_ids for n in expected_]


def test_steps_of_adapters_that_graphs_do_not_hold_run_without_one(
    engine: Engine,
    model_folder: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    replays: Counter[tuple[bool, bool, bool]],
) -> None:
    """Base jobs and others beside them too; alone they are replayed again."""
    modules = ["q_proj", "v_proj", "up_proj", "down_proj"]
    dora = make_adapter(
        model_folder, tmp_path, rank=4, seed=7, target_modules=modules, use_dora=True
    )
    engine.adapters.serve("dora", engine.adapters.read("dora", dora, version=1))
    jobs = make_jobs(6)
    jobs[1] = jobs[1].model_copy(update={"lora": "dora", "max_tokens": 9})
    oracle = Oracle(model_folder, adapters | {"dora": dora})
    assert run(engine, jobs) == expected(oracle, jobs)
    replays.clear()
    assert run(engine, jobs[1:2]) == expected(oracle, jobs[1:2])
    assert not replays
    assert run(engine, jobs[2:]) == expected(oracle, jobs[2:])
    assert replays[False, True, True]


def test_steps_without_graph_run_the_kernels_of_a_gpu_for_adapters_of_all_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "_stacks_adapters", lambda device: True)
    monkeypatch.setattr(
        ModelRunner, "_tiles", lambda _, numbers: numbers.view(-1, 4) if len(numbers) else None
    )
    model_folder = make_llama(tmp_path / "model", num_hidden_layers=1)
    kinds: dict[str, dict[str, Any]] = {
        "all": {"rank": 3, "target_modules": [*ALL_MODULES, "embed_tokens", "lm_head"]},
        "dora": {
            "rank": 5,
            "target_modules": ["embed_tokens", "v_proj", "lm_head"],
            "use_dora": True,
        },
        "own": {"rank": 2, "modules_to_save": ["embed_tokens", "lm_head"]},
        "plain": {"rank": 4},
        "embedding": {"rank": 8, "target_modules": ["embed_tokens"]},
        "head": {"rank": 7, "target_modules": ["lm_head"]},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it saves embeddings along.
        adapters = {
            name: make_adapter(model_folder, tmp_path / name, seed=seed, **settings)
            for seed, (name, settings) in enumerate(kinds.items())
        }
    engine = Engine(
        WorkerConfig(
            model_path=model_folder,
            lora_paths=tuple(
                LoraPath(lora_name=name, lora_path=str(path)) for name, path in adapters.items()
            ),
            device="cpu",
            context_length=64,
            max_total_tokens=512,
            max_loras_per_batch=2,  # So that adapters stand where others of other modules stood.
        )
    )
    assert engine.slots
    for by_segments in (False, True):  # The warm-up compiles them all.
        engine._runner._run_empty(7, engine.slots.capacity, by_segments=by_segments)
    names = ["all", "dora", "plain", "embedding", "own", None, "all", "plain", "head"]
    jobs = [
        job.model_copy(update={"lora": name, "max_tokens": 2})
        for job, name in zip(make_jobs(len(names)), names, strict=True)
    ]
    assert run(engine, jobs) == expected(OracleOfEach(model_folder, adapters), jobs)


def test_a_step_with_more_prompts_than_its_graph_holds_runs_without_one(
    engine: Engine,
    model_folder: Path,
    adapters: dict[str, Path],
    replays: Counter[tuple[bool, bool, bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the step tells the device, its new pages among it, must not be lost."""
    monkeypatch.setattr("worker.step_graphs._MAX_CHUNKS", 0)
    make_graphs(engine)
    jobs = make_jobs(7)
    assert run(engine, jobs) == expected(Oracle(model_folder, adapters), jobs)
    assert replays[True, True, True]
    assert replays[True, True, False]
    assert replays[False, True, True]
