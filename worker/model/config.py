"""What the engine needs to know of a model, read from its ``config.json``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from schemas.errors import BadInput

#: Linear modules that share their input stand in one weight and run as one product. The order
#: of the parts is the order of their columns in the product.
LINEAR_GROUPS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}

#: The seven linear modules of a layer.
LINEAR_MODULES = tuple(module for parts in LINEAR_GROUPS.values() for module in parts)

#: What stands before and behind the layers.
END_MODULES = ("embed_tokens", "lm_head")

#: The modules that adapters may target, and those of them that run as one product.
TARGET_MODULES = (*LINEAR_MODULES, *END_MODULES)
TARGET_GROUPS = LINEAR_GROUPS | {module: (module,) for module in END_MODULES}

_ARCHITECTURES = ("LlamaForCausalLM",)
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a Llama decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    tie_word_embeddings: bool
    eos_token_ids: frozenset[int]
    dtype: torch.dtype
    inverse_frequencies: tuple[float, ...]
    """Of the rotary embedding, head_dim / 2 of them."""

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
        architectures = config.architectures or []
        if not set(architectures) & set(_ARCHITECTURES):
            raise BadInput(
                f"--model-path {folder}: architecture {', '.join(architectures) or 'unnamed'} is"
                f" not supported. Supported: {', '.join(_ARCHITECTURES)}."
            )
        if getattr(config, "quantization_config", None):
            method = config.quantization_config.get("quant_method", "unnamed")
            raise BadInput(
                f"--model-path {folder}: weights quantized by {method} are not supported."
            )
        if config.hidden_act != "silu":
            raise BadInput(
                f"--model-path {folder}: the activation {config.hidden_act} is not supported."
                " Supported: silu."
            )
        if config.attention_bias or config.mlp_bias:
            raise BadInput(f"--model-path {folder}: biases in linear layers are not supported.")
        rope_type = config.rope_parameters["rope_type"]
        if rope_type not in _ROPE_TYPES:
            raise BadInput(
                f"--model-path {folder}: rotary embedding of type '{rope_type}' is not supported."
                f" Supported: {', '.join(_ROPE_TYPES)}."
            )
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
            eos_token_ids=_eos_token_ids(folder, config),
            dtype=config.dtype or torch.float32,
            inverse_frequencies=_inverse_frequencies(config, head_dim),
        )

    def linear_shape(self, module: str) -> tuple[int, int]:
        """(out_features, in_features) of one of ``TARGET_MODULES``; the embedding is a product with
        one-hot rows, of as many features as there are tokens."""
        q_size = self.num_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        return {
            "q_proj": (q_size, self.hidden_size),
            "k_proj": (kv_size, self.hidden_size),
            "v_proj": (kv_size, self.hidden_size),
            "o_proj": (self.hidden_size, q_size),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
            "embed_tokens": (self.hidden_size, self.vocab_size),
            "lm_head": (self.vocab_size, self.hidden_size),
        }[module]

    def out_features(self, group: str) -> int:
        """Columns of the product of one of ``TARGET_GROUPS``."""
        return sum(self.linear_shape(part)[0] for part in TARGET_GROUPS[group])

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
    ids = config.eos_token_id
    if (folder / "generation_config.json").exists():
        generation = _read(folder, "generation_config.json", GenerationConfig)
        ids = generation.eos_token_id if generation.eos_token_id is not None else ids
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def _inverse_frequencies(config: Any, head_dim: int) -> tuple[float, ...]:
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        frequencies = 1.0 / rope["rope_theta"] ** exponents
    else:
        # The types accepted above scale nothing but the frequencies.
        frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    return tuple(frequencies.tolist())
