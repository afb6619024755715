"""Rotary position embedding (Su et al., 2021) of queries and keys; write of the KV cache."""

from __future__ import annotations

import torch


def rotary_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_rows: torch.Tensor,
) -> torch.Tensor:
    """Rotates queries and keys, stores keys and values, returns the queries.

    With each head split in halves ``(a, b)``: ``(a, b) -> (a cos - b sin, b cos + a sin)``.

    qkv: [rows, (q_heads + 2 * kv_heads) * head_dim]
    cos, sin: [rows, head_dim / 2], of each row's position
    k_cache, v_cache: [pages, kv_heads, page_size, head_dim], written in place
    cache_rows: [rows] int64, page * page_size + place in the page
    Returns [rows, q_heads, head_dim].
    """
    n_rows = qkv.shape[0]
    _, kv_heads, page_size, head_dim = k_cache.shape
    heads = qkv.view(n_rows, -1, head_dim)
    q_heads = heads.shape[1] - 2 * kv_heads

    rotated = torch.empty_like(heads[:, : q_heads + kv_heads])
    first, second = heads[:, : q_heads + kv_heads].chunk(2, dim=-1)
    cos, sin = cos[:, None, :].to(qkv.dtype), sin[:, None, :].to(qkv.dtype)
    half = head_dim // 2
    torch.sub(first * cos, second * sin, out=rotated[..., :half])
    torch.add(second * cos, first * sin, out=rotated[..., half:])

    pages, places = cache_rows // page_size, cache_rows % page_size
    k_cache[pages, :, places] = rotated[:, q_heads:]
    v_cache[pages, :, places] = heads[:, -kv_heads:]
    return rotated[:, :q_heads]
