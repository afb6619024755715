"""One prompt with its sampling parameters and adapter name."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal, Self, get_args

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
MAX_TOKENS = 1_000_000
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 1024
MAX_BAD_WORDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_N = 128

JobId = Annotated[
    str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\s\x00-\x1f\x7f]+$")
]
PromptText = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
BadWord = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _with_numbers_as_keys(value: object) -> object:
    """JSON writes the keys of an object as strings, also those that are token ids."""
    if not isinstance(value, Mapping):
        raise ValueError(f"should be an object of token ids and numbers (found {value!r:.40})")
    found = {_token_id(key): number for key, number in value.items()}
    if len(found) < len(value):
        raise ValueError("a token is named twice")
    return found


def _token_id(key: object) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
        key = int(key)
    if isinstance(key, int) and not isinstance(key, bool) and 0 <= key < 2**31:
        return key
    raise ValueError(f"should have token ids as keys (found {str(key)[:40]!r})")


def _as_number(value: object) -> object:
    if isinstance(value, bool):
        return 0 if value else None
    return value


#: A string means a list of it, as in OpenAI's API.
StopStrings = Annotated[list[StopString], BeforeValidator(_as_list)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)]
LogitBias = Annotated[
    dict[int, Bias], Field(max_length=MAX_LOGIT_BIASES), BeforeValidator(_with_numbers_as_keys)
]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]

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
        "should be a number of seconds, more than 0 and at most ten years, or a moment such as"
        f" '2026-12-24T18:00:00+01:00' (found {value!r:.40})"
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

    def to_wire(self) -> str:
        """The record as JSON without defaults: equal ones give equal texts, also when a later
        version adds a field."""
        return self.model_dump_json(exclude_defaults=True)

    @classmethod
    def from_wire(cls, text: str) -> Self:
        """Read a record back; raises pydantic's ValidationError for anything that is not one."""
        return cls.model_validate_json(text)


class Message(WireModel):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: PromptText


class SamplingParams(WireModel):
    """How the next token is chosen, when to stop, and what is told of the choice.

    The fields mean what they mean in vLLM's SamplingParams and in OpenAI's API.
    """

    max_tokens: int = Field(default=128, ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=0.0, ge=0.0, le=100.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    """0 and -1 keep every token."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0, allow_inf_nan=False)
    """Tokens are kept that are at least this times as likely as the likeliest."""
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    stop: StopStrings = Field(default_factory=list, max_length=MAX_STOP_STRINGS)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_STOP_TOKENS)
    """Tokens that end the answer, as its last one."""
    min_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    """Tokens of the answer before one may end it."""
    ignore_eos: bool = False
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0, allow_inf_nan=False)
    """Above 1 makes tokens of prompt and answer less likely. It divides logits: those of a penalty
    next to 0 would not be finite."""
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0, allow_inf_nan=False)
    """Above 0 makes tokens of the answer less likely."""
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0, allow_inf_nan=False)
    """Likewise, by how often they occur in it."""
    logit_bias: LogitBias = Field(default_factory=dict)
    """What is added to the logits of tokens."""
    bad_words: list[BadWord] = Field(default_factory=list, max_length=MAX_BAD_WORDS)
    """Words whose tokens never stand in the answer in a row."""
    logprobs: Annotated[NumLogprobs | None, BeforeValidator(_as_number)] = None
    """Tell the log probability of each token of the answer, and of as many of the likeliest in its
    place; true is 0, false null."""
    top_logprobs: NumLogprobs = 0
    """The number of the likeliest, given apart from ``logprobs`` as in OpenAI's chats."""
    prompt_logprobs: NumLogprobs | None = None
    """As ``logprobs``, of the prompt's tokens."""
    n: int = Field(default=1, ge=1, le=MAX_N)
    """Answers to make."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens: should be at most max_tokens, {self.max_tokens}"
                f" (found {self.min_tokens})"
            )
        if self.top_logprobs and self.logprobs is None:
            raise ValueError("top_logprobs: needs logprobs; set it to true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """The likeliest tokens to tell for each one of the answer; None to tell nothing."""
        return None if self.logprobs is None else max(self.logprobs, self.top_logprobs)


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


class RefusedJob(WireModel):
    """A line that asks for no job that can be run, as its submission keeps it: failed."""

    id: JobId
    refusal: str
    """What is wrong with the line."""
    metadata: JsonValue = None
