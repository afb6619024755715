"""The token of the largest logit of each row: greedy decoding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: In place of a token where the logits are not finite: there is none to choose.
NO_TOKEN = -1


def largest_token(logits: torch.Tensor) -> torch.Tensor:
    """``argmax(logits)`` of each row, the first of equal ones.

    ``NO_TOKEN`` for a row that holds NaN or infinity, or -infinity only.

    logits: [rows, vocabulary], rows at any stride; returns [rows] int32.
    """
    return (largest_token_triton if logits.is_cuda else largest_token_torch)(logits)


def largest_token_torch(logits: torch.Tensor) -> torch.Tensor:
    # NaN counts as the largest.
    largest, tokens = logits.max(dim=-1)
    return tokens.where(largest.isfinite(), NO_TOKEN).int()


def largest_token_triton(logits: torch.Tensor) -> torch.Tensor:
    """A program takes a row, in one pass."""
    n_rows, vocabulary = logits.shape
    tokens = torch.empty(n_rows, dtype=torch.int32, device=logits.device)
    if n_rows:
        _largest_token[(n_rows,)](
            *(logits, tokens, logits.stride(0)), VOCABULARY=vocabulary, BLOCK=8192, num_warps=16
        )
    return tokens


@triton.jit
def _largest_token(logits, tokens, stride, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.full((BLOCK,), VOCABULARY, tl.int32)
    is_nan = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, VOCABULARY, BLOCK):
        ids = start + column
        x = tl.load(logits + row * stride + ids, mask=ids < VOCABULARY, other=float("-inf"))
        x = x.to(tl.float32)
        is_nan = tl.where(x != x, 1, is_nan)
        place = tl.where(x > largest, ids, place)
        largest = tl.where(x > largest, x, largest)
    most = tl.max(largest, axis=0)
    first = tl.min(tl.where(largest == most, place, VOCABULARY), axis=0)
    is_finite = (most < float("inf")) & (most > float("-inf")) & (tl.max(is_nan, axis=0) == 0)
    tl.store(tokens + row, tl.where(is_finite, first, -1))  # NO_TOKEN
