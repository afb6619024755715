"""What differs from step to step, as flat int32 arrays that go to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from kernels.lora_segments import lora_tiles
from kernels.lora_shrink import SEGMENTED_FROM, SHRINK_TILE_ROWS
from kernels.paged_attention_prefill import prefill_tiles
from worker.batch import Batch, Int32s

#: Rows of the largest step with prompts that has a CUDA graph. On an H100 the host launches the
#: kernels of such a step of an 8B model in 16 to 23 ms; from about this size on the GPU takes
#: longer.
MAX_MIXED_ROWS = 1024

Array = TypeVar("Array", Int32s, torch.Tensor, int)


class StepArrays(NamedTuple, Generic[Array]):
    """The numbers of a batch, on the host or on the device; or how many there are.

    token_ids, lines, positions: [rows]; a token that an earlier batch chooses is ``IN_FLIGHT``
    lengths: [decode rows], keys of each decoding sequence; 0 for a row of something else
    page_updates: [3 * updates], (line, place in the line, page) each
    sampled_rows, sampled_lines: [sampled], the rows that get a token, and their sequences' lines;
        the last line, -1, for rows of prompts whose logits alone are wanted
    prefill_tiles: [4 * tiles], the fields of ``PrefillTile``
    lora_tiles: [4 * tiles], the fields of ``LoraTile``; empty if the batch has no adapter
    shrink_tiles: likewise, for ``lora_shrink``; empty if it is not to work by segments
    embedding_tiles: likewise, of the rows of adapters that change the embedding alone
    head_tiles, head_shrink_tiles: likewise, of the sampled rows of adapters that change the output
        head alone; its ``lora_shrink`` always works by segments
    """

    token_ids: Array
    lines: Array
    positions: Array
    lengths: Array
    page_updates: Array
    sampled_rows: Array
    sampled_lines: Array
    prefill_tiles: Array
    lora_tiles: Array
    shrink_tiles: Array
    embedding_tiles: Array
    head_tiles: Array
    head_shrink_tiles: Array


def step_arrays(batch: Batch) -> StepArrays[Int32s]:
    """The arrays of a batch, on the host."""
    head_rows, lines = batch.head_rows, [sequence.line for sequence in batch.sampled]
    head_segments = batch.group_segments.get("lm_head", [])
    return StepArrays(
        token_ids=batch.token_ids,
        lines=batch.lines,
        positions=batch.positions,
        lengths=batch.positions[: batch.num_decode_rows] + 1,
        page_updates=batch.page_updates.ravel(),
        sampled_rows=_flat(head_rows),
        sampled_lines=_flat(lines + [-1] * (len(head_rows) - len(lines))),
        prefill_tiles=_flat(prefill_tiles(batch.chunks)),
        lora_tiles=_flat(lora_tiles(batch.segments) if batch.adapters else []),
        shrink_tiles=_flat(
            lora_tiles([s for s in batch.segments if s.rank], SHRINK_TILE_ROWS)
            if _shrinks_by_segments(batch)
            else []
        ),
        embedding_tiles=_flat(lora_tiles(batch.group_segments.get("embed_tokens", []))),
        head_tiles=_flat(lora_tiles(head_segments)),
        head_shrink_tiles=_flat(lora_tiles(head_segments, SHRINK_TILE_ROWS)),
    )


def _shrinks_by_segments(batch: Batch) -> bool:
    """Only in steps that have no graph anyway: the graphs hold the other way."""
    is_large = batch.num_rows * batch.num_ranks >= SEGMENTED_FROM
    return is_large and bool(batch.chunks) and batch.num_rows > MAX_MIXED_ROWS


def views(memory: torch.Tensor, sizes: Sequence[int]) -> StepArrays[torch.Tensor]:
    """Parts of these sizes of one piece of memory, that has ``total_size(sizes)`` numbers."""
    starts = [0, *accumulate(_aligned(size) for size in sizes)]
    return StepArrays(
        *(memory[start : start + size] for start, size in zip(starts, sizes, strict=False))
    )


def total_size(sizes: Sequence[int]) -> int:
    """Numbers that ``views`` of these sizes span."""
    return sum(_aligned(size) for size in sizes)


def _aligned(size: int) -> int:
    """Each array begins at a multiple of 16 bytes: for another alignment Triton compiles anew."""
    return -(-size // 4) * 4


def _flat(numbers: Sequence[int] | Sequence[Sequence[int]]) -> Int32s:
    return np.array(numbers, np.int32).ravel()
