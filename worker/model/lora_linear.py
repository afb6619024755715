"""A linear layer whose rows may each add an adapter's low-rank product."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.linear import Linear
from kernels.lora_expand import lora_expand
from kernels.lora_shrink import Segment, lora_shrink


@dataclass(frozen=True)
class LoraWeights:
    """The slots' weights for one linear group of one layer.

    a: [parts * rank_capacity, in_features]; b: for each part [rank_capacity, out_features].
    """

    a: torch.Tensor
    b: tuple[torch.Tensor, ...]


class LoraLinear:
    """``y = x W^T``, plus ``x A^T B`` of its adapter for each row that has one."""

    def __init__(self, weight: torch.Tensor, lora: LoraWeights | None) -> None:
        self._linear = Linear(weight)
        self._lora = lora

    def __call__(self, x: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        y = self._linear(x)
        if segments and self._lora:
            h = lora_shrink(x, self._lora.a, segments, len(self._lora.b))
            lora_expand(y, h, self._lora.b, segments)
        return y
