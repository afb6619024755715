"""Rotary position embedding (Su et al., 2021) of queries and keys; write of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.lora_expand import lora_expand_torch, rank_step
from kernels.lora_segments import TILE_ROWS, LoraRows
from kernels.rms_norm import rms_norm_torch


class HeadNorms(NamedTuple):
    """RMS norms of each head's query and key before they are rotated (Henry et al., 2020).

    q, k: weights [head_dim]
    """

    q: torch.Tensor
    k: torch.Tensor
    eps: float


def rotary_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_rows: torch.Tensor,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """Rotates queries and keys, stores keys and values, returns the queries.

    With the rotated part of each head split in halves ``(a, b)``: ``(a, b) -> (a cos - b sin, b cos
    + a sin)``; what stands behind that part is left as it is.

    qkv: [rows, (q_heads + 2 * kv_heads) * head_dim], rows at any stride; in an undefined state
        afterwards
    cos, sin: [rows, rotated / 2] float32, of each row's position; ``rotated`` is at most head_dim,
        and 0 where nothing is rotated
    k_cache, v_cache: [pages, kv_heads, page_size, head_dim], written in place
    cache_rows: [rows] integers, page * page_size + place in the page
    norms: of queries and keys, before they are rotated
    Returns [rows, q_heads, head_dim].
    """
    op = rotary_kv_write_triton if qkv.is_cuda else rotary_kv_write_torch
    return op(qkv, cos, sin, k_cache, v_cache, cache_rows, norms)


def rotary_kv_write_torch(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_rows: torch.Tensor,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    n_rows = qkv.shape[0]
    _, kv_heads, page_size, head_dim = k_cache.shape
    heads = qkv.unflatten(1, (-1, head_dim))
    q_heads = heads.shape[1] - 2 * kv_heads
    if norms:
        rms_norm_torch(heads[:, :q_heads], norms.q, norms.eps)
        rms_norm_torch(heads[:, q_heads:-kv_heads], norms.k, norms.eps)

    rotated = qkv.new_empty(n_rows, q_heads + kv_heads, head_dim)
    half = cos.shape[1]
    first, second = heads[:, :-kv_heads, : 2 * half].chunk(2, dim=-1)
    cos, sin = cos[:, None, :].to(qkv.dtype), sin[:, None, :].to(qkv.dtype)
    torch.sub(first * cos, second * sin, out=rotated[..., :half])
    torch.add(second * cos, first * sin, out=rotated[..., half : 2 * half])
    if 2 * half < head_dim:
        rotated[..., 2 * half :] = heads[:, :-kv_heads, 2 * half :]

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
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    n_rows = qkv.shape[0]
    _, kv_heads, page_size, head_dim = k_cache.shape
    n_heads = qkv.shape[1] // head_dim
    q_heads = n_heads - 2 * kv_heads
    q = qkv.new_empty(n_rows, q_heads, head_dim)
    if n_rows:
        _rotary_kv_write[(n_rows,)](
            *(qkv, cos, sin, q, k_cache, v_cache, cache_rows),
            *(norms or (None, None, 0.0)),
            qkv.stride(0),
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            HALF=head_dim // 2,
            ROTATED=cos.shape[1],
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
    q_norm,
    k_norm,
    eps,
    qkv_stride,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROTATED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_HALF)
    in_half = columns < HALF
    first, second = _pairs(columns, HALF, ROTATED)
    is_rotated = columns < ROTATED
    c = tl.load(cos + row * ROTATED + columns, mask=is_rotated, other=1.0)[None, :]
    s = tl.load(sin + row * ROTATED + columns, mask=is_rotated, other=0.0)[None, :]
    source = qkv + row * qkv_stride

    heads = tl.arange(0, BLOCK_Q)
    mask = (heads < Q_HEADS)[:, None] & in_half[None, :]
    at = heads[:, None] * (2 * HALF)
    a = tl.load(source + at + first[None, :], mask=mask).to(tl.float32)
    b = tl.load(source + at + second[None, :], mask=mask).to(tl.float32)
    if q_norm is not None:
        a, b = _normalize_heads(a, b, q_norm, eps, first, second, in_half, HALF)
    target = q + row * (Q_HEADS * 2 * HALF) + at
    tl.store(target + first[None, :], (a * c - b * s).to(q.dtype.element_ty), mask=mask)
    tl.store(target + second[None, :], (b * c + a * s).to(q.dtype.element_ty), mask=mask)

    heads = tl.arange(0, BLOCK_KV)
    mask = (heads < KV_HEADS)[:, None] & in_half[None, :]
    at = (Q_HEADS + heads[:, None]) * (2 * HALF)
    a = tl.load(source + at + first[None, :], mask=mask).to(tl.float32)
    b = tl.load(source + at + second[None, :], mask=mask).to(tl.float32)
    if k_norm is not None:
        a, b = _normalize_heads(a, b, k_norm, eps, first, second, in_half, HALF)
    cache_row = tl.load(cache_rows + row).to(tl.int64)
    page, place = cache_row // PAGE_SIZE, cache_row % PAGE_SIZE
    here = ((page * KV_HEADS + heads[:, None]) * PAGE_SIZE + place) * (2 * HALF)
    rotated = (a * c - b * s).to(k_cache.dtype.element_ty)
    tl.store(k_cache + here + first[None, :], rotated, mask=mask)
    rotated = (b * c + a * s).to(k_cache.dtype.element_ty)
    tl.store(k_cache + here + second[None, :], rotated, mask=mask)

    at += KV_HEADS * 2 * HALF
    a = tl.load(source + at + first[None, :], mask=mask)
    tl.store(v_cache + here + first[None, :], a, mask=mask)
    b = tl.load(source + at + second[None, :], mask=mask)
    tl.store(v_cache + here + second[None, :], b, mask=mask)


@triton.jit
def _pairs(columns, HALF: tl.constexpr, ROTATED: tl.constexpr):
    """The two dimensions of a head that each column stands for: pairs that are rotated together,
    and behind those, of what is not rotated, one of the first and one of the second half."""
    first, second = columns, columns + HALF
    if ROTATED < HALF:
        first = tl.where(columns < ROTATED, columns, columns + ROTATED)
        second = tl.where(columns < ROTATED, columns + ROTATED, columns + HALF)
    return first, second


@triton.jit
def _normalize_heads(a, b, weight, eps, first, second, in_half, HALF: tl.constexpr):
    """Heads [heads or rows, pairs], whose dimensions ``first`` are ``a`` and ``second`` ``b``."""
    squares = tl.where(in_half[None, :], a * a + b * b, 0.0)
    scale = tl.rsqrt(tl.sum(squares, axis=1) / (2 * HALF) + eps)[:, None]
    w_a = tl.load(weight + first, mask=in_half, other=0.0).to(tl.float32)
    w_b = tl.load(weight + second, mask=in_half, other=0.0).to(tl.float32)
    return a * scale * w_a[None, :], b * scale * w_b[None, :]


def rotary_kv_write_with_lora(
    qkv: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    rows: LoraRows,
    part_sizes: Sequence[int],
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_rows: torch.Tensor,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """``rotary_kv_write`` after ``lora_expand``; on a GPU in one pass over ``qkv``.

    h, b: as for ``lora_expand`` with ``part_sizes``: three parts, or one where LoRA is of queries,
        keys and values together
    """
    if rows.tiles is not None:
        return rotary_kv_write_with_lora_triton(
            *(qkv, h, b, rows.tiles, len(part_sizes)),
            *(cos, sin, k_cache, v_cache, cache_rows, norms),
        )
    lora_expand_torch(qkv, h, b, rows.segments, part_sizes)
    return rotary_kv_write_torch(qkv, cos, sin, k_cache, v_cache, cache_rows, norms)


def rotary_kv_write_with_lora_triton(
    qkv: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    tiles: torch.Tensor,
    n_parts: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_rows: torch.Tensor,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    n_rows = qkv.shape[0]
    _, kv_heads, page_size, head_dim = k_cache.shape
    n_heads = qkv.shape[1] // head_dim
    q_heads = n_heads - 2 * kv_heads
    q = qkv.new_empty(n_rows, q_heads, head_dim)
    _rotary_kv_write_with_lora[(n_heads, len(tiles))](
        *(qkv, h, b, tiles, cos, sin, q, k_cache, v_cache, cache_rows),
        *(norms or (None, None, 0.0)),
        *(qkv.stride(0), h.stride(0)),
        N_PARTS=n_parts,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        ROTATED=cos.shape[1],
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
    q_norm,
    k_norm,
    eps,
    qkv_stride,
    h_stride,
    N_PARTS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROTATED: tl.constexpr,
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
    first_columns, second_columns = _pairs(c, HALF, ROTATED)
    here = qkv + rows[:, None] * qkv_stride + head * (2 * HALF)
    first = tl.load(here + first_columns[None, :], mask=mask, other=0).to(tl.float32)
    second = tl.load(here + second_columns[None, :], mask=mask, other=0).to(tl.float32)
    h_rows = h + rows[:, None] * h_stride + N_PARTS * first_rank
    if N_PARTS == 3:
        h_rows += part * rank
    b_columns = b + head * (2 * HALF)
    for start in range(0, rank, BLOCK_R):
        in_rank = (start + r) < rank
        hs = tl.load(h_rows + start + r[None, :], mask=is_row[:, None] & in_rank[None, :], other=0)
        b_rows = (first_rank + start + r).to(tl.int64)[:, None]
        at = b_columns + b_rows * ((Q_HEADS + 2 * KV_HEADS) * 2 * HALF)
        b_mask = in_rank[:, None] & in_half[None, :]
        b_first = tl.load(at + first_columns[None, :], mask=b_mask, other=0)
        first = tl.dot(hs.to(b_first.dtype), b_first, first, input_precision="ieee")
        b_second = tl.load(at + second_columns[None, :], mask=b_mask, other=0)
        second = tl.dot(hs.to(b_second.dtype), b_second, second, input_precision="ieee")

    if part < 2:
        if q_norm is not None:
            norm = q_norm
            if part == 1:
                norm = k_norm
            first, second = _normalize_heads(
                first, second, norm, eps, first_columns, second_columns, in_half, HALF
            )
        angle = rows[:, None] * ROTATED + c[None, :]
        is_rotated = is_row[:, None] & (c < ROTATED)[None, :]
        cosine = tl.load(cos + angle, mask=is_rotated, other=1.0)
        sine = tl.load(sin + angle, mask=is_rotated, other=0.0)
        rotated = first * cosine - second * sine
        second = second * cosine + first * sine
        first = rotated
    if part == 0:
        target = q + (rows[:, None] * Q_HEADS + head) * (2 * HALF)
        tl.store(target + first_columns[None, :], first.to(q.dtype.element_ty), mask=mask)
        tl.store(target + second_columns[None, :], second.to(q.dtype.element_ty), mask=mask)
    else:
        cache_row = tl.load(cache_rows + rows, mask=is_row, other=0).to(tl.int64)
        page, place = cache_row // PAGE_SIZE, cache_row % PAGE_SIZE
        at = ((page * KV_HEADS + kv_head) * PAGE_SIZE + place)[:, None] * (2 * HALF)
        cache = k_cache
        if part == 2:
            cache = v_cache
        dtype = k_cache.dtype.element_ty
        tl.store(cache + at + first_columns[None, :], first.to(dtype), mask=mask)
        tl.store(cache + at + second_columns[None, :], second.to(dtype), mask=mask)
