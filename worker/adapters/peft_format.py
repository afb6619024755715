"""A PEFT adapter folder, read, checked against the model, and made ready for a slot.

What cannot be served exactly is refused by name: a wrong answer is worse than none.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from schemas.errors import BadInput
from worker.model.config import LINEAR_GROUPS, LINEAR_MODULES, ModelConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_WEIGHT_KEY = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>\d+)"
    r"\.(?:self_attn\.(?P<attention>[qkvo]_proj)|mlp\.(?P<mlp>(?:gate|up|down)_proj))"
    r"\.lora_(?P<factor>[AB])\.weight"
)

_WEIGHT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: Ways to begin training that leave the base model's weights as they are. The others (PiSSA,
#: OLoRA, CorDA, LoftQ) change them, and an adapter over the unchanged base would answer wrongly.
_INNOCENT_INIT = (True, False, "gaussian", "eva", "orthogonal")

#: Settings that change the product ``B A`` and are not served.
_REFUSED_SETTINGS = {
    "use_dora": "DoRA",
    "modules_to_save": "fully trained modules",
    "layer_replication": "replicated layers",
    "rank_pattern": "ranks by module",
    "alpha_pattern": "alphas by module",
    "fan_in_fan_out": "transposed weights",
    "lora_bias": "a bias in B",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "bare parameters as targets",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "Arrow routing",
}

#: Settings that matter to training or to other tools and not to the result. Which modules of which
#: layers an adapter changes, its weights tell.
_IGNORED_SETTINGS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}


class PeftConfig(BaseModel):
    """The part of ``adapter_config.json`` that decides the product."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    r: int = Field(ge=1)
    lora_alpha: float = Field(allow_inf_nan=False)
    use_rslora: bool = False
    bias: str = "none"

    @property
    def scaling(self) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilized LoRA (Kalajdzievski, 2023)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True)
class LoraFactors:
    """One module: a [rank, in_features]; b [rank, out_features], transposed and scaled."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter in host memory. Equal only to itself: a name may be loaded anew."""

    name: str
    source: str
    revision: str
    rank: int
    factors: dict[tuple[int, str], LoraFactors]
    """By layer and module."""
    pinned: bool = False

    @cached_property
    def target_modules(self) -> frozenset[str]:
        return frozenset(module for _, module in self.factors)

    @cached_property
    def linear_groups(self) -> list[str]:
        """The groups of fused linear modules that it changes."""
        return [
            group
            for group, parts in LINEAR_GROUPS.items()
            if not self.target_modules.isdisjoint(parts)
        ]


def load_adapter(
    name: str, folder: Path, model: ModelConfig, dtype: torch.dtype, *, pinned: bool = False
) -> Adapter:
    """Read an adapter's PEFT folder.

    Raises BadInput, naming the file and the setting or key, for an adapter that cannot be served
    exactly.
    """
    config = _read_config(folder)
    weights = _read_weights(folder)
    factors = {
        place: _factors(folder, pair, place, config, model, dtype)
        for place, pair in _pairs(folder, weights, model).items()
    }
    return Adapter(name, str(folder), _revision(folder), config.r, factors, pinned)


def _read_config(folder: Path) -> PeftConfig:
    path = folder / CONFIG_FILE
    try:
        settings = json.loads(path.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("it holds something else")
    except FileNotFoundError as error:
        raise BadInput(f"{folder} is no PEFT adapter: it lacks {CONFIG_FILE}.") from error
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path}: is no JSON object: {error}") from error
    if (peft_type := settings.get("peft_type", "missing")) != "LORA":
        raise BadInput(f"{path}: peft_type is {peft_type}; only LORA can be served.")
    try:
        config = PeftConfig.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise BadInput(f"{path}: {place}: {problem['msg']}") from error
    if config.bias != "none":
        raise BadInput(f"{path}: bias is '{config.bias}'; trained biases are not supported.")
    _check_settings(path, config.model_extra or {})
    return config


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    for setting, value in settings.items():
        if setting in _REFUSED_SETTINGS and value:
            raise BadInput(f"{path}: {setting}: {_REFUSED_SETTINGS[setting]} is not supported.")
        if value and setting not in _REFUSED_SETTINGS and setting not in _IGNORED_SETTINGS:
            raise BadInput(
                f"{path}: the setting '{setting}' is unknown here, so the adapter may not be"
                " served as it was trained. Remove the setting if it does not matter."
            )
    init = settings.get("init_lora_weights", True)
    if init not in _INNOCENT_INIT:
        raise BadInput(
            f"{path}: init_lora_weights is '{init}', which changes the base model's weights."
            " Convert the adapter with PEFT (path_initial_model_for_weight_conversion) first."
        )


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.exists():
        pickled = folder / "adapter_model.bin"
        hint = (
            f" {pickled.name} is a pickle, which can run code when it is read and is never opened;"
            " save the adapter anew with PEFT's save_pretrained."
            if pickled.exists()
            else ""
        )
        raise BadInput(f"{folder}: lacks {WEIGHTS_FILE}.{hint}")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error


def _pairs(
    folder: Path, weights: dict[str, torch.Tensor], model: ModelConfig
) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    """The tensors by layer and module, each with its A and B; every key must find its place."""
    path = folder / WEIGHTS_FILE
    pairs: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        match = _WEIGHT_KEY.fullmatch(key)
        if not match:
            raise BadInput(
                f"{path}: {key} matches no module that an adapter can change here"
                f" ({', '.join(LINEAR_MODULES)})."
            )
        layer = int(match["layer"])
        if layer >= model.num_layers:
            raise BadInput(
                f"{path}: {key}: the model has only {model.num_layers} layers."
                " Is the adapter for another base model?"
            )
        module = match["attention"] or match["mlp"]
        pairs.setdefault((layer, module), {})[match["factor"]] = tensor
    for (layer, module), pair in pairs.items():
        if missing := {"A", "B"} - pair.keys():
            raise BadInput(f"{path}: layer {layer} {module} lacks lora_{missing.pop()}.")
    if not pairs:
        raise BadInput(f"{path}: holds no LoRA weights.")
    return pairs


def _factors(
    folder: Path,
    pair: dict[str, torch.Tensor],
    place: tuple[int, str],
    config: PeftConfig,
    model: ModelConfig,
    dtype: torch.dtype,
) -> LoraFactors:
    layer, module = place
    out_features, in_features = model.linear_shape(module)
    ready = {}
    for factor, shape in (("A", (config.r, in_features)), ("B", (out_features, config.r))):
        tensor = pair[factor]
        where = f"{folder / WEIGHTS_FILE}: layer {layer} {module}: lora_{factor}"
        if tuple(tensor.shape) != shape:
            raise BadInput(
                f"{where} has the shape {tuple(tensor.shape)}; rank {config.r} and the model ask"
                f" for {shape}. Is the adapter for another base model?"
            )
        if tensor.dtype not in _WEIGHT_TYPES:
            raise BadInput(f"{where} is stored as {tensor.dtype}; save it as float32 or bfloat16.")
        scaled = tensor.float() * (config.scaling if factor == "B" else 1)
        ready[factor] = scaled.to(dtype)
        if not ready[factor].isfinite().all():
            raise BadInput(f"{where} holds NaN or infinite values, or such as {dtype} cannot hold.")
    return LoraFactors(ready["A"].contiguous(), ready["B"].t().contiguous())


def _revision(folder: Path) -> str:
    """A hash of what decides the adapter's answers: its configuration and its weights."""
    digest = hashlib.sha256()
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    digest.update(json.dumps(config, sort_keys=True).encode())
    with (folder / WEIGHTS_FILE).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
