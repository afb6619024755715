"""The Triton kernels against their torch twins in float64, at sizes as models have them.

On a GPU in every dtype that is served there (`make test-gpu`); elsewhere interpreted, in float32.
What each operation means is the business of `test_kernels.py`.
"""

from __future__ import annotations

import pytest
import torch

from kernels.lora_expand import lora_expand_torch, lora_expand_triton
from kernels.lora_segments import LoraTile, Segment, lora_tiles
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
from kernels.rms_norm import add_rms_norm_torch, add_rms_norm_triton
from kernels.rotary_kv_write import rotary_kv_write_torch, rotary_kv_write_triton
from kernels.silu_and_mul import (
    silu_and_mul_torch,
    silu_and_mul_triton,
    silu_and_mul_with_lora_triton,
)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
POISON = float("nan")

#: ||out - reference|| / ||reference||: a few roundings of inputs that are exact in both, to the
#: dtype's 24, 11 or 8 bits. A wrong row, page or adapter is off by about 1.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

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
@pytest.mark.parametrize(("rows", "features"), [(1, 1536), (37, 14336 if ON_GPU else 1500)])
def test_silu_and_mul(dtype: torch.dtype, rows: int, features: int) -> None:
    gate_up = normal(rows, 2 * features + 40, dtype=dtype, scale=3)[:, : 2 * features]
    assert_close(silu_and_mul_triton(gate_up), silu_and_mul_torch(wide(gate_up)))


@every_dtype
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64)])
def test_rotary_kv_write(dtype: torch.dtype, q_heads: int, kv_heads: int, head_dim: int) -> None:
    rows, pages = 37, 11
    qkv = normal(rows, (q_heads + 2 * kv_heads) * head_dim + 16, dtype=dtype)[:, :-16]
    angles = 100 * normal(rows, head_dim // 2, dtype=torch.float32, seed=1)
    cos, sin = angles.cos(), angles.sin()
    places = torch.randperm(pages * 16, generator=torch.Generator().manual_seed(2))[:rows]
    caches = [poisoned(pages, kv_heads, 16, head_dim, dtype=dtype) for _ in range(2)]
    oracles = [wide(cache) for cache in caches]
    q = rotary_kv_write_triton(qkv, cos, sin, *caches, places.to(DEVICE, torch.int32))
    expected = rotary_kv_write_torch(wide(qkv), wide(cos), wide(sin), *oracles, places)
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


heads = pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64)])


@every_dtype
@heads
@pytest.mark.parametrize("lengths", [[1, 16, 17, 333], [900]], ids=str)
def test_paged_attention_decode(
    dtype: torch.dtype, q_heads: int, kv_heads: int, head_dim: int, lengths: list[int]
) -> None:
    cache, scale = Cache(lengths, kv_heads, head_dim, dtype), head_dim**-0.5
    q = normal(len(lengths), q_heads, head_dim, dtype=dtype)
    out = poisoned(*q.shape, dtype=dtype)
    lines = torch.arange(len(lengths), dtype=torch.int32)
    numbers = torch.tensor(lengths, dtype=torch.int32)
    paged_attention_decode_triton(
        *(q, cache.keys, cache.values, cache.table),
        *(lines.to(DEVICE), numbers.to(DEVICE), max(lengths), out, scale),
    )
    expected = wide(out)
    paged_attention_decode_torch(
        wide(q), *cache.oracle(), lines, numbers, max(lengths), expected, scale
    )
    assert_close(out, expected)


@every_dtype
@heads
def test_paged_attention_prefill(
    dtype: torch.dtype, q_heads: int, kv_heads: int, head_dim: int
) -> None:
    lengths, rows = [200, 1, 64, 130], [200, 1, 3, 65]
    cache, scale = Cache(lengths, kv_heads, head_dim, dtype), head_dim**-0.5
    chunks, first = [], 0
    for line, (length, count) in enumerate(zip(lengths, rows, strict=True)):
        chunks.append(PrefillChunk(first, first + count, line, length))
        first += count
    q = normal(first, q_heads, head_dim, dtype=dtype)
    out = poisoned(*q.shape, dtype=dtype)
    tiles = torch.tensor(prefill_tiles(chunks), dtype=torch.int32, device=DEVICE)
    paged_attention_prefill_triton(q, cache.keys, cache.values, cache.table, tiles, out, scale)
    expected = wide(out)
    paged_attention_prefill_torch(wide(q), *cache.oracle(), chunks, expected, scale)
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
def test_the_same_inputs_give_the_same_bits(dtype: torch.dtype) -> None:
    first, second = (Adapters(9, (576, 192, 192), dtype) for _ in range(2))
    for adapters in (first, second):
        lora_expand_triton(adapters.y, adapters.h, adapters.b, adapters.tiles, (576, 192, 192))
    assert first.y.equal(second.y)


@every_dtype
@pytest.mark.parametrize("count", [1, 9])
def test_silu_and_mul_with_lora(dtype: torch.dtype, count: int) -> None:
    adapters = Adapters(count, (530, 530), dtype)
    actual = silu_and_mul_with_lora_triton(adapters.y, adapters.h, adapters.b, adapters.tiles)
    assert_close(actual, silu_and_mul_torch(adapters.expected))
