"""The families of models that the decoder knows, and what sets each of them apart from Llama."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from schemas.errors import BadInput
from worker.model.rotary import Rotary, read_rotary


class Scales(NamedTuple):
    """Factors of a decoder, and the soft caps of its scores; a cap of 0 is none."""

    attention: float
    """Of a query's product with a key."""
    attention_soft_cap: float = 0.0
    embedding: float = 1.0
    residual: float = 1.0
    """Of what attention and feed-forward add to the residual stream."""
    logits: float = 1.0
    logits_soft_cap: float = 0.0


class LayerConfig(NamedTuple):
    """What may differ from layer to layer."""

    rotary: Rotary
    window: int = 0
    """Keys that a query sees, its own included; 0 for all."""


# --- Layers -------------------------------------------------------------------------------------

FULL, SLIDING = "full_attention", "sliding_attention"


def _layers(config: Any, head_dim: int) -> list[LayerConfig]:
    """All alike, and without windows."""
    return [LayerConfig(read_rotary(config, head_dim, FULL))] * config.num_hidden_layers


def _layers_with_windows(config: Any, head_dim: int) -> list[LayerConfig]:
    """All alike, all with the window, if there is one."""
    window = config.sliding_window or 0
    return [layer._replace(window=window) for layer in _layers(config, head_dim)]


def _layers_by_type(config: Any, head_dim: int) -> list[LayerConfig]:
    """With windows or without, as each layer's type says."""
    if unknown := sorted(set(config.layer_types).difference((FULL, SLIDING))):
        raise BadInput(
            f"layers of type '{unknown[0]}' are not supported. Supported: {FULL}, {SLIDING}."
        )
    windows = {FULL: 0, SLIDING: config.sliding_window or 0}
    return [
        LayerConfig(read_rotary(config, head_dim, kind), windows[kind])
        for kind in config.layer_types
    ]


def _layers_without_rope(config: Any, head_dim: int) -> list[LayerConfig]:
    """Some of them without any position embedding (Yang et al., 2025)."""
    layers = _layers_by_type(config, head_dim)
    if len(config.no_rope_layers) < len(layers):
        raise BadInput(f"config.json: no_rope_layers tells of fewer layers than {len(layers)}.")
    return [
        layer if has_rope else layer._replace(rotary=Rotary())
        for layer, has_rope in zip(layers, config.no_rope_layers, strict=False)
    ]


# --- Factors ------------------------------------------------------------------------------------


def _scales(config: Any, head_dim: int) -> Scales:
    return Scales(attention=head_dim**-0.5)


def _gemma_scales(config: Any, head_dim: int) -> Scales:
    if getattr(config, "use_bidirectional_attention", False):
        raise BadInput("attention to later tokens (use_bidirectional_attention) is not supported.")
    return Scales(
        attention=config.query_pre_attn_scalar**-0.5,
        attention_soft_cap=config.attn_logit_softcapping or 0.0,
        embedding=config.hidden_size**0.5,
        logits_soft_cap=config.final_logit_softcapping or 0.0,
    )


def _granite_scales(config: Any, head_dim: int) -> Scales:
    return Scales(
        attention=config.attention_multiplier,
        embedding=config.embedding_multiplier,
        residual=config.residual_multiplier,
        logits=1 / config.logits_scaling,
    )


# --- Biases -------------------------------------------------------------------------------------


def _no_biases(config: Any) -> tuple[str, ...]:
    return ()


def _qkv_biases(config: Any) -> tuple[str, ...]:
    return ("q_proj", "k_proj", "v_proj")


def _biases_by_config(config: Any) -> tuple[str, ...]:
    attention = ("q_proj", "k_proj", "v_proj", "o_proj") if config.attention_bias else ()
    mlp = ("gate_proj", "up_proj", "down_proj") if getattr(config, "mlp_bias", False) else ()
    return (*attention, *mlp)


# --- Norms --------------------------------------------------------------------------------------

#: What is normalized -> the norm's name in a layer of the checkpoint. A norm before attention or
#: feed-forward is of their input, one behind them of what they add to the residual stream.
NormNames = Mapping[str, str]

_PRE_NORMS: NormNames = {
    "pre_attention": "input_layernorm",
    "pre_feedforward": "post_attention_layernorm",
}
_POST_NORMS: NormNames = {
    "post_attention": "post_attention_layernorm",
    "post_feedforward": "post_feedforward_layernorm",
}
_PRE_AND_POST_NORMS: NormNames = {
    "pre_attention": "input_layernorm",
    "pre_feedforward": "pre_feedforward_layernorm",
    **_POST_NORMS,
}
_QK_NORMS: NormNames = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}


# --- Families -----------------------------------------------------------------------------------


#: What holds each linear module within a layer.
_PARENTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "down_proj"), "mlp"),
}

NameStarts = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """What the architecture's name tells; the functions read the rest from transformers' config."""

    layers: Callable[[Any, int], list[LayerConfig]] = _layers
    scales: Callable[[Any, int], Scales] = _scales
    biases: Callable[[Any], tuple[str, ...]] = _biases_by_config
    """Linear modules with a bias."""
    norms: NormNames = field(default_factory=lambda: _PRE_NORMS)
    qk_norms_of: Literal["head", "all heads"] = "head"
    """What a norm of queries and keys, if there is one, takes its mean over."""
    norms_in_float32: bool = False
    """Whether a norm's weight multiplies before its result is rounded."""
    norm_offset: float = 0.0
    """Added to the stored weights of norms."""
    is_fused: bool = False
    """Whether q/k/v and gate/up are stored, and adapted, as one module each."""
    decoder: str = "model"
    """What transformers calls the module that holds embedding, layers and last norm."""
    former_names: NameStarts = field(default_factory=dict)
    """How names in checkpoints and adapters of former versions begin -> what is said instead."""
    beside_text: tuple[str, ...] = ()
    """How names of modules begin that text does not pass."""

    def module_name(self, layer: int | None, module: str) -> str:
        """What transformers and PEFT call a module of a layer, or one that stands before or behind
        all: ``model.layers.0.self_attn.q_proj``, ``model.embed_tokens``, ``lm_head``."""
        if module == "lm_head":
            return module
        if layer is None:
            return f"{self.decoder}.{module}"
        return f"{self.decoder}.layers.{layer}.{_PARENTS[module]}.{module}"

    def current_name(self, name: str) -> str:
        """What transformers calls today what a checkpoint or an adapter calls so."""
        for former, current in self.former_names.items():
            if name.startswith(former):
                return current + name.removeprefix(former)
        return name


_GEMMA = Family(
    layers=_layers_by_type,
    scales=_gemma_scales,
    norms=_PRE_AND_POST_NORMS,
    norms_in_float32=True,
    norm_offset=1.0,
)

_GEMMA3 = replace(_GEMMA, norms={**_PRE_AND_POST_NORMS, **_QK_NORMS})

#: By the name that stands under ``architectures`` in ``config.json``.
FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(layers=_layers_with_windows, biases=_no_biases),
    "Qwen2ForCausalLM": Family(layers=_layers_by_type, biases=_qkv_biases),
    "Qwen3ForCausalLM": Family(layers=_layers_by_type, norms={**_PRE_NORMS, **_QK_NORMS}),
    "Phi3ForCausalLM": Family(layers=_layers_with_windows, biases=_no_biases, is_fused=True),
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA3,
    # transformers 4.52 gave its modules other names, and writes checkpoints with those before.
    "Gemma3ForConditionalGeneration": replace(
        _GEMMA3,
        decoder="model.language_model",
        former_names={
            "language_model.model.": "model.language_model.",
            "language_model.lm_head.": "lm_head.",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
        beside_text=("model.vision_tower.", "model.multi_modal_projector."),
    ),
    "SmolLM3ForCausalLM": Family(layers=_layers_without_rope),
    "GraniteForCausalLM": Family(scales=_granite_scales),
    "Olmo2ForCausalLM": Family(
        norms={**_POST_NORMS, **_QK_NORMS}, qk_norms_of="all heads", norms_in_float32=True
    ),
}
