"""The one outcome of a job."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

#: Every state of a job, in the order of its life. A job ends in exactly one of the last five.
JobState = Literal["waiting", "running", "done", "failed", "dead", "cancelled", "expired"]
STATES: tuple[JobState, ...] = (
    "waiting",
    "running",
    "done",
    "failed",
    "dead",
    "cancelled",
    "expired",
)
TERMINAL_STATES = frozenset(STATES[2:])

#: Seconds for which results are kept after the last job of their submission has ended.
RESULT_TTL = 7 * 86400.0

FinishReason = Literal["stop", "length"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class LikelyToken(_Record):
    """A token and how likely the model found it."""

    token: str
    """Its text; U+FFFD where its bytes are no text by themselves."""
    token_id: int
    logprob: float
    """Natural logarithm of its probability, before any of the job's sampling parameters."""
    bytes: list[int] | None
    """Of its text in UTF-8; a character may be spread over the bytes of several tokens. None, with
    an empty ``token``, from a worker without tokenizer."""


class TokenLogprob(LikelyToken):
    """A token that stands in a text, and the likeliest ones in its place."""

    top_logprobs: list[LikelyToken]
    """As many as were asked for, the likeliest first."""


class Choice(_Record):
    """One of several answers to one prompt."""

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None


class Usage(_Record):
    """Tokens read and written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Of all answers."""
    cached_tokens: int = 0
    """Of ``prompt_tokens``, those that an earlier job of the same adapter had left in the cache."""


class ErrorInfo(_Record):
    """Why a job did not end as ``done``: a code for programs, a sentence for people."""

    code: str
    message: str


class Timings(_Record):
    """Moments in a job's life, in seconds since 1970 by the Redis server's clock."""

    queued: float
    """0 where the job's record is damaged so that it does not say it."""
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None


class Attempt(_Record):
    """How one execution of a job ended that brought no result; moments as in ``Timings``."""

    attempt: int
    worker: str | None = None
    started: float | None = None
    ended: float
    outcome: str
    """``lease_expired`` (its worker died or stalled), ``engine_failed``, or an error's code."""
    message: str


class Result(_Record):
    """One result line.

    Of a job that asks for several answers ``text``, ``token_ids``, ``finish_reason`` and
    ``logprobs`` are None, and ``choices`` has them.
    """

    id: str
    submission: str
    """Empty where the job's record is damaged so that it does not say it."""
    lora: str | None
    revision: str | None = None
    status: JobState
    text: str | None = None
    token_ids: list[int] | None = None
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    """One for each of ``token_ids``, if the job asked for it."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One for each token of the prompt, likewise; None for the first, which nothing precedes."""
    choices: list[Choice] | None = None
    usage: Usage = Usage()
    error: ErrorInfo | None = None
    timings: Timings
    worker: str | None = None
    metadata: JsonValue = None
