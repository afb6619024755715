"""A fetcher on a real server, with a hub on this machine: what it runs, and what it refuses."""

from __future__ import annotations

import json
import pickle
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Job
from rq.serializers import DefaultSerializer, JSONSerializer
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

import broker.fetches
import worker.hub.fetch_job
import worker.hub.fetch_queue
import worker.hub.fetcher
from benchmarks.waiting import PATIENCE
from broker.connection import undecoded
from broker.fetches import Fetches, FetchStatus
from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from producer import hub as producer_hub
from schemas.adapter import AdapterRecord
from schemas.hub import FETCH_BACKOFF, FETCH_FUNCTION, FETCH_TIMEOUT, FetchProgress, HubSource
from tests.fake_hub import FakeHub
from tests.tiny_models import make_adapter, make_llama
from worker.adapters.loader import AdapterChecker
from worker.adapters.peft_format import revision_of
from worker.hub.fetch_job import FetchJob
from worker.hub.fetcher import Fetcher
from worker.model.config import ModelConfig


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(model_folder, root / name, rank=rank, seed=rank)
        for name, rank in (("sql", 4), ("chat", 3), ("wide", 16))
    }


@pytest.fixture
def fetches(queue: JobQueue) -> Fetches:
    return Fetches(queue.client, queue.name)


class Fetching:
    """A fetcher, and a producer that asks for adapters."""

    def __init__(self, queue: JobQueue, fetches: Fetches, make: Callable[[], Fetcher]) -> None:
        self.queue, self.fetches, self.make = queue, fetches, make
        self.reader = QueueReader(queue.client, queue.name)
        self.fetcher = make()

    def ask(self, name: str, source: str, *, pinned: bool = False) -> str:
        """Request a fetch as a producer does; returns its id."""
        repository = HubSource.parse(source)
        assert repository
        change = producer_hub.request(
            self.queue, self.reader, self.fetches, name, repository, pinned=pinned
        )
        assert change.fetch
        return change.fetch

    def status(self, name: str) -> FetchStatus:
        status = self.fetches.status(name)
        assert status
        return status

    def until(self, name: str, *states: str) -> FetchStatus:
        """Let the fetcher work until the request is in one of the states."""
        deadline = time.monotonic() + PATIENCE
        while (status := self.status(name)).state not in states:
            assert time.monotonic() < deadline, f"it stays {status}"
            self.fetcher._jobs.turn()
        return status

    def work_off(self) -> None:
        """Let the fetcher take all that is on the rq queue."""
        while self.rq.count:
            self.fetcher._jobs.turn()

    @property
    def rq(self) -> Queue:
        return self.fetches.rq_queue()

    def desired(self) -> dict[str, AdapterRecord]:
        return self.queue.desired_state()[1]


@pytest.fixture
def fetching(
    queue: JobQueue,
    fetches: Fetches,
    redis_url: str,
    hub: FakeHub,
    model_folder: Path,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Fetching:
    """Serves adapters of ``acme`` up to rank 8, without long pauses; two repositories exist."""
    monkeypatch.setattr(worker.hub.fetcher, "SECONDS_BETWEEN_FETCHES", 0.01)
    monkeypatch.setattr(worker.hub.fetch_queue, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(worker.hub.fetcher, "_NOTE_SECONDS", 0.0)
    for module in (broker.fetches, worker.hub.fetch_job):
        monkeypatch.setattr(module, "FETCH_BACKOFF", (1, 1))
    model = ModelConfig.from_folder(model_folder)
    checker = AdapterChecker(model, 8, None)
    hub.push("acme/sql", adapters["sql"], "v1")
    hub.push("acme/chat", adapters["chat"])
    return Fetching(
        queue, fetches, lambda: Fetcher(redis_url, queue.name, ["acme", "evil-not"], checker)
    )


def commit(hub: FakeHub, repo: str) -> str:
    return hub.repositories[repo].refs["main"]


# --- Success ------------------------------------------------------------------------------------


def test_an_adapter_is_fetched_validated_hashed_and_desired(
    fetching: Fetching, hub: FakeHub, adapters: dict[str, Path]
) -> None:
    fetching.ask("sql", "acme/sql@v1", pinned=True)
    assert fetching.status("sql").state == "queued"
    assert fetching.desired() == {}
    loaded = fetching.until("sql", "loaded")
    assert fetching.desired() == {
        "sql": AdapterRecord(
            source=f"hf:acme/sql@{commit(hub, 'acme/sql')}",
            revision=revision_of(adapters["sql"]),
            pinned=True,
            version=loaded.version or 0,
        )
    }


def test_its_rq_job_is_json_with_an_id_of_its_own_and_retries(fetching: Fetching) -> None:
    id_ = fetching.ask("sql", "acme/sql")
    (job,) = fetching.rq.jobs
    assert job.id == id_
    record = fetching.rq.connection.hgetall(f"rq:job:{id_}")
    assert json.loads(zlib.decompress(record[b"data"])) == [FETCH_FUNCTION, None, ["sql", id_], {}]
    assert (job.retries_left, job.retry_intervals) == (2, [1, 1])
    fetching.until("sql", "loaded")
    assert Job.fetch(id_, fetching.rq.connection, JSONSerializer).get_status() == "finished"


def test_the_same_asked_twice_is_one_job(fetching: Fetching, hub: FakeHub) -> None:
    first, second = fetching.ask("sql", "acme/sql"), fetching.ask("sql", "hf:acme/sql")
    assert first == second
    assert fetching.rq.job_ids == [first]
    version = fetching.until("sql", "loaded").version
    fetching.work_off()
    assert hub.downloads().count("adapter_model.safetensors") == 1
    assert fetching.queue.desired_state()[0] == version


def test_asked_again_after_it_was_loaded_it_is_looked_up_again(
    fetching: Fetching, hub: FakeHub, adapters: dict[str, Path]
) -> None:
    first = fetching.ask("sql", "acme/sql")
    fetching.until("sql", "loaded")
    hub.push("acme/sql", adapters["chat"])
    assert fetching.ask("sql", "acme/sql") != first
    fetching.until("sql", "loaded")
    assert fetching.desired()["sql"].source == f"hf:acme/sql@{commit(hub, 'acme/sql')}"
    assert fetching.desired()["sql"].revision == revision_of(adapters["chat"])


def test_fetches_of_a_queue_keep_apart(
    fetching: Fetching, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert queue.begin_fetch(seconds_apart=60)
    assert not queue.begin_fetch(seconds_apart=60)
    ttl = queue.client.pttl(queue.keys.fetch_turn)
    assert 0 < ttl <= 60_000  # type: ignore[operator]


def test_the_hub_is_not_asked_before_it_is_the_turn_of_a_fetch(
    fetching: Fetching, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_before: list[int] = []

    def begin(self: JobQueue, *, seconds_apart: float) -> bool:
        assert seconds_apart == worker.hub.fetcher.SECONDS_BETWEEN_FETCHES
        asked_before.append(len(hub.requests))
        return len(asked_before) == 3

    monkeypatch.setattr(JobQueue, "begin_fetch", begin)
    fetching.ask("sql", "acme/sql")
    fetching.until("sql", "loaded")
    assert asked_before == [0, 0, 0]


def test_a_fetcher_stays_known_though_redis_loses_all(fetching: Fetching, fetches: Fetches) -> None:
    assert not fetches.has_fetcher()
    fetching.fetcher._jobs.place.beat()
    assert fetches.has_fetcher()
    fetching.rq.connection.delete(f"rq:workers:{fetching.rq.name}")
    assert not fetches.has_fetcher()
    fetching.fetcher._jobs.place.beat()
    assert fetches.has_fetcher()


def test_a_download_tells_how_far_it_is(
    fetching: Fetching, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    note = FetchJob.note

    def noting(self: FetchJob, progress: FetchProgress) -> None:
        note(self, progress)
        seen.append(fetching.status("sql"))

    monkeypatch.setattr(FetchJob, "note", noting)
    fetching.ask("sql", "acme/sql")
    fetching.until("sql", "loaded")
    states = [status.state for status in seen]
    assert list(dict.fromkeys(states)) == ["queued", "downloading", "validating"]
    ends = [status for status in seen if status.state == "downloading"][-1]
    assert ends.done_bytes == ends.total_bytes > 1000


# --- Failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("evil/sql", "evil is not among the owners that the fetcher's --hub-owners names (acme,"),
        ("acme/nothing", "has no such repository, or it is private"),
        ("acme/sql@v9", "has no revision 'v9'"),
        ("acme/wide", "its rank 16 is above --max-lora-rank 8"),
    ],
)
def test_what_will_not_change_is_given_up_at_once_with_the_reason(
    fetching: Fetching, hub: FakeHub, adapters: dict[str, Path], source: str, reason: str
) -> None:
    hub.push("acme/wide", adapters["wide"])
    hub.push("evil/sql", adapters["sql"])
    id_ = fetching.ask("sql", source)
    failed = fetching.until("sql", "failed", "retrying")
    assert failed.state == "failed"
    assert reason in (failed.reason or "")
    assert Job.fetch(id_, fetching.rq.connection, JSONSerializer).get_status() == "failed"
    assert fetching.desired() == {}
    assert not any("evil" in line for line in hub.requests)
    # Asked again, it is tried again.
    assert fetching.ask("sql", source) != id_


def test_weights_that_are_not_finite_are_found_by_the_fetcher(
    fetching: Fetching, hub: FakeHub, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(adapters["sql"], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    key = sorted(tensors)[0]
    tensors[key][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    hub.push("acme/broken", folder)
    fetching.ask("sql", "acme/broken")
    failed = fetching.until("sql", "failed", "retrying")
    assert failed.state == "failed"
    assert f"{key} holds NaN or infinite values" in (failed.reason or "")
    assert fetching.desired() == {}


def test_a_config_that_no_reason_could_tell_of_is_given_up_at_once(
    fetching: Fetching, hub: FakeHub, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["sql"], tmp_path / "odd"))
    (folder / "adapter_config.json").write_text('{"peft_type": "\\ud800"}')
    hub.push("acme/odd", folder)
    fetching.ask("sql", "acme/odd")
    failed = fetching.until("sql", "failed", "retrying")
    assert failed.state == "failed"
    assert (failed.reason or "").endswith("holds '\\ud800', half of a character, in a text.")


def test_whatever_is_wrong_the_reason_is_kept_and_the_fetcher_goes_on(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: AdapterChecker, folder: Path) -> str:
        raise RuntimeError("\ud800" + "x" * 3_000_000)

    with monkeypatch.context() as patched, capture_logs():
        patched.setattr(AdapterChecker, "revision", fail)
        fetching.ask("sql", "acme/sql")
        told = fetching.until("sql", "retrying")
        assert (told.reason or "").startswith("\\ud800xxx")
        failed = fetching.until("sql", "failed")
    assert len(failed.reason or "") < 600
    fetching.ask("chat", "acme/chat")
    fetching.until("chat", "loaded")


def test_what_may_pass_is_tried_again_and_then_succeeds(fetching: Fetching, hub: FakeHub) -> None:
    hub.failures = [503]
    hub.corrupt_downloads = 1
    begun = time.time()
    fetching.ask("sql", "acme/sql")
    first = fetching.until("sql", "retrying", "failed")
    assert (first.state, first.attempt) == ("retrying", 2)
    assert "503" in (first.reason or "")
    assert begun < (first.retry_at or 0) < time.time() + 2
    while fetching.status("sql").attempt == 2:
        fetching.fetcher._jobs.turn()
    second = fetching.status("sql")
    assert (second.state, second.attempt) == ("retrying", 3)
    assert "is not what the hub announced" in (second.reason or "")
    fetching.until("sql", "loaded")


def test_after_the_last_try_it_has_failed(fetching: Fetching, hub: FakeHub) -> None:
    hub.failures = [500] * 3
    fetching.ask("sql", "acme/sql")
    failed = fetching.until("sql", "failed")
    assert (failed.reason or "").endswith("given up after 3 tries.")
    assert hub.failures == []


def test_the_pauses_between_tries_grow() -> None:
    assert list(FETCH_BACKOFF) == sorted(FETCH_BACKOFF)
    assert FETCH_BACKOFF[-1] > 10 * FETCH_BACKOFF[0]


def test_offline_the_cache_is_enough_and_an_empty_one_is_told(
    fetching: Fetching, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching.ask("sql", "acme/sql")
    fetching.until("sql", "loaded")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    fetching.ask("again", "acme/sql")
    fetching.ask("chat", "acme/chat")
    fetching.until("again", "loaded")
    failed = fetching.until("chat", "failed")
    assert "is not in the hub cache" in (failed.reason or "")
    assert hub.requests == []
    assert fetching.desired()["again"].revision == fetching.desired()["sql"].revision


# --- Somebody asks for something else meanwhile -------------------------------------------------


def during_the_download(fetching: Fetching, monkeypatch: pytest.MonkeyPatch, do: Any) -> None:
    """Do something once, when the first bytes of a download have come."""
    note, todo = FetchJob.note, [do]

    def noting(self: FetchJob, progress: FetchProgress) -> None:
        note(self, progress)
        if progress.state == "downloading" and progress.done_bytes and todo:
            todo.pop()()

    monkeypatch.setattr(FetchJob, "note", noting)


def test_the_later_request_for_a_name_wins(
    fetching: Fetching, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    during_the_download(fetching, monkeypatch, lambda: fetching.ask("x", "acme/chat"))
    first = fetching.ask("x", "acme/sql")
    fetching.until("x", "loaded")
    fetching.work_off()
    assert fetching.desired()["x"].source == f"hf:acme/chat@{commit(hub, 'acme/chat')}"
    assert fetching.status("x").id != first
    assert fetching.queue.publish_fetch("x", first, "hf:late", "r") is None


def test_a_folder_loaded_meanwhile_wins(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = fetching.queue
    during_the_download(fetching, monkeypatch, lambda: queue.set_adapter("x", "/x", pinned=False))
    fetching.ask("x", "acme/sql")
    fetching.work_off()
    assert fetching.desired()["x"].source == "/x"
    assert fetching.fetches.status("x") is None


def test_unloaded_meanwhile_it_does_not_come(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = fetching.queue
    versions: list[int | None] = []
    during_the_download(
        fetching, monkeypatch, lambda: versions.append(queue.unload_adapter("x", "drain"))
    )
    fetching.ask("x", "acme/sql")
    fetching.work_off()
    assert versions == [1]
    assert (fetching.desired(), fetching.fetches.records()) == ({}, {})
    assert queue.unload_adapter("x", "drain") is None


def test_a_failed_request_is_taken_off_by_unloading(fetching: Fetching) -> None:
    fetching.ask("x", "evil/sql")
    fetching.until("x", "failed")
    assert fetching.queue.unload_adapter("x", "force") is not None
    assert fetching.fetches.records() == {}


def test_an_adapter_of_that_name_serves_until_the_new_one_has_come(
    fetching: Fetching, hub: FakeHub
) -> None:
    fetching.queue.set_adapter("x", "/x", pinned=False)
    fetching.ask("x", "acme/nothing")
    fetching.until("x", "failed")
    assert fetching.desired()["x"].source == "/x"


# --- What is lost is found again ----------------------------------------------------------------


def test_a_request_whose_producer_died_before_it_made_the_rq_job_is_fetched(
    fetching: Fetching,
) -> None:
    fetching.queue.request_fetch("sql", hostile_id(fetching), "hf:acme/sql", pinned=False)
    fetching.until("sql", "loaded")


def test_a_job_written_by_plain_commands_is_run_and_tried_again(
    fetching: Fetching, hub: FakeHub
) -> None:
    """As docs/wire-contract.md tells other languages."""
    hub.failures = [503]
    id_ = push(fetching, data=json_job(FETCH_FUNCTION, None, ["sql", hostile_id(fetching)], {}))
    assert fetching.queue.request_fetch("sql", id_, "hf:acme/sql", pinned=False) == id_
    fetching.work_off()
    assert fetching.status("sql").state == "retrying"
    fetching.until("sql", "loaded")


@pytest.mark.parametrize("field", ["retries_left", "timeout"])
def test_a_record_does_not_say_how_often_or_long_a_fetch_is_tried(
    fetching: Fetching, hub: FakeHub, field: str
) -> None:
    hub.failures = [503] * 3
    id_ = fetching.ask("sql", "acme/sql")
    endless = {"retries_left": 10**9, "retry_intervals": "[0]", "timeout": -1}
    fetching.rq.connection.hset(f"rq:job:{id_}", field, endless[field])
    fetching.until("sql", "failed")
    assert hub.failures == []
    assert Job.fetch(id_, fetching.rq.connection, JSONSerializer).timeout == FETCH_TIMEOUT


def test_a_try_that_was_taken_off_the_schedule_and_not_put_back_is_made(
    fetching: Fetching, hub: FakeHub
) -> None:
    hub.failures = [503]
    fetching.ask("sql", "acme/sql")
    fetching.until("sql", "retrying")
    fetching.rq.connection.delete(fetching.rq.scheduled_job_registry.key)
    fetching.until("sql", "loaded")


def test_a_job_that_a_fetcher_took_off_and_never_began_is_run(fetching: Fetching) -> None:
    fetching.ask("sql", "acme/sql")
    assert fetching.rq.pop_job_id()
    fetching.until("sql", "loaded")


def test_a_job_of_a_fetcher_that_died_is_tried_again_and_that_counts(
    fetching: Fetching,
) -> None:
    id_ = fetching.ask("sql", "acme/sql")
    connection = fetching.rq.connection
    fetching.rq.pop_job_id()
    connection.hset(f"rq:job:{id_}", mapping={"status": "started", "worker_name": "dead"})
    connection.set("rq:worker:alive", 1)
    connection.hset(f"rq:job:{id_}", "worker_name", "alive")
    fetching.fetcher._jobs.turn()
    assert Job.fetch(id_, connection, JSONSerializer).get_status() == "started"
    connection.hset(f"rq:job:{id_}", "worker_name", "dead")
    connection.delete("rq:worker:alive")
    found_dead = time.time()
    fetching.fetcher._jobs.turn()
    assert Job.fetch(id_, connection, JSONSerializer).retries_left == 1
    status = fetching.status("sql")
    assert (status.state, status.attempt, status.reason) == ("retrying", 2, "its fetcher died")
    assert found_dead < (status.retry_at or 0) < time.time() + 2
    fetching.until("sql", "loaded")


def test_a_fetch_that_kills_its_fetcher_every_time_is_given_up(fetching: Fetching) -> None:
    id_ = fetching.ask("sql", "acme/sql")
    fetching.rq.pop_job_id()
    connection = fetching.rq.connection
    died = {"status": "started", "worker_name": "dead", "retries_left": 0}
    connection.hset(f"rq:job:{id_}", mapping=died)
    assert "died at every try" in (fetching.until("sql", "failed").reason or "")


def test_redis_is_away_for_a_moment_when_the_adapter_is_to_be_loaded(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, refusals = JobQueue.publish_fetch, [redis.ConnectionError("away")]

    def publish_later(self: JobQueue, *args: str) -> int | None:
        if refusals:
            raise refusals.pop()
        return publish(self, *args)

    monkeypatch.setattr(JobQueue, "publish_fetch", publish_later)
    monkeypatch.setattr(worker.hub.fetcher, "_PAUSE", 0.01)
    fetching.ask("sql", "acme/sql")
    assert fetching.until("sql", "loaded", "retrying").state == "loaded"


# --- What no producer of Lorry sends ------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A file that no hostile job may make."""
    mark = tmp_path / "mark"
    yield mark
    assert not mark.exists()


def refused(fetching: Fetching) -> list[str]:
    """What the fetcher says while it works off the queue, and then fetches as before."""
    with capture_logs() as logs:
        fetching.work_off()
    fetching.ask("good", "acme/sql")
    fetching.until("good", "loaded")
    return [line["reason"] for line in logs if line["event"] == "rq_job_refused"]


def json_job(*data: object) -> bytes:
    return json.dumps(data).encode()


def hostile_id(fetching: Fetching) -> str:
    """rq's ids are those of the whole server."""
    return f"hostile-{fetching.queue.name}"


def push(fetching: Fetching, **fields: object) -> str:
    """Put a job on the rq queue as any program could; it is a good one but for the fields."""
    id_ = hostile_id(fetching)
    record = {
        "data": json_job(FETCH_FUNCTION, None, ["x", id_], {}),
        "origin": fetching.rq.name,
        "status": "queued",
        "created_at": "2026-01-01T00:00:00.000000Z",
        **fields,
    }
    connection = undecoded(fetching.queue.client)
    connection.hset(f"rq:job:{id_}", mapping=record)  # type: ignore[arg-type]
    connection.rpush(fetching.rq.key, id_)
    return id_


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (json_job("os.system", None, ["touch /tmp/x"], {}), "it asks for 'os.system'"),
        (json_job("worker.hub.cli.main", None, [], {}), "it asks for 'worker.hub.cli.main'"),
        (json_job(FETCH_FUNCTION, "text", ["x", "y"], {}), f"it asks for '{FETCH_FUNCTION}'"),
        (json_job(None, None, [], {}), "it asks for None"),
        (json_job(FETCH_FUNCTION, None, ["x"], {}), "its arguments are not"),
        (json_job(FETCH_FUNCTION, None, ["x", 7], {}), "its arguments are not"),
        (json_job(FETCH_FUNCTION, None, {"x": 1}, {}), "its arguments are not"),
        (json_job(FETCH_FUNCTION, None, ["x", "y"], {"z": 1}), "its arguments are not"),
        (json_job(FETCH_FUNCTION, None, ["x", "another"], {}), "is for 'another'"),
        (json_job(1, 2, 3), "is not JSON of four parts"),
        (b"\xff\x00 no JSON", "is not JSON of four parts"),
        (b"", "is not JSON of four parts"),
    ],
)
def test_a_job_that_asks_for_anything_else_is_refused_and_reported(
    fetching: Fetching, data: bytes, reason: str
) -> None:
    push(fetching, data=data)
    (told,) = refused(fetching)
    assert reason in told


@pytest.mark.parametrize("field", ["data", "meta", "result"])
def test_nothing_unpickles_what_a_job_holds(fetching: Fetching, mark: Path, field: str) -> None:
    push(fetching, **{field: zlib.compress(pickle.dumps(Bomb(mark)))})
    assert len(refused(fetching)) == (field == "data")


def test_a_job_that_rq_itself_would_unpickle_is_refused(fetching: Fetching, mark: Path) -> None:
    """rq's default: a pickled call of any function."""
    pickling = Queue(
        fetching.rq.name, connection=fetching.rq.connection, serializer=DefaultSerializer
    )
    pickling.enqueue(Path.touch, mark)
    (told,) = refused(fetching)
    assert "is not JSON of four parts" in told


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"success_callback_name": "os.getcwd"}, "it names a callback"),
        ({"failure_callback_name": "os.getcwd"}, "it names a callback"),
        ({"stopped_callback_name": "os.getcwd"}, "it names a callback"),
        (
            {"webhooks": '[{"url": "http://127.0.0.1:9", "job_status": "failed"}]'},
            "it names a web address to call",
        ),
        ({"dependency_ids": '["other"]'}, "it names other jobs to wait for"),
        ({"repeats_left": 3}, "it names repetitions"),
        ({"group_id": "g"}, "it names a group"),
        ({"rate_limit_key": "k"}, "it names a rate limit"),
        ({"origin": "elsewhere"}, "it says that it is of queue 'elsewhere'"),
        ({"status": "nonsense"}, "its record is damaged"),
        ({"timeout": "soon"}, "its record is damaged"),
        ({"created_at": "yesterday"}, "its record is damaged"),
    ],
)
def test_a_job_that_names_more_than_a_request_is_refused_and_reported(
    fetching: Fetching, fields: dict[str, object], reason: str
) -> None:
    push(fetching, **fields)
    (told,) = refused(fetching)
    assert reason in told


def test_a_request_whose_rq_job_was_tampered_with_fails(fetching: Fetching) -> None:
    id_ = fetching.ask("x", "acme/sql")
    fetching.rq.connection.hset(f"rq:job:{id_}", "failure_callback_name", "os.getcwd")
    failed = fetching.until("x", "failed")
    assert failed.reason == "its rq job is not one that a fetcher runs."


def test_a_good_job_for_a_request_that_nobody_made_does_nothing(
    fetching: Fetching, hub: FakeHub
) -> None:
    push(fetching)
    fetching.work_off()
    assert hub.requests == []
    assert fetching.desired() == {}


@pytest.mark.parametrize("id_", [b"\xff\xfe", b"a:b", b"", b"x" * 1000, b"gone"])
def test_an_id_that_names_no_job_is_passed_over(fetching: Fetching, id_: bytes) -> None:
    fetching.rq.connection.rpush(fetching.rq.key, id_)
    refused(fetching)


def test_keys_of_another_type_do_not_stop_the_others(fetching: Fetching) -> None:
    connection = fetching.rq.connection
    connection.set("rq:job:text", "text")
    connection.rpush(fetching.rq.key, "text")
    connection.hset(fetching.queue.keys.fetches, "bad", "no JSON")
    assert len(refused(fetching)) == 1


@pytest.mark.parametrize(
    "source", ["/etc", "../../etc", "hf:../x", "hf:acme/sql@../../x", "file:///etc/passwd"]
)
def test_a_request_for_what_is_no_repository_fails(fetching: Fetching, source: str) -> None:
    """Written by a program that does not check it."""
    fetching.queue.request_fetch("x", hostile_id(fetching), source, pinned=False)
    assert "names no repository" in (fetching.until("x", "failed").reason or "")


def test_a_request_under_what_is_no_name_fails(fetching: Fetching) -> None:
    fetching.queue.request_fetch("@base", hostile_id(fetching), "hf:a/b", pinned=False)
    assert "cannot name an adapter" in (fetching.until("@base", "failed").reason or "")


@pytest.mark.parametrize("id_", ["", "a:b", "a b", "../x", "x" * 200])
def test_an_id_that_rq_cannot_have_is_refused_where_it_is_asked_for(
    fetching: Fetching, id_: str
) -> None:
    """And where somebody has written it past the script, it stops nothing."""
    with pytest.raises(redis.ResponseError, match="an id is up to 128 letters"):
        fetching.queue.request_fetch("x", id_, "hf:acme/sql", pinned=False)
    record = json.dumps({"id": id_, "source": "hf:acme/sql"})
    fetching.queue.client.hset(fetching.queue.keys.fetches, "x", record)
    fetching.ask("good", "acme/sql")
    fetching.until("good", "loaded")
