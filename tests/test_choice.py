"""What results tell of answers, through a whole worker with a real server and a tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from producer.client import Client
from schemas.result import Result
from tests.test_producer_cli import Producer
from tests.test_text import make_byte_fallback_tokenizer
from tests.tiny_models import make_llama
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.worker import Worker

RunWorker = Callable[..., None]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_llama(tmp_path_factory.mktemp("model"), vocab_size=266, num_hidden_layers=1)
    make_byte_fallback_tokenizer(folder)
    return folder


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


@pytest.fixture
def run_worker(model_folder: Path, redis_url: str, queue_name: str) -> RunWorker:
    """Runs a worker until no job is left."""

    def run(**settings: object) -> None:
        config = WorkerConfig(
            model_path=model_folder,
            device="cpu",
            max_total_tokens=2048,
            queue=queue_name,
            burst=True,
            **settings,
        )
        assert Worker(config, Engine(config), redis_url).run() == 0

    return run


def job(id_: str, **fields: object) -> dict[str, object]:
    return {"id": id_, "prompt": "a lorry 🚚", "max_tokens": 12, **fields}


def results(client: Client, run_worker: RunWorker, *jobs: dict[str, object]) -> dict[str, Result]:
    submission = client.submit(jobs)
    run_worker()
    found = {result.id: result for result in client.results(submission)}
    assert [result.error for result in found.values()] == [None] * len(jobs)
    return found


def test_a_result_has_the_log_probabilities_that_were_asked_for_and_no_others(
    client: Client, run_worker: RunWorker
) -> None:
    found = results(
        client,
        run_worker,
        job("plain"),
        job("chat", logprobs=True, top_logprobs=3),
        job("completion", logprobs=2, prompt_logprobs=1),
    )
    plain, chat, completion = found.values()
    assert (plain.logprobs, plain.prompt_logprobs, plain.choices) == (None, None, None)
    assert plain.token_ids == chat.token_ids == completion.token_ids
    assert chat.logprobs is not None
    assert [told.token_id for told in chat.logprobs] == chat.token_ids
    for told in chat.logprobs:
        assert len(told.top_logprobs) == 3
        # The likeliest is the one that a greedy job takes.
        assert told.top_logprobs[0].token_id == told.token_id
        assert told.top_logprobs[0].logprob == told.logprob <= 0
        assert bytes(told.bytes or []).decode(errors="replace") == told.token
    assert sum(math.exp(likely.logprob) for likely in chat.logprobs[0].top_logprobs) <= 1
    assert completion.prompt_logprobs is not None
    assert len(completion.prompt_logprobs) == completion.usage.prompt_tokens
    assert completion.prompt_logprobs[0] is None
    told_bytes = [bytes(told.bytes or []) for told in completion.prompt_logprobs[1:] if told]
    assert "a lorry 🚚".encode().endswith(b"".join(told_bytes))


def test_a_job_for_several_answers_has_one_result_with_all_of_them(
    client: Client, run_worker: RunWorker
) -> None:
    several = job("several", n=4, temperature=1.5, seed=1, logprobs=True)
    found = results(client, run_worker, several, job("one", temperature=1.5, seed=1))
    result, one = found["several"], found["one"]
    assert (result.text, result.token_ids, result.finish_reason) == (None, None, None)
    assert result.choices is not None
    assert [choice.index for choice in result.choices] == [0, 1, 2, 3]
    assert result.choices[0].token_ids == one.token_ids
    assert result.choices[0].text == one.text
    assert len({tuple(choice.token_ids) for choice in result.choices}) == 4
    assert all(len(choice.logprobs or []) == 12 for choice in result.choices)
    assert result.usage.completion_tokens == 48
    assert result.usage.prompt_tokens == one.usage.prompt_tokens


def test_a_token_that_ends_an_answer_is_no_part_of_its_text(
    client: Client, run_worker: RunWorker
) -> None:
    drawing = {"temperature": 1.5, "seed": 2}
    free = results(client, run_worker, job("free", **drawing))["free"]
    assert free.token_ids
    stop = free.token_ids[2]
    assert free.token_ids.index(stop) == 2
    jobs = [job("stopped", stop_token_ids=[stop], **drawing)]
    jobs.append(job("shorter", **(drawing | {"max_tokens": 2})))
    found = results(client, run_worker, *jobs)
    assert found["stopped"].token_ids == free.token_ids[:3]
    assert found["stopped"].finish_reason == "stop"
    assert found["stopped"].text == found["shorter"].text


def test_the_tokens_of_a_bad_word_stand_in_no_answer_in_a_row(
    client: Client, run_worker: RunWorker
) -> None:
    a, b = "259", "260"  # In the tokenizer's vocabulary.
    likely = {"logit_bias": {a: 8.0, b: 8.0}, "temperature": 2.0, "n": 20}
    jobs = [job("free", **likely), job("pair", bad_words=["ab"], **likely)]
    jobs.append(job("one", bad_words=["a"], **likely))
    found = {
        id_: [choice.text or "" for choice in result.choices or ()]
        for id_, result in results(client, run_worker, *jobs).items()
    }
    assert any("ab" in text for text in found["free"])
    assert not any("ab" in text for text in found["pair"])
    assert any("a" in text for text in found["pair"])
    assert not any("ba" in text for text in found["one"])


def test_what_cannot_be_sampled_fails_its_own_job_alone(
    client: Client, run_worker: RunWorker
) -> None:
    bad = job("bad", logit_bias={"266": 1.0})
    submission = client.submit([bad, job("good")])
    run_worker()
    failed, done = client.results(submission)
    assert failed.error
    assert failed.error.code == "bad_sampling"
    assert "logit_bias holds token 266" in failed.error.message
    assert done.status == "done"


def test_the_commands_show_several_answers(
    client: Client, run_worker: RunWorker, redis_url: str, queue_name: str
) -> None:
    results(client, run_worker, job("several", n=3, temperature=1.0))
    producer = Producer(redis_url, queue_name)
    assert "(1 of 3)" in producer("results", "several", "--format", "table").stdout
    assert "answer 2" in producer("status", "several").stdout
    (line,) = producer("results", "several").stdout.splitlines()
    assert len(json.loads(line)["choices"]) == 3
