"""The first half of a LoRA (Hu et al., 2021): rows times the adapters' A, each at its own rank.

An adapter's A stands in rows ``n_parts * first_rank`` to ``n_parts * (first_rank + rank)`` of
``a``, part after part: the parts of a fused projection (q, k, v) read the same rows, so one product
serves them all. The result's columns are laid out as the rows of ``a``.

On a GPU this is for large batches only. In others all A stand under the base weight, and one cuBLAS
product makes the base output and every adapter's columns: on an H100 that costs 7 us a layer of an
8B model at 256 rows and 512 ranks, where a launch of its own for each linear group cost 107 us.
But its cost grows with rows times ranks, of all adapters (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.lora_segments import LoraRows, Segment

#: Rows of one program of the Triton kernel.
SHRINK_TILE_ROWS = 64

#: Rows times ranks from which on a GPU is faster by segments than with all A under the weight.
SEGMENTED_FROM = 1 << 20


def lora_shrink(x: torch.Tensor, a: torch.Tensor, rows: LoraRows, n_parts: int) -> torch.Tensor:
    """``h[rows, columns] = x[rows] @ a[columns]^T`` for each segment's rows and its adapter's
    columns.

    x: [rows, in_features]
    a: [n_parts * rank_capacity, in_features]
    Returns [rows, n_parts * ranks], at least up to the last one of the segments' adapters; what
    lies outside the segments is undefined.
    """
    if rows.shrink_tiles is not None:
        return lora_shrink_triton(x, a, rows.shrink_tiles, rows.num_ranks, n_parts)
    return lora_shrink_torch(x, a, rows.segments, n_parts)


def lora_shrink_torch(
    x: torch.Tensor, a: torch.Tensor, segments: Sequence[Segment], n_parts: int
) -> torch.Tensor:
    h = x.new_empty(x.shape[0], a.shape[0])
    for first_row, end_row, first_rank, rank in segments:
        columns = slice(n_parts * first_rank, n_parts * (first_rank + rank))
        torch.mm(x[first_row:end_row], a[columns].t(), out=h[first_row:end_row, columns])
    return h


def lora_shrink_triton(
    x: torch.Tensor,
    a: torch.Tensor,
    tiles: torch.Tensor,
    num_ranks: int,
    n_parts: int,
) -> torch.Tensor:
    """``tiles``: [tiles, 4] int32, those of the segments, ``SHRINK_TILE_ROWS`` rows each;
    ``num_ranks``: up to the last one of their adapters. Returns [rows, n_parts * num_ranks]."""
    h = x.new_empty(x.shape[0], n_parts * num_ranks)
    block_n = 64
    # The columns of one tile side by side: its rows are read once, then found in the cache.
    _shrink[(triton.cdiv(n_parts * num_ranks, block_n), len(tiles))](
        *(x, a, h, tiles, x.stride(0), h.stride(0)),
        FEATURES=x.shape[1],
        N_PARTS=n_parts,
        BLOCK_M=SHRINK_TILE_ROWS,
        BLOCK_N=block_n,
        BLOCK_K=128 if x.element_size() == 2 else 32,
        num_warps=4,
        num_stages=3,
    )
    return h


@triton.jit
def _shrink(
    x,
    a,
    h,
    tiles,
    x_stride,
    h_stride,
    FEATURES: tl.constexpr,
    N_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block, tile = tl.program_id(0), tl.program_id(1)
    rank = tl.load(tiles + 4 * tile + 3)
    if block * BLOCK_N >= N_PARTS * rank:
        return
    first_row = tl.load(tiles + 4 * tile).to(tl.int64)
    n_rows = tl.load(tiles + 4 * tile + 1)
    first_rank = tl.load(tiles + 4 * tile + 2)

    m = tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_row, is_column = m < n_rows, n < N_PARTS * rank
    x_rows = x + (first_row + m)[:, None] * x_stride + k[None, :]
    a_rows = a + (N_PARTS * first_rank + n).to(tl.int64)[:, None] * FEATURES + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, FEATURES, BLOCK_K):
        in_row = start + k[None, :] < FEATURES
        xs = tl.load(x_rows + start, mask=is_row[:, None] & in_row, other=0)
        weights = tl.load(a_rows + start, mask=is_column[:, None] & in_row, other=0)
        acc = tl.dot(xs, tl.trans(weights), acc, input_precision="ieee")
    target = h + (first_row + m)[:, None] * h_stride + N_PARTS * first_rank + n[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(target, acc.to(h.dtype.element_ty), mask=mask)
