"""The activation of a SwiGLU feed-forward (Shazeer, 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``y = silu(gate) * up``, where ``silu(z) = z / (1 + exp(-z))``.

    gate_up: [rows, 2 * features], the gate in the first half; returns [rows, features].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
