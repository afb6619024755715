"""OpenAI's batch files in, their output and error files out, between them a queue."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject

from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from producer import openai_responses
from producer.client import Client
from producer.openai_requests import CHAT, COMPLETIONS
from producer.output import open_outputs
from producer.writers import writer
from schemas.errors import BadInput
from schemas.job import Job
from schemas.result import Choice, ErrorInfo, LikelyToken, Result, Timings, TokenLogprob, Usage
from tests.test_openai_requests import chat, completion
from tests.test_producer_cli import Producer, Worker, prompts


@pytest.fixture
def producer(redis_url: str, queue_name: str) -> Producer:
    return Producer(redis_url, queue_name)


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


@pytest.fixture
def worker(queue: JobQueue) -> Worker:
    """Serves ``sql`` and ``json``; its base model is called tiny-llama."""
    return Worker(queue)


def named(line: dict[str, Any], custom_id: str, model: str = "tiny-llama") -> dict[str, Any]:
    return line | {"custom_id": custom_id, "body": line["body"] | {"model": model}}


def batch_file(folder: Path, *lines: dict[str, Any] | str) -> str:
    return prompts(folder, *(line if isinstance(line, str) else json.dumps(line) for line in lines))


def sent_jobs(reader: QueueReader) -> list[Job]:
    (status,) = reader.submissions(100)
    payloads = reader.payloads(list(reader.job_ids(status.id)))
    return [Job.from_wire(payload or "") for payload in payloads]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- models


@pytest.mark.usefixtures("worker")
def test_one_file_mixes_adapters_the_base_model_and_other_lines(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    file = batch_file(
        tmp_path,
        named(chat(), "a", "sql"),
        named(completion(), "b", "tiny-llama:json"),
        named(chat(), "c", "tiny-llama"),
        '{"prompt": "x", "lora": "json"}',
    )
    assert producer("submit", file, "--lora", "sql").exit_code == 0
    assert [job.lora for job in sent_jobs(reader)] == ["sql", "json", None, "json"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "tiny-lama",
            "'tiny-lama' is neither the base model nor an adapter; did you mean 'tiny-",
        ),
        ("sqll", "'sqll' is neither the base model nor an adapter; did you mean 'sql'?"),
        ("gpt-4o", "'gpt-4o' is neither the base model nor an adapter"),
        ("tiny-llama:sqll", "unknown adapter 'sqll'; did you mean 'sql'?"),
        ("gpt-4o:sql", "'gpt-4o:sql' is neither the base model nor an adapter"),
        (":sql", "':sql' is neither the base model nor an adapter; did you mean 'sql'?"),
    ],
)
@pytest.mark.usefixtures("worker")
def test_a_model_that_nobody_serves_is_refused_with_those_that_are(
    producer: Producer, tmp_path: Path, model: str, message: str
) -> None:
    outcome = producer("submit", batch_file(tmp_path, named(chat(), "a", model)))
    assert outcome.exit_code == 2
    assert f"prompts.jsonl:1: body.model: {message}" in outcome.stderr
    assert "The base model is called tiny-llama. Known adapters: " in outcome.stderr


def test_the_base_model_is_called_by_its_path_or_the_last_part_of_it(
    client: Client, queue: JobQueue, worker: Worker
) -> None:
    worker.leave()
    queue.set_model("/models/llama-3")  # As a worker says that has gone meanwhile.
    for model in ("/models/llama-3", "llama-3"):
        client.submit([named(chat(), "a", model)])
        assert client.submit([named(chat(), "a", f"{model}:sql")])
    with pytest.raises(BadInput, match="The base model is called llama-3, /models/llama-3"):
        client.submit([named(chat(), "a", "models/llama-3")])


def test_while_no_worker_has_joined_only_a_name_with_a_colon_is_sure_to_be_an_adapter(
    client: Client, reader: QueueReader
) -> None:
    client.submit([named(chat(), "a", "llama:sql")])
    assert [job.lora for job in sent_jobs(reader)] == ["sql"]
    with pytest.raises(BadInput, match="that could tell: start one first, or write BASE:ADAPTER"):
        client.submit([named(chat(), "a", "sql")])


def test_an_adapter_that_was_loaded_by_command_is_known_before_any_worker(
    client: Client, reader: QueueReader, tmp_path: Path
) -> None:
    client.load_adapter("sql", tmp_path)
    client.submit([named(chat(), "a", "sql")])
    assert [job.lora for job in sent_jobs(reader)] == ["sql"]


# ---- bad lines


@pytest.mark.usefixtures("worker")
def test_a_custom_id_of_two_lines_is_refused(producer: Producer, tmp_path: Path) -> None:
    file = batch_file(tmp_path, *(named(chat(), id_) for id_ in ("a", "b", "a", "a")))
    outcome = producer("submit", file)
    assert outcome.exit_code == 2
    for line in (3, 4):
        assert f"prompts.jsonl:{line}: custom_id: 'a' is also the custom_id of line 1\n" in (
            outcome.stderr
        )


@pytest.mark.usefixtures("worker")
def test_the_same_custom_id_in_two_files_names_two_requests(client: Client) -> None:
    first, second = (client.submit([named(chat(), "a")]) for _ in range(2))
    assert first != second
    assert client.overview().backlog.jobs == 2


def bad_file(folder: Path) -> str:
    return batch_file(
        folder,
        named(chat(), "a"),
        "nonsense",
        named(chat(tools=[{}]), "b"),
        '{"promt": "x"}',
        named(chat(), "a"),
        named(chat(), "c", "sql"),
        '{"id": "row", "prompt": "x"}',
        '{"id": "row", "prompt": "y"}',
    )


@pytest.mark.usefixtures("worker")
def test_bad_lines_keep_all_from_being_sent(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    outcome = producer("submit", bad_file(tmp_path))
    assert outcome.exit_code == 2
    assert "5 bad lines in" in outcome.stderr
    assert not reader.submissions(1)


def test_lenient_sends_the_good_lines_and_keeps_the_bad_ones_as_failed(
    producer: Producer, client: Client, reader: QueueReader, worker: Worker, tmp_path: Path
) -> None:
    outcome = producer("submit", bad_file(tmp_path), "--lenient")
    assert outcome.exit_code == 0
    assert "refused" in outcome.stdout
    assert "5 bad lines in" in outcome.stderr
    assert "; recorded as failed.\n" in outcome.stderr
    assert "prompts.jsonl:3: body.tools: not supported" in outcome.stderr
    (status,) = reader.submissions(1)
    assert (status.total, status.counts["waiting"], status.counts["failed"]) == (8, 3, 5)
    assert client.overview().backlog.jobs == 3
    worker.finish_all()
    results = list(client.results(status.id))
    assert [result.status for result in results] == [
        *("done", "failed", "failed", "failed", "failed", "done", "done", "failed")
    ]
    errors = [result.error for result in results if result.error]
    assert {error.code for error in errors} == {"bad_line"}
    assert errors[3].message == "custom_id: 'a' is also the custom_id of line 1"
    assert errors[4].message == "id: 'row' is also the id of line 7, with other content"
    assert results[2].metadata == {"custom_id": "b", "url": CHAT, "model": "tiny-llama"}


def test_a_file_of_bad_lines_alone_ends_at_once(
    producer: Producer, client: Client, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    file = batch_file(tmp_path, "nonsense", "[]")
    args = ("--lenient", "--wait", "--format", "openai", "-o", str(out))
    outcome = producer("submit", file, *args)
    assert outcome.exit_code == 1
    assert not out.read_text()
    assert len(read(tmp_path / "out.errors.jsonl")) == 2
    assert client.overview().backlog.jobs == 0


def test_bad_lines_need_no_room_in_a_full_queue(
    producer: Producer, worker: Worker, tmp_path: Path
) -> None:
    assert producer("limits", "--jobs", "2").exit_code == 0
    lines = ("nonsense", named(chat(), "a"), "nonsense", named(chat(), "b"))
    outcome = producer("submit", batch_file(tmp_path, *lines), "--lenient", "--when-full", "refuse")
    assert outcome.exit_code == 0, outcome.stderr
    assert len(worker.claim()) == 2


# ---- output


def test_an_output_file_and_an_error_file_are_written(
    producer: Producer, client: Client, worker: Worker, tmp_path: Path
) -> None:
    lines = (named(chat(), "a", "sql"), named(chat(n=0), "b"), named(completion(), "c"))
    submission = client.submit([*lines, named(chat(), "d")], lenient=True)
    waiting = worker.claim()
    worker.finish(f"{submission}.1", text="Yes.")
    worker.finish(f"{submission}.3", text="No.")
    client.cancel(f"{submission}.4")
    assert len(waiting) == 3
    out = tmp_path / "out.jsonl"
    outcome = producer("results", submission, "--format", "openai", "-o", str(out))
    assert outcome.exit_code == 0, outcome.stderr
    assert f"Results are in {out}" in outcome.stderr
    assert f"Errors are in {tmp_path / 'out.errors.jsonl'}" in outcome.stderr

    first, second = read(out)
    assert [first["custom_id"], second["custom_id"]] == ["a", "c"]
    assert first["response"]["status_code"] == 200
    assert first["error"] is None
    answer = ChatCompletion.model_validate(first["response"]["body"], strict=True)
    assert answer.choices[0].message.content == "Yes."
    assert answer.model == "sql"
    assert answer.system_fingerprint == "r1"
    assert answer.usage
    assert answer.usage.total_tokens == 8
    text = Completion.model_validate(second["response"]["body"], strict=True)
    assert text.choices[0].text == "No."

    bad, cancelled = read(tmp_path / "out.errors.jsonl")
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("b", 400)
    error = ErrorObject.model_validate(bad["response"]["body"]["error"], strict=True)
    assert error.message == "n: should be greater than or equal to 1 (found 0)"
    assert error.type == "invalid_request_error"
    assert (cancelled["custom_id"], cancelled["response"]) == ("d", None)
    assert cancelled["error"]["code"] == "batch_cancelled"


def test_stdout_has_both_in_input_order(producer: Producer, client: Client, worker: Worker) -> None:
    submission = client.submit([named(chat(), "a"), "x", named(chat(), "c")])
    for job_id, status in zip(worker.claim(), ("done", "failed", "done"), strict=True):
        worker.finish(job_id, status)  # type: ignore[arg-type]
    found = producer("results", submission, "--format", "openai").stdout.splitlines()
    lines = [json.loads(line) for line in found]
    assert [line["custom_id"] for line in lines] == ["a", f"{submission}.2", "c"]
    assert [line["response"]["status_code"] for line in lines] == [200, 400, 200]


def test_unfinished_results_keep_partial_files(
    producer: Producer, client: Client, worker: Worker, tmp_path: Path
) -> None:
    submission = client.submit([named(chat(), "a"), named(chat(), "b"), "x"])
    worker.claim()
    worker.finish(f"{submission}.1")
    worker.finish(f"{submission}.2", "failed")
    out = tmp_path / "out.jsonl"
    outcome = producer("results", submission, "--format", "openai", "-o", str(out))
    assert outcome.exit_code == 5
    assert f"are in {out}.partial and {tmp_path}/out.errors.jsonl.partial." in outcome.stderr
    assert not out.exists()


def test_the_format_and_the_error_file_of_submit_are_checked(
    producer: Producer, tmp_path: Path
) -> None:
    file = batch_file(tmp_path, "x")
    outcome = producer("submit", file, "--format", "openai")
    assert outcome.exit_code == 2
    assert "only --wait brings them" in outcome.stderr
    (tmp_path / "out.errors.jsonl").write_text('"x"\n')
    args = ("--wait", "--format", "openai", "-o", str(tmp_path / "out.jsonl"))
    outcome = producer("submit", str(tmp_path / "out.errors.jsonl"), *args)
    assert outcome.exit_code == 2
    assert "would overwrite the prompts" in outcome.stderr


# ---- the lines of results


def done(**fields: Any) -> Result:
    settings: dict[str, Any] = {
        "id": "sub-1.1",
        "submission": "sub-1",
        "lora": None,
        "status": "done",
        "text": "Hi!",
        "token_ids": [1, 2],
        "finish_reason": "stop",
        "usage": Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1),
        "timings": Timings(queued=1.0, finished=2.5),
        "metadata": {"custom_id": "a", "url": CHAT, "model": "llama"},
    }
    return Result(**(settings | fields))


def line_of(result: Result) -> dict[str, Any]:
    return openai_responses.line(result, lambda: "tiny-llama")


def failed(status: str, code: str) -> dict[str, Any]:
    return line_of(done(status=status, error=ErrorInfo(code=code, message="Why.")))


def token(text: str, logprob: float, *others: tuple[str, float]) -> TokenLogprob:
    return TokenLogprob(
        **likely(text, logprob).model_dump(), top_logprobs=[likely(*other) for other in others]
    )


def likely(text: str, logprob: float) -> LikelyToken:
    return LikelyToken(token=text, token_id=7, logprob=logprob, bytes=list(text.encode()))


LOGPROBS = [token("Hi", -0.5, ("Hi", -0.5), ("Ho", -1.5)), token("!", -3.0, (".", -0.25))]


def test_logprobs_of_a_chat_are_those_of_the_official_client() -> None:
    body = line_of(done(logprobs=LOGPROBS))["response"]["body"]
    (choice,) = ChatCompletion.model_validate(body, strict=True).choices
    assert choice.logprobs
    assert choice.logprobs.content
    first = choice.logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("Hi", -0.5, [72, 105])
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("Hi", -0.5), ("Ho", -1.5)]


def test_logprobs_of_a_completion_are_those_of_the_official_client() -> None:
    metadata = {"custom_id": "a", "url": COMPLETIONS, "model": "llama"}
    body = line_of(done(logprobs=LOGPROBS, metadata=metadata))["response"]["body"]
    (choice,) = Completion.model_validate(body, strict=True).choices
    assert choice.logprobs
    assert choice.logprobs.tokens == ["Hi", "!"]
    assert choice.logprobs.token_logprobs == [-0.5, -3.0]
    assert choice.logprobs.text_offset == [0, 2]
    assert choice.logprobs.top_logprobs == [{"Hi": -0.5, "Ho": -1.5}, {".": -0.25, "!": -3.0}]


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_several_answers_are_several_choices(url: str) -> None:
    choices = [
        Choice(index=0, text="One.", token_ids=[1], finish_reason="stop", logprobs=LOGPROBS),
        Choice(index=1, text="Two.", token_ids=[2], finish_reason="length"),
    ]
    metadata = {"custom_id": "a", "url": url, "model": "llama"}
    result = done(text=None, token_ids=None, choices=choices, metadata=metadata)
    body = line_of(result)["response"]["body"]
    kind = ChatCompletion if url == CHAT else Completion
    found = kind.model_validate(body, strict=True).choices
    assert [(choice.index, choice.finish_reason) for choice in found] == [
        (0, "stop"),
        (1, "length"),
    ]
    assert [choice.logprobs is None for choice in found] == [False, True]


def test_a_body_tells_when_and_how_much() -> None:
    body = ChatCompletion.model_validate(line_of(done())["response"]["body"], strict=True)
    assert body.created == 2
    assert body.usage
    assert body.usage.prompt_tokens_details
    assert body.usage.prompt_tokens_details.cached_tokens == 1


def test_a_job_that_was_sent_otherwise_is_told_as_a_chat_by_its_id() -> None:
    for metadata in (None, [1], {"custom_id": 5}):
        for lora, model in (("sql", "sql"), (None, "tiny-llama")):
            found = line_of(done(metadata=metadata, lora=lora))
            assert found["custom_id"] == "sub-1.1"
            body = ChatCompletion.model_validate(found["response"]["body"], strict=True)
            assert (body.model, body.choices[0].message.content) == (model, "Hi!")


def test_the_base_model_is_told_as_requests_may_name_it(
    producer: Producer, client: Client, queue: JobQueue, worker: Worker
) -> None:
    assert client.base_model() == "tiny-llama"
    submission = client.submit(["x"])
    worker.finish_all()
    queue.set_model("/models/other")
    (found,) = producer("results", submission, "--format", "openai").stdout.splitlines()
    assert json.loads(found)["response"]["body"]["model"] == "other"
    client.submit([named(chat(), "a", "other")])


def test_the_base_model_is_told_though_no_worker_had_joined_when_the_wait_began(
    client: Client, queue: JobQueue, tmp_path: Path
) -> None:
    submission = client.submit(["x", "y"])
    with open_outputs(tmp_path / "out.jsonl", has_error_file=True) as outputs:
        write = writer("openai", client, outputs)
        client.cancel(f"{submission}.2")
        write(list(client.results(f"{submission}.2")))
        Worker(queue).finish_all()
        write(list(client.results(f"{submission}.1")))
        outputs.complete()
    (found,) = read(tmp_path / "out.jsonl")
    assert found["response"]["body"]["model"] == "tiny-llama"


@pytest.mark.parametrize(
    ("status", "code", "http_status", "openai_code"),
    [
        ("failed", "prompt_too_long", 400, "context_length_exceeded"),
        ("failed", "unknown_adapter", 404, "model_not_found"),
        ("failed", "bad_line", 400, "invalid_request"),
        ("failed", "not_finite", 500, "server_error"),
        ("dead", "attempts_exhausted", 500, "server_error"),
    ],
)
def test_a_failure_has_a_status_and_a_code_as_in_openais_api(
    status: str, code: str, http_status: int, openai_code: str
) -> None:
    found = failed(status, code)
    assert found["response"]["status_code"] == http_status
    error = ErrorObject.model_validate(found["response"]["body"]["error"], strict=True)
    assert (error.code, error.message) == (openai_code, "Why.")


@pytest.mark.parametrize(
    ("status", "code"), [("expired", "batch_expired"), ("cancelled", "batch_cancelled")]
)
def test_a_request_that_was_not_run_has_no_response(status: str, code: str) -> None:
    found = failed(status, status)
    assert found["response"] is None
    assert found["error"] == {"code": code, "message": "Why."}


# ---- memory

#: Bytes of a request that are its own; if the lines were held, memory would grow by as much.
NUM_OWN_BYTES = 3000


def growth(peak: Callable[[int], int]) -> float:
    """Bytes of memory for each further line."""
    peak(1000)  # What is built once. Short strings that pydantic caches still come.
    return (peak(10_000) - peak(2000)) / 8000


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_requests(
    client: Client, worker: Worker, tmp_path: Path
) -> None:
    def peak(count: int) -> int:
        lines = (
            (i, json.dumps(named(completion(prompt=f"{i:{NUM_OWN_BYTES}}"), f"{i}")).encode())
            for i in range(count)
        )
        tracemalloc.start()
        with client.prepare(lines, name="many", lenient=True) as prepared:
            client.send(prepared)
        client.cancel(prepared.submission)
        with open_outputs(tmp_path / "out.jsonl", has_error_file=True) as outputs:
            write = writer("openai", client, outputs)
            for result in client.results(prepared.submission):
                write([result])
        _, high = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return high

    assert growth(peak) < NUM_OWN_BYTES / 3


@pytest.mark.usefixtures("worker")
@pytest.mark.slow
def test_the_refusals_of_a_lenient_file_are_not_held_in_memory(client: Client) -> None:
    def peak(count: int) -> int:
        line = json.dumps(named(chat(), "x" * NUM_OWN_BYTES)).encode()
        tracemalloc.start()
        with client.prepare(
            ((i, line) for i in range(count)), name="many", lenient=True
        ) as prepared:
            assert prepared.num_refused == count - 1
        _, high = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return high

    assert growth(peak) < NUM_OWN_BYTES / 3
