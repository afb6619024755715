"""The Triton kernels against their torch twins in float64, at sizes as models have them.

On a GPU in every dtype that is served there (`make test-gpu`); elsewhere interpreted, in float32.
What each operation means is the business of `test_kernels.py`.
"""

from __future__ import annotations

from itertools import product
from math import log

import pytest
import torch

from kernels.act_and_mul import (
    Activation,
    act_and_mul_torch,
    act_and_mul_triton,
    act_and_mul_with_lora_triton,
)
from kernels.largest_token import NO_TOKEN, largest_token_torch, largest_token_triton
from kernels.lora_expand import lora_expand_torch, lora_expand_triton
from kernels.lora_segments import LoraTile, Segment, lora_tiles
from kernels.lora_shrink import SHRINK_TILE_ROWS, lora_shrink_torch, lora_shrink_triton
from kernels.lora_spread import lora_spread_torch, lora_spread_triton, spread_table
from kernels.paged_attention_decode import (
    paged_attention_decode_torch,
    paged_attention_decode_triton,
)
from kernels.paged_attention_prefill import (
    PrefillChunk,
    PrefillTile,
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
from kernels.rotary_kv_write import (
    HeadNorms,
    rotary_kv_write_torch,
    rotary_kv_write_triton,
    rotary_kv_write_with_lora_triton,
)
from kernels.sample import Draw, sample_torch, sample_triton

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

#: Of queries and of keys, in a model of 8B. The interpreter takes a head after the other, so it
#: gets fewer, of which each of keys still serves four of queries.
HEADS = (32, 8) if ON_GPU else (8, 2)
POISON = float("nan")

#: ||out - reference|| / ||reference||: a few roundings of inputs that are exact in both, to the
#: dtype's 24, 11 or 8 bits. A wrong row, page or adapter is off by about 1.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

#: Of numpy, under Triton: ``z / (1 + exp(-z))`` is 0 where the power is infinite.
overflow_is_fine = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
activations = pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
every_dtype = pytest.mark.parametrize("dtype", list(BOUNDS) if ON_GPU else [torch.float32], ids=str)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """On the device, the same numbers everywhere."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(dtype).to(DEVICE)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, POISON, dtype=dtype, device=DEVICE)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (wide(actual) - expected).norm() / expected.norm()
    assert error <= BOUNDS[actual.dtype], f"relative error {error:.2g}"


@every_dtype
@pytest.mark.parametrize(("rows", "features"), [(1, 576), (37, 4096), (5, 100)])
def test_add_rms_norm(dtype: torch.dtype, rows: int, features: int) -> None:
    x = normal(rows, features + 24, dtype=dtype)[:, :features]
    residual, weight = normal(rows, features, dtype=dtype, seed=1), normal(features, dtype=dtype)
    # The sum is rounded as it is stored, and the norm is that of the stored one.
    stored = wide(residual + x)
    expected = add_rms_norm_torch(torch.zeros_like(stored), stored.clone(), wide(weight), 1e-5)
    assert_close(add_rms_norm_triton(x, residual, weight, 1e-5), expected)
    assert wide(residual).equal(stored)


@every_dtype
@pytest.mark.parametrize("is_wide", [False, True], ids=["weight", "float32-weight"])
def test_add_rms_norm_of_a_multiple(dtype: torch.dtype, is_wide: bool) -> None:
    x, residual = normal(37, 1030, dtype=dtype), normal(37, 1030, dtype=dtype, seed=1)
    weight = normal(1030, dtype=torch.float32 if is_wide else dtype, seed=2)
    expected = wide(residual) + 0.22 * wide(x)
    actual = add_rms_norm_triton(x, residual, weight, 1e-5, 0.22)
    assert_close(residual, expected)
    zeros = torch.zeros_like(expected)
    assert_close(actual, add_rms_norm_torch(zeros, wide(residual), wide(weight), 1e-5))


@every_dtype
@pytest.mark.parametrize(("rows", "features"), [(1, 576), (37, 4096), (5, 100)])
def test_rms_norm(dtype: torch.dtype, rows: int, features: int) -> None:
    x = normal(rows, features + 24, dtype=dtype)[:, :features]
    weight = normal(features, dtype=dtype, seed=1)
    expected = rms_norm_torch(wide(x), wide(weight), 1e-5)
    assert_close(rms_norm_triton(x, weight, 1e-5), expected)


@every_dtype
@pytest.mark.parametrize("vocabulary", [211, 20_003])
def test_largest_token(dtype: torch.dtype, vocabulary: int) -> None:
    logits = normal(9, vocabulary + 24, dtype=dtype)[:, :-24]
    logits[1] = 0.0
    logits[1, 5::7] = 3.0  # The first of equal ones.
    logits[2, -1] = float("nan")
    logits[3, 0] = float("inf")
    logits[4] = float("-inf")
    logits[5] = float("-inf")
    logits[5, -1] = -1e4
    logits[6, 3] = float("-inf")
    tokens = largest_token_triton(logits)
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == largest_token_torch(logits).tolist()
    assert tokens[1:6].tolist() == [5, NO_TOKEN, NO_TOKEN, NO_TOKEN, vocabulary - 1]


@every_dtype
@pytest.mark.parametrize(("rows", "features"), [(1, 1536), (37, 14336 if ON_GPU else 1500)])
@activations
@overflow_is_fine
def test_act_and_mul(dtype: torch.dtype, rows: int, features: int, activation: Activation) -> None:
    gate_up = normal(rows, 2 * features + 40, dtype=dtype, scale=3)[:, : 2 * features]
    expected = act_and_mul_torch(wide(gate_up), activation)
    assert_close(act_and_mul_triton(gate_up, activation), expected)


#: How heads are rotated: whole, partly with norms before, not at all, and wide ones with norms.
rotaries = pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "rotated", "has_norms"),
    [
        *[(*HEADS, 128, 128, False), (9, 3, 64, 64, False)],
        *[(6, 2, 96, 72, True), (4, 1, 128, 0, False), (4, 2, 256, 256, True)],
    ],
)


def head_norms(head_dim: int, dtype: torch.dtype) -> HeadNorms:
    return HeadNorms(*(normal(head_dim, dtype=dtype, seed=s) for s in (6, 7)), 1e-2)


def wide_norms(norms: HeadNorms | None) -> HeadNorms | None:
    return norms and HeadNorms(wide(norms.q), wide(norms.k), norms.eps)


@every_dtype
@rotaries
def test_rotary_kv_write(
    dtype: torch.dtype,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    rotated: int,
    has_norms: bool,
) -> None:
    rows, pages = 37, 11
    norms = head_norms(head_dim, dtype) if has_norms else None
    qkv = normal(rows, (q_heads + 2 * kv_heads) * head_dim + 16, dtype=dtype)[:, :-16]
    angles = 100 * normal(rows, rotated // 2, dtype=torch.float32, seed=1)
    cos, sin = angles.cos(), angles.sin()
    places = torch.randperm(pages * 16, generator=torch.Generator().manual_seed(2))[:rows]
    caches = [poisoned(pages, kv_heads, 16, head_dim, dtype=dtype) for _ in range(2)]
    oracles = [wide(cache) for cache in caches]
    on_device = places.to(DEVICE, torch.int32)
    q = rotary_kv_write_triton(qkv, cos, sin, *caches, on_device, norms)
    expected = rotary_kv_write_torch(
        wide(qkv), wide(cos), wide(sin), *oracles, places, wide_norms(norms)
    )
    assert_close(q, expected)
    for cache, oracle in zip(caches, oracles, strict=True):
        written = ~oracle.isnan()
        assert written.equal(~wide(cache).isnan())
        assert_close(cache[written.to(DEVICE)], oracle[written])


class Cache:
    """Keys and values of sequences on shuffled pages; NaN wherever nobody may look."""

    def __init__(
        self, lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        counts = [-(-length // 16) for length in lengths]
        shuffled = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(3))
        shape = (sum(counts) + 1, kv_heads, 16, head_dim)
        self.keys = normal(*shape, dtype=dtype, seed=4)
        self.values = normal(*shape, dtype=dtype, seed=5)
        table = torch.full((len(lengths), max(counts) + 2), int(shuffled[-1]), dtype=torch.int32)
        used = 0
        for line, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            table[line, :count] = shuffled[used : used + count]
            used += count
            if length % 16:
                self.keys[table[line, count - 1], :, length % 16 :] = POISON
                self.values[table[line, count - 1], :, length % 16 :] = POISON
        self.keys[shuffled[-1]] = self.values[shuffled[-1]] = POISON
        self.table = table.to(DEVICE)

    def oracle(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For the twins, which count a masked NaN as 0 times itself."""
        return wide(self.keys).nan_to_num(), wide(self.values).nan_to_num(), self.table.cpu()


#: Heads, and windows and soft caps: none, one of them, both.
attentions = pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "window", "soft_cap"),
    [(*HEADS, 128, 0, 0.0), (9, 3, 64, 0, 0.0), (6, 2, 96, 67, 0.0), (4, 2, 256, 129, 1.5)],
)


@every_dtype
@attentions
@pytest.mark.parametrize("lengths", [[1, 16, 17, 333], [900]], ids=str)
def test_paged_attention_decode(
    dtype: torch.dtype,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    soft_cap: float,
    lengths: list[int],
) -> None:
    cache, scale = Cache(lengths, kv_heads, head_dim, dtype), head_dim**-0.5
    # Two rows more, that are none of a sequence.
    lines = torch.tensor([0, *range(len(lengths)), 0], dtype=torch.int32)
    numbers = torch.tensor([0, *lengths, 0], dtype=torch.int32)
    q = normal(len(lines), q_heads, head_dim, dtype=dtype)
    out = poisoned(*q.shape, dtype=dtype)
    paged_attention_decode_triton(
        *(q, cache.keys, cache.values, cache.table),
        *(lines.to(DEVICE), numbers.to(DEVICE), max(lengths), out, scale, window, soft_cap),
    )
    expected = wide(out)
    paged_attention_decode_torch(
        *(wide(q), *cache.oracle(), lines, numbers, max(lengths), expected),
        *(scale, window, soft_cap),
    )
    assert_close(out[1:-1], expected[1:-1])
    for unwritten in (out[0], out[-1], expected[0], expected[-1]):
        assert unwritten.isnan().all()


@every_dtype
@attentions
def test_paged_attention_prefill(
    dtype: torch.dtype,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    soft_cap: float,
) -> None:
    lengths, rows = [200, 1, 64, 130], [200, 1, 3, 65]
    cache, scale = Cache(lengths, kv_heads, head_dim, dtype), head_dim**-0.5
    chunks, first = [], 0
    for line, (length, count) in enumerate(zip(lengths, rows, strict=True)):
        chunks.append(PrefillChunk(first, first + count, line, length))
        first += count
    q = normal(first, q_heads, head_dim, dtype=dtype)
    out = poisoned(*q.shape, dtype=dtype)
    nothing = PrefillTile(0, 0, 0, 0)
    tiles = torch.tensor([*prefill_tiles(chunks), nothing], dtype=torch.int32, device=DEVICE)
    settings = scale, window, soft_cap
    paged_attention_prefill_triton(q, cache.keys, cache.values, cache.table, tiles, out, *settings)
    expected = wide(out)
    paged_attention_prefill_torch(wide(q), *cache.oracle(), chunks, expected, *settings)
    assert_close(out, expected)


class Adapters:
    """Many adapters of ranks 1 to 256 in scattered places, and rows of all of them and of none."""

    def __init__(self, count: int, part_sizes: tuple[int, ...], dtype: torch.dtype) -> None:
        ranks = [(1, 256, 3, 64, 17, 8, 130, 32)[i % 8] for i in range(count)]
        self.segments, self.rows, capacity = [], 0, 5
        for number, rank in enumerate(ranks):
            length = (33, 1, 0, 64, 7)[number % 5]
            self.segments.append(Segment(self.rows, self.rows + length, capacity, rank))
            self.rows += length
            capacity += rank + number % 2
            if number % 3 == 0:
                self.segments.append(Segment(self.rows, self.rows + 3, 0, 0))
                self.rows += 3
        self.h = normal(self.rows, len(part_sizes) * capacity + 9, dtype=dtype, scale=0.3)[:, :-9]
        self.b = normal(capacity, sum(part_sizes), dtype=dtype, seed=1, scale=0.3)
        self.y = normal(self.rows, sum(part_sizes) + 9, dtype=dtype, seed=2)[:, :-9]
        tiles = [*lora_tiles(self.segments), LoraTile(0, 0, 0, 0)]
        self.tiles = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
        self.expected = wide(self.y)
        lora_expand_torch(self.expected, wide(self.h), wide(self.b), self.segments, part_sizes)


@every_dtype
@pytest.mark.parametrize("count", [1, 9, 32 if ON_GPU else 12])
@pytest.mark.parametrize("part_sizes", [(576, 192, 192), (100,), (1030, 1030)], ids=str)
def test_lora_expand(dtype: torch.dtype, count: int, part_sizes: tuple[int, ...]) -> None:
    adapters = Adapters(count, part_sizes, dtype)
    without = torch.cat(
        [torch.arange(s.first_row, s.end_row) for s in adapters.segments if not s.rank]
    )
    before = adapters.y[without].clone()
    lora_expand_triton(adapters.y, adapters.h, adapters.b, adapters.tiles, part_sizes)
    assert_close(adapters.y, adapters.expected)
    assert adapters.y[without].equal(before)


@every_dtype
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize(("n_parts", "features"), [(3, 576), (1, 100)])
def test_lora_shrink(dtype: torch.dtype, count: int, n_parts: int, features: int) -> None:
    adapters = Adapters(count, (16,) * n_parts, dtype)
    x = normal(adapters.rows, features + 24, dtype=dtype, seed=3)[:, :-24]
    a = normal(n_parts * len(adapters.b), features, dtype=dtype, seed=4)
    segments = [segment for segment in adapters.segments if segment.rank]
    tiles = [*lora_tiles(segments, SHRINK_TILE_ROWS), LoraTile(0, 0, 0, 0)]
    on_device = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
    actual = lora_shrink_triton(x, a, on_device, len(adapters.b), n_parts)
    expected = lora_shrink_torch(wide(x), wide(a), segments, n_parts)
    for first_row, end_row, first_rank, rank in segments:
        columns = slice(n_parts * first_rank, n_parts * (first_rank + rank))
        if end_row > first_row:
            assert_close(actual[first_row:end_row, columns], expected[first_row:end_row, columns])


@every_dtype
@pytest.mark.parametrize(("first_rank", "rank"), [(0, 1), (5, 3), (16, 16), (0, 0)])
@pytest.mark.parametrize("neighbours", [slice(0, 5), slice(1, 4), slice(4, 5)], ids=str)
def test_lora_spread(dtype: torch.dtype, first_rank: int, rank: int, neighbours: slice) -> None:
    factors = [poisoned(40, size, dtype=dtype) for size in (1, 1030, 7, 256, 600)]
    table, targets = spread_table(factors, factors[0].device), factors[neighbours]
    packed = normal(rank * sum(factor.shape[1] for factor in targets), dtype=dtype)
    expected = [factor.clone() for factor in factors]
    lora_spread_torch(packed, expected[neighbours], first_rank, rank)
    lora_spread_triton(packed, targets, table[neighbours], first_rank, rank)
    for factor, copy in zip(factors, expected, strict=True):
        torch.testing.assert_close(factor, copy, rtol=0, atol=0, equal_nan=True)


@every_dtype
def test_the_same_inputs_give_the_same_bits(dtype: torch.dtype) -> None:
    first, second = (Adapters(9, (576, 192, 192), dtype) for _ in range(2))
    for adapters in (first, second):
        lora_expand_triton(adapters.y, adapters.h, adapters.b, adapters.tiles, (576, 192, 192))
    assert first.y.equal(second.y)


@every_dtype
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "rotated", "has_norms"),
    [(8, 2, 128, 128, False), (3, 1, 24, 24, True), (3, 1, 96, 72, True), (4, 2, 64, 0, False)],
)
@pytest.mark.parametrize(("n_parts", "count"), [(3, 1), (3, 9), (1, 4)])
def test_rotary_kv_write_with_lora(
    dtype: torch.dtype,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    rotated: int,
    has_norms: bool,
    n_parts: int,
    count: int,
) -> None:
    sizes: tuple[int, ...] = (q_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    if n_parts == 1:
        sizes = (sum(sizes),)
    norms = head_norms(head_dim, dtype) if has_norms else None
    adapters = Adapters(count, sizes, dtype)
    pages = -(-adapters.rows // 16) + 3
    angles = 100 * normal(adapters.rows, rotated // 2, dtype=torch.float32, seed=1)
    cos, sin = angles.cos(), angles.sin()
    places = torch.randperm(pages * 16, generator=torch.Generator().manual_seed(2))[: adapters.rows]
    caches = [poisoned(pages, kv_heads, 16, head_dim, dtype=dtype) for _ in range(2)]
    oracles = [wide(cache) for cache in caches]
    q = rotary_kv_write_with_lora_triton(
        *(adapters.y, adapters.h, adapters.b, adapters.tiles, n_parts),
        *(cos, sin, *caches, places.to(DEVICE, torch.int32), norms),
    )
    expected = rotary_kv_write_torch(
        adapters.expected, wide(cos), wide(sin), *oracles, places, wide_norms(norms)
    )
    assert_close(q, expected)
    for cache, oracle in zip(caches, oracles, strict=True):
        written = ~oracle.isnan()
        assert written.equal(~wide(cache).isnan())
        assert_close(cache[written.to(DEVICE)], oracle[written])


@every_dtype
@activations
@pytest.mark.parametrize(
    ("sizes", "count"), [((530, 530), 1), ((530, 530), 9), ((1060,), 4)], ids=str
)
@overflow_is_fine
def test_act_and_mul_with_lora(
    dtype: torch.dtype, activation: Activation, sizes: tuple[int, ...], count: int
) -> None:
    adapters = Adapters(count, sizes, dtype)
    actual = act_and_mul_with_lora_triton(
        *(adapters.y, adapters.h, adapters.b, adapters.tiles, len(sizes), activation)
    )
    assert_close(actual, act_and_mul_torch(adapters.expected, activation))


#: Where every logit is drawn for by settings of all kinds.
TEMPERATURES = (1e-6, 0.7, 1.0, 1e4)
CUTS = ((0, 1.0), (1, 1.0), (50, 1.0), (10**9, 1.0), (0, 0.9), (0, 0.999), (0, 1e-30), (1000, 0.7))
LARGEST_UNIFORM = 1 - 2.0**-53


def draw_tokens(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """What the kernel makes of each row's largest logit, [rows] on the CPU."""
    tokens = logits.argmax(dim=-1).int()
    sample_triton(tokens, logits, torch.tensor(draws, dtype=torch.float64, device=DEVICE))
    return tokens.cpu()


def draw_rounding(vocabulary: int) -> float:
    """By how much rounding moves a border between two tokens in the distribution.

    A weight e^-a of float32 is off by at most 3a + 4 roundings: its exponent is a difference, times
    a rounded factor, and the power is right to four. A border is off by no more than the mean of
    that over the distribution, and the mean of a is at most its entropy, so at most ln(vocabulary).
    """
    return (3 * log(vocabulary) + 4) * 2.0**-24


def assert_drawn(token: int, logits: torch.Tensor, draw: Draw) -> None:
    """The token is kept, and the draw in its part of the exact distribution, or off by rounding."""
    rounding = draw_rounding(len(logits))
    weights = ((logits - logits.max()) / draw.temperature).exp()
    if 0 < draw.top_k < len(logits):
        weights[logits < logits.topk(draw.top_k).values[-1]] = 0
    values, places = logits.unique(return_inverse=True)
    tied = torch.zeros_like(values).index_add(0, places, weights)
    above = ((tied.flip(0).cumsum(0).flip(0) - tied) / tied.sum())[places]
    # The nucleus may end one value earlier or later if its sum is next to p.
    for top_p in (draw.top_p - rounding, draw.top_p + rounding):
        is_kept = (above < top_p) | (logits == logits.max()) | (draw.top_p >= 1)
        kept = weights * is_kept
        borders = kept.cumsum(0) / kept.sum()
        start = borders[token - 1] if token else 0.0
        if kept[token] > 0 and start - rounding <= draw.uniform <= borders[token] + rounding:
            return
    raise AssertionError(f"{draw} gave {token}")


@every_dtype
@pytest.mark.parametrize("vocabulary", [5003, 128_256] if ON_GPU else [5003])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_sample(dtype: torch.dtype, vocabulary: int, scale: float) -> None:
    settings = list(product(TEMPERATURES, CUTS)) * (2 if ON_GPU else 1)
    logits = normal(2 * len(settings), vocabulary + 24, dtype=dtype, scale=scale)
    # Every other row is drawn for, the last one first; the first of all has no token.
    logits[::2] = logits[:, vocabulary:] = logits[1] = POISON
    logits = logits[:, :vocabulary]
    uniform = torch.rand(len(settings), generator=torch.Generator().manual_seed(6)).tolist()
    draws = [
        Draw(2 * place + 1, temperature, *cut, uniform[place])
        for place, (temperature, cut) in enumerate(settings)
    ][::-1]
    tokens = logits.argmax(dim=-1).int()
    tokens[1] = -1
    before = tokens.tolist()
    twins, numbers = tokens.cpu(), torch.tensor(draws, dtype=torch.float64)
    sample_torch(twins, wide(logits), numbers)
    sample_triton(tokens, logits, numbers.to(DEVICE))
    assert tokens[::2].tolist() == before[::2]
    assert tokens[1] == -1
    for draw in draws[:-1]:
        for drawn in (tokens, twins):
            assert_drawn(int(drawn[draw.row]), wide(logits[draw.row]), draw)


@every_dtype
def test_sample_puts_the_borders_where_they_are(dtype: torch.dtype) -> None:
    # In order, so that nothing that is off by a part of the exponent cancels out.
    logits = normal(1, 5003, dtype=dtype).sort().values
    borders = (wide(logits[0]) / 0.7).softmax(0).cumsum(0)
    tokens = torch.searchsorted(borders, (torch.arange(16) + 0.5) / 16).tolist()
    draws, expected = [], []
    for token in tokens:
        for side in (0, 1):
            uniform = borders[token].item() + (2 * side - 1) * draw_rounding(5003)
            draws.append(Draw(len(draws), 0.7, 0, 1.0, uniform))
            expected.append(token + side)
    assert draw_tokens(logits.expand(len(draws), -1), draws).tolist() == expected


@every_dtype
def test_sample_draws_evenly_from_equal_logits(dtype: torch.dtype) -> None:
    tokens = [0, 1, 4095, 4096, 4097, 8191]
    draws = [Draw(row, 1.0, 0, 1.0, token / 8192) for row, token in enumerate(tokens)]
    logits = torch.zeros(len(tokens), 8192, dtype=dtype, device=DEVICE)
    assert draw_tokens(logits, draws).tolist() == tokens


@every_dtype
@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(2, 1.0, {1, 4000, 4999}), (0, 0.5, {1, 4000, 4999}), (5, 1.0, {0, 1, 17, 100, 4000, 4999})],
)
def test_sample_keeps_ties(dtype: torch.dtype, top_k: int, top_p: float, kept: set[int]) -> None:
    logits = torch.full((1, 5003), -20.0, dtype=dtype, device=DEVICE)
    logits[0, [1, 4000, 4999]] = 0.5
    # The next smaller number is no tie.
    logits[0, 100] = 0.5 - torch.finfo(dtype).eps / 4
    # The sign of a zero makes no difference.
    logits[0, 0], logits[0, 17] = 0.0, -0.0
    draws = [Draw(row, 1.0, top_k, top_p, (row + 0.5) / 11) for row in range(11)]
    assert set(draw_tokens(logits.expand(11, -1), draws).tolist()) == kept


@every_dtype
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(100.0, 1, 1.0), (100.0, 0, 1e-30), (1e-6, 0, 1.0), (5e-324, 0, 1.0), (5e-324, 9, 0.9)],
)
def test_sample_takes_the_largest_logit_if_it_is_the_only_one(
    dtype: torch.dtype, temperature: float, top_k: int, top_p: float
) -> None:
    logits = 3 * normal(4, 5003, dtype=dtype)
    uniform = (0.0, 0.3, 0.9, LARGEST_UNIFORM)
    # Larger than any other, at places of both blocks, and below zero too.
    logits[range(4), [0, 4095, 4096, 5002]] = 20
    logits[2:] -= 40
    draws = [Draw(row, temperature, top_k, top_p, uniform[row]) for row in range(4)]
    assert draw_tokens(logits, draws).tolist() == [0, 4095, 4096, 5002]


@every_dtype
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.9), (5, 0.9)])
def test_sample_never_takes_an_infinitely_improbable_token(
    dtype: torch.dtype, top_k: int, top_p: float
) -> None:
    logits = torch.full((4, 5003), float("-inf"), dtype=dtype, device=DEVICE)
    logits[range(4), [0, 5002, 4096, 4095]] = torch.tensor([-7, 0, 3, 900], dtype=dtype).to(DEVICE)
    draws = [Draw(row, 1.0, top_k, top_p, (row % 2) * LARGEST_UNIFORM) for row in range(4)]
    assert draw_tokens(logits, draws).tolist() == [0, 5002, 4096, 4095]


@every_dtype
def test_sample_gives_the_outermost_draws_the_outermost_tokens(dtype: torch.dtype) -> None:
    logits = normal(1, 49_157, dtype=dtype).abs()
    # In the middle of their blocks.
    logits[:, :2000] = logits[:, -2000:] = -1.0
    for uniform, token in ((0.0, 2000), (LARGEST_UNIFORM, 49_157 - 2001)):
        assert draw_tokens(logits, [Draw(0, 1.0, 45_157, 1.0, uniform)]) == token


@every_dtype
def test_sample_finds_a_token_however_the_sums_are_rounded(dtype: torch.dtype) -> None:
    """A draw one rounding below the total, of weights that do not add up exactly."""
    logits = normal(8, 8100, dtype=dtype, scale=10)
    draws = [Draw(row, 1.0, 0, 1.0, LARGEST_UNIFORM) for row in range(8)]
    for token, draw in zip(draw_tokens(logits, draws).tolist(), draws, strict=True):
        assert_drawn(token, wide(logits[draw.row]), draw)


@every_dtype
def test_sample_gives_a_row_the_same_token_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    logits = normal(4, 5003, dtype=dtype)
    draws = [Draw(row, 2.0, *cut, (row + 0.5) / 4) for row, cut in enumerate(CUTS[1::2])]
    together = draw_tokens(logits, draws)
    assert draw_tokens(logits, draws).equal(together)
    alone = [
        draw_tokens(logits[draw.row :][:1], [draw._replace(row=0)]) for draw in reversed(draws)
    ]
    assert torch.cat(alone).flip(0).equal(together)
