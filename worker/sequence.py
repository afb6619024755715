"""A claimed job while it runs in the engine."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from schemas.errors import JobError
from schemas.job import Job
from schemas.result import FinishReason
from worker.adapters.peft_format import Adapter
from worker.logits_processors import LogitsProcessors
from worker.stop_strings import StopSearch


class TokenNumbers(NamedTuple):
    """How likely a token was, and the likeliest in its place; natural logarithms."""

    logprob: float
    top_ids: list[int]
    """The likeliest first."""
    top_logprobs: list[float]


class Phase(Enum):
    """Where a sequence stands in the engine."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """Tokens, pages and progress of one job, or of one of several answers to it.

    A job for ``n`` answers is known by its first sequence, whose ``others`` are the rest.

    The cache holds keys and values of the first ``num_cached`` tokens, those that a launched batch
    is about to write included. A sequence whose cache lacks only its newest token is decoding; one
    that lacks more is (again) in prefill.
    """

    job: Job
    prompt_ids: list[int]
    max_new_tokens: int
    adapter: Adapter | None = None
    stop_search: StopSearch | None = None
    end_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer."""
    processors: LogitsProcessors | None = None
    index: int = 0
    """Among the answers to the job."""
    first: Sequence | None = None
    """The job's first sequence, unless it is this one."""
    others: list[Sequence] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_pages_told: int = 0
    """Pages that stand in the device's page table."""
    num_cached: int = 0
    prefix_keys: list[bytes] = field(default_factory=list)
    """Of the pages that its prompt fills, if it shares them (worker/page_pool.py)."""
    num_reused: int = 0
    """Tokens of the prompt that stood in the cache when it first began."""
    num_in_flight: int = 0
    """Tokens that launched batches choose, and that are not known here yet."""
    line: int = -1
    """While it runs, its line of the page table."""
    phase: Phase = Phase.WAITING
    finish_reason: FinishReason | None = None
    error: JobError | None = None
    """Why it could not go on."""
    stop_text: str | None = None
    """The text up to the stop string, once one was found."""
    has_end_token: bool = False
    """Whether the last token ended the answer, of which it then is no part."""
    logprobs: list[TokenNumbers] = field(default_factory=list)
    """One for each of ``output_ids``, if the job wants them."""
    prompt_logprobs: list[TokenNumbers] = field(default_factory=list)
    """One for each of ``prompt_ids`` but the first, likewise; as far as they are known."""
    num_scored: int = 0
    """Rows of the prompt whose logits launched batches make for that."""
    made: float = field(default_factory=time.monotonic)
    """When it was ready to run; this and the next three are moments of the monotonic clock."""
    started: float | None = None
    """When its first batch began."""
    first_token: float | None = None
    finished: float | None = None

    @cached_property
    def seed(self) -> int:
        """The job's, or one made from its id: a second attempt draws the same tokens. Of answers
        after the first, one made from that seed and their number."""
        seed = _hashed(self.job.id) if self.job.seed is None else self.job.seed
        return _hashed(f"{seed} {self.index}") if self.index else seed

    @cached_property
    def is_plain(self) -> bool:
        """Whether the token of the largest logit is all it ever wants of a batch."""
        job = self.job
        return not (job.temperature or self.processors or job.num_logprobs is not None)

    @property
    def banned_token_ids(self) -> set[int]:
        """What may not follow ``output_ids``."""
        if not self.processors:
            return set()
        is_short = len(self.output_ids) < self.job.min_tokens
        return self.processors.banned(self.output_ids, is_short=is_short)

    @property
    def answers(self) -> list[Sequence]:
        """All of the job, of which this is the first."""
        return [self, *self.others]

    @property
    def num_unscored(self) -> int:
        """Rows of the prompt whose logits are still wanted: each tells of the next token."""
        if self.job.prompt_logprobs is None or self.first:
            return 0
        return len(self.prompt_ids) - 1 - self.num_scored

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + self.num_generated

    @property
    def num_generated(self) -> int:
        return len(self.output_ids) + self.num_in_flight

    @property
    def num_uncached(self) -> int:
        return self.num_tokens - self.num_cached

    @property
    def max_tokens(self) -> int:
        """Tokens it can come to."""
        return len(self.prompt_ids) + self.max_new_tokens

    @property
    def has_begun(self) -> bool:
        """Whether it was ever let into a batch; it may wait again, having been preempted."""
        return self.phase is not Phase.WAITING or self.started is not None

    def token_ids(self, start: int, end: int) -> list[int]:
        """Prompt and output as one row, from ``start`` to before ``end``."""
        n_prompt = len(self.prompt_ids)
        if start >= n_prompt:
            return self.output_ids[start - n_prompt : end - n_prompt]
        return (self.prompt_ids[start:end] + self.output_ids)[: end - start]


def _hashed(text: str) -> int:
    """A number of 64 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
