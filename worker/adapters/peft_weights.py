"""``adapter_model.safetensors``: every key finds its module, and every tensor has its shape."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from schemas.errors import BadInput
from worker.adapters.peft_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig
from worker.adapters.peft_targets import Place, Selection, all_places
from worker.adapters.safetensors_file import WEIGHT_TYPES, SafetensorsFile, StoredTensor
from worker.model.config import END_MODULES, ModelConfig

_PREFIX = "base_model.model."

#: PEFT leaves the adapter's name out when it saves; what is saved by hand may hold it. Factors of
#: the embedding are bare parameters: their keys do not end in ``weight``.
_LORA_KEY = re.compile(
    r"base_model\.model\.(?P<name>.+)\.lora_(?P<bare>embedding_)?[AB]"
    r"(?:\.(?P<adapter>[^.]+))?(?(bare)|\.weight)"
)

_MAGNITUDE = "lora_magnitude_vector"

_LAYER = re.compile(r"(?P<decoder>.+)\.layers\.(?P<layer>\d+)\..+")

#: What a key may tell of, whatever the config says; the first that is found in it.
_REFUSED_KEYS = {
    "trainable_tokens_delta": "trained token embeddings",
    "lora_diag": "KaSA",
    "lora_B.bias": "a bias in B",
    ".bias": "a trained bias",
    "modules_to_save": "a second copy of a trained module",
    "base_layer.weight": "a changed weight of a linear module",
}


#: Where PEFT saves the base weight of a module with LoRA, of one that is replaced, and of others.
_BASE_ENDINGS = ("base_layer.weight", "original_module.weight", "weight")


@dataclass(frozen=True)
class LoraFactors:
    """One module: a [rank, in_features]; b [rank, out_features], transposed and scaled."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class StoredFactors:
    """Keys of one module: A [rank, in], B [out, rank], and with DoRA the magnitude [out]."""

    a: str
    b: str
    magnitude: str | None
    rank: int
    scaling: float

    @property
    def keys(self) -> set[str]:
        return {self.a, self.b, *filter(None, [self.magnitude])}


@dataclass(frozen=True)
class StoredWeights:
    """What stands where in the file."""

    factors: dict[Place, StoredFactors]
    base_copies: dict[str, str]
    """Key -> the one of ``END_MODULES`` whose base weight PEFT has saved along."""
    trained: dict[str, str]
    """The one of ``END_MODULES`` that is replaced -> the key of its weight."""
    is_tied: bool
    """Whether factors and trained weights of both ends must agree."""


def find_weights(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    config: PeftConfig,
    selection: Selection,
    model: ModelConfig,
) -> StoredWeights:
    """The weights of what the config selects, by what the header of the file tells.

    Raises BadInput, naming the key, if one is missing, has another shape or type than config and
    model ask for, or belongs to no selected module.
    """
    beside_text = tuple(_PREFIX + start for start in model.family.beside_text)
    keys = sorted(key for key in tensors if not key.startswith(beside_text))
    inserted = _adapter_name(path, keys)
    found = {place: _stored(config, place, inserted, keys, model) for place in selection.places}
    trained = {module: _end_key(module, "weight", model) for module in selection.trained}
    base_copies = {
        key: module
        for module in END_MODULES
        for key in (_end_key(module, ending, model) for ending in _BASE_ENDINGS)
        if key in keys and key not in trained.values()
    }
    if not set(keys).difference(base_copies):
        raise BadInput(f"{path}: holds no LoRA weights.")
    known = {key for factors in found.values() for key in factors.keys}.union(trained.values())
    for key in keys:
        if key not in known and key not in base_copies:
            raise BadInput(f"{path}: {key}: {_why_not(key, model)}")
    if missing := sorted(known.difference(keys)):
        raise BadInput(
            f"{path}: lacks {missing[0]}, of a module that {CONFIG_FILE} selects."
            " Is the file whole, and the adapter for this base model?"
        )
    for (_, module), factors in found.items():
        out_features, in_features = model.linear_shape(module)
        rank = factors.rank
        _check_header(path, factors.a, tensors, rank, (rank, in_features))
        _check_header(path, factors.b, tensors, rank, (out_features, rank))
        if factors.magnitude:
            _check_header(path, factors.magnitude, tensors, rank, (out_features,))
    for key in (*base_copies, *trained.values()):
        _check_vocabulary(path, key, tensors[key], model)
    return StoredWeights(found, base_copies, trained, selection.is_tied)


def with_current_names(file: SafetensorsFile, model: ModelConfig) -> SafetensorsFile:
    """The file with keys as PEFT would write them today.

    Raises BadInput if it holds a tensor under two names.
    """
    tensors, stored_as = dict[str, StoredTensor](), dict[str, str]()
    for key, tensor in file.tensors.items():
        current = key
        if key.startswith(_PREFIX):
            current = _PREFIX + model.family.current_name(key.removeprefix(_PREFIX))
        if other := stored_as.get(current):
            raise BadInput(f"{file.path}: {other} and {key} are of the same module.")
        tensors[current], stored_as[current] = tensor, key
    return replace(file, tensors=tensors)


def weights_file(folder: Path) -> Path:
    """Raises BadInput if the folder has none."""
    path = folder / WEIGHTS_FILE
    if path.exists():
        return path
    pickled = folder / "adapter_model.bin"
    hint = (
        f" {pickled.name} is a pickle, which can run code when it is read and is never opened;"
        " save the adapter anew with PEFT's save_pretrained."
        if pickled.exists()
        else ""
    )
    raise BadInput(f"{folder}: lacks {WEIGHTS_FILE}.{hint}")


def _adapter_name(path: Path, keys: Collection[str]) -> str | None:
    """The one name that stands in all keys, or in none."""
    matches = [match for key in keys if (match := _LORA_KEY.fullmatch(key))]
    examples = {match["adapter"]: match[0] for match in matches}
    if len(examples) > 1:
        one, other, *_ = examples.values()
        raise BadInput(f"{path}: {one} and {other} are of different adapters; a file holds one.")
    return next(iter(examples), None)


def _stored(
    config: PeftConfig,
    place: Place,
    adapter: str | None,
    keys: Collection[str],
    model: ModelConfig,
) -> StoredFactors:
    name = model.family.module_name(*place)
    factors, ending = ("lora_A", "lora_B"), "weight"
    if place[1] == "embed_tokens":
        factors, ending = ("lora_embedding_A", "lora_embedding_B"), ""
    key_a, key_b = (
        _PREFIX + ".".join(filter(None, (name, factor, adapter, ending))) for factor in factors
    )
    magnitude = _magnitude_key(name, adapter, keys) if config.use_dora else None
    return StoredFactors(key_a, key_b, magnitude, config.rank_of(name), config.scaling_of(name))


def _magnitude_key(name: str, adapter: str | None, keys: Collection[str]) -> str:
    """PEFT leaves out the ``weight`` at its end, and the adapter's name; by hand they are there."""
    bare = f"{_PREFIX}{name}.{_MAGNITUDE}"
    whole = f"{bare}.{adapter}.weight"
    return whole if adapter and whole in keys else bare


def _end_key(module: str, ending: str, model: ModelConfig) -> str:
    return f"{_PREFIX}{model.family.module_name(None, module)}.{ending}"


def _why_not(key: str, model: ModelConfig) -> str:
    """What is wrong with a key that is of no selected module."""
    if _MAGNITUDE in key:
        return f"{CONFIG_FILE} does not say that this module has DoRA (use_dora)."
    for part, what in _REFUSED_KEYS.items():
        if part in key:
            return f"{what} is not supported."
    match = _LORA_KEY.fullmatch(key)
    name = match["name"] if match else ""
    layer, decoder = _LAYER.fullmatch(name), model.family.decoder
    if layer and layer["decoder"] != decoder:
        return (
            f"it is of layers of '{layer['decoder']}', and this model's are of '{decoder}'. Was the"
            " adapter trained on another class of the model?"
        )
    if layer and int(layer["layer"]) >= model.num_layers:
        return (
            f"the model has only {model.num_layers} layers. Is the adapter for another base model?"
        )
    if name in (model.family.module_name(*place) for place in all_places(model)):
        return f"{CONFIG_FILE} does not select this module."
    return f"matches no module that an adapter can change here ({', '.join(model.target_modules)})."


def _check_header(
    path: Path, key: str, tensors: Mapping[str, StoredTensor], rank: int, shape: tuple[int, ...]
) -> None:
    stored = tensors[key]
    if stored.shape != shape:
        raise BadInput(
            f"{path}: {key} has the shape {stored.shape}; rank {rank} of {CONFIG_FILE} and the"
            f" model ask for {shape}. Is the adapter for another base model?"
        )
    _check_type(path, key, stored)


def _check_vocabulary(path: Path, key: str, stored: StoredTensor, model: ModelConfig) -> None:
    shape = (model.vocab_size, model.hidden_size)
    if stored.shape != shape:
        raise BadInput(
            f"{path}: {key} has the shape {stored.shape}, and the base model's is {shape}: an"
            " adapter with a vocabulary of its own cannot be served. Resize and save the base"
            " model with it, or train the adapter on the model as it is."
        )
    _check_type(path, key, stored)


def _check_type(path: Path, key: str, stored: StoredTensor) -> None:
    if stored.dtype not in WEIGHT_TYPES:
        raise BadInput(
            f"{path}: {key} is stored as {stored.dtype}; save it as float32 or bfloat16."
        )
