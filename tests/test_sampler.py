"""The draws behind sampling: by seed and position alone, the same on every machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from kernels.largest_token import NO_TOKEN, largest_token
from schemas.job import Job
from worker.sampler import Sampler, uniform
from worker.sequence import Sequence

LARGEST_SEED = 2**64 - 1


def split_mix(state: int) -> Iterator[int]:
    """SplitMix64 as its authors give it in C."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        yield z ^ (z >> 31)


def sequence(**settings: object) -> Sequence:
    job = Job.model_validate({"id": "a", "prompt_token_ids": [1], **settings})
    return Sequence(job, [1], job.max_tokens)


def seed(job: Job) -> int:
    return Sequence(job, [1], 1).seed


def sample_batch(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    tokens = largest_token(logits)
    sampler = Sampler(max_lines=1, vocab_size=logits.shape[1], device=logits.device)
    sampler.choose(tokens, logits, list(enumerate(sequences)))
    return tokens.tolist()


def test_uniform_draws_the_numbers_of_split_mix() -> None:
    numbers = split_mix(next(split_mix(42)))
    expected = [(number >> 11) / 2**53 for number in islice(numbers, 100)]
    assert [uniform(42, position) for position in range(100)] == expected


def test_draws_stay_what_they_are_from_version_to_version() -> None:
    """Pinned: a job with a seed gives the same answer after an update."""
    draws = [uniform(0, 0), uniform(0, 1), uniform(7, 0), uniform(LARGEST_SEED, 1_000_000)]
    assert draws == [
        0.6524484863740322,
        0.7012121095215252,
        0.7215081806049702,
        0.4611314684076886,
    ]


@pytest.mark.parametrize("seed", [0, 1, 2**63, LARGEST_SEED])
def test_draws_lie_in_0_to_below_1(seed: int) -> None:
    assert all(0 <= uniform(seed, position) < 1 for position in range(2000))


def test_draws_are_spread_evenly() -> None:
    tenths = Counter(int(10 * uniform(3, position)) for position in range(20_000))
    # 2000 in each tenth, with a standard deviation of 42.
    assert all(abs(tenths[tenth] - 2000) < 4 * 42 for tenth in range(10))


def test_other_seeds_and_positions_draw_other_numbers() -> None:
    draws = {uniform(seed, position) for seed in range(100) for position in range(100)}
    assert len(draws) == 100 * 100


def test_a_job_without_a_seed_has_the_same_one_at_every_attempt() -> None:
    assert seed(Job(id="a", prompt="x")) == seed(Job(id="a", prompt="y", temperature=1))


def test_jobs_without_a_seed_have_different_ones() -> None:
    assert len({seed(Job(id=f"job-{number}", prompt="x")) for number in range(1000)}) == 1000


def test_a_job_with_a_seed_has_that_one() -> None:
    assert seed(Job(id="a", prompt="x", seed=0)) == 0


def test_a_batch_of_greedy_jobs_takes_the_largest_logits() -> None:
    logits = torch.tensor([[1.0, 9.0, 3.0], [5.0, 1.0, 2.0]])
    assert sample_batch(logits, [sequence(), sequence()]) == [1, 0]


def test_a_drawing_job_draws_by_its_own_seed_and_settings_beside_greedy_ones() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.8, 0.7]]).expand(5, 4)
    drawing = sequence(temperature=2.0, top_k=3, seed=11)
    (alone,) = sample_batch(logits[:1], [drawing])
    others = [sequence(), sequence(temperature=0.1, seed=5), sequence(temperature=1.0, top_p=0.1)]
    assert sample_batch(logits, [*others, drawing, sequence()])[3] == alone


def test_each_further_token_of_a_job_has_a_draw_of_its_own() -> None:
    drawing, tokens = sequence(temperature=1.0, seed=1), []
    for _ in range(200):
        tokens += sample_batch(torch.zeros(1, 10), [drawing])
        drawing.output_ids.append(tokens[-1])
    assert tokens == [int(10 * uniform(1, position)) for position in range(200)]


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-46, 5e-324])
def test_a_temperature_next_to_zero_takes_the_largest_logit(temperature: float) -> None:
    """``schemas.job`` allows it, so a worker must survive it."""
    logits = torch.tensor([[-30.0, 20.0, -5.0]])
    assert sample_batch(logits, [sequence(temperature=temperature)]) == [1]


not_finite = pytest.mark.parametrize("logit", [float("nan"), float("inf"), float("-inf")])


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawing"])
@not_finite
def test_logits_that_are_not_finite_give_no_token(temperature: float, logit: float) -> None:
    """The next step would look it up in the embedding."""
    logits = torch.full((1, 5), logit)
    assert sample_batch(logits, [sequence(temperature=temperature)]) == [NO_TOKEN]


@not_finite
def test_logits_that_are_not_finite_change_no_other_rows_token(logit: float) -> None:
    logits = torch.tensor([[1.0, 0.9, 0.8, 0.7], 4 * [logit], [0.0, 0.0, 1.0, 0.0]])
    drawing, other = sequence(temperature=2.0, seed=11), sequence(temperature=1.0, seed=3)
    (alone,) = sample_batch(logits[:1], [drawing])
    assert sample_batch(logits, [drawing, other, sequence()]) == [alone, NO_TOKEN, 2]
