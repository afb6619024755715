"""The slots: places in the engine's memory that hold the adapters of a batch."""

from __future__ import annotations

from collections.abc import Collection

import torch

from kernels.lora_shrink import Segment
from worker.adapters.peft_format import Adapter
from worker.model.config import LINEAR_GROUPS, ModelConfig
from worker.model.lora_linear import LoraWeights


class AdapterSlots:
    """``num_slots`` places of ``max_rank`` ranks each, over all layers and linear groups.

    Weights of a group without any of ``target_modules`` are left out altogether.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        num_slots: int,
        max_rank: int,
        target_modules: Collection[str],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._max_rank = max_rank
        self._adapters: list[Adapter | None] = [None] * num_slots
        self._last_used = [0] * num_slots
        self._clock = 0
        groups = {
            group: parts
            for group, parts in LINEAR_GROUPS.items()
            if not set(parts).isdisjoint(target_modules)
        }

        def zeros(rows: int, columns: int) -> torch.Tensor:
            return torch.zeros(rows, columns, device=device, dtype=dtype)

        capacity = num_slots * max_rank
        self.weights: list[dict[str, LoraWeights]] = [
            {
                group: LoraWeights(
                    zeros(len(parts) * capacity, model.linear_shape(parts[0])[1]),
                    tuple(zeros(capacity, model.linear_shape(part)[0]) for part in parts),
                )
                for group, parts in groups.items()
            }
            for _ in range(model.num_layers)
        ]

    @property
    def num_slots(self) -> int:
        return len(self._adapters)

    @property
    def resident(self) -> list[str]:
        """Names of the adapters that stand in a slot."""
        return [adapter.name for adapter in self._adapters if adapter]

    def place(self, adapter: Adapter, in_use: Collection[Adapter]) -> int:
        """The slot that holds the adapter; loads it, if need be, over the least recently used one.

        ``in_use`` are adapters whose slots must stay. At most ``num_slots`` adapters, this one
        among them, are in use or pinned; the scheduler sees to that.
        """
        self._clock += 1
        slot = self._find(adapter)
        if slot is None:
            slot = self._least_recently_used(in_use)
            self._load(slot, adapter)
        self._last_used[slot] = self._clock
        return slot

    def groups(self, slot: int) -> list[str]:
        """The linear groups that the adapter of ``slot`` changes."""
        adapter = self._adapters[slot]
        assert adapter is not None
        return [
            group
            for group, parts in LINEAR_GROUPS.items()
            if not adapter.target_modules.isdisjoint(parts)
        ]

    def segment(self, slot: int, first_row: int, end_row: int) -> Segment:
        """Rows of a batch that run on the adapter of ``slot``."""
        adapter = self._adapters[slot]
        assert adapter is not None
        return Segment(first_row, end_row, slot * self._max_rank, adapter.rank)

    def _find(self, adapter: Adapter) -> int | None:
        return next((i for i, held in enumerate(self._adapters) if held is adapter), None)

    def _least_recently_used(self, in_use: Collection[Adapter]) -> int:
        free = [
            slot
            for slot, held in enumerate(self._adapters)
            if held is None or (held not in in_use and not held.pinned)
        ]
        if not free:
            raise RuntimeError(f"all {self.num_slots} slots are in use")
        return min(free, key=lambda slot: (self._adapters[slot] is not None, self._last_used[slot]))

    def _load(self, slot: int, adapter: Adapter) -> None:
        """Copy an adapter's factors; modules that it leaves alone become zero."""
        first, end = slot * self._max_rank, slot * self._max_rank + adapter.rank
        for layer, groups in enumerate(self.weights):
            for group, weights in groups.items():
                parts = LINEAR_GROUPS[group]
                a = weights.a[len(parts) * first : len(parts) * end].chunk(len(parts))
                for index, module in enumerate(parts):
                    factors = adapter.factors.get((layer, module))
                    b = weights.b[index][first:end]
                    if factors is None:
                        a[index].zero_()
                        b.zero_()
                    else:
                        a[index].copy_(factors.a)
                        b.copy_(factors.b)
        self._adapters[slot] = adapter
