"""Two things at one moment, hit exactly, with real processes: cancellations that meet a claim or a
commit, workers of two versions, workers that start while the server comes and goes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Literal

import pytest

from benchmarks.fault_bench import LEASE_SECONDS, FaultBench, jobs
from benchmarks.ledger import server_time
from benchmarks.own_server import OwnServer
from benchmarks.waiting import PATIENCE, wait_until
from producer.client import Client
from schemas import WIRE_VERSION
from schemas.keys import Keys
from schemas.result import Result
from tests.end_to_end.conftest import running_workers
from tests.tiny_models import make_llama

NEWER = WIRE_VERSION + 1


def results(bench: FaultBench, *ids: str) -> list[Result]:
    return list(bench.client.results(*ids))


def test_a_job_that_is_cancelled_before_a_claim_reaches_the_server_is_not_run(
    bench: FaultBench,
) -> None:
    proxy = bench.proxy()
    with proxy.hold("claim") as held:
        worker = bench.start(redis_url=proxy.url)
        bench.submit(*jobs(3))
        held.wait()
        bench.ledger.cancel(bench.client, "job-0", "job-1")
    bench.submit(*jobs(2, "later"))
    assert bench.finish() == {"cancelled": 2, "done": 3}
    assert bench.runs() == {"job-2": 1, "later-0": 1, "later-1": 1}
    assert worker.is_alive()


def test_a_job_that_is_cancelled_before_the_answer_to_its_claim_comes_stays_cancelled(
    bench: FaultBench,
) -> None:
    """The worker was told of the cancellation when it did not know yet that it has the job."""
    proxy = bench.proxy()
    with proxy.hold("claim", "reply") as held:
        bench.submit(*jobs(3))
        worker = bench.start(redis_url=proxy.url)
        held.wait()
        assert {result.status for result in results(bench, "job-0", "job-1")} == {"running"}
        bench.ledger.cancel(bench.client, "job-0", "job-1")
    bench.submit(*jobs(2, "later"))
    assert bench.finish() == {"cancelled": 2, "done": 3}
    assert worker.is_alive()
    assert max(bench.runs().values()) == 1


def test_a_job_that_is_cancelled_before_its_commit_reaches_the_server_stays_cancelled(
    bench: FaultBench, tmp_path: Path
) -> None:
    proxy = bench.proxy()
    worker = bench.start(redis_url=proxy.url)
    with proxy.hold("commit") as held:
        bench.submit(*jobs(1))
        held.wait()
        bench.ledger.cancel(bench.client, "job-0")
    wait_until(
        lambda: '"at": "commit"' in (tmp_path / "null-0.log").read_text(),
        "the worker was not told that its answer came too late",
    )
    bench.submit(*jobs(2, "later"))
    assert bench.finish() == {"cancelled": 1, "done": 2}
    assert bench.runs()["job-0"] == 1
    assert worker.is_alive()


def test_a_cancellation_after_a_commit_leaves_the_answer_though_its_worker_knows_of_neither(
    bench: FaultBench,
) -> None:
    proxy = bench.proxy()
    bench.start(redis_url=proxy.url)
    with proxy.hold("commit", "reply") as held:
        bench.submit(*jobs(1))
        held.wait()
        bench.ledger.cancel(bench.client, "job-0")
    assert bench.finish() == {"done": 1}
    assert bench.runs() == {"job-0": 1}


@pytest.mark.parametrize("part", ["request", "reply"])
def test_a_submission_that_is_cancelled_while_its_worker_dies_in_its_commit_ends_once(
    bench: FaultBench, part: Literal["request", "reply"]
) -> None:
    proxy = bench.proxy()
    victim = bench.start(redis_url=proxy.url)
    with proxy.hold("commit", part) as held:
        submission = bench.submit(*jobs(1))
        held.wait()
        victim.kill()
        victim.join()
        bench.ledger.cancel(bench.client, submission)
        proxy.reset()
    bench.start()
    bench.submit(*jobs(1, "later"))
    assert bench.finish() == ({"cancelled": 1, "done": 1} if part == "request" else {"done": 2})
    assert bench.runs()["job-0"] == 1


@pytest.fixture
def newer_client(bench: FaultBench, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A producer of the next version."""
    with monkeypatch.context() as patch:
        patch.setattr("broker.scripts.WIRE_VERSION", NEWER)
        return bench.client_through(bench.proxy())


def test_workers_of_two_versions_share_a_queue_and_each_runs_what_it_reads(
    bench: FaultBench, newer_client: Client
) -> None:
    old = bench.start(max_running=2)
    new = bench.start(max_running=2, wire_version=NEWER)
    bench.submit(*jobs(20, at="generate", do="sleep", seconds=0.02))
    assert bench.ledger.submit(newer_client, jobs(20, "newer"))
    bench.submit(*jobs(20, "later", at="generate", do="sleep", seconds=0.02))
    assert bench.finish() == {"done": 60}
    assert set(bench.runs().values()) == {1}
    found = bench.ledger.results.values()
    workers_of_newer = {str(r.worker) for r in found if r.id.startswith("newer")}
    others = {str(r.worker) for r in found if not r.id.startswith("newer")}
    assert all(f"-{new.pid}-" in worker for worker in workers_of_newer)
    assert len(others) == 2
    assert old.is_alive()


def test_an_older_worker_leaves_the_jobs_of_a_newer_one_that_died_to_the_next_newer_one(
    bench: FaultBench, newer_client: Client
) -> None:
    victim = bench.start(wire_version=NEWER)
    assert bench.ledger.submit(
        newer_client,
        [*jobs(1, "deadly", at="generate", do="SIGKILL", times=1), *jobs(5, "newer")],
    )
    victim.join(PATIENCE)
    assert victim.exitcode == -signal.SIGKILL
    bench.start()
    current = bench.submit(*jobs(20))
    set_aside = Keys(bench.queue).set_aside
    wait_until(lambda: bench.redis.zcard(set_aside) == 6, "the older worker did not sweep")
    bench.client.wait(current, timeout=PATIENCE)
    assert "done" not in {result.status for result in results(bench, "deadly-0", "newer-0")}
    bench.start(wire_version=NEWER)
    assert bench.finish() == {"done": 26}
    assert bench.runs()["newer-0"] <= 2


#: All that a worker asks the server before its first job.
AT_START = (
    *("PING", "CLIENT", "INFO", "CONFIG", "EXEC", "SCRIPT", "announce", "heartbeat"),
    *("SUBSCRIBE", "claim", "expire_jobs", "sweep"),
)


@pytest.mark.parametrize("command", AT_START)
def test_a_reply_that_is_lost_while_a_worker_starts_is_asked_for_again(
    bench: FaultBench, command: str
) -> None:
    proxy = bench.proxy()
    proxy.lose_replies(command, times=2)
    bench.redis.script_flush()
    worker = bench.start(redis_url=proxy.url)
    bench.submit(*jobs(3))
    assert bench.finish() == {"done": 3}
    wait_until(lambda: not proxy.num_to_lose, f"no {command} came")
    assert worker.is_alive()


def test_the_command_worker_starts_though_replies_are_lost(
    bench: FaultBench, tmp_path: Path
) -> None:
    proxy = bench.proxy()
    for command in ("PING", "INFO", "EXEC", "announce", "heartbeat"):
        proxy.lose_replies(command)
    with running_workers(make_llama(tmp_path / "model"), tmp_path) as start:
        worker = start("--redis-url", proxy.url, "--queue", bench.queue)
        bench.submit({"id": "job", "prompt_token_ids": [1, 2], "max_tokens": 2})
        assert bench.finish() == {"done": 1}
        assert worker.is_alive()
    assert not proxy.num_to_lose
    log = (tmp_path / "worker-0.log").read_text()
    assert "redis_away" in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_worker_that_starts_as_an_outage_ends_takes_no_job_from_one_that_lives(
    frail: FaultBench, server: OwnServer
) -> None:
    lease = 6.0  # More than the 5 s that a worker pauses between two tries.
    frail.start(lease_seconds=lease)
    frail.submit(*jobs(1, at="generate", do="sleep", seconds=3 * lease))
    wait_until(lambda: len(frail.runs()) == 1, "the job did not begin")
    server.kill()
    time.sleep(lease + 1)
    server.start()
    frail.start(lease_seconds=lease)
    assert frail.finish() == {"done": 1}
    assert frail.runs() == {"job-0": 1}


def test_a_worker_stopped_in_its_claim_finds_its_jobs_gone_when_it_wakes(
    bench: FaultBench,
) -> None:
    """It has leases that it does not know of; they expire, and others run the jobs."""
    proxy = bench.proxy()
    with proxy.hold("claim", "reply") as held:
        bench.submit(*jobs(5))
        sleeper = bench.start(redis_url=proxy.url)
        held.wait()
        os.kill(sleeper.pid, signal.SIGSTOP)
    other = bench.start()
    assert bench.finish() == {"done": 5}
    first = results(bench, *(f"job-{i}" for i in range(5)))
    os.kill(sleeper.pid, signal.SIGCONT)
    bench.submit(*jobs(10, "later"))
    assert bench.finish() == {"done": 15}
    assert results(bench, *(f"job-{i}" for i in range(5))) == first
    assert all(f"-{other.pid}-" in str(result.worker) for result in first)
    assert sleeper.is_alive()


def test_a_burst_worker_does_not_end_before_it_has_run_what_a_dead_one_left(
    bench: FaultBench,
) -> None:
    victim = bench.start()
    bench.submit(*jobs(1, "deadly", at="generate", do="SIGKILL", times=1), *jobs(2))
    victim.join(PATIENCE)
    wait_until(
        lambda: bench.redis.zcount(Keys(bench.queue).leases, "-inf", _now_ms(bench)) == 3,
        "the leases did not expire",
    )
    burst = bench.workers.start(burst=True)
    burst.join(PATIENCE)
    assert burst.exitcode == 0
    assert bench.finish() == {"done": 3}


def _now_ms(bench: FaultBench) -> int:
    return int(1000 * server_time(bench.redis))


def test_a_claim_that_is_not_answered_delays_no_renewal_and_no_result(bench: FaultBench) -> None:
    """Each of the worker's threads has a connection of its own."""
    proxy = bench.proxy()
    bench.start(redis_url=proxy.url)
    submission = bench.submit(*jobs(1, at="generate", do="sleep", seconds=2.5 * LEASE_SECONDS))
    wait_until(lambda: bench.runs()["job-0"] == 1, "the job does not begin")
    with proxy.hold("claim") as held:
        held.wait()
        bench.client.wait(submission, timeout=30)
        (result,) = results(bench, "job-0")
    assert result.status == "done"
    assert bench.runs() == {"job-0": 1}
    assert bench.finish() == {"done": 1}
