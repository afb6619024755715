"""Model folders: what the engine needs of them is read, and others are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.errors import BadInput
from tests.tiny_models import make_llama
from worker.model.config import ModelConfig
from worker.model.weights import DecoderWeights, load_weights

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 211,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}


def read(folder: Path, **changes: object) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return ModelConfig.from_folder(folder)


def refusal(folder: Path, **changes: object) -> str:
    with pytest.raises(BadInput) as error:
        read(folder, **changes)
    return str(error.value)


# --- config.json --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        *[("q_proj", (72, 72)), ("k_proj", (24, 72)), ("v_proj", (24, 72)), ("o_proj", (72, 72))],
        *[("gate_proj", (100, 72)), ("up_proj", (100, 72)), ("down_proj", (72, 100))],
    ],
)
def test_linear_modules_have_the_shapes_of_the_checkpoint(
    tmp_path: Path, module: str, shape: tuple[int, int]
) -> None:
    assert read(tmp_path).linear_shape(module) == shape


def test_head_dim_may_differ_from_the_hidden_size_by_the_heads(tmp_path: Path) -> None:
    assert read(tmp_path, head_dim=16).linear_shape("o_proj") == (72, 96)


def test_a_token_takes_keys_and_values_of_all_layers_in_the_cache(tmp_path: Path) -> None:
    assert read(tmp_path).kv_bytes_per_token(torch.bfloat16) == 2 * 3 * (2 * 12) * 2


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None}, "unnamed"),
    ],
)
def test_another_architecture_is_refused_with_the_supported_ones_named(
    tmp_path: Path, changes: dict[str, object], name: str
) -> None:
    assert refusal(tmp_path, **changes) == (
        f"--model-path {tmp_path}: architecture {name} is not supported."
        " Supported: LlamaForCausalLM."
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": 6 * [1.0], "long_factor": 6 * [2.0]},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_another_rotary_embedding_is_refused_with_the_supported_ones_named(
    tmp_path: Path, rope: dict[str, object]
) -> None:
    assert refusal(tmp_path, rope_parameters={"rope_theta": 10000.0, **rope}) == (
        f"--model-path {tmp_path}: rotary embedding of type '{rope['rope_type']}' is not supported."
        " Supported: default, linear, llama3."
    )


@pytest.mark.parametrize("setting", ["attention_bias", "mlp_bias"])
def test_biases_are_refused(tmp_path: Path, setting: str) -> None:
    expected = f"--model-path {tmp_path}: biases in linear layers are not supported."
    assert refusal(tmp_path, **{setting: True}) == expected


def test_another_activation_is_refused(tmp_path: Path) -> None:
    """The engine knows SwiGLU alone; with another one every answer would be wrong."""
    assert refusal(tmp_path, hidden_act="gelu") == (
        f"--model-path {tmp_path}: the activation gelu is not supported. Supported: silu."
    )


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    """An FP8 checkpoint has weights of the right names and shapes, and scales beside them."""
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    assert refusal(tmp_path, quantization_config=quantization) == (
        f"--model-path {tmp_path}: weights quantized by fp8 are not supported."
    )


@pytest.mark.parametrize("name", ["gone", "a" * 300])
def test_a_missing_folder_is_called_missing(tmp_path: Path, name: str) -> None:
    gone = tmp_path / name
    with pytest.raises(BadInput, match=f"^--model-path {gone}: there is no folder of that name"):
        ModelConfig.from_folder(gone)


def test_a_folder_without_a_config_is_no_models(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"^--model-path {tmp_path}: it lacks config.json"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama", "vocab_size": "many"}'])
def test_a_broken_config_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match=r"cannot read its config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_the_refusal_of_an_unknown_model_is_one_line(tmp_path: Path) -> None:
    assert "\n" not in refusal(tmp_path, model_type="from-next-year")


# --- End of text --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_config", "expected"), [(2, {2}), ([2, 7], {2, 7}), (0, {0}), (None, set())]
)
def test_the_config_alone_gives_the_end_tokens(
    tmp_path: Path, in_config: object, expected: set[int]
) -> None:
    assert read(tmp_path, eos_token_id=in_config).eos_token_ids == expected


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        *[({"eos_token_id": [5, 9]}, {5, 9}), ({"eos_token_id": 5}, {5})],
        *[({"eos_token_id": 0}, {0}), ({"temperature": 0.6, "do_sample": True}, {2})],
    ],
)
def test_the_generation_config_goes_before_the_config(
    tmp_path: Path, generation: dict[str, object], expected: set[int]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read(tmp_path).eos_token_ids == expected


def test_a_broken_generation_config_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    assert "generation_config.json" in refusal(tmp_path)


# --- Weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of a valid model, for a test to spoil."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


Weights = dict[str, torch.Tensor]


def edit_weights(folder: Path, edit: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def load(folder: Path) -> DecoderWeights:
    config = ModelConfig.from_folder(folder)
    return load_weights(folder, config, torch.device("cpu"), torch.float32)


def weights_refusal(folder: Path) -> str:
    with pytest.raises(BadInput) as error:
        load(folder)
    return str(error.value)


def test_fused_weights_hold_their_parts_one_below_the_other(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    parts = [stored[f"model.layers.2.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert load(folder).layers[2].linears["qkv_proj"].equal(torch.cat(parts))


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.2.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        *("model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"),
        *("model.norm.weight", "lm_head.weight"),
    ],
)
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    edit_weights(folder, lambda weights: weights.pop(name))
    assert weights_refusal(folder) == f"--model-path {folder}: the weights lack {name}."


@pytest.mark.parametrize(
    ("name", "shape", "asked"),
    [
        ("model.layers.2.self_attn.k_proj.weight", (72, 24), (24, 72)),
        ("model.layers.1.post_attention_layernorm.weight", (71,), (72,)),
        ("lm_head.weight", (212, 72), (211, 72)),
    ],
)
def test_a_tensor_of_another_shape_is_named(
    folder: Path, name: str, shape: tuple[int, ...], asked: tuple[int, ...]
) -> None:
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(shape)}))
    assert weights_refusal(folder) == (
        f"--model-path {folder / 'model.safetensors'}: {name} has the shape {shape};"
        f" config.json asks for {asked}."
    )


def test_a_folder_without_safetensors_is_refused_with_a_way_on(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert weights_refusal(folder) == (
        f"--model-path {folder}: holds neither model.safetensors nor model.safetensors.index.json."
        " Other formats are not read; `--load-format dummy` runs on random weights."
    )


def test_a_weights_file_that_was_cut_off_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert weights_refusal(folder).startswith(f"--model-path {path}: ")


def test_a_missing_shard_is_named(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = f"--model-path {folder / 'model-00001-of-00002.safetensors'}: "
    assert weights_refusal(folder).startswith(expected)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_index_of_shards_is_named(folder: Path, text: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(text)
    assert weights_refusal(folder).startswith(f"--model-path {index}: ")
