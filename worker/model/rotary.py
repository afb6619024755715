"""Rotary position embeddings (Su et al., 2021), and the ways to stretch them to longer contexts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from schemas.errors import BadInput

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rotary:
    """Angles by which the queries and keys of a layer are rotated; without frequencies by none."""

    inverse_frequencies: tuple[float, ...] = ()
    """Of each pair of rotated dimensions, which may be fewer than head_dim / 2."""
    scale: float = 1.0
    """By which what is rotated is multiplied."""
    long_inverse_frequencies: tuple[float, ...] | None = None
    """LongRoPE (Ding et al., 2024): where more than ``short_context`` tokens are served. All
    sequences have the same then: which others share a batch, and how long an answer becomes, is not
    to change what stands in the cache."""
    short_context: int = 0

    def tables(
        self, context_length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, scaled, of each position: [context_length, pairs] float32."""
        frequencies = self.inverse_frequencies
        if self.long_inverse_frequencies and context_length > self.short_context:
            frequencies = self.long_inverse_frequencies
        angles = torch.outer(
            torch.arange(context_length, dtype=torch.float), torch.tensor(frequencies)
        ).to(device)
        return angles.cos() * self.scale, angles.sin() * self.scale


def read_rotary(config: Any, head_dim: int, layer_type: str) -> Rotary:
    """That of the layers of a type in transformers' config; raises BadInput if it is not known, or
    a number of it is missing or wrong."""
    by_type = layer_type in config.rope_parameters
    rope = config.rope_parameters[layer_type] if by_type else config.rope_parameters
    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise BadInput(
            f"rotary embedding of type '{kind}' is not supported."
            f" Supported: {', '.join(ROPE_TYPES)}."
        )
    try:
        if kind == "default":
            dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
            exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
            return Rotary(tuple((1.0 / rope["rope_theta"] ** exponents).tolist()))
        of_type = {"layer_type": layer_type} if by_type else {}
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, **of_type)
        short = Rotary(tuple(frequencies.tolist()), scale)
        if kind != "longrope":
            return short
        context = int(rope["original_max_position_embeddings"])
        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, seq_len=context + 1, **of_type)
        return Rotary(short.inverse_frequencies, scale, tuple(frequencies.tolist()), context)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise BadInput(
            f"config.json: its rotary embedding of type '{kind}' cannot be made:"
            f" {type(error).__name__}: {error}"
        ) from error


def longest_context(config: Any) -> int:
    """Tokens that the model was made for. By YaRN a context is stretched in ``rope_parameters``
    alone: model cards say to add that, and to leave ``max_position_embeddings`` as it is."""
    longest = int(config.max_position_embeddings)
    rope = config.rope_parameters
    if rope.get("rope_type") == "yarn" and rope.get("factor"):
        return max(longest, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return longest
