"""Lines of OpenAI's batch files, right and wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import ChatCompletionMessageParam
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import (
    CompletionCreateParamsNonStreaming as CompletionParams,
)

from producer import openai_requests
from producer.lines import make_job
from producer.openai_requests import CHAT, COMPLETIONS, is_request, job_fields, origin
from schemas.errors import BadInput
from schemas.job import MAX_TOKENS, Job, SamplingParams

MODELS = {"llama": None, "sql": "sql", "llama:sql": "sql"}


def request(body: object, url: str = CHAT, **changes: object) -> dict[str, Any]:
    return {"custom_id": "r-1", "method": "POST", "url": url, "body": body} | changes


def chat(**fields: object) -> dict[str, Any]:
    body = {"model": "llama", "messages": [{"role": "user", "content": "Hello"}]}
    return request(body | fields)


def completion(**fields: object) -> dict[str, Any]:
    return request({"model": "llama", "prompt": "Hello"} | fields, COMPLETIONS)


def job_of(line: Mapping[str, Any]) -> Job:
    return make_job(job_fields(line, MODELS.__getitem__), made_id="made.1")


def refusal(line: Mapping[str, Any]) -> str:
    with pytest.raises(BadInput) as refused:
        job_of(line)
    return str(refused.value)


@pytest.mark.parametrize("line", ["x", 5, None, {"prompt": "x"}, {"custom_id": "x"}, {"id": "x"}])
def test_other_lines_are_no_requests(line: object) -> None:
    assert not is_request(line)


def test_a_line_that_lacks_one_part_is_a_request_that_is_refused() -> None:
    for name in ("custom_id", "method", "url", "body"):
        line = chat()
        del line[name]
        assert is_request(line)
        assert refusal(line).startswith(f"{name}: ")


def test_a_chat_becomes_a_job() -> None:
    line = chat(
        model="llama:sql",
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        n=3,
        seed=-1,
        stop="END",
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"5": 2},
        logprobs=True,
        top_logprobs=4,
    )
    job = job_of(line)
    assert job.lora == "sql"
    assert job.messages is not None
    assert [(m.role, m.content) for m in job.messages] == [("user", "Hello")]
    assert (job.max_tokens, job.temperature, job.top_p, job.n) == (7, 0.5, 0.9, 3)
    assert (job.seed, job.stop, job.logit_bias) == (2**64 - 1, ["END"], {5: 2.0})
    assert (job.presence_penalty, job.frequency_penalty, job.num_logprobs) == (1, -1, 4)
    assert job.metadata == {"custom_id": "r-1", "url": CHAT, "model": "llama:sql"}
    assert job.id == "made.1"


def test_what_a_body_leaves_out_is_as_in_openais_api() -> None:
    assert (job_of(chat()).temperature, job_of(chat()).max_tokens) == (1.0, MAX_TOKENS)
    assert (job_of(completion()).temperature, job_of(completion()).max_tokens) == (1.0, 16)


def test_null_leaves_a_field_out() -> None:
    nulls = dict.fromkeys((*SamplingParams.model_fields, "tools", "stream", "user"))
    assert job_of(chat(**nulls)) == job_of(chat())
    nulls = dict.fromkeys((*SamplingParams.model_fields, "suffix", "echo", "best_of"))
    assert job_of(completion(**nulls)) == job_of(completion())


def test_sampling_fields_of_vllm_are_honoured() -> None:
    fields = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2}
    for line in (chat(**fields), completion(**fields)):
        job = job_of(line)
        assert {name: getattr(job, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("prompt", "field", "expected"),
    [
        ("Hello", "prompt", "Hello"),
        (["Hello"], "prompt", "Hello"),
        ([1, 2, 3], "prompt_token_ids", [1, 2, 3]),
        ([[1, 2, 3]], "prompt_token_ids", [1, 2, 3]),
    ],
)
def test_a_completion_takes_text_and_tokens(prompt: object, field: str, expected: object) -> None:
    assert getattr(job_of(completion(prompt=prompt)), field) == expected


@pytest.mark.parametrize("prompts", [["a", "b"], [[1], [2]], ["a", [2]]])
def test_several_prompts_of_one_line_are_refused_with_the_remedy(prompts: object) -> None:
    assert refusal(completion(prompt=prompts)) == (
        "body.prompt: holds 2 prompts; give each a line and a custom_id of its own"
    )


def test_parts_of_text_are_joined_by_line_breaks() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    job = job_of(chat(messages=[{"role": "user", "content": parts}]))
    assert job.messages
    assert job.messages[0].content == "a\nb"


def test_developers_are_the_system() -> None:
    job = job_of(chat(messages=[{"role": "developer", "content": "Be brief."}]))
    assert job.messages
    assert job.messages[0].role == "system"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [{"type": "function"}]}, "body.tools: not supported: answers are text"),
        ({"tool_choice": "required"}, "body.tool_choice: not supported"),
        ({"functions": [{}]}, "body.functions: not supported"),
        ({"response_format": {"type": "json_object"}}, "body.response_format: not supported"),
        ({"stream": True}, "body.stream: not supported: an answer comes as a whole"),
        ({"modalities": ["text", "audio"]}, "body.modalities: not supported"),
        ({"audio": {}}, "body.audio: not supported"),
        ({"reasoning_effort": "high"}, "body.reasoning_effort: not supported"),
        ({"verbosity": "low"}, "body.verbosity: not supported"),
        ({"web_search_options": {}}, "body.web_search_options: not supported"),
        ({"moderation": {}}, "body.moderation: not supported"),
        ({"n": 129}, "n: should be less than or equal to 128 (found 129)"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs: should be less than or equal"),
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs"),
        ({"logprobs": 5}, "body.logprobs: should be true or false in a chat"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "body.max_tokens: is another name for"),
        ({"max_completion_tokens": 0}, "max_tokens: should be greater than or equal to 1"),
        ({"temprature": 1}, "unknown field 'body.temprature': did you mean 'temperature'?"),
        ({"zzz": 1}, "unknown field 'body.zzz': known are"),
        ({"prompt": "x"}, "unknown field 'body.prompt': "),
        ({"model": None}, "body.model: field required"),
        ({"model": ""}, "body.model: should be a string that is not empty"),
        ({"model": "\ud800"}, "body.model: should be a string"),
        ({"messages": None}, "body.messages: field required"),
        ({"messages": []}, "messages: should have at least 1 item"),
        ({"messages": ["x"]}, "messages[0]: "),
        ({"messages": "x"}, "messages: should be a valid list"),
    ],
)
def test_a_chat_that_is_not_served_is_refused_by_name(
    fields: dict[str, object], message: str
) -> None:
    assert refusal(chat(**fields)).startswith(message)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "tool", "content": "x"}, "body.messages[0].role: 'tool' is not supported"),
        ({"role": "function", "content": "x"}, "body.messages[0].role: 'function' is not"),
        ({"role": "bot", "content": "x"}, "messages[0].role: should be 'system',"),
        ({"role": "user"}, "messages[0].content: should be a valid string (found null)"),
        ({"role": "user", "content": "x", "name": "Ann"}, "body.messages[0].name: not supported"),
        ({"role": "user", "content": "x", "nmae": "Ann"}, "unknown field 'messages[0].nmae'"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{}]},
            "body.messages[0].tool_calls: not supported: answers are text",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "body.messages[0].content[0]: should be a part of type 'text' (found 'image_url')",
        ),
        ({"role": "user", "content": ["x"]}, "body.messages[0].content[0]: should be a part of"),
    ],
)
def test_a_message_that_is_not_served_is_refused_with_its_place(
    message: dict[str, object], expected: str
) -> None:
    assert refusal(chat(messages=[message])).startswith(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"echo": True}, "body.echo: not supported"),
        ({"suffix": "x"}, "body.suffix: not supported"),
        ({"stream": True}, "body.stream: not supported"),
        ({"best_of": 3}, "body.best_of: not supported: all answers are returned; set n instead"),
        ({"prompt": None}, "body.prompt: field required"),
        ({"prompt": []}, "prompt_token_ids: should have at least 1 item"),
        ({"prompt": 5}, "prompt: should be a valid string (found 5)"),
        ({"prompt": [1, -2]}, "prompt_token_ids[1]: should be greater than or equal to 0"),
        ({"messages": []}, "unknown field 'body.messages'"),
    ],
)
def test_a_completion_that_is_not_served_is_refused_by_name(
    fields: dict[str, object], message: str
) -> None:
    assert refusal(completion(**fields)).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "GET"}, "method: should be 'POST' (found 'GET')"),
        ({"url": "/v1/embeddings"}, f"url: should be '{CHAT}' or '{COMPLETIONS}' (found '/v1/emb"),
        ({"custom_id": 5}, "custom_id: should be a string that is not empty"),
        ({"custom_id": ""}, "custom_id: should be a string that is not empty"),
        ({"body": []}, "body: should be an object"),
        ({"priority": "high"}, "unknown field 'priority'"),
    ],
)
def test_a_request_of_another_form_is_refused(changes: dict[str, object], message: str) -> None:
    assert refusal(chat() | changes).startswith(message)


def test_best_of_n_is_n() -> None:
    assert job_of(completion(n=3, best_of=3)).n == 3


def test_a_bad_request_keeps_what_can_be_told_of_it() -> None:
    assert origin(chat() | {"body": 5}) == {"custom_id": "r-1", "url": CHAT}
    assert origin({"url": 5, "custom_id": ["x"]}) == {}
    assert origin("x") is None


@pytest.mark.parametrize(
    ("url", "params"),
    [(CHAT, chat_params.CompletionCreateParamsNonStreaming), (COMPLETIONS, CompletionParams)],
)
def test_every_field_of_the_official_client_is_known(url: str, params: type) -> None:
    endpoint = openai_requests._ENDPOINTS[url]
    known = {"model", *SamplingParams.model_fields, *endpoint.own_fields, *endpoint.refused}
    known |= openai_requests._IGNORED
    assert get_type_hints(params).keys() <= known


def test_every_field_of_a_message_of_the_official_client_is_known() -> None:
    known = {"role", "content", *openai_requests._REFUSED_IN_MESSAGES}
    for kind in ChatCompletionMessageParam.__args__:  # type: ignore[attr-defined]
        assert get_type_hints(kind).keys() <= known


def test_requests_of_the_official_clients_types_are_taken() -> None:
    chat_body: chat_params.CompletionCreateParamsNonStreaming = {
        "model": "sql",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        "max_completion_tokens": 8,
        "metadata": {"a": "b"},
        "response_format": {"type": "text"},
        "store": False,
        "user": "u",
    }
    text_body: completion_create_params.CompletionCreateParamsNonStreaming = {
        "model": "llama",
        "prompt": [[1, 2]],
        "logprobs": 3,
    }
    job = job_of(json.loads(json.dumps(request(chat_body))))
    assert (job.lora, job.max_tokens) == ("sql", 8)
    job = job_of(json.loads(json.dumps(request(text_body, COMPLETIONS))))
    assert (job.lora, job.prompt_token_ids, job.num_logprobs) == (None, [1, 2], 3)
