"""CUDA graphs of decode steps."""

from __future__ import annotations

import gc
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
import structlog
import torch

from kernels.lora_segments import TILE_ROWS, LoraRows, lora_tiles
from worker.batch import Batch
from worker.model.config import LINEAR_GROUPS
from worker.staging import Staging

log = structlog.get_logger()

Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class DecodeGraphs:
    """CUDA graphs of steps in which every sequence decodes: without them the host would take
    longer to launch the kernels of such a step than the GPU to run them."""

    def __init__(
        self,
        forward: Forward,
        *,
        max_running: int,
        max_length: int,
        unused_page: int,
        max_adapters: int,
        num_ranks: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``forward``: ``ModelRunner.forward``; ``max_length``: tokens of the longest sequence;
        ``num_ranks``: of the slots, 0 without."""
        started, free = time.monotonic(), torch.cuda.mem_get_info()[0]
        pool = torch.cuda.graph_pool_handle()
        # All graphs write to one: it is read, if at all, before the next one runs.
        logits = torch.empty(max_running, vocab_size, dtype=dtype, device=device)
        # The largest first: the others find all the memory they need in its.
        sizes = sorted(_graph_sizes(max_running), reverse=True)
        # A graph that the collector finds here, an engine's before this one, could not be freed
        # while another is captured.
        gc.collect()
        self._graphs = {
            (size, has_adapters): _DecodeGraph(
                forward,
                size,
                max_length=max_length,
                num_ranks=num_ranks if has_adapters else 0,
                max_tiles=size // TILE_ROWS + max_adapters + 1,
                unused=(max_running, unused_page),
                logits=logits[:size],
                pool=pool,
                device=device,
            )
            for size in sizes
            for has_adapters in ([False, True] if num_ranks else [False])
        }
        self._sizes = sizes[::-1]
        log.info(
            "graphs_captured",
            graphs=len(self._graphs),
            seconds=round(time.monotonic() - started, 1),
            megabytes=(free - torch.cuda.mem_get_info()[0]) >> 20,
        )

    def replay(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits and tokens of a batch; None if there is no graph for it."""
        if batch.chunks:
            return None
        size = self._sizes[bisect_left(self._sizes, batch.num_rows)]
        return self._graphs[size, bool(batch.adapters)].replay(batch)


def _graph_sizes(max_running: int) -> list[int]:
    """Batch sizes with a graph, up to the largest; between them rows are there for nothing."""
    sizes = [1, 2, 4, 8, *range(16, 257, 16), *range(288, 513, 32), *range(576, 4097, 64)]
    return [*(size for size in sizes if size < max_running), max_running]


class _DecodeGraph:
    """One graph: a decode step of ``size`` rows."""

    def __init__(
        self,
        forward: Forward,
        size: int,
        *,
        max_length: int,
        num_ranks: int,
        max_tiles: int,
        unused: tuple[int, int],
        logits: torch.Tensor,
        pool: Any,
        device: torch.device,
    ) -> None:
        """``unused``: the line of the page table, and its page, of rows without sequence;
        ``logits``: [size, vocabulary], where they are written."""
        self._size = size
        self._logits = logits
        self._staging = Staging(device)
        self._template = np.zeros(6 * size + 4 * max_tiles, np.int32)
        line, page = unused
        self._template[size : 2 * size] = line
        # An update that changes nothing.
        self._template[3 * size : 6 * size].reshape(-1, 3)[:] = line, 0, page
        self._numbers = torch.from_numpy(self._template).to(device)
        token_ids, lines, positions, page_updates, tiles = torch.split(
            self._numbers, [size, size, size, 3 * size, 4 * max_tiles]
        )
        lora = LoraRows([], tiles.view(-1, 4), num_ranks)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            return forward(
                *(token_ids, lines, positions, page_updates.view(-1, 3)),
                sampled_rows=None,
                num_decode_rows=size,
                max_length=max_length,
                prefill=None,
                lora=dict.fromkeys(LINEAR_GROUPS, lora) if num_ranks else {},
                logits=logits,
            )

        run()  # Kernels are compiled and libraries loaded outside of the graph.
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            _, self._tokens = run()

    def replay(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        size, n_rows = self._size, batch.num_rows
        staged = self._staging.take(len(self._template))
        numbers = staged.numpy()
        numbers[:] = self._template
        numbers[:n_rows] = batch.token_ids
        numbers[size : size + n_rows] = batch.lines
        numbers[2 * size : 2 * size + n_rows] = batch.positions
        updates = batch.page_updates.ravel()
        numbers[3 * size : 3 * size + len(updates)] = updates
        if batch.adapters:
            tiles = np.array(lora_tiles(batch.segments), np.int32).ravel()
            numbers[6 * size : 6 * size + len(tiles)] = tiles
        self._numbers.copy_(staged, non_blocking=True)
        self._graph.replay()
        return self._logits[:n_rows], self._tokens[:n_rows]
