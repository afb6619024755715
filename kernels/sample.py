"""The choice of the next token from a row of logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Draw(NamedTuple):
    """One token to draw, and how. Numbers of one kind, so that they go to a device in one copy."""

    row: int
    temperature: float
    """Above 0."""
    top_k: int
    """0 keeps all."""
    top_p: float
    """Above 0; 1 keeps all."""
    uniform: float
    """In [0, 1)."""


def sample(tokens: torch.Tensor, logits: torch.Tensor, draws: torch.Tensor) -> None:
    """Draws from ``softmax(logits / temperature)`` cut down to the top k, then to the top p.

    Top k keeps the k largest logits, ties of the k-th included. Top p (nucleus sampling, Holtzman
    et al., 2019) keeps the fewest largest of the rest whose probabilities sum to at least p, ties
    of the last one included. The draw inverts the cumulative distribution in the order of the token
    ids, so a row's token depends on that row alone.

    tokens: [rows] int32, the token of each row's largest logit, negative where the logits are not
        finite; replaced by the token drawn in the rows of ``draws``, but negative ones stay
    logits: [rows, vocabulary], rows at any stride
    draws: [draws, fields of ``Draw``] float64, no row twice
    """
    (sample_triton if logits.is_cuda else sample_torch)(tokens, logits, draws)


def sample_torch(tokens: torch.Tensor, logits: torch.Tensor, draws: torch.Tensor) -> None:
    rows, temperature, top_k, top_p, uniform = draws.unbind(dim=1)
    rows, top_k = rows.long(), top_k.long()
    drawn_from = logits[rows].float()
    # Less than the largest, so that a temperature next to zero makes no infinity of it.
    largest = drawn_from.amax(dim=-1, keepdim=True)
    scaled = (drawn_from - largest).double() / temperature[:, None]
    # Without a cut the sort of all logits is spared.
    if ((top_k > 0) | (top_p < 1)).any():
        scaled = _keep_top(scaled, top_k, top_p)
    cumulative = torch.softmax(scaled, dim=-1).cumsum(dim=-1)
    # The last sum may miss 1 by rounding. A draw below it lands on a token of positive probability.
    total = cumulative[:, -1]
    draw = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, draw[:, None], right=True).squeeze(1)
    tokens[rows] = drawn.int().where(tokens[rows] >= 0, tokens[rows])


def _keep_top(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The logits with -inf for every token that top k or top p leaves out."""
    vocabulary = logits.shape[1]
    descending = logits.sort(dim=-1, descending=True).values
    kept = torch.where(top_k > 0, top_k, vocabulary).clamp_(max=vocabulary)
    threshold = descending.gather(1, kept[:, None] - 1)
    descending = descending.masked_fill(descending < threshold, float("-inf"))

    probabilities = torch.softmax(descending, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The sum may reach 1 by rounding before the last token; a top p of 1 keeps them all.
    in_nucleus = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    in_nucleus[:, 0] = True
    smallest = descending.masked_fill(~in_nucleus, float("inf")).amin(dim=-1, keepdim=True)
    return logits.masked_fill(logits < torch.maximum(smallest, threshold), float("-inf"))


def sample_triton(tokens: torch.Tensor, logits: torch.Tensor, draws: torch.Tensor) -> None:
    """A program draws for a row, and finds the smallest logit of a cut by search, not by a sort.

    A pass over the row weighs what lies at and above each of four numbers, which leaves a fifth of
    those where the cut can be: 7 passes of float16 or bfloat16, 14 of float32. Weights are float32,
    their sums float64.
    """
    vocabulary = logits.shape[1]
    # Reckoned, not measured: 16 warps of 128 registers fill a multiprocessor, and a thread loads 8
    # logits at once.
    block = 4096
    _sample[(len(draws),)](
        *(tokens, logits, draws, logits.stride(0)),
        VOCABULARY=vocabulary,
        PIVOTS=4,
        BLOCK=block,
        BLOCKS=triton.next_power_of_2(triton.cdiv(vocabulary, block)),
        num_warps=16,
    )


@triton.jit
def _sample(
    tokens,
    logits,
    draws,
    stride,
    VOCABULARY: tl.constexpr,
    PIVOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    DTYPE: tl.constexpr = logits.dtype.element_ty
    # The fields of ``Draw``.
    draw = draws + 5 * tl.program_id(0)
    row = tl.load(draw).to(tl.int64)
    temperature = tl.load(draw + 1)
    top_k = tl.load(draw + 2).to(tl.int32)
    top_p = tl.load(draw + 3)
    uniform = tl.load(draw + 4)
    token = tl.load(tokens + row)
    if token < 0:
        return
    logits += row * stride
    largest = tl.load(logits + token).to(tl.float32)
    # Temperatures below 1e-30 leave only the largest logit, as 1e-30 does, but would overflow.
    scale = (1.4426950408889634 / tl.maximum(temperature, 1e-30)).to(tl.float32)

    low = -_ordinal(tl.full((), float("inf"), tl.float32), DTYPE)
    end = _ordinal(largest, DTYPE) + 1
    if (top_k > 0) & (top_k < VOCABULARY):
        low = _search(logits, largest, scale, low, end, top_k, True, VOCABULARY, PIVOTS, BLOCK)
    if top_p < 1:
        kept = _cumulate(logits, largest, scale, _number(low, DTYPE), VOCABULARY, BLOCK, BLOCKS)
        goal = top_p * tl.max(kept, axis=0)
        low = _search(logits, largest, scale, low, end, goal, False, VOCABULARY, PIVOTS, BLOCK)
    smallest = _number(low, DTYPE)

    sums = _cumulate(logits, largest, scale, smallest, VOCABULARY, BLOCK, BLOCKS)
    # Less than the last sum: its product with a float64 below 1 is never rounded up to it.
    goal = uniform * tl.max(sums, axis=0)
    block = tl.sum((sums <= goal).to(tl.int32), axis=0)
    before = tl.max(tl.where(sums <= goal, sums, 0.0), axis=0)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    weights = _weights(logits, ids, largest, scale, smallest, VOCABULARY)
    is_reached = before + tl.cumsum(weights, axis=0) > goal
    # The block's sums are rounded otherwise here, so that they may all miss the goal.
    first = tl.min(tl.where((weights > 0) & is_reached, ids, VOCABULARY), axis=0)
    last = tl.max(tl.where(weights > 0, ids, 0), axis=0)
    tl.store(tokens + row, tl.minimum(first, last))


@triton.jit
def _search(
    logits,
    largest,
    scale,
    low,
    end,
    goal,
    IS_COUNT: tl.constexpr,
    VOCABULARY: tl.constexpr,
    PIVOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The ordinal of the largest number such that the tokens at and above it reach the goal, by
    their count or by their weights. Those at ``low`` and above do, those at ``end`` do not."""
    DTYPE: tl.constexpr = logits.dtype.element_ty
    TYPE: tl.constexpr = tl.int32 if IS_COUNT else tl.float64
    steps = 1 + tl.arange(0, PIVOTS)
    span = end - low
    while span > 1:
        # Rounded up, so that the last pivots may lie beyond the end; they are not reached.
        span = tl.cdiv(span, PIVOTS + 1)
        pivots = _number(low + span * steps, DTYPE)[:, None]
        # Added up once a pass: a sum over all threads for each block would wait for the slowest.
        acc = tl.zeros((PIVOTS, BLOCK), TYPE)
        for start in range(0, VOCABULARY, BLOCK):
            ids = start + tl.arange(0, BLOCK)[None, :]
            x = tl.load(logits + ids, mask=ids < VOCABULARY, other=float("-inf")).to(tl.float32)
            if IS_COUNT:
                weights = tl.full((1, BLOCK), 1, TYPE)
            else:
                weights = tl.exp2((x - largest) * scale).to(TYPE)
            acc += tl.where(x >= pivots, weights, 0)
        reached = tl.max(tl.where(tl.sum(acc, axis=1) >= goal, steps, 0), axis=0)
        low += span * reached
    return low


@triton.jit
def _cumulate(
    logits,
    largest,
    scale,
    smallest,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """[BLOCKS] float64, the weights' sums up to each block's end; after the last one the total."""
    blocks = tl.arange(0, BLOCKS)
    sums = tl.zeros((BLOCKS,), tl.float64)
    total = tl.full((), 0, tl.float64)
    for block in range(tl.cdiv(VOCABULARY, BLOCK)):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        total += tl.sum(_weights(logits, ids, largest, scale, smallest, VOCABULARY), axis=0)
        sums = tl.where(blocks >= block, total, sums)
    return sums


@triton.jit
def _weights(logits, ids, largest, scale, smallest, VOCABULARY: tl.constexpr):
    """``exp((x - largest) / temperature)`` of float32, 0 below the smallest logit that is kept."""
    x = tl.load(logits + ids, mask=ids < VOCABULARY, other=float("-inf")).to(tl.float32)
    return tl.where(x >= smallest, tl.exp2((x - largest) * scale), 0.0).to(tl.float64)


@triton.jit
def _ordinal(number, DTYPE: tl.constexpr):
    """The number's place among those of its type: 0 for 0, 1 for the next larger one, and so on."""
    BITS: tl.constexpr = tl.int16 if DTYPE.primitive_bitwidth == 16 else tl.int32
    size = tl.abs(number).to(DTYPE).to(BITS, bitcast=True).to(tl.int64)
    return tl.where(number < 0, -size, size)


@triton.jit
def _number(ordinal, DTYPE: tl.constexpr):
    """The inverse of ``_ordinal``, as float32."""
    BITS: tl.constexpr = tl.int16 if DTYPE.primitive_bitwidth == 16 else tl.int32
    size = tl.abs(ordinal).to(BITS).to(DTYPE, bitcast=True).to(tl.float32)
    return tl.where(ordinal < 0, -size, size)
