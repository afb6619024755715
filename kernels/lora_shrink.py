"""The first half of a LoRA (Hu et al., 2021): rows times the adapters' A, each at its own rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Segment(NamedTuple):
    """Rows of a batch that share an adapter, and where that adapter's weights stand."""

    first_row: int
    end_row: int
    first_rank: int
    rank: int


def lora_shrink(
    x: torch.Tensor, a: torch.Tensor, segments: Sequence[Segment], n_parts: int
) -> torch.Tensor:
    """``h[first_row:end_row, :n_parts * rank] = x[first_row:end_row] @ A^T`` for each segment.

    The parts of a fused projection (q, k, v) read the same rows, so one product serves them all.
    An adapter's A stands in rows ``n_parts * first_rank`` to ``n_parts * (first_rank + rank)``
    of ``a``, part after part.

    x: [rows, in_features]
    a: [n_parts * rank_capacity, in_features]
    Returns [rows, n_parts * largest rank]; what lies outside the segments is undefined.
    """
    widest = max(segment.rank for segment in segments)
    h = x.new_empty(x.shape[0], n_parts * widest)
    for first_row, end_row, first_rank, rank in segments:
        weights = a[n_parts * first_rank : n_parts * (first_rank + rank)]
        torch.mm(x[first_row:end_row], weights.t(), out=h[first_row:end_row, : n_parts * rank])
    return h
