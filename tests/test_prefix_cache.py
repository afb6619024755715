"""Prompts that begin alike share their beginning's keys and values, and nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.job import Job
from tests.tiny_models import Oracle, make_adapter, make_llama
from worker.adapters.peft_format import Adapter
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.kv_cache import PAGE_SIZE
from worker.lora_path import LoraPath
from worker.page_pool import PagePool, prefix_keys
from worker.scheduler import Scheduler
from worker.sequence import Phase, Sequence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# --- The scheduler, and what stands on its pages ------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One of a few beginnings, cut somewhere, and an end of its own."""

    beginning: int
    cut: int
    end: int
    answer: int
    adapter: int | None
    step: int


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    return Prompt(
        beginning=draw(st.integers(0, 1)),
        cut=draw(st.integers(1, 60)),
        end=draw(st.integers(0, 20)),
        answer=draw(st.integers(1, 20)),
        adapter=draw(st.sampled_from([None, 0, 0, 1])),
        step=draw(st.integers(0, 15)),
    )


#: As a trained one is named; two adapters of one revision would share.
ADAPTERS = [Adapter(f"{n}", source="", revision=f"{n}", rank=1, factors={}) for n in range(2)]

#: What stands in a place of the cache: the whole prefix up to it, and the adapter that read it.
Content = tuple[str | None, tuple[int, ...]]


def sequence_for(prompt: Prompt, number: int) -> Sequence:
    ids = [prompt.beginning * 100 + place for place in range(prompt.cut)]
    ids += [1000 * (number + 1) + place for place in range(prompt.end)]
    adapter = None if prompt.adapter is None else ADAPTERS[prompt.adapter]
    sequence = Sequence(Job(id="a", prompt_token_ids=ids), ids, prompt.answer, adapter)
    sequence.prefix_keys = prefix_keys(adapter and adapter.revision, ids, PAGE_SIZE)
    return sequence


def content(sequence: Sequence, end: int) -> Content:
    adapter = sequence.adapter and sequence.adapter.name
    return adapter, tuple(sequence.token_ids(0, end))


class Cache:
    """Writes down what each batch leaves on the pages, and sees that it reads what it should."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], Content] = {}

    def run(self, scheduler: Scheduler) -> None:
        batch = scheduler.schedule()
        for sequence, num_rows, _ in batch:
            for position in range(sequence.num_cached, sequence.num_cached + num_rows):
                page, place = sequence.pages[position // PAGE_SIZE], position % PAGE_SIZE
                self.places[page, place] = content(sequence, position + 1)
        for sequence, num_rows, _ in batch:
            for position in range(sequence.num_cached + num_rows):
                page, place = sequence.pages[position // PAGE_SIZE], position % PAGE_SIZE
                assert self.places[page, place] == content(sequence, position + 1)
            sequence.num_cached += num_rows
            if sequence.num_cached == sequence.num_tokens:
                sequence.output_ids.append(7)
                if len(sequence.output_ids) == sequence.max_new_tokens:
                    scheduler.finish(sequence)


@given(
    st.lists(prompts(), min_size=2, max_size=12),
    st.integers(7, 16),
    st.integers(1, 6),
    st.integers(1, 90),
)
@settings(max_examples=150, deadline=None, database=None)
def test_every_row_reads_its_own_prefix_and_all_end(
    arrivals: list[Prompt], pages: int, max_running: int, max_prefill_tokens: int
) -> None:
    pool, cache = PagePool(pages), Cache()
    scheduler = Scheduler(
        pool, max_running=max_running, max_prefill_tokens=max_prefill_tokens, max_adapters=1
    )
    sequences = [sequence_for(prompt, number) for number, prompt in enumerate(arrivals)]
    for step in range(16 + sum(s.max_tokens for s in sequences)):
        for prompt, sequence in zip(arrivals, sequences, strict=True):
            if prompt.step == step:
                scheduler.add(sequence)
        cache.run(scheduler)
        owned = {page for sequence in sequences for page in sequence.pages}
        assert pool.num_used == len(owned)
    assert all(sequence.phase is Phase.FINISHED for sequence in sequences)
    assert pool.num_free == pages


def begin(*sequences: Sequence, pages: int = 20) -> Scheduler:
    scheduler = Scheduler(PagePool(pages), max_running=8, max_prefill_tokens=500, max_adapters=2)
    for sequence in sequences:
        scheduler.add(sequence)
    Cache().run(scheduler)
    return scheduler


def twins(count: int, *, cut: int = 40, end: int = 3, answer: int = 2) -> list[Sequence]:
    return [sequence_for(Prompt(0, cut, end, answer, 0, 0), number) for number in range(count)]


def test_sequences_that_begin_in_one_batch_share_what_the_first_of_them_computes() -> None:
    first, second, third = twins(3)
    scheduler = begin(first, second, third)
    assert [s.num_reused for s in (first, second, third)] == [0, 32, 32]
    assert first.pages[:2] == second.pages[:2] == third.pages[:2]
    assert scheduler.pool.num_used == 3 + 1 + 1


def test_the_last_token_of_a_prompt_is_computed_however_much_of_it_is_known() -> None:
    first, second = twins(2, cut=2 * PAGE_SIZE, end=0)
    begin(first, second)
    assert (first.num_reused, second.num_reused) == (0, PAGE_SIZE)


def test_shared_pages_let_more_sequences_run_than_would_fit() -> None:
    sequences = twins(4, cut=4 * PAGE_SIZE)
    scheduler = begin(*sequences, pages=4 + 4 + 1)
    assert len(scheduler.running) == 4


# --- The engine against transformers and PEFT ---------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    def made(name: str, rank: int, seed: int) -> Path:
        return make_adapter(model_folder, tmp_path_factory.mktemp(name), rank=rank, seed=seed)

    return {"three": made("three", 3, 1), "eight": made("eight", 8, 2)}


@pytest.fixture(scope="module")
def oracle(model_folder: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(model_folder, adapters)


def make_engine(model_folder: Path, adapters: dict[str, Path], **flags: object) -> Engine:
    loras = tuple(LoraPath(lora_name=n, lora_path=str(path)) for n, path in adapters.items())
    fixed = {"chunked_prefill_size": 48, "max_running_requests": 12, "device": DEVICE}
    flags = {"max_total_tokens": 2048} | flags
    return Engine(WorkerConfig(model_path=model_folder, lora_paths=loras, **fixed, **flags))


def jobs_with_one_beginning(count: int, adapters: list[str | None]) -> list[Job]:
    rng = random.Random(5)
    beginning = [rng.randrange(211) for _ in range(75)]
    return [
        Job(
            id=f"job-{number}",
            lora=adapters[number % len(adapters)],
            prompt_token_ids=beginning + [rng.randrange(211) for _ in range(rng.randint(0, 30))],
            max_tokens=rng.randint(1, 20),
        )
        for number in range(count)
    ]


def run(engine: Engine, jobs: list[Job], *, join_every: int) -> Iterator[Sequence]:
    joining = [engine.sequence_of(job) for job in jobs]
    num_left = len(jobs)
    while num_left:
        for sequence in joining[:join_every]:
            engine.add(sequence)
        del joining[:join_every]
        for sequence in engine.step():
            num_left -= 1
            yield sequence


@pytest.mark.parametrize("max_total_tokens", [2048, 192], ids=["roomy", "preempting"])
@pytest.mark.parametrize("join_every", [1, 40], ids=["one by one", "at once"])
def test_answers_are_those_of_peft_whatever_is_shared(
    model_folder: Path,
    adapters: dict[str, Path],
    oracle: Oracle,
    max_total_tokens: int,
    join_every: int,
) -> None:
    jobs = jobs_with_one_beginning(24, [None, "three", "eight"])
    engine = make_engine(model_folder, adapters, max_total_tokens=max_total_tokens)
    finished = {s.job.id: s for s in run(engine, jobs, join_every=join_every)}
    for job in jobs:
        wanted = oracle.generate(job.prompt_token_ids or [], job.lora, job.max_tokens)
        assert finished[job.id].output_ids == wanted
    assert engine.counters.reused_tokens == sum(s.num_reused for s in finished.values())
    if max_total_tokens == 2048:
        # All but the first of each adapter: four pages of the beginning at least.
        assert sorted(s.num_reused for s in finished.values())[:4] == [0, 0, 0, 64]
    assert engine.scheduler.pool.num_used == 0


def test_an_adapter_with_other_weights_under_the_same_name_shares_nothing(
    model_folder: Path, adapters: dict[str, Path], oracle: Oracle
) -> None:
    (job,) = jobs_with_one_beginning(1, ["three"])
    engine = make_engine(model_folder, {"three": adapters["three"]}, max_lora_rank=8)
    (before,) = run(engine, [job], join_every=1)
    engine.adapters.serve("three", engine.adapters.read("three", adapters["eight"], version=1))
    (after,) = run(engine, [job], join_every=1)
    assert before.output_ids == oracle.generate(job.prompt_token_ids or [], "three", job.max_tokens)
    assert after.output_ids == oracle.generate(job.prompt_token_ids or [], "eight", job.max_tokens)
    assert after.num_reused == 0


def test_a_name_with_weights_that_were_served_before_shares_theirs(
    model_folder: Path, adapters: dict[str, Path]
) -> None:
    (job,) = jobs_with_one_beginning(1, ["three"])
    engine = make_engine(model_folder, {"three": adapters["three"]}, max_lora_rank=8)
    (before,) = run(engine, [job], join_every=1)
    engine.adapters.forget("three")
    engine.adapters.serve("three", engine.adapters.read("three", adapters["three"], version=2))
    (after,) = run(engine, [job], join_every=1)
    assert after.num_reused >= 64
    assert after.output_ids == before.output_ids


def test_nothing_is_shared_if_the_worker_was_told_so(model_folder: Path) -> None:
    engine = make_engine(model_folder, {}, disable_prefix_cache=True)
    jobs = jobs_with_one_beginning(4, [None])
    assert [s.num_reused for s in run(engine, jobs, join_every=1)] == [0] * 4
    assert engine.counters.reused_tokens == 0


def test_what_a_failed_batch_was_to_fill_is_not_shared(model_folder: Path, oracle: Oracle) -> None:
    engine = make_engine(model_folder, {})
    failing, job = jobs_with_one_beginning(2, [None])
    sequence = engine.sequence_of(failing)
    engine.add(sequence)
    assert engine.schedule()  # Never launched.
    engine.drop(sequence)
    engine.forget_prefixes()
    (finished,) = run(engine, [job], join_every=1)
    assert finished.num_reused == 0
    wanted = oracle.generate(job.prompt_token_ids or [], None, job.max_tokens)
    assert finished.output_ids == wanted
