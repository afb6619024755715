"""The sequences of one forward pass, as the numbers that the model reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.lora_segments import GainRows, Segment
from kernels.paged_attention_prefill import PrefillChunk
from worker.adapters.peft_format import Adapter
from worker.adapters.slots import AdapterSlots
from worker.model.config import END_MODULES, TARGET_GROUPS
from worker.model.decoder import TrainedRows
from worker.scheduler import ScheduledSequence
from worker.sequence import Sequence

#: Stands for a token that an earlier batch chooses: the device has it, the host not yet.
IN_FLIGHT = -1

#: The segment of rows without adapter has this rank.
NO_RANK = 0

Int32s = NDArray[np.int32]


class ScoredRows(NamedTuple):
    """Rows of a prompt whose logits tell how likely its next tokens are."""

    sequence: Sequence
    first_position: int
    rows: range


@dataclass(frozen=True)
class Batch:
    """One row a token. The rows of decoding sequences stand first, one each, then the chunks of
    those in prefill; within both, sequences of one adapter stand together.

    ``token_ids``, ``lines`` (of the page table) and ``positions`` have a number for each row;
    ``page_updates`` are [line, place in the line, page], new since the last batch.
    """

    scheduled: list[ScheduledSequence]
    """The sequences with their numbers of rows, in the order of the rows."""
    sampled: list[Sequence]
    """Those that get a token from this pass."""
    sampled_rows: list[int]
    """Their rows, in the same order."""
    scored: list[ScoredRows]
    """Rows of prompts whose logits are wanted too."""
    adapters: frozenset[Adapter]
    token_ids: Int32s
    lines: Int32s
    positions: Int32s
    page_updates: Int32s
    num_decode_rows: int
    chunks: list[PrefillChunk]
    segments: list[Segment]
    """All rows; those without adapter have rank ``NO_RANK``."""
    group_segments: dict[str, list[Segment]]
    """For each group of modules that an adapter of the batch changes, the segments of such
    adapters. Those of the output head are of ``head_rows``."""

    group_gains: dict[str, list[GainRows]]
    """Likewise, for each group that an adapter changes with DoRA."""

    trained: dict[str, list[TrainedRows]]
    """For each of ``END_MODULES`` that an adapter replaces, the rows of such adapters, likewise."""

    num_ranks: int
    """Ranks of the slots up to the last one of the batch's adapters."""

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def head_rows(self) -> list[int]:
        """The rows whose logits are computed: the sampled ones, then the scored ones."""
        return [*self.sampled_rows, *(row for scored in self.scored for row in scored.rows)]

    @property
    def has_graph(self) -> bool:
        """Whether adapters change nothing but the layers' linear modules, and by LoRA: CUDA graphs
        hold no more than that."""
        is_more = self.group_gains or self.trained
        return not is_more and self.group_segments.keys().isdisjoint(END_MODULES)

    @property
    def max_decode_length(self) -> int:
        """Keys of the longest decoding sequence."""
        return int(self.positions[: self.num_decode_rows].max(initial=-1)) + 1


def build_batch(scheduled: list[ScheduledSequence], slots: AdapterSlots | None) -> Batch:
    """Lay out the rows of a batch; loads adapters into slots where they are missing."""
    adapters = frozenset(item.sequence.adapter for item in scheduled if item.sequence.adapter)
    if slots:
        for adapter in adapters:
            slots.place(adapter, adapters)

    def first_rank(item: ScheduledSequence) -> int:
        adapter = item.sequence.adapter
        return slots.first_rank(adapter) if slots and adapter else -1

    ordered = sorted(scheduled, key=lambda item: (item.is_prefill, first_rank(item)))
    token_ids: list[int] = []
    positions: list[int] = []
    chunks = []
    sampled, sampled_rows, scored = [], [], []
    for sequence, num_rows, is_prefill in ordered:
        start, end = sequence.num_cached, sequence.num_cached + num_rows
        first_row = len(token_ids)
        if sequence.num_in_flight:
            token_ids.append(IN_FLIGHT)
            positions.append(start)
        else:
            token_ids += sequence.token_ids(start, end)
            positions += range(start, end)
        if is_prefill:
            chunks.append(PrefillChunk(first_row, len(token_ids), sequence.line, end))
        if end == sequence.num_tokens:
            sampled.append(sequence)
            sampled_rows.append(len(token_ids) - 1)
        if is_prefill and sequence.num_unscored:
            scored.append(_scored_rows(sequence, first_row, end))
    segments = _segments(((item.sequence.adapter, item.num_rows) for item in ordered), slots)
    head_segments: list[tuple[Segment, Adapter | None]] = []
    if any(adapter.changes_head for adapter in adapters):
        num_head_rows = [(sequence.adapter, 1) for sequence in sampled]
        num_head_rows += [(item.sequence.adapter, len(item.rows)) for item in scored]
        head_segments = _segments(num_head_rows, slots)
    trained = {
        "embed_tokens": _trained("embed_tokens", segments),
        "lm_head": _trained("lm_head", head_segments),
    }
    group_segments, group_gains = {}, {}
    for group in TARGET_GROUPS:
        rows = head_segments if group == "lm_head" else segments
        if changed := [(s, a) for s, a in rows if a and group in a.target_groups]:
            group_segments[group] = [segment for segment, _ in changed]
            if gains := _gains(group, changed):
                group_gains[group] = gains
    return Batch(
        scheduled=ordered,
        sampled=sampled,
        sampled_rows=sampled_rows,
        scored=scored,
        adapters=adapters,
        token_ids=np.array(token_ids, np.int32),
        lines=np.repeat(
            np.array([item.sequence.line for item in ordered], np.int32),
            [item.num_rows for item in ordered],
        ),
        positions=np.array(positions, np.int32),
        page_updates=_page_updates(ordered),
        num_decode_rows=len(ordered) - len(chunks),
        chunks=chunks,
        segments=[segment for segment, _ in segments],
        group_segments=group_segments,
        group_gains=group_gains,
        trained={module: rows for module, rows in trained.items() if rows},
        num_ranks=slots.num_ranks(adapters) if slots else 0,
    )


def _scored_rows(sequence: Sequence, first_row: int, end: int) -> ScoredRows:
    """Those of a chunk up to the position ``end``; they count as scored from now on. What a
    preempted sequence computes anew is not scored again."""
    start = sequence.num_cached
    first = max(start, sequence.num_scored)
    sequence.num_scored = last = max(first, min(end, len(sequence.prompt_ids) - 1))
    return ScoredRows(sequence, first, range(first_row + first - start, first_row + last - start))


def _page_updates(scheduled: list[ScheduledSequence]) -> Int32s:
    """[updates, 3]; the sequences' pages count as told from now on."""
    updates = []
    for sequence, _, _ in scheduled:
        for place in range(sequence.num_pages_told, len(sequence.pages)):
            updates.append((sequence.line, place, sequence.pages[place]))
        sequence.num_pages_told = len(sequence.pages)
    return np.array(updates, np.int32).reshape(-1, 3)


def _segments(
    rows: Iterable[tuple[Adapter | None, int]], slots: AdapterSlots | None
) -> list[tuple[Segment, Adapter | None]]:
    """For adapters with their numbers of rows, those of one adapter side by side."""
    segments: list[tuple[Segment, Adapter | None]] = []
    first_row = 0
    for adapter, items in groupby(rows, key=itemgetter(0)):
        end_row = first_row + sum(num_rows for _, num_rows in items)
        if slots and adapter:
            segment = Segment(first_row, end_row, slots.first_rank(adapter), adapter.rank)
        else:
            segment = Segment(first_row, end_row, 0, NO_RANK)
        segments.append((segment, adapter))
        first_row = end_row
    return segments


def _gains(group: str, segments: list[tuple[Segment, Adapter]]) -> list[GainRows]:
    return [
        GainRows(segment.first_row, segment.end_row, gains)
        for segment, adapter in segments
        if (gains := adapter.on_device.gains.get(group)) is not None
    ]


def _trained(module: str, segments: list[tuple[Segment, Adapter | None]]) -> list[TrainedRows]:
    return [
        TrainedRows(segment.first_row, segment.end_row, adapter.on_device.trained[module])
        for segment, adapter in segments
        if adapter and module in adapter.on_device.trained
    ]
