"""The engine against transformers and PEFT, on tiny random models with large random adapters."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from schemas.errors import BadInput, JobError
from schemas.job import Job
from tests.tiny_models import Oracle, make_adapter, make_llama
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.lora_path import LoraPath
from worker.sequence import Sequence
from worker.step_graphs import Output, StepGraphs

#: `make test-gpu` runs these tests on a GPU; in float32, so that greedy tokens are the oracle's.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Rank and target modules of each adapter: odd ranks, and subsets that leave out parts of a fused
#: projection.
ADAPTERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "three": (3, ("k_proj", "down_proj")),
    "eight": (8, ("q_proj", "v_proj", "up_proj")),
    "sixty-four": (64, ("v_proj", "o_proj", "gate_proj")),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


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


@pytest.fixture(scope="module")
def oracle(model_folder: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(model_folder, adapters)


def make_engine(model_folder: Path, adapters: dict[str, Path], **flags: object) -> Engine:
    loras = tuple(LoraPath(lora_name=n, lora_path=str(path)) for n, path in adapters.items())
    settings = {
        "max_total_tokens": 4096,
        "chunked_prefill_size": 32,
        "max_running_requests": 24,
        "device": DEVICE,
    }
    return Engine(WorkerConfig(model_path=model_folder, lora_paths=loras, **(settings | flags)))


def test_the_repository_of_the_base_model_is_that_of_the_flag_or_of_its_config(
    model_folder: Path, tmp_path: Path
) -> None:
    def repository(folder: Path, **flags: object) -> str | None:
        return make_engine(folder, {}, **flags).adapters.loader.repository

    assert repository(model_folder) is None
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    for name, expected in (("acme/llama", "acme/llama"), ("/models/llama", None)):
        (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": name}))
        assert repository(folder) == expected
        assert repository(folder, repository="other/llama") == "other/llama"


@pytest.mark.parametrize(
    ("max_rank", "max_adapters"), [(10_000_000, 8), (8, 10_000_000), (10**30, 8), (8, 10**30)]
)
def test_slots_that_no_memory_holds_are_refused_with_their_bytes_and_the_flags(
    model_folder: Path, max_rank: int, max_adapters: int
) -> None:
    with pytest.raises(BadInput) as error:
        make_engine(
            model_folder,
            {},
            enable_lora=True,
            lora_target_modules=("all",),
            max_lora_rank=max_rank,
            max_loras_per_batch=max_adapters,
        )
    assert re.fullmatch(
        f"--max-lora-rank {max_rank} and --max-loras-per-batch {max_adapters}: slots for them take"
        r" [\d,.]+ GB, which do not fit in memory together with the base model. Lower one of them,"
        " or serve a smaller model.",
        str(error.value),
    )


@pytest.mark.parametrize(
    ("message", "raised"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.", BadInput),
        ("a fault of ours", RuntimeError),
    ],
)
def test_memory_that_the_allocator_does_not_have_for_slots_is_told_likewise(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, message: str, raised: type[Exception]
) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("worker.assembly.AdapterSlots", fail)
    flags = {"enable_lora": True, "lora_target_modules": ("all",), "max_lora_rank": 8}
    with pytest.raises(raised, match=r"slots for them take [\d,.]+ GB|a fault of ours"):
        make_engine(model_folder, {}, **flags)


def random_jobs(count: int, *, max_prompt: int = 90, max_tokens: int = 40) -> list[Job]:
    rng = random.Random(3)
    names = [None, *ADAPTERS]
    return [
        Job(
            id=f"job-{i}",
            lora=names[i % len(names)],
            prompt_token_ids=[rng.randrange(211) for _ in range(rng.randint(1, max_prompt))],
            max_tokens=rng.randint(1, max_tokens),
        )
        for i in range(count)
    ]


def run(engine: Engine, jobs: list[Job], *, join_every: int = 2) -> dict[str, list[int]]:
    """Run jobs that join a few at a time, so that prefill and decode mix; tokens by job id."""
    joining = [engine.sequence_of(job) for job in jobs]
    finished: list[Sequence] = []
    while len(finished) < len(jobs):
        for sequence in joining[:join_every]:
            engine.add(sequence)
        del joining[:join_every]
        finished += engine.step()
    return {sequence.job.id: sequence.output_ids for sequence in finished}


def expected(oracle: Oracle, jobs: list[Job]) -> dict[str, list[int]]:
    return {
        job.id: oracle.generate(job.prompt_token_ids or [], job.lora, job.max_tokens)
        for job in jobs
    }


def test_a_mixed_batch_gives_the_tokens_that_peft_gives_one_prompt_at_a_time(
    model_folder: Path, adapters: dict[str, Path], oracle: Oracle
) -> None:
    jobs = random_jobs(40)
    engine = make_engine(model_folder, adapters)
    assert run(engine, jobs) == expected(oracle, jobs)
    assert engine.counters.max_adapters_in_batch == len(adapters)


def test_fewer_slots_than_adapters_change_no_token(
    model_folder: Path, adapters: dict[str, Path], oracle: Oracle
) -> None:
    jobs = random_jobs(20)
    engine = make_engine(model_folder, adapters, max_loras_per_batch=2)
    assert run(engine, jobs) == expected(oracle, jobs)
    assert engine.counters.max_adapters_in_batch == 2


@pytest.mark.parametrize(("policy", "left"), [("lru", "eight one"), ("fifo", "eight three")])
def test_the_policy_says_which_adapter_leaves_its_slot(
    model_folder: Path, adapters: dict[str, Path], policy: str, left: str
) -> None:
    # Of one size in the slots: smaller ones would share the place of a larger one.
    small = {name: adapters[name] for name in ("one", "three", "eight")}
    engine = make_engine(model_folder, small, max_loras_per_batch=2, lora_eviction_policy=policy)
    for number, name in enumerate(("one", "three", "one", "eight")):
        run(engine, [Job(id=f"{number}", lora=name, prompt_token_ids=[5], max_tokens=1)])
    assert " ".join(sorted(engine.resident)) == left


def test_adapters_that_take_turns_in_a_slot_are_counted_there(
    model_folder: Path, adapters: dict[str, Path]
) -> None:
    two = {name: adapters[name] for name in ("one", "three")}
    engine = make_engine(model_folder, two, max_loras_per_batch=1)
    for number, name in enumerate(("one", "three") * 3):
        run(engine, [Job(id=f"{number}", lora=name, prompt_token_ids=[5], max_tokens=1)])
    counts = engine.adapters.counts
    assert [
        (c.loads, c.slot_loads, c.slot_evictions) for c in (counts["one"], counts["three"])
    ] == [
        (1, 3, 3),
        (1, 3, 2),
    ]
    engine.adapters.keep_only(["one"])
    engine.schedule()
    assert engine.resident == []
    assert "three" not in engine.adapters.counts, "it was unloaded, and made room for none"


def test_an_adapter_pinned_while_others_hold_all_slots_gets_the_next_free_one(
    model_folder: Path, adapters: dict[str, Path], oracle: Oracle
) -> None:
    engine = make_engine(model_folder, adapters, max_loras_per_batch=2)
    lengths = {"sixty-four": 30, "three": 12, "eight": 5, "one": 5}
    jobs = {
        name: Job(id=name, lora=name, prompt_token_ids=[5, 6, 7], max_tokens=length)
        for name, length in lengths.items()
    }
    finished: list[Sequence] = []

    def begin(*names: str) -> None:
        for name in names:
            engine.add(engine.sequence_of(jobs[name]))
        finished.extend(engine.step())

    begin("sixty-four", "three")
    engine.adapters.pin(["eight"])
    begin("one", "eight")
    assert engine.slots
    assert not engine.slots.pinned
    while len(finished) < len(jobs):
        finished += engine.step()
    assert [sequence.job.id for sequence in finished] == ["three", "eight", "sixty-four", "one"]
    assert {s.job.id: s.output_ids for s in finished} == expected(oracle, list(jobs.values()))
    assert engine.counters.max_adapters_in_batch == 2
    assert "eight" in engine.resident


def test_jobs_and_tokens_of_an_adapter_are_counted(
    model_folder: Path, adapters: dict[str, Path]
) -> None:
    engine = make_engine(model_folder, adapters)
    ids = {"prompt_token_ids": [5, 6, 7], "max_tokens": 5}
    jobs = [
        Job(id="one-answer", lora="one", **ids),
        Job(id="three", lora="one", n=3, temperature=1.0, **ids),
        Job(id="of-the-base-model", **ids),
    ]
    run(engine, jobs)
    (counts,) = [c for c in engine.adapters.counts.values() if c.requests]
    assert counts == engine.adapters.counts["one"]
    assert (counts.requests, counts.output_tokens, counts.loads) == (2, 20, 1)


def test_two_names_of_one_revision_share_a_slot_and_count_apart(
    model_folder: Path, adapters: dict[str, Path], oracle: Oracle
) -> None:
    twins = {"one": adapters["one"], "twin": adapters["one"]}
    engine = make_engine(model_folder, twins, max_loras_per_batch=1)
    lengths = {"one": 5, "twin": 7}
    jobs = {
        name: Job(id=name, lora=name, prompt_token_ids=[5, 6, 7], max_tokens=length)
        for name, length in lengths.items()
    }
    tokens = run(engine, list(jobs.values()))
    same = {name: job.model_copy(update={"lora": "one"}) for name, job in jobs.items()}
    assert tokens == expected(oracle, list(same.values()))
    assert engine.counters.max_adapters_in_batch == 1
    assert sorted(engine.resident) == ["one", "twin"]
    counts = {
        name: (c.requests, c.output_tokens, c.slot_loads)
        for name, c in engine.adapters.counts.items()
    }
    assert counts == {"one": (1, 5, 1), "twin": (1, 7, 1)}


def test_preempted_sequences_come_to_the_same_tokens(
    model_folder: Path, adapters: dict[str, Path], oracle: Oracle
) -> None:
    jobs = random_jobs(20)
    engine = make_engine(model_folder, adapters, max_total_tokens=192)
    # More than fit: each sequence comes to at most 130 tokens.
    assert run(engine, jobs, join_every=20) == expected(oracle, jobs)
    assert engine.scheduler.pool.num_used == 0


# --- Launched ahead, as on a GPU ----------------------------------------------------------------


def launching_ahead(engine: Engine) -> Engine:
    """Batches are launched before the tokens of the last one are known."""
    engine._max_launched = 1
    return engine


@pytest.mark.parametrize("max_total_tokens", [4096, 192], ids=["roomy", "preempting"])
def test_batches_launched_ahead_change_no_token(
    model_folder: Path, adapters: dict[str, Path], oracle: Oracle, max_total_tokens: int
) -> None:
    jobs = random_jobs(20)
    engine = launching_ahead(make_engine(model_folder, adapters, max_total_tokens=max_total_tokens))
    assert run(engine, jobs, join_every=20) == expected(oracle, jobs)
    assert engine.scheduler.pool.num_used == 0


def test_batches_launched_ahead_change_no_draw(
    model_folder: Path, adapters: dict[str, Path]
) -> None:
    jobs = [job.model_copy(update={"temperature": 1.5}) for job in random_jobs(12)]
    drawn = run(make_engine(model_folder, adapters), jobs)
    assert run(launching_ahead(make_engine(model_folder, adapters)), jobs) == drawn


def test_a_sequence_that_ends_while_its_next_batch_runs_ends_there(
    model_folder: Path, tmp_path: Path
) -> None:
    jobs = random_jobs(12, max_tokens=60)
    jobs = [job.model_copy(update={"lora": None}) for job in jobs]
    tokens = run(make_engine(model_folder, {}), jobs)
    eos = Counter(chain.from_iterable(tokens.values())).most_common(1)[0][0]
    folder = make_llama(tmp_path, eos_token_id=eos)
    ended = run(make_engine(folder, {}), jobs)
    assert ended != tokens
    ahead = launching_ahead(make_engine(folder, {}, max_running_requests=3))
    assert run(ahead, jobs, join_every=12) == ended
    assert ahead.scheduler.pool.num_used == 0


def test_a_sequence_dropped_while_a_batch_runs_is_forgotten(
    model_folder: Path, oracle: Oracle
) -> None:
    engine = launching_ahead(make_engine(model_folder, {}, max_running_requests=1))
    dropped, kept = (
        engine.sequence_of(Job(id=name, prompt_token_ids=[1, 2, 3], max_tokens=20))
        for name in ("dropped", "kept")
    )
    engine.add(dropped)
    for _ in range(5):
        engine.step()
    engine.drop(dropped)
    engine.add(kept)
    while not kept.finished:
        engine.step()
    assert kept.output_ids == oracle.generate([1, 2, 3], None, 20)
    assert len(dropped.output_ids) == 4


# --- On a GPU only ------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("max_loras_per_batch", [2, 8])
def test_cuda_graphs_change_no_token(
    model_folder: Path,
    adapters: dict[str, Path],
    max_loras_per_batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = random_jobs(60)
    flags = {"max_loras_per_batch": max_loras_per_batch}
    without = make_engine(model_folder, adapters, **flags)
    without._runner._graphs = None
    replays: Counter[bool] = Counter()
    replay = StepGraphs.replay

    def counted(graphs: StepGraphs, step: Any, *, num_ranks: int) -> Output | None:
        output = replay(graphs, step, num_ranks=num_ranks)
        replays[len(step.prefill_tiles) > 0] += output is not None
        return output

    monkeypatch.setattr(StepGraphs, "replay", counted)
    replayed = make_engine(model_folder, adapters, **flags)
    assert run(replayed, jobs) == run(without, jobs)
    assert replays[True]
    assert replays[False]


@on_gpu
def test_large_batches_that_shrink_by_segments_give_the_tokens_that_peft_gives(
    model_folder: Path,
    adapters: dict[str, Path],
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.step_arrays.SEGMENTED_FROM", 1)
    monkeypatch.setattr("worker.step_arrays.MAX_MIXED_ROWS", 0)
    engine = make_engine(model_folder, adapters, chunked_prefill_size=512)
    engine._runner._graphs = None
    jobs = random_jobs(30)
    assert run(engine, jobs, join_every=10) == expected(oracle, jobs)


#: bfloat16 keeps 8 bits. Some thirty roundings on the way through three layers, of weights too, add
#: up to about a hundredth of the largest logit; a mix-up of adapters or rows is as large as that.
NEAR_TIE = 0.05


@on_gpu
def test_in_bfloat16_a_job_alone_and_in_a_mixed_batch_part_at_near_ties_only(
    model_folder: Path, adapters: dict[str, Path], oracle: Oracle
) -> None:
    jobs = random_jobs(30)
    engine = make_engine(model_folder, adapters, dtype="bfloat16")
    together = run(engine, jobs, join_every=30)
    num_equal = 0
    for job in jobs:
        alone = run(engine, [job])[job.id]
        both = zip(alone, together[job.id], strict=True)
        parted = next((i for i, (one, other) in enumerate(both) if one != other), None)
        if parted is None:
            num_equal += 1
            continue
        logits = oracle.logits([*(job.prompt_token_ids or []), *alone[:parted]], job.lora)
        rivals = logits[[alone[parted], together[job.id][parted]]]
        assert logits.max() - rivals.min() <= NEAR_TIE * logits.abs().max(), job.id
    assert num_equal >= len(jobs) // 2


def test_all_adapters_answer_differently(oracle: Oracle) -> None:
    """Else a mix-up of adapters would go unseen in the tests above."""
    answers = {tuple(oracle.generate([5, 6, 7], name, 12)) for name in [None, *ADAPTERS]}
    assert len(answers) == len(ADAPTERS) + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"head_dim": 16},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}},
        {"rms_norm_eps": 1e-2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_model_of_another_shape_gives_the_tokens_that_transformers_gives(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = make_llama(tmp_path / "model", **changes)
    adapter = make_adapter(folder, tmp_path / "adapter", rank=5, seed=9)
    jobs = [job.model_copy(update={"lora": "it" if job.lora else None}) for job in random_jobs(6)]
    engine = make_engine(folder, {"it": adapter})
    assert run(engine, jobs) == expected(Oracle(folder, {"it": adapter}), jobs)


def test_rank_stabilized_adapters_are_scaled_as_peft_scales_them(
    model_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(model_folder, tmp_path, rank=16, seed=4, use_rslora=True)
    jobs = [Job(id="a", lora="rs", prompt_token_ids=[1, 2, 3], max_tokens=30)]
    engine = make_engine(model_folder, {"rs": adapter})
    assert run(engine, jobs) == expected(Oracle(model_folder, {"rs": adapter}), jobs)


def test_an_adapter_of_some_layers_leaves_the_others_as_they_are(
    model_folder: Path, tmp_path: Path
) -> None:
    """Also in the slot where an adapter of all layers was before."""
    adapters = {
        name: make_adapter(
            model_folder, tmp_path / name, rank=6, seed=seed, layers_to_transform=layers
        )
        for seed, (name, layers) in enumerate({"all": None, "two": [0, 2], "one": 1}.items())
    }
    jobs = [Job(id=name, lora=name, prompt_token_ids=[1, 2, 3], max_tokens=30) for name in adapters]
    engine = make_engine(model_folder, adapters, max_loras_per_batch=1)
    assert run(engine, jobs) == expected(Oracle(model_folder, adapters), jobs)


def test_sharded_weights_are_read(model_folder: Path, tmp_path: Path, oracle: Oracle) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(model_folder).save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    jobs = [Job(id="a", prompt_token_ids=[1, 2, 3], max_tokens=20)]
    assert run(make_engine(tmp_path, {}), jobs) == expected(oracle, jobs)


def test_a_seeded_job_draws_the_same_tokens_alone_and_in_a_batch(
    model_folder: Path, adapters: dict[str, Path]
) -> None:
    drawing = {"temperature": 1.5, "top_p": 0.9, "top_k": 50}
    jobs = [
        job.model_copy(update={"seed": 7 if i % 2 else None, **drawing})
        for i, job in enumerate(random_jobs(12))
    ]
    together = run(make_engine(model_folder, adapters), jobs)
    alone = make_engine(model_folder, adapters)
    for job in jobs:
        assert run(alone, [job]) == {job.id: together[job.id]}


def test_other_seeds_draw_other_tokens(model_folder: Path) -> None:
    engine = make_engine(model_folder, {})
    jobs = [
        Job(id=f"{seed}", prompt_token_ids=[1, 2], temperature=1.0, seed=seed, max_tokens=20)
        for seed in range(4)
    ]
    assert len({tuple(tokens) for tokens in run(engine, jobs).values()}) == 4


def test_eos_ends_a_job_unless_it_is_ignored(model_folder: Path, tmp_path: Path) -> None:
    free = make_engine(model_folder, {})
    job = Job(id="a", prompt_token_ids=[1, 2, 3], max_tokens=20)
    tokens = run(free, [job])["a"]
    eos = tokens[7]
    folder = make_llama(tmp_path, eos_token_id=eos)
    engine = make_engine(folder, {})
    sequences = [
        engine.sequence_of(job.model_copy(update={"id": f"{ignore}", "ignore_eos": ignore}))
        for ignore in (False, True)
    ]
    for sequence in sequences:
        engine.add(sequence)
    while engine.step() or engine.scheduler.running:
        pass
    stopped, went_on = sequences
    assert stopped.output_ids == tokens[: tokens.index(eos) + 1]
    assert stopped.finish_reason == "stop"
    assert went_on.output_ids == tokens
    assert went_on.finish_reason == "length"


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(model_folder: Path) -> None:
    engine = make_engine(model_folder, {}, context_length=100)
    with pytest.raises(JobError, match=r"100 tokens.*a context of 100 holds 99") as error:
        engine.sequence_of(Job(id="a", prompt_token_ids=[1] * 100))
    assert error.value.code == "prompt_too_long"


def test_an_answer_ends_where_the_context_ends(model_folder: Path) -> None:
    engine = make_engine(model_folder, {}, context_length=100)
    job = Job(id="a", prompt_token_ids=[1] * 95, max_tokens=50)
    assert len(run(engine, [job])["a"]) == 5


def test_a_job_larger_than_the_whole_cache_is_refused(model_folder: Path) -> None:
    engine = make_engine(model_folder, {}, max_total_tokens=64)
    with pytest.raises(JobError, match=r"come to 110 tokens.*holds 64") as error:
        engine.sequence_of(Job(id="a", prompt_token_ids=[1] * 10, max_tokens=100))
    assert error.value.code == "kv_cache_too_small"


def test_a_cache_that_does_not_hold_the_models_context_brings_a_warning(model_folder: Path) -> None:
    with capture_logs() as logs:
        make_engine(model_folder, {}, max_total_tokens=4)
    (warning,) = (line for line in logs if line["event"] == "kv_cache_below_context")
    assert "come to more than 16 tokens fails" in warning["problem"]
    with capture_logs() as logs:
        make_engine(model_folder, {}, max_total_tokens=512, context_length=512)
    assert not [line for line in logs if line["log_level"] == "warning"]


def test_a_job_that_fills_the_whole_cache_runs(model_folder: Path) -> None:
    engine = make_engine(model_folder, {}, max_total_tokens=64)
    job = Job(id="a", prompt_token_ids=[1] * 10, max_tokens=54)
    assert len(run(engine, [job])["a"]) == 54


def test_an_unknown_adapter_is_refused_with_the_known_ones_named(
    model_folder: Path, adapters: dict[str, Path]
) -> None:
    engine = make_engine(model_folder, adapters)
    with pytest.raises(JobError, match="eight, one, sixty-four, three") as error:
        engine.sequence_of(Job(id="a", lora="nine", prompt_token_ids=[1]))
    assert error.value.code == "unknown_adapter"


def test_a_folder_without_a_tokenizer_serves_token_ids_and_refuses_text(
    model_folder: Path,
) -> None:
    engine = make_engine(model_folder, {})
    with pytest.raises(JobError, match="send prompt_token_ids") as error:
        engine.sequence_of(Job(id="a", prompt="hello"))
    assert error.value.code == "no_tokenizer"
    assert engine.tokenizer.decode([1, 2]) is None


def test_a_token_outside_the_vocabulary_is_refused(model_folder: Path) -> None:
    with pytest.raises(JobError, match="holds token 211; the model's vocabulary has 211"):
        make_engine(model_folder, {}).sequence_of(Job(id="a", prompt_token_ids=[1, 211]))


def test_dummy_weights_need_nothing_but_a_config(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    engine = make_engine(tmp_path, {}, load_format="dummy")
    job = Job(id="a", prompt_token_ids=[1, 2, 3], max_tokens=5)
    assert len(run(engine, [job])["a"]) == 5
