"""The slots: places in the engine's memory that hold the adapters of a batch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection

import structlog
import torch

from worker.adapters.last_reads import LastReads
from worker.adapters.peft_format import Adapter
from worker.adapters.slot_memory import SlotMemory
from worker.model.config import ModelConfig
from worker.model.weights import DecoderWeights

log = structlog.get_logger()

#: An adapter takes at least so many ranks: rows of 8 numbers of 2 bytes stay aligned to 16 bytes,
#: as the products need to be fast.
_LEAST_RANKS = 8


def rank_capacity(num_slots: int, max_rank: int) -> int:
    """Ranks that the slots hold together."""
    return num_slots * _rank_class(max_rank)


def rank_levels(capacity: int) -> list[int]:
    """Half, three quarters and all of the slots' ranks. A batch computes those up to the level that
    its adapters need: of 512 ranks of an 8B model, A takes 1.3 GB to read, 0.4 ms on an H100."""
    # Multiples of 16, since for strides of others Triton compiles its kernels anew.
    parts = (-(-capacity * quarters // 64) * 16 for quarters in (2, 3, 4))
    return sorted({min(capacity, part) for part in parts})


class AdapterSlots:
    """Room for ``num_slots`` adapters of ``max_rank`` ranks, in all groups of modules.

    An adapter takes the next power of two of its rank, at least 8, at a multiple of that; so a
    smaller one leaves room for others, and whatever ``num_slots - 1`` adapters are in use, one of
    any rank finds a place that none of them touches.
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
        stacked: DecoderWeights | None = None,
        policy: str = "lru",
    ) -> None:
        """``policy``: whether the least recently used (``lru``) or the first that came (``fifo``)
        makes room; what is not told here: see ``SlotMemory``."""
        self.num_slots = num_slots
        self.capacity = rank_capacity(num_slots, max_rank)
        #: Only where A is part of the base product do ranks cost time that nobody uses.
        self._levels = rank_levels(self.capacity) if stacked else [self.capacity]
        self.memory = SlotMemory(
            model,
            capacity=self.capacity,
            max_rank=max_rank,
            target_modules=target_modules,
            device=device,
            dtype=dtype,
            stacked=stacked,
        )
        self._first_ranks: dict[Adapter, int] = {}
        self._policy = policy
        #: Or came last, by ``fifo``.
        self._last_used: dict[Adapter, int] = {}
        self._clock = 0
        self.num_loads = 0
        self.on_load: Callable[[Adapter], None] = lambda adapter: None
        self.on_leave: Callable[[Adapter], None] = lambda adapter: None
        """Told what comes into a slot, and what leaves one, be it for another or for good."""
        self.pinned: frozenset[Adapter] = frozenset()
        """They stay where they stand whether they are in use or not."""
        self._arriving: dict[Adapter, torch.cuda.Event] = {}
        self._last_reads = LastReads[torch.cuda.Event](self.capacity, _LEAST_RANKS)

    @property
    def resident(self) -> list[Adapter]:
        """Those that stand in a slot."""
        # Other threads ask, while the engine's may be placing one: a copy is made in one step.
        return list(self._first_ranks)

    def first_rank(self, adapter: Adapter) -> int:
        """Where a resident adapter's ranks begin."""
        return self._first_ranks[adapter]

    def num_ranks(self, adapters: Collection[Adapter]) -> int:
        """Ranks up to the last one of these resident adapters, rounded up to a level."""
        if not adapters:
            return 0
        return self._level(max(self._first_ranks[a] + _rank_class(a.rank) for a in adapters))

    def _level(self, num_ranks: int) -> int:
        return self._levels[bisect_left(self._levels, num_ranks)]

    def num_bytes(self, adapter: Adapter) -> int:
        """Memory that the adapter takes in the slots, ranks up to its class included."""
        return _rank_class(adapter.rank) * self.memory.bytes_per_rank(adapter)

    def forget_all_but(self, adapters: Collection[Adapter]) -> None:
        """Let go of every other adapter."""
        for adapter in [a for a in self._first_ranks if a not in adapters]:
            self._vacate(adapter)

    def place(self, adapter: Adapter, in_use: Collection[Adapter]) -> int:
        """The first rank of the adapter, which is loaded, if need be, over one that is not in use.

        What the engine launches from now on finds its weights there. ``in_use`` are adapters that
        must stay. At most ``num_slots`` adapters, this one among them, are in use or pinned; the
        scheduler sees to that.
        """
        if not self.bring(adapter, in_use):
            raise RuntimeError(f"all {self.num_slots} slots are in use")
        if arrival := self._arriving.pop(adapter, None):
            torch.cuda.current_stream().wait_event(arrival)
        return self._first_ranks[adapter]

    def note_launched(self, adapters: Collection[Adapter]) -> None:
        """A batch that reads these resident adapters has been launched."""
        if not self.can_prefetch or not adapters:
            return
        end = torch.cuda.current_stream().record_event()
        for adapter in adapters:
            self._last_reads.note(self._first_ranks[adapter], _rank_class(adapter.rank), end)

    @property
    def can_prefetch(self) -> bool:
        """Whether ``bring`` returns before the weights have come, and batches go on meanwhile."""
        return self.memory.stream is not None

    def bring(self, adapter: Adapter, in_use: Collection[Adapter]) -> bool:
        """See that the adapter stands in a slot, or is on its way there; False if there is no room.

        It is the last one used from now on.
        """
        is_new = adapter not in self._first_ranks
        if is_new:
            first = self._make_room(_rank_class(adapter.rank), in_use)
            if first is None:
                return False
            # Batches that are launched may still read what stood there. (The product over all
            # slots reads what is half copied, too; nobody reads those columns of its result.)
            reads = self._last_reads.of(first, _rank_class(adapter.rank))
            if arrival := self.memory.load(adapter, first, after=reads):
                self._arriving[adapter] = arrival
            self.num_loads += 1
            self.on_load(adapter)
            self._first_ranks[adapter] = first
            megabytes = round(self.num_bytes(adapter) / 1e6, 1)
            log.info("adapter_loads", adapter=adapter.name, rank=adapter.rank, megabytes=megabytes)
        if is_new or self._policy == "lru":
            self._clock += 1
            self._last_used[adapter] = self._clock
        return True

    def _make_room(self, size: int, in_use: Collection[Adapter]) -> int | None:
        """Find an empty place of so many ranks, or evict what stands in one: as low a level as can
        be, and of those of one level what was left unused for longest."""
        best: tuple[bool, int, int, int] | None = None
        for first in range(0, self.capacity, size):
            held = self._held_in(first, size)
            if any(adapter in in_use or adapter in self.pinned for adapter in held):
                continue
            last_used = max((self._last_used[a] for a in held), default=0)
            candidate = bool(held), self._level(first + size), last_used, first
            best = candidate if best is None else min(best, candidate)
        if best is None:
            return None
        *_, first = best
        for adapter in self._held_in(first, size):
            self._vacate(adapter)
        return first

    def _vacate(self, adapter: Adapter) -> None:
        del self._first_ranks[adapter], self._last_used[adapter]
        self._arriving.pop(adapter, None)
        self.on_leave(adapter)

    def _held_in(self, first: int, size: int) -> list[Adapter]:
        return [
            adapter
            for adapter, start in self._first_ranks.items()
            if start < first + size and first < start + _rank_class(adapter.rank)
        ]


def _rank_class(rank: int) -> int:
    """Ranks that an adapter takes: the next power of two."""
    return max(_LEAST_RANKS, 1 << (rank - 1).bit_length())
