"""The first half of a LoRA (Hu et al., 2021): rows times the adapters' A, each at its own rank.

An adapter's A stands in rows ``n_parts * first_rank`` to ``n_parts * (first_rank + rank)`` of
``a``, part after part: the parts of a fused projection (q, k, v) read the same rows, so one product
serves them all. The result's columns are laid out as the rows of ``a``.

There is no Triton kernel: on a GPU all A stand under the base weight, and one cuBLAS product makes
the base output and every adapter's columns. On an H100 that costs 7 us a layer of an 8B model at
256 rows and 512 ranks, where a launch of its own for each linear group cost 107 us (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.lora_segments import Segment


def lora_shrink(
    x: torch.Tensor, a: torch.Tensor, segments: Sequence[Segment], n_parts: int
) -> torch.Tensor:
    """``h[rows, columns] = x[rows] @ a[columns]^T`` for each segment's rows and its adapter's
    columns.

    x: [rows, in_features]
    a: [n_parts * rank_capacity, in_features]
    Returns [rows, n_parts * rank_capacity]; what lies outside the segments is undefined.
    """
    h = x.new_empty(x.shape[0], a.shape[0])
    for first_row, end_row, first_rank, rank in segments:
        columns = slice(n_parts * first_rank, n_parts * (first_rank + rank))
        torch.mm(x[first_row:end_row], a[columns].t(), out=h[first_row:end_row, columns])
    return h
