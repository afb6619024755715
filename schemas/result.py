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


class Usage(_Record):
    """Tokens read and written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of ``prompt_tokens``, those that an earlier job of the same adapter had left in the cache."""


class ErrorInfo(_Record):
    """Why a job did not end as ``done``: a code for programs, a sentence for people."""

    code: str
    message: str


class Timings(_Record):
    """Moments in a job's life, in seconds since 1970 by the Redis server's clock."""

    queued: float
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
    """One result line."""

    id: str
    submission: str
    lora: str | None
    revision: str | None = None
    status: JobState
    text: str | None = None
    token_ids: list[int] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage = Usage()
    error: ErrorInfo | None = None
    timings: Timings
    worker: str | None = None
    metadata: JsonValue = None
