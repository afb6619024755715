"""A whole worker in this process: a tiny real model, a real server."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from broker.job_queue import Claims, JobQueue
from producer.client import Client
from tests.end_to_end.at_work import wait_until
from tests.test_job_queue import keys_left
from tests.tiny_models import make_adapter, make_llama
from worker.batch import Batch
from worker.config import LoraPath, WorkerConfig
from worker.engine import Engine
from worker.worker import Worker

ADAPTERS = ("a", "a2", "b")

MakeWorker = Callable[..., Worker]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the model, called ``model``, and the adapters."""
    folder = tmp_path_factory.mktemp("models")
    make_llama(folder / "model")
    for seed, name in enumerate(ADAPTERS):
        make_adapter(folder / "model", folder / name, rank=4, seed=seed)
    return folder


@pytest.fixture
def make_worker(folder: Path, redis_url: str, queue_name: str) -> MakeWorker:
    """Makes workers in --burst; settings are those of their configuration."""

    def make(**settings: object) -> Worker:
        config = WorkerConfig(
            model_path=folder / "model",
            lora_paths=tuple(
                LoraPath(lora_name=name, lora_path=str(folder / name)) for name in ADAPTERS
            ),
            device="cpu",
            max_total_tokens=4096,
            queue=queue_name,
            burst=True,
            **settings,
        )
        return Worker(config, Engine(config), redis_url)

    return make


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


def job(id_: str, lora: str | None = None, max_tokens: int = 4) -> dict[str, object]:
    return {"id": id_, "lora": lora, "prompt_token_ids": [1, 2, 3], "max_tokens": max_tokens}


@contextmanager
def full_memory(server: redis.Redis) -> Iterator[None]:
    server.config_set("maxmemory", "1")
    yield
    server.config_set("maxmemory", "0")


@contextmanager
def full_disk(server: redis.Redis) -> Iterator[None]:
    """A snapshot fails for good reason: a folder has its name."""
    snapshot = Path(server.config_get("dir")["dir"]) / "dump.rdb"
    (snapshot / "not empty").mkdir(parents=True)
    server.config_set("save", "3600 1000000")
    server.bgsave()
    while server.info("persistence")["rdb_last_bgsave_status"] == "ok":
        time.sleep(0.01)
    yield
    server.config_set("save", "")
    shutil.rmtree(snapshot)


@contextmanager
def read_only(server: redis.Redis) -> Iterator[None]:
    server.replicaof("127.0.0.1", "1")
    yield
    server.replicaof("NO", "ONE")


def status(client: Client, id_: str) -> str:
    return next(client.results(id_)).status


def test_a_burst_worker_stays_for_jobs_that_wait_for_a_slot(
    client: Client, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = JobQueue.claim

    def claim_over_a_slow_network(queue: JobQueue, *args: Any, **named: Any) -> Claims:
        """The claim sent while a job holds the only slot is answered when that job is done."""
        claims = claim(queue, *args, **named)
        time.sleep(0.3)
        return claims

    monkeypatch.setattr(JobQueue, "claim", claim_over_a_slow_network)
    submission = client.submit([job("first", "a"), job("second", "b")])
    assert make_worker(max_loras_per_batch=1).run() == 0
    assert client.status(submission).counts["done"] == 2


@pytest.mark.parametrize("others", [["a"], ["a", "a2"]], ids=["one slot", "two slots"])
def test_a_starving_adapter_is_served_though_others_have_a_backlog(
    client: Client,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
    others: list[str],
) -> None:
    worker = make_worker(max_loras_per_batch=len(others), max_running_requests=4, patience=0.05)
    jobs = [job(f"{name}-{i}", name) for i in range(200) for name in others]
    submission = client.submit([*jobs, job("starving", "b")])
    assert worker.run() == 0
    order = [result.id for result in client.follow(submission)]
    assert len(order) == len(jobs) + 1
    assert order.index("starving") < len(jobs) // 2


def test_a_job_that_is_lost_and_claimed_again_while_it_runs_is_answered_once(
    client: Client, queue: JobQueue, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    submission = client.submit([job("first", "a", 400), job("second", "a", 400)])
    launch, num_calls = Engine.launch, count()

    def launch_after_a_stall(engine: Engine, batch: Batch) -> None:
        """The batch number 20 takes so long that another worker sweeps the leases."""
        if next(num_calls) == 20:
            for job_id in ("first", "second"):
                queue.client.zadd(queue.keys.leases, {job_id: 1}, xx=True)
            assert queue.sweep(max_attempts=3) == (2, 0)
        launch(engine, batch)

    monkeypatch.setattr(Engine, "launch", launch_after_a_stall)
    assert worker.run() == 0
    assert client.status(submission).counts["done"] == 2
    assert next(num_calls) > 400
    assert {len(result.token_ids) for result in client.results(submission)} == {400}
    for job_id in ("first", "second"):
        assert queue.client.hget(queue.keys.job(job_id), "attempts") == "2"
    assert worker._leases.request(()).in_use == []


def test_a_worker_drops_a_running_job_within_a_few_steps(
    client: Client,
    queue: JobQueue,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = make_worker()
    client.submit([job("cancelled", "a", 400), job("goes-on", "a", 60)])
    launch, num_calls = Engine.launch, count()
    seen: Counter[str] = Counter()

    def launch_and_cancel(engine: Engine, batch: Batch) -> None:
        seen.update(item.sequence.job.id for item in batch.scheduled)
        if next(num_calls) == 20:
            assert client.cancel("cancelled").running == 1
            wait_until(lambda: bool(worker._leases._lost), "the worker was not told")
        launch(engine, batch)

    monkeypatch.setattr(Engine, "launch", launch_and_cancel)
    assert worker.run() == 0
    assert seen["goes-on"] >= 60
    assert seen["cancelled"] <= 22
    outcomes = [(found.id, found.status) for found in client.results("cancelled", "goes-on")]
    assert outcomes == [("cancelled", "cancelled"), ("goes-on", "done")]
    assert worker._engine.scheduler.pool.num_used == 0
    assert keys_left(queue) == set()


def test_a_job_that_crashes_the_engine_ends_dead_and_those_that_waited_behind_it_end_done(
    client: Client, queue: JobQueue, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Engine.launch

    def launch_unless_poisoned(engine: Engine, batch: Batch) -> None:
        if any(item.sequence.job.id == "poison" for item in batch.scheduled):
            raise RuntimeError("poison")
        launch(engine, batch)

    monkeypatch.setattr(Engine, "launch", launch_unless_poisoned)
    client.submit([job("poison"), *(job(f"innocent-{i}") for i in range(6))])
    assert [make_worker(max_running_requests=1).run() for _ in range(4)] == [1, 1, 1, 0]
    assert status(client, "poison") == "dead"
    assert queue.client.hget(queue.keys.job("poison"), "attempts") == "3"
    for i in range(6):
        assert status(client, f"innocent-{i}") == "done"
        assert queue.client.hget(queue.keys.job(f"innocent-{i}"), "attempts") == "1"


def test_jobs_that_ran_beside_one_that_crashes_the_engine_all_end(
    client: Client, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Engine.launch

    def launch_unless_poisoned(engine: Engine, batch: Batch) -> None:
        if any(s.job.id == "poison" and len(s.output_ids) == 3 for s in batch.sampled):
            raise RuntimeError("poison")
        launch(engine, batch)

    monkeypatch.setattr(Engine, "launch", launch_unless_poisoned)
    jobs = [job("poison", max_tokens=9), job("long", max_tokens=9), job("short", max_tokens=2)]
    submission = client.submit(jobs)
    assert [make_worker().run() for _ in range(4)] == [1, 1, 1, 0]
    assert client.status(submission).is_complete
    assert status(client, "poison") == "dead"
    assert status(client, "short") == "done"


@pytest.mark.parametrize("trouble", [full_memory, full_disk, read_only])
def test_a_worker_waits_for_a_server_that_refuses_writes(
    client: Client,
    queue: JobQueue,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Callable[[redis.Redis], AbstractContextManager[None]],
) -> None:
    worker = make_worker(max_running_requests=4)
    submission = client.submit([job(f"job-{i}") for i in range(40)])
    launch, num_calls = Engine.launch, count()
    troubles = ExitStack()
    end_of_trouble = Timer(1.0, troubles.close)

    def launch_in_trouble(engine: Engine, batch: Batch) -> None:
        if next(num_calls) == 5:
            troubles.enter_context(trouble(queue.client))
            end_of_trouble.start()
        launch(engine, batch)

    monkeypatch.setattr(Engine, "launch", launch_in_trouble)
    with capture_logs() as logs:
        exit_status = worker.run()
    end_of_trouble.join()
    assert exit_status == 0
    assert ("redis_away", "publish") in {(entry["event"], entry.get("thread")) for entry in logs}
    assert client.status(submission).counts["done"] == 40
