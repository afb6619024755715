"""How likely the model found tokens, and which others it found likely in their place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from worker.batch import ScoredRows
from worker.sequence import Sequence, TokenNumbers
from worker.staging import bring, send

#: In place of the log probability of a token whose logit is -infinity, which JSON cannot hold.
LEAST = -9999.0


class _Row(NamedTuple):
    sequence: Sequence
    num_top: int


class Logprobs:
    """Of one token in each of some rows of logits; on their way to the host."""

    def __init__(self, rows: list[_Row], logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """``log_softmax(logits)`` in float32, of what the model gave: no processor has changed it.

        logits: [rows, vocabulary]; tokens: [rows] integers, NO_TOKEN allowed
        """
        logprobs = torch.log_softmax(logits.float(), dim=-1).clamp_(min=LEAST)
        num_top = min(max(row.num_top for row in rows), logprobs.shape[1])
        values, ids = logprobs.topk(num_top, dim=-1)
        chosen = logprobs.gather(1, tokens.long().clamp(0)[:, None]).squeeze(1)
        self._rows = rows
        self._chosen, self._values, self._ids = bring(chosen), bring(values), bring(ids)

    def numbers(self) -> Iterator[tuple[Sequence, TokenNumbers]]:
        """By row, once the device is done."""
        columns = self._chosen.tolist(), self._ids.tolist(), self._values.tolist()
        for row, logprob, ids, values in zip(self._rows, *columns, strict=True):
            yield row.sequence, TokenNumbers(logprob, ids[: row.num_top], values[: row.num_top])


def answer_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, sequences: list[tuple[int, Sequence]]
) -> Logprobs | None:
    """Of the tokens [rows] that were chosen, for the sequences that want it; ``sequences`` with
    their rows."""
    found = [
        (row, _Row(sequence, sequence.job.num_logprobs))
        for row, sequence in sequences
        if sequence.job.num_logprobs is not None
    ]
    if not found:
        return None
    index = send([row for row, _ in found], torch.int64, logits.device)
    return Logprobs([row for _, row in found], logits[index], tokens[index])


def prompt_logprobs(logits: torch.Tensor, scored: list[ScoredRows]) -> Logprobs | None:
    """Of the prompts' tokens after the scored rows; ``logits`` [scored rows, vocabulary]."""
    rows, token_ids = list[_Row](), list[int]()
    for sequence, position, places in scored:
        rows += [_Row(sequence, sequence.job.prompt_logprobs or 0)] * len(places)
        token_ids += sequence.prompt_ids[position + 1 : position + 1 + len(places)]
    if not rows:
        return None
    return Logprobs(rows, logits, send(token_ids, torch.int64, logits.device))
