"""The first half of a LoRA of the token embedding (Hu et al., 2021): A's columns of the tokens.

To the embedding a row is one-hot, so ``x A^T`` is a choice of columns, and no product.
"""

from __future__ import annotations

import torch

from kernels.lora_segments import LoraRows


def lora_embed(token_ids: torch.Tensor, a: torch.Tensor, rows: LoraRows) -> torch.Tensor:
    """``h[rows, ranks] = a[ranks, token_ids[rows]]^T``.

    token_ids: [rows] integers
    a: [rank_capacity, vocabulary]
    Returns [rows, ranks], up to the last one of the segments' adapters.
    """
    return a[: rows.num_ranks].t().index_select(0, token_ids)
