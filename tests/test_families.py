"""Every family of models and every rotary embedding against transformers, and LoRA on it against
PEFT: tiny random models, whose prompts exceed their windows."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations, cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForConditionalGeneration

from schemas.errors import BadInput
from schemas.job import Job
from tests.test_engine import make_engine
from tests.tiny_models import Oracle, OracleOfEach, in_bfloat16, make_adapter, make_model
from worker import assembly
from worker.batch import Batch
from worker.engine import Engine
from worker.kv_cache import PAGE_SIZE
from worker.model_runner import Launched, ModelRunner
from worker.step_graphs import Output, StepGraphs

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0}
LONG = {"rope_type": "longrope", "rope_theta": 1000.0}

GEMMA3: dict[str, Any] = {
    "head_dim": 20,
    "query_pre_attn_scalar": 30,
    "sliding_window": 17,
    "tie_word_embeddings": False,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    },
}

#: What ``make_model`` is told: a type of transformers, and what is not as usual. Embeddings that
#: are scaled and tied would have a random model say its last token again and again.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 6}),
    "llama-3": (
        "llama",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LLAMA3
            | {
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}},
    ),
    "mistral": ("mistral", {"sliding_window": 23, "head_dim": 20}),
    "qwen2": ("qwen2", {"rope_parameters": YARN | {"original_max_position_embeddings": 32}}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 20, "tie_word_embeddings": True, "attention_bias": True}),
    "phi3": ("phi3", {"sliding_window": 21, "num_key_value_heads": 6}),
    "phi3-partial": (
        "phi3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "phi4": (
        "phi3",
        {
            "hidden_size": 96,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 32,
            "rope_parameters": LONG
            | {
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 1.5, 2.0, 4.0, 7.0, 9.0],
            },
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 20,
            "query_pre_attn_scalar": 30,
            "sliding_window": 17,
            "tie_word_embeddings": False,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3-with-images": (
        "gemma3",
        {
            "text_config": GEMMA3,
            "tie_word_embeddings": False,
            "vision_config": {
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 208,
            "eoi_token_index": 209,
            "image_token_index": 210,
        },
    ),
    "smollm3": (
        "smollm3",
        {"no_rope_layer_interval": 2, "rope_parameters": YARN | {"factor": 2.0}},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "attention_bias": True,
        },
    ),
    "olmo2": ("olmo2", {}),
}

#: Those that differ in these kernels, which take seconds each.
INTERPRETED = ("qwen2-windows", "phi4", "gemma2", "gemma3", "smollm3")

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED_LINEAR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

NUM_TOKENS = 64

#: In float32, of logits whose largest is about 10. A GPU adds up in other orders than the oracle's
#: CPU: 1.01e-4 was seen on an H100, in one of 13,504 logits.
TOLERANCE = 2e-4 if torch.cuda.is_available() else 1e-4


def linear_modules(name: str) -> tuple[str, ...]:
    return FUSED_LINEAR if MODELS[name][0] == "phi3" else LINEAR


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, changes = MODELS[name]
    return make_model(tmp_path_factory.mktemp("model"), model_type, **changes)


@pytest.fixture(scope="module")
def adapters(
    name: str, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Of all linear modules, of some of their parts, and with DoRA."""
    modules = linear_modules(name)
    kinds: dict[str, dict[str, Any]] = {
        "all": {"rank": 5, "target_modules": modules},
        "some": {"rank": 12, "target_modules": modules[::3]},
        "dora": {"rank": 3, "target_modules": modules, "use_dora": True},
    }
    return {
        kind: make_adapter(model_folder, tmp_path_factory.mktemp(kind), seed=seed, **settings)
        for seed, (kind, settings) in enumerate(kinds.items())
    }


@pytest.fixture(scope="module")
def oracle(model_folder: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(model_folder, adapters)


def make_jobs(loras: list[str | None], count: int) -> list[Job]:
    rng = random.Random(3)
    return [
        Job(
            id=f"job-{i}",
            lora=lora,
            prompt_token_ids=[rng.randrange(211) for _ in range(length)],
            max_tokens=NUM_TOKENS,
        )
        for i, (lora, length) in enumerate(zip(cycle(loras), range(1, 100, 13), strict=False))
        if i < count
    ]


Logits = dict[str, list[torch.Tensor]]


@contextmanager
def kept_logits() -> Iterator[Logits]:
    """Those of each token of each job, by job id."""
    kept: Logits = {}
    found: list[torch.Tensor] = []
    launch, run, replay = ModelRunner.launch, ModelRunner._run, StepGraphs.replay

    def launch_and_keep(runner: ModelRunner, batch: Batch) -> Launched:
        launched = launch(runner, batch)
        for sequence, row in zip(batch.sampled, found.pop(), strict=False):
            kept.setdefault(sequence.job.id, []).append(row.cpu().clone())
        return launched

    def keep(compute: Callable[..., Output | None]) -> Callable[..., Output | None]:
        def computed(*arguments: Any, **named: Any) -> Output | None:
            if output := compute(*arguments, **named):
                found.append(output[0])
            return output

        return computed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "launch", launch_and_keep)
        patch.setattr(ModelRunner, "_run", keep(run))
        patch.setattr(StepGraphs, "replay", keep(replay))
        yield kept


def run(engine: Engine, jobs: list[Job]) -> dict[str, list[int]]:
    """Tokens by job id; the jobs join two at a time, so that prefill and decode mix."""
    sequences = [engine.sequence_of(job) for job in jobs]
    joining = list(sequences)
    while joining or engine.scheduler.running or engine.scheduler.waiting:
        for sequence in joining[:2]:
            engine.add(sequence)
        del joining[:2]
        engine.step()
    return {sequence.job.id: sequence.output_ids for sequence in sequences}


def assert_parity(engine: Engine, jobs: list[Job], oracle: Oracle) -> dict[str, list[int]]:
    """Each of a job's tokens is the oracle's greedy one after those before it, by logits as close
    as ``TOLERANCE``; returns them by job id."""
    with kept_logits() as kept:
        tokens = run(engine, jobs)
    for job in jobs:
        prompt = job.prompt_token_ids or []
        expected = oracle.all_logits([*prompt, *tokens[job.id]], job.lora)[len(prompt) - 1 : -1]
        found = torch.stack(kept[job.id])
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
        assert tokens[job.id] == expected.argmax(-1).tolist()
        assert len(tokens[job.id]) == job.max_tokens
    return tokens


def test_mixed_with_adapters_in_chunks_and_from_the_cache_all_is_as_with_transformers_and_peft(
    model_folder: Path, adapters: dict[str, Path], oracle: Oracle
) -> None:
    jobs = make_jobs([None, "all", "some", "dora"], 8)
    engine = make_engine(model_folder, adapters)
    tokens = assert_parity(engine, jobs, oracle)
    assert engine.counters.reused_tokens == 0
    # Once more, on the keys and values that the prompts left in the cache.
    again = [job.model_copy(update={"max_tokens": 4}) for job in jobs]
    assert run(engine, again) == {name: answer[:4] for name, answer in tokens.items()}
    lengths = [len(job.prompt_token_ids or []) for job in jobs]
    assert engine.counters.reused_tokens == sum((n - 1) // PAGE_SIZE * PAGE_SIZE for n in lengths)


def test_prompts_in_one_piece_are_those_of_transformers(model_folder: Path, oracle: Oracle) -> None:
    jobs = make_jobs([None], 3)
    assert_parity(make_engine(model_folder, {}, chunked_prefill_size=512), jobs, oracle)


#: bfloat16 keeps 8 bits, and what the roundings on the way add up to differs from model to model:
#: 0.2% to 4% of the largest logit of these. So transformers' own error in bfloat16 is the measure.
#: Whoever rounds at the same places, in other orders of adding up, has about the same: on a CPU
#: 0.68 to 1.05 times it was seen. Wrong frequencies of a rotary embedding, to name a small mistake,
#: make it 8 times as large.
BFLOAT16_ERRORS = 1.5


def test_in_bfloat16_logits_are_as_far_from_float32_as_those_of_transformers(
    model_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Root mean squares over all logits, on weights that bfloat16 holds exactly."""
    model = in_bfloat16(model_folder, tmp_path / "model")
    loras = {name: in_bfloat16(adapters[name], tmp_path / name) for name in ("all", "dora")}
    exact, rounded = Oracle(model, loras), Oracle(model, loras, torch.bfloat16)
    engine = make_engine(model, loras, dtype="bfloat16")
    jobs = [job.model_copy(update={"max_tokens": 40}) for job in make_jobs([None, *loras], 6)]
    with kept_logits() as kept:
        tokens = run(engine, jobs)
    for lora in (None, *loras):
        errors, errors_of_transformers = [], []
        for job in (job for job in jobs if job.lora == lora):
            prompt = job.prompt_token_ids or []
            ids, own = [*prompt, *tokens[job.id]], slice(len(prompt) - 1, -1)
            expected = exact.all_logits(ids, lora)[own]
            errors.append(torch.stack(kept[job.id]).float() - expected)
            errors_of_transformers.append(rounded.all_logits(ids, lora)[own].float() - expected)
        assert rms(errors) <= BFLOAT16_ERRORS * rms(errors_of_transformers), lora


def rms(errors: list[torch.Tensor]) -> float:
    return float(torch.cat(errors).square().mean().sqrt())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the tests above run the kernels")
@pytest.mark.parametrize("name", INTERPRETED, indirect=True, scope="module")
def test_the_kernels_of_a_gpu_interpreted_give_the_same(
    model_folder: Path,
    adapters: dict[str, Path],
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of prefill and LoRA, with A under the base weights."""
    monkeypatch.setattr(assembly, "_stacks_adapters", lambda device: True)
    monkeypatch.setattr(
        ModelRunner, "_tiles", lambda _, numbers: numbers.view(-1, 4) if len(numbers) else None
    )
    lora = {name: adapters[name] for name in ("all", "dora")}
    jobs = [job.model_copy(update={"max_tokens": 1}) for job in make_jobs(["all", None, "dora"], 3)]
    # No longer than the context that the one by LongRoPE was made for, which is not stretched then.
    assert_parity(make_engine(model_folder, lora, context_length=32), jobs, oracle)


def test_adapters_answer_differently(adapters: dict[str, Path], oracle: Oracle) -> None:
    """Else a mix-up of adapters would go unseen."""
    logits = [oracle.logits([5, 6, 7], name) for name in [None, *adapters]]
    for one, other in combinations(logits, 2):
        assert (one - other).abs().max() > 1000 * TOLERANCE


# --- What adapters change beside linear modules -------------------------------------------------

ENDS = ("embed_tokens", "lm_head")


@pytest.mark.parametrize("name", ["gemma2", "gemma3-with-images", "granite"], indirect=True)
def test_embeddings_and_output_heads_of_adapters_are_scaled_and_capped_as_the_models(
    model_folder: Path, tmp_path: Path
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "lora": {"rank": 4, "target_modules": ENDS},
        "dora": {"rank": 3, "target_modules": ENDS, "use_dora": True},
        "own": {"rank": 2, "target_modules": ["o_proj"], "modules_to_save": list(ENDS)},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it saves embeddings along.
        adapters = {
            kind: make_adapter(model_folder, tmp_path / kind, seed=seed, **settings)
            for seed, (kind, settings) in enumerate(kinds.items())
        }
        oracle = OracleOfEach(model_folder, adapters)
    jobs = [job.model_copy(update={"max_tokens": 8}) for job in make_jobs([None, *adapters], 8)]
    assert_parity(make_engine(model_folder, adapters), jobs, oracle)


# --- What a fused module is to adapters ---------------------------------------------------------


@pytest.mark.parametrize("name", ["phi3"], indirect=True)
def test_modules_that_the_model_does_not_have_are_refused_by_name(
    model_folder: Path, tmp_path: Path
) -> None:
    flags = {"enable_lora": True, "max_lora_rank": 8}
    with pytest.raises(BadInput) as error:
        make_engine(model_folder, {}, **flags, lora_target_modules=("o_proj", "q_proj"))
    assert str(error.value) == (
        "--lora-target-modules: the model has no q_proj; it has qkv_proj, o_proj, gate_up_proj,"
        " down_proj, embed_tokens, lm_head."
    )
    of_llama = make_adapter(
        *(make_model(tmp_path / "llama", "llama"), tmp_path / "adapter"),
        rank=3,
        seed=1,
        target_modules=("q_proj", "v_proj"),
    )
    with pytest.raises(BadInput, match="the model has 3 layers with qkv_proj, o_proj, gate_up_pro"):
        make_engine(model_folder, {"of-llama": of_llama})


@pytest.mark.parametrize("name", ["phi3"], indirect=True)
def test_all_modules_are_those_of_the_model(model_folder: Path, adapters: dict[str, Path]) -> None:
    engine = make_engine(
        *(model_folder, {}), enable_lora=True, max_lora_rank=8, lora_target_modules=("all",)
    )
    engine.adapters.serve("all", engine.adapters.read("all", adapters["all"], version=1))
    jobs = make_jobs(["all"], 1)
    assert run(engine, jobs) == run(make_engine(model_folder, {"all": adapters["all"]}), jobs)


# --- A model of more than text ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3-with-images"], indirect=True)
def test_names_of_former_versions_are_of_the_same_modules(
    model_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """transformers writes checkpoints of this class as before 4.52, and PEFT adapters as since."""
    model = renamed(
        *(model_folder, tmp_path / "model"),
        {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."},
    )
    start, former = "base_model.model.model.", "base_model.model."
    former_names = {
        f"{start}language_model.": f"{former}language_model.model.",
        f"{start}vision_tower.": f"{former}vision_tower.",
    }
    loras = {
        kind: renamed(adapters[kind], tmp_path / kind, former_names) for kind in ("all", "dora")
    }
    jobs = make_jobs([None, "all", "dora"], 3)
    own = {kind: adapters[kind] for kind in loras}
    assert run(make_engine(model, loras), jobs) == run(make_engine(model_folder, own), jobs)


def renamed(folder: Path, copy: Path, names: dict[str, str]) -> Path:
    """A folder once more, with tensors whose names begin otherwise."""
    shutil.copytree(folder, copy)
    (file,) = copy.glob("*.safetensors")
    tensors, is_renamed = {}, dict.fromkeys(names, False)
    for name, tensor in load_file(file).items():
        start = next((start for start in names if name.startswith(start)), None)
        if start:
            is_renamed[start] = True
        tensors[names[start] + name.removeprefix(start) if start else name] = tensor
    assert all(is_renamed.values())
    save_file(tensors, file, {"format": "pt"})
    return copy


@pytest.mark.parametrize("name", ["gemma3-with-images"], indirect=True)
def test_adapters_whose_modules_cannot_be_told_are_refused_by_name(
    model_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    of_text_alone = renamed(
        *(adapters["all"], tmp_path / "text"),
        {"base_model.model.model.language_model.": "base_model.model.model."},
    )
    reason = r"layers of 'model', and this model's are of 'model.language_model'"
    with pytest.raises(BadInput, match=reason):
        make_engine(model_folder, {"text": of_text_alone})
    twice = shutil.copytree(adapters["all"], tmp_path / "twice")
    tensors = load_file(twice / "adapter_model.safetensors")
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    former = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, former: tensors[key] + 1}, twice / "adapter_model.safetensors")
    with pytest.raises(BadInput, match=r"q_proj.lora_A.weight are of the same module"):
        make_engine(model_folder, {"twice": twice})


@pytest.mark.parametrize("name", ["gemma3-with-images"], indirect=True)
@pytest.mark.parametrize(
    "targets",
    [
        ["language_model.model.layers.0.self_attn.q_proj"],
        r".*language_model\.model\.layers\.\d+\.self_attn\.q_proj",
        ["language_model.lm_head"],
    ],
    ids=str,
)
def test_targets_of_former_versions_select_nothing_as_with_peft_and_are_refused_with_that_reason(
    model_folder: Path, adapters: dict[str, Path], tmp_path: Path, targets: str | list[str]
) -> None:
    folder = shutil.copytree(adapters["all"], tmp_path / "former")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": targets}))
    base = Gemma3ForConditionalGeneration.from_pretrained(model_folder)
    with pytest.raises(ValueError, match="not found in the base model"):
        PeftModel.from_pretrained(base, folder)
    with pytest.raises(
        BadInput, match=r"target_modules says language_model.* calls .* today; PEFT"
    ):
        make_engine(model_folder, {"former": folder})


@pytest.mark.parametrize("name", ["gemma3-with-images"], indirect=True)
def test_an_adapter_of_images_alone_is_refused(model_folder: Path, tmp_path: Path) -> None:
    images = make_adapter(
        *(model_folder, tmp_path / "images"), rank=2, seed=1, target_modules=("fc1", "fc2")
    )
    with pytest.raises(BadInput, match="targets nothing the model has"):
        make_engine(model_folder, {"images": images})
