"""``producer lora load NAME OWNER/NAME``: what a person is told while an adapter is fetched."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.fetches import Fetches
from broker.job_queue import JobQueue
from producer.client import Client
from schemas.hub import FetchProgress
from tests.test_producer_cli import Producer

# Fixtures are found by their names.
from tests.test_producer_lora import StartWorker, desired
from tests.test_producer_lora import client as client
from tests.test_producer_lora import producer as producer
from tests.test_producer_lora import start_worker as start_worker

COMMIT = "0123456789" * 4


@pytest.fixture
def fetches(queue: JobQueue) -> Fetches:
    return Fetches(queue.client, queue.name)


class StandIn:
    """Says that a fetcher is alive, and does step by step what it is told."""

    def __init__(self, queue: JobQueue, fetches: Fetches) -> None:
        self._queue, self._fetches = queue, fetches
        self._rq_key = f"rq:workers:adapters:{queue.name}"
        self._threads: list[threading.Thread] = []

    def live(self) -> None:
        self._queue.client.sadd(self._rq_key, f"rq:worker:{self._queue.name}")
        self._queue.client.set(f"rq:worker:{self._queue.name}", "alive")

    def die(self) -> None:
        self._queue.client.delete(f"rq:worker:{self._queue.name}")

    def id(self, name: str = "sql") -> str:
        while not (record := self._fetches.record(name)):
            time.sleep(0.01)
        return record.id

    def note(self, status: str, **progress: object) -> None:
        meta = FetchProgress.model_validate(progress).model_dump_json()
        key = f"rq:job:{self.id()}"
        while not self._queue.client.exists(key):
            time.sleep(0.01)
        self._queue.client.hset(key, mapping={"status": status, "meta": meta})

    def publish(self) -> int | None:
        return self._queue.publish_fetch("sql", self.id(), f"hf:acme/sql@{COMMIT}", "rev-sql")

    def fail(self, reason: str) -> None:
        self._queue.fail_fetch("sql", self.id(), reason)

    def soon(self, *steps: Callable[[], object]) -> None:
        """Do the steps in a thread, long enough apart for a person's command to see each."""

        def work() -> None:
            for step in steps:
                self.id()
                time.sleep(0.4)
                step()

        thread = threading.Thread(target=work)
        thread.start()
        self._threads.append(thread)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


@pytest.fixture
def fetcher(queue: JobQueue, fetches: Fetches) -> Iterator[StandIn]:
    fetcher = StandIn(queue, fetches)
    fetcher.live()
    yield fetcher
    fetcher.join()


def test_a_repository_is_fetched_and_then_answered_by_every_worker(
    producer: Producer, queue: JobQueue, fetcher: StandIn, start_worker: StartWorker
) -> None:
    start_worker("w1")
    fetcher.soon(
        lambda: fetcher.note(
            "started", state="downloading", done_bytes=1_500_000, total_bytes=3_000_000
        ),
        lambda: fetcher.note("started", state="validating"),
        lambda: fetcher.note(
            "scheduled", state="retrying", attempt=2, retry_at=0, reason="the disk is full"
        ),
        fetcher.publish,
    )
    outcome = producer("lora", "load", "sql", "acme/sql@v1", "--pin")
    assert outcome.exit_code == 0
    assert "w1      yes" in outcome.stdout
    told = [line for line in outcome.stderr.splitlines() if line.startswith("hf:")]
    assert [line.removeprefix("hf:acme/sql@v1: ") for line in told[:3]] == [
        "queued",
        "downloading 1.5 of 3.0 MB",
        "validating",
    ]
    assert "try 2 of 5 at " in told[3]
    assert told[3].endswith(": the disk is full")
    assert desired(queue)["sql"].source == f"hf:acme/sql@{COMMIT}"
    assert desired(queue)["sql"].pinned


def test_the_answer_as_json_holds_the_version(
    producer: Producer, fetcher: StandIn, start_worker: StartWorker
) -> None:
    start_worker("w1")
    fetcher.soon(fetcher.publish)
    found = json.loads(producer("lora", "load", "sql", "acme/sql", "--json").stdout)
    assert found["version"] == 1
    assert [answer["success"] for answer in found["workers"]] == [True]


def test_a_fetch_that_was_given_up_ends_with_1_and_its_reason(
    producer: Producer, fetcher: StandIn, start_worker: StartWorker
) -> None:
    start_worker("w1")
    fetcher.soon(lambda: fetcher.fail("hf:acme/sql: the repository is gated."))
    outcome = producer("lora", "load", "sql", "acme/sql")
    assert outcome.exit_code == 1
    assert "'sql' was not loaded: hf:acme/sql: the repository is gated." in outcome.stderr


@pytest.mark.parametrize("other", ["a folder", "another repository", "unload"])
def test_a_fetch_that_was_called_off_ends_with_1(
    producer: Producer, queue: JobQueue, fetcher: StandIn, other: str
) -> None:
    fetcher.soon(
        {
            "a folder": lambda: queue.set_adapter("sql", "/sql", pinned=False),
            "another repository": lambda: queue.request_fetch(
                "sql", "other", "hf:acme/other", pinned=False
            ),
            "unload": lambda: queue.unload_adapter("sql", "drain"),
        }[other]
    )
    outcome = producer("lora", "load", "sql", "acme/sql")
    assert outcome.exit_code == 1
    assert "was loaded from elsewhere, or unloaded, while it was fetched" in outcome.stderr


def test_without_a_fetcher_it_ends_with_6_and_how_to_start_one(
    producer: Producer, fetches: Fetches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.hub._PATIENCE", 0.1)
    outcome = producer("lora", "load", "sql", "acme/sql")
    assert outcome.exit_code == 6
    assert "Nobody fetches from the hub for queue" in outcome.stderr
    assert "Start `fetcher --model-path DIR --hub-owners OWNER`" in outcome.stderr
    assert "The request for 'sql' is kept." in outcome.stderr
    assert fetches.records()["sql"].source == "hf:acme/sql"
    listed = producer("lora", "list")
    assert "queued" in listed.stdout
    assert "Nobody fetches from the hub" in listed.stderr


def test_when_the_last_fetcher_dies_nobody_waits_for_ever(
    producer: Producer, fetcher: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.hub._PATIENCE", 0.1)
    fetcher.soon(lambda: fetcher.note("started", state="downloading"), fetcher.die)
    assert producer("lora", "load", "sql", "acme/sql").exit_code == 6


def test_fetched_without_a_worker_it_ends_with_6(producer: Producer, fetcher: StandIn) -> None:
    fetcher.soon(fetcher.publish)
    outcome = producer("lora", "load", "sql", "acme/sql")
    assert outcome.exit_code == 6
    assert "No worker is alive" in outcome.stderr


def test_nobody_waits_who_does_not_want_to(
    producer: Producer, fetches: Fetches, fetcher: StandIn
) -> None:
    outcome = producer("lora", "load", "sql", "acme/sql", "--no-wait", "--json")
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout) == {"version": None, "workers": []}
    assert "`producer lora list` shows how far" in outcome.stderr
    assert "Nobody fetches" not in outcome.stderr
    fetcher.die()
    assert "Nobody fetches" in producer("lora", "load", "b", "acme/b", "--no-wait").stderr
    assert set(fetches.records()) == {"sql", "b"}


def test_two_producers_that_ask_for_the_same_both_get_it(
    producer: Producer,
    client: Client,
    fetches: Fetches,
    fetcher: StandIn,
    start_worker: StartWorker,
) -> None:
    start_worker("w1")
    change = client.load_adapter("sql", "acme/sql")
    fetcher.soon(fetcher.publish)
    assert producer("lora", "load", "sql", "acme/sql").exit_code == 0
    (answer,) = client.answers(change)
    assert answer.success
    assert fetches.rq_queue().count == 1


def test_the_list_tells_how_far_each_fetch_is(
    producer: Producer, queue: JobQueue, fetcher: StandIn
) -> None:
    queue.set_adapter("chat", "/chat", pinned=False)
    producer("lora", "load", "chat", "acme/chat", "--no-wait")
    producer("lora", "load", "sql", "acme/sql", "--no-wait")
    fetcher.note("started", state="downloading", done_bytes=1_000_000, total_bytes=4_000_000)
    listed = producer("lora", "list").stdout
    assert "from the hub: downloading 1.0 of 4.0 MB" in listed
    assert "loaded on 0 of 0 workers; from the hub: queued" in listed
    fetcher.fail("no such repository")
    assert "from the hub: failed: no such repository" in producer("lora", "list").stdout
    found = json.loads(producer("lora", "list", "--json").stdout)["adapters"]
    chat, sql = found
    assert (chat["name"], chat["source"], chat["fetch"]["state"]) == ("chat", "/chat", "queued")
    assert (sql["name"], sql["source"], sql["fetch"]["state"]) == ("sql", "hf:acme/sql", "failed")
    assert sql["fetch"]["reason"] == "no such repository"
    producer("lora", "unload", "sql")
    assert "sql" not in producer("lora", "list").stdout


@pytest.mark.parametrize("flags", [(), ("--no-wait",), ("--force",)])
@pytest.mark.parametrize("ended", [False, True])
def test_a_request_that_nothing_came_of_yet_is_withdrawn_without_a_worker(
    producer: Producer,
    fetches: Fetches,
    fetcher: StandIn,
    queue: JobQueue,
    flags: tuple[str, ...],
    ended: bool,
) -> None:
    producer("lora", "load", "sql", "acme/sql", "--no-wait")
    if ended:
        fetcher.fail("no such repository")
    outcome = producer("lora", "unload", "sql", *flags)
    assert outcome.exit_code == 0
    assert "The request to fetch 'sql' from the hub is withdrawn." in outcome.stderr
    assert "No worker is alive" not in outcome.stderr
    assert (desired(queue), fetches.records()) == ({}, {})
    assert producer("lora", "unload", "sql").exit_code == 3


def test_a_request_to_fetch_what_is_loaded_is_withdrawn_with_it(
    producer: Producer, fetches: Fetches, queue: JobQueue
) -> None:
    queue.set_adapter("sql", "/sql", pinned=False)
    producer("lora", "load", "sql", "acme/sql", "--no-wait")
    outcome = producer("lora", "unload", "sql")
    assert outcome.exit_code == 0
    assert "does not know 'sql' any more" in outcome.stderr
    assert "withdrawn" not in outcome.stderr
    assert (desired(queue), fetches.records()) == ({}, {})


# --- A folder or a repository -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "folder", "repository"),
    [
        ("acme/sql", None, "hf:acme/sql"),
        ("hf:acme/sql", None, "hf:acme/sql"),
        ("./acme/sql", "{cwd}/acme/sql", None),
        ("/acme/sql", "/acme/sql", None),
        ("acme/sql/v1", "{cwd}/acme/sql/v1", None),
        ("here/sql", "{cwd}/here/sql", None),
        ("hf:here/sql", None, "hf:here/sql"),
    ],
)
def test_a_folder_that_exists_wins_over_a_repository(
    producer: Producer,
    queue: JobQueue,
    fetches: Fetches,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
    folder: str | None,
    repository: str | None,
) -> None:
    (tmp_path / "here" / "sql").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    outcome = producer("lora", "load", "x", typed, "--no-wait")
    assert outcome.exit_code == 0
    sentence = f"There is no folder {typed} here, so it is fetched from the hub."
    assert (sentence in outcome.stderr) == (folder is None and not typed.startswith("hf:"))
    sources = {name: record.source for name, record in desired(queue).items()}
    assert sources == ({"x": folder.format(cwd=tmp_path.resolve())} if folder else {})
    requests = {name: record.source for name, record in fetches.records().items()}
    assert requests == ({"x": repository} if repository else {})


@pytest.mark.parametrize("typed", ["hf:", "hf:sql", "hf:../../etc", "hf:a/b@../c", "hf:/etc"])
def test_what_is_no_repository_is_refused_before_anything_is_sent(
    producer: Producer, queue: JobQueue, fetches: Fetches, typed: str
) -> None:
    outcome = producer("lora", "load", "x", typed, "--no-wait")
    assert outcome.exit_code == 2
    assert "names no repository of the hub: write hf:OWNER/NAME[@REVISION]" in outcome.stderr
    assert (desired(queue), fetches.records()) == ({}, {})


def test_a_name_that_no_adapter_can_have_is_refused(producer: Producer, fetches: Fetches) -> None:
    assert producer("lora", "load", "@base", "acme/sql", "--no-wait").exit_code == 2
    assert fetches.records() == {}
