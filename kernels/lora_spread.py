"""An adapter that has come in one piece goes to its ranks in the memory of all factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

#: Numbers that a program copies.
_BLOCK = 4096


def spread_table(factors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """What the kernel has to know of ``factors``, each [ranks, numbers of a rank] and contiguous:
    on the device a row each of address, numbers of a rank, and those of all factors before it."""
    rows, before = [], 0
    for factor in factors:
        rows.append((factor.data_ptr(), factor.shape[1], before))
        before += factor.shape[1]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 3)


def lora_spread(
    packed: torch.Tensor,
    factors: Sequence[torch.Tensor],
    table: torch.Tensor,
    first_rank: int,
    rank: int,
) -> None:
    """Write ranks ``first_rank`` to ``first_rank + rank`` of each factor.

    packed: flat, the factors' [rank, numbers of a rank] one behind the other
    factors: each [ranks, numbers of a rank], contiguous
    table: their rows of a ``spread_table`` of them or of more, of which they are neighbours
    """
    if packed.is_cuda:
        lora_spread_triton(packed, factors, table, first_rank, rank)
    else:
        lora_spread_torch(packed, factors, first_rank, rank)


def lora_spread_torch(
    packed: torch.Tensor, factors: Sequence[torch.Tensor], first_rank: int, rank: int
) -> None:
    parts = torch.split(packed, [rank * factor.shape[1] for factor in factors])
    for factor, part in zip(factors, parts, strict=True):
        factor[first_rank : first_rank + rank] = part.view(rank, factor.shape[1])


def lora_spread_triton(
    packed: torch.Tensor,
    factors: Sequence[torch.Tensor],
    table: torch.Tensor,
    first_rank: int,
    rank: int,
) -> None:
    """One launch for any number of factors: views of 256 of them took the host 0.9 ms more, and
    the bus takes 1.6 ms for an adapter of rank 16 of an 8B model (docs/gpu.md)."""
    largest = rank * max(factor.shape[1] for factor in factors)
    _spread[(triton.cdiv(largest, _BLOCK), len(factors))](
        packed, table, first_rank, rank, BLOCK=_BLOCK, num_warps=8
    )


# Compiled once: not again for a rank of 1, a multiple of 16 or another row of the table.
@triton.jit(do_not_specialize=["table", "first_rank", "rank"])
def _spread(packed, table, first_rank, rank, BLOCK: tl.constexpr):
    row = table + 3 * tl.program_id(1)
    address, per_rank = tl.load(row), tl.load(row + 1)
    start = tl.load(row + 2) - tl.load(table + 2)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n < rank * per_rank
    target = address.to(tl.pointer_type(packed.dtype.element_ty)) + first_rank * per_rank
    tl.store(target + n, tl.load(packed + rank * start + n, mask=mask), mask=mask)
