"""Each operation of ``kernels`` against its formula, written once more in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from kernels.linear import Linear
from kernels.lora_expand import lora_expand
from kernels.lora_shrink import Segment, lora_shrink
from kernels.paged_attention import length_mask, paged_attention_decode, paged_attention_prefill
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary_kv_write import rotary_kv_write
from kernels.sample import sample
from kernels.silu_and_mul import silu_and_mul

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


# --- rms_norm, add_rms_norm ---------------------------------------------------------------------

ROWS, FEATURES = 7, 577
#: Large beside the mean square of the rows below, so that its place in the formula shows.
EPS = 0.03


def expected_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.pow(2).sum(-1, keepdim=True) / FEATURES + EPS).sqrt() * weight.double()


def test_rms_norm_is_its_formula() -> None:
    x, weight = 0.2 * normal(ROWS, FEATURES), normal(FEATURES, seed=1)
    expected = expected_rms_norm(x, weight)
    # Half the error of the mean, which adds FEATURES roundings at worst, and a few products.
    assert_within(
        rms_norm(x, weight, EPS), expected, expected.abs() * (FEATURES / 2 + 4) * ROUNDING
    )


def test_rms_norm_leaves_its_input_alone() -> None:
    x = normal(ROWS, FEATURES)
    before = x.clone()
    rms_norm(x, torch.full((FEATURES,), 3.0), EPS)
    assert x.equal(before)


def test_rms_norm_of_bfloat16_adds_no_more_than_two_roundings() -> None:
    x, weight = normal(ROWS, FEATURES).bfloat16(), normal(FEATURES, seed=1).bfloat16()
    expected = expected_rms_norm(x, weight)
    assert_within(rms_norm(x, weight, EPS), expected, expected.abs() * 2 * BF16_ROUNDING)


def test_rms_norm_of_float16_squares_in_float32() -> None:
    x = (1000 * normal(ROWS, FEATURES)).half()  # Its squares are beyond float16's 65504.
    expected = expected_rms_norm(x, torch.ones(FEATURES))
    assert_within(rms_norm(x, torch.ones(FEATURES).half(), EPS), expected, expected.abs() * 2e-3)


def test_add_rms_norm_adds_to_the_residual_in_place() -> None:
    x, residual = normal(ROWS, FEATURES), normal(ROWS, FEATURES, seed=1)
    expected = residual + x
    add_rms_norm(x, residual, normal(FEATURES, seed=2), EPS)
    assert residual.equal(expected)


def test_add_rms_norm_normalizes_the_sum() -> None:
    x, residual, weight = (normal(ROWS, FEATURES, seed=s) for s in range(3))
    expected = expected_rms_norm(x + residual, weight[0])
    actual = add_rms_norm(x, residual, weight[0], EPS)
    assert_within(actual, expected, expected.abs() * (FEATURES / 2 + 4) * ROUNDING)


# --- silu_and_mul -------------------------------------------------------------------------------


def test_silu_and_mul_is_its_formula() -> None:
    gate_up = 4 * normal(5, 2 * 101)
    gate, up = gate_up[:, :101].double(), gate_up[:, 101:].double()
    expected = gate / (1 + torch.exp(-gate)) * up
    assert_within(silu_and_mul(gate_up), expected, expected.abs() * 16 * ROUNDING)


def test_silu_and_mul_stays_finite_for_large_gates() -> None:
    gate_up = torch.tensor([[-1e4, -200.0, 200.0, 1e4, 2.0, 2.0, 2.0, 2.0]])
    assert silu_and_mul(gate_up).tolist() == [[0.0, 0.0, 400.0, 2e4]]


def test_silu_and_mul_leaves_its_input_alone() -> None:
    gate_up = normal(5, 22)
    before = gate_up.clone()
    silu_and_mul(gate_up)
    assert gate_up.equal(before)


# --- Linear -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [0, 1, 2, 49])
def test_linear_is_its_formula(num_rows: int) -> None:
    x, weight = normal(num_rows, FEATURES), normal(67, FEATURES, seed=1)
    expected = x.double() @ weight.double().t()
    bound = x.double().abs() @ weight.double().abs().t() * FEATURES * ROUNDING
    actual = Linear(weight)(x)
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

    q_heads: int
    kv_heads: int
    head_dim: int = 14

    def __post_init__(self) -> None:
        heads = self.q_heads + 2 * self.kv_heads
        qkv = normal(5, heads * self.head_dim)
        angles = 100 * normal(5, self.head_dim // 2, seed=1)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.rows = torch.tensor([113, 0, 41, 7, 42])
        shape = (NUM_PAGES, self.kv_heads, PAGE_SIZE, self.head_dim)
        self.k_cache, self.v_cache = torch.full(shape, POISON), torch.full(shape, -POISON)
        by_head = qkv.view(5, heads, self.head_dim)
        self.q = by_head[:, : self.q_heads]
        self.k = by_head[:, self.q_heads : -self.kv_heads]
        self.v = by_head[:, -self.kv_heads :]
        self.returned = rotary_kv_write(
            qkv, self.cos, self.sin, self.k_cache, self.v_cache, self.rows
        )

    def turned(self, heads: torch.Tensor) -> torch.Tensor:
        """The halves of a head as real and imaginary part, turned by the row's angles."""
        half = self.head_dim // 2
        numbers = torch.complex(heads[..., :half].double(), heads[..., half:].double())
        turn = torch.complex(self.cos.double(), self.sin.double())[:, None]
        return torch.cat([(numbers * turn).real, (numbers * turn).imag], dim=-1)

    def written(self, cache: torch.Tensor) -> torch.Tensor:
        return by_row(cache)[self.rows]


#: Two products and a sum: three roundings of terms below 2 * 5 (five standard deviations).
ROTARY_BOUND = torch.tensor(3 * 10 * ROUNDING)

heads_of_rotary = pytest.mark.parametrize(("q_heads", "kv_heads"), [(6, 2), (3, 3), (5, 1)])


@heads_of_rotary
def test_rotary_kv_write_returns_the_queries_turned(q_heads: int, kv_heads: int) -> None:
    rotary = Rotary(q_heads, kv_heads)
    assert_within(rotary.returned, rotary.turned(rotary.q), ROTARY_BOUND)


@heads_of_rotary
def test_rotary_kv_write_stores_the_keys_turned(q_heads: int, kv_heads: int) -> None:
    rotary = Rotary(q_heads, kv_heads)
    assert_within(rotary.written(rotary.k_cache), rotary.turned(rotary.k), ROTARY_BOUND)


@heads_of_rotary
def test_rotary_kv_write_stores_the_values_as_they_are(q_heads: int, kv_heads: int) -> None:
    rotary = Rotary(q_heads, kv_heads)
    assert rotary.written(rotary.v_cache).equal(rotary.v)


def test_rotary_kv_write_leaves_the_other_cache_rows_alone() -> None:
    rotary = Rotary(6, 2)
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
        widest = max(len(pages) for pages in self.pages)
        return torch.tensor([p + [self.unused] * (widest - len(p)) for p in self.pages])


def expected_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One query [q_heads, head_dim] over keys and values [length, kv_heads, head_dim]."""
    ratio = len(q) // keys.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    for head, query in enumerate(q.double()):
        weights = (SCALE * keys[:, head // ratio].double() @ query).exp()
        out[head] = weights @ values[:, head // ratio].double() / weights.sum()
    return out


@attention_heads
def test_decode_attention_is_its_formula_over_each_whole_sequence(
    q_heads: int, kv_heads: int
) -> None:
    lengths = [1, 5, 23, 7, 11]
    cache = PagedCache(lengths, kv_heads)
    q = normal(len(lengths), q_heads, HEAD_DIM, seed=9)
    table, numbers = cache.page_table(), torch.tensor(lengths)
    mask = length_mask(numbers, table.shape[1] * PAGE_SIZE, torch.float32)
    actual = paged_attention_decode(q, cache.k_cache, cache.v_cache, table, numbers, mask, SCALE)
    cached = zip(q, cache.keys, cache.values, strict=True)
    assert_within(actual, torch.stack([expected_attention(*c) for c in cached]), ATTENTION_BOUND)


@attention_heads
@pytest.mark.parametrize(("length", "num_rows"), [(1, 1), (5, 5), (23, 23), (23, 8), (11, 1)])
def test_prefill_attention_is_its_formula_over_the_keys_up_to_each_query(
    q_heads: int, kv_heads: int, length: int, num_rows: int
) -> None:
    cache = PagedCache([length], kv_heads)
    q = normal(num_rows, q_heads, HEAD_DIM, seed=9)
    pages = torch.tensor(cache.pages[0])
    actual = paged_attention_prefill(q, cache.k_cache, cache.v_cache, pages, length, SCALE)
    ends = range(length - num_rows + 1, length + 1)
    expected = [
        expected_attention(query, cache.keys[0][:end], cache.values[0][:end])
        for query, end in zip(q, ends, strict=True)
    ]
    assert_within(actual, torch.stack(expected), ATTENTION_BOUND)


@pytest.mark.parametrize("num_cached", [1, 5, 12, 22])
def test_prefill_after_a_cached_prefix_gives_what_the_whole_prefill_gives(num_cached: int) -> None:
    cache = PagedCache([23], 2)
    q, pages = normal(23, 6, HEAD_DIM, seed=9), torch.tensor(cache.pages[0])
    whole = paged_attention_prefill(q, cache.k_cache, cache.v_cache, pages, 23, SCALE)
    rest = paged_attention_prefill(q[num_cached:], cache.k_cache, cache.v_cache, pages, 23, SCALE)
    assert_within(rest, whole[num_cached:].double(), 2 * ATTENTION_BOUND)


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
        self.b = [torch.full((CAPACITY, out), POISON) for out in OUT_FEATURES[:n_parts]]
        self.factors: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        for number, (rank, first) in enumerate(zip(RANKS, FIRST_RANKS, strict=True)):
            own = []
            for part, out in enumerate(OUT_FEATURES[:n_parts]):
                a = 100.0**number * normal(rank, IN_FEATURES, seed=10 * number + part)
                b = normal(rank, out, seed=10 * number + part + 5)
                row = n_parts * first + part * rank
                self.a[row : row + rank] = a
                self.b[part][first : first + rank] = b
                own.append((a, b))
            self.factors.append(own)

    def segment(self, number: int, first_row: int, end_row: int) -> Segment:
        return Segment(first_row, end_row, FIRST_RANKS[number], RANKS[number])

    def apply(self, y: torch.Tensor, x: torch.Tensor, segments: list[Segment]) -> None:
        lora_expand(y, lora_shrink(x, self.a, segments, self.n_parts), self.b, segments)

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


@parts
@pytest.mark.parametrize("number", range(len(RANKS)), ids=[f"rank {rank}" for rank in RANKS])
def test_shrink_then_expand_adds_the_product_of_one_adapter(n_parts: int, number: int) -> None:
    loras, (y, x) = Loras(n_parts), inputs(n_parts)
    segments = [loras.segment(number, 0, NUM_ROWS)]
    expected, bound = loras.expected(y, x, segments)
    loras.apply(y, x, segments)
    assert_within(y, expected, bound)


@parts
def test_each_of_many_segments_gets_its_own_adapters_product(n_parts: int) -> None:
    loras, (y, x) = Loras(n_parts), inputs(n_parts)
    segments = many_segments(loras)
    expected, bound = loras.expected(y, x, segments)
    loras.apply(y, x, segments)
    assert_within(y, expected, bound)


@parts
def test_rows_outside_the_segments_keep_every_bit(n_parts: int) -> None:
    loras, (y, x) = Loras(n_parts), inputs(n_parts)
    segments, before = many_segments(loras), y.clone()
    loras.apply(y, x, segments)
    outside = torch.ones(NUM_ROWS, dtype=torch.bool)
    for segment in segments:
        outside[segment.first_row : segment.end_row] = False
    assert outside.any()
    assert y[outside].equal(before[outside])


@parts
def test_shrink_lays_the_parts_side_by_side_at_the_adapters_own_rank(n_parts: int) -> None:
    loras, (_, x) = Loras(n_parts), inputs(n_parts)
    segments = [loras.segment(1, 2, 9), loras.segment(2, 9, 30)]
    h = lora_shrink(x, loras.a, segments, n_parts)
    a = torch.cat([a for a, _ in loras.factors[1]]).double()
    rows = x[2:9].double()
    bound = rows.abs() @ a.abs().t() * IN_FEATURES * ROUNDING
    assert_within(h[2:9, : n_parts * RANKS[1]], rows @ a.t(), bound)


# --- sample -------------------------------------------------------------------------------------

VOCABULARY = 37
#: Evenly spaced draws: a token of probability p gets p * NUM_DRAWS of them, give or take one.
NUM_DRAWS = 20_011
SMALLEST_DRAW, LARGEST_DRAW = 0.0, 1 - 2.0**-53


def sample_row(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> torch.Tensor:
    """Tokens that one row of logits gives for many draws."""
    count = len(uniform)
    return sample(
        logits.expand(count, -1),
        torch.full((count,), temperature),
        torch.full((count,), top_k),
        torch.full((count,), top_p),
        uniform.double(),
    )


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


@pytest.mark.parametrize("draw", [SMALLEST_DRAW, LARGEST_DRAW])
@pytest.mark.parametrize("cut", [{"top_k": 2}, {"top_p": 0.9}], ids=["top_k", "top_p"])
def test_the_outermost_draws_fall_on_kept_tokens(draw: float, cut: dict[str, float]) -> None:
    logits = torch.tensor([[0.0, 7.0, 0.0, 7.5, 0.0]])
    token = sample_row(logits, torch.tensor([draw], dtype=torch.float64), **cut)  # type: ignore[arg-type]
    assert token.item() == (1 if draw == SMALLEST_DRAW else 3)


@pytest.mark.parametrize("draw", [SMALLEST_DRAW, LARGEST_DRAW])
def test_the_outermost_draws_fall_on_kept_tokens_of_a_large_vocabulary(draw: float) -> None:
    """Where the sum of the probabilities misses 1 by many roundings."""
    logits = 3 * normal(1, 49_157)
    kept = logits[0].topk(1001).indices
    token = sample_row(logits, torch.tensor([draw], dtype=torch.float64), top_k=1001)
    assert token.item() == (kept.min() if draw == SMALLEST_DRAW else kept.max())


def test_a_rows_token_does_not_depend_on_the_other_rows() -> None:
    rows = 60
    logits = 2 * normal(rows, VOCABULARY)
    temperature = torch.linspace(0.3, 3, rows)
    top_k = torch.arange(rows) % 9
    top_p = torch.tensor([1.0, 0.9, 0.5])[torch.arange(rows) % 3]
    uniform = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    arguments = (logits, temperature, top_k, top_p, uniform)
    alone = [sample(*(argument[row : row + 1] for argument in arguments)) for row in range(rows)]
    assert sample(*arguments).equal(torch.cat(alone))


def test_a_neighbour_with_top_k_takes_no_improbable_token_from_a_row_that_keeps_all() -> None:
    # e^-40 is lost beside 1 in float64, so the sum of the larger ones alone is 1 already.
    logits = torch.tensor([[-40.0, 0.0], [0.0, 0.0]])
    uniform = torch.zeros(2, dtype=torch.float64)
    tokens = sample(logits, torch.ones(2), torch.tensor([0, 1]), torch.ones(2), uniform)
    assert tokens[0] == sample_row(logits[:1], uniform[:1])[0]
