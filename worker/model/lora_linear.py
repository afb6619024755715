"""A linear layer whose rows may each add an adapter's low-rank product."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.blas import product
from kernels.linear import Linear
from kernels.lora_expand import lora_expand
from kernels.lora_segments import LoraRows
from kernels.lora_shrink import lora_shrink

#: A layer and one of its linear groups, or no layer and one of ``END_MODULES``.
LoraPlace = tuple[int | None, str]


@dataclass(frozen=True)
class LoraWeights:
    """The slots' weights for one group of modules of one layer.

    a: [parts * rank_capacity, in_features]
    b: [rank_capacity, out_features], the parts side by side
    stacked: on a GPU [out_features + parts * rank_capacity, in_features]: the base weight, and
        behind it ``a``, which is a view of it
    """

    a: torch.Tensor
    b: torch.Tensor
    part_sizes: tuple[int, ...]
    stacked: torch.Tensor | None = None


class LoraLinear:
    """``y = x W^T + bias``, plus ``x A^T B`` of its adapter for each row that has one."""

    def __init__(
        self,
        weight: torch.Tensor,
        lora: LoraWeights | None,
        layer: int,
        bias: torch.Tensor | None = None,
    ) -> None:
        """weight: [out_features, in_features]; ``lora`` is None where no adapter can change it.

        bias: [out_features], and zeros behind it for the rows of A where these are stacked
        """
        self._layer = layer
        self._stacked_bias = bias
        self._bias = bias if bias is None else bias[: len(weight)]
        self._linear = Linear(weight, self._bias)
        self.lora = lora

    def __call__(
        self, x: torch.Tensor, rows: LoraRows | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x: [rows, in_features]; returns [rows, out_features], rows at any stride; written to
        ``out`` if given, and then no adapter may change it."""
        if rows is None or self.lora is None:
            return self._linear(x, out)
        y, h = self.shrink(x, rows)
        lora_expand(y, h, self.lora.b, rows, self.lora.part_sizes)
        return y

    def shrink(self, x: torch.Tensor, rows: LoraRows) -> tuple[torch.Tensor, torch.Tensor]:
        """``x W^T``, with DoRA multiplied, plus the bias; and the shrunk rows that ``lora_expand``
        takes."""
        assert self.lora is not None
        if self.lora.stacked is None or rows.shrink_tiles is not None:
            y, h = self._linear(x), lora_shrink(x, self.lora.a, rows, self.num_parts)
        else:
            out_features = sum(self.lora.part_sizes)
            # Ranks beyond the batch's adapters are left out; those between them come for nothing.
            end = out_features + self.num_parts * rows.num_ranks
            bias = self._stacked_bias
            both = product(x, self.lora.stacked[:end], bias=bias if bias is None else bias[:end])
            y, h = both[:, :out_features], both[:, out_features:]
        rows.scale(y, self._layer, self._bias)
        return y, h

    @property
    def num_parts(self) -> int:
        return len(self.lora.part_sizes) if self.lora else 0
