"""Adapter folders: what PEFT writes is read, and what cannot be served exactly is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import IA3Config
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from benchmarks.waiting import PATIENCE
from schemas.errors import BadInput
from tests.tiny_models import ALL_MODULES, make_adapter, make_llama
from worker.adapters import device_weights
from worker.adapters import loader as loader_module
from worker.adapters.loader import AdapterLimits, AdapterLoader
from worker.adapters.peft_format import Adapter, check_adapter, load_adapter
from worker.model.config import ModelConfig
from worker.model.weights import DecoderWeights, load_weights, random_weights

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


@contextmanager
def ignoring_warnings() -> Iterator[None]:
    """PEFT warns that it saves embeddings along."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def insert_name(weights: Weights, keys: list[str], name: str) -> None:
    for key in keys:
        weights[key.replace(".weight", f".{name}.weight")] = weights.pop(key)


def load(
    folder: Path,
    model: ModelConfig,
    dtype: torch.dtype = torch.float32,
    base: DecoderWeights | None = None,
) -> Adapter:
    """``base`` matters only to adapters that refer to its weights."""
    base = base or random_weights(model, torch.device("cpu"), dtype)
    return load_adapter("name", folder, check_adapter(folder, model), model, base)


def refusal(
    folder: Path,
    model: ModelConfig,
    dtype: torch.dtype = torch.float32,
    base: DecoderWeights | None = None,
) -> str:
    with pytest.raises(BadInput) as error:
        load(folder, model, dtype, base)
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
    edit_config(folder, exclude_modules=["1.self_attn.q_proj"])
    edit_weights(folder, lambda weights: (weights.pop(Q_A), weights.pop(Q_B)))
    assert (1, "q_proj") not in load(folder, model).factors


def test_an_adapter_has_the_largest_rank_of_its_modules(
    model_folder: Path, tmp_path: Path, model: ModelConfig
) -> None:
    """That of its config is no module's."""
    ranks = {"q_proj": 2, "layers.1.self_attn.v_proj": 5, "v_proj": 3}
    modules = ("q_proj", "v_proj")
    make_adapter(model_folder, tmp_path, rank=9, seed=1, target_modules=modules, rank_pattern=ranks)
    adapter = load(tmp_path, model)
    assert adapter.rank == 5
    found = {place: len(factors.a) for place, factors in adapter.factors.items()}
    assert found == {
        (layer, module): 2 if module == "q_proj" else 5 if layer == 1 else 3
        for layer in range(3)
        for module in modules
    }


def test_the_outline_tells_rank_and_modules_and_reads_no_weight(
    folder: Path, model: ModelConfig
) -> None:
    edit_weights(folder, lambda weights: weights[Q_A].fill_(float("nan")))
    outline = check_adapter(folder, model)
    assert (outline.rank, outline.target_modules) == (RANK, set(ALL_MODULES))


def test_an_adapter_that_is_loaded_does_not_change_with_its_file(
    folder: Path, model: ModelConfig
) -> None:
    adapter = load(folder, model)
    before = [factors.a.clone() for factors in adapter.factors.values()]
    with (folder / WEIGHTS).open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    after = [factors.a for factors in adapter.factors.values()]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_files_that_change_while_they_are_read_are_refused(
    folder: Path, model: ModelConfig, base: DecoderWeights, file: str
) -> None:
    outline = check_adapter(folder, model)
    os.utime(folder / file, ns=(0, 0))
    with pytest.raises(BadInput, match=r"were changed while they were read; load it again\."):
        load_adapter("name", folder, outline, model, base)


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_file_that_is_cut_off_after_it_was_checked_is_refused(
    folder: Path, model: ModelConfig, base: DecoderWeights, length: int
) -> None:
    outline, path = check_adapter(folder, model), folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BadInput) as error:
        load_adapter("name", folder, outline, model, base)
    assert str(error.value) == f"{path}: was changed while it was read; load it again."


def test_a_file_that_is_written_anew_again_and_again_kills_no_reader(
    folder: Path, model_folder: Path
) -> None:
    """Where it is mapped, the kernel does (SIGBUS)."""
    content = (folder / WEIGHTS).read_bytes()
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, folder, model_folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout
    assert reader.stdout.readline() == "reads\n"
    for _ in range(1000):
        (folder / WEIGHTS).write_bytes(content)  # Empty at first.
    out, _ = reader.communicate("enough\n", timeout=PATIENCE)
    assert reader.returncode == 0
    assert out == "The last one was whole.\n"


#: Loads an adapter over and over until it is told to stop, and then once more.
READER = """
import sys, threading
from pathlib import Path
import torch
from schemas.errors import BadInput
from worker.adapters.peft_format import check_adapter, load_adapter
from worker.model.config import ModelConfig
from worker.model.weights import random_weights

folder, model = Path(sys.argv[1]), ModelConfig.from_folder(Path(sys.argv[2]))
base = random_weights(model, torch.device("cpu"), torch.float32)
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), stop.set())).start()

def load():
    return load_adapter("name", folder, check_adapter(folder, model), model, base)

load()
print("reads", flush=True)
while not stop.is_set():
    try:
        load()
    except BadInput:
        pass
load()
print("The last one was whole.")
"""


def test_where_the_base_model_stood_when_the_adapter_was_trained_does_not_matter(
    folder: Path, model: ModelConfig
) -> None:
    edit_config(folder, base_model_name_or_path="/somewhere/else", revision="main")
    assert load(folder, model).rank == RANK


def test_keys_may_hold_the_adapters_name(folder: Path, model: ModelConfig) -> None:
    without = load(folder, model).factors
    edit_weights(folder, lambda weights: insert_name(weights, list(weights), "default"))
    named = load(folder, model).factors
    assert named.keys() == without.keys()
    assert all(named[place].a.equal(without[place].a) for place in without)
    assert all(named[place].b.equal(without[place].b) for place in without)


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


# --- Token embeddings and output head -----------------------------------------------------------

ENDS = ("embed_tokens", "lm_head")
BASE_COPY = {
    "embed_tokens": "base_model.model.model.embed_tokens.base_layer.weight",
    "lm_head": "base_model.model.lm_head.base_layer.weight",
}


@pytest.fixture(scope="module")
def of_ends(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA of both ends and of q_proj. PEFT saves the base weights of the ends along."""
    path = tmp_path_factory.mktemp("ends")
    modules = [*ENDS, "q_proj"]
    with ignoring_warnings():
        return make_adapter(model_folder, path, rank=RANK, seed=1, target_modules=modules)


@pytest.fixture
def ends_folder(of_ends: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(of_ends, tmp_path / "ends"))


@pytest.fixture(scope="module")
def base(model_folder: Path, model: ModelConfig) -> DecoderWeights:
    return load_weights(model_folder, model, torch.device("cpu"), torch.float32)


def test_lora_of_embeddings_and_head_is_read(
    ends_folder: Path, model: ModelConfig, base: DecoderWeights
) -> None:
    adapter = load(ends_folder, model, base=base)
    weights = load_file(ends_folder / WEIGHTS)
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    embedding, head = adapter.factors[None, "embed_tokens"], adapter.factors[None, "lm_head"]
    assert embedding.a.equal(weights[f"{prefix}A"])
    assert embedding.b.equal(weights[f"{prefix}B"].t() * (ALPHA / RANK))
    assert head.a.equal(weights["base_model.model.lm_head.lora_A.weight"])
    assert head.b.equal(weights["base_model.model.lm_head.lora_B.weight"].t() * (ALPHA / RANK))
    assert adapter.target_modules == {*ENDS, "q_proj"}


def test_keys_of_embeddings_may_hold_the_adapters_name(
    ends_folder: Path, model: ModelConfig, base: DecoderWeights
) -> None:
    def rename(weights: Weights) -> None:
        for key in [key for key in weights if "lora_" in key]:
            ending = ".weight" if key.endswith(".weight") else ""
            weights[key.removesuffix(".weight") + ".default" + ending] = weights.pop(key)

    edit_weights(ends_folder, rename)
    assert load(ends_folder, model, base=base).target_modules == {*ENDS, "q_proj"}


def test_base_weights_saved_along_are_compared_in_the_workers_type(
    ends_folder: Path, model_folder: Path, model: ModelConfig
) -> None:
    base = load_weights(model_folder, model, torch.device("cpu"), torch.bfloat16)
    assert load(ends_folder, model, torch.bfloat16, base).rank == RANK


def test_embeddings_saved_beside_lora_of_other_modules_do_no_harm(
    folder: Path, model: ModelConfig, base: DecoderWeights
) -> None:
    """As ``save_embedding_layers=True`` does."""
    keys = {"base_model.model.model.embed_tokens.weight": base.embedding}
    keys["base_model.model.lm_head.weight"] = base.head
    edit_weights(folder, lambda weights: weights.update(keys))
    assert load(folder, model, base=base).target_modules == set(ALL_MODULES)


@pytest.mark.parametrize("module", ENDS)
def test_base_weights_saved_along_that_are_not_the_workers_are_refused(
    ends_folder: Path, model: ModelConfig, base: DecoderWeights, module: str
) -> None:
    key = BASE_COPY[module]
    edit_weights(ends_folder, lambda weights: weights[key][210, 71].add_(1e-3))
    assert refusal(ends_folder, model, base=base) == (
        f"{ends_folder / WEIGHTS}: {key} is not this base model's {module} in torch.float32: it is"
        " of another base model, rounded to another type, or trained. If it is trained, name it in"
        " modules_to_save; if not, leave it out (save_embedding_layers=False)."
    )


@pytest.mark.parametrize("num_tokens", [209, 212])
def test_a_vocabulary_of_the_adapters_own_is_refused(
    ends_folder: Path, model: ModelConfig, num_tokens: int
) -> None:
    key = BASE_COPY["lm_head"]
    resized = torch.zeros(num_tokens, HIDDEN)
    edit_weights(ends_folder, lambda weights: weights.update({key: resized}))
    assert refusal(ends_folder, model) == (
        f"{ends_folder / WEIGHTS}: {key} has the shape {(num_tokens, HIDDEN)}, and the base model's"
        f" is {(211, HIDDEN)}: an adapter with a vocabulary of its own cannot be served. Resize and"
        " save the base model with it, or train the adapter on the model as it is."
    )


def test_embeddings_stored_as_no_plain_numbers_are_refused(
    ends_folder: Path, model: ModelConfig
) -> None:
    key = BASE_COPY["lm_head"]
    quantized = torch.zeros(211, HIDDEN, dtype=torch.int8)
    edit_weights(ends_folder, lambda weights: weights.update({key: quantized}))
    assert refusal(ends_folder, model) == (
        f"{ends_folder / WEIGHTS}: {key} is stored as I8; save it as float32 or bfloat16."
    )


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("model.embed_tokens.lora_embedding_A", (RANK, 211)),
        ("model.embed_tokens.lora_embedding_B", (HIDDEN, RANK)),
        ("lm_head.lora_A.weight", (RANK, HIDDEN)),
        ("lm_head.lora_B.weight", (211, RANK)),
    ],
)
def test_factors_of_embeddings_and_head_are_held_against_the_model(
    ends_folder: Path, model: ModelConfig, key: str, shape: tuple[int, int]
) -> None:
    key = f"base_model.model.{key}"
    edit_weights(ends_folder, lambda weights: weights.update({key: torch.zeros(2, 2)}))
    assert refusal(ends_folder, model) == (
        f"{ends_folder / WEIGHTS}: {key} has the shape (2, 2); rank {RANK} of {CONFIG} and the"
        f" model ask for {shape}. Is the adapter for another base model?"
    )
    edit_weights(ends_folder, lambda weights: weights.pop(key))
    assert refusal(ends_folder, model).startswith(f"{ends_folder / WEIGHTS}: lacks {key}, of a")


@pytest.mark.parametrize("key", ["model.embed_tokens.lora_embedding_A", "lm_head.lora_A.weight"])
def test_factors_of_embeddings_or_head_that_the_config_does_not_select_are_refused(
    folder: Path, model: ModelConfig, key: str
) -> None:
    key = f"base_model.model.{key}"
    edit_weights(folder, lambda weights: weights.update({key: torch.ones(RANK, HIDDEN)}))
    expected = f"{folder / WEIGHTS}: {key}: {CONFIG} does not select this module."
    assert refusal(folder, model) == expected


# --- Fully trained embeddings and output head ---------------------------------------------------

TRAINED = {
    "embed_tokens": "base_model.model.model.embed_tokens.weight",
    "lm_head": "base_model.model.lm_head.weight",
}


@pytest.fixture(scope="module")
def of_trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, settings = tmp_path_factory.mktemp("trained"), {"modules_to_save": list(ENDS)}
    modules = ["q_proj"]
    return make_adapter(model_folder, path, rank=RANK, seed=1, target_modules=modules, **settings)


@pytest.fixture
def trained_folder(of_trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(of_trained, tmp_path / "trained"))


def test_trained_modules_are_read(
    trained_folder: Path, model: ModelConfig, base: DecoderWeights
) -> None:
    adapter = load(trained_folder, model, base=base)
    stored = load_file(trained_folder / WEIGHTS)
    assert adapter.target_modules == {"q_proj"}
    assert adapter.on_device.trained.keys() == set(ENDS)
    for module, weight in adapter.on_device.trained.items():
        assert weight.equal(stored[TRAINED[module]])
        assert not weight.equal(base.ends()[module])
    assert adapter.on_device.num_bytes == 2 * 4 * 211 * HIDDEN


@pytest.mark.parametrize("name", ["lm_head", "model.lm_head"])
def test_a_trained_module_is_named_by_the_end_of_its_name(
    trained_folder: Path, model: ModelConfig, name: str
) -> None:
    edit_config(trained_folder, modules_to_save=[name.removeprefix("model."), "model.embed_tokens"])
    assert load(trained_folder, model).on_device.trained.keys() == set(ENDS)


@pytest.mark.parametrize("name", ["norm", "q_proj", "score", "tokens", "layers.0"])
def test_other_trained_modules_are_refused(
    trained_folder: Path, model: ModelConfig, name: str
) -> None:
    edit_config(trained_folder, modules_to_save=["lm_head", name])
    assert refusal(trained_folder, model) == (
        f"{trained_folder / CONFIG}: modules_to_save: '{name}': of fully trained modules only"
        " embed_tokens and lm_head can be served."
    )


def test_a_trained_module_that_has_lora_too_is_refused(
    trained_folder: Path, model: ModelConfig
) -> None:
    edit_config(trained_folder, target_modules=["q_proj", "lm_head"])
    assert refusal(trained_folder, model) == (
        f"{trained_folder / CONFIG}: both target_modules and modules_to_save select lm_head; a"
        " module is either replaced or changed by LoRA."
    )


@pytest.mark.parametrize("key", TRAINED.values())
def test_a_trained_module_without_its_weight_is_refused(
    trained_folder: Path, model: ModelConfig, key: str
) -> None:
    edit_weights(trained_folder, lambda weights: weights.pop(key))
    assert refusal(trained_folder, model).startswith(f"{trained_folder / WEIGHTS}: lacks {key}, of")


@pytest.mark.parametrize("key", TRAINED.values())
def test_a_trained_module_of_a_resized_vocabulary_is_refused(
    trained_folder: Path, model: ModelConfig, key: str
) -> None:
    edit_weights(trained_folder, lambda weights: weights.update({key: torch.zeros(219, HIDDEN)}))
    assert refusal(trained_folder, model).startswith(
        f"{trained_folder / WEIGHTS}: {key} has the shape {(219, HIDDEN)}, and the base model's is"
    )


@pytest.mark.parametrize("key", TRAINED.values())
def test_a_trained_module_that_is_not_finite_is_refused(
    trained_folder: Path, model: ModelConfig, key: str
) -> None:
    edit_weights(trained_folder, lambda weights: weights[key][210, 71].fill_(float("inf")))
    assert refusal(trained_folder, model) == (
        f"{trained_folder / WEIGHTS}: {key} holds NaN or infinite values, or such as torch.float32"
        " cannot hold."
    )


def test_trained_modules_that_find_no_room_on_the_device_are_refused_with_the_figure(
    trained_folder: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_weights, "_SPARED_BYTES", 1 << 60)
    assert refusal(trained_folder, model) == (
        "its own embed_tokens needs 0.1 MB of the device's memory, which has 0.0 MB to spare."
        " Unload other adapters, or start the worker with a lower --mem-fraction-static or"
        " --max-loaded-loras."
    )


def test_the_base_weight_beside_a_trained_one_is_compared(
    trained_folder: Path, model: ModelConfig, base: DecoderWeights
) -> None:
    key = "base_model.model.lm_head.original_module.weight"
    edit_weights(trained_folder, lambda weights: weights.update({key: base.head}))
    assert load(trained_folder, model, base=base).rank == RANK
    edit_weights(trained_folder, lambda weights: weights[key][0].add_(1))
    assert f"{key} is not this base model's lm_head" in refusal(trained_folder, model, base=base)


@pytest.mark.parametrize(
    ("settings", "one", "other"),
    [
        ({"modules_to_save": ["lm_head"]}, TRAINED["embed_tokens"], TRAINED["lm_head"]),
        (
            {"target_modules": ["lm_head"]},
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "base_model.model.lm_head.lora_B.weight",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            "base_model.model.model.embed_tokens.lora_embedding_B",
            "base_model.model.lm_head.lora_A.weight",
        ),
    ],
)
def test_changes_of_both_ends_that_are_to_be_one_and_differ_are_refused(
    tmp_path: Path, settings: dict[str, list[str]], one: str, other: str
) -> None:
    model_folder = make_llama(tmp_path / "model", tie_word_embeddings=True)
    model = ModelConfig.from_folder(model_folder)
    base = load_weights(model_folder, model, torch.device("cpu"), torch.float32)
    folder = tmp_path / "adapter"
    settings = {"target_modules": ["q_proj"]} | settings
    with ignoring_warnings():
        make_adapter(model_folder, folder, rank=2, seed=1, ensure_weight_tying=True, **settings)
    assert load(folder, model, base=base)
    edit_weights(folder, lambda weights: weights[other][0].add_(1))
    assert refusal(folder, model, base=base) == (
        f"{folder / WEIGHTS}: {one} and {other} differ, and by ensure_weight_tying of {CONFIG} they"
        " are one."
    )


# --- DoRA ---------------------------------------------------------------------------------------

Q_M = f"{PREFIX}.1.self_attn.q_proj.lora_magnitude_vector"


@pytest.fixture(scope="module")
def of_dora(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dora")
    modules = ["q_proj", "v_proj", "lm_head"]
    with ignoring_warnings():
        return make_adapter(
            model_folder, path, rank=RANK, seed=1, target_modules=modules, use_dora=True
        )


@pytest.fixture
def dora_folder(of_dora: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(of_dora, tmp_path / "dora"))


def test_dora_multiplies_rows_by_magnitude_over_length(
    dora_folder: Path, model: ModelConfig, model_folder: Path, base: DecoderWeights
) -> None:
    adapter = load(dora_folder, model, base=base)
    stored = {key: tensor.double() for key, tensor in load_file(dora_folder / WEIGHTS).items()}
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = load_file(model_folder / "model.safetensors")[name].double()
    b = stored[Q_B] * ALPHA / RANK
    gain = stored[Q_M] / (weight + b @ stored[Q_A]).norm(dim=1)
    # The sums of 75 squares under the norm are rounded to float32.
    close = {"rtol": 75 * 2.0**-24, "atol": 0}
    gains = adapter.on_device.gains["qkv_proj"]
    torch.testing.assert_close(gains[1, :HIDDEN].double(), gain, **close)
    factors = adapter.factors[1, "q_proj"]
    torch.testing.assert_close(factors.b.double(), b.t() * gain, **close)
    assert factors.a.equal(stored[Q_A].float())


def test_dora_leaves_the_rows_of_other_modules_alone(
    dora_folder: Path, model: ModelConfig, base: DecoderWeights
) -> None:
    gains = load(dora_folder, model, base=base).on_device.gains
    assert gains.keys() == {"qkv_proj", "lm_head"}
    assert gains["qkv_proj"].shape == (3, 72 + 24 + 24)
    assert gains["lm_head"].shape == (1, 211)
    assert (gains["qkv_proj"][:, 72:96] == 1).all()


def test_magnitudes_may_stand_under_the_adapters_name(
    dora_folder: Path, model: ModelConfig, base: DecoderWeights
) -> None:
    def rename(weights: Weights) -> None:
        for key in [key for key in weights if "lora_" in key]:
            weights[key.removesuffix(".weight") + ".mine.weight"] = weights.pop(key)

    expected = load(dora_folder, model, base=base).on_device.gains["qkv_proj"]
    edit_weights(dora_folder, rename)
    assert load(dora_folder, model, base=base).on_device.gains["qkv_proj"].equal(expected)


def test_a_module_without_its_magnitude_is_refused(dora_folder: Path, model: ModelConfig) -> None:
    edit_weights(dora_folder, lambda weights: weights.pop(Q_M))
    assert refusal(dora_folder, model) == (
        f"{dora_folder / WEIGHTS}: lacks {Q_M}, of a module that {CONFIG} selects."
        " Is the file whole, and the adapter for this base model?"
    )


def test_a_magnitude_of_the_wrong_shape_is_refused(dora_folder: Path, model: ModelConfig) -> None:
    edit_weights(dora_folder, lambda weights: weights.update({Q_M: torch.ones(HIDDEN, 1)}))
    assert refusal(dora_folder, model) == (
        f"{dora_folder / WEIGHTS}: {Q_M} has the shape {(HIDDEN, 1)}; rank {RANK} of {CONFIG} and"
        f" the model ask for {(HIDDEN,)}. Is the adapter for another base model?"
    )


@pytest.mark.parametrize("ending", ["", ".default.weight"])
def test_a_magnitude_of_an_adapter_without_dora_is_refused(
    folder: Path, model: ModelConfig, ending: str
) -> None:
    key = Q_M + ending
    edit_weights(folder, lambda weights: weights.update({key: torch.ones(HIDDEN)}))
    assert refusal(folder, model) == (
        f"{folder / WEIGHTS}: {key}: {CONFIG} does not say that this module has DoRA (use_dora)."
    )


def test_a_magnitude_that_is_not_finite_is_refused(
    dora_folder: Path, model: ModelConfig, base: DecoderWeights
) -> None:
    edit_weights(dora_folder, lambda weights: weights[Q_M][3].fill_(float("nan")))
    assert refusal(dora_folder, model, base=base) == (
        f"{dora_folder / WEIGHTS}: {Q_M}, divided by the lengths of the changed weight's rows,"
        " holds NaN or infinite values."
    )


def test_a_row_without_length_is_refused(dora_folder: Path, model: ModelConfig) -> None:
    """PEFT would answer NaN."""
    base = random_weights(model, torch.device("cpu"), torch.float32)
    base.layers[1].linears["qkv_proj"][7] = 0
    base.ends()["lm_head"].copy_(load_file(dora_folder / WEIGHTS)[BASE_COPY["lm_head"]])
    edit_weights(dora_folder, lambda weights: weights[Q_B][7].fill_(0))
    assert f"{Q_M}, divided by the lengths" in refusal(dora_folder, model, base=base)


def test_magnitudes_that_find_no_room_on_the_device_are_refused_with_the_figure(
    dora_folder: Path, model: ModelConfig, base: DecoderWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_weights, "_SPARED_BYTES", 1 << 60)
    assert refusal(dora_folder, model, base=base) == (
        "DoRA of qkv_proj needs 0.0 MB of the device's memory, which has 0.0 MB to spare."
        " Unload other adapters, or start the worker with a lower --mem-fraction-static or"
        " --max-loaded-loras."
    )


# --- Revisions ----------------------------------------------------------------------------------


def test_the_revision_does_not_change_with_names(
    original: Path, folder: Path, model: ModelConfig
) -> None:
    base = random_weights(model, torch.device("cpu"), torch.float32)
    there = load_adapter("another", original, check_adapter(original, model), model, base)
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


def test_the_revision_changes_with_the_order_of_patterns(folder: Path, model: ModelConfig) -> None:
    """The first that matches is the one that counts."""
    alphas = {"q_proj": 1, "self_attn.q_proj": 2}
    edit_config(folder, alpha_pattern=alphas)
    first = load(folder, model)
    edit_config(folder, alpha_pattern=dict(reversed(alphas.items())))
    second = load(folder, model)
    assert first.revision != second.revision
    assert not first.factors[1, "q_proj"].b.equal(second.factors[1, "q_proj"].b)


# --- Configs that are refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "what"),
    [
        ("layer_replication", [[0, 2], [1, 3]], "replicated layers"),
        ("lora_bias", True, "a bias in B"),
        ("trainable_token_indices", [3], "trained token embeddings"),
        ("target_parameters", ["experts.down_proj"], "bare parameters as targets"),
        ("alora_invocation_tokens", [3], "activation by tokens (aLoRA)"),
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal factors"),
        ("arrow_config", {"top_k": 2}, "Arrow routing"),
        ("kasa_config", {"beta": 1e-4}, "KaSA"),
        ("monteclora_config", {"num_samples": 8}, "MonteCLoRA"),
        ("velora_config", {"num_groups": 2}, "VeLoRA"),
        ("megatron_config", {"tensor_model_parallel_size": 2}, "LoRA of Megatron's layers"),
    ],
)
def test_a_setting_that_changes_the_product_is_refused(
    folder: Path, model: ModelConfig, setting: str, value: object, what: str
) -> None:
    edit_config(folder, **{setting: value})
    assert refusal(folder, model) == f"{folder / CONFIG}: {setting}: {what} is not supported."


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["query_key_value"]},
        {"target_modules": []},
        {"target_modules": r".*\.attention\..*"},
        {"target_modules": "q_proj"},
        {"layers_to_transform": [3, 4]},
        {"layers_to_transform": 0, "layers_pattern": "h"},
        {"exclude_modules": list(ALL_MODULES)},
        {"exclude_modules": ".*"},
    ],
    ids=str,
)
def test_a_config_that_targets_nothing_the_model_has_is_refused(
    folder: Path, model: ModelConfig, changes: dict[str, object]
) -> None:
    edit_config(folder, **changes)
    assert refusal(folder, model) == (
        f"{folder / CONFIG}: targets nothing the model has. Look at target_modules, exclude_modules"
        " and layers_to_transform; the model has 3 layers with q_proj, k_proj, v_proj, o_proj,"
        " gate_proj, up_proj, down_proj, embed_tokens, lm_head."
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"target_modules": None},
            "target_modules is not given, and PEFT would choose by its version. Name the modules"
            " that were trained.",
        ),
        (
            {"target_modules": "all-linear", "layers_to_transform": [1]},
            "layers_to_transform does not go with target_modules in one string.",
        ),
        (
            {"target_modules": ".*q_proj", "layers_pattern": "layers"},
            "layers_pattern does not go with target_modules in one string.",
        ),
        (
            {"layers_pattern": ["layers"]},
            "layers_pattern does not go without layers_to_transform.",
        ),
    ],
)
def test_targets_that_peft_would_not_take_are_refused(
    folder: Path, model: ModelConfig, changes: dict[str, object], problem: str
) -> None:
    edit_config(folder, **changes)
    assert refusal(folder, model) == f"{folder / CONFIG}: {problem}"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rank_pattern": {"q_proj(": 2}}, r"rank_pattern: '(.*\.)?(q_proj()$'"),
        ({"alpha_pattern": {"(?i)Q_PROJ": 2}}, r"alpha_pattern: '(.*\.)?((?i)Q_PROJ)$'"),
        ({"target_modules": "*q_proj"}, "target_modules: '*q_proj'"),
        ({"exclude_modules": "q{99999999999}"}, "exclude_modules: 'q{99999999999}'"),
        (
            {"layers_to_transform": 1, "layers_pattern": "(?P<idx>h)"},
            r"layers_pattern: '(?:^|.*?\.)(?P<idx>h)\.(?P<idx>\d+)\.'",
        ),
    ],
)
def test_a_pattern_that_is_no_regular_expression_is_refused(
    folder: Path, model: ModelConfig, changes: dict[str, object], problem: str
) -> None:
    edit_config(folder, **changes)
    expected = f"{folder / CONFIG}: {problem} is no regular expression: "
    assert refusal(folder, model).startswith(expected)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 2.5}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("alpha_pattern", {"q_proj": "4"}),
        ("target_modules", [3]),
        ("layers_to_transform", ["1"]),
        ("bias", "some"),
        ("use_rslora", "yes"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_by_name(
    folder: Path, model: ModelConfig, setting: str, value: object
) -> None:
    edit_config(folder, **{setting: value})
    assert refusal(folder, model).startswith(f"{folder / CONFIG}: {setting}")


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


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "OLoRA", "corda", "lora_ga"])
def test_a_start_that_changes_the_base_model_is_refused(
    folder: Path, model: ModelConfig, init: str
) -> None:
    edit_config(folder, init_lora_weights=init)
    assert refusal(folder, model) == (
        f"{folder / CONFIG}: init_lora_weights is '{init}', which changes the base model's weights."
        " Convert the adapter with PEFT (path_initial_model_for_weight_conversion) first."
    )


def test_a_start_on_a_quantized_base_model_is_refused(folder: Path, model: ModelConfig) -> None:
    edit_config(folder, init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    assert refusal(folder, model) == (
        f"{folder / CONFIG}: init_lora_weights is 'loftq': the adapter makes up for the errors of a"
        " quantized base model, and this one is not quantized."
    )


def test_an_unknown_start_is_refused(folder: Path, model: ModelConfig) -> None:
    edit_config(folder, init_lora_weights="next-years")
    assert refusal(folder, model) == (
        f"{folder / CONFIG}: init_lora_weights is 'next-years', which is unknown here and may have"
        " changed the base model's weights. Write true if it has not."
    )


@pytest.mark.parametrize(
    "init", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"]
)
def test_a_start_that_leaves_the_base_model_alone_is_served(
    folder: Path, model: ModelConfig, init: object
) -> None:
    edit_config(folder, init_lora_weights=init)
    assert load(folder, model).rank == RANK


@pytest.mark.parametrize(
    "settings",
    [
        {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
        {"eva_config": {"rho": 2.0}},
        {"corda_config": {"corda_method": "kpm"}},
        {"lora_ga_config": {"scale": "stable"}},
        {"alora_invocation_tokens": []},
        {"qalora_group_size": 8, "use_qalora": False},
        {"megatron_core": "megatron.core"},
    ],
    ids=str,
)
def test_what_is_left_of_a_start_or_of_what_is_off_does_no_harm(
    folder: Path, model: ModelConfig, settings: dict[str, object]
) -> None:
    """PEFT does not look at it either."""
    edit_config(folder, **settings)
    assert load(folder, model).rank == RANK


@pytest.mark.parametrize("peft_type", ["ADALORA", "XLORA", "VERA", "LOHA", "TRAINABLE_TOKENS"])
def test_another_kind_of_adapter_is_refused(
    folder: Path, model: ModelConfig, peft_type: str
) -> None:
    edit_config(folder, peft_type=peft_type)
    expected = f"{folder / CONFIG}: peft_type is {peft_type}; only LORA can be served."
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
        ('{"peft_type": "LORA", "lora_alpha": 6}', "r: field required"),
        ('{"peft_type": "LORA", "lora_alpha": 6, "r": 0}', "r: should be greater"),
        (
            '{"peft_type": "LORA", "lora_alpha": null, "r": 3}',
            "lora_alpha: should be",
        ),
    ],
)
def test_a_broken_config_is_refused_with_the_place_of_the_break(
    folder: Path, model: ModelConfig, text: str, problem: str
) -> None:
    (folder / CONFIG).write_text(text)
    assert refusal(folder, model).startswith(f"{folder / CONFIG}: {problem}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"peft_type":"\\ud800"}', "holds '\\ud800', half of a character, in a text."),
        (b'{"\xed\xa0\x80":1}', "holds '\\ud800', half of a character, in a text."),
        (b"[" * 200_000, "is nested too deeply to be a config."),
        (b'{"a":' * 150_000, "is nested too deeply to be a config."),
        (b" " * 1_000_001, "has more than 1000000 bytes, which no config needs."),
    ],
)
def test_a_config_that_no_reason_could_tell_of_is_refused(
    folder: Path, model: ModelConfig, base: DecoderWeights, content: bytes, problem: str
) -> None:
    (folder / CONFIG).write_bytes(content)
    assert refusal(folder, model) == f"{folder / CONFIG}: {problem}"
    with pytest.raises(BadInput, match=re.escape(problem)):
        AdapterLoader(model, base, AdapterLimits(8, ALL_MODULES)).revision(folder)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_refused_and_keeps_nobody_waiting(
    folder: Path, model: ModelConfig, base: DecoderWeights, file: str, kind: str
) -> None:
    path = folder / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    expected = f"{path}: is no regular file; put a file, or a link to one, in its place."
    assert refusal(folder, model) == expected
    with pytest.raises(BadInput, match=re.escape(expected)):
        AdapterLoader(model, base, AdapterLimits(8, ALL_MODULES)).revision(folder)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_finite_number_is_refused(
    folder: Path, model: ModelConfig, alpha: float
) -> None:
    edit_config(folder, lora_alpha=alpha)
    assert "lora_alpha" in refusal(folder, model)


# --- Another base model -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_name", "repository", "is_told"),
    [
        ("other/llama@main", "acme/llama", True),
        ("acme/Llama", "ACME/llama", False),
        ("/models/llama", "acme/llama", False),
        ("llama", "acme/llama", False),
        (None, "acme/llama", False),
        (["other/llama"], "acme/llama", False),
        ("other/llama", None, False),
    ],
)
def test_an_adapter_that_names_another_base_than_the_worker_has_is_told_once(
    folder: Path,
    model: ModelConfig,
    base: DecoderWeights,
    base_name: object,
    repository: str | None,
    is_told: bool,
) -> None:
    edit_config(folder, base_model_name_or_path=base_name)
    loader = AdapterLoader(model, base, AdapterLimits(8, ALL_MODULES), repository)
    with capture_logs() as logs:
        for _ in range(2):
            assert loader.load("sql", folder).rank == RANK
    told = {
        "event": "adapter_of_another_base",
        "log_level": "warning",
        "adapter": "sql",
        "base": "other/llama",
        "model": repository,
    }
    assert logs == [told] * is_told


# --- Weights that are refused -------------------------------------------------------------------


def test_a_folder_that_no_system_can_look_up_is_refused(
    model: ModelConfig, base: DecoderWeights
) -> None:
    folder = Path("/" + "a" * 300)
    loader = AdapterLoader(model, base, AdapterLimits(8, ALL_MODULES))
    with pytest.raises(BadInput, match="there is no folder"):
        loader.load("sql", folder)
    with pytest.raises(BadInput, match="there is no folder"):
        loader.revision(folder)


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
    assert refusal(folder, model).startswith(f"{path}: is damaged or not completely copied: ")


@pytest.mark.parametrize(
    "key",
    [
        f"{PREFIX}.0.self_attn.qkv_proj.lora_A.weight",
        f"{PREFIX}.0.mlp.experts.3.up_proj.lora_A.weight",
        f"{PREFIX}.0.mlp.q_proj.lora_A.weight",
        f"{PREFIX}.01.self_attn.q_proj.lora_A.weight",
        f"{PREFIX}.0.self_attn.q_proj.weight",
        f"{PREFIX}.0.self_attn.q_proj.lora_C.weight",
        f"{PREFIX}.0.self_attn.q_proj.lora_A.a.b.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_key_that_matches_no_module_is_refused(
    folder: Path, model: ModelConfig, key: str
) -> None:
    edit_weights(folder, lambda weights: weights.update({key: torch.ones(RANK, HIDDEN)}))
    assert refusal(folder, model) == (
        f"{folder / WEIGHTS}: {key}: matches no module that an adapter can change here"
        " (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, embed_tokens, lm_head)."
    )


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", "trained token embeddings"),
        ("model.layers.0.self_attn.q_proj.lora_B.bias", "a bias in B"),
        ("model.layers.0.self_attn.q_proj.base_layer.bias", "a trained bias"),
        (
            "model.layers.0.self_attn.q_proj.base_layer.weight",
            "a changed weight of a linear module",
        ),
        ("lm_head.modules_to_save.weight", "a second copy of a trained module"),
    ],
)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_weights_of_what_is_not_supported_are_refused_though_the_config_tells_of_none(
    folder: Path, model: ModelConfig, key: str, what: str, bias: str
) -> None:
    edit_config(folder, bias=bias)
    key = f"base_model.model.{key}"
    edit_weights(folder, lambda weights: weights.update({key: torch.ones(3)}))
    assert refusal(folder, model) == f"{folder / WEIGHTS}: {key}: {what} is not supported."


def test_a_module_that_the_config_does_not_select_is_refused(
    folder: Path, model: ModelConfig
) -> None:
    edit_config(folder, exclude_modules=r".*\.1\..*q_proj")
    expected = f"{folder / WEIGHTS}: {Q_A}: {CONFIG} does not select this module."
    assert refusal(folder, model) == expected


def test_a_module_that_lacks_its_weights_is_refused(folder: Path, model: ModelConfig) -> None:
    """PEFT warns, and answers as if the module were left alone."""
    edit_weights(folder, lambda weights: (weights.pop(Q_A), weights.pop(Q_B)))
    assert refusal(folder, model) == (
        f"{folder / WEIGHTS}: lacks {Q_A}, of a module that {CONFIG} selects."
        " Is the file whole, and the adapter for this base model?"
    )


def test_an_adapter_for_a_model_of_fewer_layers_is_refused(
    folder: Path, model: ModelConfig
) -> None:
    deeper = replace(model, layers=(*model.layers, model.layers[-1]))
    assert f"lacks {PREFIX}.3.mlp.down_proj.lora_A.weight" in refusal(folder, deeper)


def test_keys_that_hold_the_names_of_two_adapters_are_refused(
    folder: Path, model: ModelConfig
) -> None:
    edit_weights(folder, lambda weights: insert_name(weights, list(weights), "one"))
    one = Q_A.replace(".weight", ".one.weight")
    two = Q_A.replace(".weight", ".two.weight")
    edit_weights(folder, lambda weights: weights.update({two: weights.pop(one)}))
    message = refusal(folder, model)
    assert two in message
    assert message.endswith("are of different adapters; a file holds one.")


def test_a_name_in_some_of_the_keys_only_is_refused(folder: Path, model: ModelConfig) -> None:
    edit_weights(folder, lambda weights: insert_name(weights, [Q_A], "one"))
    message = refusal(folder, model)
    assert Q_A.replace(".weight", ".one.weight") in message
    assert message.endswith("are of different adapters; a file holds one.")


def test_a_layer_that_the_model_lacks_is_refused(folder: Path, model: ModelConfig) -> None:
    key = Q_A.replace(".1.", ".3.")
    edit_weights(folder, lambda weights: weights.update({key: weights[Q_A].clone()}))
    assert refusal(folder, model) == (
        f"{folder / WEIGHTS}: {key}: the model has only 3 layers."
        " Is the adapter for another base model?"
    )


@pytest.mark.parametrize("key", [Q_A, Q_B])
def test_half_a_pair_is_refused(folder: Path, model: ModelConfig, key: str) -> None:
    edit_weights(folder, lambda weights: weights.pop(key))
    assert refusal(folder, model).startswith(f"{folder / WEIGHTS}: lacks {key}, of a module")


@pytest.mark.parametrize(
    ("key", "shape", "asked"),
    [
        (Q_A, (RANK + 1, HIDDEN), (RANK, HIDDEN)),
        (Q_A, (RANK, HIDDEN - 8), (RANK, HIDDEN)),
        (Q_A, (RANK * HIDDEN,), (RANK, HIDDEN)),
        (Q_B, (HIDDEN, RANK + 1), (HIDDEN, RANK)),
        (Q_B, (RANK, HIDDEN), (HIDDEN, RANK)),
    ],
)
def test_a_wrong_shape_is_refused(
    folder: Path,
    model: ModelConfig,
    key: str,
    shape: tuple[int, ...],
    asked: tuple[int, int],
) -> None:
    edit_weights(folder, lambda weights: weights.update({key: torch.zeros(shape)}))
    assert refusal(folder, model) == (
        f"{folder / WEIGHTS}: {key} has the shape {shape}; rank {RANK} of {CONFIG} and the model"
        f" ask for {asked}. Is the adapter for another base model?"
    )


def test_weights_of_another_rank_than_the_pattern_gives_are_refused(
    folder: Path, model: ModelConfig
) -> None:
    edit_config(folder, rank_pattern={"layers.1.self_attn.q_proj": RANK + 1})
    assert refusal(folder, model).startswith(
        f"{folder / WEIGHTS}: {Q_A} has the shape {(RANK, HIDDEN)}; rank {RANK + 1} of {CONFIG}"
    )


@pytest.mark.parametrize("key", [Q_A, Q_B])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_weight_that_is_not_finite_is_refused(
    folder: Path, model: ModelConfig, key: str, value: float
) -> None:
    edit_weights(folder, lambda weights: weights[key][2, 2].fill_(value))
    assert refusal(folder, model) == (
        f"{folder / WEIGHTS}: {key} holds NaN or infinite values, or such as torch.float32 cannot"
        " hold."
    )


def test_weights_that_become_infinite_in_the_workers_type_are_refused(
    folder: Path, model: ModelConfig
) -> None:
    """Scaled by 2 they are beyond float16's 65504."""
    edit_weights(folder, lambda weights: weights[Q_B].fill_(40_000))
    assert refusal(folder, model, torch.float16) == (
        f"{folder / WEIGHTS}: {Q_B} holds NaN or infinite values, or such as torch.float16 cannot"
        " hold."
    )


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.complex64, "C64")],
)
def test_weights_that_are_no_plain_numbers_are_refused(
    folder: Path, model: ModelConfig, dtype: torch.dtype, name: str
) -> None:
    """They are quantized, and their scales are not known here."""
    edit_weights(folder, lambda weights: weights.update({Q_A: weights[Q_A].to(dtype)}))
    assert refusal(folder, model) == (
        f"{folder / WEIGHTS}: {Q_A} is stored as {name}; save it as float32 or bfloat16."
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


# --- What cannot be read again ------------------------------------------------------------------


def test_weights_that_cannot_be_read_for_their_hash_are_told_with_their_place(
    folder: Path, model: ModelConfig, base: DecoderWeights
) -> None:
    loader = AdapterLoader(model, base, AdapterLimits(8, ALL_MODULES))
    assert len(loader.revision(folder)) == 16
    weights = folder / WEIGHTS
    weights.unlink()
    weights.symlink_to("/proc/self/mem")  # Opened by anybody, while nothing can be read there.
    with pytest.raises(BadInput) as error:
        loader.revision(folder)
    assert str(error.value) == f"{weights}: Input/output error"


@pytest.mark.parametrize("fault", [OSError(36, "File name too long"), ValueError("a null byte")])
def test_a_folder_that_no_system_can_look_into_is_told_with_the_reason(
    folder: Path,
    model: ModelConfig,
    base: DecoderWeights,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
) -> None:
    def fail(_: Path) -> str:
        raise fault

    monkeypatch.setattr(loader_module, "revision_of", fail)
    with pytest.raises(BadInput) as error:
        AdapterLoader(model, base, AdapterLimits(8, ALL_MODULES)).revision(folder)
    assert str(error.value) == f"{folder}: cannot be read: {fault}"
