"""What the engine needs to know of a model, read from its ``config.json``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from kernels.act_and_mul import Activation
from schemas.errors import BadInput
from worker.model.families import FAMILIES, Family, LayerConfig, Scales
from worker.model.rotary import longest_context

#: Linear modules that share their input stand in one weight and run as one product. The order
#: of the parts is the order of their columns in the product.
LINEAR_GROUPS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}

#: Where a model stores them so, and so its adapters change them: each group is one module.
FUSED_LINEAR_GROUPS = {group: (group,) for group in LINEAR_GROUPS}

#: The seven linear modules of a layer, unless they are fused.
LINEAR_MODULES = tuple(module for parts in LINEAR_GROUPS.values() for module in parts)

#: What stands before and behind the layers.
END_MODULES = ("embed_tokens", "lm_head")

#: The groups of modules that adapters may change, whatever the model.
TARGET_GROUPS = (*LINEAR_GROUPS, *END_MODULES)

#: The modules that adapters may target, of any model.
TARGET_MODULES = tuple(dict.fromkeys((*LINEAR_MODULES, *LINEAR_GROUPS, *END_MODULES)))

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def group_of(module: str) -> str:
    """The one of ``TARGET_GROUPS`` that one of ``TARGET_MODULES`` belongs to."""
    for group, parts in LINEAR_GROUPS.items():
        if module in parts:
            return group
    return module


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a decoder."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    biased_modules: tuple[str, ...]
    activation: Activation
    scales: Scales
    rms_norm_eps: float
    max_position: int
    tie_word_embeddings: bool
    eos_token_ids: frozenset[int]
    dtype: torch.dtype

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read a model folder; raises BadInput if it holds no model that the engine can run."""
        if not os.path.isdir(folder):
            raise BadInput(f"--model-path {folder}: there is no folder of that name.")
        if not (folder / "config.json").is_file():
            raise BadInput(
                f"--model-path {folder}: it lacks config.json. Name the folder of a Hugging Face"
                " model."
            )
        config = _read(folder, "config.json", AutoConfig)
        eos_token_ids = _eos_token_ids(folder, config)
        try:
            family = _family(config)
            text = config.get_text_config()  # Itself, unless it is of a model of more than text.
            head_dim = getattr(text, "head_dim", None)
            head_dim = head_dim or text.hidden_size // text.num_attention_heads
            return cls(
                family=family,
                vocab_size=text.vocab_size,
                hidden_size=text.hidden_size,
                intermediate_size=text.intermediate_size,
                num_heads=text.num_attention_heads,
                num_kv_heads=text.num_key_value_heads,
                head_dim=head_dim,
                layers=tuple(family.layers(text, head_dim)),
                biased_modules=family.biases(text),
                activation=_activation(text),
                scales=family.scales(text, head_dim),
                rms_norm_eps=text.rms_norm_eps,
                max_position=longest_context(text),
                tie_word_embeddings=config.tie_word_embeddings,
                # Some say -1 where there is none, or name one that was never added to the model.
                eos_token_ids=eos_token_ids.intersection(range(text.vocab_size)),
                dtype=config.dtype or torch.float32,
            )
        except BadInput as error:
            raise BadInput(f"--model-path {folder}: {error}") from error

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def linear_groups(self) -> Mapping[str, tuple[str, ...]]:
        """The modules of each linear group, in the order of their columns."""
        return FUSED_LINEAR_GROUPS if self.family.is_fused else LINEAR_GROUPS

    @property
    def linear_modules(self) -> tuple[str, ...]:
        """The linear modules of a layer."""
        return tuple(module for parts in self.linear_groups.values() for module in parts)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The modules that adapters may change."""
        return (*self.linear_modules, *END_MODULES)

    def parts_of(self, group: str) -> tuple[str, ...]:
        """The modules of one of ``TARGET_GROUPS``."""
        return self.linear_groups.get(group, (group,))

    def linear_shape(self, module: str) -> tuple[int, int]:
        """(out_features, in_features) of one of ``target_modules``; the embedding is a product with
        one-hot rows, of as many features as there are tokens."""
        q_size = self.num_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        return {
            "q_proj": (q_size, self.hidden_size),
            "k_proj": (kv_size, self.hidden_size),
            "v_proj": (kv_size, self.hidden_size),
            "qkv_proj": (q_size + 2 * kv_size, self.hidden_size),
            "o_proj": (self.hidden_size, q_size),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "gate_up_proj": (2 * self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
            "embed_tokens": (self.hidden_size, self.vocab_size),
            "lm_head": (self.vocab_size, self.hidden_size),
        }[module]

    def out_features(self, group: str) -> int:
        """Columns of the product of one of ``TARGET_GROUPS``."""
        return sum(self.linear_shape(part)[0] for part in self.parts_of(group))

    def norm_size(self, norm: str) -> int:
        """Features of one of the norms that ``family.norms`` names."""
        if norm not in ("q", "k"):
            return self.hidden_size
        if self.family.qk_norms_of == "head":
            return self.head_dim
        return (self.num_heads if norm == "q" else self.num_kv_heads) * self.head_dim

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that one token takes in the KV cache over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


def _read(folder: Path, file: str, kind: Any) -> Any:
    """What transformers makes of a file of the model folder; it raises errors of all kinds."""
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"--model-path {folder}: cannot read its {file}: {reason}") from error


def _eos_token_ids(folder: Path, config: Any) -> frozenset[int]:
    """The generation config knows every token that ends a turn; config.json may know only one."""
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        ids = config.get_text_config().eos_token_id
    if (folder / "generation_config.json").exists():
        generation = _read(folder, "generation_config.json", GenerationConfig)
        ids = generation.eos_token_id if generation.eos_token_id is not None else ids
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def _family(config: Any) -> Family:
    architectures = config.architectures or []
    known = [name for name in architectures if name in FAMILIES]
    if not known:
        raise BadInput(
            f"architecture {', '.join(architectures) or 'unnamed'} is not supported."
            f" Supported: {', '.join(FAMILIES)}."
        )
    if getattr(config, "quantization_config", None):
        method = config.quantization_config.get("quant_method", "unnamed")
        raise BadInput(f"weights quantized by {method} are not supported.")
    return FAMILIES[known[0]]


def _activation(config: Any) -> Activation:
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    if name not in _ACTIVATIONS:
        raise BadInput(
            f"the activation {name} is not supported. Supported: {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]
