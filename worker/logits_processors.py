"""What a job wants changed of the logits before a token is chosen."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.job import SamplingParams


@dataclass(frozen=True)
class LogitsProcessors:
    """Those of one job, as numbers."""

    additions: NDArray[np.float64]
    """[additions, 2]: a token, and what is added to its logit."""
    until_min_tokens: NDArray[np.float64]
    """Likewise, until the answer has so many tokens."""
    phrases: list[list[int]]
    """Tokens that must not follow each other in the answer; two or more of them."""
    penalties: tuple[float, float, float] | None
    """Repetition, frequency, presence."""
    cut: float
    """A logit so far below the largest, or farther, is left out; infinity: none is."""

    def banned(self, answer: list[int], *, is_short: bool) -> set[int]:
        """The tokens that may not follow an answer, which ``is_short`` of its least length."""
        pairs = [*self.additions, *(self.until_min_tokens if is_short else [])]
        found = {int(token) for token, addition in pairs if addition == -math.inf}
        ends = {phrase[-1] for phrase in self.phrases if answer[1 - len(phrase) :] == phrase[:-1]}
        return found | ends


def logits_processors(
    params: SamplingParams, ends: Collection[int], bad_words: Iterable[list[int]]
) -> LogitsProcessors | None:
    """The processors of a job; None if it wants none.

    ``ends``: tokens that end its answer; ``bad_words``: their tokens
    """
    words = list(bad_words)
    banned = [(word[0], -math.inf) for word in words if len(word) == 1]
    phrases = [word for word in words if len(word) > 1]
    penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
    cut = math.inf
    if params.min_p and params.temperature:
        cut = -math.log(params.min_p) * params.temperature
    processors = LogitsProcessors(
        additions=_pairs([*banned, *params.logit_bias.items()]),
        until_min_tokens=_pairs([(end, -math.inf) for end in ends] if params.min_tokens else []),
        phrases=phrases,
        penalties=None if penalties == (1.0, 0.0, 0.0) else penalties,
        cut=cut,
    )
    is_none = (
        not len(processors.additions)
        and not len(processors.until_min_tokens)
        and not phrases
        and not processors.penalties
        and cut == math.inf
    )
    return None if is_none else processors


def _pairs(pairs: list[tuple[int, float]]) -> NDArray[np.float64]:
    return np.array(pairs, np.float64).reshape(-1, 2)
