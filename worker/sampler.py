"""Chooses the next token of every sequence of a batch."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.largest_token import largest_token
from kernels.sample import Draw, sample
from worker.logits_processors import LogitsProcessors
from worker.sequence import Sequence
from worker.staging import send
from worker.token_counts import TokenCounts

_MASK = 2**64 - 1

#: In place of a token after which something is added to a logit: after every one.
_ANY = -1


class Sampler:
    """Chooses tokens other than those of the largest logits, for the sequences that want it."""

    def __init__(self, *, max_lines: int, vocab_size: int, device: torch.device) -> None:
        self._counts = TokenCounts(max_lines=max_lines, vocab_size=vocab_size, device=device)
        self._last_tokens = torch.zeros(max_lines, dtype=torch.int32, device=device)
        """By line of the page table, of sequences that have processors."""

    def choose(
        self, tokens: torch.Tensor, logits: torch.Tensor, sequences: list[tuple[int, Sequence]]
    ) -> bool:
        """Replaces the tokens of rows whose sequences are drawn for or have processors; False if
        there are none.

        A draw is made with a number that depends on the job's seed and the token's position alone,
        so neither neighbours nor a second run change what a job gets. NO_TOKEN stays.

        tokens: [rows] int32, what ``largest_token`` made of the logits [rows, vocabulary]
        """
        drawn = [(row, s) for row, s in sequences if s.job.temperature and not s.processors]
        _draw(tokens, logits, drawn)
        processed = [(row, s, s.processors) for row, s in sequences if s.processors]
        if processed:
            self._choose_processed(tokens, logits, processed)
        return bool(drawn or processed)

    def _choose_processed(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        sequences: list[tuple[int, Sequence, LogitsProcessors]],
    ) -> None:
        numbers = [(row, sequence.line) for row, sequence, _ in sequences]
        rows, lines = send(numbers, torch.int64, logits.device).unbind(dim=1)
        own = logits[rows].float()
        last_tokens = self._last_tokens[lines]
        process_logits(own, [(s, p) for _, s, p in sequences], last_tokens, self._counts)
        chosen = largest_token(own)
        _draw(chosen, own, [(i, s) for i, (_, s, _) in enumerate(sequences) if s.job.temperature])
        tokens[rows] = self._last_tokens[lines] = chosen
        self._counts.add([(i, s) for i, (_, s, p) in enumerate(sequences) if p.penalties], chosen)


def process_logits(
    logits: torch.Tensor,
    sequences: list[tuple[Sequence, LogitsProcessors]],
    last_tokens: torch.Tensor,
    counts: TokenCounts,
) -> None:
    """Changes logits in the order of vLLM's V1 sampler (vllm/v1/sample/sampler.py).

    First bans (-infinity) and biases are added: of ``bad_words``, of tokens that would end the
    answer before ``min_tokens``, of ``logit_bias``. Then penalties (``TokenCounts.penalize``).
    What follows there, the division by the temperature, is left to ``kernels.sample`` with
    ``top_k`` and ``top_p``. ``min_p``, which stands between, is moved before it: a token is left
    out if it is less than ``min_p`` times as likely as the likeliest one, that is, if its logit is
    further than ``-log(min_p) * temperature`` below the largest.

    logits: [sequences, vocabulary] float32
    last_tokens: [sequences] int32, the newest token of each answer, for those with one in flight
    """
    parts = [_additions(row, *item) for row, item in enumerate(sequences)]
    if any(len(part) for part in parts):
        numbers = send(np.concatenate(parts), torch.float64, logits.device)
        row, token, value, after = numbers.unbind(dim=1)
        row = row.long()
        is_due = (after == _ANY) | (after == last_tokens[row])
        # Added, not set: a token may be the last one of several phrases, of which one is due.
        value = value.where(is_due, 0.0).float()
        logits.index_put_((row, token.long()), value, accumulate=True)
    penalized = [
        (row, sequence, *processors.penalties)
        for row, (sequence, processors) in enumerate(sequences)
        if processors.penalties
    ]
    if penalized:
        counts.penalize(logits, penalized)
    cuts = [processors.cut for _, processors in sequences]
    if min(cuts) < math.inf:
        cut = send(cuts, torch.float32, logits.device)[:, None]
        logits.masked_fill_(logits < logits.amax(dim=-1, keepdim=True) - cut, -math.inf)


def _draw(
    tokens: torch.Tensor, logits: torch.Tensor, sequences: list[tuple[int, Sequence]]
) -> None:
    """Draws for the sequences of some rows."""
    if not sequences:
        return
    draws = [
        Draw(
            row,
            sequence.job.temperature,
            sequence.job.top_k,
            sequence.job.top_p,
            uniform(sequence.seed, sequence.num_generated),
        )
        for row, sequence in sequences
    ]
    sample(tokens, logits, send(draws, torch.float64, logits.device))


def _additions(row: int, sequence: Sequence, processors: LogitsProcessors) -> NDArray[np.float64]:
    """[additions, 4]: row, token, what is added to its logit, and the token that it must follow."""
    pairs = processors.additions
    if sequence.num_generated < sequence.job.min_tokens:
        pairs = np.concatenate([pairs, processors.until_min_tokens])
    always = np.column_stack([np.full(len(pairs), row), pairs, np.full(len(pairs), _ANY)])
    due = _due_phrases(row, sequence, processors.phrases)
    return np.concatenate([always, due]) if due else always


def _due_phrases(
    row: int, sequence: Sequence, phrases: list[list[int]]
) -> list[tuple[int, int, float, int]]:
    """Phrases of whose tokens the answer ends with all but the last. If its newest token is in
    flight, which is one at most, that one is left for the device to compare."""
    num_unknown = sequence.num_in_flight
    due = []
    for phrase in phrases:
        known = phrase[: len(phrase) - 1 - num_unknown]
        if not known or sequence.output_ids[-len(known) :] == known:
            after = phrase[-2] if num_unknown else _ANY
            due.append((row, phrase[-1], -math.inf, after))
    return due


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from SplitMix64 (Steele, Lea and Flood, 2014), by seed and position."""
    z = _mix(_mix(seed) + position * 0x9E3779B97F4A7C15)
    return (z >> 11) / 2**53


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
