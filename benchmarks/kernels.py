"""Each kernel's bandwidth or arithmetic rate on this GPU, beside what the GPU can reach.

    python -m benchmarks.kernels

Shapes are those of one layer of Llama-3.1-8B in bfloat16. A time is the median of 20 replays of a
CUDA graph of many calls over several sets of inputs in turn, larger together than the GPU's cache.
Bytes count every input once and every output once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from kernels.act_and_mul import act_and_mul_triton, act_and_mul_with_lora_triton
from kernels.largest_token import largest_token_triton
from kernels.lora_expand import lora_expand_triton
from kernels.lora_segments import TILE_ROWS, Segment, lora_tiles
from kernels.lora_shrink import SHRINK_TILE_ROWS, lora_shrink_triton
from kernels.paged_attention_decode import paged_attention_decode_triton
from kernels.paged_attention_prefill import (
    PrefillChunk,
    paged_attention_prefill_triton,
    prefill_tiles,
)
from kernels.rms_norm import add_rms_norm_triton
from kernels.rotary_kv_write import rotary_kv_write_triton, rotary_kv_write_with_lora_triton
from kernels.sample import Draw, sample_triton

DTYPE = torch.bfloat16
ITEM = DTYPE.itemsize
Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
HIDDEN, INTERMEDIATE = 4096, 14336
VOCABULARY = 128256
PAGE_SIZE = 16
SCALE = HEAD_DIM**-0.5

#: Columns of each linear group's parts, and its inputs.
GROUPS = {
    "q/k/v": ((4096, 1024, 1024), HIDDEN),
    "o": ((4096,), Q_HEADS * HEAD_DIM),
    "gate/up": ((INTERMEDIATE, INTERMEDIATE), HIDDEN),
    "down": ((4096,), INTERMEDIATE),
}

#: Ranks of the eight adapters, as the slots place them: 240 ranks together.
RANKS = (8, 16, 32, 64, 8, 16, 32, 64)
FIRST_RANKS = (0, 16, 32, 64, 8, 128, 160, 192)
NUM_RANKS = 256

#: Bytes of inputs that no cache holds.
BEYOND_CACHE = 200e6


class Timing(NamedTuple):
    """One line of the table; ``bytes`` and ``flops`` are of one call."""

    name: str
    size: str
    us: float
    bytes: float
    flops: float
    base_us: float | None = None
    """Of the same work without adapters, where that is what the line is compared with."""


def graph_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one call: the median of 20 replays of a graph of all of them."""
    repeated = [*calls] * max(1, 16 // len(calls))
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in repeated:
            call()
    graph.replay()
    times = []
    for _ in range(20):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(1000 * began.elapsed_time(ended) / len(repeated))
    return median(times)


def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, device="cuda", dtype=DTYPE).normal_(std=std)


def num_sets(bytes_of_one: float) -> int:
    """Sets of inputs that are larger together than the cache."""
    return min(64, max(2, int(BEYOND_CACHE // bytes_of_one) + 1))


def copy_ceiling() -> Timing:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    us = graph_us([lambda: target.copy_(source)])
    return Timing("copy", "1 GiB", us, 2 * source.nbytes, 0)


def product_ceiling() -> Timing:
    x, w, size = normal(8192, 8192), normal(8192, 8192), 8192
    out = torch.empty_like(x)
    us = graph_us([lambda: torch.mm(x, w, out=out)])
    return Timing("product", "8192 x 8192 x 8192", us, 3 * x.nbytes, 2.0 * size**3)


class Cache(NamedTuple):
    """Keys and values of sequences on shuffled pages."""

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor


def make_cache(lengths: Sequence[int]) -> Cache:
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    pages = torch.randperm(sum(counts), dtype=torch.int32, device="cuda")
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device="cuda")
    for line, part in enumerate(torch.split(pages, counts)):
        table[line, : len(part)] = part
    shape = (sum(counts), KV_HEADS, PAGE_SIZE, HEAD_DIM)
    return Cache(normal(*shape), normal(*shape), table)


def decode_attention(num_sequences: int) -> Timing:
    """Sequences of 128 to 640 keys: halfway through answers of the benchmark's workloads."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(128, 641, (num_sequences,), generator=generator)
    kv_bytes = float(lengths.sum()) * 2 * KV_HEADS * HEAD_DIM * ITEM
    on_device = lengths.to("cuda", torch.int32)
    lines = torch.arange(num_sequences, dtype=torch.int32, device="cuda")
    calls = []
    for _ in range(num_sets(kv_bytes)):
        cache, q = make_cache(lengths.tolist()), normal(num_sequences, Q_HEADS, HEAD_DIM)
        args = (q, *cache, lines, on_device, 8192, torch.empty_like(q), SCALE)
        calls.append(lambda args=args: paged_attention_decode_triton(*args))
    q_bytes = 2 * num_sequences * Q_HEADS * HEAD_DIM * ITEM
    size = f"{num_sequences} sequences of 128 to 640"
    return Timing("decode attention", size, graph_us(calls), kv_bytes + q_bytes, 0)


def prefill_flops(num_prompts: int, length: int) -> float:
    """Products of the causal half."""
    return 4.0 * num_prompts * Q_HEADS * HEAD_DIM * length * (length + 1) / 2


def prefill_attention(num_prompts: int, length: int) -> Timing:
    q, cache = normal(num_prompts * length, Q_HEADS, HEAD_DIM), make_cache([length] * num_prompts)
    chunks = [PrefillChunk(i * length, (i + 1) * length, i, length) for i in range(num_prompts)]
    tiles = torch.tensor(prefill_tiles(chunks), dtype=torch.int32, device="cuda")
    out = torch.empty_like(q)
    us = graph_us([lambda: paged_attention_prefill_triton(q, *cache, tiles, out, SCALE)])
    size = f"{num_prompts} x {length}"
    return Timing("prefill attention", size, us, 0, prefill_flops(num_prompts, length))


def library_attention(num_prompts: int, length: int) -> Timing:
    """torch's own, whose keys and values are not on pages."""
    q = normal(num_prompts, Q_HEADS, length, HEAD_DIM)
    k, v = (normal(num_prompts, KV_HEADS, length, HEAD_DIM) for _ in range(2))
    us = graph_us(
        [lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)]
    )
    size = f"{num_prompts} x {length}"
    return Timing("torch, keys contiguous", size, us, 0, prefill_flops(num_prompts, length))


def tiles_of(rows: int, tile_rows: int = TILE_ROWS) -> torch.Tensor:
    """Rows in equal shares for eight adapters."""
    bounds = [rows * i // len(RANKS) for i in range(len(RANKS) + 1)]
    segments = [
        Segment(start, end, first, rank)
        for start, end, first, rank in zip(bounds, bounds[1:], FIRST_RANKS, RANKS, strict=False)
    ]
    return torch.tensor(lora_tiles(segments, tile_rows), dtype=torch.int32, device="cuda")


def expand(group: str, rows: int) -> Timing:
    part_sizes, _ = GROUPS[group]
    columns, parts, tiles = sum(part_sizes), len(part_sizes), tiles_of(rows)
    bytes_ = ITEM * (2 * rows * columns + sum(RANKS) * columns + rows * parts * sum(RANKS) / 8)
    calls = []
    for _ in range(num_sets(bytes_)):
        both = normal(rows, columns + parts * NUM_RANKS, std=0.1)
        b = normal(NUM_RANKS, columns, std=0.01)
        args = (both[:, :columns], both[:, columns:], b, tiles, part_sizes)
        calls.append(lambda args=args: lora_expand_triton(*args))
    return Timing(f"LoRA expand, {group}", f"{rows} rows", graph_us(calls), bytes_, 0)


def shrink(group: str, rows: int) -> Timing:
    """By segments, as large batches have it. The inputs are read once a call, A once."""
    part_sizes, inputs = GROUPS[group]
    parts, tiles = len(part_sizes), tiles_of(rows, SHRINK_TILE_ROWS)
    bytes_ = ITEM * (rows * inputs + parts * sum(RANKS) * inputs + rows * parts * sum(RANKS) / 8)
    calls = []
    for _ in range(num_sets(bytes_)):
        x, a = normal(rows, inputs), normal(parts * NUM_RANKS, inputs, std=0.02)
        calls.append(lambda x=x, a=a: lora_shrink_triton(x, a, tiles, NUM_RANKS, parts))
    return Timing(f"LoRA shrink by segments, {group}", f"{rows} rows", graph_us(calls), bytes_, 0)


def activate(rows: int) -> Timing:
    """SiLU-and-multiply with the expand of gate and up, beside that without."""
    part_sizes, _ = GROUPS["gate/up"]
    columns, tiles = sum(part_sizes), tiles_of(rows)
    bytes_ = ITEM * (1.5 * rows * columns + sum(RANKS) * columns + rows * 2 * sum(RANKS) / 8)
    with_lora, without = [], []
    for _ in range(num_sets(bytes_)):
        both = normal(rows, columns + 2 * NUM_RANKS, std=0.1)
        b = normal(NUM_RANKS, columns, std=0.01)
        args = (both[:, :columns], both[:, columns:], b, tiles, 2, "silu")
        with_lora.append(lambda args=args: act_and_mul_with_lora_triton(*args))
        without.append(lambda gate_up=args[0]: act_and_mul_triton(gate_up, "silu"))
    return Timing(
        *("SiLU-and-multiply with LoRA expand", f"{rows} rows", graph_us(with_lora), bytes_, 0),
        graph_us(without),
    )


def stacked_product(group: str, rows: int) -> Timing:
    """The base product with all A under its weight, beside that without."""
    part_sizes, inputs = GROUPS[group]
    columns, parts = sum(part_sizes), len(part_sizes)
    stacked_columns = columns + parts * NUM_RANKS
    bytes_ = ITEM * (stacked_columns * inputs + rows * (inputs + stacked_columns))
    with_lora, without = [], []
    for _ in range(num_sets(bytes_)):
        x, w = normal(rows, inputs), normal(stacked_columns, inputs, std=0.02)
        with_lora.append(lambda x=x, w=w: F.linear(x, w))
        without.append(lambda x=x, w=w: F.linear(x, w[:columns]))
    return Timing(
        *(f"product with A of 256 ranks, {group}", f"{rows} rows", graph_us(with_lora), bytes_),
        *(2.0 * rows * stacked_columns * inputs, graph_us(without)),
    )


def norm(rows: int) -> Timing:
    bytes_ = ITEM * 4 * rows * HIDDEN
    calls = []
    for _ in range(num_sets(bytes_)):
        args = (normal(rows, HIDDEN), normal(rows, HIDDEN), normal(HIDDEN), 1e-5)
        calls.append(lambda args=args: add_rms_norm_triton(*args))
    return Timing("norm with residual", f"{rows} rows", graph_us(calls), bytes_, 0)


def rotary(rows: int) -> Timing:
    """Rotary and KV write with the expand of q/k/v, beside that without."""
    columns, tiles = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, tiles_of(rows)
    bytes_ = ITEM * (2 * rows * columns + sum(RANKS) * columns) + 4 * rows * HEAD_DIM
    with_lora, without = [], []
    for _ in range(num_sets(bytes_)):
        both, b = normal(rows, columns + 3 * NUM_RANKS, std=0.1), normal(NUM_RANKS, columns)
        qkv, h, cache = both[:, :columns], both[:, columns:], make_cache([rows])
        angles = torch.rand(rows, HEAD_DIM // 2, device="cuda")
        places = torch.randperm(rows, dtype=torch.int32, device="cuda")
        args = (angles, angles, cache.keys, cache.values, places)
        with_lora.append(
            lambda q=qkv, h=h, b=b, args=args: rotary_kv_write_with_lora_triton(
                q, h, b, tiles, 3, *args
            )
        )
        without.append(lambda qkv=qkv, args=args: rotary_kv_write_triton(qkv, *args))
    return Timing(
        *("rotary and KV write with LoRA expand", f"{rows} rows", graph_us(with_lora), bytes_, 0),
        graph_us(without),
    )


def largest(rows: int) -> Timing:
    bytes_ = ITEM * rows * VOCABULARY
    sets = [normal(rows, VOCABULARY) for _ in range(num_sets(bytes_))]
    us = graph_us([lambda logits=logits: largest_token_triton(logits) for logits in sets])
    return Timing("largest token", f"{rows} rows", us, bytes_, 0)


def draw(name: str, rows: int, top_k: int, top_p: float) -> Timing:
    """Tokens drawn for all rows. Bytes are those of the logits, read once."""
    calls = []
    bytes_ = ITEM * rows * VOCABULARY
    for _ in range(num_sets(bytes_)):
        logits = normal(rows, VOCABULARY, std=3.0)
        tokens = logits.argmax(dim=-1).int()
        draws = [Draw(row, 0.8, top_k, top_p, (row + 0.5) / rows) for row in range(rows)]
        args = (tokens, logits, torch.tensor(draws, dtype=torch.float64, device="cuda"))
        calls.append(lambda args=args: sample_triton(*args))
    return Timing(f"draw, {name}", f"{rows} rows", graph_us(calls), bytes_, 0)


def timings() -> Iterator[Timing]:
    for num_sequences in (16, 64, 256, 512, 1024):
        yield decode_attention(num_sequences)
    for num_prompts, length in ((8, 256), (32, 256), (4, 2048), (1, 8192)):
        yield prefill_attention(num_prompts, length)
        yield library_attention(num_prompts, length)
    for rows in (256, 512, 2304, 8192):
        for group in GROUPS:
            yield stacked_product(group, rows)
        for group in ("o", "down"):
            yield expand(group, rows)
        if rows >= 2304:
            for group in GROUPS:
                yield shrink(group, rows)
        yield activate(rows)
        yield norm(rows)
        yield rotary(rows)
    for rows in (1, 256):
        yield largest(rows)
        yield draw("no cut", rows, 0, 1.0)
        yield draw("top p", rows, 0, 0.95)
        yield draw("top k, then top p", rows, 50, 0.95)


def main() -> None:
    """Print the table."""
    if not torch.cuda.is_available():
        sys.exit("error: there is no GPU here to measure.")
    copy, product = copy_ceiling(), product_ceiling()
    bandwidth, rate = copy.bytes / copy.us, product.flops / product.us
    table = Table(caption=torch.cuda.get_device_name())
    for name in ("kernel", "size"):
        table.add_column(name)
    for name in ("us", "GB/s", "of copy", "TFLOP/s", "of product", "without LoRA, us"):
        table.add_column(name, justify="right")
    for timing in (copy, product, *timings()):
        gb_s, tflop_s = timing.bytes / timing.us / 1e3, timing.flops / timing.us / 1e6
        table.add_row(
            *(timing.name, timing.size, f"{timing.us:,.1f}"),
            *((f"{gb_s:,.0f}", f"{1e3 * gb_s / bandwidth:.0%}") if timing.bytes else ("", "")),
            *((f"{tflop_s:,.0f}", f"{1e6 * tflop_s / rate:.0%}") if timing.flops else ("", "")),
            f"{timing.base_us:,.1f}" if timing.base_us else "",
        )
        torch.cuda.empty_cache()
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
