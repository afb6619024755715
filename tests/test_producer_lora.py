"""Adapters while workers run: the ``lora`` commands, and the client's methods behind them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis.connection
from typer.testing import CliRunner

from broker.claims import ClaimRequest
from broker.connection import connect
from broker.desired_state import RETIRE_LIMIT
from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from producer.advice import unserved
from producer.cli import app
from producer.client import Client
from schemas.adapter import AdapterRecord
from schemas.errors import BadInput, UnknownId
from schemas.job import Job
from schemas.result import Result, Timings
from schemas.worker_state import AdapterCounts, WorkerState
from tests.servers import wait_until
from tests.test_producer_cli import Producer, prompts


class FollowingWorker:
    """Follows the desired state as a worker does, without reading a folder."""

    def __init__(
        self,
        url: str,
        queue: str,
        id_: str,
        *,
        errors: dict[str, str] | None = None,
        slots: int = 4,
        max_pinned: int | None = None,
        alive_seconds: float = 60,
    ) -> None:
        """``errors`` are the adapters that it cannot serve."""
        self.id = id_
        self.errors = errors or {}
        self.serves_jobs = False
        self._slots = slots
        self._max_pinned = slots - 1 if max_pinned is None else max_pinned
        self._alive_seconds = alive_seconds
        self._client = connect(url)
        self._queue = JobQueue(self._client, queue)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.turn()
        self._thread.start()

    def close(self) -> None:
        self.fall_silent()
        self._client.close()

    def fall_silent(self) -> None:
        """Die: no more heartbeats."""
        self._ends.set()
        self._thread.join()

    def turn(self) -> None:
        if self.serves_jobs:
            self._serve()
        version, records = self._queue.desired_state()
        for name in [name for name, record in records.items() if record.unloading]:
            self._queue.retire_adapter(name)
        served = {name: r for name, r in records.items() if name not in self.errors}
        pinned = sorted(name for name, record in served.items() if record.pinned)
        state = WorkerState(
            id=self.id,
            model="tiny-llama",
            device="cpu",
            started=0,
            adapters={name: self._revision(name, record) for name, record in served.items()},
            pinned=pinned[: self._max_pinned],
            adapter_errors={name: e for name, e in self.errors.items() if name in records},
            desired_version=version,
            max_loras_per_batch=self._slots,
        )
        self._queue.heartbeat(state, alive_seconds=self._alive_seconds)

    def _run(self) -> None:
        while not self._ends.wait(0.02):
            self.turn()

    def _revision(self, name: str, record: AdapterRecord) -> str:
        return self._queue.adopt_revision(name, record.version, f"rev-{name}") or "gone"

    def _serve(self) -> None:
        """Answer one job."""
        request = ClaimRequest(num_jobs=1, free_slots=4, in_use=())
        for job in self._queue.claim(self.id, request, lease_seconds=60, patience=60).jobs:
            result = Result(
                id=job.lease.job_id,
                submission=job.submission,
                lora=job.adapter,
                status="done",
                timings=Timings(queued=job.queued),
            )
            self._queue.commit(self.id, [(job.lease, result)])


StartWorker = Callable[..., FollowingWorker]


@pytest.fixture
def producer(redis_url: str, queue_name: str) -> Producer:
    return Producer(redis_url, queue_name)


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


@pytest.fixture
def start_worker(redis_url: str, queue_name: str) -> Iterator[StartWorker]:
    with ExitStack() as stack:

        def start(id_: str = "w1", **options: object) -> FollowingWorker:
            worker = FollowingWorker(redis_url, queue_name, id_, **options)  # type: ignore[arg-type]
            stack.callback(worker.close)
            return worker

        yield start


def beat(queue: JobQueue, **fields: object) -> None:
    """One heartbeat of a worker that then does nothing."""
    state = {"id": "idle", "model": "m", "device": "cpu", "started": 0, "adapters": {}}
    state |= {"max_loras_per_batch": 4}
    queue.heartbeat(WorkerState.model_validate(state | fields), alive_seconds=60)


def desired(queue: JobQueue) -> dict[str, AdapterRecord]:
    return queue.desired_state()[1]


def send(queue: JobQueue, count: int, lora: str = "sql") -> None:
    batch = [Job(id=f"{lora}-{i}", lora=lora, prompt="x") for i in range(count)]
    queue.submit("sub", "file", count, 0, batch)


def some_job(queue: JobQueue) -> str:
    """The id of some job on the queue."""
    return next(queue.client.scan_iter(queue.keys.job("*"))).removeprefix(queue.keys.job(""))


def test_help_lists_the_commands() -> None:
    assert "lora" in CliRunner().invoke(app, ["--help"]).stdout
    told = CliRunner().invoke(app, ["lora", "--help"]).stdout
    for word in ("load", "unload", "pin", "unpin", "list"):
        assert word in told


def test_a_load_is_answered_by_every_worker(
    producer: Producer, queue: JobQueue, start_worker: StartWorker
) -> None:
    start_worker("w1")
    start_worker("w2")
    outcome = producer("lora", "load", "sql", "/adapters/sql")
    assert outcome.exit_code == 0
    head, *rows = outcome.stdout.splitlines()
    assert head.split() == ["worker", "success", "error_message", "loaded_adapters"]
    assert sorted(row.split() for row in rows) == [["w1", "yes", "sql"], ["w2", "yes", "sql"]]
    assert desired(queue)["sql"].source == "/adapters/sql"


def test_the_answers_as_json_are_one_object(producer: Producer, start_worker: StartWorker) -> None:
    start_worker("w1")
    outcome = producer("lora", "load", "sql", "/adapters/sql", "--json")
    assert json.loads(outcome.stdout) == {
        "version": 1,
        "workers": [
            {
                "worker": "w1",
                "success": True,
                "error_message": None,
                "loaded_adapters": {"sql": "rev-sql"},
            }
        ],
    }


def test_a_worker_that_cannot_serve_the_adapter_says_why_and_the_others_serve_it(
    producer: Producer, start_worker: StartWorker
) -> None:
    start_worker("w1")
    start_worker("w2", errors={"sql": "there is no folder /adapters/sql"})
    outcome = producer("lora", "load", "sql", "/adapters/sql")
    assert outcome.exit_code == 1
    assert "w2      no       there is no folder /adapters/sql" in outcome.stdout
    assert "w1      yes" in outcome.stdout
    assert "error: 1 of 2 workers did not load 'sql'." in outcome.stderr


@pytest.mark.parametrize("action", ["load", "unload", "pin", "unpin"])
def test_without_a_worker_the_command_is_kept_and_that_is_said(
    producer: Producer, queue: JobQueue, action: str
) -> None:
    queue.announce({"sql": AdapterRecord(source="/adapters/sql", revision="r")})
    send(queue, 1)
    path = ("/adapters/new",) if action == "load" else ()
    outcome = producer("lora", action, "sql", *path)
    assert outcome.exit_code == 6
    assert f"No worker is alive on queue '{producer.queue}'. The command is kept" in outcome.stderr
    record = desired(queue)["sql"]
    assert {
        "load": record.source == "/adapters/new",
        "unload": record.unloading == "drain",
        "pin": record.pinned,
        "unpin": not record.pinned,
    }[action]


def test_without_a_worker_an_adapter_that_has_no_jobs_is_unloaded_at_once(
    producer: Producer, queue: JobQueue
) -> None:
    queue.announce({"sql": AdapterRecord(source="/adapters/sql", revision="r")})
    outcome = producer("lora", "unload", "sql")
    assert outcome.exit_code == 0
    assert f"Queue '{queue.name}' does not know 'sql' any more." in outcome.stderr
    assert desired(queue) == {}


@pytest.mark.parametrize("wait", ["--wait", "--no-wait"])
def test_without_a_worker_force_fails_the_waiting_jobs_and_says_so(
    producer: Producer, queue: JobQueue, reader: QueueReader, wait: str
) -> None:
    queue.announce({"sql": AdapterRecord(source="/adapters/sql", revision="r")})
    send(queue, RETIRE_LIMIT + 1)
    outcome = producer("lora", "unload", "sql", "--force", wait)
    assert outcome.exit_code == 0
    number = RETIRE_LIMIT + 1
    assert f"{number} jobs that waited for it failed with adapter_unloaded." in outcome.stderr
    assert reader.submission("sub").counts["failed"] == RETIRE_LIMIT + 1
    assert {r.error.code for r in reader.results(["sql-0"]) if r.error} == {"adapter_unloaded"}
    assert desired(queue) == {}


def test_force_tells_of_no_job_where_none_waited(producer: Producer, queue: JobQueue) -> None:
    queue.announce({"sql": AdapterRecord(source="/adapters/sql", revision="r")})
    outcome = producer("lora", "unload", "sql", "--force")
    assert outcome.exit_code == 0
    assert "adapter_unloaded" not in outcome.stderr


def test_without_a_worker_force_leaves_what_a_dead_one_ran_to_the_next(
    producer: Producer, queue: JobQueue, reader: QueueReader
) -> None:
    queue.announce({"sql": AdapterRecord(source="/adapters/sql", revision="r")})
    send(queue, 2)
    beat(queue, id="dead", adapters={"sql": "r"})
    queue.claim("dead", ClaimRequest(1, 4, ()), lease_seconds=60, patience=60)
    queue.leave("dead")
    assert producer("lora", "unload", "sql", "--force").exit_code == 6
    counts = reader.submission("sub").counts
    assert (counts["failed"], counts["running"]) == (1, 1)


def test_without_a_worker_json_is_printed_all_the_same(producer: Producer) -> None:
    outcome = producer("lora", "load", "sql", "/adapters/sql", "--json")
    assert outcome.exit_code == 6
    assert json.loads(outcome.stdout) == {"version": 1, "workers": []}


def test_a_worker_that_dies_is_no_longer_waited_for(
    producer: Producer, queue: JobQueue, start_worker: StartWorker
) -> None:
    start_worker("w1")
    dying = start_worker("w2", alive_seconds=0.5)
    dying.fall_silent()
    outcome = producer("lora", "load", "sql", "/adapters/sql", "--json")
    assert outcome.exit_code == 0
    assert [row["worker"] for row in json.loads(outcome.stdout)["workers"]] == ["w1"]


def test_a_worker_that_does_not_answer_in_time_is_a_failure(
    producer: Producer, queue: JobQueue, start_worker: StartWorker
) -> None:
    start_worker("w1")
    beat(queue, adapters={"json": "r"})
    outcome = producer("lora", "load", "sql", "/adapters/sql", "--timeout", "0.3", "--json")
    assert outcome.exit_code == 1
    answers = {row["worker"]: row for row in json.loads(outcome.stdout)["workers"]}
    assert answers["w1"]["success"]
    assert not answers["idle"]["success"]
    assert answers["idle"]["error_message"] == "no answer in 0.3 s"
    assert answers["idle"]["loaded_adapters"] == {"json": "r"}


def test_an_answer_to_an_earlier_command_is_none_to_this_one(
    producer: Producer, queue: JobQueue
) -> None:
    queue.announce({"sql": AdapterRecord(source="/adapters/sql", revision="r")})
    beat(queue, adapters={"sql": "r"}, desired_version=1)
    outcome = producer("lora", "load", "sql", "/adapters/sql", "--timeout", "0.2")
    assert outcome.exit_code == 1
    assert "no answer in 0.2 s" in outcome.stdout


def test_a_worker_that_still_reads_another_adapter_answers_for_this_one(
    producer: Producer, queue: JobQueue
) -> None:
    queue.announce({"sql": AdapterRecord(source="/adapters/sql", revision="r")})
    queue.set_adapter("slow", "/adapters/slow", pinned=False)
    state = {"adapters": {"sql": "r", "slow": "before"}, "pinned": ["sql"], "desired_version": 1}
    beat(queue, **state, seen_version=4, reading=["slow"])
    outcome = producer("lora", "pin", "sql", "--timeout", "0.2")
    assert outcome.exit_code == 0, outcome.stdout
    outcome = producer("lora", "load", "slow", "/adapters/slow", "--timeout", "0.2")
    assert outcome.exit_code == 1
    assert "no answer in 0.2 s" in outcome.stdout


def test_without_waiting_nobody_is_asked(producer: Producer, queue: JobQueue) -> None:
    beat(queue)
    outcome = producer("lora", "load", "sql", "/adapters/sql", "--no-wait", "--json")
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout) == {"version": 1, "workers": []}
    send(queue, 1)
    outcome = producer("lora", "unload", "sql", "--no-wait", "--json")
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout) == {"version": 2, "workers": []}
    assert "Told the workers to unload 'sql'." in outcome.stderr


def test_workers_are_told_an_absolute_path(
    producer: Producer, queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sql").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "sql")
    monkeypatch.chdir(tmp_path)
    for path in ("sql", "./only/here-is-it-not", "current", "/adapters/sql"):
        producer("lora", "load", "sql", path, "--no-wait")
        assert desired(queue)["sql"].source == str(tmp_path / path)


@pytest.mark.parametrize("name", ["@base", "a b", "", "x" * 129, "ü", "\udcff"])
def test_a_name_that_no_adapter_can_have_is_refused(
    producer: Producer, queue: JobQueue, name: str
) -> None:
    for command in (("load", name, "/adapters/sql"), ("pin", name), ("unload", name)):
        outcome = producer("lora", *command, "--no-wait")
        assert outcome.exit_code == 2
        assert "cannot name an adapter: use up to 128 letters" in outcome.stderr
    assert desired(queue) == {}


@pytest.mark.parametrize("path", ["", " ", "\udcff", __file__])
def test_what_is_no_folder_is_refused(producer: Producer, queue: JobQueue, path: str) -> None:
    outcome = producer("lora", "load", "sql", path, "--no-wait")
    assert outcome.exit_code == 2
    assert outcome.stderr.splitlines()[-1].startswith("error: '")
    assert desired(queue) == {}


@pytest.mark.parametrize("action", ["unload", "pin", "unpin"])
def test_an_unknown_name_ends_with_3_and_a_hint(
    producer: Producer, queue: JobQueue, action: str
) -> None:
    queue.announce({"sql": AdapterRecord(source="/sql", revision="r")})
    outcome = producer("lora", action, "sqll")
    assert outcome.exit_code == 3
    assert "knows no adapter 'sqll'; did you mean 'sql'? Known adapters: sql." in outcome.stderr
    assert queue.desired_state()[0] == 1


@pytest.mark.parametrize("timeout", ["-1", "nan"])
def test_a_wrong_timeout_is_refused(producer: Producer, timeout: str) -> None:
    outcome = producer("lora", "load", "sql", "/adapters/sql", "--timeout", timeout)
    assert outcome.exit_code == 2


def test_an_adapter_is_pinned_and_unpinned_on_every_worker(
    producer: Producer, queue: JobQueue, start_worker: StartWorker, reader: QueueReader
) -> None:
    start_worker("w1")
    assert producer("lora", "load", "sql", "/adapters/sql").exit_code == 0
    assert producer("lora", "pin", "sql").exit_code == 0
    assert desired(queue)["sql"].pinned
    assert reader.workers()[0].pinned == ["sql"]
    assert producer("lora", "unpin", "sql").exit_code == 0
    assert not desired(queue)["sql"].pinned
    assert reader.workers()[0].pinned == []


def test_a_load_without_pin_leaves_the_adapter_pinned(
    producer: Producer, reader: QueueReader, start_worker: StartWorker
) -> None:
    start_worker("w1")
    assert producer("lora", "load", "sql", "/adapters/sql").exit_code == 0
    assert producer("lora", "pin", "sql").exit_code == 0
    for path in ("/adapters/sql", "/adapters/new"):
        assert producer("lora", "load", "sql", path).exit_code == 0
        assert reader.workers()[0].pinned == ["sql"]


def test_more_pinned_adapters_than_a_worker_can_keep_are_refused_at_once(
    producer: Producer, queue: JobQueue, start_worker: StartWorker
) -> None:
    start_worker("large", slots=8)
    start_worker("small", slots=2)
    assert producer("lora", "load", "sql", "/adapters/sql", "--pin").exit_code == 0
    assert producer("lora", "load", "json", "/adapters/json").exit_code == 0
    assert producer("lora", "pin", "sql").exit_code == 0
    before = queue.desired_state()
    for command in (("pin", "json"), ("load", "new", "/adapters/new", "--pin")):
        outcome = producer("lora", *command)
        assert outcome.exit_code == 2
        assert "worker small can keep 1 adapter pinned (--max-loras-per-batch 2" in outcome.stderr
        assert "pinned already: sql." in outcome.stderr
    assert queue.desired_state() == before


def test_of_commands_at_one_moment_as_many_pin_as_a_worker_can_keep(
    redis_url: str, queue: JobQueue, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_worker("small", slots=3)
    names = ["a", "b", "c", "d"]
    queue.announce({name: AdapterRecord(source="/", revision="r") for name in names})
    have_looked = threading.Barrier(len(names))
    look = QueueReader.workers

    def look_with_the_others(reader: QueueReader) -> list[WorkerState]:
        found = look(reader)
        have_looked.wait(30)
        return found

    monkeypatch.setattr(QueueReader, "workers", look_with_the_others)

    def refusal(name: str) -> str | None:
        with Client(redis_url, queue.name) as client:
            try:
                client.pin_adapter(name)
            except BadInput as error:
                return str(error)
        return None

    with ThreadPoolExecutor(len(names)) as threads:
        refusals = [text for text in threads.map(refusal, names) if text]
    pinned = [name for name, record in desired(queue).items() if record.pinned]
    assert len(pinned) == 2
    assert len(refusals) == 2
    assert all(text.endswith(f"pinned already: {', '.join(pinned)}.") for text in refusals)


def test_the_list_tells_how_many_workers_keep_what_is_pinned(
    producer: Producer, queue: JobQueue
) -> None:
    """Two were each started with two pinned adapters of their own, and keep two each."""
    names = ["a", "b", "c", "d"]
    queue.announce({n: AdapterRecord(source="/", revision="r", pinned=True) for n in names})
    for worker, pinned in (("w1", ["a", "b"]), ("w2", ["b", "c"])):
        beat(queue, id=worker, adapters=dict.fromkeys(names, "r"), pinned=pinned)
    found = json.loads(producer("lora", "list", "--json").stdout)["adapters"]
    assert [adapter["num_pinned"] for adapter in found] == [1, 2, 1, 0]
    rows = producer("lora", "list").stdout.splitlines()[1:5]
    told = [
        "pinned on 1 of 2 workers",
        "pinned",
        "pinned on 1 of 2 workers",
        "pinned on 0 of 2 workers",
    ]
    for text, row in zip(told, rows, strict=True):
        assert f", {text}  " in row


def test_an_adapter_that_is_being_unloaded_cannot_be_pinned(
    producer: Producer, queue: JobQueue
) -> None:
    queue.announce({"sql": AdapterRecord(source="/sql", revision="r")})
    queue.unload_adapter("sql", "drain")
    outcome = producer("lora", "pin", "sql")
    assert outcome.exit_code == 2
    assert "'sql' is being unloaded" in outcome.stderr
    assert not desired(queue)["sql"].pinned


def test_a_pin_that_a_worker_refuses_is_a_failure(
    producer: Producer, start_worker: StartWorker
) -> None:
    start_worker("w1", max_pinned=0)
    outcome = producer("lora", "load", "sql", "/adapters/sql", "--pin")
    assert outcome.exit_code == 1
    assert "it is loaded, but not pinned" in outcome.stdout


def test_an_adapter_without_jobs_is_unloaded_from_every_worker(
    producer: Producer, queue: JobQueue, start_worker: StartWorker
) -> None:
    start_worker("w1")
    start_worker("w2")
    producer("lora", "load", "sql", "/adapters/sql")
    outcome = producer("lora", "unload", "sql", "--json")
    assert outcome.exit_code == 0
    answers = json.loads(outcome.stdout)["workers"]
    assert [(row["worker"], row["loaded_adapters"]) for row in answers] == [("w1", {}), ("w2", {})]
    assert desired(queue) == {}


def test_an_adapter_is_drained_for_as_long_as_jobs_of_it_are_left(
    producer: Producer,
    queue: JobQueue,
    reader: QueueReader,
    start_worker: StartWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("producer.adapters.ANSWER_SECONDS", 0.3)
    worker = start_worker()
    producer("lora", "load", "sql", "/adapters/sql")
    send(queue, 3)
    threading.Timer(0.8, lambda: setattr(worker, "serves_jobs", True)).start()
    started = time.monotonic()
    assert producer("lora", "unload", "sql", "--drain").exit_code == 0
    assert time.monotonic() - started > 0.8
    assert reader.submission("sub").counts["done"] == 3
    assert desired(queue) == {}


def test_a_timeout_bounds_the_wait_for_a_drain_that_goes_on(
    producer: Producer, queue: JobQueue, start_worker: StartWorker
) -> None:
    worker = start_worker()
    producer("lora", "load", "sql", "/adapters/sql")
    send(queue, 3)
    outcome = producer("lora", "unload", "sql", "--timeout", "0.3")
    assert outcome.exit_code == 5
    assert "3 jobs of it left after 0.3 s" in outcome.stdout
    assert "'sql' takes no new jobs, but is not unloaded yet" in outcome.stderr
    worker.serves_jobs = True
    wait_until(lambda: desired(queue) == {}, "the adapter was not unloaded")


@pytest.mark.parametrize("seconds", ["0", "0.5"])
@pytest.mark.parametrize("what", ["sql", None])
def test_a_drain_of_what_is_paused_says_so_at_once_and_when_its_time_is_over(
    producer: Producer,
    client: Client,
    queue: JobQueue,
    start_worker: StartWorker,
    what: str | None,
    seconds: str,
) -> None:
    start_worker()
    producer("lora", "load", "sql", "/adapters/sql")
    send(queue, 2)
    client.pause(what)
    outcome = producer("lora", "unload", "sql", "--timeout", seconds)
    assert outcome.exit_code == 5
    remedy = f"paused: `producer resume{f' {what}' if what else ''}` lets its jobs be finished"
    assert f"2 jobs of it left after {seconds} s; " in outcome.stdout
    assert remedy in outcome.stdout
    _, notice, *rest = outcome.stderr.splitlines()
    assert notice.startswith("2 jobs left; ")
    assert notice.endswith(f"{remedy}.")
    assert remedy in rest[-1]
    assert sum(remedy in line for line in rest) == 1


def test_a_pause_that_ends_lets_a_drain_go_on(
    producer: Producer, client: Client, queue: JobQueue, start_worker: StartWorker
) -> None:
    start_worker().serves_jobs = True
    producer("lora", "load", "sql", "/adapters/sql")
    client.pause("sql")
    send(queue, 2)
    threading.Timer(0.5, client.resume, ["sql"]).start()
    outcome = producer("lora", "unload", "sql")
    assert outcome.exit_code == 0
    assert "'sql' is paused" in outcome.stderr


def test_force_fails_the_waiting_jobs_with_a_reason(
    producer: Producer, queue: JobQueue, reader: QueueReader, start_worker: StartWorker
) -> None:
    start_worker()
    producer("lora", "load", "sql", "/adapters/sql")
    send(queue, 3)
    outcome = producer("lora", "unload", "sql", "--force")
    assert outcome.exit_code == 0
    assert "3 jobs that waited for it failed with adapter_unloaded." in outcome.stderr
    assert reader.submission("sub").counts["failed"] == 3
    results = [json.loads(line) for line in producer("results", "sub").stdout.splitlines()]
    assert {result["error"]["code"] for result in results} == {"adapter_unloaded"}
    assert desired(queue) == {}


def test_an_adapter_that_nobody_serves_cannot_drain_and_that_is_said(
    producer: Producer, queue: JobQueue, start_worker: StartWorker
) -> None:
    start_worker(errors={"sql": "there is no folder /adapters/sql"})
    producer("lora", "load", "sql", "/adapters/sql")
    send(queue, 2)
    outcome = producer("lora", "unload", "sql")
    assert outcome.exit_code == 1
    assert (
        "2 jobs of it left, and no worker serves it; an unload by force lets them fail"
        in outcome.stdout
    )
    assert producer("lora", "unload", "sql", "--force").exit_code == 0


def test_an_adapter_that_is_loaded_again_while_it_drains_is_not_unloaded(
    producer: Producer, queue: JobQueue, start_worker: StartWorker
) -> None:
    start_worker()
    producer("lora", "load", "sql", "/adapters/sql")
    send(queue, 1)

    def load_again() -> None:
        wait_until(lambda: bool(desired(queue)["sql"].unloading), "it was not unloaded")
        queue.set_adapter("sql", "/adapters/new", pinned=False)

    thread = threading.Thread(target=load_again)
    thread.start()
    outcome = producer("lora", "unload", "sql")
    thread.join()
    assert outcome.exit_code == 1
    assert "it was loaded again meanwhile" in outcome.stdout


@pytest.mark.parametrize(("first", "last"), [("gone", "good"), ("good", "gone")])
def test_a_load_is_not_answered_with_what_became_of_a_later_one(
    client: Client, queue: JobQueue, first: str, last: str
) -> None:
    """Both are given while the worker is stopped."""
    changes = [client.load_adapter("sql", f"/adapters/{folder}") for folder in (first, last)]
    served = {"adapters": {"sql": "r"}} if last == "good" else {}
    errors = {"adapter_errors": {"sql": "there is no folder /gone."}} if last == "gone" else {}
    beat(queue, desired_version=2, **served, **errors)
    (superseded,), (answer,) = (client.answers(change) for change in changes)
    assert (superseded.success, superseded.error_message) == (
        False,
        "it was loaded again meanwhile",
    )
    assert answer.success == (last == "good")


def test_a_load_that_was_superseded_fails_its_command(producer: Producer, queue: JobQueue) -> None:
    beat(queue)

    def load_again() -> None:
        wait_until(lambda: bool(desired(queue)), "it was not loaded")
        queue.set_adapter("sql", "/adapters/good", pinned=False)
        beat(queue, adapters={"sql": "r"}, desired_version=2)

    thread = threading.Thread(target=load_again)
    thread.start()
    outcome = producer("lora", "load", "sql", "/adapters/gone")
    thread.join()
    assert outcome.exit_code == 1
    assert "it was loaded again meanwhile" in outcome.stdout


@pytest.mark.parametrize("pinned", [["sql"], []])
def test_a_pin_is_answered_by_what_is_pinned_though_a_load_has_failed(
    producer: Producer, queue: JobQueue, pinned: list[str]
) -> None:
    """The worker serves what the load was to replace, and says what was wrong with that."""
    queue.announce({"sql": AdapterRecord(source="/sql", revision="r")})
    error = {"sql": "there is no folder /gone."}
    beat(queue, adapters={"sql": "r"}, adapter_errors=error, pinned=pinned, desired_version=2)
    assert producer("lora", "pin", "sql").exit_code == (0 if pinned else 1)


def test_an_adapter_that_is_unloaded_while_a_load_is_waited_for_is_no_success(
    client: Client, queue: JobQueue, start_worker: StartWorker
) -> None:
    start_worker()
    change = client.load_adapter("sql", "/adapters/sql")
    client.answers(client.unload_adapter("sql"))
    (answer,) = client.answers(change)
    assert (answer.success, answer.error_message) == (False, "it was unloaded meanwhile")


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_program_is_told_of_a_timeout_that_is_none(client: Client, timeout: float) -> None:
    change = client.load_adapter("sql", "/adapters/sql")
    with pytest.raises(BadInput, match=f"A timeout is a number of seconds, not {timeout}"):
        client.answers(change, timeout=timeout)


def test_ctrl_c_while_waiting_says_that_the_command_is_kept(
    producer: Producer, queue: JobQueue
) -> None:
    beat(queue)
    with producer.start("lora", "load", "sql", "/adapters/sql") as process:
        while not desired(queue):
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(2)
        _, told = process.communicate()
    assert process.returncode == 130
    assert "The workers act on it all the same." in told


def test_lines_for_an_adapter_that_is_being_unloaded_are_refused(
    producer: Producer, queue: JobQueue, tmp_path: Path
) -> None:
    queue.announce({name: AdapterRecord(source="/", revision="r") for name in ("sql", "json")})
    queue.unload_adapter("sql", "drain")
    lines = ('{"prompt": "x", "lora": "json"}', '{"prompt": "x", "lora": "sql"}')
    outcome = producer("submit", prompts(tmp_path, *lines))
    assert outcome.exit_code == 2
    sentence = "lora: adapter 'sql' is being unloaded and takes no new jobs"
    assert f":2: {sentence}" in outcome.stderr
    outcome = producer("submit", "--lora", "sql", prompts(tmp_path, '"x"'))
    assert outcome.exit_code == 2
    assert f"--{sentence}" in outcome.stderr


def test_an_adapter_that_was_loaded_before_any_worker_came_can_be_used_in_lines(
    producer: Producer, tmp_path: Path
) -> None:
    producer("lora", "load", "sql", "/adapters/sql", "--no-wait")
    outcome = producer("submit", "--lora", "sql", prompts(tmp_path, '"x"'))
    assert outcome.exit_code == 0
    assert "No worker is alive" in outcome.stderr
    assert producer("status").exit_code == 0


def test_an_empty_list_says_how_to_load_an_adapter(producer: Producer) -> None:
    outcome = producer("lora", "list")
    assert outcome.exit_code == 0
    assert "knows no adapter: producer lora load NAME PATH" in outcome.stdout
    assert json.loads(producer("lora", "list", "--json").stdout) == {"adapters": []}


def listed_queue(queue: JobQueue) -> None:
    """Two workers that have served two adapters, of which one waits and one is unloading."""
    queue.announce(
        {
            "sql": AdapterRecord(source="/adapters/sql", revision="0123456789abcdef", pinned=True),
            "json": AdapterRecord(source="/adapters/json", revision="fedcba9876543210"),
        }
    )
    queue.unload_adapter("json", "drain")
    send(queue, 3)
    counts = {"sql": AdapterCounts(requests=4, output_tokens=50, loads=1, load_seconds=0.25)}
    w2_counts = {"sql": AdapterCounts(evictions=2, slot_loads=4, slot_evictions=3)}
    both = {"sql": "0123456789abcdef", "json": "fedcba9876543210"}
    beat(queue, id="w1", adapters=both, resident=["sql"], pinned=["sql"], adapter_counts=counts)
    beat(
        queue,
        id="w2",
        adapters={"sql": "0123456789abcdef"},
        in_memory=[],
        adapter_counts=w2_counts,
        adapter_errors={"json": "its rank is too large"},
    )
    claims = queue.claim("w1", ClaimRequest(1, 4, ()), lease_seconds=60, patience=60)
    assert len(claims.jobs) == 1


def test_the_list_tells_where_adapters_are_and_what_they_have_done(
    producer: Producer, queue: JobQueue
) -> None:
    listed_queue(queue)
    adapters = json.loads(producer("lora", "list", "--json").stdout)["adapters"]
    assert [adapter["name"] for adapter in adapters] == ["json", "sql"]
    assert adapters[1] == {
        "name": "sql",
        "source": "/adapters/sql",
        "revision": "0123456789abcdef",
        "previous_revision": None,
        "pinned": True,
        "unloading": None,
        "num_workers": 2,
        "num_loaded": 2,
        "num_in_memory": 1,
        "num_resident": 1,
        "num_pinned": 1,
        "errors": {},
        "waiting": 2,
        "requests": 4,
        "output_tokens": 50,
        "loads": 1,
        "evictions": 2,
        "slot_loads": 4,
        "slot_evictions": 3,
        "mean_load_seconds": 0.25,
        "fetch": None,
    }
    assert adapters[0]["errors"] == {"w2": "its rank is too large"}
    assert adapters[0]["mean_load_seconds"] is None


def test_the_list_is_a_table_for_a_person(producer: Producer, queue: JobQueue) -> None:
    listed_queue(queue)
    lines = producer("lora", "list").stdout.splitlines()
    head, json_row, sql_row, blank, counts_head, _, counts, *rest = lines
    assert head.split() == ["name", "source", "revision", "state", "waiting"]
    assert sql_row.split()[:3] == ["sql", "/adapters/sql", "01234567"]
    place = "loaded on 2 of 2 workers (1 in a slot, 1 on disk), pinned on 1 of 2 workers"
    assert place in sql_row
    assert "unloading (drain), loaded on 1 of 2 workers (in memory), failed on 1" in json_row
    assert blank == ""
    assert counts_head.split()[:4] == ["name", "requests", "tokens", "loads"]
    assert counts.split() == ["sql", "4", "50", "1", "0.250", "2", "4", "3"]
    assert "json on w2: its rank is too large" in rest
    assert "`producer lora unload NAME` forgets it" in rest[-1]


def test_at_100_columns_a_line_of_the_list_holds_all_that_an_adapter_has_done(
    producer: Producer, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.tables.UNBOUNDED_WIDTH", 100)
    listed_queue(queue)
    rows = producer("lora", "list").stdout.splitlines()
    assert all(len(row) <= 100 for row in rows)
    assert ["sql", "4", "50", "1", "0.250", "2", "4", "3"] in [row.split() for row in rows]
    assert any(row.split()[:3] == ["sql", "/adapters/sql", "01234567"] for row in rows)


def test_a_pipe_gets_every_path_and_name_whole(producer: Producer, queue: JobQueue) -> None:
    path, names = "/adapters" + "/folder" * 30, [f"adapter-{number}" for number in range(20)]
    queue.announce({name: AdapterRecord(source=path, revision="r") for name in names})
    beat(queue, id="w1", adapters=dict.fromkeys(names, "r"))
    rows = producer("lora", "list").stdout.splitlines()[1 : 1 + len(names)]
    assert all(f" {path} " in row for row in rows)
    assert ", ".join(sorted(names)) in producer("status").stdout


@pytest.mark.parametrize("record", ["", "{", "7", '"x"', '{"source": 7}', '{"unknown": 1}'])
def test_a_damaged_record_is_told_with_the_remedy_which_works(
    producer: Producer, queue: JobQueue, record: str
) -> None:
    queue.announce({"sql": AdapterRecord(source="/sql", revision="r")})
    queue.client.hset(queue.keys.adapters, "chat", record)
    for command in (("list",), ("pin", "sql")):
        outcome = producer("lora", *command)
        assert outcome.exit_code == 1
        assert "error: The record of adapter 'chat' is damaged: " in outcome.stderr
        assert ". `producer lora load chat PATH` writes it anew." in outcome.stderr
    assert producer("lora", "load", "chat", "/chat", "--no-wait").exit_code == 0
    assert desired(queue)["chat"] == AdapterRecord(source="/chat", version=2)
    assert producer("lora", "unload", "chat", "--no-wait").exit_code == 0


def test_a_long_error_has_the_whole_width(producer: Producer, queue: JobQueue) -> None:
    queue.announce({"sql": AdapterRecord(source="/adapters/sql", revision="r")})
    error = "a word " * 20 + "end."
    for worker in ("w1", "w2"):
        beat(queue, id=worker, adapter_errors={"sql": error})
    rows = producer("lora", "list").stdout.splitlines()
    assert f"sql on w1, w2: {error}" in rows


def test_an_adapter_that_no_worker_could_load_is_told_with_its_remedy(
    producer: Producer, queue: JobQueue, start_worker: StartWorker, tmp_path: Path
) -> None:
    start_worker(errors={"bad": "there is no folder /bad."})
    outcome = producer("lora", "load", "bad", "/bad")
    assert outcome.exit_code == 1
    remedy = "`producer lora unload bad --force` forgets it"
    assert remedy in outcome.stderr
    assert "Known adapters: bad (not loaded by any worker yet)." in (
        producer("lora", "pin", "worse").stderr
    )
    told = (
        producer("submit", "--lora", "bad", prompts(tmp_path, '"x"')).stderr,
        producer(
            "submit", "--lora", "bad", prompts(tmp_path, '"x"'), "--wait", "--timeout", "0"
        ).stderr,
        producer("status").stdout,
        producer("status", some_job(queue)).stderr,
    )
    for text in told:
        words = " ".join(text.split())
        assert (
            "No living worker can serve 'bad', so its jobs wait: there is no folder /bad" in words
        )
        assert remedy in words
    producer("lora", "unload", "bad", "--force")
    assert "knows no adapter" in producer("lora", "list").stdout


def test_a_replacement_that_fails_is_told_beside_what_is_served(
    producer: Producer, queue: JobQueue
) -> None:
    queue.announce({"sql": AdapterRecord(source="/sql", revision="0123456789abcdef")})
    error = {"sql": "there is no folder /gone."}
    served = {"sql": "0123456789abcdef"}
    beat(queue, adapters=served, adapter_errors=error, desired_version=2)
    outcome = producer("lora", "load", "sql", "/gone")
    assert outcome.exit_code == 1
    assert "revision 0123456789abcdef, is served as before" in outcome.stderr
    told = producer("lora", "list").stdout
    assert "01234567" in told
    assert "sql on idle: there is no folder /gone." in told


@pytest.mark.parametrize("number", [2, 3])
def test_reasons_that_differ_are_counted(queue: JobQueue, reader: QueueReader, number: int) -> None:
    for worker in range(number):
        beat(queue, id=f"w{worker}", adapter_errors={"sql": f"reason {min(worker, 1)}."})
    (sentence,) = unserved(["sql"], reader.workers())
    assert f"(1 of {number}) reason 0. ({number - 1} of {number}) reason 1." in sentence


def test_a_list_of_thousands_takes_as_many_round_trips_as_a_short_one(
    client: Client, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    send_packed = redis.connection.AbstractConnection.send_packed_command

    def count(self: object, command: object, check_health: bool = True) -> None:
        sent.append(command)
        send_packed(self, command, check_health)  # type: ignore[arg-type]

    def num_round_trips() -> int:
        sent.clear()
        client.adapters()
        return len(sent)

    monkeypatch.setattr(redis.connection.AbstractConnection, "send_packed_command", count)
    beat(queue, id="w0")
    queue.announce({"a": AdapterRecord(source="/", revision="r")})
    send(queue, 1, "a")
    client.adapters()  # The connection is made.
    few = num_round_trips()
    names = [f"adapter-{number}" for number in range(2000)]
    queue.announce({name: AdapterRecord(source="/", revision="r") for name in names})
    batch = [Job(id=name, lora=name, prompt="x") for name in names]
    queue.submit("many", "file", len(batch), 0, batch)
    for number in range(20):
        beat(queue, id=f"w{number}", adapters=dict.fromkeys(names, "r"))
    assert num_round_trips() == few <= 6
    assert sum(adapter.waiting for adapter in client.adapters()) == 2001


def test_a_program_loads_and_unloads_as_the_command_line_does(
    client: Client, start_worker: StartWorker
) -> None:
    start_worker()
    change = client.load_adapter("sql", Path("/adapters/sql"), pinned=True)
    (answer,) = client.answers(change)
    assert answer.success
    assert answer.loaded_adapters == {"sql": "rev-sql"}
    assert [(a.name, a.pinned, a.num_loaded) for a in client.adapters()] == [("sql", True, 1)]
    assert client.answers(client.unpin_adapter("sql"))[0].success
    assert client.answers(client.pin_adapter("sql"))[0].success
    assert client.answers(client.unload_adapter("sql", force=True))[0].success
    assert client.adapters() == []
    with pytest.raises(UnknownId):
        client.unload_adapter("sql")
