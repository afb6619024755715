"""Which sequences run in the next batch, and how many of their tokens."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from worker.adapters.peft_format import Adapter
from worker.config import PATIENCE
from worker.kv_cache import PAGE_SIZE, num_pages
from worker.page_pool import PagePool
from worker.sequence import Phase, Sequence
from worker.waiting import Group, Waiting

#: Once in so many rounds the adapter with the most waiting sequences takes rows in turn with the
#: others, and not only what they leave: else it stood still while they always have some.
FULLEST_IN_TURN = 4


#: Rows of prompts in a batch whose logits are wanted. For a vocabulary of 128,256 their logits in
#: float32 take 131 MB, and as log probabilities as much again.
MAX_SCORED_ROWS = 256


class ScheduledSequence(NamedTuple):
    """A sequence's part in a batch: its next ``num_rows`` uncached tokens."""

    sequence: Sequence
    num_rows: int
    is_prefill: bool


class Scheduler:
    """Continuous batching: sequences join and leave at every step.

    Every decoding sequence that wants another token is in every batch. What the prefill limit
    leaves goes first to prompts already begun, then to preempted sequences, then to new ones of the
    base model and of the adapters that have a slot, adapter by adapter in turn. One slot is for the
    adapter with the most waiting sequences, which fill the batch; the others go to those with the
    fewest, which soon make room for the next (docs/decisions/0006). When pages run out, the
    sequence that began last gives its pages back and waits to be computed anew; the oldest always
    has room to go on.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_running: int,
        max_prefill_tokens: int,
        max_adapters: int,
        pinned: Collection[Adapter] = (),
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``pinned`` adapters hold a slot even when no sequence uses them; one may be added when
        ``has_slot_for`` says so. ``patience`` is in seconds of ``clock``."""
        self.pool = pool
        self.waiting = Waiting()
        self.running: list[Sequence] = []
        self._max_running = max_running
        self._max_prefill_tokens = max_prefill_tokens
        self._max_adapters = max_adapters
        self.pinned = frozenset(pinned)
        self._patience = patience
        self._clock = clock
        self._num_running: Counter[Adapter] = Counter()
        """Running sequences of each adapter that has any, in the order in which they got a slot."""
        self._draining: Adapter | None = None
        """Gets no new sequences, so that its slot becomes free."""
        self._num_rounds = 0
        """In which waiting sequences could begin."""
        self._num_scorable = 0
        """Rows of prompts whose logits the batch that is laid out can still give."""
        self._free_lines = list(range(max_running - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        """Take in a sequence that fits into the cache by itself."""
        self.waiting.add(sequence, self._clock())

    def schedule(self) -> list[ScheduledSequence]:
        """The next batch. Empty only if nothing is left to do, or all of it needs tokens that are
        in flight."""
        scheduled: list[ScheduledSequence] = []
        budget, self._num_scorable = self._max_prefill_tokens, MAX_SCORED_ROWS
        for sequence in list(self.running):
            # Else it was preempted for an older one, or gets its last token from a launched batch.
            if sequence.phase is Phase.RUNNING and sequence.num_generated < sequence.max_new_tokens:
                budget -= self._advance(sequence, budget, scheduled)
        if self.waiting:
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
        return self._num_running.keys() | self.pinned

    def has_slot_for(self, adapter: Adapter | None) -> bool:
        """Whether it needs none, holds one or finds one free."""
        in_use = self.adapters_in_use
        return adapter is None or adapter in in_use or len(in_use) < self._max_adapters

    def next_adapters(self, count: int = 2) -> list[Adapter]:
        """Adapters that wait for a slot: at most ``count``, the next to get one first."""
        slotless = self._slotless(self._clock())[:count]
        return [group.adapter for group in slotless if group.adapter]

    def _advance(self, sequence: Sequence, budget: int, scheduled: list[ScheduledSequence]) -> int:
        """Schedule a sequence's next token or chunk; returns what it takes of the budget."""
        is_prefill = sequence.num_uncached > 1
        num_rows = min(sequence.num_uncached, budget) if is_prefill else 1
        if sequence.num_unscored and is_prefill:
            num_rows = min(num_rows, self._num_scorable)
            self._num_scorable -= num_rows
        if num_rows == 0 or not self._grow(sequence, sequence.num_cached + num_rows):
            return 0
        self._name_pages(sequence, num_rows)
        scheduled.append(ScheduledSequence(sequence, num_rows, is_prefill))
        return num_rows if is_prefill else 0

    def _admit(self, budget: int, scheduled: list[ScheduledSequence]) -> None:
        """Let waiting sequences begin, as far as rows, pages and slots allow."""
        preempted = self.waiting.preempted
        while preempted and (shared := self._may_begin(preempted[0], budget)) is not None:
            budget -= self._begin(preempted.popleft(), shared, budget, scheduled)
        if preempted or not self._has_row(budget):
            return  # Nobody overtakes a preempted sequence.
        now = self._clock()
        for group in self._turns(now):
            shared = self._may_begin(group.sequences[0], budget)
            if shared is None:
                return
            budget -= self._begin(self.waiting.take_first(group, now), shared, budget, scheduled)

    def _has_row(self, budget: int) -> bool:
        return budget > 0 and len(self.running) < self._max_running

    def _may_begin(self, sequence: Sequence, budget: int) -> list[int] | None:
        """The pages that it will share; None if it may not begin."""
        # Of those that were preempted, one that was pinned meanwhile may have taken their slot; and
        # one that was preempted a step ago goes on once its tokens in flight are known.
        may_run = self.has_slot_for(sequence.adapter) and not sequence.num_in_flight
        if not may_run or not self._has_row(budget):
            return None
        # Room for the whole prompt and a page to go on, unless it has the cache to itself.
        shared = self._find_prefix(sequence)
        wanted = num_pages(sequence.num_tokens) - len(shared) + bool(self.running)
        return shared if wanted <= self.pool.num_free_without(shared) else None

    def _begin(
        self,
        sequence: Sequence,
        shared: list[int],
        budget: int,
        scheduled: list[ScheduledSequence],
    ) -> int:
        """Let a sequence run, with the pages that it shares; returns what it takes of the
        budget."""
        self.pool.share(shared)
        sequence.pages, sequence.num_cached = shared, len(shared) * PAGE_SIZE
        if not sequence.has_begun:
            sequence.num_reused = sequence.num_cached
        sequence.phase = Phase.RUNNING
        sequence.line = self._free_lines.pop()
        self.running.append(sequence)
        if sequence.adapter:
            self._num_running[sequence.adapter] += 1
        return self._advance(sequence, budget, scheduled)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Pages that hold the beginning of its prompt. Its newest token is never among them: it
        has to be computed for the next one to be known."""
        return self.pool.find(sequence.prefix_keys[: (sequence.num_tokens - 1) // PAGE_SIZE])

    def _name_pages(self, sequence: Sequence, num_rows: int) -> None:
        """Let others find the prompt's pages that these rows fill up, in this batch already: of
        every layer all rows are written before any is read."""
        keys, start = sequence.prefix_keys, sequence.num_cached
        for place in range(start // PAGE_SIZE, min((start + num_rows) // PAGE_SIZE, len(keys))):
            self.pool.name(sequence.pages[place], keys[place])

    def _turns(self, now: float) -> Iterator[Group]:
        """Groups in the order in which a sequence of each may begin. The one it came to last must
        have begun when the next is asked for."""
        groups = self._groups_with_slot(now)
        self._num_rounds += 1
        fullest = self.waiting.fullest
        if self._num_rounds % FULLEST_IN_TURN == 0 or (fullest and self._starves(fullest, now)):
            fullest = None
        turns = deque(group for group in groups if group is not fullest)
        while turns:
            group = turns.popleft()
            yield group
            if group.sequences:
                turns.append(group)
        if fullest and fullest in groups:
            while fullest.sequences:
                yield fullest

    def _groups_with_slot(self, now: float) -> list[Group]:
        """Groups whose sequences may begin, longest unserved first; some get their slot now."""
        num_free = self._max_adapters - len(self.adapters_in_use)
        slotless = self._slotless(now)
        left_out = set(slotless[num_free:])
        self._drain_for(slotless[num_free:], now)
        return [
            group
            for group in self.waiting.groups
            if group not in left_out and (group.adapter is None or group.adapter != self._draining)
        ]

    def _slotless(self, now: float) -> list[Group]:
        """Groups of adapters without a slot, in the order in which they get one.

        Those that starve come first, longest first; then the fullest group of all, if it is one of
        them; then those with the fewest sequences.
        """
        in_use = self.adapters_in_use
        fullest = self.waiting.fullest

        def rank(group: Group) -> tuple[bool, float, bool, int]:
            starves = self._starves(group, now)
            since = group.unserved_since if starves else 0.0
            return not starves, since, group is not fullest, len(group.sequences)

        groups = self.waiting.groups
        return sorted((g for g in groups if g.adapter and g.adapter not in in_use), key=rank)

    def _starves(self, group: Group, now: float) -> bool:
        return now - group.unserved_since > self._patience

    def _drain_for(self, slotless: list[Group], now: float) -> None:
        """Let the adapter in use for longest run out of sequences if one without a slot starves."""
        if not slotless or not self._starves(slotless[0], now):
            self._draining = None
        elif self._draining not in self._num_running:
            in_use = (adapter for adapter in self._num_running if adapter not in self.pinned)
            self._draining = next(in_use, None)

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
        self.waiting.preempted.appendleft(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence.adapter:
            self._num_running[sequence.adapter] -= 1
            if not self._num_running[sequence.adapter]:
                del self._num_running[sequence.adapter]
        self._free_lines.append(sequence.line)
        self.pool.free(sequence.pages)
        sequence.pages = []
        sequence.num_pages_told = sequence.num_cached = 0
