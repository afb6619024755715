"""Rotary position embedding (Su et al., 2021) of queries and keys; write of the KV cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


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

    qkv: [rows, (q_heads + 2 * kv_heads) * head_dim], rows at any stride
    cos, sin: [rows, head_dim / 2] float32, of each row's position
    k_cache, v_cache: [pages, kv_heads, page_size, head_dim], written in place
    cache_rows: [rows] integers, page * page_size + place in the page
    Returns [rows, q_heads, head_dim].
    """
    op = rotary_kv_write_triton if qkv.is_cuda else rotary_kv_write_torch
    return op(qkv, cos, sin, k_cache, v_cache, cache_rows)


def rotary_kv_write_torch(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_rows: torch.Tensor,
) -> torch.Tensor:
    n_rows = qkv.shape[0]
    _, kv_heads, page_size, head_dim = k_cache.shape
    heads = qkv.unflatten(1, (-1, head_dim))
    q_heads = heads.shape[1] - 2 * kv_heads

    rotated = qkv.new_empty(n_rows, q_heads + kv_heads, head_dim)
    first, second = heads[:, : q_heads + kv_heads].chunk(2, dim=-1)
    cos, sin = cos[:, None, :].to(qkv.dtype), sin[:, None, :].to(qkv.dtype)
    half = head_dim // 2
    torch.sub(first * cos, second * sin, out=rotated[..., :half])
    torch.add(second * cos, first * sin, out=rotated[..., half:])

    pages, places = cache_rows // page_size, cache_rows % page_size
    k_cache[pages, :, places] = rotated[:, q_heads:]
    v_cache[pages, :, places] = heads[:, -kv_heads:]
    return rotated[:, :q_heads]


def rotary_kv_write_triton(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_rows: torch.Tensor,
) -> torch.Tensor:
    n_rows = qkv.shape[0]
    _, kv_heads, page_size, head_dim = k_cache.shape
    n_heads = qkv.shape[1] // head_dim
    q_heads = n_heads - 2 * kv_heads
    q = qkv.new_empty(n_rows, q_heads, head_dim)
    if n_rows:
        _rotary_kv_write[(n_rows,)](
            *(qkv, cos, sin, q, k_cache, v_cache, cache_rows, qkv.stride(0)),
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            HALF=head_dim // 2,
            PAGE_SIZE=page_size,
            BLOCK_Q=triton.next_power_of_2(q_heads),
            BLOCK_KV=triton.next_power_of_2(kv_heads),
            BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        )
    return q


@triton.jit
def _rotary_kv_write(
    qkv,
    cos,
    sin,
    q,
    k_cache,
    v_cache,
    cache_rows,
    qkv_stride,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_HALF)
    in_half = columns < HALF
    c = tl.load(cos + row * HALF + columns, mask=in_half)[None, :]
    s = tl.load(sin + row * HALF + columns, mask=in_half)[None, :]
    source = qkv + row * qkv_stride

    heads = tl.arange(0, BLOCK_Q)
    mask = (heads < Q_HEADS)[:, None] & in_half[None, :]
    at = heads[:, None] * (2 * HALF) + columns[None, :]
    a = tl.load(source + at, mask=mask).to(tl.float32)
    b = tl.load(source + at + HALF, mask=mask).to(tl.float32)
    target = q + row * (Q_HEADS * 2 * HALF) + at
    tl.store(target, (a * c - b * s).to(q.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (b * c + a * s).to(q.dtype.element_ty), mask=mask)

    heads = tl.arange(0, BLOCK_KV)
    mask = (heads < KV_HEADS)[:, None] & in_half[None, :]
    at = (Q_HEADS + heads[:, None]) * (2 * HALF) + columns[None, :]
    a = tl.load(source + at, mask=mask).to(tl.float32)
    b = tl.load(source + at + HALF, mask=mask).to(tl.float32)
    cache_row = tl.load(cache_rows + row).to(tl.int64)
    page, place = cache_row // PAGE_SIZE, cache_row % PAGE_SIZE
    here = ((page * KV_HEADS + heads[:, None]) * PAGE_SIZE + place) * (2 * HALF) + columns[None, :]
    tl.store(k_cache + here, (a * c - b * s).to(k_cache.dtype.element_ty), mask=mask)
    tl.store(k_cache + here + HALF, (b * c + a * s).to(k_cache.dtype.element_ty), mask=mask)

    at += KV_HEADS * 2 * HALF
    tl.store(v_cache + here, tl.load(source + at, mask=mask), mask=mask)
    tl.store(v_cache + here + HALF, tl.load(source + at + HALF, mask=mask), mask=mask)
