"""Keeps the slots, and the scheduler's idea of them, in line with the registry."""

from __future__ import annotations

from functools import partial
from itertools import chain

from worker.adapters.registry import AdapterRegistry
from worker.adapters.slots import AdapterSlots
from worker.scheduler import Scheduler


class AdapterResidency:
    """Used by the engine's thread alone, between steps."""

    def __init__(
        self, registry: AdapterRegistry, slots: AdapterSlots, scheduler: Scheduler
    ) -> None:
        self._registry = registry
        self._slots = slots
        self._scheduler = scheduler
        self._seen_generation = -1
        self._is_behind = False
        slots.on_load = partial(registry.count_in_slot, loads=1)
        slots.on_leave = partial(registry.count_in_slot, evictions=1)

    def follow(self) -> None:
        """Pin, and let go of, what the registry says. What sequences still use goes after them, and
        an adapter that was pinned while others hold all slots gets the next free one: until then
        its sequences wait for a slot as any others."""
        if self._seen_generation == self._registry.generation and not self._is_behind:
            return
        self._seen_generation = self._registry.generation
        scheduler, slots = self._scheduler, self._slots
        sequences = chain(scheduler.running, scheduler.waiting)
        in_use = {sequence.adapter for sequence in sequences if sequence.adapter}
        loaded, pinned = self._registry.loaded, frozenset(self._registry.pinned)
        slots.pinned = scheduler.pinned = scheduler.pinned & pinned
        slots.forget_all_but(loaded | in_use)
        for adapter in pinned - scheduler.pinned:
            if scheduler.has_slot_for(adapter) and slots.bring(adapter, scheduler.adapters_in_use):
                slots.pinned = scheduler.pinned = scheduler.pinned | {adapter}
        self._is_behind = not (in_use <= loaded and scheduler.pinned == pinned)

    def prefetch(self) -> None:
        """Send the weights of the adapters that are next to get a slot on their way."""
        if not self._slots.can_prefetch:
            return
        following = self._scheduler.next_adapters()
        for adapter in following:
            self._slots.bring(adapter, self._scheduler.adapters_in_use.union(following))
