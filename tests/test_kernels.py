"""Each operation of ``kernels`` against its formula, written once more in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from kernels.act_and_mul import act_and_mul_torch, act_and_mul_triton, act_and_mul_with_lora
from kernels.linear import Linear
from kernels.lora_embed import lora_embed
from kernels.lora_expand import lora_expand_torch, lora_expand_triton
from kernels.lora_segments import GainRows, LoraRows, LoraTile, Segment, lora_tiles
from kernels.lora_shrink import lora_shrink_torch
from kernels.lora_spread import lora_spread, lora_spread_triton, spread_table
from kernels.paged_attention_decode import (
    paged_attention_decode_torch,
    paged_attention_decode_triton,
)
from kernels.paged_attention_prefill import (
    PrefillChunk,
    paged_attention_prefill_torch,
    paged_attention_prefill_triton,
    prefill_tiles,
)
from kernels.rms_norm import (
    add_rms_norm_torch,
    add_rms_norm_triton,
    rms_norm_torch,
    rms_norm_triton,
)
from kernels.rotary_kv_write import HeadNorms, rotary_kv_write_torch, rotary_kv_write_triton
from kernels.sample import Draw, sample_torch, sample_triton

Operation = Callable[..., Any]

#: The largest relative error of one rounding to float32, and to bfloat16.
ROUNDING, FP16_ROUNDING, BF16_ROUNDING = 2.0**-24, 2.0**-11, 2.0**-8

#: Stands wherever an operation must not look. Finite, since a masked value still counts as 0 times
#: itself; so large that a trace of it drowns everything else.
POISON = 1e30


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """Each element is off by no more than its own bound."""
    assert actual.shape == expected.shape
    excess = (actual.double() - expected).abs() - bound
    assert excess.max() <= 0, f"off by up to {excess.max():.3g} beyond the bound"


# --- add_rms_norm -------------------------------------------------------------------------------

ROWS, FEATURES = 7, 577
#: Large beside the mean square of the rows below, so that its place in the formula shows.
EPS = 0.03

rms_norms = pytest.mark.parametrize("add_rms_norm", [add_rms_norm_torch, add_rms_norm_triton])


def expected_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.pow(2).sum(-1, keepdim=True) / FEATURES + EPS).sqrt() * weight.double()


@rms_norms
def test_add_rms_norm_normalizes_the_sum(add_rms_norm: Operation) -> None:
    x, residual, weight = (0.2 * normal(ROWS, FEATURES, seed=s) for s in range(3))
    expected = expected_rms_norm(x + residual, weight[0])
    actual = add_rms_norm(x, residual, weight[0], EPS)
    # Half the error of the mean, which adds FEATURES roundings at worst, and a few products.
    assert_within(actual, expected, expected.abs() * (FEATURES / 2 + 4) * ROUNDING)


@rms_norms
def test_add_rms_norm_adds_to_the_residual_in_place_and_leaves_its_input_alone(
    add_rms_norm: Operation,
) -> None:
    x, residual = normal(ROWS, FEATURES), normal(ROWS, FEATURES, seed=1)
    before, expected = x.clone(), residual + x
    add_rms_norm(x, residual, torch.full((FEATURES,), 3.0), EPS)
    assert residual.equal(expected)
    assert x.equal(before)


@rms_norms
def test_add_rms_norm_reads_rows_at_any_stride(add_rms_norm: Operation) -> None:
    wide = normal(ROWS, FEATURES + 9)
    x, residual, weight = wide[:, :FEATURES], normal(ROWS, FEATURES, seed=1), normal(FEATURES)
    apart = add_rms_norm(x, residual.clone(), weight, EPS)
    assert apart.equal(add_rms_norm(x.contiguous(), residual.clone(), weight, EPS))


def test_add_rms_norm_of_bfloat16_adds_no_more_than_two_roundings() -> None:
    x, weight = normal(ROWS, FEATURES).bfloat16(), normal(FEATURES, seed=1).bfloat16()
    expected = expected_rms_norm(x, weight)
    actual = add_rms_norm_torch(torch.zeros_like(x), x.clone(), weight, EPS)
    assert_within(actual, expected, expected.abs() * 2 * BF16_ROUNDING)


@rms_norms
def test_add_rms_norm_of_float16_squares_in_float32(add_rms_norm: Operation) -> None:
    x = (1000 * normal(ROWS, FEATURES)).half()  # Its squares are beyond float16's 65504.
    expected = expected_rms_norm(x, torch.ones(FEATURES))
    actual = add_rms_norm(torch.zeros_like(x), x.clone(), torch.ones(FEATURES).half(), EPS)
    assert_within(actual, expected, expected.abs() * 2e-3)


@rms_norms
def test_add_rms_norm_adds_a_multiple(add_rms_norm: Operation) -> None:
    x, residual, weight = (normal(ROWS, FEATURES, seed=s) for s in range(3))
    expected = residual.double() + 0.22 * x.double()
    normed = add_rms_norm(x, residual, weight[0], EPS, 0.22)
    assert_within(residual, expected, expected.abs() * ROUNDING + x.abs() * ROUNDING)
    expected = expected_rms_norm(residual, weight[0])
    assert_within(normed, expected, expected.abs() * (FEATURES / 2 + 4) * ROUNDING)


@rms_norms
def test_add_rms_norm_by_a_weight_in_float32_rounds_the_product_once(
    add_rms_norm: Operation,
) -> None:
    x, weight = normal(ROWS, FEATURES).half(), normal(FEATURES, seed=1)
    expected = expected_rms_norm(x, weight)
    actual = add_rms_norm(torch.zeros_like(x), x.clone(), weight, EPS)
    assert actual.dtype == torch.float16
    # Those of float32 are far below it; the smallest numbers are a fixed distance apart.
    assert_within(actual, expected, expected.abs() * 1.05 * FP16_ROUNDING + 2.0**-25)


@pytest.mark.parametrize("rms_norm", [rms_norm_torch, rms_norm_triton])
def test_rms_norm_normalizes_rows_at_any_stride_in_place(rms_norm: Operation) -> None:
    wide, weight = normal(ROWS, FEATURES + 9), normal(FEATURES, seed=1)
    before, x = wide.clone(), wide[:, 4 : FEATURES + 4]
    assert rms_norm(x, weight, EPS) is x
    expected = expected_rms_norm(before[:, 4 : FEATURES + 4], weight)
    assert_within(x, expected, expected.abs() * (FEATURES / 2 + 4) * ROUNDING)
    x.copy_(before[:, 4 : FEATURES + 4])
    assert wide.equal(before)


# --- act_and_mul --------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Operation] = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu_tanh": lambda z: z / 2 * (1 + torch.tanh((2 / pi) ** 0.5 * (z + 0.044715 * z**3))),
}

acts = pytest.mark.parametrize("act_and_mul", [act_and_mul_torch, act_and_mul_triton])
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@acts
@activations
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # Numpy, under Triton.
def test_act_and_mul_is_its_formula(act_and_mul: Operation, activation: str) -> None:
    gate_up = 4 * normal(5, 2 * 101 + 3)[:, : 2 * 101]
    gate, up = gate_up[:, :101].double(), gate_up[:, 101:].double()
    expected = ACTIVATIONS[activation](gate) * up
    # Where 1 + tanh is almost 0 it is off by a rounding of 1.
    bound = expected.abs() * 16 * ROUNDING + (gate * up).abs() * 2 * ROUNDING
    assert_within(act_and_mul(gate_up, activation), expected, bound)


@acts
@activations
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # Numpy, under Triton.
def test_act_and_mul_stays_finite_for_large_gates(act_and_mul: Operation, activation: str) -> None:
    gate_up = torch.tensor([[-1e4, -200.0, 200.0, 1e4, 2.0, 2.0, 2.0, 2.0]])
    assert act_and_mul(gate_up, activation).tolist() == [[0.0, 0.0, 400.0, 2e4]]


@acts
@activations
def test_act_and_mul_leaves_its_input_alone(act_and_mul: Operation, activation: str) -> None:
    gate_up = normal(5, 22)
    before = gate_up.clone()
    act_and_mul(gate_up, activation)
    assert gate_up.equal(before)


# --- Linear -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [0, 1, 2, 49])
@pytest.mark.parametrize("has_bias", [False, True], ids=["bare", "bias"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
def test_linear_is_its_formula(
    num_rows: int, has_bias: bool, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_packed:
        monkeypatch.setattr("kernels.linear._can_pack", lambda _: False)
    x, weight = normal(num_rows, FEATURES), normal(67, FEATURES, seed=1)
    bias = 100 * normal(67, seed=2) if has_bias else torch.zeros(67)
    expected = x.double() @ weight.double().t() + bias
    bound = (x.double().abs() @ weight.double().abs().t() + bias.abs()) * FEATURES * ROUNDING
    actual = Linear(weight, bias if has_bias else None)(x)
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.bfloat16, BF16_ROUNDING), (torch.float16, FP16_ROUNDING)],
    ids=["bfloat16", "float16"],
)
def test_linear_of_a_short_type_sums_in_float32(dtype: torch.dtype, rounding: float) -> None:
    """On every CPU, also where oneDNN has no product for the type."""
    x, weight = normal(49, FEATURES).to(dtype), normal(67, FEATURES, seed=1).to(dtype)
    expected = x.double() @ weight.double().t()
    # One rounding of the sum; the products' own errors in float32 are far below it.
    bound = expected.abs() * rounding + 1e-3
    assert_within(Linear(weight)(x), expected, bound)


def test_linear_reads_rows_that_do_not_stand_together() -> None:
    wide, weight = normal(9, 2 * FEATURES), normal(67, FEATURES, seed=1)
    linear = Linear(weight)
    assert linear(wide[:, :FEATURES]).equal(linear(wide[:, :FEATURES].clone()))


# --- rotary_kv_write ----------------------------------------------------------------------------

PAGE_SIZE, NUM_PAGES = 5, 23


def by_row(cache: torch.Tensor) -> torch.Tensor:
    """[pages * page_size, kv_heads, head_dim]."""
    return cache.transpose(1, 2).flatten(0, 1)


@dataclass
class Rotary:
    """Five rows written to scattered places of a poisoned cache, and what went in and came out."""

    rotary_kv_write: Operation
    q_heads: int
    kv_heads: int
    rotated: int = 14
    has_norms: bool = False
    head_dim: int = 14

    def __post_init__(self) -> None:
        heads = self.q_heads + 2 * self.kv_heads
        qkv = normal(5, heads * self.head_dim + 3)[:, :-3]
        angles = 100 * normal(5, self.rotated // 2, seed=1)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.rows = torch.tensor([113, 0, 41, 7, 42])
        shape = (NUM_PAGES, self.kv_heads, PAGE_SIZE, self.head_dim)
        self.k_cache, self.v_cache = torch.full(shape, POISON), torch.full(shape, -POISON)
        by_head = qkv.clone().unflatten(1, (heads, self.head_dim))
        self.q = by_head[:, : self.q_heads]
        self.k = by_head[:, self.q_heads : -self.kv_heads]
        self.v = by_head[:, -self.kv_heads :]
        self.norms = None
        if self.has_norms:
            self.norms = HeadNorms(*(normal(self.head_dim, seed=s) for s in (2, 3)), EPS)
            self.q, self.k = (
                heads / (heads.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight
                for heads, weight in ((self.q, self.norms.q), (self.k, self.norms.k))
            )
        self.returned = self.rotary_kv_write(
            qkv, self.cos, self.sin, self.k_cache, self.v_cache, self.rows, self.norms
        )

    def turned(self, heads: torch.Tensor) -> torch.Tensor:
        """Its first part's halves as real and imaginary part, turned by the row's angles."""
        first, second, rest = heads.double().split(
            [self.rotated // 2, self.rotated // 2, self.head_dim - self.rotated], dim=-1
        )
        turn = torch.complex(self.cos.double(), self.sin.double())[:, None]
        numbers = torch.complex(first, second) * turn
        return torch.cat([numbers.real, numbers.imag, rest], dim=-1)

    def written(self, cache: torch.Tensor) -> torch.Tensor:
        return by_row(cache)[self.rows]


#: Two products and a sum: three roundings of terms below 2 * 5 (five standard deviations); a norm
#: before them adds half the error of a mean of 14, and two products.
ROTARY_BOUND = torch.tensor((3 + 7 + 2) * 10 * ROUNDING)

heads_of_rotary = pytest.mark.parametrize(("q_heads", "kv_heads"), [(6, 2), (3, 3), (5, 1)])
#: Of 14 dimensions all are rotated, some, or none; with and without norms before.
rotations = pytest.mark.parametrize(
    ("rotated", "has_norms"), [(14, False), (14, True), (10, True), (4, False), (0, False)]
)
rotaries = pytest.mark.parametrize("op", [rotary_kv_write_torch, rotary_kv_write_triton])


@rotaries
@heads_of_rotary
@rotations
def test_rotary_kv_write_returns_the_queries_turned(
    op: Operation, q_heads: int, kv_heads: int, rotated: int, has_norms: bool
) -> None:
    rotary = Rotary(op, q_heads, kv_heads, rotated, has_norms)
    assert_within(rotary.returned, rotary.turned(rotary.q), ROTARY_BOUND)


@rotaries
@heads_of_rotary
@rotations
def test_rotary_kv_write_stores_the_keys_turned(
    op: Operation, q_heads: int, kv_heads: int, rotated: int, has_norms: bool
) -> None:
    rotary = Rotary(op, q_heads, kv_heads, rotated, has_norms)
    assert_within(rotary.written(rotary.k_cache), rotary.turned(rotary.k), ROTARY_BOUND)


@rotaries
@heads_of_rotary
@rotations
def test_rotary_kv_write_stores_the_values_as_they_are(
    op: Operation, q_heads: int, kv_heads: int, rotated: int, has_norms: bool
) -> None:
    rotary = Rotary(op, q_heads, kv_heads, rotated, has_norms)
    assert rotary.written(rotary.v_cache).equal(rotary.v)


@rotaries
def test_rotary_kv_write_leaves_the_other_cache_rows_alone(op: Operation) -> None:
    rotary = Rotary(op, 6, 2)
    others = torch.ones(NUM_PAGES * PAGE_SIZE, dtype=torch.bool)
    others[rotary.rows] = False
    assert (by_row(rotary.k_cache)[others] == POISON).all()
    assert (by_row(rotary.v_cache)[others] == -POISON).all()


# --- paged attention ----------------------------------------------------------------------------

HEAD_DIM = 14
SCALE = 0.3

#: Scores are below 20 and off by at most HEAD_DIM + 2 roundings; a weight is off by twice that,
#: relatively, and a weighted mean of values below 5 by five times that.
ATTENTION_BOUND = torch.tensor(5 * 2 * 20 * (HEAD_DIM + 2) * ROUNDING)

#: Query heads over KV heads, as many, several and one.
attention_heads = pytest.mark.parametrize(("q_heads", "kv_heads"), [(3, 3), (6, 2), (5, 1)])


class PagedCache:
    """Keys and values of sequences on shuffled pages; the rest of the cache is poison."""

    def __init__(self, lengths: list[int], kv_heads: int) -> None:
        shape = (NUM_PAGES, kv_heads, PAGE_SIZE, HEAD_DIM)
        self.k_cache, self.v_cache = torch.full(shape, POISON), torch.full(shape, -POISON)
        shuffled = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(3)).tolist()
        self.unused = shuffled.pop()
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.pages: list[list[int]] = []
        for seed, length in enumerate(lengths):
            self.keys.append(normal(length, kv_heads, HEAD_DIM, seed=2 * seed))
            self.values.append(normal(length, kv_heads, HEAD_DIM, seed=2 * seed + 1))
            self.pages.append([shuffled.pop() for _ in range(-(-length // PAGE_SIZE))])
            for row in range(length):
                page, place = self.pages[-1][row // PAGE_SIZE], row % PAGE_SIZE
                self.k_cache[page, :, place] = self.keys[-1][row]
                self.v_cache[page, :, place] = self.values[-1][row]

    def page_table(self) -> torch.Tensor:
        """A line a sequence, in reverse, behind one that nobody uses; the ends name poison."""
        lines = [[self.unused] * NUM_PAGES for _ in range(len(self.pages) + 1)]
        for line, pages in zip(reversed(lines), self.pages, strict=False):
            line[: len(pages)] = pages
        return torch.tensor(lines, dtype=torch.int32)

    def lines(self) -> list[int]:
        return list(range(len(self.pages), 0, -1))


def expected_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """One query [q_heads, head_dim] over keys and values [length, kv_heads, head_dim]."""
    keys, values = keys[-window:], values[-window:]  # All of them where the window is 0.
    ratio = len(q) // keys.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    for head, query in enumerate(q.double()):
        scores = SCALE * keys[:, head // ratio].double() @ query
        if soft_cap:
            scores = soft_cap * (scores / soft_cap).tanh()
        weights = scores.exp()
        out[head] = weights @ values[:, head // ratio].double() / weights.sum()
    return out


#: Windows of the own key alone, below and above a page, and above a turn of the kernels; soft caps.
attentions = pytest.mark.parametrize(
    ("window", "soft_cap"), [(0, 0.0), (1, 0.0), (3, 2.5), (17, 0.0), (70, 0.0), (0, 2.5)]
)

decodes = pytest.mark.parametrize(
    "attend", [paged_attention_decode_torch, paged_attention_decode_triton]
)


@decodes
@attention_heads
@pytest.mark.parametrize("lengths", [[1, 5, 23, 7, 11], [101], [66, 1]], ids=str)
@attentions
def test_decode_attention_is_its_formula_over_the_keys_that_are_seen(
    attend: Operation,
    q_heads: int,
    kv_heads: int,
    lengths: list[int],
    window: int,
    soft_cap: float,
) -> None:
    cache = PagedCache(lengths, kv_heads)
    q = normal(len(lengths), q_heads, HEAD_DIM, seed=9)
    lines, numbers = (torch.tensor(n, dtype=torch.int32) for n in (cache.lines(), lengths))
    actual = torch.full_like(q, POISON)
    table = cache.page_table()
    attend(
        *(q, cache.k_cache, cache.v_cache, table, lines, numbers, max(lengths), actual),
        *(SCALE, window, soft_cap),
    )
    cached = zip(q, cache.keys, cache.values, strict=True)
    expected = torch.stack([expected_attention(*c, window, soft_cap) for c in cached])
    assert_within(actual, expected, ATTENTION_BOUND)


def attend_torch(
    cache: PagedCache, q: torch.Tensor, chunks: list[PrefillChunk], *settings: float
) -> torch.Tensor:
    out = torch.full_like(q, POISON)
    inputs = (q, cache.k_cache, cache.v_cache, cache.page_table())
    paged_attention_prefill_torch(*inputs, chunks, out, SCALE, *settings)
    return out


def attend_triton(
    cache: PagedCache, q: torch.Tensor, chunks: list[PrefillChunk], *settings: float
) -> torch.Tensor:
    out = torch.full_like(q, POISON)
    inputs = (q, cache.k_cache, cache.v_cache, cache.page_table())
    tiles = torch.tensor(prefill_tiles(chunks), dtype=torch.int32)
    paged_attention_prefill_triton(*inputs, tiles, out, SCALE, *settings)
    return out


prefills = pytest.mark.parametrize("attend", [attend_torch, attend_triton])


@prefills
@attention_heads
@pytest.mark.parametrize(
    ("lengths", "rows"),
    [([1], [1]), ([5], [5]), ([23], [8]), ([11], [1]), ([23, 7, 40], [23, 3, 39]), ([90], [70])],
    ids=str,
)
@attentions
def test_prefill_attention_is_its_formula_over_the_keys_that_each_query_sees(
    attend: Operation,
    q_heads: int,
    kv_heads: int,
    lengths: list[int],
    rows: list[int],
    window: int,
    soft_cap: float,
) -> None:
    cache = PagedCache(lengths, kv_heads)
    first, chunks, expected = 2, [], []
    q = normal(sum(rows) + 3, q_heads, HEAD_DIM, seed=9)
    for line, length, num_rows, keys, values in zip(
        cache.lines(), lengths, rows, cache.keys, cache.values, strict=True
    ):
        chunks.append(PrefillChunk(first, first + num_rows, line, length))
        for row in range(num_rows):
            end = length - num_rows + row + 1
            seen = keys[:end], values[:end], window, soft_cap
            expected.append(expected_attention(q[first + row], *seen))
        first += num_rows
    actual = attend(cache, q, chunks, window, soft_cap)
    assert_within(actual[2:first], torch.stack(expected), ATTENTION_BOUND)
    assert (actual[:2] == POISON).all()
    assert (actual[first:] == POISON).all()


@pytest.mark.parametrize("attend", [paged_attention_decode_triton, attend_triton])
def test_nothing_beyond_a_sequences_end_is_read(attend: Operation) -> None:
    """NaN, as a sequence of too large numbers leaves it behind, in the rest of its last page."""
    cache = PagedCache([23], 2)
    for kv in (cache.k_cache, cache.v_cache):
        kv[kv.abs() == POISON] = float("nan")
    q = normal(1, 6, HEAD_DIM, seed=9)
    if attend is attend_triton:
        actual = attend(cache, q, [PrefillChunk(0, 1, 1, 23)])
    else:
        actual, one = torch.empty_like(q), torch.tensor([1], dtype=torch.int32)
        table = cache.page_table()
        attend(q, cache.k_cache, cache.v_cache, table, one, 23 * one, 23, actual, SCALE)
    expected = expected_attention(q[0], cache.keys[0], cache.values[0])
    assert_within(actual, expected[None], ATTENTION_BOUND)


# --- lora_shrink, lora_expand -------------------------------------------------------------------

IN_FEATURES = 37
OUT_FEATURES = (29, 13, 19)
RANKS = (1, 3, 8, 64)
#: First rank of each adapter, with unused ranks before, between and after.
FIRST_RANKS = (2, 5, 9, 18)
CAPACITY = 90
NUM_ROWS = 61

parts = pytest.mark.parametrize("n_parts", [1, 2, 3])


class Loras:
    """Adapters of all ranks, each a hundred times as large as the last, amid poison."""

    def __init__(self, n_parts: int) -> None:
        self.n_parts = n_parts
        self.a = torch.full((n_parts * CAPACITY, IN_FEATURES), POISON)
        self.sizes = OUT_FEATURES[:n_parts]
        self.b = torch.full((CAPACITY, sum(self.sizes)), POISON)
        self.factors: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        for number, (rank, first) in enumerate(zip(RANKS, FIRST_RANKS, strict=True)):
            own, column = [], 0
            for part, out in enumerate(self.sizes):
                a = 100.0**number * normal(rank, IN_FEATURES, seed=10 * number + part)
                b = normal(rank, out, seed=10 * number + part + 5)
                row = n_parts * first + part * rank
                self.a[row : row + rank] = a
                self.b[first : first + rank, column : column + out] = b
                own.append((a, b))
                column += out
            self.factors.append(own)

    def segment(self, number: int, first_row: int, end_row: int) -> Segment:
        return Segment(first_row, end_row, FIRST_RANKS[number], RANKS[number])

    def apply_torch(self, y: torch.Tensor, x: torch.Tensor, segments: list[Segment]) -> None:
        h = lora_shrink_torch(x, self.a, segments, self.n_parts)
        lora_expand_torch(y, h, self.b, segments, self.sizes)

    def apply_triton(self, y: torch.Tensor, x: torch.Tensor, segments: list[Segment]) -> None:
        h = lora_shrink_torch(x, self.a, segments, self.n_parts)
        lora_expand_triton(y, h, self.b, tiles_of(segments), self.sizes)

    def expected(
        self, y: torch.Tensor, x: torch.Tensor, segments: list[Segment]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum in float64, and how far float32 may be off it: two chained dot products."""
        out, magnitude = y.double(), y.double().abs()
        for first_row, end_row, _, rank in segments:
            rows, column = x[first_row:end_row].double(), 0
            for a, b in self.factors[RANKS.index(rank)]:
                place = slice(first_row, end_row), slice(column, column + b.shape[1])
                out[place] += rows @ a.double().t() @ b.double()
                magnitude[place] += rows.abs() @ a.double().abs().t() @ b.double().abs()
                column += b.shape[1]
        return out, magnitude * (IN_FEATURES + max(RANKS) + 2) * ROUNDING


def tiles_of(segments: list[Segment]) -> torch.Tensor:
    """With an empty tile behind, as in a CUDA graph for more of them."""
    return torch.tensor([*lora_tiles(segments), LoraTile(0, 0, 0, 0)], dtype=torch.int32)


applies = pytest.mark.parametrize("apply", [Loras.apply_torch, Loras.apply_triton])


def inputs(n_parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(NUM_ROWS, sum(OUT_FEATURES[:n_parts]), seed=1), normal(
        NUM_ROWS, IN_FEATURES, seed=2
    )


def many_segments(loras: Loras) -> list[Segment]:
    """Short segments with gaps between them; every adapter has several."""
    segments, row, number = [], 1, 0
    while row < NUM_ROWS - 4:
        end_row = row + 1 + number % 3
        segments.append(loras.segment(number % len(RANKS), row, end_row))
        row, number = end_row + number % 2, number + 1
    return segments


@applies
@parts
@pytest.mark.parametrize("number", range(len(RANKS)), ids=[f"rank {rank}" for rank in RANKS])
def test_shrink_then_expand_adds_the_product_of_one_adapter(
    apply: Operation, n_parts: int, number: int
) -> None:
    loras, (y, x) = Loras(n_parts), inputs(n_parts)
    segments = [loras.segment(number, 0, NUM_ROWS)]
    expected, bound = loras.expected(y, x, segments)
    apply(loras, y, x, segments)
    assert_within(y, expected, bound)


@applies
@parts
def test_each_of_many_segments_gets_its_own_adapters_product(
    apply: Operation, n_parts: int
) -> None:
    loras, (y, x) = Loras(n_parts), inputs(n_parts)
    segments = many_segments(loras)
    expected, bound = loras.expected(y, x, segments)
    apply(loras, y, x, segments)
    assert_within(y, expected, bound)


@applies
@parts
def test_rows_outside_the_segments_keep_every_bit(apply: Operation, n_parts: int) -> None:
    loras, (y, x) = Loras(n_parts), inputs(n_parts)
    segments, before = many_segments(loras), y.clone()
    apply(loras, y, x, segments)
    outside = torch.ones(NUM_ROWS, dtype=torch.bool)
    for segment in segments:
        outside[segment.first_row : segment.end_row] = False
    assert outside.any()
    assert y[outside].equal(before[outside])


@parts
def test_shrink_lays_its_columns_as_the_rows_of_a(n_parts: int) -> None:
    loras, (_, x) = Loras(n_parts), inputs(n_parts)
    segments = [loras.segment(1, 2, 9), loras.segment(2, 9, 30)]
    h = lora_shrink_torch(x, loras.a, segments, n_parts)
    a = torch.cat([a for a, _ in loras.factors[1]]).double()
    rows, first = x[2:9].double(), n_parts * FIRST_RANKS[1]
    bound = rows.abs() @ a.abs().t() * IN_FEATURES * ROUNDING
    assert_within(h[2:9, first : first + n_parts * RANKS[1]], rows @ a.t(), bound)


@pytest.mark.parametrize("spread", [lora_spread, lora_spread_triton])
def test_spread_gives_each_factor_its_ranks_and_no_other_any(spread: Operation) -> None:
    factors = [torch.full((4, size), -1.0) for size in (3, 2, 1, 5)]
    table = spread_table(factors, factors[0].device)
    # The last two, from rank 1 on: first [[0], [1]], and then [[2 to 6], [7 to 11]].
    spread(torch.arange(12.0), factors[2:], table[2:], 1, 2)
    assert factors[2].flatten().tolist() == [-1, 0, 1, -1]
    assert factors[3][1:3].flatten().tolist() == list(range(2, 12))
    untouched = [*factors[:2], factors[3][0], factors[3][3]]
    assert all((part == -1).all() for part in untouched)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sizes", [(19, 19), (38,)], ids=str)
@activations
def test_act_and_mul_with_lora_is_expand_and_then_act_and_mul(
    backend: str, sizes: tuple[int, ...], activation: str
) -> None:
    loras = Loras(2)
    segments = many_segments(loras)
    loras.sizes, loras.b = sizes, normal(CAPACITY, 38, seed=3)
    gate_up = normal(NUM_ROWS, 40, seed=1)[:, :38]
    h = 1e-3 * normal(NUM_ROWS, 2 * CAPACITY, seed=4)
    every_row = [
        Segment(row, row + 1, 0, 0)
        for row in range(NUM_ROWS)
        if not any(first <= row < end for first, end, _, _ in segments)
    ]
    tiles = tiles_of([*segments, *every_row]) if backend == "triton" else None
    rows = LoraRows(segments, tiles, CAPACITY)
    actual = act_and_mul_with_lora(gate_up.clone(), h, loras.b, rows, sizes, activation)
    lora_expand_torch(gate_up, h, loras.b, segments, loras.sizes)
    expected = act_and_mul_torch(gate_up.double(), activation)
    assert_within(actual, expected, torch.full_like(expected, 200 * ROUNDING))


@pytest.mark.parametrize("tiles", [None, torch.empty(0, 4)], ids=["segments", "tiles"])
def test_lora_embed_is_the_product_of_one_hot_rows(tiles: torch.Tensor | None) -> None:
    a, token_ids = normal(12, 31), torch.tensor([30, 0, 7, 7, 3], dtype=torch.int32)
    one_hot = torch.nn.functional.one_hot(token_ids.long(), 31).float()
    segments = [Segment(0, 2, 8, 3), Segment(3, 5, 0, 5)]
    h = lora_embed(token_ids, a, LoraRows(segments, tiles, 11))
    assert h.is_contiguous()  # As lora_expand reads it.
    for first_row, end_row, first_rank, rank in segments:
        rows, ranks = slice(first_row, end_row), slice(first_rank, first_rank + rank)
        assert h[rows, ranks].equal(one_hot[rows] @ a[ranks].t())


def test_gains_leave_a_bias_as_long_as_it_is() -> None:
    y, gains, bias = normal(9, 11), normal(2, 11, seed=1), 10 * normal(11, seed=2)
    biased = y + bias
    LoraRows([], None, 0, gains=[GainRows(2, 5, gains)]).scale(biased, 1, bias)
    expected = y.double() + bias.double()
    expected[2:5] = y[2:5].double() * gains[1] + bias.double()
    assert_within(biased, expected, torch.tensor(4 * 50 * ROUNDING))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gains_multiply_their_rows_in_float32_and_no_others(dtype: torch.dtype) -> None:
    wide = normal(9, 20).to(dtype)
    before, y = wide.clone(), wide[:, 3:14]
    gains = {rows: normal(2, 11, seed=rows[0]) for rows in ((1, 3), (5, 9))}
    given = [GainRows(*rows, tensor) for rows, tensor in gains.items()]
    LoraRows([], None, 0, gains=given).scale(y, layer=1)
    expected = before.clone()
    for (first, end), tensor in gains.items():
        expected[first:end, 3:14] = (before[first:end, 3:14].float() * tensor[1]).to(dtype)
    assert wide.equal(expected)


# --- sample -------------------------------------------------------------------------------------

VOCABULARY = 37
#: Evenly spaced draws: a token of probability p gets p * NUM_DRAWS of them, give or take one.
NUM_DRAWS = 20_011
SMALLEST_DRAW, LARGEST_DRAW = 0.0, 1 - 2.0**-53


def sample_row(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    sample: Operation = sample_torch,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> torch.Tensor:
    """Tokens that one row of logits gives for many draws."""
    draws = [Draw(i, temperature, top_k, top_p, u) for i, u in enumerate(uniform.tolist())]
    return sample_rows(logits.expand(len(draws), -1), draws, sample)


def sample_rows(
    logits: torch.Tensor, draws: list[Draw], sample: Operation = sample_torch
) -> torch.Tensor:
    tokens = logits.argmax(dim=-1).int()
    sample(tokens, logits, torch.tensor(draws, dtype=torch.float64))
    return tokens


def even_draws() -> torch.Tensor:
    return (torch.arange(NUM_DRAWS, dtype=torch.float64) + 0.5) / NUM_DRAWS


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [
        *[(0, 1.0), (1, 1.0), (5, 1.0), (VOCABULARY + 9, 1.0)],
        *[(0, 0.01), (0, 0.6), (0, 0.97)],
        *[(7, 0.8), (3, 0.999), (VOCABULARY + 9, 0.9)],
    ],
)
def test_even_draws_fall_on_tokens_as_transformers_masks_say(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = 2 * normal(1, VOCABULARY)
    scores = logits / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(torch.empty(1, 0), scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(torch.empty(1, 0), scores)
    probabilities = scores[0].double().softmax(-1)
    tokens = sample_row(logits, even_draws(), temperature=temperature, top_k=top_k, top_p=top_p)
    counts = tokens.bincount(minlength=VOCABULARY)
    # One for the grid; the rounding of float32 moves a border by far less than a draw's distance.
    assert (counts - NUM_DRAWS * probabilities).abs().max() <= 1.01


def test_draws_go_through_the_tokens_in_the_order_of_their_ids() -> None:
    tokens = sample_row(normal(1, VOCABULARY), even_draws())
    assert (tokens.diff() >= 0).all()


def test_ties_of_the_kth_logit_are_all_kept_by_top_k() -> None:
    tokens = sample_row(torch.tensor([[2.0, 5.0, 5.0, 1.0, 5.0]]), even_draws(), top_k=2)
    assert set(tokens.tolist()) == {1, 2, 4}


def test_ties_of_the_last_logit_in_the_nucleus_are_all_kept_by_top_p() -> None:
    tokens = sample_row(torch.tensor([[2.0, 5.0, 5.0, 1.0, 5.0]]), even_draws(), top_p=0.4)
    assert set(tokens.tolist()) == {1, 2, 4}


def test_the_most_probable_token_is_kept_however_small_top_p_is() -> None:
    tokens = sample_row(normal(1, VOCABULARY), even_draws(), top_p=1e-30)
    assert set(tokens.tolist()) == {int(normal(1, VOCABULARY).argmax())}


samples = pytest.mark.parametrize("sample", [sample_torch, sample_triton])
outermost_draws = pytest.mark.parametrize("draw", [SMALLEST_DRAW, LARGEST_DRAW])


@samples
@outermost_draws
@pytest.mark.parametrize("cut", [{"top_k": 2}, {"top_p": 0.9}], ids=["top_k", "top_p"])
def test_the_outermost_draws_fall_on_kept_tokens(
    sample: Operation, draw: float, cut: dict[str, Any]
) -> None:
    logits = torch.tensor([[0.0, 7.0, 0.0, 7.5, 0.0]])
    token = sample_row(logits, torch.tensor([draw], dtype=torch.float64), sample, **cut)
    assert token.item() == (1 if draw == SMALLEST_DRAW else 3)


@samples
@outermost_draws
def test_the_outermost_draws_fall_on_kept_tokens_of_a_large_vocabulary(
    sample: Operation, draw: float
) -> None:
    """Where the sum of the probabilities misses 1 by many roundings."""
    logits = 3 * normal(1, 49_157)
    kept = logits[0].topk(1001).indices
    token = sample_row(logits, torch.tensor([draw], dtype=torch.float64), sample, top_k=1001)
    assert token.item() == (kept.min() if draw == SMALLEST_DRAW else kept.max())


@samples
def test_a_rows_token_does_not_depend_on_the_other_rows(sample: Operation) -> None:
    rows = 60 if sample is sample_torch else 9
    logits = 2 * normal(rows, VOCABULARY)
    temperatures = torch.linspace(0.3, 3, rows).tolist()
    uniform = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draws = [
        Draw(row, temperatures[row], row % 9, (1.0, 0.9, 0.5)[row % 3], uniform[row].item())
        for row in range(rows)
    ]
    alone = [
        sample_rows(logits[row : row + 1], [draw._replace(row=0)], sample)
        for row, draw in enumerate(draws)
    ]
    assert sample_rows(logits, draws, sample).equal(torch.cat(alone))


@samples
def test_a_neighbour_with_top_k_takes_no_improbable_token_from_a_row_that_keeps_all(
    sample: Operation,
) -> None:
    # e^-40 is lost beside 1 in float64, so the sum of the larger ones alone is 1 already.
    logits = torch.tensor([[-40.0, 0.0], [0.0, 0.0]])
    draws = [Draw(0, 1.0, 0, 1.0, 0.0), Draw(1, 1.0, 1, 1.0, 0.0)]
    assert sample_rows(logits, draws, sample)[0] == 0


@samples
def test_rows_without_a_draw_or_without_a_token_keep_what_they_have(sample: Operation) -> None:
    logits = torch.tensor([[0.0, 9.0]]).repeat(4, 1)
    logits[1] = float("nan")
    tokens = torch.tensor([1, -1, 1, 1], dtype=torch.int32)
    # The smallest draw falls on token 0.
    draws = [Draw(row, 1.0, 0, 1.0, 0.0) for row in (2, 1)]
    sample(tokens, logits, torch.tensor(draws, dtype=torch.float64))
    assert tokens.tolist() == [1, -1, 0, 1]
