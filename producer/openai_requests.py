"""A line of one of OpenAI's batch files -> the fields of a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeGuard

from producer.lines import shown
from schemas.errors import BadInput
from schemas.job import MAX_TOKENS, SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

#: The adapter that a model's name stands for, None for the base model; raises BadInput.
AdapterOf = Callable[[str], str | None]

Fields = dict[str, Any]

_OF_A_LINE = ("custom_id", "method", "url", "body")

#: Fields of a body that change nothing about the answer here.
_IGNORED = {
    *("metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options"),
    *("prompt_cache_retention", "safety_identifier", "service_tier", "store", "stream_options"),
    "user",
}

_NO_TOOLS = "answers are text, and tools cannot be called"
_NO_STREAM = "an answer comes as a whole, as a line of the output file"

#: Fields of a body that are refused: values that change nothing, which may stand there, and why.
_REFUSED_IN_CHATS: dict[str, tuple[tuple[object, ...], str]] = {
    "audio": ((), "answers are text"),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "modalities": ((["text"],), "answers are text"),
    "moderation": ((), "nothing is moderated"),
    "reasoning_effort": (("none",), "the model's own template decides how it reasons"),
    "response_format": (({"type": "text"},), "answers are text of any form"),
    "stream": ((False,), _NO_STREAM),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "tools": (([],), _NO_TOOLS),
    "verbosity": (("medium",), "say in the messages how long answers shall be"),
    "web_search_options": ((), "nothing is looked up on the web"),
}
_REFUSED_IN_COMPLETIONS: dict[str, tuple[tuple[object, ...], str]] = {
    "echo": ((False,), "the prompt is not repeated in the answer"),
    "stream": ((False,), _NO_STREAM),
    "suffix": (("",), "text is only written at the end of the prompt"),
}

#: Likewise, fields of a message beside its role and its content.
_REFUSED_IN_MESSAGES = {
    "audio": "messages are text",
    "function_call": _NO_TOOLS,
    "name": "the model's template has no place for it; write it into the content",
    "refusal": "write it into the content",
    "tool_call_id": _NO_TOOLS,
    "tool_calls": _NO_TOOLS,
}


_OF_A_REQUEST = frozenset(("method", "url", "body"))


def is_request(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether what stands in a line is such a request: no job has these fields."""
    return isinstance(value, Mapping) and not _OF_A_REQUEST.isdisjoint(value)


def origin(value: object) -> Fields | None:
    """What a job keeps of its request as its metadata, so that its result can be told in OpenAI's
    form: of ``custom_id``, ``url`` and the body's ``model`` those that are there."""
    if not is_request(value):
        return None
    body = value.get("body")
    model = body.get("model") if isinstance(body, Mapping) else None
    found = {"custom_id": value.get("custom_id"), "url": value.get("url"), "model": model}
    return {name: text for name, text in found.items() if _is_text(text)}


def job_fields(request: Mapping[str, Any], adapter_of: AdapterOf) -> Fields:
    """The fields of the job that a request asks for, but for its id.

    What a body leaves out is as OpenAI's API has it, not as in other lines: the temperature is 1,
    a chat's answer may fill the model's context, and a completion has at most 16 tokens. Raises
    BadInput for a request that is malformed, or asks for what is not served.
    """
    for name in request:
        if name not in _OF_A_LINE:
            raise BadInput(_unknown(name, "", _OF_A_LINE))
    _text(request, "custom_id", "")
    if request.get("method") != "POST":
        raise BadInput(f"method: should be 'POST' (found {shown(request.get('method'))})")
    endpoint = _ENDPOINTS.get(_text(request, "url", ""))
    if not endpoint:
        raise BadInput(
            f"url: should be '{CHAT}' or '{COMPLETIONS}' (found {shown(request['url'])})"
        )
    body = request.get("body")
    if not isinstance(body, Mapping):
        raise BadInput("body: should be an object")
    lora = adapter_of(_text(body, "model", "body."))
    return {**_body_fields(body, endpoint), "lora": lora, "metadata": origin(request)}


@dataclass(frozen=True)
class _Endpoint:
    prompt_fields: Callable[[Fields], Fields]
    """Takes what it honours, beside the sampling parameters, out of a body."""
    defaults: Fields
    own_fields: frozenset[str]
    """Those, and the body's other names for parameters."""
    refused: Mapping[str, tuple[tuple[object, ...], str]]


def _body_fields(body: Mapping[str, Any], endpoint: _Endpoint) -> Fields:
    given = {name: value for name, value in body.items() if value is not None}
    known = endpoint.own_fields | SamplingParams.model_fields.keys() | {"model"}
    for name, value in given.items():
        if name in endpoint.refused:
            harmless, reason = endpoint.refused[name]
            if value not in harmless:
                raise BadInput(f"body.{name}: not supported: {reason}")
        elif name not in known and name not in _IGNORED:
            raise BadInput(_unknown(name, "body.", sorted(known)))
    fields = {name: value for name, value in given.items() if name in known - {"model"}}
    fields = endpoint.prompt_fields(fields)
    seed = fields.get("seed")
    if isinstance(seed, int) and -(2**63) <= seed < 0:
        fields["seed"] = seed % 2**64  # OpenAI's are signed.
    return endpoint.defaults | fields


def _chat_fields(fields: Fields) -> Fields:
    messages = fields.get("messages")
    if messages is None:
        raise BadInput("body.messages: field required")
    if not isinstance(fields.get("logprobs", False), bool):
        raise BadInput(
            "body.logprobs: should be true or false in a chat; top_logprobs takes the number"
        )
    if isinstance(messages, list):
        fields["messages"] = [
            _message(message, f"body.messages[{index}]") for index, message in enumerate(messages)
        ]
    limit = fields.pop("max_completion_tokens", None)
    if limit is not None:
        if fields.get("max_tokens", limit) != limit:
            raise BadInput(
                "body.max_tokens: is another name for max_completion_tokens, which has another"
                " value; leave it out"
            )
        fields["max_tokens"] = limit
    return fields


def _message(message: object, place: str) -> object:
    """A message as a job has it; one that is none is refused later."""
    if not isinstance(message, Mapping):
        return message
    for name, reason in _REFUSED_IN_MESSAGES.items():
        if message.get(name) not in (None, []):
            raise BadInput(f"{place}.{name}: not supported: {reason}")
    role = message.get("role")
    if role in ("tool", "function"):
        raise BadInput(f"{place}.role: '{role}' is not supported: {_NO_TOOLS}")
    content = message.get("content")
    if isinstance(content, list):
        parts = [_part(part, f"{place}.content[{index}]") for index, part in enumerate(content)]
        content = "\n".join(parts)
    others = {name: message[name] for name in message if name not in _REFUSED_IN_MESSAGES}
    # Models that know no developer know the same as the system.
    return others | {"role": "system" if role == "developer" else role, "content": content}


def _part(part: object, place: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and _is_text(part.get("text")):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise BadInput(f"{place}: should be a part of type 'text' (found {shown(kind)})")


def _completion_fields(fields: Fields) -> Fields:
    number = fields.get("n", 1)
    if fields.pop("best_of", number) != number:
        raise BadInput("body.best_of: not supported: all answers are returned; set n instead")
    prompt = fields.pop("prompt", None)
    if prompt is None:
        raise BadInput("body.prompt: field required")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise BadInput(
                f"body.prompt: holds {len(prompt)} prompts; give each a line and a custom_id of"
                " its own"
            )
        (prompt,) = prompt
    return fields | {"prompt_token_ids" if isinstance(prompt, list) else "prompt": prompt}


_ENDPOINTS = {
    CHAT: _Endpoint(
        _chat_fields,
        {"temperature": 1.0, "max_tokens": MAX_TOKENS},
        frozenset({"messages", "max_completion_tokens"}),
        _REFUSED_IN_CHATS,
    ),
    COMPLETIONS: _Endpoint(
        _completion_fields,
        {"temperature": 1.0, "max_tokens": 16},
        frozenset({"prompt", "best_of"}),
        _REFUSED_IN_COMPLETIONS,
    ),
}


def _text(fields: Mapping[str, Any], name: str, place: str) -> str:
    value = fields.get(name)
    if value is None:
        raise BadInput(f"{place}{name}: field required")
    if not _is_text(value) or not value:
        raise BadInput(f"{place}{name}: should be a string that is not empty")
    return str(value)


def _is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can hold."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _unknown(name: str, place: str, known: list[str] | tuple[str, ...]) -> str:
    close = get_close_matches(str(name)[:100], known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
    return f"unknown field {shown(f'{place}{name}')}: {hint}"
