"""Jobs whose adapter has to be read first: nobody waits for them, and they meet every end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest

from benchmarks.waiting import wait_until
from broker.claims import Claim, ClaimRequest, Lease
from broker.job_queue import JobQueue
from producer.client import Client
from schemas.errors import JobError
from schemas.job import Job
from tests.tiny_models import make_adapter, make_llama
from worker.adapters.loader import AdapterLoader
from worker.adapters.peft_format import Adapter
from worker.adapters.readers import READERS
from worker.adapters.registry import KnownAdapter
from worker.aside import Aside, NotBegun
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.lora_path import LoraPath
from worker.worker import Worker

#: With room for two of them in memory, the first was evicted when the worker is ready.
ADAPTERS = ("evicted", "kept", "kept too")

#: Sets what happens while an adapter is read.
WhileRead = Callable[[Callable[[], object]], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_llama(folder / "model")
    for seed, name in enumerate(ADAPTERS):
        make_adapter(folder / "model", folder / name, rank=4, seed=seed)
    return folder


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


@pytest.fixture
def make_worker(folder: Path, redis_url: str, queue_name: str) -> Callable[..., Worker]:
    def make(**settings: object) -> Worker:
        config = WorkerConfig(
            model_path=folder / "model",
            lora_paths=tuple(
                LoraPath(lora_name=name.replace(" ", "-"), lora_path=str(folder / name))
                for name in ADAPTERS
            ),
            device="cpu",
            max_total_tokens=4096,
            max_loras_per_batch=2,
            max_loaded_loras=2,
            queue=queue_name,
            **{"burst": True, **settings},  # type: ignore[arg-type]
        )
        return Worker(config, Engine(config), redis_url)

    return make


@pytest.fixture
def worker(make_worker: Callable[..., Worker]) -> Worker:
    return make_worker()


@pytest.fixture
def while_read(monkeypatch: pytest.MonkeyPatch) -> WhileRead:
    """Sets what is done whenever an adapter is read from now on, before that."""

    def set_up(action: Callable[[], object]) -> None:
        load = AdapterLoader.load

        def act_and_load(loader: AdapterLoader, name: str, folder: Path) -> Adapter:
            action()
            return load(loader, name, folder)

        monkeypatch.setattr(AdapterLoader, "load", act_and_load)

    return set_up


def job(id_: str, lora: str | None = None) -> dict[str, object]:
    return {"id": id_, "lora": lora, "prompt_token_ids": [1, 2, 3], "max_tokens": 4}


def statuses(client: Client, *ids: str) -> list[str]:
    return [next(client.results(id_)).status for id_ in ids]


def attempts(queue: JobQueue, *ids: str) -> list[str | None]:
    return [queue.client.hget(queue.keys.job(id_), "attempts") for id_ in ids]


def test_jobs_of_other_adapters_and_of_none_are_answered_while_one_is_read(
    client: Client, worker: Worker, while_read: WhileRead
) -> None:
    submission = client.submit(
        [job("first", "evicted"), job("base"), job("resident", "kept"), job("second", "evicted")]
    )

    def are_done() -> bool:
        return client.status(submission).counts["done"] == 2

    while_read(lambda: wait_until(are_done, "they wait for the adapter"))
    assert worker.run() == 0
    ended = [result.id for result in client.follow(submission)]
    assert set(ended[:2]) == {"base", "resident"}
    assert statuses(client, "first", "second") == ["done", "done"]
    assert worker._engine.adapters.counts["evicted"].loads == 2  # At first, and after its eviction.


def test_jobs_of_one_adapter_begin_in_the_order_of_their_lines_though_it_is_read(
    client: Client, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, order = Engine.add, list[str]()

    def add_and_note(engine: Engine, sequence: object) -> None:
        order.append(sequence.job.id)  # type: ignore[attr-defined]
        add(engine, sequence)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "add", add_and_note)
    ids = [f"job-{number}" for number in range(80)]
    client.submit([job(id_, "evicted") for id_ in ids])
    assert worker.run() == 0
    assert order == ids


def test_more_jobs_than_may_run_wait_for_an_adapter_and_others_still_find_room(
    client: Client, make_worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(max_running_requests=4)
    client.submit([job(f"evicted-{number}", "evicted") for number in range(40)])
    load, held = AdapterLoader.load, list[int]()

    def submit_others_and_wait(loader: AdapterLoader, name: str, folder: Path) -> Adapter:
        others = client.submit([job(f"base-{number}") for number in range(20)])
        wait_until(lambda: client.status(others).is_complete, "there is no room")
        held.append(len(worker._leases))
        return load(loader, name, folder)

    monkeypatch.setattr(AdapterLoader, "load", submit_others_and_wait)
    assert worker.run() == 0
    assert held == [8], "no more of an adapter that is read are claimed than may be held"


def test_jobs_that_waited_for_their_adapter_are_not_taken_for_such_that_find_no_memory(
    client: Client,
    make_worker: Callable[..., Worker],
    while_read: WhileRead,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.worker._START_SECONDS", 2.0)
    monkeypatch.setattr("worker.worker._LOOK_SECONDS", 0.0)
    released = list[object]()
    monkeypatch.setattr(JobQueue, "release", lambda queue, worker, leases: released.append(leases))
    worker = make_worker(max_running_requests=4)
    submission = client.submit([job(f"job-{number}", "evicted") for number in range(8)])
    while_read(lambda: time.sleep(2.5))
    assert worker.run() == 0
    assert client.status(submission).counts["done"] == 8
    assert released == []


def test_an_adapter_that_cannot_be_read_delays_each_job_that_waits_for_it(
    client: Client,
    queue: JobQueue,
    folder: Path,
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.publisher._FIRST_DELAY", 0.1)
    (folder / "evicted").rename(folder / "away")
    ids = ["one", "two", "three"]
    client.submit([job(id_, "evicted") for id_ in ids])
    retry, num_calls = JobQueue.retry, Counter[str]()

    def retry_and_put_it_back(*args: object, **named: object) -> tuple[int, int]:
        num_calls["retry"] += 1
        if num_calls["retry"] == 3:
            (folder / "away").rename(folder / "evicted")
        return retry(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(JobQueue, "retry", retry_and_put_it_back)
    assert worker.run() == 0
    assert statuses(client, *ids) == ["done"] * 3
    histories = [queue.client.hget(queue.keys.job(id_), "history") for id_ in ids]
    assert all("adapter_unavailable" in history for history in histories)


def test_reading_that_breaks_leaves_the_first_job_to_blame_and_hands_back_the_others(
    client: Client,
    queue: JobQueue,
    make_worker: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def break_down(engine: Engine, job: Job) -> Adapter | None:
        raise RuntimeError(f"reading {job.lora}")

    monkeypatch.setattr(Engine, "adapter_of", break_down)
    client.submit([job(id_, "evicted") for id_ in ("to-blame", "second", "third")])
    assert make_worker().run() == 1
    assert queue.client.zrange(queue.keys.leases, 0, -1) == ["to-blame"]
    assert attempts(queue, "to-blame", "second", "third") == ["1", "0", "0"]


def test_a_job_that_is_cancelled_while_its_adapter_is_read_is_not_run(
    client: Client, worker: Worker, while_read: WhileRead
) -> None:
    client.submit([job("cancelled", "evicted"), job("goes-on", "evicted")])

    def cancel() -> None:
        assert client.cancel("cancelled").running == 1
        wait_until(lambda: len(worker._leases) == 1, "the worker was not told")

    while_read(cancel)
    assert worker.run() == 0
    assert statuses(client, "cancelled", "goes-on") == ["cancelled", "done"]
    assert len(worker._leases) == 0
    assert worker._engine.counters.output_tokens == 4


def test_the_leases_of_jobs_that_wait_for_an_adapter_are_renewed(
    client: Client, queue: JobQueue, make_worker: Callable[..., Worker], while_read: WhileRead
) -> None:
    client.submit([job("job", "evicted")])
    ends = set[float]()

    def note_two_renewals() -> None:
        def are_noted() -> bool:
            ends.add(queue.client.zscore(queue.keys.leases, "job"))
            return len(ends) == 3

        wait_until(are_noted, "the lease is not renewed")

    worker = make_worker(lease_seconds=1)
    while_read(note_two_renewals)
    assert worker.run() == 0
    assert attempts(queue, "job") == ["1"]


def test_a_worker_that_is_asked_to_end_hands_back_what_waits_for_an_adapter(
    client: Client, queue: JobQueue, worker: Worker, while_read: WhileRead
) -> None:
    client.submit([job("job", "evicted")])
    may_go_on = Event()

    def stop_and_hang() -> None:
        worker.stop()
        may_go_on.wait(60)

    while_read(stop_and_hang)
    assert worker.run() == 0
    may_go_on.set()
    assert attempts(queue, "job") == ["0"]
    assert queue.client.hget(queue.keys.job("job"), "state") == "waiting"


def test_a_suspect_is_held_alone_while_its_adapter_is_read(
    client: Client, queue: JobQueue, worker: Worker, while_read: WhileRead
) -> None:
    client.submit([job("suspect", "evicted")])
    queue.announce(worker._engine.adapters.records)
    queue.claim("dead", ClaimRequest(1, 1, in_use=["evicted"]), lease_seconds=60, patience=60)
    queue.client.zadd(queue.keys.leases, {"suspect": 1}, xx=True)
    assert queue.sweep() == (1, 0, 0)
    held = list[list[str]]()

    def submit_others_and_look() -> None:
        client.submit([job(f"base-{number}") for number in range(4)])
        time.sleep(0.5)  # They are claimed at once, or not before the suspect has ended.
        held.append([lease.job_id for lease in worker._leases.held()])

    while_read(submit_others_and_look)
    assert worker.run() == 0
    assert held == [["suspect"]]
    assert statuses(client, "suspect", "base-0") == ["done", "done"]


def test_jobs_of_an_adapter_whose_source_hangs_are_tried_again_and_claimed_no_more_meanwhile(
    client: Client,
    queue: JobQueue,
    make_worker: Callable[..., Worker],
    while_read: WhileRead,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.aside.LATE_SECONDS", 0.1)
    monkeypatch.setattr("worker.publisher._FIRST_DELAY", 0.1)
    worker = make_worker()
    client.submit([job("job", "evicted")])

    def until_it_waits_again() -> None:
        wait_until(lambda: not queue.client.zcard(queue.keys.leases), "it is held")
        wait_until(lambda: not queue.client.zcard(queue.keys.delayed), "it is delayed")
        others = client.submit([job("base")])
        wait_until(lambda: client.status(others).is_complete, "others are not served")

    while_read(until_it_waits_again)
    assert worker.run() == 0
    assert statuses(client, "job", "base") == ["done", "done"]
    history = queue.client.hget(queue.keys.job("job"), "history")
    assert "it was not read within" in history
    assert attempts(queue, "job") == ["2"]


def claim_of(number: int, lora: str = "sql") -> Claim:
    job = Job(id=f"job{number}", lora=lora, prompt_token_ids=[1])
    return Claim(Lease(job.id, 1), lora, job.to_wire(), 1, "sub", 0, 0, 0)


def test_jobs_go_on_once_their_adapter_was_loaded_from_elsewhere_though_its_source_hangs() -> None:
    loaded, may_go_on = set[str](), Event()
    aside = Aside(
        {}.get, loaded.__contains__, lambda job: may_go_on.wait(60) and None, lambda: None
    )
    claim = claim_of(0)
    job = Job.from_wire(claim.payload)
    assert aside.keeps(claim, job)
    assert aside.take() is None
    assert aside.being_read == ["sql"]
    loaded.add("sql")
    assert aside.take() == ([claim], None)
    assert aside.being_read == []
    assert not aside.keeps(claim, job)
    may_go_on.set()
    wait_until(lambda: not any(thread.is_alive() for thread in aside.threads))
    assert aside.take() is None


def test_jobs_of_a_replaced_source_that_hangs_get_what_has_replaced_it(tmp_path: Path) -> None:
    known = {"sql": KnownAdapter("old", tmp_path / "old", "1", 1)}
    may_go_on = Event()
    old, new = (Adapter("sql", "", revision, 1, {}) for revision in "12")

    def read(job: Job) -> Adapter:
        if known["sql"].revision == "1":
            may_go_on.wait(60)
            return old
        return new

    aside = Aside(known.get, lambda name: False, read, lambda: None)
    claims = [claim_of(number) for number in range(2)]
    assert aside.keeps(claims[0], Job.from_wire(claims[0].payload))
    assert aside.take() is None
    known["sql"] = KnownAdapter("new", tmp_path / "new", "2", 2)
    assert aside.being_read == []
    assert aside.keeps(claims[1], Job.from_wire(claims[1].payload))
    taken: list[object] = []
    wait_until(lambda: bool(taken.append(aside.take()) or taken[-1]))
    assert taken[-1] == (claims, new)
    assert aside.being_read == []
    may_go_on.set()
    wait_until(lambda: not any(thread.is_alive() for thread in aside.threads))
    assert aside.take() is None


def test_jobs_whose_turn_to_be_read_does_not_come_go_back_without_blame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_go_on, names = Event(), [f"a{number}" for number in range(READERS + 1)]
    aside = Aside({}.get, lambda name: False, lambda job: may_go_on.wait(60) and None, lambda: None)
    claims = [claim_of(0, name) for name in names]
    for claim in claims:
        assert aside.keeps(claim, Job.from_wire(claim.payload))
    # No read is late, so none begins beside them.
    monkeypatch.setattr("worker.aside.LATE_SECONDS", 0)
    taken = [aside.take() for _ in names]
    assert [(t[0], type(t[1])) for t in taken if t] == [
        *(([claim], JobError) for claim in claims[:READERS]),
        ([claims[READERS]], NotBegun),
    ]
    assert sorted(aside.being_read) == sorted(names[:READERS])
    may_go_on.set()
