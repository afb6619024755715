"""A claimed job while it runs in the engine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

from schemas.errors import JobError
from schemas.job import Job
from schemas.result import FinishReason
from worker.adapters.peft_format import Adapter
from worker.stop_strings import StopSearch


class Phase(Enum):
    """Where a sequence stands in the engine."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """Tokens, pages and progress of one job.

    The cache holds keys and values of the first ``num_cached`` tokens, those that a launched batch
    is about to write included. A sequence whose cache lacks only its newest token is decoding; one
    that lacks more is (again) in prefill.
    """

    job: Job
    prompt_ids: list[int]
    max_new_tokens: int
    adapter: Adapter | None = None
    stop_search: StopSearch | None = None
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
    started: float | None = None
    """When its first batch began; this and the next two are moments of the monotonic clock."""
    first_token: float | None = None
    finished: float | None = None

    @cached_property
    def seed(self) -> int:
        """The job's, or one made from its id: a second attempt draws the same tokens."""
        if self.job.seed is not None:
            return self.job.seed
        return int.from_bytes(hashlib.sha256(self.job.id.encode()).digest()[:8], "big")

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
