"""The paged KV cache: its memory, and how many pages fit."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import psutil
import torch

from schemas.errors import BadInput
from worker.config import WorkerConfig
from worker.model.config import ModelConfig

#: Tokens in a page. Small pages waste little at a sequence's end; 16 keys of one head are 2 KB or
#: more even in a small model, enough to copy at full speed.
PAGE_SIZE = 16

#: If --mem-fraction-static does not say: on a CPU the part of the free memory that the KV cache
#: takes, on a GPU the part of the card for all that the worker has there.
DEFAULT_MEMORY_FRACTION = {"cpu": 0.5, "cuda": 0.85}


def num_pages(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)


def pages_that_fit(
    config: WorkerConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    context_length: int,
    beside: Callable[[], int],
) -> int:
    """Pages of the KV cache: as many as the flags say, or the memory holds, or all can use.

    ``beside`` finds out what running takes on a GPU beside weights, slots and cache, in bytes.
    Raises BadInput if the memory holds no page.
    """
    if config.max_total_tokens is not None:
        return num_pages(config.max_total_tokens)
    device = config.resolved_device.type
    fraction = config.mem_fraction_static or DEFAULT_MEMORY_FRACTION[device]
    if device == "cuda":
        # Of the whole card, the weights and slots that stand there already included; what loading
        # them left in the allocator's cache is free.
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        budget = int(total * fraction) - (total - free) - beside()
    else:
        budget = int(psutil.virtual_memory().available * fraction)
    tokens = budget // model.kv_bytes_per_token(dtype)
    if tokens < PAGE_SIZE:
        raise BadInput("--mem-fraction-static: no memory is left for the KV cache; raise it")
    return min(tokens // PAGE_SIZE, config.running_limit * num_pages(context_length))


class KVCache:
    """For each layer keys and values, each [pages, kv_heads, page_size, head_dim]."""

    def __init__(
        self, config: ModelConfig, pages: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (pages, config.num_kv_heads, PAGE_SIZE, config.head_dim)

        self.layers = [
            (_zeros(shape, device, dtype), _zeros(shape, device, dtype))
            for _ in range(config.num_layers)
        ]

    def clear(self, pages: list[int]) -> None:
        """Zero pages before a new owner gets them, where the kernels are the torch twins.

        They mask what another sequence left there, but a sequence that overflowed left NaN, and
        0 * NaN is NaN: one bad adapter would spoil its successors' answers. The Triton kernels do
        not even read it.
        """
        index = torch.tensor(pages, device=self.layers[0][0].device)
        for keys, values in self.layers:
            keys.index_fill_(0, index, 0)
            values.index_fill_(0, index, 0)


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """On a CPU by numpy, which asks the kernel for zeros: it makes them when a page is first used.
    torch.zeros writes, and so occupies, all of it at once: gigabytes that may never be needed.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
