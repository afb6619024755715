"""Results -> lines of the output file and of the error file of OpenAI's batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from producer.openai_requests import COMPLETIONS
from schemas.result import Choice, LikelyToken, Result, TokenLogprob

#: What OpenAI's API answers where a job fails with a code: HTTP status, type and code of the error.
#: Any other code is the server's fault.
_ERRORS = {
    "adapter_unavailable": (503, "server_error", "model_unavailable"),
    "adapter_unloaded": (404, "invalid_request_error", "model_not_found"),
    "bad_line": (400, "invalid_request_error", "invalid_request"),
    "bad_prompt": (400, "invalid_request_error", "invalid_prompt"),
    "bad_sampling": (400, "invalid_request_error", "invalid_value"),
    "kv_cache_too_small": (400, "invalid_request_error", "context_length_exceeded"),
    "no_chat_template": (400, "invalid_request_error", "invalid_prompt"),
    "no_tokenizer": (400, "invalid_request_error", "invalid_prompt"),
    "prompt_too_long": (400, "invalid_request_error", "context_length_exceeded"),
    "too_many_logprobs": (400, "invalid_request_error", "invalid_value"),
    "unknown_adapter": (404, "invalid_request_error", "model_not_found"),
}
_SERVER_ERROR = (500, "server_error", "server_error")

#: Requests that were not run are told without a response.
_NOT_RUN = {"cancelled": "batch_cancelled", "expired": "batch_expired"}


def line(result: Result, base_model: Callable[[], str]) -> dict[str, Any]:
    """The line of a result.

    Of a job that was not sent as a request its id serves as ``custom_id``, its adapter or the name
    that ``base_model`` returns as ``model``, and its answer is that of a chat.
    """
    asked = _asked(result)
    response, error = None, None
    if result.status in _NOT_RUN:
        message = result.error.message if result.error else ""
        error = {"code": _NOT_RUN[result.status], "message": message}
    else:
        status, body = (
            (200, _body(result, asked, base_model)) if result.status == "done" else _failure(result)
        )
        response = {"status_code": status, "request_id": result.id, "body": body}
    return {
        "id": f"batch_req_{result.id}",
        "custom_id": asked.get("custom_id", result.id),
        "response": response,
        "error": error,
    }


def _asked(result: Result) -> dict[str, str]:
    """What the job kept of its request."""
    metadata = result.metadata if isinstance(result.metadata, dict) else {}
    return {name: value for name, value in metadata.items() if isinstance(value, str)}


def _failure(result: Result) -> tuple[int, dict[str, Any]]:
    code = result.error.code if result.error else ""
    status, kind, openai_code = _ERRORS.get(code, _SERVER_ERROR)
    message = result.error.message if result.error else f"the job is {result.status}"
    return status, {"error": {"message": message, "type": kind, "param": None, "code": openai_code}}


def _body(result: Result, asked: dict[str, str], base_model: Callable[[], str]) -> dict[str, Any]:
    is_chat = asked.get("url") != COMPLETIONS
    choice_of = _chat_choice if is_chat else _completion_choice
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{result.id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(result.timings.finished or result.timings.queued),
        "model": asked.get("model") or result.lora or base_model(),
        "choices": [choice_of(choice) for choice in _choices(result)],
        "usage": {
            "prompt_tokens": result.usage.prompt_tokens,
            "completion_tokens": result.usage.completion_tokens,
            "total_tokens": result.usage.prompt_tokens + result.usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": result.usage.cached_tokens},
        },
        "system_fingerprint": result.revision,
    }


def _choices(result: Result) -> list[Choice]:
    if result.choices is not None:
        return result.choices
    return [
        Choice(
            index=0,
            text=result.text,
            token_ids=result.token_ids or [],
            finish_reason=result.finish_reason or "stop",
            logprobs=result.logprobs,
        )
    ]


def _chat_choice(choice: Choice) -> dict[str, Any]:
    logprobs = None
    if choice.logprobs is not None:
        logprobs = {"content": [_chat_token(token) for token in choice.logprobs], "refusal": None}
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
    }


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return _likely(token) | {"top_logprobs": [_likely(likely) for likely in token.top_logprobs]}


def _likely(token: LikelyToken) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": token.bytes}


def _completion_choice(choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": choice.text or "",
        "logprobs": None if choice.logprobs is None else _completion_logprobs(choice.logprobs),
        "finish_reason": choice.finish_reason,
    }


def _completion_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """``text_offset`` counts characters from the answer's beginning."""
    offsets, end = [], 0
    for token in tokens:
        offsets.append(end)
        end += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_by_text(token) for token in tokens],
        "text_offset": offsets,
    }


def _by_text(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and the chosen one; of several with one text the likeliest counts."""
    found: dict[str, float] = {}
    for likely in (*token.top_logprobs, token):
        found.setdefault(likely.token, likely.logprob)
    return found
