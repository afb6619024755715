"""The first half of a LoRA of the token embedding (Hu et al., 2021): A's columns of the tokens.

To the embedding a row is one-hot, so ``x A^T`` is a choice of columns, and no product.
"""

from __future__ import annotations

import torch

from kernels.lora_segments import LoraRows


def lora_embed(token_ids: torch.Tensor, a: torch.Tensor, rows: LoraRows) -> torch.Tensor:
    """``h[rows, ranks] = a[ranks, token_ids[rows]]^T`` for each segment's rows and its adapter's
    ranks.

    token_ids: [rows] integers
    a: [rank_capacity, vocabulary]
    Returns [rows, ranks], at least up to the last one of the segments' adapters; what lies outside
    the segments is undefined.
    """
    if rows.tiles is not None:  # One gather of too much is faster than one for each adapter.
        return a[: rows.num_ranks].t().index_select(0, token_ids)
    h = a.new_empty(len(token_ids), len(a))
    for first_row, end_row, first_rank, rank in rows.segments:
        ranks = slice(first_rank, first_rank + rank)
        h[first_row:end_row, ranks] = a[ranks].index_select(1, token_ids[first_row:end_row]).t()
    return h
