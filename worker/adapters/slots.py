"""The slots: places in the engine's memory that hold the adapters of a batch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from weakref import WeakKeyDictionary

import structlog
import torch

from worker.adapters.last_reads import LastReads
from worker.adapters.peft_format import Adapter
from worker.adapters.peft_targets import Place
from worker.model.config import END_MODULES, ModelConfig
from worker.model.lora_linear import LoraPlace, LoraWeights
from worker.model.weights import DecoderWeights

log = structlog.get_logger()

#: An adapter takes at least so many ranks: rows of 8 numbers of 2 bytes stay aligned to 16 bytes,
#: as the products need to be fast.
_LEAST_RANKS = 8

#: Numbers that are transposed at a time.
_BLOCK = 1 << 16

#: Page-locked memory is taken, and goes to the device, in pieces of about so many bytes: while the
#: driver locks pages, whoever launches a batch waits for it. The size that torch rounds up to.
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True, eq=False)
class _Factor:
    """A or B of one group of modules, for the ranks of all slots."""

    place: LoraPlace
    is_b: bool
    memory: torch.Tensor
    """Flat; a rank takes ``per_rank`` numbers of it."""
    per_rank: int

    def of_ranks(self, first: int, end: int) -> torch.Tensor:
        return self.memory[first * self.per_rank : end * self.per_rank]


@dataclass(frozen=True)
class _Piece:
    """Some of an adapter's factors, one behind the other in host memory."""

    memory: torch.Tensor
    factors: list[_Factor]

    def split(self, memory: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
        """What each of ``factors`` has in ``memory``, this one or a copy of it."""
        return torch.split(memory, [rank * factor.per_rank for factor in self.factors])


def rank_capacity(num_slots: int, max_rank: int) -> int:
    """Ranks that the slots hold together."""
    return num_slots * _rank_class(max_rank)


def rank_levels(capacity: int) -> list[int]:
    """Half, three quarters and all of the slots' ranks. A batch computes those up to the level that
    its adapters need: of 512 ranks of an 8B model, A takes 1.3 GB to read, 0.4 ms on an H100."""
    # Multiples of 16, since for strides of others Triton compiles its kernels anew.
    parts = (-(-capacity * quarters // 64) * 16 for quarters in (2, 3, 4))
    return sorted({min(capacity, part) for part in parts})


def spare_rows(
    model: ModelConfig, target_modules: Collection[str], capacity: int
) -> dict[str, int]:
    """Rows of A that ``capacity`` ranks take behind the base weight of each linear group that
    adapters may change."""
    return {
        group: len(parts) * capacity
        for group, parts in model.linear_groups.items()
        if not set(parts).isdisjoint(target_modules)
    }


class AdapterSlots:
    """Room for ``num_slots`` adapters of ``max_rank`` ranks, in all groups of modules.

    An adapter takes the next power of two of its rank, at least 8, at a multiple of that; so a
    smaller one leaves room for others, and whatever ``num_slots - 1`` adapters are in use, one of
    any rank finds a place that none of them touches. Groups without any of ``target_modules``
    have no weights at all.
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
        """``stacked``: base weights with ``spare_rows`` behind them for A; without it, A has memory
        of its own. ``policy``: whether the least recently used (``lru``) or the first that came
        (``fifo``) makes room."""
        self.num_slots = num_slots
        self.capacity = rank_capacity(num_slots, max_rank)
        #: Only where A is part of the base product do ranks cost time that nobody uses.
        self._levels = rank_levels(self.capacity) if stacked else [self.capacity]
        self._model = model
        self._device = device
        self._dtype = dtype
        self._first_ranks: dict[Adapter, int] = {}
        self._policy = policy
        #: Or came last, by ``fifo``.
        self._last_used: dict[Adapter, int] = {}
        self._clock = 0
        self.num_loads = 0
        self.pinned: frozenset[Adapter] = frozenset()
        """They stay where they stand whether they are in use or not."""
        self.stream: torch.cuda.Stream | None = None
        """On which weights come to a GPU, while the engine's computes."""
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._second_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._arriving: dict[Adapter, torch.cuda.Event] = {}
        self._last_reads = LastReads[torch.cuda.Event](self.capacity, _LEAST_RANKS)
        #: Page-locked, as long as anybody holds the adapter.
        self._on_host: WeakKeyDictionary[Adapter, list[_Piece]] = WeakKeyDictionary()
        self.weights: dict[LoraPlace, LoraWeights] = {
            (layer, group): self._make_weights(
                group, stacked.layers[layer].linears[group] if stacked else None
            )
            for layer in range(model.num_layers)
            for group in spare_rows(model, target_modules, self.capacity)
        }
        self.weights |= {
            (None, module): self._make_weights(module, None)
            for module in END_MODULES
            if module in target_modules
        }
        self._factors = [
            _Factor(place, memory is weights.b, memory.view(-1), memory.numel() // self.capacity)
            for place, weights in self.weights.items()
            for memory in (weights.a, weights.b)
        ]
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())  # It makes those zeros.

    @property
    def resident(self) -> list[str]:
        """Names of the adapters that stand in a slot."""
        # Other threads ask, while the engine's may be placing one: a copy is made in one step.
        return [adapter.name for adapter in list(self._first_ranks)]

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
        factors = self._factors_of(adapter)
        per_rank = sum(factor.per_rank * factor.memory.itemsize for factor in factors)
        return _rank_class(adapter.rank) * per_rank

    def _factors_of(self, adapter: Adapter) -> list[_Factor]:
        """What is read while the adapter has the slot: in the layers every adapter's rows go
        through all groups, zeros or not, but only those of adapters that change an end of the
        model through its."""
        return [
            factor
            for factor in self._factors
            if factor.place[0] is not None or factor.place[1] in adapter.target_groups
        ]

    def prepare(self, adapter: Adapter) -> None:
        """Lay out an adapter in page-locked host memory, for a GPU to copy while it computes.

        Its factors are views of that from now on: they are in memory once.
        """
        if self.stream and adapter not in self._on_host:
            self._on_host[adapter] = self._pack(adapter, page_locked=True)
            self._share(adapter, self._on_host[adapter])

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
        if self.stream is None or not adapters:
            return
        end = torch.cuda.current_stream().record_event()
        for adapter in adapters:
            self._last_reads.note(self._first_ranks[adapter], _rank_class(adapter.rank), end)

    @property
    def can_prefetch(self) -> bool:
        """Whether ``bring`` returns before the weights have come, and batches go on meanwhile."""
        return self.stream is not None

    def bring(self, adapter: Adapter, in_use: Collection[Adapter]) -> bool:
        """See that the adapter stands in a slot, or is on its way there; False if there is no room.

        It is the last one used from now on.
        """
        is_new = adapter not in self._first_ranks
        if is_new:
            first = self._make_room(_rank_class(adapter.rank), in_use)
            if first is None:
                return False
            self._load(adapter, first)
            self.num_loads += 1
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

    def _held_in(self, first: int, size: int) -> list[Adapter]:
        return [
            adapter
            for adapter, start in self._first_ranks.items()
            if start < first + size and first < start + _rank_class(adapter.rank)
        ]

    def _load(self, adapter: Adapter, first: int) -> None:
        """Copy an adapter's factors; linear modules that it leaves alone become zero."""
        pieces = self._on_host.get(adapter) or self._pack(adapter, page_locked=False)
        end = first + adapter.rank
        if self.stream is None:
            for piece in pieces:
                self._copy(piece, first, end)
            return
        # Batches that are launched may still read what stood there. (The product over all slots
        # reads what is half copied, too; nobody reads those columns of its result.)
        for read in self._last_reads.of(first, _rank_class(adapter.rank)):
            self.stream.wait_event(read)
        self._second_stream.wait_stream(self.stream)
        # On two streams in turn: one piece comes over the bus while the other is spread out.
        for piece, stream in zip(pieces, cycle((self.stream, self._second_stream)), strict=False):
            with torch.cuda.stream(stream):
                self._copy(piece, first, end)
        self.stream.wait_stream(self._second_stream)
        self._arriving[adapter] = self.stream.record_event()

    def _copy(self, piece: _Piece, first: int, end: int) -> None:
        # A copy from the host for each of the 256 factors of an 8B model takes the host longer than
        # the bus takes for an adapter of rank 16.
        arrived = piece.memory.to(self._device, non_blocking=True)
        targets = [factor.of_ranks(first, end) for factor in piece.factors]
        torch._foreach_copy_(targets, piece.split(arrived, end - first))

    def _pack(self, adapter: Adapter, *, page_locked: bool) -> list[_Piece]:
        """The adapter's factors in host memory; ranks that a module does not have are zero."""
        pieces = []
        for factors in _cut(self._factors_of(adapter), adapter.rank):
            size = adapter.rank * sum(factor.per_rank for factor in factors)
            memory = torch.empty(size, dtype=self._dtype, pin_memory=page_locked)
            piece = _Piece(memory, factors)
            for place, is_b, part in self._parts(piece, adapter.rank):
                given = adapter.factors.get(place)
                rank = given.rank if given else 0
                if given:
                    _copy_in_blocks(part[:rank], given.b if is_b else given.a)
                part[rank:] = 0
            pieces.append(piece)
        return pieces

    def _share(self, adapter: Adapter, pieces: Iterable[_Piece]) -> None:
        for piece in pieces:
            for place, is_b, part in self._parts(piece, adapter.rank):
                if given := adapter.factors.get(place):
                    ours = {"b" if is_b else "a": part[: given.rank]}
                    adapter.factors[place] = replace(given, **ours)

    def _parts(self, piece: _Piece, rank: int) -> Iterator[tuple[Place, bool, torch.Tensor]]:
        """What each module has in a piece: its place, whether it is B, and [rank, columns]."""
        for factor, memory in zip(piece.factors, piece.split(piece.memory, rank), strict=True):
            layer, group = factor.place
            modules = self._model.parts_of(group)
            if factor.is_b:
                part_sizes = self.weights[factor.place].part_sizes
                parts = torch.split(memory.view(rank, -1), list(part_sizes), dim=1)
            else:
                parts = memory.view(len(modules), rank, -1).unbind()
            for module, part in zip(modules, parts, strict=True):
                yield (layer, module), factor.is_b, part

    def _make_weights(self, group: str, stacked: torch.Tensor | None) -> LoraWeights:
        parts = self._model.parts_of(group)
        part_sizes = tuple(self._model.linear_shape(part)[0] for part in parts)

        def zeros(rows: int, columns: int) -> torch.Tensor:
            return torch.zeros(rows, columns, device=self._device, dtype=self._dtype)

        if stacked is None:
            a = zeros(len(parts) * self.capacity, self._model.linear_shape(parts[0])[1])
        else:
            a = stacked[sum(part_sizes) :]
        return LoraWeights(a, zeros(self.capacity, sum(part_sizes)), part_sizes, stacked)


def _copy_in_blocks(target: torch.Tensor, source: torch.Tensor) -> None:
    """Both [rank, columns]; B is stored transposed, and its cache lines are to be used while they
    are in the cache: 0.8 ms against 1.4 for rank 64 and 14336 columns of bfloat16."""
    columns = max(1, _BLOCK // len(source))
    blocks = zip(torch.split(target, columns, 1), torch.split(source, columns, 1), strict=True)
    for ours, theirs in blocks:
        ours.copy_(theirs)


def _rank_class(rank: int) -> int:
    """Ranks that an adapter takes: the next power of two."""
    return max(_LEAST_RANKS, 1 << (rank - 1).bit_length())


def _cut(factors: list[_Factor], rank: int) -> Iterator[list[_Factor]]:
    """Parts of the list whose bytes at that rank make up at most a piece, if there are several."""
    part: list[_Factor] = []
    num_bytes = 0
    for factor in factors:
        size = rank * factor.per_rank * factor.memory.itemsize
        if part and num_bytes + size > _PIECE_BYTES:
            yield part
            part, num_bytes = [], 0
        part.append(factor)
        num_bytes += size
    if part:
        yield part
