"""Which sequences run in the next batch, and how many of their tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import NamedTuple

from worker.adapters.peft_format import Adapter
from worker.kv_cache import PagePool, num_pages
from worker.sequence import Phase, Sequence


class ScheduledSequence(NamedTuple):
    """A sequence's part in a batch: its next ``num_rows`` uncached tokens."""

    sequence: Sequence
    num_rows: int
    is_prefill: bool


class Scheduler:
    """Continuous batching: sequences join and leave at every step.

    Every decoding sequence that wants another token is in every batch. What the prefill limit
    leaves goes first to prompts already begun, then to waiting sequences, longest waiting first;
    one whose adapter would be one too many is passed over until an adapter has left. When pages
    run out, the sequence that began last gives its pages back and waits to be computed anew; the
    oldest always has room to go on.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_running: int,
        max_prefill_tokens: int,
        max_adapters: int,
        pinned: Collection[Adapter] = (),
    ) -> None:
        """``pinned`` adapters hold a slot even when no sequence uses them."""
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._max_running = max_running
        self._max_prefill_tokens = max_prefill_tokens
        self._max_adapters = max_adapters
        self._pinned = frozenset(pinned)
        self._free_lines = list(range(max_running - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        """Take in a sequence that fits into the cache by itself."""
        self.waiting.append(sequence)

    def schedule(self) -> list[ScheduledSequence]:
        """The next batch. Empty only if nothing is left to do, or all of it needs tokens that are
        in flight."""
        scheduled: list[ScheduledSequence] = []
        budget = self._max_prefill_tokens
        for sequence in list(self.running):
            # Else it was preempted for an older one, or gets its last token from a launched batch.
            if sequence.phase is Phase.RUNNING and sequence.num_generated < sequence.max_new_tokens:
                budget -= self._advance(sequence, budget, scheduled)
        self._admit(budget, scheduled)
        return scheduled

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands, and free its pages."""
        if sequence.phase is Phase.RUNNING:
            self._stop_running(sequence)
        elif sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        sequence.phase = Phase.FINISHED

    @property
    def adapters_in_use(self) -> set[Adapter]:
        """Adapters that hold a slot: the pinned ones and those of running sequences."""
        return {s.adapter for s in self.running if s.adapter} | self._pinned

    def _advance(self, sequence: Sequence, budget: int, scheduled: list[ScheduledSequence]) -> int:
        """Schedule a sequence's next token or chunk; returns what it takes of the budget."""
        is_prefill = sequence.num_uncached > 1
        num_rows = min(sequence.num_uncached, budget) if is_prefill else 1
        if num_rows == 0 or not self._grow(sequence, sequence.num_cached + num_rows):
            return 0
        scheduled.append(ScheduledSequence(sequence, num_rows, is_prefill))
        return num_rows if is_prefill else 0

    def _admit(self, budget: int, scheduled: list[ScheduledSequence]) -> None:
        adapters = self.adapters_in_use
        passed_over: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self._max_running:
            sequence = self.waiting.popleft()
            if sequence.num_in_flight:
                # Preempted a step ago. It goes on once its tokens are known, and nobody overtakes.
                self.waiting.appendleft(sequence)
                break
            if self._is_one_adapter_too_many(sequence, adapters):
                passed_over.append(sequence)
                continue
            # Room for the whole prompt and a page to go on, unless it has the cache to itself.
            wanted = num_pages(sequence.num_tokens) + bool(self.running)
            if wanted > self.pool.num_free:
                self.waiting.appendleft(sequence)
                break
            sequence.phase = Phase.RUNNING
            sequence.line = self._free_lines.pop()
            self.running.append(sequence)
            if sequence.adapter:
                adapters.add(sequence.adapter)
            budget -= self._advance(sequence, budget, scheduled)
        self.waiting.extendleft(reversed(passed_over))

    def _is_one_adapter_too_many(self, sequence: Sequence, adapters: set[Adapter]) -> bool:
        adapter = sequence.adapter
        return (
            adapter is not None and adapter not in adapters and len(adapters) >= self._max_adapters
        )

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a sequence pages for so many tokens, taking them from the youngest if need be.

        False if it was itself the youngest, and has been preempted.
        """
        needed = num_pages(num_tokens) - len(sequence.pages)
        while needed > self.pool.num_free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages += self.pool.allocate(max(needed, 0))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        sequence.phase = Phase.WAITING
        self.waiting.appendleft(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_lines.append(sequence.line)
        self.pool.free(sequence.pages)
        sequence.pages = []
        sequence.num_pages_told = sequence.num_cached = 0
