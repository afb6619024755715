"""Runs batches on the device: their numbers go there in one copy, tokens come back in another."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import structlog
import torch

from kernels.largest_token import largest_token
from kernels.lora_expand import FEW_ROWS
from kernels.lora_segments import LoraRows, Segment, lora_tiles
from kernels.lora_shrink import SHRINK_TILE_ROWS
from kernels.paged_attention_prefill import PrefillChunk, PrefillRows, prefill_tiles
from kernels.sample import Draw, sample
from worker.batch import IN_FLIGHT, Batch, Int32s
from worker.kv_cache import PAGE_SIZE
from worker.logprobs import Logprobs, answer_logprobs, prompt_logprobs
from worker.model.config import TARGET_GROUPS
from worker.model.decoder import Decoder, DecoderInput, TrainedRows
from worker.sampler import Sampler
from worker.staging import Staging, send
from worker.step_arrays import StepArrays, step_arrays, total_size, views
from worker.step_graphs import Record, StepGraphs, cuda_recorder

log = structlog.get_logger()

#: No adapter of a batch replaces a weight.
NO_ROWS: Mapping[str, Sequence[TrainedRows]] = MappingProxyType({})


@dataclass(frozen=True)
class Launched:
    """A batch whose tokens are being computed."""

    batch: Batch
    tokens: torch.Tensor
    """[sampled] int32 on the host, once ``done`` has come."""
    began: torch.cuda.Event | None
    done: torch.cuda.Event | None
    logprobs: Logprobs | None
    """Of the tokens that the batch chose."""
    prompt_logprobs: Logprobs | None
    """Of the prompts' tokens that it has read."""

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
        self._max_length = max_pages * PAGE_SIZE
        self._unused_page = unused_page
        self.page_table[-1] = unused_page
        self.newest_tokens = torch.zeros(max_running + 1, dtype=torch.int32, device=device)
        self._sampler = Sampler(
            max_lines=max_running + 1, vocab_size=decoder.vocab_size, device=device
        )
        self._staging = Staging(device)
        self._token_staging = Staging(device)
        self._graphs: StepGraphs | None = None

    @torch.inference_mode()
    def warm_up(
        self, *, max_prefill_tokens: int, max_adapters: int, rank_levels: Sequence[int]
    ) -> None:
        """On a GPU, compile what batches need, take the memory of the largest, and make the CUDA
        graphs; ``rank_levels``: see ``StepGraphs``."""
        if self.device.type != "cuda":
            return
        self._draw_once()
        num_rows = max_prefill_tokens + self._max_running
        self._run_empty(num_rows, max(rank_levels, default=0), by_segments=False)
        if rank_levels:
            self._run_empty(num_rows, max(rank_levels), by_segments=True)
            # Few rows take other kernels, and those of the model's ends are in no graph.
            self._run_empty(min(num_rows, FEW_ROWS), max(rank_levels), by_segments=False)
        torch.cuda.empty_cache()  # As capturing does, which would count as memory won.
        started, free = time.monotonic(), torch.cuda.mem_get_info()[0]
        self.make_graphs(
            cuda_recorder(),
            max_prefill_tokens=max_prefill_tokens,
            max_adapters=max_adapters,
            rank_levels=rank_levels,
        )
        log.info(
            "graphs_captured",
            graphs=len(self._graphs or ()),
            seconds=round(time.monotonic() - started, 1),
            megabytes=(free - torch.cuda.mem_get_info()[0]) >> 20,
        )

    @torch.inference_mode()
    def make_graphs(
        self,
        record: Record,
        *,
        max_prefill_tokens: int,
        max_adapters: int,
        rank_levels: Sequence[int],
    ) -> None:
        """Let steps of many sizes be replayed from now on."""
        self._graphs = StepGraphs(
            self.forward,
            record,
            max_running=self._max_running,
            max_prefill_tokens=max_prefill_tokens,
            max_length=self._max_length,
            unused_page=self._unused_page,
            max_adapters=max_adapters,
            rank_levels=rank_levels,
            vocab_size=self.decoder.vocab_size,
            dtype=self.decoder.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """Start a batch; on a GPU returns before it is done."""
        began = self._mark()
        step = step_arrays(batch)
        replayed = None
        if self._graphs and batch.has_graph:
            replayed = self._graphs.replay(step, num_ranks=batch.num_ranks)
        logits, tokens = replayed or self._run(batch, step)
        # Behind the sampled rows stand the scored ones, of which only the logits are wanted.
        num_sampled = len(batch.sampled)
        of_prompts = prompt_logprobs(logits[num_sampled:], batch.scored) if batch.scored else None
        logits, tokens = logits[:num_sampled], tokens[:num_sampled]
        special = [(row, s) for row, s in enumerate(batch.sampled) if not s.is_plain]
        if special and self._sampler.choose(tokens, logits, special):
            lines = [sequence.line for sequence in batch.sampled]
            self.newest_tokens[send(lines, torch.int64, self.device)] = tokens
        of_answers = answer_logprobs(logits, tokens, special) if special else None
        if self.device.type != "cuda":
            return Launched(batch, tokens, None, None, of_answers, of_prompts)
        staged = self._token_staging.take(len(tokens))
        staged.copy_(tokens, non_blocking=True)
        return Launched(batch, staged, began, self._mark(), of_answers, of_prompts)

    def _run(self, batch: Batch, step: StepArrays[Int32s]) -> tuple[torch.Tensor, torch.Tensor]:
        on_device = self._upload(step)
        prefill_tiles = self._tiles(on_device.prefill_tiles)
        tiles = self._tiles(on_device.lora_tiles), self._tiles(on_device.shrink_tiles)
        end_tiles = {
            "embed_tokens": (self._tiles(on_device.embedding_tiles), None),
            "lm_head": (
                self._tiles(on_device.head_tiles),
                self._tiles(on_device.head_shrink_tiles),
            ),
        }
        lora = {}
        for group, segments in batch.group_segments.items():
            expand, shrink = end_tiles.get(group, tiles)
            gains = batch.group_gains.get(group, ())
            lora[group] = LoraRows(segments, expand, batch.num_ranks, shrink, gains)
        max_length = batch.max_decode_length
        if self.device.type == "cuda" and not batch.has_graph:
            # As in a graph: attention is compiled for each number of parts that this leads to.
            max_length = self._max_length
        return self.forward(
            on_device,
            max_length=max_length,
            prefill=PrefillRows(batch.chunks, prefill_tiles) if batch.chunks else None,
            lora=lora,
            trained=batch.trained,
        )

    def _tiles(self, numbers: torch.Tensor) -> torch.Tensor | None:
        """[tiles, 4]; None without any, or where the torch twins run, which go by segments."""
        if self.device.type != "cuda" or not len(numbers):
            return None
        return numbers.view(-1, 4)

    def forward(
        self,
        step: StepArrays[torch.Tensor],
        *,
        max_length: int,
        prefill: PrefillRows | None,
        lora: Mapping[str, LoraRows],
        trained: Mapping[str, Sequence[TrainedRows]] = NO_ROWS,
        logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [head rows, vocabulary] and the largest one's tokens [head rows], which become the
        newest ones of their sequences.

        ``logits``, if given, is where they are written. Nothing in here waits for the device, and
        all that differs from batch to batch of one size is read there: a CUDA graph can hold it.
        """
        line, place, page = step.page_updates.view(-1, 3).unbind(dim=1)
        self.page_table[line, place] = page
        newest = self.newest_tokens[step.lines]
        pages = self.page_table[step.lines, step.positions // PAGE_SIZE]
        logits = self.decoder.forward(
            DecoderInput(
                # NO_TOKEN of a sequence that is about to be dropped would be out of bounds.
                token_ids=torch.where(step.token_ids == IN_FLIGHT, newest, step.token_ids).clamp_(
                    0
                ),
                positions=step.positions,
                cache_rows=pages * PAGE_SIZE + step.positions % PAGE_SIZE,
                lines=step.lines[: len(step.lengths)],
                lengths=step.lengths,
                max_length=max_length,
                page_table=self.page_table,
                prefill=prefill,
                lora=lora,
                trained=trained,
                sampled_rows=step.sampled_rows,
            ),
            logits,
        )
        tokens = largest_token(logits)
        self.newest_tokens[step.sampled_lines] = tokens
        return logits, tokens

    def _draw_once(self) -> None:
        draws = send([Draw(0, 1.0, 2, 0.5, 0.5)], torch.float64, self.device)
        for dtype in {self.decoder.dtype, torch.float32}:  # As the model gives them, and processed.
            logits = torch.zeros(1, self.decoder.vocab_size, dtype=dtype, device=self.device)
            sample(largest_token(logits), logits, draws)

    def _run_empty(self, num_rows: int, num_ranks: int, *, by_segments: bool) -> None:
        """Run so many rows of prompts of nobody, on adapters of no rank among so many."""
        max_length = self._max_length
        no_line = self._max_running
        chunks = [
            PrefillChunk(row, end := min(row + max_length, num_rows), no_line, end - row)
            for row in range(0, num_rows, max_length)
        ]
        nothing = np.zeros(num_rows, np.int32)
        segment, sampled = Segment(0, num_rows, 0, 0), Segment(0, min(no_line, num_rows), 0, 0)
        step = StepArrays(
            token_ids=nothing,
            lines=nothing + no_line,
            positions=nothing,
            lengths=nothing[:0],
            page_updates=nothing[:0],
            sampled_rows=nothing[:no_line],
            sampled_lines=nothing[:no_line] + no_line,
            prefill_tiles=np.array(prefill_tiles(chunks), np.int32).ravel(),
            lora_tiles=np.array(lora_tiles([segment]), np.int32).ravel(),
            shrink_tiles=np.array(lora_tiles([segment], SHRINK_TILE_ROWS), np.int32).ravel(),
            embedding_tiles=nothing[:0],
            head_tiles=np.array(lora_tiles([sampled]), np.int32).ravel(),
            head_shrink_tiles=np.array(lora_tiles([sampled], SHRINK_TILE_ROWS), np.int32).ravel(),
        )
        on_device = self._upload(step)
        tiles, shrink_tiles = on_device.lora_tiles.view(-1, 4), on_device.shrink_tiles.view(-1, 4)
        rows = LoraRows([], tiles, num_ranks, shrink_tiles if by_segments else None)
        head_tiles, head_shrink_tiles = on_device.head_tiles, on_device.head_shrink_tiles
        head = LoraRows([], head_tiles.view(-1, 4), num_ranks, head_shrink_tiles.view(-1, 4))
        self.forward(
            on_device,
            max_length=0,
            prefill=PrefillRows(chunks, on_device.prefill_tiles.view(-1, 4)),
            lora=dict.fromkeys(TARGET_GROUPS, rows) | {"lm_head": head} if num_ranks else {},
        )

    def _upload(self, step: StepArrays[Int32s]) -> StepArrays[torch.Tensor]:
        sizes = [len(part) for part in step]
        staged = self._staging.take(total_size(sizes))
        for target, part in zip(views(staged, sizes), step, strict=True):
            target.numpy()[:] = part
        return views(staged.to(self.device, non_blocking=True), sizes)

    def _mark(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
