"""One prompt with its sampling parameters and adapter name."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    model_validator,
)

from schemas.adapter import AdapterName

#: Bounds on one job. They keep a single line from filling a worker's memory; the model's own
#: context length is checked by the worker, which knows it.
MAX_PROMPT_CHARS = 4_000_000
MAX_PROMPT_TOKENS = 1_000_000
MAX_STOP_STRINGS = 16

JobId = Annotated[
    str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\s\x00-\x1f\x7f]+$")
]
PromptText = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]

#: Which jobs are served first. Lower ones have their share and never starve (broker/lua/claim.lua).
Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)

#: The longest time in seconds that may be left until a deadline: ten years.
MAX_DEADLINE_SECONDS = 10 * 365 * 86400


def _check_deadline(value: object) -> object:
    if isinstance(value, str) and _moment(value):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if 0 < value <= MAX_DEADLINE_SECONDS:
            return value
    elif value is None:
        return value
    raise ValueError(
        "deadline: should be a number of seconds, more than 0 and at most ten years, or a moment"
        " such as '2026-12-24T18:00:00+01:00'"
    )


def _moment(text: str) -> datetime | None:
    """A moment in ISO 8601; None if it is none, or none that is the same everywhere."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else None


#: Until when a job must have begun: seconds from the moment when the queue takes it in, or a moment
#: in ISO 8601 with its offset from UTC.
Deadline = Annotated[float | str | None, BeforeValidator(_check_deadline)]


class WireModel(BaseModel):
    """A record whose fields are known, of the right type, and not changed once made."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Message(WireModel):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: PromptText


class SamplingParams(WireModel):
    """How the next token is chosen and when to stop."""

    max_tokens: int = Field(default=128, ge=1, le=1_000_000)
    temperature: float = Field(default=0.0, ge=0.0, le=100.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0, lt=2**31, description="0 keeps every token")
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    stop: list[StopString] = Field(default_factory=list, max_length=MAX_STOP_STRINGS)
    ignore_eos: bool = False


class Job(SamplingParams):
    """What a line of a prompts file asks for, and what a worker is given.

    Exactly one of ``prompt``, ``messages`` and ``prompt_token_ids`` is set.
    """

    id: JobId
    lora: AdapterName | None = None
    prompt: PromptText | None = None
    # fail_fast: a list of a million wrong tokens is one error, not a million.
    messages: list[Message] | None = Field(
        default=None, min_length=1, max_length=4096, fail_fast=True
    )
    prompt_token_ids: list[TokenId] | None = Field(
        default=None, min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True
    )
    priority: Priority = "normal"
    deadline: Deadline = None
    metadata: JsonValue = None

    @model_validator(mode="after")
    def _has_exactly_one_prompt(self) -> Job:
        given = [
            name
            for name in ("prompt", "messages", "prompt_token_ids")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise ValueError(
                f"give exactly one of prompt, messages, prompt_token_ids (found {found})"
            )
        return self

    @property
    def deadline_moment(self) -> float | None:
        """A deadline that is a moment, in seconds since 1970."""
        moment = _moment(self.deadline) if isinstance(self.deadline, str) else None
        return moment.timestamp() if moment else None

    def to_wire(self) -> str:
        """The job as JSON without defaults: equal jobs give equal texts, also when a later
        version adds a field."""
        return self.model_dump_json(exclude_defaults=True)

    @classmethod
    def from_wire(cls, text: str) -> Job:
        """Read a job back; raises pydantic's ValidationError for anything that is not one."""
        return cls.model_validate_json(text)
