"""Adapter folders: what PEFT writes is read, and what cannot be served exactly is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config
from safetensors.torch import load_file, save_file

from schemas.errors import BadInput
from tests.tiny_models import ALL_MODULES, make_adapter, make_llama
from worker.adapters.peft_format import Adapter, load_adapter
from worker.model.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers"
Q_A = f"{PREFIX}.1.self_attn.q_proj.lora_A.weight"
Q_B = f"{PREFIX}.1.self_attn.q_proj.lora_B.weight"
RANK, ALPHA, HIDDEN = 3, 6, 72

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_folder: Path) -> ModelConfig:
    return ModelConfig.from_folder(model_folder)


@pytest.fixture(scope="module")
def original(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model_folder, tmp_path_factory.mktemp("adapter"), rank=RANK, seed=1)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of a valid adapter, for a test to spoil."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def edit_config(folder: Path, **settings: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit_weights(folder: Path, edit: Callable[[Weights], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS)


def load(folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32) -> Adapter:
    return load_adapter("name", folder, model, dtype)


def refusal(folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(BadInput) as error:
        load(folder, model, dtype)
    return str(error.value)


# --- What is read -------------------------------------------------------------------------------


def test_an_adapter_has_the_rank_of_its_config(folder: Path, model: ModelConfig) -> None:
    assert load(folder, model).rank == RANK


def test_an_adapter_has_factors_for_every_module_and_layer(
    folder: Path, model: ModelConfig
) -> None:
    places = {(layer, module) for layer in range(3) for module in ALL_MODULES}
    assert load(folder, model).factors.keys() == places


def test_a_module_that_the_adapter_leaves_alone_has_no_factors(
    folder: Path, model: ModelConfig
) -> None:
    edit_weights(folder, lambda weights: (weights.pop(Q_A), weights.pop(Q_B)))
    assert (1, "q_proj") not in load(folder, model).factors


def test_factor_a_is_read_as_it_stands(folder: Path, model: ModelConfig) -> None:
    stored = load_file(folder / WEIGHTS)[Q_A]
    assert load(folder, model).factors[1, "q_proj"].a.equal(stored)


@pytest.mark.parametrize(
    ("use_rslora", "scaling"), [(False, ALPHA / RANK), (True, ALPHA / RANK**0.5)]
)
def test_factor_b_is_transposed_and_scaled(
    folder: Path, model: ModelConfig, use_rslora: bool, scaling: float
) -> None:
    edit_config(folder, use_rslora=use_rslora)
    stored = load_file(folder / WEIGHTS)[Q_B]
    torch.testing.assert_close(load(folder, model).factors[1, "q_proj"].b, stored.t() * scaling)


def test_factors_get_the_type_that_is_asked_for(folder: Path, model: ModelConfig) -> None:
    factors = load(folder, model, torch.bfloat16).factors[0, "up_proj"]
    assert (factors.a.dtype, factors.b.dtype) == (torch.bfloat16, torch.bfloat16)


# --- Revisions ----------------------------------------------------------------------------------


def test_the_revision_does_not_change_with_names(
    original: Path, folder: Path, model: ModelConfig
) -> None:
    there = load_adapter("another", original, model, torch.float32)
    assert load(folder, model).revision == there.revision


def test_the_revision_does_not_change_with_the_layout_of_the_config_file(
    original: Path, folder: Path, model: ModelConfig
) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert load(folder, model).revision == load(original, model).revision


def test_the_revision_changes_with_one_weight(
    original: Path, folder: Path, model: ModelConfig
) -> None:
    edit_weights(folder, lambda weights: weights[Q_A][0, 0].add_(1e-3))
    assert load(folder, model).revision != load(original, model).revision


def test_the_revision_changes_with_the_config(
    original: Path, folder: Path, model: ModelConfig
) -> None:
    edit_config(folder, lora_alpha=ALPHA + 1)
    assert load(folder, model).revision != load(original, model).revision


# --- Configs that are refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "what"),
    [
        ("use_dora", True, "DoRA"),
        ("modules_to_save", ["lm_head"], "fully trained modules"),
        ("layer_replication", [[0, 2], [1, 3]], "replicated layers"),
        ("rank_pattern", {"q_proj": 5}, "ranks by module"),
        ("alpha_pattern", {"q_proj": 5}, "alphas by module"),
        ("fan_in_fan_out", True, "transposed weights"),
        ("lora_bias", True, "a bias in B"),
        ("trainable_token_indices", [3], "trained token embeddings"),
        ("target_parameters", ["experts.down_proj"], "bare parameters as targets"),
        ("alora_invocation_tokens", [3], "activation by tokens (aLoRA)"),
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal factors"),
        ("arrow_config", {"top_k": 2}, "Arrow routing"),
    ],
)
def test_a_setting_that_changes_the_product_is_refused(
    folder: Path, model: ModelConfig, setting: str, value: object, what: str
) -> None:
    edit_config(folder, **{setting: value})
    assert refusal(folder, model) == f"{folder / CONFIG}: {setting}: {what} is not supported."


def test_an_adapter_that_peft_made_with_dora_is_refused(
    model_folder: Path, tmp_path: Path, model: ModelConfig
) -> None:
    make_adapter(model_folder, tmp_path, rank=2, seed=1, target_modules=["o_proj"], use_dora=True)
    assert refusal(tmp_path, model).endswith("use_dora: DoRA is not supported.")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused(folder: Path, model: ModelConfig, bias: str) -> None:
    edit_config(folder, bias=bias)
    expected = f"{folder / CONFIG}: bias is '{bias}'; trained biases are not supported."
    assert refusal(folder, model) == expected


def test_an_unknown_setting_is_refused(folder: Path, model: ModelConfig) -> None:
    edit_config(folder, use_next_years_method=True)
    assert refusal(folder, model) == (
        f"{folder / CONFIG}: the setting 'use_next_years_method' is unknown here, so the adapter"
        " may not be served as it was trained. Remove the setting if it does not matter."
    )


@pytest.mark.parametrize("value", [None, False, {}])
def test_an_unknown_setting_that_is_off_does_no_harm(
    folder: Path, model: ModelConfig, value: object
) -> None:
    edit_config(folder, use_next_years_method=value)
    assert load(folder, model).rank == RANK


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_a_start_that_changes_the_base_model_is_refused(
    folder: Path, model: ModelConfig, init: str
) -> None:
    edit_config(folder, init_lora_weights=init)
    assert refusal(folder, model) == (
        f"{folder / CONFIG}: init_lora_weights is '{init}', which changes the base model's weights."
        " Convert the adapter with PEFT (path_initial_model_for_weight_conversion) first."
    )


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_a_start_that_leaves_the_base_model_alone_is_served(
    folder: Path, model: ModelConfig, init: object
) -> None:
    edit_config(folder, init_lora_weights=init)
    assert load(folder, model).rank == RANK


def test_another_kind_of_adapter_is_refused(folder: Path, model: ModelConfig) -> None:
    edit_config(folder, peft_type="ADALORA")
    expected = f"{folder / CONFIG}: peft_type is ADALORA; only LORA can be served."
    assert refusal(folder, model) == expected


def test_a_config_that_peft_wrote_for_another_kind_of_adapter_is_refused_for_its_kind(
    folder: Path, model: ModelConfig
) -> None:
    """It has no rank, and that is not what is wrong with it."""
    IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(folder)
    expected = f"{folder / CONFIG}: peft_type is IA3; only LORA can be served."
    assert refusal(folder, model) == expected


def test_a_folder_without_a_config_is_no_adapter(folder: Path, model: ModelConfig) -> None:
    (folder / CONFIG).unlink()
    assert refusal(folder, model) == f"{folder} is no PEFT adapter: it lacks {CONFIG}."


def test_a_config_that_cannot_be_opened_is_refused(folder: Path, model: ModelConfig) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    assert refusal(folder, model) == f"{folder / CONFIG}: Is a directory"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"r": 3,', "is no JSON object"),
        ("[]", "is no JSON object"),
        ('{"peft_type": "LORA", "lora_alpha": 6}', "r: Field required"),
        ('{"peft_type": "LORA", "lora_alpha": 6, "r": 0}', "r: Input should be greater"),
        (
            '{"peft_type": "LORA", "lora_alpha": null, "r": 3}',
            "lora_alpha: Input should be",
        ),
    ],
)
def test_a_broken_config_is_refused_with_the_place_of_the_break(
    folder: Path, model: ModelConfig, text: str, problem: str
) -> None:
    (folder / CONFIG).write_text(text)
    assert refusal(folder, model).startswith(f"{folder / CONFIG}: {problem}")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_finite_number_is_refused(
    folder: Path, model: ModelConfig, alpha: float
) -> None:
    edit_config(folder, lora_alpha=alpha)
    assert "lora_alpha" in refusal(folder, model)


# --- Weights that are refused -------------------------------------------------------------------


def test_a_folder_without_weights_is_refused(folder: Path, model: ModelConfig) -> None:
    (folder / WEIGHTS).unlink()
    assert refusal(folder, model) == f"{folder}: lacks {WEIGHTS}."


def test_a_pickle_is_never_opened(folder: Path, model: ModelConfig) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"no pickle at all")
    assert refusal(folder, model) == (
        f"{folder}: lacks {WEIGHTS}. adapter_model.bin is a pickle, which can run code when it is"
        " read and is never opened; save the adapter anew with PEFT's save_pretrained."
    )


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_file_that_was_cut_off_is_refused(folder: Path, model: ModelConfig, length: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    assert refusal(folder, model).startswith(f"{path}: cannot be read: ")


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        f"{PREFIX}.0.self_attn.qkv_proj.lora_A.weight",
        f"{PREFIX}.0.self_attn.q_proj.lora_B.bias",
        f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector",
        f"{PREFIX}.0.mlp.experts.3.up_proj.lora_A.weight",
        f"{PREFIX}.0.mlp.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_key_that_matches_no_module_is_refused(
    folder: Path, model: ModelConfig, key: str
) -> None:
    edit_weights(folder, lambda weights: weights.update({key: torch.ones(RANK, HIDDEN)}))
    assert refusal(folder, model) == (
        f"{folder / WEIGHTS}: {key} matches no module that an adapter can change here"
        " (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj)."
    )


def test_a_layer_that_the_model_lacks_is_refused(folder: Path, model: ModelConfig) -> None:
    key = Q_A.replace(".1.", ".3.")
    edit_weights(folder, lambda weights: weights.update({key: weights[Q_A].clone()}))
    assert refusal(folder, model) == (
        f"{folder / WEIGHTS}: {key}: the model has only 3 layers."
        " Is the adapter for another base model?"
    )


@pytest.mark.parametrize(("key", "factor"), [(Q_A, "A"), (Q_B, "B")])
def test_half_a_pair_is_refused(folder: Path, model: ModelConfig, key: str, factor: str) -> None:
    edit_weights(folder, lambda weights: weights.pop(key))
    assert refusal(folder, model) == f"{folder / WEIGHTS}: layer 1 q_proj lacks lora_{factor}."


@pytest.mark.parametrize(
    ("key", "factor", "shape", "asked"),
    [
        (Q_A, "A", (RANK + 1, HIDDEN), (RANK, HIDDEN)),
        (Q_A, "A", (RANK, HIDDEN - 8), (RANK, HIDDEN)),
        (Q_B, "B", (HIDDEN, RANK + 1), (HIDDEN, RANK)),
        (Q_B, "B", (RANK, HIDDEN), (HIDDEN, RANK)),
    ],
)
def test_a_wrong_shape_is_refused(
    folder: Path,
    model: ModelConfig,
    key: str,
    factor: str,
    shape: tuple[int, int],
    asked: tuple[int, int],
) -> None:
    edit_weights(folder, lambda weights: weights.update({key: torch.zeros(shape)}))
    assert refusal(folder, model) == (
        f"{folder / WEIGHTS}: layer 1 q_proj: lora_{factor} has the shape {shape};"
        f" rank {RANK} and the model ask for {asked}. Is the adapter for another base model?"
    )


@pytest.mark.parametrize(("key", "factor"), [(Q_A, "A"), (Q_B, "B")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_weight_that_is_not_finite_is_refused(
    folder: Path, model: ModelConfig, key: str, factor: str, value: float
) -> None:
    edit_weights(folder, lambda weights: weights[key][2, 2].fill_(value))
    assert refusal(folder, model) == (
        f"{folder / WEIGHTS}: layer 1 q_proj: lora_{factor} holds NaN or infinite values, or such"
        " as torch.float32 cannot hold."
    )


def test_weights_that_become_infinite_in_the_workers_type_are_refused(
    folder: Path, model: ModelConfig
) -> None:
    """Scaled by 2 they are beyond float16's 65504."""
    edit_weights(folder, lambda weights: weights[Q_B].fill_(40_000))
    assert refusal(folder, model, torch.float16) == (
        f"{folder / WEIGHTS}: layer 1 q_proj: lora_B holds NaN or infinite values, or such as"
        " torch.float16 cannot hold."
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_weights_that_are_no_plain_numbers_are_refused(
    folder: Path, model: ModelConfig, dtype: torch.dtype
) -> None:
    """They are quantized, and their scales are not known here."""
    edit_weights(folder, lambda weights: weights.update({Q_A: weights[Q_A].to(dtype)}))
    assert refusal(folder, model) == (
        f"{folder / WEIGHTS}: layer 1 q_proj: lora_A is stored as {dtype}; save it as float32 or"
        " bfloat16."
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_floating_type_are_read(
    folder: Path, model: ModelConfig, dtype: torch.dtype
) -> None:
    edit_weights(folder, lambda weights: weights.update({Q_A: weights[Q_A].to(dtype)}))
    stored = load_file(folder / WEIGHTS)[Q_A]
    assert load(folder, model).factors[1, "q_proj"].a.equal(stored.float())


def test_a_file_without_any_weights_is_refused(folder: Path, model: ModelConfig) -> None:
    save_file({}, folder / WEIGHTS)
    assert refusal(folder, model) == f"{folder / WEIGHTS}: holds no LoRA weights."
