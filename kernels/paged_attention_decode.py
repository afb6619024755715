"""Attention of one query a sequence over a paged KV cache (Kwon et al., 2023).

A sequence's keys and values stand in pages of ``page_size`` rows for each KV head; its line of the
page table lists its pages in order. Query head ``h`` attends to KV head
``h // (q_heads / kv_heads)``.

With a window a query sees the newest ``window`` keys up to its own only (Beltagy et al., 2020).
With a soft cap a score ``s`` becomes ``soft_cap * tanh(s / soft_cap)`` (Bello et al., 2016), before
any mask. 0 stands for none of either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Programs that fill a GPU of 132 multiprocessors: sequences x KV heads x splits.
_WANTED_PROGRAMS = 512
_MAX_SPLITS = 32


def paged_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    sequences: torch.Tensor,
    lengths: torch.Tensor,
    max_length: int,
    out: torch.Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    """``o = softmax(scale * q K^T) V`` for one query a sequence, over all keys that it sees.

    q: [rows, q_heads, head_dim]
    k_cache, v_cache: [pages, kv_heads, page_size, head_dim]
    page_table: [lines, max_pages] integers
    sequences: [rows] integers, the line of the page table of each row's sequence
    lengths: [rows] integers, keys of each sequence, its newest one included; a row of 0 keys is
        none of a sequence, and its output is left as it is
    max_length: at least the largest of ``lengths``; a bound of the work, not of the result
    out: like ``q``, contiguous; written
    """
    op = paged_attention_decode_triton if q.is_cuda else paged_attention_decode_torch
    op(
        *(q, k_cache, v_cache, page_table, sequences, lengths, max_length, out),
        *(scale, window, soft_cap),
    )


def paged_attention_decode_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    sequences: torch.Tensor,
    lengths: torch.Tensor,
    max_length: int,
    out: torch.Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    n_rows, q_heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_cache.shape
    n_groups = n_rows * kv_heads
    n_pages = -(-max_length // page_size)
    pages = page_table[sequences, :n_pages]
    is_own = torch.arange(0, n_pages * page_size, page_size, device=q.device) < lengths[:, None]
    # Beyond its end a sequence reads its first page again: what is in another's, NaN even, would
    # count as 0 times itself.
    pages = torch.where(is_own, pages, pages[:, :1])
    keys = gather_pages(k_cache, pages).view(n_groups, -1, head_dim)
    values = gather_pages(v_cache, pages).view(n_groups, -1, head_dim)
    positions = torch.arange(n_pages * page_size, device=q.device)
    masked = positions >= lengths[:, None]
    if window:
        masked |= positions < lengths[:, None] - window
    mask = q.new_zeros(masked.shape).masked_fill_(masked, float("-inf"))
    # The query heads of one KV head are the rows of one product, so that nothing is repeated. Two
    # plain products take 0.4 ms at 48 x 144 keys of 3 heads on two cores, against 0.8 ms by
    # F.scaled_dot_product_attention.
    grouped = q.reshape(n_groups, q_heads // kv_heads, head_dim)
    masks = mask.repeat_interleave(kv_heads, dim=0)[:, None]
    if soft_cap:
        scores = torch.bmm(grouped, keys.transpose(1, 2)).mul_(scale / soft_cap)
        scores = masks + soft_cap * scores.tanh_()
    else:
        scores = torch.baddbmm(masks, grouped, keys.transpose(1, 2), alpha=scale)
    attended = torch.bmm(scores.softmax(dim=-1), values).view(n_rows, q_heads, head_dim)
    out.copy_(torch.where(lengths[:, None, None] > 0, attended, out))


def gather_pages(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """[sequences, kv_heads, pages, page_size * head_dim] of pages [sequences, pages]."""
    kv_heads = cache.shape[1]
    heads = torch.arange(kv_heads, device=cache.device)
    rows = pages[:, None, :] * kv_heads + heads[None, :, None]
    # index_select copies whole rows at the speed of memory; cache[pages] took twice as long.
    return cache.flatten(2).flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)


def paged_attention_decode_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    sequences: torch.Tensor,
    lengths: torch.Tensor,
    max_length: int,
    out: torch.Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    """Flash decoding (Dao et al., 2023): a program takes a sequence's KV head, or, where there are
    few, an equal part of its keys; a second launch then merges the parts by their sums."""
    n_rows, q_heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_cache.shape
    ratio = q_heads // kv_heads
    n_splits = _num_splits(n_rows * kv_heads, min(max_length, window) if window else max_length)
    # Without splits a program writes the result itself; the rest is not touched.
    partial = out
    if n_splits > 1:
        partial = q.new_empty(n_splits, n_rows, q_heads, head_dim, dtype=torch.float32)
    log_sums = q.new_empty(n_splits, n_rows, q_heads, dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(head_dim))
    # Wide heads take half as many keys a turn: an H100's shared memory holds no more.
    is_wide = block_d * q.element_size() > 512
    # The fastest of eight shapes on an H100 at 64, 256 and 512 sequences (docs/gpu.md).
    _decode[(n_rows, kv_heads, n_splits)](
        *(q, k_cache, v_cache, page_table, sequences, lengths, out, partial, log_sums),
        *(q.stride(0), page_table.stride(0), n_rows, scale * 1.4426950408889634),
        WINDOW=window,
        SOFT_CAP=soft_cap * 1.4426950408889634,
        KV_HEADS=kv_heads,
        RATIO=ratio,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        BLOCK_Q=max(16, triton.next_power_of_2(ratio)),
        BLOCK_D=block_d,
        BLOCK_N=32 if is_wide else 64,
        N_SPLITS=n_splits,
        num_warps=4,
        num_stages=2 if is_wide else 3,
    )
    if n_splits > 1:
        _merge[(n_rows, q_heads)](
            *(partial, log_sums, lengths, out, n_rows),
            Q_HEADS=q_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            N_SPLITS=n_splits,
            BLOCK_S=triton.next_power_of_2(n_splits),
            num_warps=1,
        )


def _num_splits(n_programs: int, max_length: int) -> int:
    """Parts of a sequence's keys: enough for all multiprocessors, few below 64 keys.

    A power of two, since the kernels are compiled for each number.
    """
    wanted = -(-_WANTED_PROGRAMS // n_programs)
    n_splits = max(1, min(wanted, _MAX_SPLITS, -(-max_length // 64)))
    return 1 << (n_splits - 1).bit_length()


@triton.jit(do_not_specialize=["n_rows"])
def _decode(
    q,
    k_cache,
    v_cache,
    page_table,
    sequences,
    lengths,
    out,
    partial,
    log_sums,
    q_stride,
    table_stride,
    n_rows,
    scale_log2,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    N_SPLITS: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    if length == 0:
        return
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    end = length
    if N_SPLITS > 1:
        # Whole turns of the loop, so that no two splits read one turn's keys.
        part = tl.cdiv(tl.cdiv(length - first, BLOCK_N), N_SPLITS) * BLOCK_N
        first += split * part
        end = tl.minimum(first + part, length)
    heads = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    is_query = (heads < RATIO)[:, None] & in_head[None, :]
    at = (kv_head * RATIO + heads)[:, None] * HEAD_DIM + d[None, :]
    queries = tl.load(q + row.to(tl.int64) * q_stride + at, mask=is_query, other=0.0)

    line = page_table + tl.load(sequences + row).to(tl.int64) * table_stride
    n = tl.arange(0, BLOCK_N)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_N):
        position = start + n
        is_key = position < end
        page = tl.load(line + position // PAGE_SIZE, mask=is_key, other=0).to(tl.int64)
        key_row = (page * KV_HEADS + kv_head) * PAGE_SIZE + position % PAGE_SIZE
        here = key_row[:, None] * HEAD_DIM + d[None, :]
        # A masked key or value is never read: NaN of a page's last owner stays where it is.
        mask = is_key[:, None] & in_head[None, :]
        k = tl.load(k_cache + here, mask=mask, other=0.0)
        v = tl.load(v_cache + here, mask=mask, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale_log2
        if SOFT_CAP > 0:
            scores = soft_capped(scores, SOFT_CAP)
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        largest = new_largest

    place = row.to(tl.int64) * (KV_HEADS * RATIO * HEAD_DIM) + at
    if N_SPLITS == 1:
        tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_query)
    else:
        # An empty part: its sum is 0, and its logarithm -inf takes it out of the merge.
        safe = tl.where(total > 0, total, 1.0)
        skipped = split.to(tl.int64) * n_rows * (KV_HEADS * RATIO)
        tl.store(partial + skipped * HEAD_DIM + place, acc / safe[:, None], mask=is_query)
        log_sum = tl.where(total > 0, largest + tl.log2(safe), float("-inf"))
        head = row * (KV_HEADS * RATIO) + kv_head * RATIO + heads
        tl.store(log_sums + skipped + head, log_sum, mask=heads < RATIO)


@triton.jit
def soft_capped(x, CAP: tl.constexpr):
    """``CAP * tanh(x / CAP)``, where ``tanh(z) = 1 - 2 / (exp(2 z) + 1)``, 1 if that overflows."""
    return CAP - 2 * CAP / (tl.exp(x * (2 / CAP)) + 1)


@triton.jit(do_not_specialize=["n_rows"])
def _merge(
    partial,
    log_sums,
    lengths,
    out,
    n_rows,
    Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    N_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    if tl.load(lengths + tl.program_id(0)) == 0:
        return
    head = tl.program_id(0).to(tl.int64) * Q_HEADS + tl.program_id(1)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    is_split = s < N_SPLITS
    place = s.to(tl.int64) * n_rows * Q_HEADS + head
    log_sum = tl.load(log_sums + place, mask=is_split, other=float("-inf"))
    weight = tl.exp2(log_sum - tl.max(log_sum, axis=0))
    mask = is_split[:, None] & (d < HEAD_DIM)[None, :]
    parts = tl.load(partial + place[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    # An empty split's part was never multiplied by anything but a weight of 0, and holds 0.
    merged = tl.sum(parts * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out + head * HEAD_DIM + d, merged.to(out.dtype.element_ty), mask=d < HEAD_DIM)
