"""Logits processors against those of transformers on the same logits, a whole batch at once."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
)

from kernels.largest_token import NO_TOKEN, largest_token
from schemas.job import Job
from worker.logits_processors import logits_processors
from worker.sampler import Sampler, process_logits
from worker.sequence import Sequence
from worker.token_counts import TokenCounts

VOCABULARY = 50
CPU = torch.device("cpu")

#: So that some tokens are drawn more than once.
FIELDS: list[dict[str, object]] = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8, "presence_penalty": -0.5},
    {"logit_bias": {"3": 2.5, "7": -100.0, "49": 100.0}},
    {"min_tokens": 9, "stop_token_ids": [4, 5]},
    {"min_tokens": 3, "stop_token_ids": [4, 5]},
    {"temperature": 0.7, "min_p": 0.1},
    {"temperature": 2.0, "min_p": 0.4},
    {"temperature": 1.0, "min_p": 1.0},
    {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {"1": 5.0, "4": 1.0},
        "min_tokens": 20,
        "stop_token_ids": [4],
        "temperature": 0.9,
        "min_p": 0.05,
    },
]
BAD_WORDS = [[11], [12, 13], [1, 2, 3], [2, 3], [20, 21, 22, 23]]


def sequence(
    line: int, *, prompt: list[int] | None = None, answer: list[int] | None = None, **fields: object
) -> Sequence:
    """The job's ``metadata`` are the tokens of its bad words."""
    job = Job.model_validate({"id": f"{line}", "prompt_token_ids": prompt or [1], **fields})
    ends = frozenset(job.stop_token_ids)
    bad_words: Any = job.metadata or []
    made = Sequence(
        job,
        job.prompt_token_ids or [],
        job.max_tokens,
        end_token_ids=ends,
        processors=logits_processors(job, ends, bad_words),
        line=line,
    )
    made.output_ids = answer or []
    return made


def random_sequences(rng: random.Random) -> list[Sequence]:
    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(25) for _ in range(rng.randint(least, most))]

    made = [
        sequence(line, prompt=tokens(1, 9), answer=tokens(0, 12), **fields)
        for line, fields in enumerate(FIELDS)
    ]
    for ending in ([], [12], [1, 2], [5, 2], [20, 21, 22], [21, 22]):
        answer = tokens(0, 5) + ending
        made.append(sequence(len(made), answer=answer, metadata=BAD_WORDS, presence_penalty=0.1))
    rng.shuffle(made)
    return made


def processed(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    found = logits.clone()
    items = [(s, s.processors) for s in sequences if s.processors]
    counts = TokenCounts(max_lines=20, vocab_size=VOCABULARY, device=CPU)
    process_logits(found, items, torch.zeros(len(items), dtype=torch.int32), counts)
    return found


def by_transformers(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """One row, in vLLM's order; transformers has no penalties by OpenAI's definition."""
    job, row = sequence.job, logits[None]
    text = torch.tensor([sequence.prompt_ids + sequence.output_ids])
    if job.metadata:
        # transformers 5.17 overlooks a word whose first tokens are all there is; so one is before.
        longer = torch.tensor([[VOCABULARY - 1, *sequence.output_ids]])
        row = NoBadWordsLogitsProcessor(job.metadata)(longer, row)
    if job.min_tokens:
        prompt_length = len(sequence.prompt_ids)
        ends = list(job.stop_token_ids)
        row = MinNewTokensLengthLogitsProcessor(prompt_length, job.min_tokens, ends)(text, row)
    if job.logit_bias:
        bias = [[[token], value] for token, value in job.logit_bias.items()]
        row = SequenceBiasLogitsProcessor(bias)(text, row)
    row = RepetitionPenaltyLogitsProcessor(job.repetition_penalty)(text, row)
    for token in set(sequence.output_ids):
        row[0, token] -= job.frequency_penalty * sequence.output_ids.count(token)
        row[0, token] -= job.presence_penalty
    if job.min_p and job.temperature:
        warpers = [TemperatureLogitsWarper(job.temperature), MinPLogitsWarper(job.min_p)]
        kept = LogitsProcessorList(warpers)(text, row) > -math.inf
        row = row.masked_fill(~kept, -math.inf)
    return row[0]


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_of_all_processors_gives_each_row_what_transformers_gives(seed: int) -> None:
    rng = random.Random(seed)
    sequences = random_sequences(rng)
    logits = 4 * torch.randn(len(sequences), VOCABULARY, generator=torch.manual_seed(seed))
    expected = torch.stack(
        [by_transformers(row, s) for row, s in zip(logits, sequences, strict=True)]
    )
    found = processed(logits, sequences)
    # Whether a token at the very edge of min_p is left out is a matter of rounding.
    at_edge = found.isinf() != expected.isinf()
    for row, token in at_edge.nonzero().tolist():
        job, either = sequences[row].job, torch.maximum(found[row], expected[row])
        edge = either.max().item() + math.log(job.min_p) * job.temperature
        assert either[token].item() == pytest.approx(edge, abs=1e-5)
    found = found.where(~at_edge, expected)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (expected != logits).any(dim=-1).sum() > len(FIELDS) // 2


def test_a_processor_of_one_row_leaves_the_others_as_they_are() -> None:
    sequences = random_sequences(random.Random(0))
    logits = torch.randn(len(sequences), VOCABULARY)
    together = processed(logits, sequences)
    alone = [processed(row[None], [s])[0] for row, s in zip(logits, sequences, strict=True)]
    assert torch.equal(together, torch.stack(alone))


def test_a_job_that_asks_for_nothing_has_no_processors() -> None:
    plain = {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "stop_token_ids": [3], "logprobs": True}
    assert sequence(0, **plain).processors is None
    # What draws nothing has nothing to cut.
    assert sequence(0, min_p=0.5).processors is None


def play(
    logits: list[torch.Tensor], sequences: list[Sequence], *, in_flight: int, sampler: Sampler
) -> None:
    """Steps that the sampler chooses for, whose tokens are known ``in_flight`` steps later."""
    flying: list[list[int]] = []
    for step in logits:
        tokens = largest_token(step)
        sampler.choose(tokens, step, list(enumerate(sequences)))
        flying.append(tokens.tolist())
        for sequence in sequences:
            sequence.num_in_flight += 1
        if len(flying) > in_flight:
            land(flying.pop(0), sequences)
    for tokens_of_step in flying:
        land(tokens_of_step, sequences)


def land(tokens: list[int], sequences: list[Sequence]) -> None:
    for sequence, token in zip(sequences, tokens, strict=True):
        sequence.num_in_flight -= 1
        sequence.output_ids.append(token)


#: Greedy and drawing, with all that depends on tokens that may be in flight.
WATCHFUL: list[dict[str, object]] = [
    {"presence_penalty": 2.0, "frequency_penalty": 1.0},
    {"repetition_penalty": 1.5, "temperature": 1.5, "seed": 3},
    {"metadata": [[a, b] for a in range(0, 50, 2) for b in range(25)]},
    {"metadata": [[a, a + 1, a] for a in range(49)], "temperature": 2.0, "seed": 4, "top_k": 2},
    {"min_tokens": 6, "stop_token_ids": list(range(25))},
    {},
]


def steps(seed: int, count: int) -> list[torch.Tensor]:
    generator = torch.manual_seed(seed)
    row = 2 * torch.randn(len(WATCHFUL), VOCABULARY, generator=generator)
    # Alike from step to step, so that a greedy job would take the same token for ever.
    return [row + 0.3 * torch.randn(row.shape, generator=generator) for _ in range(count)]


def fresh() -> tuple[list[Sequence], Sampler]:
    made = [sequence(line, prompt=[1, 2, 3], **f) for line, f in enumerate(WATCHFUL)]
    return made, Sampler(max_lines=20, vocab_size=VOCABULARY, device=CPU)


@pytest.mark.parametrize("seed", range(3))
def test_a_token_in_flight_counts_as_one_that_is_known(seed: int) -> None:
    known, sampler = fresh()
    play(steps(seed, 30), known, in_flight=0, sampler=sampler)
    ahead, sampler = fresh()
    play(steps(seed, 30), ahead, in_flight=1, sampler=sampler)
    assert [s.output_ids for s in ahead] == [s.output_ids for s in known]
    assert len({tuple(s.output_ids) for s in known}) == len(WATCHFUL)


def test_bad_words_of_several_tokens_never_stand_in_an_answer() -> None:
    made, sampler = fresh()
    play(steps(0, 60), made, in_flight=1, sampler=sampler)
    banned = {tuple(pair) for pair in WATCHFUL[2]["metadata"]}
    assert not banned & set(pairwise(made[2].output_ids))
    ids = made[3].output_ids
    assert not any(a == c and b == a + 1 for a, b, c in zip(ids, ids[1:], ids[2:], strict=False))


def test_a_preempted_sequence_goes_on_as_if_it_had_not_been() -> None:
    """On other lines, on its own again after another had it, and with a fresh sampler."""
    expected, sampler = fresh()
    play(steps(1, 40), expected, in_flight=1, sampler=sampler)
    made, sampler = fresh()
    play(steps(1, 40)[:10], made, in_flight=1, sampler=sampler)
    moves = [lambda line: line + 10, lambda line: line, lambda line: (line + 1) % len(made)]
    for number, move in enumerate(moves, start=1):
        for line, each in enumerate(made):
            each.line = move(line)
        play(steps(1, 40)[10 * number : 10 * number + 10], made, in_flight=1, sampler=sampler)
    assert [s.output_ids for s in made] == [s.output_ids for s in expected]


def test_logits_that_are_not_finite_give_no_token_and_spoil_no_neighbour() -> None:
    fields = {"presence_penalty": 1.0, "logit_bias": {"3": 1.0}}
    alone, spoiled = sequence(0, **fields), sequence(1, **fields)
    neighbour = sequence(2, **fields)
    good = torch.randn(1, VOCABULARY)
    logits = torch.cat([good, torch.full((1, VOCABULARY), math.nan), good])
    sampler = Sampler(max_lines=3, vocab_size=VOCABULARY, device=CPU)
    tokens = largest_token(logits)
    sampler.choose(tokens, logits, list(enumerate([alone, spoiled, neighbour])))
    assert tokens[1] == NO_TOKEN
    assert tokens[0] == tokens[2] != NO_TOKEN


def test_what_is_banned_depends_on_the_answers_length_and_its_last_tokens() -> None:
    fields = {"stop_token_ids": [4], "min_tokens": 2, "logit_bias": {"7": -100.0}}
    assert sequence(0, metadata=BAD_WORDS, **fields).banned_token_ids == {4, 11}
    for answer, banned in (([1], {4, 11}), ([9, 1, 2], {11, 3}), ([12], {4, 11, 13})):
        asked = sequence(0, answer=answer, metadata=BAD_WORDS, **fields)
        assert asked.banned_token_ids == banned
    assert sequence(0).banned_token_ids == set()


def test_few_lines_take_little_memory_and_none_asked_for_none() -> None:
    counts = TokenCounts(max_lines=20, vocab_size=VOCABULARY, device=CPU)
    assert counts.num_lines == 0
    for line in (0, 2, 5):
        asking = sequence(line, presence_penalty=1.0)
        counts.penalize(torch.zeros(1, VOCABULARY), [(0, asking, 1.0, 0.0, 1.0)])
    assert counts.num_lines == 6
