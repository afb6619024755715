"""A whole worker in this process: a tiny real model, a real server."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Any

import pytest
import redis
import torch
from structlog.testing import capture_logs

from benchmarks.waiting import wait_until
from broker.claims import ClaimRequest, Claims
from broker.job_queue import JobQueue
from producer.client import Client
from schemas import WIRE_VERSION
from schemas.job import Job
from tests.test_job_queue import keys_left
from tests.tiny_models import make_adapter, make_llama
from worker.adapters.peft_format import Adapter
from worker.batch import Batch
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.lora_path import LoraPath
from worker.sequence import Sequence
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


def test_a_worker_that_has_no_room_claims_again_when_a_job_has_ended(
    client: Client, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.claimer._PAUSE", 3600.0)  # So that no look of its own helps.
    submission = client.submit([job(f"{name}-{i}", name) for i in range(3) for name in ADAPTERS])
    assert make_worker(max_loras_per_batch=1, max_running_requests=1).run() == 0
    assert client.status(submission).counts["done"] == 9


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
            assert queue.sweep() == (2, 0, 0)
        launch(engine, batch)

    monkeypatch.setattr(Engine, "launch", launch_after_a_stall)
    assert worker.run() == 0
    assert client.status(submission).counts["done"] == 2
    assert next(num_calls) > 400
    assert {len(result.token_ids) for result in client.results(submission)} == {400}
    for job_id in ("first", "second"):
        assert queue.client.hget(queue.keys.job(job_id), "attempts") == "2"
    assert worker._leases.request(()).in_use == []


def test_jobs_of_a_claim_whose_reply_was_lost_run_at_once_in_their_first_attempt(
    client: Client, queue: JobQueue, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, num_claims = JobQueue._run, count()

    def lose_the_first_reply(queue: JobQueue, script: str, *args: Any) -> Any:
        reply = run(queue, script, *args)
        if script == "claim" and next(num_claims) == 0:
            raise redis.ConnectionError("lost")
        return reply

    monkeypatch.setattr(JobQueue, "_run", lose_the_first_reply)
    submission = client.submit([job(f"job-{i}") for i in range(6)])
    assert make_worker(lease_seconds=600).run() == 0
    assert client.status(submission).counts["done"] == 6
    assert {queue.client.hget(queue.keys.job(f"job-{i}"), "attempts") for i in range(6)} == {"1"}


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


def test_jobs_that_ran_beside_one_that_crashes_the_engine_end_done(
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
    assert status(client, "long") == "done"


def test_a_job_that_crashes_the_thread_that_prepares_it_ends_dead(
    client: Client, queue: JobQueue, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Engine.sequence_of

    def prepare_unless_poisoned(engine: Engine, job: Job, adapter: Adapter | None) -> Sequence:
        if job.id == "poison":
            raise RuntimeError("poison")
        return prepare(engine, job, adapter)

    monkeypatch.setattr(Engine, "sequence_of", prepare_unless_poisoned)
    client.submit([job("first"), job("poison"), job("last")])
    for _ in range(3):
        assert make_worker().run() == 1
        held = queue.client.zrange(queue.keys.leases, 0, -1)
        assert held == ["poison"]
        queue.client.zadd(queue.keys.leases, dict.fromkeys(held, 1))
        queue.sweep()
    assert make_worker().run() == 0
    assert [status(client, id_) for id_ in ("first", "poison", "last")] == ["done", "dead", "done"]
    for id_ in ("first", "last"):
        assert queue.client.hget(queue.keys.job(id_), "attempts") == "1", "it had not begun"


def make_suspects(client: Client, queue: JobQueue, ids: list[str]) -> str:
    """A worker that is never heard of again has claimed these jobs."""
    submission = client.submit([job(id_) for id_ in ids])
    request = ClaimRequest(len(ids), 0, in_use=[])
    queue.claim("dead", request, lease_seconds=60, patience=60)
    queue.client.zadd(queue.keys.leases, dict.fromkeys(ids, 1), xx=True)
    assert queue.sweep() == (len(ids), 0, 0)
    return submission


def test_suspects_run_alone_and_in_turn_with_a_backlog(
    client: Client, queue: JobQueue, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each suspect takes longer than that, so that after each it is the turn of others.
    monkeypatch.setattr("worker.claimer._TRIAL_SECONDS", 0.001)
    suspects = [f"suspect-{i}" for i in range(3)]
    make_suspects(client, queue, suspects)
    client.submit([job(f"other-{i}", max_tokens=100) for i in range(100)])
    launch, batches = Engine.launch, list[list[str]]()

    def launch_and_note(engine: Engine, batch: Batch) -> None:
        batches.append([item.sequence.job.id for item in batch.scheduled])
        launch(engine, batch)

    monkeypatch.setattr(Engine, "launch", launch_and_note)
    assert make_worker(max_running_requests=8, patience=0.05).run() == 0
    assert {status(client, id_) for id_ in suspects} == {"done"}
    with_suspect = [n for n, ids in enumerate(batches) if set(ids) & set(suspects)]
    assert all(len(batches[n]) == 1 for n in with_suspect)
    assert max(map(len, batches)) == 8
    # Others ran before the first suspect, between suspects, and after the last.
    turns = [ids[0].partition("-")[0] for ids in batches]
    changes = [turn for n, turn in enumerate(turns) if n == 0 or turns[n - 1] != turn]
    assert changes[0] == changes[-1] == "other"
    assert changes.count("suspect") > 1


def test_a_batch_that_does_not_fit_into_memory_is_tried_again_one_by_one(
    client: Client, queue: JobQueue, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.publisher._FIRST_DELAY", 0.1)
    launch = Engine.launch

    def launch_within_memory(engine: Engine, batch: Batch) -> None:
        ids = {item.sequence.job.id for item in batch.scheduled}
        if "huge" in ids or len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        launch(engine, batch)

    monkeypatch.setattr(Engine, "launch", launch_within_memory)
    client.submit([job("huge", "a"), job("one", "a"), job("two", "b"), job("three")])
    worker = make_worker()
    assert worker.run() == 0
    (huge,) = client.results("huge")
    assert huge.status == "dead"
    assert huge.error is not None
    assert huge.error.code == "out_of_memory"
    assert [status(client, id_) for id_ in ("one", "two", "three")] == ["done"] * 3
    assert queue.client.hget(queue.keys.job("one"), "attempts") == "2"
    assert worker._engine.scheduler.pool.num_used == 0
    assert len(worker._leases) == 0


def test_a_job_whose_adapters_folder_is_away_for_a_moment_is_tried_again(
    client: Client,
    queue: JobQueue,
    folder: Path,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.publisher._FIRST_DELAY", 0.1)
    worker = make_worker(max_loaded_loras=1, max_loras_per_batch=1)  # So "a" has been evicted.
    (folder / "a").rename(folder / "away")
    retry = JobQueue.retry

    def retry_and_put_it_back(*args: Any, **named: Any) -> tuple[int, int]:
        (folder / "away").rename(folder / "a")
        return retry(*args, **named)

    monkeypatch.setattr(JobQueue, "retry", retry_and_put_it_back)
    client.submit([job("patient", "a"), job("other", "b"), job("unknown", "nobody")])
    assert worker.run() == 0
    assert status(client, "unknown") == "failed"
    assert queue.client.hmget(queue.keys.job("unknown"), "attempts", "history") == ["1", None]
    assert status(client, "patient") == "done"
    assert queue.client.hget(queue.keys.job("patient"), "attempts") == "2"
    (entry,) = queue.client.hget(queue.keys.job("patient"), "history").splitlines()
    assert "adapter_unavailable" in entry


def test_the_newest_flag_sets_the_attempts_of_all_workers(
    client: Client, queue: JobQueue, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(engine: Engine, batch: Batch) -> None:
        raise RuntimeError("poison")

    monkeypatch.setattr(Engine, "launch", fail)
    client.submit([job("poison")])
    assert make_worker(max_attempts=2).run() == 1
    assert make_worker().run() == 1
    assert status(client, "poison") == "dead"
    (poison,) = client.results("poison")
    assert poison.error is not None
    assert poison.error.message == (
        "given up after 2 attempts; how the last one ended: the engine failed (RuntimeError)"
    )


def test_a_worker_hands_back_what_its_kv_cache_has_no_room_for(
    client: Client, queue: JobQueue, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.worker._START_SECONDS", 0.1)
    monkeypatch.setattr("worker.worker._LOOK_SECONDS", 0.1)
    # 8 more are ahead; 12 fit into the cache, as long as they do not share their prompt.
    worker = make_worker(max_running_requests=64, disable_prefix_cache=True)
    ids = [f"job-{i}" for i in range(100)]
    prompt = {"prompt_token_ids": [1, 2, 3] * 100, "max_tokens": 40}
    submission = client.submit([{"id": id_, **prompt} for id_ in ids])
    launch, num_held = Engine.launch, list[int]()

    def launch_and_count(engine: Engine, batch: Batch) -> None:
        num_held.append(len(worker._leases))
        launch(engine, batch)

    monkeypatch.setattr(Engine, "launch", launch_and_count)
    assert worker.run() == 0
    assert client.status(submission).counts["done"] == 100
    assert {queue.client.hget(queue.keys.job(id_), "attempts") for id_ in ids} == {"1"}
    assert max(num_held) == 72
    assert median(num_held) <= 12 + 8


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_worker_whose_clock_is_wrong_keeps_leases_and_times_by_the_servers(
    client: Client,
    queue: JobQueue,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
    hours: int,
) -> None:
    before, _ = queue.client.time()
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + 3600 * hours)
    client.submit([job("job", max_tokens=400)])
    assert make_worker(lease_seconds=1).run() == 0
    (result,) = client.results("job")
    after, _ = queue.client.time()
    moments = result.timings.queued, result.timings.started, result.timings.finished
    assert all(moment and before <= moment <= after + 1 for moment in moments)
    assert queue.client.hget(queue.keys.job("job"), "attempts") == "1"


def test_a_worker_leaves_jobs_of_a_newer_version_alone_and_says_so_once(
    client: Client, queue: JobQueue, make_worker: MakeWorker
) -> None:
    client.submit([job("newer"), job("older"), job("current")])
    for id_, version in (("newer", WIRE_VERSION + 1), ("older", WIRE_VERSION - 1)):
        queue.client.hset(queue.keys.job(id_), "v", version)
    with capture_logs() as logs:
        assert make_worker().run() == 0
    assert [status(client, id_) for id_ in ("newer", "older", "current")] == [
        *("waiting", "done", "done"),
    ]
    told = [entry for entry in logs if entry["event"] == "other_wire_version"]
    assert [entry["set_aside"] for entry in told] == [1]
    assert queue.client.hget(queue.keys.job("newer"), "attempts") == "0"


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
    assert ("redis_away", "publish") in {(entry["event"], entry.get("at")) for entry in logs}
    assert client.status(submission).counts["done"] == 40


def test_results_tell_that_a_common_beginning_was_computed_once_an_adapter(
    client: Client, make_worker: MakeWorker
) -> None:
    beginning = [token % 200 for token in range(80)]
    jobs = [
        job(f"{lora}-{i}", lora) | {"prompt_token_ids": [*beginning, i + 1]}
        for lora in (None, "a", "b")
        for i in range(5)
    ]
    submission = client.submit(jobs)
    worker = make_worker()
    assert worker.run() == 0
    cached: dict[str | None, list[int]] = {}
    for result in client.results(submission):
        cached.setdefault(result.lora, []).append(result.usage.cached_tokens)
    assert cached.keys() == {None, "a", "b"}
    assert all(sorted(numbers) == [0, 80, 80, 80, 80] for numbers in cached.values())
    # A last token that is left alone is computed, and counted, as one of the answer.
    assert worker._engine.counters.prompt_tokens == 3 * 81
