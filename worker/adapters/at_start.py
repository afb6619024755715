"""Reads the adapters of the command line, before there are batches to disturb."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from schemas.errors import BadInput
from worker.adapters.contained import contained
from worker.adapters.loader import AdapterLoader
from worker.adapters.peft_format import Adapter
from worker.adapters.readers import Readers
from worker.adapters.registry import AdapterRegistry, ReadAdapter
from worker.adapters.sources import FoundAdapter
from worker.config import WorkerConfig

#: Adapters that are read at a time.
_READERS = min(8, os.cpu_count() or 1)

#: Seconds for which reading is waited for before a signal is looked for.
_WAIT = 1.0


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
            with contained(lora.name):
                return registry.read(lora.name, lora.folder, version=0, source=lora.source)
        except BadInput as error:
            raise BadInput(f"--lora-paths {lora.name}: {error}") from error

    # What torch is told in a thread that reads, to compute alone, holds for all that begin later.
    num_threads = torch.get_num_threads()
    try:
        for lora, adapter in _in_order(read, found):
            registry.serve(lora.name, adapter)
    finally:
        torch.set_num_threads(num_threads)
    return registry


def _in_order(
    read: Callable[[FoundAdapter], ReadAdapter], found: Sequence[FoundAdapter]
) -> Iterator[tuple[FoundAdapter, ReadAdapter]]:
    """No more than ``_READERS`` are in memory that were not taken."""
    readers = Readers[str, ReadAdapter](at_a_time=_READERS)
    outcomes: dict[str, ReadAdapter | Exception] = {}
    for number, lora in enumerate(found):
        for following in found[number : number + _READERS]:
            if following.name not in outcomes:
                readers.want(following.name, partial(read, following))
        while lora.name not in outcomes:
            if first := readers.first(wait=_WAIT):
                outcomes.update([first])
                readers.done()
        outcome = outcomes.pop(lora.name)
        if isinstance(outcome, Exception):
            raise outcome
        yield lora, outcome
