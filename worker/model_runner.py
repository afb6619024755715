"""Runs batches on the device: their numbers go there in one copy, tokens come back in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from kernels.lora_segments import LoraRows, lora_tiles
from kernels.paged_attention_prefill import PrefillRows, prefill_tiles
from worker.batch import IN_FLIGHT, Batch, Int32s
from worker.decode_graphs import DecodeGraphs
from worker.kv_cache import PAGE_SIZE
from worker.model.decoder import Decoder, DecoderInput
from worker.sampler import choose_largest, draw
from worker.staging import Staging, send


@dataclass(frozen=True)
class Launched:
    """A batch whose tokens are being computed."""

    batch: Batch
    tokens: torch.Tensor
    """[sampled] int32 on the host, once ``done`` has come."""
    began: torch.cuda.Event | None
    done: torch.cuda.Event | None

    def token_ids(self) -> list[int]:
        """Waits for the device."""
        if self.done:
            self.done.synchronize()
        token_ids: list[int] = self.tokens.tolist()
        return token_ids

    def device_seconds(self) -> float:
        """From the batch's first kernel on a GPU to its last; for a batch that is done."""
        if not self.began or not self.done:
            return 0.0
        return float(self.began.elapsed_time(self.done)) / 1000


class ModelRunner:
    """The decoder with what it knows of every running sequence on the device: its pages and its
    newest token."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_running: int,
        max_pages: int,
        unused_page: int,
        device: torch.device,
    ) -> None:
        """``max_pages``: of one sequence; ``unused_page`` belongs to none."""
        self.decoder = decoder
        self.device = device
        self._max_running = max_running
        # The last line is for rows that fill up a CUDA graph's batch.
        self.page_table = torch.zeros(max_running + 1, max_pages, dtype=torch.int32, device=device)
        self._unused_page = unused_page
        self.page_table[-1] = unused_page
        self.newest_tokens = torch.zeros(max_running + 1, dtype=torch.int32, device=device)
        self._staging = Staging(device)
        self._token_staging = Staging(device)
        self._graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def capture_graphs(self, *, max_adapters: int, num_ranks: int) -> None:
        """Make CUDA graphs for decode steps of all sizes; ``num_ranks`` of the slots, 0 without."""
        if self.device.type == "cuda":
            self._graphs = DecodeGraphs(
                self.forward,
                max_running=self._max_running,
                max_length=self.page_table.shape[1] * PAGE_SIZE,
                unused_page=self._unused_page,
                max_adapters=max_adapters,
                num_ranks=num_ranks,
                vocab_size=self.decoder.vocab_size,
                dtype=self.decoder.dtype,
                device=self.device,
            )

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """Start a batch; on a GPU returns before it is done."""
        began = self._mark()
        replayed = self._graphs.replay(batch) if self._graphs else None
        logits, tokens = replayed or self._run(batch)
        if any(sequence.job.temperature > 0 for sequence in batch.sampled):
            draw(tokens, logits, batch.sampled)
            lines = [sequence.line for sequence in batch.sampled]
            self.newest_tokens[send(lines, torch.int64, self.device)] = tokens
        return self._bring_back(batch, tokens, began)

    def _run(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = self._upload(
            [
                *(batch.token_ids, batch.lines, batch.positions, batch.page_updates),
                np.array(batch.sampled_rows, np.int32),
                np.array(prefill_tiles(batch.chunks), np.int32),
                np.array(lora_tiles(batch.segments) if batch.adapters else [], np.int32),
            ]
        )
        token_ids, lines, positions, updates, sampled_rows, tiles, adapter_tiles = numbers
        return self.forward(
            token_ids,
            lines,
            positions,
            updates.view(-1, 3),
            sampled_rows=sampled_rows,
            num_decode_rows=batch.num_decode_rows,
            max_length=batch.max_decode_length,
            prefill=self._prefill_rows(batch, tiles),
            lora=self._lora_rows(batch, adapter_tiles),
        )

    def forward(
        self,
        token_ids: torch.Tensor,
        lines: torch.Tensor,
        positions: torch.Tensor,
        page_updates: torch.Tensor,
        *,
        sampled_rows: torch.Tensor | None,
        num_decode_rows: int,
        max_length: int,
        prefill: PrefillRows | None,
        lora: Mapping[str, LoraRows],
        logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [sampled rows, vocabulary] and the largest one's tokens [sampled rows], which
        become the newest ones of their sequences.

        ``sampled_rows`` are None for all; ``logits``, if given, is where they are written. Nothing
        in here waits for the device, and all that differs from batch to batch of one size is read
        there: a CUDA graph can hold it.
        """
        self.page_table[page_updates[:, 0], page_updates[:, 1]] = page_updates[:, 2]
        known = torch.where(token_ids == IN_FLIGHT, self.newest_tokens[lines], token_ids)
        pages = self.page_table[lines, positions // PAGE_SIZE]
        logits = self.decoder.forward(
            DecoderInput(
                # NO_TOKEN of a sequence that is about to be dropped would be out of bounds.
                token_ids=known.clamp_(min=0),
                positions=positions,
                cache_rows=pages * PAGE_SIZE + positions % PAGE_SIZE,
                lines=lines[:num_decode_rows],
                lengths=positions[:num_decode_rows] + 1,
                max_length=max_length,
                page_table=self.page_table,
                prefill=prefill,
                lora=lora,
                sampled_rows=sampled_rows,
            ),
            logits,
        )
        tokens = choose_largest(logits)
        self.newest_tokens[lines if sampled_rows is None else lines[sampled_rows]] = tokens
        return logits, tokens

    def _prefill_rows(self, batch: Batch, tiles: torch.Tensor) -> PrefillRows | None:
        if not batch.chunks:
            return None
        return PrefillRows(batch.chunks, tiles.view(-1, 4) if tiles.is_cuda else None)

    def _lora_rows(self, batch: Batch, tiles: torch.Tensor) -> dict[str, LoraRows]:
        on_device = tiles.view(-1, 4) if tiles.is_cuda else None
        return {
            group: LoraRows(segments, on_device, batch.num_ranks)
            for group, segments in batch.group_segments.items()
        }

    def _upload(self, parts: list[Int32s]) -> list[torch.Tensor]:
        """The arrays on the device, flat, after one copy."""
        # Each begins at a multiple of 16 bytes: for another alignment Triton compiles anew.
        ends = list(accumulate(-(-part.size // 4) * 4 for part in parts))
        starts = [0, *ends[:-1]]
        staged = self._staging.take(ends[-1])
        numbers = staged.numpy()
        for start, part in zip(starts, parts, strict=True):
            numbers[start : start + part.size] = part.ravel()
        on_device = staged.to(self.device, non_blocking=True)
        return [
            on_device[start : start + part.size] for start, part in zip(starts, parts, strict=True)
        ]

    def _bring_back(
        self, batch: Batch, tokens: torch.Tensor, began: torch.cuda.Event | None
    ) -> Launched:
        if self.device.type != "cuda":
            return Launched(batch, tokens, None, None)
        staged = self._token_staging.take(len(tokens))
        staged.copy_(tokens, non_blocking=True)
        return Launched(batch, staged, began, self._mark())

    def _mark(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
