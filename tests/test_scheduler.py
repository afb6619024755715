"""The scheduler without a model: sequences of all sizes arrive, run, are aborted, and end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.job import Job
from worker.adapters.peft_format import Adapter
from worker.config import PATIENCE
from worker.kv_cache import PAGE_SIZE, num_pages
from worker.page_pool import PagePool
from worker.scheduler import ScheduledSequence, Scheduler
from worker.sequence import Phase, Sequence


def stand_in(name: str) -> Adapter:
    """The scheduler looks at nothing but an adapter's identity."""
    return Adapter(name, source="", revision="", rank=1, factors={})


def make_sequence(prompt: int, answer: int, adapter: Adapter | None = None) -> Sequence:
    ids = [1] * prompt
    return Sequence(Job(id="a", prompt_token_ids=ids), ids, answer, adapter)


def advance(scheduler: Scheduler, batch: list[ScheduledSequence]) -> None:
    """What ``Engine`` does with a batch, every sequence going on to its last token."""
    for sequence, num_rows, _ in batch:
        sequence.num_cached += num_rows
        if sequence.num_cached == sequence.num_tokens:
            sequence.output_ids.append(1)
            if len(sequence.output_ids) == sequence.max_new_tokens:
                scheduler.finish(sequence)


# --- Properties of random loads -----------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A sequence, the step before which it comes, and how many steps later it is aborted."""

    step: int
    prompt: int
    answer: int
    adapter: int | None
    abort_after: int | None


@dataclass(frozen=True)
class Load:
    """Limits, and what arrives."""

    pages: int
    max_running: int
    max_prefill_tokens: int
    max_adapters: int
    num_pinned: int
    patience: int
    """In steps."""
    arrivals: list[Arrival]

    @property
    def max_steps(self) -> int:
        """Each step after the last arrival brings the oldest sequence on by one chunk at least."""
        steps = max((arrival.step for arrival in self.arrivals), default=0) + 1
        for arrival in self.arrivals:
            chunks = -(-(arrival.prompt + arrival.answer) // self.max_prefill_tokens)
            steps += chunks + arrival.answer
        return steps


@st.composite
def loads(draw: st.DrawFn) -> Load:
    pages = draw(st.integers(1, 5))
    max_adapters = draw(st.integers(1, 3))

    @st.composite
    def arrivals(draw: st.DrawFn) -> Arrival:
        # Anything that fits into the cache by itself, up to the very last token; mostly small,
        # so that several run at once.
        small = st.integers(2, PAGE_SIZE + 4 * (pages > 1))
        total = draw(small | st.integers(2, pages * PAGE_SIZE))
        prompt = draw(st.integers(max(1, total - 30), total - 1))
        return Arrival(
            step=draw(st.integers(0, 9)),
            prompt=prompt,
            answer=total - prompt,
            adapter=draw(st.sampled_from([None, 0, 0, 1, 1, 2, 3])),
            abort_after=draw(st.none() | st.none() | st.integers(0, 20)),
        )

    return Load(
        pages=pages,
        max_running=draw(st.integers(1, 8)),
        max_prefill_tokens=draw(st.integers(1, 90)),
        max_adapters=max_adapters,
        num_pinned=draw(st.integers(0, max_adapters - 1)),
        patience=draw(st.integers(0, 9) | st.just(1000)),
        arrivals=draw(st.lists(arrivals(), min_size=6, max_size=12)),
    )


@dataclass(frozen=True)
class Step:
    """A batch, between ``schedule`` and its tokens."""

    batch: list[ScheduledSequence]
    decoding: list[Sequence]
    """The sequences that were decoding when it was scheduled."""
    number: int


class Simulation:
    """Runs a load to its end; gives up when that takes longer than it may."""

    def __init__(self, load: Load) -> None:
        self.load = load
        adapters = [stand_in(f"{number}") for number in range(4)]
        self.pinned = frozenset(adapters[: load.num_pinned])
        self.pool = PagePool(load.pages)
        self.scheduler = Scheduler(
            self.pool,
            max_running=load.max_running,
            max_prefill_tokens=load.max_prefill_tokens,
            max_adapters=load.max_adapters,
            pinned=self.pinned,
            patience=load.patience,
            clock=lambda: self.number,
        )
        self.number = 0
        """Of the step that comes next."""
        self.arrivals = sorted(load.arrivals, key=lambda arrival: arrival.step)
        self.sequences = [
            make_sequence(a.prompt, a.answer, None if a.adapter is None else adapters[a.adapter])
            for a in self.arrivals
        ]
        """In the order of their arrival."""

    def steps(self) -> Iterator[Step]:
        for number in range(self.load.max_steps):
            self.number = number
            for sequence, arrival in zip(self.sequences, self.arrivals, strict=True):
                if arrival.step == number:
                    self.scheduler.add(sequence)
                wait = arrival.abort_after
                if wait is not None and arrival.step + wait == number:
                    self.scheduler.finish(sequence)
            decoding = [s for s in self.scheduler.running if s.num_uncached == 1]
            batch = self.scheduler.schedule()
            yield Step(batch, decoding, number)
            advance(self.scheduler, batch)


thoroughly = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@thoroughly
@given(loads())
def test_a_batch_never_needs_more_slots_than_there_are(load: Load) -> None:
    simulation = Simulation(load)
    for step in simulation.steps():
        adapters = {item.sequence.adapter for item in step.batch} - {None}
        assert len(adapters | simulation.pinned) <= load.max_adapters


@thoroughly
@given(loads())
def test_prefill_never_takes_more_rows_than_its_limit(load: Load) -> None:
    for step in Simulation(load).steps():
        rows = sum(item.num_rows for item in step.batch if item.is_prefill)
        assert rows <= load.max_prefill_tokens


@thoroughly
@given(loads())
def test_no_more_sequences_run_than_may(load: Load) -> None:
    simulation = Simulation(load)
    for step in simulation.steps():
        assert len(step.batch) <= len(simulation.scheduler.running) <= load.max_running


@thoroughly
@given(loads())
def test_every_page_is_free_or_has_one_owner(load: Load) -> None:
    simulation = Simulation(load)
    for _ in simulation.steps():
        owned = [page for sequence in simulation.sequences for page in sequence.pages]
        free = simulation.pool.allocate(simulation.pool.num_free)
        simulation.pool.free(free[::-1])
        assert sorted(owned + free) == list(range(load.pages))


@thoroughly
@given(loads())
def test_only_running_sequences_own_pages(load: Load) -> None:
    for _ in (simulation := Simulation(load)).steps():
        owners = [sequence for sequence in simulation.sequences if sequence.pages]
        assert all(sequence.phase is Phase.RUNNING for sequence in owners)


@thoroughly
@given(loads())
def test_every_row_of_a_batch_has_its_place_on_a_page(load: Load) -> None:
    for step in Simulation(load).steps():
        for sequence, num_rows, _ in step.batch:
            assert sequence.num_cached + num_rows <= len(sequence.pages) * PAGE_SIZE


@thoroughly
@given(loads())
def test_a_batch_holds_no_sequence_twice_and_none_that_does_not_run(load: Load) -> None:
    simulation = Simulation(load)
    for step in simulation.steps():
        running = [id(sequence) for sequence in simulation.scheduler.running]
        scheduled = [id(item.sequence) for item in step.batch]
        assert scheduled == [number for number in running if number in scheduled]


@thoroughly
@given(loads())
def test_every_sequence_ends_within_the_steps_that_it_and_its_elders_need(load: Load) -> None:
    simulation = Simulation(load)
    for _ in simulation.steps():
        pass
    assert all(sequence.phase is Phase.FINISHED for sequence in simulation.sequences)


@thoroughly
@given(loads())
def test_a_batch_is_empty_only_if_nothing_runs_and_nothing_waits(load: Load) -> None:
    simulation = Simulation(load)
    for step in simulation.steps():
        left = simulation.scheduler.running or simulation.scheduler.waiting
        assert bool(step.batch) == bool(left)


@thoroughly
@given(loads())
def test_a_decoding_sequence_is_in_every_batch_until_it_is_preempted(load: Load) -> None:
    for step in Simulation(load).steps():
        in_batch = {id(item.sequence) for item in step.batch if not item.is_prefill}
        kept = [sequence for sequence in step.decoding if sequence.phase is Phase.RUNNING]
        assert {id(sequence) for sequence in kept} <= in_batch


@thoroughly
@given(loads())
def test_sequences_of_one_adapter_run_in_the_order_of_their_arrival(load: Load) -> None:
    """Whatever waits, preempted or new, came after all of its adapter that run."""
    simulation = Simulation(load)
    age = {id(sequence): number for number, sequence in enumerate(simulation.sequences)}
    for _ in simulation.steps():
        scheduler = simulation.scheduler
        in_order = [*scheduler.running, *scheduler.waiting]
        for adapter in {sequence.adapter for sequence in in_order}:
            ages = [age[id(sequence)] for sequence in in_order if sequence.adapter is adapter]
            assert ages == sorted(ages)


#: Tokens of the longest answer in the test below.
LONGEST = 5


@thoroughly
@given(
    arrivals=st.lists(
        st.lists(st.tuples(st.sampled_from([None, 0, 1, 2]), st.integers(1, LONGEST)), max_size=4),
        min_size=60,
        max_size=80,
    ),
    patience=st.integers(0, 20),
    max_running=st.integers(1, 6),
    max_adapters=st.integers(1, 3),
)
def test_whatever_arrives_a_sequence_begins_soon_after_the_patience_of_its_adapter(
    arrivals: list[list[tuple[int | None, int]]], patience: int, max_running: int, max_adapters: int
) -> None:
    number = 0
    scheduler = make_scheduler(
        pages=1000,
        max_running=max_running,
        max_adapters=max_adapters,
        patience=patience,
        clock=lambda: number,
    )
    adapters = [stand_in(f"{number}") for number in range(3)]
    # They end one after another, and more wait than can run until the test ends.
    for answer in [*range(1, LONGEST), *[LONGEST] * 400]:
        add(scheduler, *(make_sequence(3, answer, adapter) for adapter in adapters))
    rare = make_sequence(3, LONGEST, stand_in("rare"))
    add(scheduler, rare)
    for number, arriving in enumerate(arrivals):
        for name, answer in arriving:
            adapter = None if name is None else adapters[name]
            add(scheduler, make_sequence(3, answer, adapter))
        step(scheduler)
        # What runs may end, once for each of the others that may have waited as long.
        if number > patience + 5 * LONGEST:
            assert rare.phase is not Phase.WAITING


# --- Examples -----------------------------------------------------------------------------------

A, B, C, D, E = (stand_in(name) for name in "abcde")


def make_scheduler(
    *,
    pages: int = 100,
    max_running: int = 8,
    max_prefill_tokens: int = 64,
    max_adapters: int = 8,
    pinned: tuple[Adapter, ...] = (),
    patience: float = PATIENCE,
    clock: Callable[[], float] = time.monotonic,
) -> Scheduler:
    return Scheduler(
        PagePool(pages),
        max_running=max_running,
        max_prefill_tokens=max_prefill_tokens,
        max_adapters=max_adapters,
        pinned=pinned,
        patience=patience,
        clock=clock,
    )


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for sequence in sequences:
        scheduler.add(sequence)


def step(scheduler: Scheduler) -> list[ScheduledSequence]:
    batch = scheduler.schedule()
    advance(scheduler, batch)
    return batch


def test_a_sequence_whose_adapter_has_a_slot_passes_over_one_whose_adapter_has_none() -> None:
    scheduler = make_scheduler(max_adapters=1)
    first, other, second = (make_sequence(3, 5, adapter) for adapter in (A, B, A))
    add(scheduler, first, other, second)
    step(scheduler)
    assert scheduler.running == [first, second]


def test_a_sequence_that_was_passed_over_keeps_its_place_among_those_of_its_adapter() -> None:
    scheduler = make_scheduler(max_adapters=1)
    held, b, c, later_b = (make_sequence(3, 5, adapter) for adapter in (A, B, C, B))
    add(scheduler, held)
    step(scheduler)
    add(scheduler, b, c, later_b)
    step(scheduler)
    assert list(scheduler.waiting) == [b, later_b, c]


def adapters_of(sequences: Iterable[Sequence]) -> Counter[str]:
    return Counter(sequence.adapter.name for sequence in sequences if sequence.adapter)


def add_groups(scheduler: Scheduler, **sizes: int) -> None:
    """So many sequences of each adapter, in turn as long as there are."""
    adapters = {name: stand_in(name) for name in sizes}
    for number in range(max(sizes.values())):
        for name, size in sizes.items():
            if number < size:
                scheduler.add(make_sequence(3, 5, adapters[name]))


def test_one_slot_is_for_the_fullest_adapter_and_the_others_for_those_with_the_fewest() -> None:
    scheduler = make_scheduler(max_adapters=3, max_running=100)
    add_groups(scheduler, middle=4, full=9, few=2, fewer=1)
    step(scheduler)
    assert adapters_of(scheduler.running) == {"full": 9, "few": 2, "fewer": 1}


def test_the_fullest_adapter_gets_the_rows_that_the_others_leave() -> None:
    scheduler = make_scheduler(max_adapters=3, max_running=8)
    add_groups(scheduler, full=9, few=2, fewer=1)
    step(scheduler)
    assert adapters_of(scheduler.running) == {"full": 5, "few": 2, "fewer": 1}


def test_sequences_of_an_adapter_begin_together_when_it_gets_its_slot() -> None:
    scheduler = make_scheduler(max_adapters=2, max_running=8)
    add_groups(scheduler, full=20, few=2, more=3)
    for _ in range(6):
        step(scheduler)
    assert adapters_of(scheduler.running) == {"full": 5, "more": 3}


def test_rows_are_shared_in_turn_by_those_that_are_not_the_fullest() -> None:
    scheduler = make_scheduler(max_running=4)
    add_groups(scheduler, first=5, second=6, full=9)
    step(scheduler)
    assert adapters_of(scheduler.running) == {"first": 2, "second": 2}


def test_a_large_backlog_goes_on_beside_a_small_one_that_never_ends() -> None:
    scheduler = make_scheduler(max_running=1)
    add_groups(scheduler, full=50)
    few, began = stand_in("few"), Counter[str]()
    for number in range(400):
        if number % 5 == 0:
            scheduler.add(make_sequence(3, 5, few))
        for item in step(scheduler):
            if item.is_prefill and item.sequence.adapter:
                began[item.sequence.adapter.name] += 1
    assert sum(began.values()) == 80
    assert began["full"] >= 80 // 8


def test_an_adapter_that_starves_gets_the_slot_of_one_that_has_more_to_do() -> None:
    now = 0.0
    scheduler = make_scheduler(max_adapters=1, max_running=2, patience=10, clock=lambda: now)
    busy = [make_sequence(3, answer, A) for answer in (3, 5, 5, 5, 5, 5, 5, 5, 5)]
    starving = make_sequence(3, 5, B)
    add(scheduler, *busy, starving)
    now = 1.0
    step(scheduler)
    now = 11.0
    for _ in range(3):
        step(scheduler)
    assert scheduler.running == [busy[1]]
    for _ in range(2):
        step(scheduler)
    assert scheduler.running == [starving]
    for _ in range(5):
        step(scheduler)
    assert scheduler.running == busy[2:4]


def test_the_next_adapters_are_named_in_the_order_in_which_they_get_a_slot() -> None:
    now = 0.0
    scheduler = make_scheduler(max_adapters=1, patience=10, clock=lambda: now)
    add_groups(scheduler, held=1)
    step(scheduler)
    add_groups(scheduler, starving=4)
    now = 5.0
    add_groups(scheduler, full=9, few=2, fewest=1)

    def names() -> list[str]:
        return [adapter.name for adapter in scheduler.next_adapters(3)]

    assert names() == ["full", "fewest", "few"]
    now = 11.0
    assert names() == ["starving", "full", "fewest"]


def test_an_adapter_that_has_left_makes_room_for_the_one_that_waited_longest() -> None:
    scheduler = make_scheduler(max_adapters=1)
    short, b, c = make_sequence(3, 1, A), make_sequence(3, 5, B), make_sequence(3, 5, C)
    add(scheduler, short, b, c)
    step(scheduler)
    step(scheduler)
    assert scheduler.running == [b]


def test_sequences_of_the_base_model_take_no_slot() -> None:
    scheduler = make_scheduler(max_adapters=1)
    add(scheduler, make_sequence(3, 5, A), make_sequence(3, 5), make_sequence(3, 5))
    assert len(step(scheduler)) == 3


def test_a_pinned_adapter_holds_its_slot_while_nothing_uses_it() -> None:
    scheduler = make_scheduler(max_adapters=2, pinned=(A,))
    b, c = make_sequence(3, 5, B), make_sequence(3, 5, C)
    add(scheduler, b, c)
    step(scheduler)
    assert scheduler.running == [b]


def test_a_long_prompt_goes_in_by_chunks_of_the_limit() -> None:
    scheduler = make_scheduler(max_prefill_tokens=32)
    add(scheduler, make_sequence(70, 5))
    rows = [[item.num_rows for item in step(scheduler)] for _ in range(4)]
    assert rows == [[32], [32], [6], [1]]


def test_what_a_begun_prompt_leaves_of_the_limit_goes_to_the_next_one() -> None:
    scheduler = make_scheduler(max_prefill_tokens=32)
    add(scheduler, make_sequence(40, 5), make_sequence(40, 5))
    step(scheduler)
    assert [item.num_rows for item in step(scheduler)] == [8, 24]


def test_decoding_takes_nothing_of_the_prefill_limit() -> None:
    scheduler = make_scheduler(max_prefill_tokens=32)
    add(scheduler, make_sequence(32, 5))
    step(scheduler)
    add(scheduler, make_sequence(32, 5))
    assert [item.num_rows for item in step(scheduler)] == [1, 32]


def run_out_of_pages() -> tuple[Scheduler, list[Sequence]]:
    """Five pages: two, one and one in use. In the fourth step the oldest sequence needs another
    one and takes the last; so does the second, and none is left. A fourth sequence may not run."""
    scheduler = make_scheduler(pages=5, max_running=3)
    sizes = [(30, 9), (14, 9), (2, 13), (4, 4)]
    sequences = [make_sequence(*size) for size in sizes]
    add(scheduler, *sequences)
    for _ in range(4):
        step(scheduler)
    return scheduler, sequences


def test_pages_that_run_out_are_taken_from_the_youngest() -> None:
    scheduler, (old, middle, young, _) = run_out_of_pages()
    assert (scheduler.running, young.pages) == ([old, middle], [])


def test_a_preempted_sequence_waits_before_those_that_never_ran() -> None:
    scheduler, (_, _, young, new) = run_out_of_pages()
    assert list(scheduler.waiting) == [young, new]


def test_a_preempted_sequence_waits_for_a_slot_that_a_pinned_adapter_took_meanwhile() -> None:
    scheduler = make_scheduler(pages=5, max_adapters=2)
    first, second, young = (make_sequence(12, 20, adapter) for adapter in (A, None, B))
    for sequence in (first, second, young):
        add(scheduler, sequence)
        step(scheduler)
    for _ in range(6):
        step(scheduler)
    assert list(scheduler.waiting) == [young]
    scheduler.pinned = frozenset({C})
    scheduler.finish(second)  # There is room again, but no slot while the first one runs.
    for _ in range(40):
        step(scheduler)
        assert len(scheduler.adapters_in_use) <= 2
    assert young.phase is Phase.FINISHED


def test_a_preempted_sequence_keeps_its_answer_and_computes_it_anew() -> None:
    scheduler, (_, _, young, _) = run_out_of_pages()
    for _ in range(20):
        rows = [item.num_rows for item in step(scheduler) if item.sequence is young]
        if rows:
            break
    # The prompt and the three tokens that it had come to.
    assert rows == [2 + 3]


def test_a_sequence_waits_until_it_finds_a_page_to_go_on_beside_those_of_its_prompt() -> None:
    """Else it would soon take one from a sequence that has just begun, or lose its own."""
    scheduler = make_scheduler(pages=2)
    first, second = make_sequence(4, 5), make_sequence(4, 5)
    add(scheduler, first, second)
    step(scheduler)
    assert scheduler.running == [first]


def test_a_sequence_preempted_with_a_token_in_flight_is_not_overtaken() -> None:
    scheduler = make_scheduler(pages=3)
    preempted, younger = make_sequence(4, 5), make_sequence(4, 5)
    preempted.num_in_flight = 1
    add(scheduler, preempted, younger)
    assert scheduler.schedule() == []
    preempted.num_in_flight = 0
    assert [item.sequence for item in scheduler.schedule()] == [preempted, younger]


def test_a_sequence_alone_may_fill_the_whole_cache() -> None:
    scheduler = make_scheduler(pages=2)
    add(scheduler, make_sequence(2 * PAGE_SIZE - 1, 1))
    assert [item.num_rows for item in step(scheduler)] == [2 * PAGE_SIZE - 1]


def test_sequences_that_all_fit_are_never_preempted() -> None:
    sizes = [(30, 20), (1, 60), (16, 16), (47, 2)]
    scheduler = make_scheduler(pages=sum(num_pages(sum(size)) for size in sizes) + 1)
    sequences = [make_sequence(*size) for size in sizes]
    add(scheduler, *sequences)
    for _ in range(100):
        step(scheduler)
        assert not any(s.phase is Phase.WAITING for s in sequences if s.output_ids)


def test_a_waiting_sequence_that_is_aborted_does_not_run() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(3, 5)
    add(scheduler, sequence)
    scheduler.finish(sequence)
    assert scheduler.schedule() == []


def test_a_running_sequence_that_is_aborted_gives_its_pages_back() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(3, 5)
    add(scheduler, sequence)
    step(scheduler)
    scheduler.finish(sequence)
    assert scheduler.pool.num_used == 0
