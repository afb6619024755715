"""Rotary position embedding (Su et al., 2021) of queries and keys; write of the KV cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.lora_expand import lora_expand_torch, rank_step
from kernels.lora_segments import TILE_ROWS, LoraRows


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


def rotary_kv_write_with_lora(
    qkv: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    rows: LoraRows,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_rows: torch.Tensor,
) -> torch.Tensor:
    """``rotary_kv_write`` after ``lora_expand``; on a GPU in one pass over ``qkv``.

    qkv: in an undefined state afterwards
    h, b: as for ``lora_expand`` with three parts
    """
    if rows.tiles is not None:
        return rotary_kv_write_with_lora_triton(
            qkv, h, b, rows.tiles, cos, sin, k_cache, v_cache, cache_rows
        )
    kv_size = k_cache.shape[1] * k_cache.shape[3]
    part_sizes = (qkv.shape[1] - 2 * kv_size, kv_size, kv_size)
    lora_expand_torch(qkv, h, b, rows.segments, part_sizes)
    return rotary_kv_write_torch(qkv, cos, sin, k_cache, v_cache, cache_rows)


def rotary_kv_write_with_lora_triton(
    qkv: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    tiles: torch.Tensor,
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
    _rotary_kv_write_with_lora[(n_heads, len(tiles))](
        *(qkv, h, b, tiles, cos, sin, q, k_cache, v_cache, cache_rows),
        *(qkv.stride(0), h.stride(0)),
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        PAGE_SIZE=page_size,
        BLOCK_M=TILE_ROWS,
        BLOCK_HALF=max(16, triton.next_power_of_2(head_dim // 2)),
        BLOCK_R=rank_step(n_rows),
        num_warps=4,
        num_stages=3,
    )
    return q


@triton.jit
def _rotary_kv_write_with_lora(
    qkv,
    h,
    b,
    tiles,
    cos,
    sin,
    q,
    k_cache,
    v_cache,
    cache_rows,
    qkv_stride,
    h_stride,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    head, tile = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(tiles + 4 * tile).to(tl.int64)
    n_rows = tl.load(tiles + 4 * tile + 1)
    first_rank = tl.load(tiles + 4 * tile + 2)
    rank = tl.load(tiles + 4 * tile + 3)
    if n_rows == 0:
        return
    part, kv_head = 0, head
    if head >= Q_HEADS:
        part, kv_head = 1, head - Q_HEADS
        if head >= Q_HEADS + KV_HEADS:
            part, kv_head = 2, head - Q_HEADS - KV_HEADS

    rows = first_row + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_HALF)
    r = tl.arange(0, BLOCK_R)
    is_row, in_half = tl.arange(0, BLOCK_M) < n_rows, c < HALF
    mask = is_row[:, None] & in_half[None, :]
    here = qkv + rows[:, None] * qkv_stride + head * (2 * HALF) + c[None, :]
    first = tl.load(here, mask=mask, other=0).to(tl.float32)
    second = tl.load(here + HALF, mask=mask, other=0).to(tl.float32)
    h_rows = h + rows[:, None] * h_stride + 3 * first_rank + part * rank
    b_columns = b + head * (2 * HALF) + c[None, :]
    for start in range(0, rank, BLOCK_R):
        in_rank = (start + r) < rank
        hs = tl.load(h_rows + start + r[None, :], mask=is_row[:, None] & in_rank[None, :], other=0)
        b_rows = (first_rank + start + r).to(tl.int64)[:, None]
        at = b_columns + b_rows * ((Q_HEADS + 2 * KV_HEADS) * 2 * HALF)
        b_mask = in_rank[:, None] & in_half[None, :]
        b_first = tl.load(at, mask=b_mask, other=0)
        first = tl.dot(hs.to(b_first.dtype), b_first, first, input_precision="ieee")
        b_second = tl.load(at + HALF, mask=b_mask, other=0)
        second = tl.dot(hs.to(b_second.dtype), b_second, second, input_precision="ieee")

    if part < 2:
        angle = rows[:, None] * HALF + c[None, :]
        cosine = tl.load(cos + angle, mask=mask, other=0)
        sine = tl.load(sin + angle, mask=mask, other=0)
        rotated = first * cosine - second * sine
        second = second * cosine + first * sine
        first = rotated
    if part == 0:
        target = q + (rows[:, None] * Q_HEADS + head) * (2 * HALF) + c[None, :]
        tl.store(target, first.to(q.dtype.element_ty), mask=mask)
        tl.store(target + HALF, second.to(q.dtype.element_ty), mask=mask)
    else:
        cache_row = tl.load(cache_rows + rows, mask=is_row, other=0).to(tl.int64)
        page, place = cache_row // PAGE_SIZE, cache_row % PAGE_SIZE
        at = ((page * KV_HEADS + kv_head) * PAGE_SIZE + place)[:, None] * (2 * HALF) + c[None, :]
        cache = k_cache
        if part == 2:
            cache = v_cache
        tl.store(cache + at, first.to(k_cache.dtype.element_ty), mask=mask)
        tl.store(cache + at + HALF, second.to(k_cache.dtype.element_ty), mask=mask)
