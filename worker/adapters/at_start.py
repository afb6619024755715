"""Reads the adapters of the command line, before there are batches to disturb."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from schemas.errors import BadInput
from worker.adapters.loader import AdapterLoader
from worker.adapters.peft_format import Adapter
from worker.adapters.registry import AdapterRegistry, ReadAdapter
from worker.adapters.sources import FoundAdapter
from worker.config import WorkerConfig

#: Adapters that are read at a time.
_READERS = min(8, os.cpu_count() or 1)


def load_registry(
    config: WorkerConfig,
    found: Sequence[FoundAdapter],
    loader: AdapterLoader,
    prepare: Callable[[Adapter], None] | None = None,
) -> AdapterRegistry:
    """Load the adapters of ``--lora-paths``; raises BadInput for the first that cannot be served.

    ``prepare``: see ``AdapterRegistry``.
    """
    registry = AdapterRegistry(
        loader, max_loaded=config.max_loaded_loras, policy=config.lora_eviction_policy
    )
    if prepare:
        registry.prepare = prepare
    registry.pin(lora.name for lora in found if lora.pinned)

    def read(lora: FoundAdapter) -> ReadAdapter:
        try:
            return registry.read(lora.name, lora.folder, version=0, source=lora.source)
        except BadInput as error:
            raise BadInput(f"--lora-paths {lora.name}: {error}") from error

    # Each thread computes alone: several that share the work of every operation would wait. What
    # torch is told in one thread holds for all that begin later, too.
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(_READERS, "read", torch.set_num_threads, (1,)) as readers:
            for lora, adapter in _in_order(readers, read, found):
                registry.serve(lora.name, adapter)
    finally:
        torch.set_num_threads(num_threads)
    return registry


def _in_order(
    readers: ThreadPoolExecutor,
    read: Callable[[FoundAdapter], ReadAdapter],
    found: Sequence[FoundAdapter],
) -> Iterator[tuple[FoundAdapter, ReadAdapter]]:
    """As ``readers.map`` would, but no more than ``_READERS`` are in memory that were not taken."""
    ahead = deque[tuple[FoundAdapter, Future[ReadAdapter]]]()
    for lora in found:
        ahead.append((lora, readers.submit(read, lora)))
        if len(ahead) == _READERS:
            first, future = ahead.popleft()
            yield first, future.result()
    for first, future in ahead:
        yield first, future.result()
