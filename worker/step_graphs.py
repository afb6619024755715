"""CUDA graphs of steps."""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

from kernels.blas import choosing_libraries
from kernels.lora_segments import TILE_ROWS, LoraRows
from kernels.paged_attention_prefill import PREFILL_TILE, PrefillRows
from worker.batch import Int32s
from worker.model.config import LINEAR_GROUPS
from worker.staging import Staging
from worker.step_arrays import MAX_MIXED_ROWS, StepArrays, total_size, views

Output = tuple[torch.Tensor, torch.Tensor]
Forward = Callable[..., Output]

#: Runs something once, and returns its output and what runs it again into that same output.
Record = Callable[[Callable[[], Output]], tuple[Output, Callable[[], None]]]

#: Prompts in such a step: with graphs of 1,024 rows more than this are rare, and run without one.
_MAX_CHUNKS = 16


def cuda_recorder() -> Record:
    """Records CUDA graphs that share their memory: no two may run at once."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        with choosing_libraries():
            run()  # Kernels are compiled and libraries loaded outside of the graph, too.
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = run()
        return output, graph.replay

    return record


class StepGraphs:
    """CUDA graphs of decode steps and of steps with a few prompts: without them the host takes
    longer to launch the kernels of such a step than the GPU to run them."""

    def __init__(
        self,
        forward: Forward,
        record: Record,
        *,
        max_running: int,
        max_prefill_tokens: int,
        max_length: int,
        unused_page: int,
        max_adapters: int,
        rank_levels: Sequence[int],
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``forward``: ``ModelRunner.forward``; ``max_length``: tokens of the longest sequence;
        ``rank_levels``: numbers of the slots' ranks that a batch may need, beside none."""
        # All graphs write to one: it is read, if at all, before the next one runs.
        logits = torch.empty(max_running, vocab_size, dtype=dtype, device=device)
        staging = Staging(device)
        sizes = {
            False: _decode_sizes(max_running),
            True: _mixed_sizes(max_running + max_prefill_tokens),
        }
        # A graph that the collector finds here, an engine's before this one, could not be freed
        # while another is captured.
        gc.collect()
        # The largest first: the others find all the memory they need in its.
        self._graphs = {
            (is_mixed, size, ranks): _StepGraph(
                forward,
                record,
                size,
                is_mixed=is_mixed,
                max_length=max_length,
                num_ranks=ranks,
                max_segments=(1 + is_mixed) * (max_adapters + 1),
                unused=(max_running, unused_page),
                logits=logits[:size],
                staging=staging,
                device=device,
            )
            for is_mixed in (True, False)
            for size in reversed(sizes[is_mixed])
            for ranks in (0, *rank_levels)
        }
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._graphs)

    def replay(self, step: StepArrays[Int32s], *, num_ranks: int) -> Output | None:
        """Logits and tokens of a batch that needs so many ranks; None if it has no graph."""
        is_mixed = len(step.prefill_tiles) > 0
        sizes = self._sizes[is_mixed]
        place = bisect_left(sizes, len(step.token_ids))
        if place == len(sizes):
            return None
        return self._graphs[is_mixed, sizes[place], num_ranks].replay(step)


def _decode_sizes(max_running: int) -> list[int]:
    """Rows of the graphs of decode steps; between them rows are there for nothing."""
    sizes = [1, 2, 4, 8, *range(16, 257, 16), *range(288, 513, 32), *range(576, 4097, 64)]
    return [*(size for size in sizes if size < max_running), max_running]


def _mixed_sizes(max_rows: int) -> list[int]:
    """Rows of the graphs of steps with prompts. Those that fill up a graph cost what others do, 4%
    of an H100's time for products; sizes at every 32 rows were no faster (docs/gpu.md)."""
    return list(range(64, min(-(-max_rows // 64) * 64, MAX_MIXED_ROWS) + 1, 64))


class _StepGraph:
    """One graph: a step of up to ``size`` rows."""

    def __init__(
        self,
        forward: Forward,
        record: Record,
        size: int,
        *,
        is_mixed: bool,
        max_length: int,
        num_ranks: int,
        max_segments: int,
        unused: tuple[int, int],
        logits: torch.Tensor,
        staging: Staging,
        device: torch.device,
    ) -> None:
        """``unused``: the line of the page table, and its page, of rows without sequence;
        ``logits``: [most sequences, vocabulary], where they are written."""
        line, page = unused
        num_sampled = len(logits)
        num_lora_tiles = size // TILE_ROWS + max_segments if num_ranks else 0
        num_prefill_tiles = size // PREFILL_TILE + _MAX_CHUNKS if is_mixed else 0
        self._logits = logits
        self._sizes = StepArrays(
            *(size, size, size, num_sampled, 3 * size, num_sampled, num_sampled),
            *(4 * num_prefill_tiles, 4 * num_lora_tiles, 0, 0, 0, 0),
        )
        self._staging = staging
        # Rows, tiles and updates that do nothing.
        self._template = torch.zeros(total_size(self._sizes), dtype=torch.int32)
        template = views(self._template, self._sizes)
        template.lines.fill_(line)
        template.sampled_lines.fill_(line)
        template.page_updates.view(-1, 3)[:] = torch.tensor([line, 0, page])
        self._numbers = self._template.to(device, copy=True)
        step = views(self._numbers, self._sizes)
        lora = LoraRows([], step.lora_tiles.view(-1, 4), num_ranks)

        def run() -> Output:
            return forward(
                step,
                max_length=max_length,
                prefill=PrefillRows([], step.prefill_tiles.view(-1, 4)) if is_mixed else None,
                lora=dict.fromkeys(LINEAR_GROUPS, lora) if num_ranks else {},
                logits=logits,
            )

        (_, self._tokens), self._run_again = record(run)

    def replay(self, step: StepArrays[Int32s]) -> Output | None:
        """Logits and tokens; None if the batch has more of something than the graph."""
        if any(len(part) > size for part, size in zip(step, self._sizes, strict=True)):
            return None
        staged = self._staging.take(len(self._template))
        staged.copy_(self._template)
        for target, part in zip(views(staged, self._sizes), step, strict=True):
            target.numpy()[: len(part)] = part
        self._numbers.copy_(staged, non_blocking=True)
        self._run_again()
        num_sampled = len(step.sampled_rows)
        return self._logits[:num_sampled], self._tokens[:num_sampled]
