"""Causal attention of chunks of prompts over a paged KV cache (Kwon et al., 2023).

A chunk is a run of a sequence's newest tokens: each attends to all keys of its sequence up to its
own, those of earlier chunks included, or to the newest ones of a window. Cache, window and soft cap
are as in ``paged_attention_decode``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.paged_attention_decode import gather_pages, soft_capped

#: Queries of one program of the Triton kernel. With 64 keys a turn, 4 warps and 3 stages this was
#: the fastest of six shapes on an H100 at 256 and 2,048 keys, and 2% behind at 8,192 (docs/gpu.md).
PREFILL_TILE = 64


class PrefillChunk(NamedTuple):
    """Rows of one sequence's prompt, its line of the page table, its keys up to the last row."""

    first_row: int
    end_row: int
    sequence: int
    length: int


class PrefillTile(NamedTuple):
    """At most ``PREFILL_TILE`` rows of a chunk; the first one's position is in its sequence."""

    first_row: int
    num_rows: int
    sequence: int
    first_position: int


def prefill_tiles(chunks: Sequence[PrefillChunk]) -> list[PrefillTile]:
    """The chunks cut into tiles, those that read most keys first."""
    tiles = [
        PrefillTile(
            row,
            min(PREFILL_TILE, chunk.end_row - row),
            chunk.sequence,
            chunk.length - (chunk.end_row - row),
        )
        for chunk in chunks
        for row in range(chunk.first_row, chunk.end_row, PREFILL_TILE)
    ]
    # The longest first: a long one that starts last would run alone.
    return sorted(tiles, key=lambda tile: -tile.first_position)


@dataclass(frozen=True)
class PrefillRows:
    """The chunks of a batch."""

    chunks: Sequence[PrefillChunk]
    tiles: torch.Tensor | None
    """On a GPU [tiles, 4] int32, the fields of ``PrefillTile``. Some may be empty, so that a CUDA
    graph serves every batch of a size."""


def paged_attention_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: PrefillRows,
    out: torch.Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    """``o = softmax(scale * q K^T) V`` for each row of the chunks, over the keys that it sees.

    q: [rows, q_heads, head_dim]
    k_cache, v_cache: [pages, kv_heads, page_size, head_dim]
    page_table: [lines, max_pages] integers
    out: like ``q``; the chunks' rows are written
    """
    if rows.tiles is not None:
        paged_attention_prefill_triton(
            q, k_cache, v_cache, page_table, rows.tiles, out, scale, window, soft_cap
        )
    else:
        paged_attention_prefill_torch(
            q, k_cache, v_cache, page_table, rows.chunks, out, scale, window, soft_cap
        )


def paged_attention_prefill_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    chunks: Sequence[PrefillChunk],
    out: torch.Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    _, q_heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_cache.shape
    for first_row, end_row, sequence, length in chunks:
        n_rows = end_row - first_row
        pages = page_table[sequence, : -(-length // page_size)][None]
        keys = gather_pages(k_cache, pages).view(kv_heads, -1, head_dim)[:, :length]
        values = gather_pages(v_cache, pages).view(kv_heads, -1, head_dim)[:, :length]
        queries = q[first_row:end_row].transpose(0, 1)
        is_whole = n_rows == length and not window and not soft_cap
        mask = None if is_whole else causal_mask(n_rows, length, q.device, window)
        if soft_cap:
            attended = _soft_capped_attention(queries, keys, values, mask, scale, soft_cap)
        else:
            attended = F.scaled_dot_product_attention(
                *(queries[None], keys[None], values[None]),
                attn_mask=mask,
                is_causal=is_whole,
                scale=scale,
                enable_gqa=q_heads != kv_heads,
            )[0]
        out[first_row:end_row] = attended.transpose(0, 1)


def causal_mask(n_rows: int, length: int, device: torch.device, window: int = 0) -> torch.Tensor:
    """[n_rows, length] booleans: which keys the last ``n_rows`` of ``length`` queries may see."""
    queries = torch.arange(length - n_rows, length, device=device)[:, None]
    keys = torch.arange(length, device=device)
    if window:
        return (keys <= queries) & (keys > queries - window)
    return keys <= queries


def _soft_capped_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    """queries: [q_heads, rows, head_dim]; keys, values: [kv_heads, length, head_dim]"""
    grouped = queries.unflatten(0, (len(keys), -1))
    scores = grouped @ keys[:, None].transpose(-1, -2)
    scores = soft_cap * scores.mul_(scale / soft_cap).tanh_()
    scores.masked_fill_(~mask, float("-inf"))
    return (scores.softmax(dim=-1) @ values[:, None]).flatten(0, 1)


def paged_attention_prefill_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    """After Flash Attention 2 (Dao, 2023)."""
    _, q_heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_cache.shape
    # Wide heads take half as many keys a turn: the shared memory of smaller cards holds no more.
    block_d = max(16, triton.next_power_of_2(head_dim))
    is_wide = block_d * q.element_size() > 256
    _prefill[(q_heads, len(tiles))](
        *(q, k_cache, v_cache, page_table, tiles, out),
        *(q.stride(0), out.stride(0), page_table.stride(0), scale * 1.4426950408889634),
        WINDOW=window,
        SOFT_CAP=soft_cap * 1.4426950408889634,
        KV_HEADS=kv_heads,
        RATIO=q_heads // kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        BLOCK_M=PREFILL_TILE,
        BLOCK_N=32 if is_wide else 64,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=2 if is_wide else 3,
    )


@triton.jit
def _prefill(
    q,
    k_cache,
    v_cache,
    page_table,
    tiles,
    out,
    q_stride,
    out_stride,
    table_stride,
    scale_log2,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, tile = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(tiles + 4 * tile).to(tl.int64)
    n_rows = tl.load(tiles + 4 * tile + 1)
    if n_rows == 0:
        return
    line = page_table + tl.load(tiles + 4 * tile + 2).to(tl.int64) * table_stride
    first_position = tl.load(tiles + 4 * tile + 3)
    kv_head = head // RATIO

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    is_query = (m < n_rows)[:, None] & in_head[None, :]
    queries = tl.load(
        q + (first_row + m)[:, None] * q_stride + head * HEAD_DIM + d[None, :],
        mask=is_query,
        other=0.0,
    )
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    # Keys that every query of the tile sees need no mask; the last ones do. With a window all do,
    # from the first key on that the tile's first query sees.
    n_unmasked = (first_position + 1) // BLOCK_N * BLOCK_N
    first_masked = n_unmasked
    if WINDOW > 0:
        n_unmasked = 0
        first_masked = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    for start in range(0, n_unmasked, BLOCK_N):
        position = start + n
        page = tl.load(line + position // PAGE_SIZE).to(tl.int64)
        key_row = (page * KV_HEADS + kv_head) * PAGE_SIZE + position % PAGE_SIZE
        here = key_row[:, None] * HEAD_DIM + d[None, :]
        k = tl.load(k_cache + here, mask=in_head[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale_log2
        if SOFT_CAP > 0:
            scores = soft_capped(scores, SOFT_CAP)
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        v = tl.load(v_cache + here, mask=in_head[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        largest = new_largest

    for start in range(first_masked, first_position + n_rows, BLOCK_N):
        position = start + n
        is_key = position < first_position + n_rows
        page = tl.load(line + position // PAGE_SIZE, mask=is_key, other=0).to(tl.int64)
        key_row = (page * KV_HEADS + kv_head) * PAGE_SIZE + position % PAGE_SIZE
        here = key_row[:, None] * HEAD_DIM + d[None, :]
        mask = is_key[:, None] & in_head[None, :]
        k = tl.load(k_cache + here, mask=mask, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale_log2
        if SOFT_CAP > 0:
            scores = soft_capped(scores, SOFT_CAP)
        is_seen = position[None, :] <= (first_position + m)[:, None]
        if WINDOW > 0:
            # Rows behind the tile's last one see what that sees: without any key they would be NaN.
            own = first_position + tl.minimum(m, n_rows - 1)
            is_seen &= position[None, :] > own[:, None] - WINDOW
        scores = tl.where(is_seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        if WINDOW > 0:
            # A query that has seen no key yet has no largest score: any number will do.
            new_largest = tl.maximum(new_largest, -1e30)
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        v = tl.load(v_cache + here, mask=mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        largest = new_largest

    tl.store(
        out + (first_row + m)[:, None] * out_stride + head * HEAD_DIM + d[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=is_query,
    )
