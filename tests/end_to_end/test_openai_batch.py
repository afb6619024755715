"""A batch file made by the official client's types goes through a real worker, and comes back by
them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as Chat
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as Text
from openai.types.shared import ErrorObject

from producer.client import Client
from producer.openai_requests import CHAT, COMPLETIONS
from tests.end_to_end.at_work import wait_for_workers
from tests.end_to_end.conftest import running_workers
from tests.fake_hub import run_fake_hub
from tests.test_producer_cli import Producer
from tests.test_text import make_tokenizer
from tests.tiny_models import Oracle, make_adapter, make_llama

PROMPT = [5, 6, 7]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A tiny model with a tokenizer and a chat template."""
    folder = make_llama(tmp_path / "tiny", vocab_size=340)
    make_tokenizer(folder)
    return folder


def request(custom_id: str, url: str, body: Chat | Text) -> str:
    line = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    return json.dumps(line) + "\n"


def chat(model: str, **fields: Any) -> Chat:
    return {
        "model": model,
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Who are you?"}]},
        ],
        "max_completion_tokens": 6,
        "temperature": 0,
        "user": "someone",
        **fields,
    }


def text(model: str, **fields: Any) -> Text:
    return {"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, **fields}


def read(file: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["custom_id"]: line for line in lines}


def test_a_file_of_the_official_clients_types_comes_back_by_them(
    redis_url: str, queue_name: str, model_folder: Path, tmp_path: Path
) -> None:
    adapters = {
        name: make_adapter(model_folder, tmp_path / name, rank=4, seed=seed)
        for seed, name in enumerate(("sql", "json"))
    }
    file, out = tmp_path / "batch.jsonl", tmp_path / "out.jsonl"
    file.write_text(
        request("chat-base", CHAT, chat("tiny"))
        + request("chat-sql", CHAT, chat("sql"))
        + request("text-base", COMPLETIONS, text("tiny"))
        + request("text-sql", COMPLETIONS, text("tiny:sql"))
        + request("text-json", COMPLETIONS, text("json"))
        + request("bad", CHAT, chat("sql", response_format={"type": "json_object"}))
        + request("long", COMPLETIONS, {**text("tiny"), "prompt": [7] * 600})
    )
    producer = Producer(redis_url, queue_name)
    with Client(redis_url, queue_name) as client, running_workers(model_folder, tmp_path) as start:
        start(
            *("--redis-url", redis_url, "--queue", queue_name, "--lora-paths"),
            *(f"{name}={folder}" for name, folder in adapters.items()),
        )
        wait_for_workers(client, 1)
        outcome = producer("submit", str(file))
        assert outcome.exit_code == 2
        assert "batch.jsonl:6: body.response_format: not supported" in outcome.stderr
        outcome = producer(
            *("submit", str(file), "--lenient", "--wait", "--timeout", "120"),
            *("--format", "openai", "-o", str(out)),
        )
    assert outcome.exit_code == 1, "two did not end as done"

    answers = read(out)
    assert list(answers) == ["chat-base", "chat-sql", "text-base", "text-sql", "text-json"]
    bodies = {name: line["response"]["body"] for name, line in answers.items()}
    chats = {
        name: ChatCompletion.model_validate(bodies[name], strict=True)
        for name in ("chat-base", "chat-sql")
    }
    assert [answer.model for answer in chats.values()] == ["tiny", "sql"]
    contents = [answer.choices[0].message.content for answer in chats.values()]
    assert all(contents)
    assert contents[0] != contents[1]

    oracle, tokenizer = Oracle(model_folder, adapters), make_tokenizer(model_folder)
    for name, adapter in (("text-base", None), ("text-sql", "sql"), ("text-json", "json")):
        answer = Completion.model_validate(bodies[name], strict=True)
        expected = tokenizer.decode(oracle.generate(PROMPT, adapter, 6))
        assert [choice.text for choice in answer.choices] == [expected]
        assert answer.usage
        assert answer.usage.prompt_tokens == len(PROMPT)
        assert (answer.system_fingerprint is None) == (adapter is None)

    errors = read(tmp_path / "out.errors.jsonl")
    told = {
        name: ErrorObject.model_validate(line["response"]["body"]["error"], strict=True)
        for name, line in errors.items()
    }
    assert {name: error.code for name, error in told.items()} == {
        "bad": "invalid_request",
        "long": "context_length_exceeded",
    }
    assert "body.response_format: not supported" in told["bad"].message


@contextmanager
def a_worker(*flags: str, **environment: str) -> Iterator[None]:
    """One that reads its environment as it starts, which a forked one does not."""
    command = [sys.executable, "-m", "worker.cli", *flags]
    limits = ("--device", "cpu", "--max-total-tokens", "8192")
    process = subprocess.Popen([*command, *limits], env={**os.environ, **environment})
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_answers_and_log_probabilities_of_a_model_of_the_hub_come_back_by_the_types(
    redis_url: str,
    queue_name: str,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    adapters = {"sql": make_adapter(model_folder, tmp_path / "sql", rank=4, seed=1)}
    file, out = tmp_path / "batch.jsonl", tmp_path / "out.jsonl"
    drawn = {"n": 2, "temperature": 0.8, "seed": 7, "logprobs": True, "top_logprobs": 3}
    file.write_text(
        request("chat", CHAT, chat("acme/tiny", **drawn))
        + request("chat-sql", CHAT, chat("acme/tiny:sql", logprobs=True, top_logprobs=3))
        + request("text", COMPLETIONS, text("tiny", logprobs=2))
        + request("text-sql", COMPLETIONS, text("sql", logprobs=2, n=2))
    )
    producer = Producer(redis_url, queue_name)
    place = ("--redis-url", redis_url, "--queue", queue_name)
    with run_fake_hub() as hub, Client(redis_url, queue_name) as client:
        hub.push("acme/tiny", model_folder, "v1")
        with a_worker(
            *("--model-path", "acme/tiny@v1", "--lora-paths", f"sql={adapters['sql']}", *place),
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / "hf"),
        ):
            wait_for_workers(client, 1)
            assert [worker.model for worker in client.overview().workers] == ["acme/tiny"]
            outcome = producer(
                *("submit", str(file), "--wait", "--timeout", "120"),
                *("--format", "openai", "-o", str(out)),
            )
    assert outcome.exit_code == 0, outcome.stderr

    bodies = {name: line["response"]["body"] for name, line in read(out).items()}
    for name, count in (("chat", 2), ("chat-sql", 1)):
        answer = ChatCompletion.model_validate(bodies[name], strict=True)
        assert [choice.index for choice in answer.choices] == list(range(count))
        for choice in answer.choices:
            assert choice.logprobs
            tokens = choice.logprobs.content or []
            assert len(tokens) == 6
            assert [len(token.top_logprobs) for token in tokens] == [3] * 6
            spelled = bytes(byte for token in tokens for byte in token.bytes or [])
            assert spelled.decode(errors="replace") == choice.message.content

    oracle, tokenizer = Oracle(model_folder, adapters), make_tokenizer(model_folder)
    for name, adapter, count in (("text", None, 1), ("text-sql", "sql", 2)):
        completion = Completion.model_validate(bodies[name], strict=True)
        ids = oracle.generate(PROMPT, adapter, 6)
        rows = oracle.all_logits([*PROMPT, *ids], adapter)[len(PROMPT) - 1 : -1].log_softmax(-1)
        expected = rows.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        assert len(completion.choices) == count
        for choice in completion.choices:
            assert choice.text == tokenizer.decode(ids)
            assert choice.logprobs
            found = torch.tensor(choice.logprobs.token_logprobs)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            for likely, row in zip(choice.logprobs.top_logprobs or [], rows, strict=True):
                # Tokens of one text, of which there may be two, are one entry.
                assert max(likely.values()) == pytest.approx(float(row.max()), abs=1e-4)
