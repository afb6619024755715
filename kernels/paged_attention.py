"""Causal attention over a paged KV cache (Kwon et al., 2023), with grouped query heads.

A sequence's keys and values stand in pages of ``page_size`` rows for each KV head; its page table
lists its pages in order. Query head ``h`` attends to KV head ``h // (q_heads / kv_heads)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def paged_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """``o = softmax(scale * q K^T) V`` for one query a sequence, over its whole length.

    q: [sequences, q_heads, head_dim]
    k_cache, v_cache: [pages, kv_heads, page_size, head_dim]
    page_table: [sequences, max_pages] integers; entries past a sequence's end are any valid page
    lengths: [sequences] integers, keys of each sequence, its newest one included
    mask: [sequences, 1, 1, max_pages * page_size], 0 for a key below the length, -inf above; made
        by ``length_mask`` once a step for all layers
    Returns [sequences, q_heads, head_dim].
    """
    n_sequences, q_heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    n_groups = n_sequences * kv_heads
    keys = _gather(k_cache, page_table).view(n_groups, -1, head_dim)
    values = _gather(v_cache, page_table).view(n_groups, -1, head_dim)
    # The query heads of one KV head are the rows of one product, so that nothing is repeated. Two
    # plain products take 0.4 ms at 48 x 144 keys of 3 heads on two cores, against 0.8 ms by
    # F.scaled_dot_product_attention.
    grouped = q.reshape(n_groups, q_heads // kv_heads, head_dim)
    masks = mask.expand(-1, kv_heads, -1, -1).reshape(n_groups, 1, -1)
    scores = torch.baddbmm(masks, grouped, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), values).view(n_sequences, q_heads, head_dim)


def _gather(cache: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
    """[sequences, kv_heads, max_pages, page_size * head_dim], by whole pages of one head."""
    kv_heads = cache.shape[1]
    heads = torch.arange(kv_heads, device=cache.device)
    rows = page_table[:, None, :] * kv_heads + heads[None, :, None]
    # index_select copies whole rows at the speed of memory; cache[page_table] took twice as long.
    return cache.flatten(2).flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)


def length_mask(lengths: torch.Tensor, max_length: int, dtype: torch.dtype) -> torch.Tensor:
    """[sequences, 1, 1, max_length]: 0 where a position is below the length, -inf elsewhere."""
    positions = torch.arange(max_length, device=lengths.device)
    mask = torch.zeros(len(lengths), max_length, dtype=dtype, device=lengths.device)
    mask.masked_fill_(positions >= lengths[:, None], float("-inf"))
    return mask[:, None, None, :]


def paged_attention_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pages: torch.Tensor,
    length: int,
    scale: float,
) -> torch.Tensor:
    """Attention of one sequence's newest ``rows`` queries, each over the keys up to its own.

    q: [rows, q_heads, head_dim], the last rows of the sequence
    k_cache, v_cache: [pages, kv_heads, page_size, head_dim]
    pages: [pages of the sequence] integers
    length: keys of the sequence, those of ``q`` included
    Returns [rows, q_heads, head_dim].
    """
    n_rows, q_heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    keys = _gather(k_cache, pages[None]).view(kv_heads, -1, head_dim)[:, :length]
    values = _gather(v_cache, pages[None]).view(kv_heads, -1, head_dim)[:, :length]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=None if n_rows == length else causal_mask(n_rows, length, q.device),
        is_causal=n_rows == length,
        scale=scale,
        enable_gqa=q_heads != kv_heads,
    )
    return out[0].transpose(0, 1)


def causal_mask(n_rows: int, length: int, device: torch.device) -> torch.Tensor:
    """[n_rows, length] booleans: which keys the last ``n_rows`` of ``length`` queries may see."""
    queries = torch.arange(length - n_rows, length, device=device)
    return torch.arange(length, device=device) <= queries[:, None]
