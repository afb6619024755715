"""The sequences of one forward pass, as the tensors that the model reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch

from kernels.lora_shrink import Segment
from kernels.paged_attention import length_mask
from worker.adapters.peft_format import Adapter
from worker.adapters.slots import AdapterSlots
from worker.kv_cache import PAGE_SIZE
from worker.model.config import LINEAR_GROUPS
from worker.scheduler import ScheduledSequence
from worker.sequence import Sequence

#: Stands for "no slot": a sequence of the base model.
NO_SLOT = -1


@dataclass(frozen=True)
class PrefillChunk:
    """Rows of one sequence's prompt, its pages, and its keys up to the last of those rows."""

    first_row: int
    end_row: int
    pages: torch.Tensor
    length: int


@dataclass(frozen=True)
class Batch:
    """One row a token. The rows of decoding sequences stand first, one each, then the chunks of
    those in prefill; within both, sequences of one adapter stand together.

    Device tensors: token_ids, positions, cache_rows [rows]; sampled_rows [sampled];
    page_table [decode rows, max pages], lengths [decode rows], length_mask.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    cache_rows: torch.Tensor
    sampled_rows: torch.Tensor
    num_decode_rows: int
    page_table: torch.Tensor
    lengths: torch.Tensor
    length_mask: torch.Tensor
    prefill_chunks: list[PrefillChunk]
    lora_segments: dict[str, list[Segment]]
    """For each linear group the rows whose adapter changes it."""
    scheduled: list[ScheduledSequence]
    """The sequences with their numbers of rows, in the order of the rows."""
    sampled: list[Sequence]
    """Those that get a token from this pass, in the order of ``sampled_rows``."""
    adapters: frozenset[Adapter]

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)


def build_batch(
    scheduled: list[ScheduledSequence],
    slots: AdapterSlots | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Batch:
    """Lay out the rows of a batch; loads adapters into slots where they are missing."""
    adapters = frozenset(item.sequence.adapter for item in scheduled if item.sequence.adapter)
    slot_of = {adapter: slots.place(adapter, adapters) for adapter in adapters} if slots else {}

    def slot(item: ScheduledSequence) -> int:
        adapter = item.sequence.adapter
        return slot_of[adapter] if adapter else NO_SLOT

    ordered = sorted(scheduled, key=lambda item: (item.is_prefill, slot(item)))
    decoding = [item.sequence for item in ordered if not item.is_prefill]
    token_ids: list[int] = []
    positions: list[int] = []
    cache_rows: list[int] = []
    chunks = []
    sampled, sampled_rows = [], []
    for sequence, num_rows, is_prefill in ordered:
        start, end = sequence.num_cached, sequence.num_cached + num_rows
        first_row = len(token_ids)
        token_ids += sequence.token_ids(start, end)
        positions += range(start, end)
        cache_rows += [
            sequence.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
            for position in range(start, end)
        ]
        if is_prefill:
            pages = torch.tensor(sequence.pages, device=device)
            chunks.append(PrefillChunk(first_row, len(token_ids), pages, end))
        if end == sequence.num_tokens:
            sampled.append(sequence)
            sampled_rows.append(len(token_ids) - 1)
    page_table = _page_table(decoding, device)
    lengths = torch.tensor([sequence.num_tokens for sequence in decoding], device=device)
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        cache_rows=torch.tensor(cache_rows, device=device),
        sampled_rows=torch.tensor(sampled_rows, dtype=torch.long, device=device),
        num_decode_rows=len(decoding),
        page_table=page_table,
        lengths=lengths,
        length_mask=length_mask(lengths, page_table.shape[1] * PAGE_SIZE, dtype),
        prefill_chunks=chunks,
        lora_segments=_segments(ordered, slot, slots),
        scheduled=ordered,
        sampled=sampled,
        adapters=adapters,
    )


def _page_table(decoding: list[Sequence], device: torch.device) -> torch.Tensor:
    widest = max((len(sequence.pages) for sequence in decoding), default=0)
    rows = [
        # A page of its own fills a row up: what stands in another's, NaN even, must not be read.
        sequence.pages + sequence.pages[:1] * (widest - len(sequence.pages))
        for sequence in decoding
    ]
    return torch.tensor(rows, dtype=torch.long, device=device).view(len(decoding), widest)


def _segments(
    ordered: list[ScheduledSequence],
    slot: Callable[[ScheduledSequence], int],
    slots: AdapterSlots | None,
) -> dict[str, list[Segment]]:
    segments: dict[str, list[Segment]] = {group: [] for group in LINEAR_GROUPS}
    first_row = 0
    for number, items in groupby(ordered, key=slot):
        end_row = first_row + sum(item.num_rows for item in items)
        if slots and number != NO_SLOT:
            segment = slots.segment(number, first_row, end_row)
            for group in slots.groups(number):
                segments[group].append(segment)
        first_row = end_row
    return segments
