"""Model folders: what the engine needs of them is read, and others are refused by name."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from schemas.errors import BadInput
from tests.tiny_models import make_llama, make_model
from worker.model.config import ModelConfig
from worker.model.weights import DecoderWeights, load_weights, random_weights, tensors_by_name

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
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None}, "unnamed"),
    ],
)
def test_another_architecture_is_refused_with_the_supported_ones_named(
    tmp_path: Path, changes: dict[str, object], name: str
) -> None:
    assert refusal(tmp_path, **changes) == (
        f"--model-path {tmp_path}: architecture {name} is not supported."
        " Supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM,"
        " Phi3ForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM,"
        " Gemma3ForConditionalGeneration, SmolLM3ForCausalLM,"
        " GraniteForCausalLM, Olmo2ForCausalLM."
    )


def test_another_rotary_embedding_is_refused_with_the_supported_ones_named(tmp_path: Path) -> None:
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}
    assert refusal(tmp_path, rope_parameters=rope) == (
        f"--model-path {tmp_path}: rotary embedding of type 'dynamic' is not supported."
        " Supported: default, linear, llama3, yarn, longrope."
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": "large"},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": 6 * [1.0]},
        {"rope_type": "longrope", "short_factor": 6 * [1.0], "long_factor": 5 * [2.0]},
        {"rope_type": "llama3", "factor": 8.0},
    ],
    ids=str,
)
def test_a_rotary_embedding_with_wrong_numbers_is_refused_by_its_type(
    tmp_path: Path, rope: dict[str, object]
) -> None:
    message = refusal(tmp_path, rope_parameters={"rope_theta": 10000.0, **rope})
    assert message.startswith(f"--model-path {tmp_path}: ")
    assert "config.json" in message
    assert str(rope["rope_type"]) in message or "factor" in message


def test_yarn_stretches_the_context_as_model_cards_tell_to_set_it(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    assert read(tmp_path, rope_parameters=yarn).max_position == 2048
    yarn["original_max_position_embeddings"] = 64
    assert read(tmp_path, rope_parameters=yarn).max_position == 512


def test_a_longrope_is_stretched_where_longer_contexts_are_served_and_only_there(
    tmp_path: Path,
) -> None:
    long = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    factors = {"short_factor": 6 * [1.0], "long_factor": 6 * [2.0]}
    rotary = read(tmp_path, rope_parameters=long | factors).layers[0].rotary
    short, stretched = (rotary.tables(length, torch.device("cpu")) for length in (64, 65))
    assert short[0].shape == (64, 6)
    for one, other in zip(short, stretched, strict=True):
        torch.testing.assert_close(one[:32], other[:64:2])


def test_layers_of_an_unknown_type_are_refused(tmp_path: Path) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    message = refusal(tmp_path, **qwen, layer_types=3 * ["chunked_attention"])
    assert "chunked_attention" in message
    assert "full_attention, sliding_attention" in message


def test_layers_that_no_rope_layers_leaves_out_are_refused(tmp_path: Path) -> None:
    smollm = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
    message = refusal(tmp_path, **smollm, layer_types=3 * ["full_attention"], no_rope_layers=[1, 0])
    assert message.endswith("no_rope_layers tells of fewer layers than 3.")


def test_attention_to_later_tokens_is_refused(tmp_path: Path) -> None:
    gemma = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    message = refusal(tmp_path, **gemma, use_bidirectional_attention=True)
    assert "use_bidirectional_attention" in message


def test_another_activation_is_refused(tmp_path: Path) -> None:
    """With another one every answer would be wrong."""
    assert refusal(tmp_path, hidden_act="gelu") == (
        f"--model-path {tmp_path}: the activation gelu is not supported."
        " Supported: silu, gelu_pytorch_tanh."
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


def test_modules_stored_as_one_are_one_module_to_adapters(tmp_path: Path) -> None:
    config = read(tmp_path, architectures=["Phi3ForCausalLM"], model_type="phi3")
    assert config.linear_modules == ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert config.linear_shape("qkv_proj") == (72 + 2 * 24, 72)
    assert config.linear_shape("gate_up_proj") == (200, 72)


# --- End of text --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_config", "expected"),
    [(2, {2}), ([2, 7], {2, 7}), (0, {0}), (None, set()), (-1, set()), ([2, 211], {2})],
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
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = f"--model-path {folder / 'model-00001-of-00002.safetensors'}: "
    assert weights_refusal(folder).startswith(expected)


def test_one_file_goes_before_an_index_of_shards(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert load(folder).dtype == torch.float32


def test_a_type_that_is_no_plain_number_is_named(folder: Path) -> None:
    """Quantized weights of the right shapes, whose config.json does not tell."""
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.update({name: weights[name].to(torch.int8)}))
    assert weights_refusal(folder) == (
        f"--model-path {folder / 'model.safetensors'}: {name} has the type I8;"
        " F64, F32, F16, BF16 can be read."
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_any_stored_type_are_read_exactly(folder: Path, dtype: torch.dtype) -> None:
    stored = {name: w.to(dtype) for name, w in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors")
    weights = load(folder)
    assert weights.dtype == torch.float32
    assert weights.embedding.equal(stored["model.embed_tokens.weight"].float())
    norm = stored["model.layers.1.input_layernorm.weight"].float()
    assert weights.layers[1].norms["pre_attention"].equal(norm)


def test_weights_stay_as_they_were_read_when_the_file_changes(folder: Path) -> None:
    weights = load(folder)
    before = weights.embedding.clone(), weights.layers[0].linears["o_proj"].clone()
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    assert weights.embedding.equal(before[0])
    assert weights.layers[0].linears["o_proj"].equal(before[1])


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_index_of_shards_is_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(text)
    assert weights_refusal(folder).startswith(f"--model-path {index}: ")


# --- Shards -------------------------------------------------------------------------------------


def test_shards_of_fused_and_tied_weights_are_those_of_one_file(tmp_path: Path) -> None:
    whole = make_model(tmp_path / "whole", "phi3", tie_word_embeddings=True)
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    ours, theirs = load(sharded), load(whole)
    assert ours.head is ours.embedding
    assert ours.embedding.equal(theirs.embedding)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        for group in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            assert one.linears[group].equal(other.linears[group])


def test_each_shard_that_is_read_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoModelForCausalLM.from_pretrained(make_llama(tmp_path / "whole")).save_pretrained(
        tmp_path / "sharded", max_shard_size="200KB"
    )
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    capsys.readouterr()
    load(tmp_path / "sharded")
    lines = [line for line in capsys.readouterr().out.splitlines() if "weights_read" in line]
    assert len(lines) == len(shards) > 1
    for number, (line, shard) in enumerate(zip(lines, shards, strict=True), 1):
        assert shard in line
        assert f"{number} of {len(shards)}" in line


def make_shards(folder: Path) -> list[int]:
    """A shard a layer of a model of 103 MB; returns their sizes in bytes."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
    config = read(
        folder, **sizes, num_key_value_heads=8, num_hidden_layers=8, tie_word_embeddings=True
    )
    weights = random_weights(config, torch.device("cpu"), torch.float32)
    shards: dict[str, Weights] = {}
    for name, tensor in tensors_by_name(weights, config).items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "0"
        shards.setdefault(f"{layer}.safetensors", {})[name] = tensor.clone()
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [sum(tensor.nbytes for tensor in tensors.values()) for tensors in shards.values()]


def test_loading_takes_no_more_memory_than_the_model_and_its_largest_shard(tmp_path: Path) -> None:
    num_bytes = make_shards(tmp_path)
    ctypes.CDLL(None).malloc_trim(0)  # What tests before have left would be taken again, unseen.
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The largest counts from now on.
    weights = load(tmp_path)
    taken = resident_bytes("VmHWM") - before
    assert weights.layers[7].linears["down_proj"].any()
    assert 0.95 * sum(num_bytes) < taken < sum(num_bytes) + 1.2 * max(num_bytes)


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) << 10
