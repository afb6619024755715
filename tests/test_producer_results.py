"""Fetching results, waiting for them, and looking at the queue."""

from __future__ import annotations

import json
import os
import pty
import threading
import tty
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks.waiting import wait_until
from broker.job_queue import JobQueue
from producer.bars import LINE_SECONDS, ProgressLines
from producer.client import Client
from schemas.errors import NotFinished, NoWorker, UnknownId
from schemas.result import Result
from schemas.worker_state import WorkerState
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
    return Worker(queue)


def named(*ids: str) -> list[dict[str, object]]:
    return [{"id": id_, "prompt": f"prompt of {id_}"} for id_ in ids]


def ids_of(text: str) -> list[str]:
    return [json.loads(line)["id"] for line in text.splitlines()]


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Something that happens while the command line waits."""
    thread = threading.Timer(0.3, action)
    thread.start()
    yield
    thread.join()


@contextmanager
def again_and_again(action: Callable[[], None]) -> Iterator[None]:
    """Something that happens as long as the command line waits: where the machine is busy, it may
    not have sent anything at first."""
    has_ended = threading.Event()

    def act() -> None:
        while not has_ended.wait(0.3):
            action()

    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def read_terminal(master: int) -> str:
    """What is written to a terminal until nobody has it open any more."""
    parts = []
    with open(master, "rb", buffering=0) as file, suppress(OSError):  # So its end is told.
        while part := file.read(65536):
            parts.append(part)
    return b"".join(parts).decode()


def one_after_another(worker: Worker, *ids: str) -> Callable[[], None]:
    """Finishes one more job each time that the client is about to wait."""
    worker.claim()
    left = iter(ids)

    def finish_next() -> None:
        if id_ := next(left, None):
            worker.finish(id_)

    return finish_next


# ---- results


def test_results_come_in_input_order(producer: Producer, client: Client, worker: Worker) -> None:
    submission = client.submit(named("a", "b", "c"))
    worker.claim()
    for id_ in "cab":
        worker.finish(id_)
    outcome = producer("results", submission)
    assert outcome.exit_code == 0
    assert ids_of(outcome.stdout) == ["a", "b", "c"]


def test_a_result_line_holds_all_that_is_known(
    producer: Producer, client: Client, worker: Worker
) -> None:
    submission = client.submit([{"id": "a", "prompt": "x", "lora": "sql"}])
    worker.finish_all()
    line = json.loads(producer("results", "a").stdout)
    assert list(line) == [
        *("id", "submission", "lora", "revision", "status", "text", "token_ids"),
        *("finish_reason", "logprobs", "prompt_logprobs", "choices"),
        *("usage", "error", "timings", "worker", "metadata"),
    ]
    assert (line["submission"], line["lora"], line["revision"]) == (submission, "sql", "r1")


def test_submissions_and_jobs_may_be_mixed(
    producer: Producer, client: Client, worker: Worker
) -> None:
    first, second = client.submit(named("a", "b")), client.submit(named("c", "d"))
    worker.finish_all()
    assert ids_of(producer("results", "d", second, first).stdout) == ["d", "c", "d", "a", "b"]


def test_unfinished_jobs_end_with_5_after_the_finished_ones(
    producer: Producer, client: Client, worker: Worker
) -> None:
    submission = client.submit(named("a", "b", "c"))
    worker.claim()
    worker.finish("b")
    outcome = producer("results", submission)
    assert outcome.exit_code == 5
    assert ids_of(outcome.stdout) == ["b"]
    assert "2 of 3 jobs not finished yet (2 running)" in outcome.stderr


def test_unfinished_jobs_without_a_worker_end_with_6(
    producer: Producer, client: Client, worker: Worker
) -> None:
    submission = client.submit(named("a"))
    worker.leave()
    outcome = producer("results", submission)
    assert outcome.exit_code == 6
    assert "worker --model-path DIR" in outcome.stderr


def test_jobs_that_were_not_sent_are_not_finished(
    producer: Producer, client: Client, worker: Worker, queue: JobQueue
) -> None:
    with client.prepare([(1, "a")], name="file") as spool:
        (run,) = spool.runs()
    queue.submit("sub-cut", "file", 2, 0, run.jobs)
    worker.finish_all()
    outcome = producer("results", "sub-cut")
    assert outcome.exit_code == 5
    assert "1 of 2 jobs not finished yet (not sent)" in outcome.stderr


@pytest.mark.parametrize("command", ["results", "status", "wait"])
def test_an_unknown_id_ends_with_3_and_a_remedy(producer: Producer, command: str) -> None:
    outcome = producer(command, "nowhere")
    assert outcome.exit_code == 3
    assert "no job and no submission with the id 'nowhere'" in outcome.stderr
    assert "`producer status --queue NAME` lists the submissions" in outcome.stderr


def test_one_unknown_id_among_others_prints_nothing(
    producer: Producer, client: Client, worker: Worker
) -> None:
    client.submit(named("a"))
    worker.finish_all()
    outcome = producer("results", "a", "nowhere")
    assert (outcome.exit_code, outcome.stdout) == (3, "")


def test_a_table_shows_prompts_and_answers(
    producer: Producer, client: Client, worker: Worker
) -> None:
    submission = client.submit(named("a"))
    worker.finish_all()
    head, row = producer("results", submission, "--format", "table").stdout.splitlines()
    assert head.split() == ["job", "adapter", "prompt", "answer", "tokens", "time"]
    assert row.split("  ")[0] == "a"
    assert "prompt of a" in row
    assert "An answer." in row


def test_a_table_shows_why_a_job_failed(producer: Producer, client: Client, worker: Worker) -> None:
    client.submit(named("a"))
    worker.finish_all("failed")
    assert "failed: It is bad." in producer("results", "a", "--format", "table").stdout


def test_a_table_shows_text_as_it_is_but_commands_no_terminal(
    producer: Producer, client: Client, worker: Worker
) -> None:
    client.submit(named("a"))
    worker.claim()
    worker.finish("a", text="[bold]:smile:\x1b[31m")
    shown = producer("results", "a", "--format", "table").stdout
    assert "[bold]:smile:\\x1b[31m" in shown


# ---- following


def test_results_are_followed_in_the_order_in_which_jobs_finish(
    client: Client, worker: Worker
) -> None:
    submission = client.submit(named("a", "b", "c"))
    on_wake = one_after_another(worker, "c", "a", "b")
    assert [r.id for r in client.follow(submission, on_wake=on_wake)] == ["c", "a", "b"]


def test_results_in_input_order_wait_for_those_before_them(client: Client, worker: Worker) -> None:
    submission = client.submit(named("a", "b", "c"))
    finish_next = one_after_another(worker, "c", "a", "b")
    told: list[str] = []
    told_before_each_end: list[list[str]] = []

    def on_wake() -> None:
        told_before_each_end.append(list(told))
        finish_next()

    for result in client.follow_in_order(submission, on_wake=on_wake):
        told.append(result.id)
    assert told == ["a", "b", "c"]
    assert told_before_each_end == [[], [], ["a"]]


def test_several_submissions_and_jobs_are_followed_together(client: Client, worker: Worker) -> None:
    first = client.submit(named("a", "b"))
    client.submit(named("c", "d"))
    on_wake = one_after_another(worker, "c", "b", "d", "a")
    assert [r.id for r in client.follow(first, "c", on_wake=on_wake)] == ["c", "b", "a"]


def test_what_finished_before_is_followed_too(client: Client, worker: Worker) -> None:
    submission = client.submit(named("a", "b"))
    worker.finish_all()
    assert {result.id for result in client.follow(submission, "a")} == {"a", "b"}


def test_a_job_that_two_submissions_share_is_followed_in_both(
    client: Client, worker: Worker
) -> None:
    submissions = [client.submit(named("a")) for _ in range(2)]
    worker.finish_all()
    assert [[r.id for r in client.follow(id_)] for id_ in submissions] == [["a"], ["a"]]


def test_a_job_sent_after_it_finished_is_followed_at_once(client: Client, worker: Worker) -> None:
    client.submit(named("a"))
    worker.finish_all()
    assert [result.id for result in client.follow(client.submit(named("a")))] == ["a"]


def test_more_results_than_one_read_takes_are_followed(client: Client, worker: Worker) -> None:
    submission = client.submit(str(i) for i in range(1100))
    while claimed := worker.claim():
        for job_id in claimed:
            worker.finish(job_id)
    assert len(list(client.follow(submission))) == 1100
    assert len(list(client.follow_in_order(submission))) == 1100


def test_a_queue_that_is_wiped_ends_the_waiting(
    client: Client, worker: Worker, queue: JobQueue
) -> None:
    submission = client.submit(named("a"))

    def wipe() -> None:
        for key in queue.client.scan_iter(queue.keys.prefix + "*"):
            queue.client.delete(key)

    with pytest.raises(UnknownId):
        list(client.follow(submission, on_wake=wipe))


def test_the_command_line_follows_until_all_have_finished(
    producer: Producer, client: Client, worker: Worker
) -> None:
    submission = client.submit(named("a", "b"))
    with again_and_again(worker.finish_all):
        outcome = producer("results", submission, "--follow")
    assert outcome.exit_code == 0
    assert sorted(ids_of(outcome.stdout)) == ["a", "b"]


def test_following_without_a_worker_is_warned_of(
    producer: Producer, client: Client, worker: Worker
) -> None:
    submission = client.submit(named("a"))
    worker.leave()
    with again_and_again(worker.finish_all):
        outcome = producer("results", submission, "--follow")
    assert outcome.stderr.count("warning: No worker is alive") == 1


# ---- files


def test_a_complete_file_bears_its_name(
    producer: Producer, client: Client, worker: Worker, tmp_path: Path
) -> None:
    submission = client.submit(named("a", "b"))
    worker.finish_all()
    file = tmp_path / "out.jsonl"
    outcome = producer("results", submission, "-o", str(file))
    assert outcome.stdout == ""
    assert f"Results are in {file}" in outcome.stderr
    assert ids_of(file.read_text()) == ["a", "b"]
    assert list(tmp_path.iterdir()) == [file]


def test_an_incomplete_file_is_called_partial_beside_an_older_complete_one(
    producer: Producer, client: Client, worker: Worker, tmp_path: Path
) -> None:
    submission = client.submit(named("a", "b"))
    worker.claim()
    worker.finish("a")
    file = tmp_path / "out.jsonl"
    file.write_text("old")
    outcome = producer("results", submission, "-o", str(file))
    assert outcome.exit_code == 5
    assert file.read_text() == "old"
    assert ids_of((tmp_path / "out.jsonl.partial").read_text()) == ["a"]
    assert f"The finished ones are in {file}.partial." in outcome.stderr


def test_nothing_to_write_leaves_no_file(producer: Producer, tmp_path: Path) -> None:
    producer("results", "nowhere", "-o", str(tmp_path / "out.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_link_to_itself_is_refused(producer: Producer, tmp_path: Path) -> None:
    out = tmp_path / "circle" / "out.jsonl"
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    outcome = producer("submit", prompts(tmp_path, '"a"'), "--wait", "-o", str(out))
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith(f"error: -o {out}: ")


@pytest.mark.parametrize("name", [".", "nowhere/out.jsonl"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_sent(
    producer: Producer, client: Client, tmp_path: Path, name: str
) -> None:
    out = str(tmp_path / name)
    outcome = producer("submit", prompts(tmp_path, '"a"'), "--wait", "-o", out)
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith(f"error: -o {out}: ")
    assert client.overview().num_submissions == 0


def test_results_may_go_to_a_device(producer: Producer, client: Client, worker: Worker) -> None:
    client.submit(named("a"))
    worker.finish_all()
    assert producer("results", "a", "-o", "/dev/null").exit_code == 0


def test_a_full_disk_ends_with_a_sentence(
    producer: Producer, client: Client, worker: Worker
) -> None:
    client.submit(named("a"))
    worker.finish_all()
    outcome = producer("results", "a", "-o", "/dev/full")
    assert outcome.exit_code == 1
    assert "Results cannot be written to /dev/full: No space left on device." in outcome.stderr


# ---- submit --wait


def test_submit_and_wait_writes_results_in_input_order_to_stdout(
    producer: Producer, worker: Worker, tmp_path: Path
) -> None:
    file = prompts(tmp_path, *(json.dumps(line) for line in named("a", "b", "c")))

    def finish() -> None:
        wait_until(lambda: bool(worker.claim()), "nothing was sent")
        for id_ in "cba":
            worker.finish(id_)

    with meanwhile(finish):
        outcome = producer("submit", file, "--wait")
    assert outcome.exit_code == 0
    assert ids_of(outcome.stdout) == ["a", "b", "c"]
    assert "Submitted 3 jobs as sub-" in outcome.stderr


def test_results_on_a_terminal_are_the_same_bytes_beside_a_bar(
    producer: Producer, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """stdout and stderr are a terminal each, so that it can be told what goes where."""
    monkeypatch.setenv("TERM", "xterm")
    file = prompts(tmp_path, *(json.dumps(line) for line in named("a", "b")))
    (out, out_end), (err, err_end) = pty.openpty(), pty.openpty()
    tty.setraw(out_end)  # A terminal would show "\r\n" for "\n".
    with ThreadPoolExecutor() as pool:
        shown, told = pool.submit(read_terminal, out), pool.submit(read_terminal, err)
        with producer.start("submit", file, "--wait", stdout=out_end, stderr=err_end) as process:
            os.close(out_end)
            os.close(err_end)
            wait_until(lambda: bool(worker.claim()), "nothing was sent")
            for id_ in ("b", "a"):
                worker.finish(id_, text=":dog: [red]x[/red] 🐶 " + 200 * "-")
    assert process.returncode == 0
    assert shown.result() == producer("results", "a", "b").stdout
    assert "finished" in told.result()
    assert "---" not in told.result()


def test_submit_and_wait_ends_with_1_if_a_job_failed(
    producer: Producer, worker: Worker, tmp_path: Path
) -> None:
    with again_and_again(lambda: worker.finish_all("failed")):
        outcome = producer("submit", prompts(tmp_path, '"a"'), "--wait")
    assert outcome.exit_code == 1
    assert "error: 1 job did not end as done" in outcome.stderr
    assert json.loads(outcome.stdout)["error"]["code"] == "bad_prompt"


def test_submit_and_wait_gives_up_after_the_timeout_and_says_how_to_go_on(
    producer: Producer, worker: Worker, tmp_path: Path
) -> None:
    file = prompts(tmp_path, *(json.dumps(line) for line in named("a", "b", "c")))
    out = tmp_path / "out.jsonl"

    def finish() -> None:
        wait_until(lambda: bool(worker.claim()), "nothing was sent")
        worker.finish("a")

    with meanwhile(finish):
        outcome = producer("submit", file, "--wait", "--timeout", "1", "-o", str(out))
    assert outcome.exit_code == 5
    assert "error: 1 of 3 jobs of sub-" in outcome.stderr
    assert "finished (2 running, 1 done) after 1 s." in outcome.stderr
    assert "The jobs go on: `producer results sub-" in outcome.stderr
    assert ids_of((tmp_path / "out.jsonl.partial").read_text()) == ["a"]


@pytest.mark.parametrize("flags", [("--timeout", "1"), ("--wait", "--timeout", "nan")])
def test_a_timeout_that_bounds_nothing_is_refused(
    producer: Producer, client: Client, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    assert producer("submit", prompts(tmp_path, '"a"'), *flags).exit_code == 2
    assert client.overview().num_submissions == 0


def test_submit_and_wait_counts_the_states_for_machines(
    producer: Producer, worker: Worker, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    with again_and_again(worker.finish_all):
        outcome = producer(
            "submit", prompts(tmp_path, '"a"', '"b"'), "--wait", "--json", "-o", str(out)
        )
    assert json.loads(outcome.stdout)["counts"]["done"] == 2
    assert len(out.read_text().splitlines()) == 2


def test_json_and_results_cannot_share_stdout(producer: Producer, tmp_path: Path) -> None:
    outcome = producer("submit", prompts(tmp_path, '"a"'), "--wait", "--json")
    assert outcome.exit_code == 2


def test_results_never_overwrite_the_prompts(producer: Producer, tmp_path: Path) -> None:
    file = prompts(tmp_path, '"a"')
    outcome = producer("submit", file, "--wait", "-o", file)
    assert outcome.exit_code == 2
    assert Path(file).read_text() == '"a"\n'


# ---- wait


def test_wait_ends_with_0_when_all_are_done(
    producer: Producer, client: Client, worker: Worker
) -> None:
    submission = client.submit(named("a", "b"))
    with again_and_again(worker.finish_all):
        outcome = producer("wait", submission)
    assert outcome.exit_code == 0
    assert outcome.stdout == f"2 of 2 jobs of {submission} finished (2 done).\n"


@pytest.mark.parametrize("is_job", [True, False])
def test_wait_ends_with_1_when_a_job_failed(
    producer: Producer, client: Client, worker: Worker, is_job: bool
) -> None:
    submission = client.submit(named("a", "b"))
    worker.finish_all("failed")
    assert producer("wait", "a" if is_job else submission).exit_code == 1


def test_wait_for_one_job_ends_with_it(client: Client, worker: Worker) -> None:
    client.submit(named("a", "b"))
    worker.claim()
    with meanwhile(lambda: worker.finish("b")):
        status = client.wait("b")
    assert isinstance(status, Result)
    assert status.status == "done"


def test_wait_ends_with_5_when_its_time_is_over(
    producer: Producer, client: Client, worker: Worker
) -> None:
    submission = client.submit(named("a", "b"))
    worker.claim()
    worker.finish("a")
    outcome = producer("wait", submission, "--timeout", "0.1")
    assert outcome.exit_code == 5
    expected = f"1 of 2 jobs of {submission} finished (1 running, 1 done) after 0.1 s."
    assert expected in outcome.stderr


def test_wait_ends_with_6_when_its_time_is_over_and_no_worker_is_alive(
    producer: Producer, client: Client, worker: Worker
) -> None:
    client.submit(named("a"))
    worker.leave()
    outcome = producer("wait", "a", "--timeout", "0.1")
    assert outcome.exit_code == 6
    assert "error: Job a is waiting after 0.1 s. No worker is alive" in outcome.stderr


def test_a_timeout_that_is_no_number_is_refused(producer: Producer, client: Client) -> None:
    assert producer("wait", client.submit(["x"]), "--timeout", "nan").exit_code == 2


def test_a_client_that_waits_in_vain_gets_the_error(client: Client, worker: Worker) -> None:
    submission = client.submit(named("a"))
    with pytest.raises(NotFinished):
        client.wait(submission, timeout=0.1)
    worker.leave()
    with pytest.raises(NoWorker):
        client.wait(submission, timeout=0)


# ---- status


def test_an_empty_queue_says_what_to_do(producer: Producer) -> None:
    shown = producer("status").stdout
    assert f"Nothing was ever submitted to queue '{producer.queue}': producer submit" in shown
    assert "worker --model-path DIR" in shown


def test_the_overview_shows_submissions_workers_and_waiting_adapters(
    producer: Producer, client: Client, worker: Worker
) -> None:
    submission = client.submit([{"prompt": "x", "lora": "sql"}, "y"], name="mine.jsonl")
    shown = producer("status").stdout
    for word in (submission, "mine.jsonl", worker.id, "tiny-llama", "json, sql", "(base model)"):
        assert word in shown


def test_the_overview_says_whose_running_jobs_nobody_runs(
    producer: Producer, client: Client, worker: Worker
) -> None:
    client.submit(["x", "y"])
    worker.claim()
    told = "2 jobs left running by workers that are gone: the next worker lets them run again."
    assert told not in producer("status").stdout
    worker.leave()
    assert told in producer("status").stdout
    assert json.loads(producer("status", "--json").stdout)["abandoned"] == 2


def test_more_adapters_may_stand_in_slots_than_a_batch_holds(
    producer: Producer, queue: JobQueue
) -> None:
    """Small ones share the room of a large one."""
    state = WorkerState(
        id="w1",
        model="m",
        device="cpu",
        started=0,
        adapters={},
        resident=["a", "b", "c", "c"],
        max_loras_per_batch=2,
    )
    queue.heartbeat(state, alive_seconds=60)
    shown = producer("status").stdout.splitlines()
    (row,) = [line.split() for line in shown if line.startswith("w1")]
    assert row == ["w1", "m", "cpu", "0", "0", "3", "(base", "model)"]


def test_the_overview_shows_the_last_20_submissions(producer: Producer, client: Client) -> None:
    ids = [client.submit(["x"]) for _ in range(22)]
    shown = producer("status").stdout
    assert sum(id_ in shown for id_ in ids) == 20
    assert "the last 20 of 22 submissions" in shown


def test_the_overview_is_one_object_for_machines(
    producer: Producer, client: Client, worker: Worker
) -> None:
    client.submit(["x"])
    found = json.loads(producer("status", "--json").stdout)
    assert found["submissions"][0]["counts"]["waiting"] == 1
    assert found["workers"][0]["model"] == "tiny-llama"
    assert found["adapters"] == ["json", "sql"]
    assert found["unfinished"] == {"@base": 1}


def test_a_submission_shows_its_counts(producer: Producer, client: Client, worker: Worker) -> None:
    submission = client.submit(named("a", "b", "c"))
    worker.claim()
    worker.finish("a")
    worker.finish("b", "failed")
    assert "3: 1 running, 1 done, 1 failed" in producer("status", submission).stdout


def test_a_submission_is_one_object_for_machines(producer: Producer, client: Client) -> None:
    submission = client.submit(named("a", "b"))
    found = json.loads(producer("status", submission, "--json").stdout)
    assert (found["id"], found["total"], found["finished"]) == (submission, 2, 0)


def test_a_job_shows_its_prompt_its_state_and_its_answer(
    producer: Producer, client: Client, worker: Worker
) -> None:
    client.submit([{"id": "a", "messages": [{"role": "user", "content": "Hello?"}]}])
    worker.finish_all()
    shown = producer("status", "a").stdout
    for word in ("done", "Hello?", "An answer.", "(base model)", worker.id):
        assert word in shown


def test_a_job_is_its_result_line_for_machines(producer: Producer, client: Client) -> None:
    client.submit([{"id": "a", "prompt": "x", "metadata": {"row": 1}}])
    found = json.loads(producer("status", "a", "--json").stdout)
    assert (found["status"], found["metadata"]) == ("waiting", {"row": 1})


def test_a_key_of_the_queue_is_no_id(producer: Producer, client: Client) -> None:
    assert producer("status", client.submit(["x"]) + ":jobs").exit_code == 3


def test_without_a_terminal_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr("producer.bars.time.monotonic", lambda: now[0])
    bar = ProgressLines("finished", 120)
    for seconds in (1, LINE_SECONDS, LINE_SECONDS + 1, 2 * LINE_SECONDS):
        now[0] = 1000.0 + seconds
        bar.update(int(seconds), "2 failed")
    assert capsys.readouterr().err.splitlines() == [
        "finished: 30 of 120, 2 failed",
        "finished: 60 of 120, 2 failed",
    ]
