"""The second half of a LoRA (Hu et al., 2021): the shrunk rows times the adapters' B."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.lora_shrink import Segment


def lora_expand(
    y: torch.Tensor, h: torch.Tensor, b: Sequence[torch.Tensor], segments: Sequence[Segment]
) -> None:
    """``y[first_row:end_row, part] += h[first_row:end_row, part] @ B_part`` for each segment.

    The adapters' scaling is part of B. Rows outside the segments are left as they are.

    y: [rows, sum of out_features], the parts side by side, changed in place
    h: what ``lora_shrink`` returned
    b: for each part [rank_capacity, out_features]; an adapter's B stands in rows ``first_rank``
        to ``first_rank + rank``
    """
    for first_row, end_row, first_rank, rank in segments:
        first_column = 0
        for part, weights in enumerate(b):
            end_column = first_column + weights.shape[1]
            y[first_row:end_row, first_column:end_column].addmm_(
                h[first_row:end_row, part * rank : (part + 1) * rank],
                weights[first_rank : first_rank + rank],
            )
            first_column = end_column
