"""The second half of a LoRA (Hu et al., 2021): the shrunk rows times the adapters' B.

An adapter's B, its scaling included, stands in rows ``first_rank`` to ``first_rank + rank`` of
``b``, the parts of a fused projection side by side. ``h`` is laid out as ``lora_shrink`` tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.lora_segments import TILE_ROWS, LoraRows, Segment

#: Up to so many rows the kernels take more ranks at once.
FEW_ROWS = 256


def lora_expand(
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    rows: LoraRows,
    part_sizes: Sequence[int],
) -> None:
    """``y[rows, part] += h[rows, part] @ b[ranks, part]`` for each segment and each part.

    y: [rows, sum of part_sizes], changed in place; rows without adapter keep every bit
    h: [rows, parts * rank_capacity]
    b: [rank_capacity, sum of part_sizes]
    y and h may be columns of a wider tensor.
    """
    if rows.tiles is not None:
        lora_expand_triton(y, h, b, rows.tiles, part_sizes)
    else:
        lora_expand_torch(y, h, b, rows.segments, part_sizes)


def lora_expand_torch(
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    segments: Sequence[Segment],
    part_sizes: Sequence[int],
) -> None:
    n_parts = len(part_sizes)
    for first_row, end_row, first_rank, rank in segments:
        first_column, shrunk = 0, n_parts * first_rank
        for size in part_sizes:
            columns = slice(first_column, first_column + size)
            y[first_row:end_row, columns].addmm_(
                h[first_row:end_row, shrunk : shrunk + rank],
                b[first_rank : first_rank + rank, columns],
            )
            first_column += size
            shrunk += rank


def lora_expand_triton(
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    tiles: torch.Tensor,
    part_sizes: Sequence[int],
) -> None:
    block_n = 128
    # Sizes of three parts, those that are not there 0 columns wide.
    sizes = [*part_sizes, 0, 0][:3]
    n_blocks = sum(triton.cdiv(size, block_n) for size in sizes)
    _expand[(n_blocks, len(tiles))](
        *(y, h, b, tiles, y.stride(0), h.stride(0)),
        N_PARTS=len(part_sizes),
        SIZE_0=sizes[0],
        SIZE_1=sizes[1],
        SIZE_2=sizes[2],
        BLOCK_M=TILE_ROWS,
        BLOCK_N=block_n,
        BLOCK_R=rank_step(len(y)),
        num_warps=4,
        num_stages=3,
    )


def rank_step(n_rows: int) -> int:
    """Ranks that a kernel takes at once. With few rows its latency counts: on an H100 at 256 rows
    the expand of o takes 5.8 us in steps of 32, 6.9 in steps of 16; at 2,304 rows 23.0 and 21.5."""
    return 32 if n_rows <= FEW_ROWS else 16


@triton.jit
def _expand(
    y,
    h,
    b,
    tiles,
    y_stride,
    h_stride,
    N_PARTS: tl.constexpr,
    SIZE_0: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    block, tile = tl.program_id(0), tl.program_id(1)
    rank = tl.load(tiles + 4 * tile + 3)
    if rank == 0:
        return
    first_row = tl.load(tiles + 4 * tile).to(tl.int64)
    n_rows = tl.load(tiles + 4 * tile + 1)
    first_rank = tl.load(tiles + 4 * tile + 2)

    part, part_start, part_size = 0, 0, SIZE_0
    if block >= tl.cdiv(SIZE_0, BLOCK_N):
        part, part_start, part_size = 1, SIZE_0, SIZE_1
        block -= tl.cdiv(SIZE_0, BLOCK_N)
        if block >= tl.cdiv(SIZE_1, BLOCK_N):
            part, part_start, part_size = 2, SIZE_0 + SIZE_1, SIZE_2
            block -= tl.cdiv(SIZE_1, BLOCK_N)

    m = tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    is_row, is_column = m < n_rows, n < part_size
    h_rows = h + (first_row + m)[:, None] * h_stride + N_PARTS * first_rank + part * rank
    b_columns = b + part_start + n[None, :]
    here = y + (first_row + m)[:, None] * y_stride + part_start + n[None, :]
    mask = is_row[:, None] & is_column[None, :]
    # Loaded first, so that it is on its way while the products are made.
    acc = tl.load(here, mask=mask, other=0).to(tl.float32)
    for start in range(0, rank, BLOCK_R):
        in_rank = (start + r) < rank
        hs = tl.load(h_rows + start + r[None, :], mask=is_row[:, None] & in_rank[None, :], other=0)
        b_rows = (first_rank + start + r).to(tl.int64)[:, None] * (SIZE_0 + SIZE_1 + SIZE_2)
        bs = tl.load(b_columns + b_rows, mask=in_rank[:, None] & is_column[None, :], other=0)
        acc = tl.dot(hs.to(bs.dtype), bs, acc, input_precision="ieee")
    tl.store(here, acc.to(y.dtype.element_ty), mask=mask)
