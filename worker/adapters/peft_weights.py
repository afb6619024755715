"""``adapter_model.safetensors``: every key finds its module, and every tensor has its shape."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from schemas.errors import BadInput
from worker.adapters.peft_config import CONFIG_FILE, PeftConfig
from worker.adapters.peft_targets import Place, module_name
from worker.model.config import LINEAR_MODULES, ModelConfig

WEIGHTS_FILE = "adapter_model.safetensors"

_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")

#: PEFT leaves the adapter's name out when it saves; what is saved by hand may hold it.
_LORA_KEY = re.compile(
    r"base_model\.model\.(?P<name>.+)\.lora_[AB](?:\.(?P<adapter>[^.]+))?\.weight"
)

_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\..+")

#: What a key may tell of, whatever the config says; the first that is found in it.
_REFUSED_KEYS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA of the token embeddings",
    "lm_head.lora_": "LoRA of the output head",
    "trainable_tokens_delta": "trained token embeddings",
    "modules_to_save": "fully trained modules",
    "lora_diag": "KaSA",
    "lora_B.bias": "a bias in B",
    ".bias": "a trained bias",
    "base_layer.weight": "fully trained modules",
    "embed_tokens.weight": "fully trained modules",
    "lm_head.weight": "fully trained modules",
}


@dataclass(frozen=True)
class LoraFactors:
    """One module: a [rank, in_features]; b [rank, out_features], transposed and scaled."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class StoredFactors:
    """Where the factors of one module stand in the file: A [rank, in], B [out, rank]."""

    key_a: str
    key_b: str
    rank: int
    scaling: float


def find_factors(
    folder: Path, config: PeftConfig, places: Collection[Place], model: ModelConfig
) -> dict[Place, StoredFactors]:
    """The factors of the modules that the config selects, by the header of the file alone.

    Raises BadInput, naming the key, if one is missing, has another shape or type than config and
    model ask for, or belongs to no selected module.
    """
    path = folder / WEIGHTS_FILE
    file = _open(folder)
    keys = sorted(file.keys())
    if not keys:
        raise BadInput(f"{path}: holds no LoRA weights.")
    inserted = _adapter_name(path, keys)
    found = {place: _stored(config, place, inserted) for place in places}
    known = {key for factors in found.values() for key in (factors.key_a, factors.key_b)}
    for key in keys:
        if key not in known:
            raise BadInput(f"{path}: {key}: {_why_not(key, model)}")
    if missing := sorted(known.difference(keys)):
        raise BadInput(
            f"{path}: lacks {missing[0]}, of a module that {CONFIG_FILE} selects."
            " Is the file whole, and the adapter for this base model?"
        )
    for (_, module), factors in found.items():
        out_features, in_features = model.linear_shape(module)
        rank = factors.rank
        _check_header(path, factors.key_a, file, rank, (rank, in_features))
        _check_header(path, factors.key_b, file, rank, (out_features, rank))
    return found


def read_factors(
    folder: Path, stored: dict[Place, StoredFactors], dtype: torch.dtype
) -> dict[Place, LoraFactors]:
    """Read what ``find_factors`` found; raises BadInput if a number is not finite in ``dtype``."""
    path = folder / WEIGHTS_FILE
    file = _open(folder)

    def read(key: str, scaling: float) -> torch.Tensor:
        tensor: torch.Tensor = file.get_tensor(key)
        ready = (tensor.float() * scaling).to(dtype)
        if not ready.isfinite().all():
            raise BadInput(
                f"{path}: {key} holds NaN or infinite values, or such as {dtype} cannot hold."
            )
        return ready

    return {
        place: LoraFactors(
            read(factors.key_a, 1).contiguous(),
            read(factors.key_b, factors.scaling).t().contiguous(),
        )
        for place, factors in stored.items()
    }


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


def _open(folder: Path) -> Any:
    """Reads the header, which must cover the whole file."""
    path = weights_file(folder)
    try:
        return safe_open(path, "pt")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error
    except SafetensorError as error:
        raise BadInput(f"{path}: is damaged or not completely copied: {error}.") from error


def _adapter_name(path: Path, keys: Collection[str]) -> str | None:
    """The one name that stands in all keys, or in none."""
    matches = [match for key in keys if (match := _LORA_KEY.fullmatch(key))]
    examples = {match["adapter"]: match[0] for match in matches}
    if len(examples) > 1:
        one, other, *_ = examples.values()
        raise BadInput(f"{path}: {one} and {other} are of different adapters; a file holds one.")
    return next(iter(examples), None)


def _stored(config: PeftConfig, place: Place, adapter: str | None) -> StoredFactors:
    name = module_name(place)
    key_a, key_b = (
        ".".join(filter(None, ("base_model.model", name, factor, adapter, "weight")))
        for factor in ("lora_A", "lora_B")
    )
    return StoredFactors(key_a, key_b, config.rank_of(name), config.scaling_of(name))


def _why_not(key: str, model: ModelConfig) -> str:
    """What is wrong with a key that is of no selected module."""
    for part, what in _REFUSED_KEYS.items():
        if part in key:
            return f"{what} is not supported."
    match = _LORA_KEY.fullmatch(key)
    name = match["name"] if match else ""
    layer = _LAYER.fullmatch(name)
    if layer and int(layer["layer"]) >= model.num_layers:
        return (
            f"the model has only {model.num_layers} layers. Is the adapter for another base model?"
        )
    places = ((number, module) for number in range(model.num_layers) for module in LINEAR_MODULES)
    if name in map(module_name, places):
        return f"{CONFIG_FILE} does not select this module."
    return f"matches no module that an adapter can change here ({', '.join(LINEAR_MODULES)})."


def _check_header(path: Path, key: str, file: Any, rank: int, shape: tuple[int, int]) -> None:
    header = file.get_slice(key)
    if (found := tuple(header.get_shape())) != shape:
        raise BadInput(
            f"{path}: {key} has the shape {found}; rank {rank} of {CONFIG_FILE} and the model ask"
            f" for {shape}. Is the adapter for another base model?"
        )
    if (stored := header.get_dtype()) not in _WEIGHT_TYPES:
        raise BadInput(f"{path}: {key} is stored as {stored}; save it as float32 or bfloat16.")
