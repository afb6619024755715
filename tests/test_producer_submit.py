"""Sending a file: all of it or nothing, and what is told about it."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from broker.submissions import JobRecord
from producer.client import Client
from producer.spool import MAX_RUN_BYTES, Spool, new_submission_id
from schemas.errors import BadInput, BadParameter, LorryError
from schemas.job import Job, RefusedJob
from tests.test_producer_cli import Producer, Worker, prompts


@pytest.fixture
def producer(redis_url: str, queue_name: str) -> Producer:
    return Producer(redis_url, queue_name)


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


def num_sent(reader: QueueReader) -> int:
    return sum(status.sent for status in reader.submissions(100))


def sent_jobs(reader: QueueReader) -> list[Job]:
    (status,) = reader.submissions(100)
    payloads = reader.payloads(list(reader.job_ids(status.id)))
    return [Job.from_wire(payload or "") for payload in payloads]


def test_the_jobs_of_a_file_are_sent_in_its_order(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    producer("submit", prompts(tmp_path, '"a"', "", '{"prompt": "b"}', '"c"'))
    assert [job.prompt for job in sent_jobs(reader)] == ["a", "b", "c"]


def test_sampling_flags_are_for_the_lines_that_say_nothing_else(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    flags = ["--max-tokens", "7", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "5"]
    flags += ["--min-p", "0.1", "--seed", "3", "--stop", ".", "--stop", "!", "-n", "2"]
    own = '{"prompt": "b", "temperature": 0, "stop": "?", "n": 1}'
    assert producer("submit", prompts(tmp_path, '"a"', own), *flags).exit_code == 0
    first, second = sent_jobs(reader)
    sampling = {"max_tokens": 7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3}
    for job in (first, second):
        assert {name: getattr(job, name) for name in sampling} == sampling
    assert (first.temperature, first.stop, first.n) == (0.5, [".", "!"], 2)
    assert (second.temperature, second.stop, second.n) == (0, ["?"], 1)


def test_a_wrong_sampling_flag_is_told_once(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    outcome = producer("submit", prompts(tmp_path, *['"x"'] * 9), "--top-p", "1.5")
    assert outcome.exit_code == 2
    assert outcome.stderr.count("error: --top-p: should be less than or equal to 1") == 1
    assert num_sent(reader) == 0


def test_the_client_takes_sampling_fields_of_all_lines(client: Client, reader: QueueReader) -> None:
    client.submit(["a"], sampling={"presence_penalty": 0.5, "logprobs": True})
    (job,) = sent_jobs(reader)
    assert (job.presence_penalty, job.num_logprobs) == (0.5, 0)
    with pytest.raises(BadInput, match=r"^sampling: .*'temprature': did you mean 'temperature'"):
        client.submit(["a"], sampling={"temprature": 1})
    two = "(found prompt and prompt_token_ids)"
    with pytest.raises(BadInput, match=rf"^sampling: give exactly one of .* {re.escape(two)}$"):
        client.submit(["a"], sampling={"prompt_token_ids": [1]})


def test_the_submission_and_the_number_of_jobs_are_told(producer: Producer, tmp_path: Path) -> None:
    outcome = producer("submit", prompts(tmp_path, '"a"', '"b"'))
    assert outcome.exit_code == 0
    assert re.match(r"Submitted 2 jobs as sub-\d{8}-\d{6}-[0-9a-f]{8}\n", outcome.stdout)


def test_the_next_command_is_told_for_the_same_queue(producer: Producer, tmp_path: Path) -> None:
    told = producer("submit", prompts(tmp_path, '"a"')).stdout
    place = f"--queue {producer.queue} --redis-url {producer.redis_url}"
    assert re.search(rf"`producer results sub-\S+ --follow {place}`", told)


def test_json_for_machines_is_one_object(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    outcome = producer("submit", prompts(tmp_path, '"a"', '"b"'), "--json")
    (status,) = reader.submissions(1)
    assert json.loads(outcome.stdout) == {
        "submission": status.id,
        "queue": producer.queue,
        "jobs": 2,
    }


def test_a_made_id_names_the_submission_and_the_line(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    producer("submit", prompts(tmp_path, '"a"', "", '"b"'))
    (status,) = reader.submissions(1)
    assert [job.id for job in sent_jobs(reader)] == [f"{status.id}.1", f"{status.id}.3"]


def test_submission_ids_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for moment in [time.gmtime(seconds) for seconds in (0, 1, 59, 60, 86_400, 2_000_000_000)]:
        monkeypatch.setattr(time, "gmtime", lambda moment=moment: moment)
        ids.append(new_submission_id())
    assert ids == sorted(ids)


def test_a_file_is_read_from_stdin(producer: Producer, reader: QueueReader) -> None:
    producer("submit", "-", stdin='"a"\n"b"')
    assert [job.prompt for job in sent_jobs(reader)] == ["a", "b"]


def test_a_file_is_read_once_from_a_pipe(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with producer.start("submit", str(pipe)) as process:
        pipe.write_text('"a"\n"b"\n')
        process.communicate()
    assert process.returncode == 0
    assert [job.prompt for job in sent_jobs(reader)] == ["a", "b"]


def test_the_lora_option_serves_the_lines_that_name_none(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    lines = ('"a"', '{"prompt": "b", "lora": null}', '{"prompt": "c", "lora": "json"}')
    producer("submit", "--lora", "sql", prompts(tmp_path, *lines))
    assert [job.lora for job in sent_jobs(reader)] == ["sql", None, "json"]


def test_bad_lines_are_listed_with_their_places(producer: Producer, tmp_path: Path) -> None:
    file = prompts(tmp_path, '"fine"', '{"promt": "x"}', "", "nonsense")
    outcome = producer("submit", file)
    assert outcome.exit_code == 2
    assert outcome.stderr.splitlines()[1:] == [
        f"error: 2 bad lines in {file}; nothing was sent.",
        f"{file}:2: unknown field 'promt': did you mean 'prompt'?",
        f"{file}:4: not JSON: expected ident at column 2",
    ]


def test_one_bad_line_keeps_all_from_being_sent(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    producer("submit", prompts(tmp_path, *['"fine"'] * 1000, "nonsense"))
    assert num_sent(reader) == 0


def test_bad_lines_beyond_the_first_20_are_counted(producer: Producer, tmp_path: Path) -> None:
    outcome = producer("submit", prompts(tmp_path, *["nonsense"] * 50))
    listed = [line for line in outcome.stderr.splitlines() if ":" in line and "not JSON" in line]
    assert len(listed) == 20
    assert outcome.stderr.endswith("... and 30 more\n")


def test_bad_lines_of_stdin_are_placed_there(producer: Producer) -> None:
    assert "<stdin>:1: not JSON" in producer("submit", "-", stdin="nonsense").stderr


@pytest.mark.parametrize("content", ["", "\n \n\t\n", "\ufeff"])
def test_a_file_without_jobs_is_refused(producer: Producer, content: str) -> None:
    outcome = producer("submit", "-", stdin=content)
    assert outcome.exit_code == 2
    assert "<stdin> holds no jobs" in outcome.stderr


def test_a_missing_file_is_refused_without_a_server() -> None:
    outcome = Producer("redis://localhost:1", "q")("submit", "nowhere.jsonl")
    assert outcome.exit_code == 2
    assert outcome.stderr == "error: nowhere.jsonl: No such file or directory.\n"


def test_a_folder_is_refused(producer: Producer, tmp_path: Path) -> None:
    assert producer("submit", str(tmp_path)).exit_code == 2


def test_a_file_name_need_not_be_utf8(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    file = tmp_path / "p\udcff.jsonl"
    file.write_text('"a"')
    assert producer("submit", str(file)).exit_code == 0
    assert num_sent(reader) == 1


def test_an_output_without_wait_is_refused(producer: Producer, tmp_path: Path) -> None:
    assert producer("submit", prompts(tmp_path, '"a"'), "-o", "out").exit_code == 2


def test_an_id_may_be_sent_again_with_the_same_content(
    producer: Producer, reader: QueueReader, queue: JobQueue, tmp_path: Path
) -> None:
    file = prompts(tmp_path, '{"id": "row-1", "prompt": "x"}')
    for _ in range(2):
        assert producer("submit", file).exit_code == 0
    assert num_sent(reader) == 2
    assert Worker(queue).claim() == ["row-1"]


def test_an_id_on_the_queue_is_refused_with_other_content(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    producer("submit", prompts(tmp_path, '{"id": "row-1", "prompt": "x"}'))
    file = prompts(tmp_path, '"new"', '{"id": "row-1", "prompt": "y"}')
    outcome = producer("submit", file)
    assert outcome.exit_code == 2
    assert f"{file}:2: id: 'row-1' names a job of other content on queue" in outcome.stderr
    assert num_sent(reader) == 1


def test_an_id_of_two_lines_is_refused_with_other_content(
    producer: Producer, tmp_path: Path
) -> None:
    lines = [f'{{"id": "row-{i}", "prompt": "x"}}' for i in range(600)]
    file = prompts(tmp_path, *lines, '{"id": "row-2", "prompt": "y"}')
    outcome = producer("submit", file)
    assert outcome.exit_code == 2
    assert outcome.stderr.splitlines()[2:] == [
        f"{file}:601: id: 'row-2' is also the id of line 3, with other content"
    ]


def test_an_id_of_two_lines_with_the_same_content_counts_twice(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    producer("submit", prompts(tmp_path, *['{"id": "row-1", "prompt": "x"}'] * 2))
    assert num_sent(reader) == 2


def test_the_same_id_for_another_adapter_is_other_content(
    producer: Producer, tmp_path: Path
) -> None:
    file = prompts(tmp_path, '{"id": "row-1", "prompt": "x"}')
    producer("submit", file)
    assert producer("submit", file, "--lora", "sql").exit_code == 2


def test_an_unknown_adapter_is_refused_with_the_known_ones(
    producer: Producer, queue: JobQueue, reader: QueueReader, tmp_path: Path
) -> None:
    Worker(queue)
    file = prompts(tmp_path, '{"prompt": "x", "lora": "sql"}', '{"prompt": "x", "lora": "sqll"}')
    outcome = producer("submit", file)
    assert outcome.exit_code == 2
    assert outcome.stderr.splitlines()[2:] == [
        f"{file}:2: lora: unknown adapter 'sqll'; did you mean 'sql'?",
        "Known adapters: json, sql.",
    ]
    assert num_sent(reader) == 0


def test_an_unknown_adapter_of_the_option_is_told_once(
    producer: Producer, queue: JobQueue, tmp_path: Path
) -> None:
    Worker(queue)
    outcome = producer("submit", prompts(tmp_path, *['"x"'] * 9), "--lora", "poetry")
    assert outcome.exit_code == 2
    assert outcome.stderr.count("--lora: unknown adapter 'poetry'") == 1


@pytest.mark.parametrize(
    ("flag", "value"),
    [("-n", "0"), ("--max-tokens", "0"), ("--top-p", "2"), ("--result-ttl", "0")],
)
def test_a_wrong_option_is_told_by_its_flag(
    producer: Producer, tmp_path: Path, flag: str, value: str
) -> None:
    outcome = producer("submit", prompts(tmp_path, '"x"'), flag, value)
    assert outcome.exit_code == 2
    assert f"error: {flag}: should be " in outcome.stderr


def test_a_wrong_adapter_name_of_the_option_is_refused(producer: Producer, tmp_path: Path) -> None:
    outcome = producer("submit", prompts(tmp_path, '"x"'), "--lora", "my sql")
    assert outcome.exit_code == 2
    assert "error: --lora: should be letters, digits" in outcome.stderr


def test_a_queue_without_adapters_refuses_every_name(
    producer: Producer, queue: JobQueue, tmp_path: Path
) -> None:
    Worker(queue, adapters=())
    outcome = producer("submit", prompts(tmp_path, '"x"'), "--lora", "sql")
    assert outcome.exit_code == 2
    assert "leave lora out for the base model" in outcome.stderr


def test_a_queue_that_no_worker_has_joined_accepts_any_adapter_with_one_warning(
    producer: Producer, tmp_path: Path
) -> None:
    lines = [f'{{"prompt": "x", "lora": "adapter-{i % 2}"}}' for i in range(10)]
    outcome = producer("submit", prompts(tmp_path, *lines))
    assert outcome.exit_code == 0
    assert outcome.stderr.count("warning:") == 1
    assert "nobody could tell whether it has adapter-0, adapter-1" in outcome.stderr


def test_a_queue_whose_workers_have_gone_gives_a_warning(
    producer: Producer, queue: JobQueue, tmp_path: Path
) -> None:
    Worker(queue).leave()
    outcome = producer("submit", prompts(tmp_path, '"x"'))
    assert "warning: No worker is alive on queue" in outcome.stderr
    assert "worker --model-path DIR" in outcome.stderr


def test_an_adapter_that_no_living_worker_serves_gives_a_warning(
    producer: Producer, queue: JobQueue, tmp_path: Path
) -> None:
    Worker(queue, adapters=("sql", "poetry"))
    Worker(queue, adapters=("sql",))
    outcome = producer("submit", prompts(tmp_path, '"x"'), "--lora", "poetry")
    assert outcome.exit_code == 0
    assert "warning: No living worker serves poetry" in outcome.stderr


def test_nothing_is_warned_of_when_a_worker_serves_all(
    producer: Producer, queue: JobQueue, tmp_path: Path
) -> None:
    Worker(queue)
    file = prompts(tmp_path, '"x"', '{"prompt": "x", "lora": "sql"}')
    assert "warning" not in producer("submit", file).stderr


def test_a_client_takes_prompts_mappings_and_jobs(client: Client, reader: QueueReader) -> None:
    client.submit(["a", {"prompt": "b", "top_k": 2}, Job(id="row-3", prompt="c")], lora="sql")
    assert [(job.prompt, job.lora) for job in sent_jobs(reader)] == [
        ("a", "sql"),
        ("b", "sql"),
        ("c", None),
    ]


def test_a_client_sends_a_file(client: Client, reader: QueueReader, tmp_path: Path) -> None:
    submission = client.submit_file(prompts(tmp_path, '"a"'))
    assert list(reader.job_ids(submission)) == [f"{submission}.1"]


def test_a_client_refuses_bad_jobs_with_their_numbers(client: Client, reader: QueueReader) -> None:
    with pytest.raises(BadInput, match=r"<jobs>:2: prompt: should be a valid string"):
        client.submit(["a", {"prompt": 2}])
    assert num_sent(reader) == 0


@pytest.mark.parametrize(
    "terms",
    [
        {"lora": "my sql"},
        {"deadline": -1},
        {"sampling": {"temperature": -1}},
        {"sampling": {"n": 0}},
        {"result_ttl": 0},
        {"when_full": "maybe"},
        {"webhook": "ftp://x"},
    ],
)
def test_a_client_tells_a_wrong_parameter_by_its_own_name(
    client: Client, reader: QueueReader, terms: Any
) -> None:
    (name, value), *_ = terms.items()
    field = next(iter(value)) if name == "sampling" else name
    with pytest.raises(BadParameter) as error:
        client.submit(["a"], **terms)
    assert str(error.value).startswith(f"{field}: ")
    assert "--" not in str(error.value)
    assert num_sent(reader) == 0


def test_more_jobs_than_one_round_trip_takes_are_all_sent(
    client: Client, reader: QueueReader
) -> None:
    submission = client.submit(str(i) for i in range(1234))
    assert [job.prompt for job in sent_jobs(reader)] == [str(i) for i in range(1234)]
    assert reader.submission(submission).total == 1234


def test_long_jobs_are_sent_in_runs_of_bounded_size(client: Client) -> None:
    with client.prepare(enumerate(["x" * 1_000_000] * 10, 1), name="long") as long:
        assert [len(run.jobs) for run in long.runs()] == [5, 5]


def test_an_id_that_is_taken_after_the_check_is_refused_with_its_line(
    client: Client, reader: QueueReader
) -> None:
    lines = [(7, b'"first"'), (9, b'{"id": "row-1", "prompt": "x"}')]
    with client.prepare(lines, name="prompts.jsonl") as prepared:
        client.submit([{"id": "row-1", "prompt": "y"}])
        with pytest.raises(BadInput, match=r"prompts.jsonl:9: id 'row-1'.* 0 of 2 jobs"):
            client.send(prepared)
    assert num_sent(reader) == 1


def test_sending_again_after_a_lost_reply_adds_nothing(client: Client, reader: QueueReader) -> None:
    with client.prepare([(1, "a"), (2, "b")], name="prompts.jsonl") as prepared:
        client.send(prepared)
        client.send(prepared)
    assert num_sent(reader) == 2


def test_memory_does_not_grow_with_the_number_of_lines(client: Client) -> None:
    def peak(count: int) -> int:
        lines = ((i, {"id": f"{count}-{i}", "prompt": "x" * 200}) for i in range(count))
        tracemalloc.start()
        with client.prepare(lines, name="many") as prepared:
            client.send(prepared)
        _, high = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return high

    peak(1000)  # What is built once.
    assert peak(10_000) < 1.5 * peak(2000)


def test_a_temporary_folder_that_cannot_be_used_is_told_with_the_remedy(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(LorryError, match=r"/nowhere: No such file or directory. Set TMPDIR"):
        client.submit(["x"])


def test_refused_lines_with_much_metadata_are_sent_in_runs_of_bounded_size() -> None:
    with Spool("file") as spool:
        for line in range(4):
            refused = RefusedJob(id=f"{line}", refusal="bad", metadata="x" * (MAX_RUN_BYTES // 2))
            spool.append(line, JobRecord.of(refused))
        assert [(run.offset, len(run.jobs)) for run in spool.runs()] == [(0, 2), (2, 2)]
        assert spool.num_bytes == 0
