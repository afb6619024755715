"""What the slots consist of: A and B for all their ranks, and the way of an adapter there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from kernels.lora_spread import lora_spread, spread_table
from worker.adapters.peft_format import Adapter
from worker.adapters.peft_targets import Place
from worker.model.config import END_MODULES, ModelConfig
from worker.model.lora_linear import LoraPlace, LoraWeights
from worker.model.weights import DecoderWeights

T = TypeVar("T")

#: Numbers that are transposed at a time.
_BLOCK = 1 << 16

#: Page-locked memory is taken in pieces of about so many bytes: while the driver locks pages,
#: whoever launches a batch waits for it. The size that torch rounds up to.
_PIECE_BYTES = 8 << 20

#: So many bytes come over the bus before they are spread over the slots. Fewer cost the host
#: more: 84 MB, rank 16 of an 8B model, by pieces 0.8 ms, by these 0.4.
_LEG_BYTES = 4 * _PIECE_BYTES


@dataclass(frozen=True, eq=False)
class _Factor:
    """A or B of one group of modules, for the ranks of all slots."""

    place: LoraPlace
    is_b: bool
    memory: torch.Tensor
    """[capacity, numbers of a rank]"""

    @property
    def per_rank(self) -> int:
        return self.memory.shape[1]


@dataclass(frozen=True)
class _Piece:
    """Some of an adapter's factors, one behind the other in host memory."""

    memory: torch.Tensor
    factors: range
    """Which ones of ``SlotMemory``."""


@dataclass(frozen=True)
class _Way:
    """From the host to the slots, while the engine's stream computes."""

    stream: torch.cuda.Stream
    landing: torch.Tensor
    """Flat; what has come over the bus and is not yet spread over the slots."""


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


def bytes_of_slots(
    model: ModelConfig, target_modules: Collection[str], capacity: int, dtype: torch.dtype
) -> int:
    """Memory that A and B of ``capacity`` ranks take."""
    per_rank = 0
    for group, rows in spare_rows(model, target_modules, 1).items():
        in_features = model.linear_shape(model.parts_of(group)[0])[1]
        per_rank += model.num_layers * (rows * in_features + model.out_features(group))
    per_rank += sum(sum(model.linear_shape(end)) for end in END_MODULES if end in target_modules)
    return capacity * per_rank * dtype.itemsize


class SlotMemory:
    """A and B of all groups of modules that adapters may change, for ``capacity`` ranks.

    On the host an adapter is packed as it will stand here, but for other ranks between its own.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        capacity: int,
        max_rank: int,
        target_modules: Collection[str],
        device: torch.device,
        dtype: torch.dtype,
        stacked: DecoderWeights | None,
    ) -> None:
        """``stacked``: base weights with ``spare_rows`` behind them for A; without it, A has memory
        of its own. Groups without any of ``target_modules`` have no weights at all."""
        self._model = model
        self._capacity = capacity
        self._device = device
        self._dtype = dtype
        linears: list[LoraPlace] = [
            (layer, group)
            for layer in range(model.num_layers)
            for group in spare_rows(model, target_modules, capacity)
        ]
        # One end before the layers and one behind: an adapter's factors are neighbours, whichever
        # ends it changes.
        before, behind = ([(None, end)] if end in target_modules else [] for end in END_MODULES)
        self.weights: dict[LoraPlace, LoraWeights] = {
            place: self._make_weights(place, stacked) for place in (*before, *linears, *behind)
        }
        self._factors = [
            _Factor(place, memory is weights.b, memory.view(capacity, -1))
            for place, weights in self.weights.items()
            for memory in (weights.a, weights.b)
        ]
        self._table = spread_table([factor.memory for factor in self._factors], device)
        #: Page-locked, as long as anybody holds the adapter.
        self._on_host: WeakKeyDictionary[Adapter, list[_Piece]] = WeakKeyDictionary()
        #: On two in turn: one leg comes over the bus while the other is spread out.
        self._ways = [self._make_way(max_rank) for _ in range(2)] if device.type == "cuda" else []

    def _make_way(self, max_rank: int) -> _Way:
        sizes = [max_rank * factor.per_rank for factor in self._factors]
        size = min(sum(sizes), max(_LEG_BYTES // self._dtype.itemsize, *sizes, 0))
        landing = torch.empty(size, device=self._device, dtype=self._dtype)
        # Nothing, so that the kernel is compiled before a batch would wait for that.
        self._spread(landing[:0], range(len(self._factors)), first_rank=0, rank=0)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())  # It makes the factors zero.
        return _Way(stream, landing)

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """On which adapters come to a GPU; None where they have come when ``load`` returns."""
        return self._ways[0].stream if self._ways else None

    def bytes_per_rank(self, adapter: Adapter) -> int:
        """Memory that each rank of the adapter takes here."""
        factors = (self._factors[number] for number in self._factors_of(adapter))
        return sum(factor.per_rank * factor.memory.itemsize for factor in factors)

    def prepare(self, adapter: Adapter) -> None:
        """Lay out an adapter in page-locked host memory, for a GPU to copy while it computes.

        Its factors are views of that from now on: they are in memory once.
        """
        if self._ways and adapter not in self._on_host:
            self._on_host[adapter] = self._pack(adapter, page_locked=True)
            self._share(adapter, self._on_host[adapter])

    def load(
        self, adapter: Adapter, first_rank: int, after: Iterable[torch.cuda.Event]
    ) -> torch.cuda.Event | None:
        """Copy an adapter's factors; linear modules that it leaves alone become zero.

        On a GPU that begins after the events of ``after``, and ends by the one that is returned.
        """
        pieces = self._on_host.get(adapter) or self._pack(adapter, page_locked=False)
        if not self._ways:
            for piece in pieces:
                self._spread(piece.memory, piece.factors, first_rank, adapter.rank)
            return None
        stream, second_stream = (way.stream for way in self._ways)
        for event in after:
            stream.wait_event(event)
        second_stream.wait_stream(stream)
        legs = _runs(pieces, lambda piece: piece.memory.nbytes, _LEG_BYTES)
        for leg, way in zip(legs, cycle(self._ways), strict=False):
            with torch.cuda.stream(way.stream):
                self._bring(leg, way.landing, first_rank, adapter.rank)
        stream.wait_stream(second_stream)
        arrival: torch.cuda.Event = stream.record_event()
        return arrival

    def _bring(self, leg: list[_Piece], landing: torch.Tensor, first_rank: int, rank: int) -> None:
        pieces = [piece.memory for piece in leg]
        sizes = [piece.numel() for piece in pieces]
        arrived = landing[: sum(sizes)]
        torch._foreach_copy_(torch.split(arrived, sizes), pieces, non_blocking=True)
        factors = range(leg[0].factors.start, leg[-1].factors.stop)
        self._spread(arrived, factors, first_rank, rank)

    def _spread(self, packed: torch.Tensor, factors: range, first_rank: int, rank: int) -> None:
        if factors:
            targets = [self._factors[number].memory for number in factors]
            table = self._table[factors.start : factors.stop]
            lora_spread(packed, targets, table, first_rank, rank)

    def _factors_of(self, adapter: Adapter) -> range:
        """What is read while the adapter has the slot: in the layers every adapter's rows go
        through all groups, zeros or not, but only those of adapters that change an end of the
        model through its."""
        read = [
            number
            for number, factor in enumerate(self._factors)
            if factor.place[0] is not None or factor.place[1] in adapter.target_groups
        ]
        return range(read[0], read[-1] + 1) if read else range(0)

    def _pack(self, adapter: Adapter, *, page_locked: bool) -> list[_Piece]:
        """The adapter's factors in host memory; ranks that a module does not have are zero."""
        pieces = []
        for numbers in _runs(
            self._factors_of(adapter),
            lambda number: adapter.rank * self._factors[number].per_rank * self._dtype.itemsize,
            _PIECE_BYTES,
        ):
            size = adapter.rank * sum(self._factors[number].per_rank for number in numbers)
            memory = torch.empty(size, dtype=self._dtype, pin_memory=page_locked)
            piece = _Piece(memory, range(numbers[0], numbers[-1] + 1))
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
        factors = [self._factors[number] for number in piece.factors]
        memories = torch.split(piece.memory, [rank * factor.per_rank for factor in factors])
        for factor, memory in zip(factors, memories, strict=True):
            layer, group = factor.place
            modules = self._model.parts_of(group)
            if factor.is_b:
                part_sizes = self.weights[factor.place].part_sizes
                parts = torch.split(memory.view(rank, -1), list(part_sizes), dim=1)
            else:
                parts = memory.view(len(modules), rank, -1).unbind()
            for module, part in zip(modules, parts, strict=True):
                yield (layer, module), factor.is_b, part

    def _make_weights(self, place: LoraPlace, stacked: DecoderWeights | None) -> LoraWeights:
        layer, group = place
        parts = self._model.parts_of(group)
        part_sizes = tuple(self._model.linear_shape(part)[0] for part in parts)

        def zeros(rows: int, columns: int) -> torch.Tensor:
            return torch.zeros(rows, columns, device=self._device, dtype=self._dtype)

        b = zeros(self._capacity, sum(part_sizes))
        if stacked is None or layer is None:
            a = zeros(len(parts) * self._capacity, self._model.linear_shape(parts[0])[1])
            return LoraWeights(a, b, part_sizes, None)
        under = stacked.layers[layer].linears[group]
        return LoraWeights(under[sum(part_sizes) :], b, part_sizes, under)


def _copy_in_blocks(target: torch.Tensor, source: torch.Tensor) -> None:
    """Both [rank, columns]; B is stored transposed, and its cache lines are to be used while they
    are in the cache: 0.8 ms against 1.4 for rank 64 and 14336 columns of bfloat16."""
    columns = max(1, _BLOCK // len(source))
    blocks = zip(torch.split(target, columns, 1), torch.split(source, columns, 1), strict=True)
    for ours, theirs in blocks:
        ours.copy_(theirs)


def _runs(items: Iterable[T], size_of: Callable[[T], int], bound: int) -> Iterator[list[T]]:
    """The items in lists whose sizes make up at most ``bound``, where there are several in one."""
    run: list[T] = []
    total = 0
    for item in items:
        size = size_of(item)
        if run and total + size > bound:
            yield run
            run, total = [], 0
        run.append(item)
        total += size
    if run:
        yield run
