"""Every fault that we can cause, by its name, with real processes and a real server.

Workers are real but for their engine, which computes nothing. Each test ends with the check of the
whole queue against the sender's ledger (``benchmarks/ledger.py``): each job has exactly one
outcome, counts add up, nothing is left.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fault_bench import LEASE_SECONDS, FaultBench, is_stopped, jobs
from benchmarks.own_server import OwnServer
from benchmarks.waiting import PATIENCE, wait_until
from producer.client import Client
from schemas.errors import ServerUnavailable
from schemas.keys import Keys
from schemas.result import Result


def result(bench: FaultBench, job_id: str) -> Result:
    return next(bench.client.results(job_id))


def log(tmp_path: Path, number: int) -> str:
    file = tmp_path / f"null-{number}.log"
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize("point", ["read", "load", "generate"])
def test_a_worker_that_is_killed_at_a_point_loses_nothing(bench: FaultBench, point: str) -> None:
    victim = bench.start(max_loaded=1, max_running=4)
    bench.submit(
        *jobs(20, "before", "b"),
        *jobs(1, "deadly", "a", at=point, do="SIGKILL", times=1),
        *jobs(20, "after", "c"),
    )
    victim.join(PATIENCE)
    assert victim.exitcode == -signal.SIGKILL
    bench.start()
    assert bench.finish() == {"done": 41}
    assert max(bench.runs().values()) <= 2


def test_a_worker_that_is_killed_before_its_commit_has_its_job_run_again(
    bench: FaultBench,
) -> None:
    proxy = bench.proxy()
    victim = bench.start(redis_url=proxy.url)
    with proxy.hold("commit") as held:
        bench.submit(*jobs(1))
        held.wait()
        victim.kill()
        victim.join()
        proxy.reset()
    bench.start()
    assert bench.finish() == {"done": 1}
    assert bench.runs() == {"job-0": 2}


def test_a_worker_that_is_killed_after_its_commit_leaves_the_result(bench: FaultBench) -> None:
    proxy = bench.proxy()
    victim = bench.start(redis_url=proxy.url)
    with proxy.hold("commit", "reply") as held:
        bench.submit(*jobs(1))
        held.wait()
        victim.kill()
        victim.join()
    bench.start()
    assert bench.finish() == {"done": 1}
    assert bench.runs() == {"job-0": 1}


def test_a_worker_stopped_for_longer_than_its_lease_cannot_write_when_it_wakes(
    bench: FaultBench, tmp_path: Path
) -> None:
    sleeper = bench.start()
    bench.submit(*jobs(1, at="generate", do="SIGSTOP", times=1))
    wait_until(lambda: is_stopped(sleeper), "the worker did not stop")
    other = bench.start()
    assert bench.finish() == {"done": 1}
    first = result(bench, "job-0")
    os.kill(sleeper.pid, signal.SIGCONT)
    wait_until(
        lambda: "lease" in log(tmp_path, 0), "the worker did not notice that it lost its job"
    )
    bench.submit(*jobs(10, "later"))
    assert bench.finish() == {"done": 11}
    assert result(bench, "job-0") == first
    assert sleeper.is_alive()
    assert str(other.pid) in (first.worker or "")


def test_a_lost_reply_of_submit_sends_nothing_twice(bench: FaultBench) -> None:
    proxy = bench.proxy()
    client = bench.client_through(proxy)
    client.submit(["warm"])
    bench.ledger.unsure += [r.id for r in bench.client.results(_only_submission(bench))]
    proxy.lose_replies("submit", times=3)
    assert bench.ledger.submit(client, jobs(30))
    assert proxy.commands["submit"] == 5
    bench.start()
    assert bench.finish() == {"done": 30}
    assert set(bench.runs().values()) == {1}


def _only_submission(bench: FaultBench) -> str:
    (submission,) = bench.client.overview().submissions
    return submission.id


def test_jobs_of_a_lost_reply_of_claim_are_run(bench: FaultBench) -> None:
    proxy = bench.proxy()
    bench.start(redis_url=proxy.url, max_running=8)
    bench.submit(*jobs(1, "first"))
    bench.finish()
    proxy.lose_replies("claim", times=2)
    bench.submit(*jobs(30))
    assert bench.finish() == {"done": 31}
    assert set(bench.runs().values()) == {1}


def test_a_lost_reply_of_commit_records_one_result(bench: FaultBench) -> None:
    proxy = bench.proxy()
    bench.start(redis_url=proxy.url)
    bench.submit(*jobs(1, "first"))
    bench.finish()
    proxy.lose_replies("commit", times=3)
    bench.submit(*jobs(30))
    assert bench.finish() == {"done": 31}
    wait_until(lambda: not proxy.num_to_lose, "not all commits were repeated")
    assert set(bench.runs().values()) == {1}


def test_lost_replies_of_renew_heartbeat_and_sweep_lose_nothing(bench: FaultBench) -> None:
    proxy = bench.proxy()
    bench.start(redis_url=proxy.url)
    for command in ("renew", "heartbeat", "sweep"):
        proxy.lose_replies(command)
    bench.submit(*jobs(3, at="generate", do="sleep", seconds=0.5))
    assert bench.finish() == {"done": 3}
    wait_until(lambda: not proxy.num_to_lose, "not all commands came")


def test_a_server_that_is_killed_under_load_keeps_what_it_acknowledged(
    frail: FaultBench, server: OwnServer
) -> None:
    for _ in range(2):
        frail.start(max_running=4)
    frail.submit(*jobs(60, at="generate", do="sleep", seconds=0.02))
    wait_until(lambda: len(frail.runs()) > 10, "the jobs did not begin")
    server.kill()
    with pytest.raises(ServerUnavailable, match="No Redis server answers"):
        frail.client.overview()
    assert len(frail.workers.alive) == 2
    server.start()
    frail.submit(*jobs(10, "later"))
    assert frail.finish() == {"done": 70}
    assert len(frail.workers.alive) == 2


def test_a_server_that_is_absent_at_the_start_is_missed_in_a_sentence(
    frail: FaultBench, server: OwnServer, tmp_path: Path
) -> None:
    server.kill()
    with pytest.raises(ServerUnavailable, match="No Redis server answers"):
        frail.client.submit(jobs(1, "refused"))
    worker = frail.workers.start()
    wait_until(lambda: log(tmp_path, 0) != "", "the worker says nothing")
    server.start()
    worker.join(5)
    if worker.exitcode is not None:  # As its supervisor would.
        assert "Traceback" not in log(tmp_path, 0)
        frail.workers.start()
    frail.submit(*jobs(5))
    assert frail.finish() == {"done": 5}


def test_a_server_away_for_longer_than_a_lease_costs_no_result(bench: FaultBench) -> None:
    proxy = bench.proxy()
    bench.start(redis_url=proxy.url)
    bench.submit(*jobs(5, at="generate", do="sleep", seconds=0.05))
    wait_until(lambda: len(bench.runs()) > 1, "the jobs did not begin")
    proxy.refuses = True
    proxy.reset()
    time.sleep(2 * LEASE_SECONDS)
    proxy.refuses = False
    assert bench.finish() == {"done": 5}
    assert set(bench.runs().values()) == {1}, "nobody else could have taken them"


def test_connections_that_are_reset_again_and_again_lose_nothing(bench: FaultBench) -> None:
    proxies = [bench.proxy() for _ in range(2)]
    for proxy in proxies:
        bench.start(redis_url=proxy.url, max_running=8)
    bench.submit(*jobs(150, at="generate", do="sleep", seconds=0.01))
    for _ in range(5):
        time.sleep(0.2)
        for proxy in proxies:
            proxy.reset()
    assert bench.finish() == {"done": 150}


def test_half_open_connections_are_given_up_and_made_anew(bench: FaultBench) -> None:
    proxy = bench.proxy()
    bench.start(redis_url=proxy.url)
    bench.submit(*jobs(10))
    bench.finish()
    proxy.half_open()
    bench.submit(*jobs(10, "later"))
    assert bench.finish() == {"done": 20}


def test_a_stall_shorter_than_the_lease_costs_nothing(bench: FaultBench) -> None:
    proxy = bench.proxy()
    bench.start(redis_url=proxy.url, lease_seconds=6)
    bench.start(lease_seconds=6, max_running=2)
    bench.submit(*jobs(40, at="generate", do="sleep", seconds=0.02))
    wait_until(lambda: len(bench.runs()) > 5, "the jobs did not begin")
    proxy.stall()
    time.sleep(1.0)
    proxy.resume()
    assert bench.finish() == {"done": 40}
    assert set(bench.runs().values()) == {1}


def test_a_stall_longer_than_the_lease_leaves_the_jobs_to_others(bench: FaultBench) -> None:
    proxy = bench.proxy()
    bench.start(redis_url=proxy.url)
    bench.submit(*jobs(10, at="generate", do="sleep", seconds=0.1))
    wait_until(lambda: len(bench.runs()) > 1, "the jobs did not begin")
    proxy.stall()
    bench.start()
    assert bench.finish() == {"done": 10}
    before = [result(bench, f"job-{i}") for i in range(10)]
    proxy.resume()
    bench.submit(*jobs(10, "later"))
    assert bench.finish() == {"done": 20}
    assert [result(bench, f"job-{i}") for i in range(10)] == before


def test_a_second_of_latency_slows_the_work_and_loses_none(bench: FaultBench) -> None:
    proxy = bench.proxy()
    bench.start(redis_url=proxy.url, lease_seconds=6)
    proxy.latency = 1.0
    bench.submit(*jobs(20))
    assert bench.finish() == {"done": 20}
    assert set(bench.runs().values()) == {1}


def test_a_queue_works_again_after_flushall(frail: FaultBench) -> None:
    frail.start(max_running=4)
    frail.submit(*jobs(20, "lost", "a", at="generate", do="sleep", seconds=0.02))
    wait_until(lambda: len(frail.runs()) > 3, "the jobs did not begin")
    frail.ledger.flush(frail.redis)
    wait_until(lambda: len(frail.client.adapters()) == 3, "the adapters were not announced again")
    frail.submit(*jobs(10, "new"), *jobs(10, "new-a", "a"))
    assert frail.finish() == {"done": 20}
    assert len(frail.workers.alive) == 1


def test_an_id_that_was_lost_by_flushall_can_be_sent_again_while_it_still_runs(
    frail: FaultBench,
) -> None:
    frail.start()
    frail.submit(*jobs(1, at="generate", do="sleep", seconds=1.0))
    wait_until(lambda: len(frail.runs()) == 1, "the job did not begin")
    frail.ledger.flush(frail.redis)
    frail.submit(*jobs(1, at="generate", do="sleep", seconds=1.0))
    assert frail.finish() == {"done": 1}
    assert frail.runs() == {"job-0": 2}


def test_a_server_whose_memory_is_full_refuses_submissions_and_keeps_results(
    frail: FaultBench,
) -> None:
    frail.start(max_running=4)
    frail.submit(*jobs(40, at="generate", do="sleep", seconds=0.02))
    wait_until(lambda: len(frail.runs()) > 3, "the jobs did not begin")
    frail.redis.config_set("maxmemory", "1")
    with pytest.raises(ServerUnavailable, match="maxmemory"):
        frail.client.submit(jobs(5, "refused"))
    time.sleep(0.5)
    assert len(frail.workers.alive) == 1
    frail.redis.config_set("maxmemory", "0")
    frail.submit(*jobs(5, "later"))
    assert frail.finish() == {"done": 45}


def test_workers_come_and_go_under_load(bench: FaultBench) -> None:
    first = bench.start(max_running=4)
    bench.submit(*jobs(300, at="generate", do="sleep", seconds=0.01), *jobs(60, "b", "b"))
    others = [bench.workers.start(max_running=4) for _ in range(4)]
    wait_until(lambda: len(bench.client.overview().workers) == 5, "the workers did not come up")
    for number, process in enumerate(others):
        process.kill() if number % 2 else process.terminate()
        process.join(PATIENCE)
    assert [process.exitcode for process in others] == [0, -signal.SIGKILL, 0, -signal.SIGKILL]
    assert bench.finish() == {"done": 360}
    assert first.is_alive()
    assert max(bench.runs().values()) <= 3


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_worker_whose_clock_is_an_hour_off_keeps_its_leases(
    bench: FaultBench, hours: int
) -> None:
    wrong = bench.start(clock_offset=3600.0 * hours, max_running=2)
    bench.start(max_running=2)
    bench.submit(*jobs(8, at="generate", do="sleep", seconds=0.5))
    assert bench.finish() == {"done": 8}
    assert set(bench.runs().values()) == {1}, "a lease was lost, or taken too early"
    results = [result(bench, f"job-{i}") for i in range(8)]
    assert any(str(wrong.pid) in (r.worker or "") for r in results)
    for times in (r.timings for r in results):
        assert times.started is not None
        assert times.finished is not None
        assert times.queued - 1 <= times.started <= times.finished <= times.queued + 60


def test_a_cold_job_is_served_beside_a_hot_adapter(bench: FaultBench) -> None:
    bench.start(max_running=4, flags={"max_loras_per_batch": 2})
    hot = bench.submit(*jobs(150, "hot", "a", at="generate", do="sleep", seconds=0.02))
    wait_until(lambda: len(bench.runs()) > 5, "the jobs did not begin")
    cold = bench.submit(*jobs(1, "cold", "b"))
    bench.client.wait(cold, timeout=PATIENCE)
    assert not bench.client.status(hot).is_complete
    assert bench.finish() == {"done": 151}


def test_a_prompt_that_kills_its_process_ends_dead(bench: FaultBench) -> None:
    bench.submit(*jobs(1, "poison", at="generate", do="SIGKILL"))
    deaths = 0
    while not bench.client.status(_only_submission(bench)).is_complete:
        worker = bench.start()
        wait_until(
            lambda worker=worker: (
                not worker.is_alive() or result(bench, "poison-0").status == "dead"
            ),
            "neither did the worker die, nor the job end",
        )
        deaths += not worker.is_alive()
        assert deaths <= 3
    bench.submit(*jobs(10))
    assert bench.finish() == {"dead": 1, "done": 10}
    error = result(bench, "poison-0").error
    assert error is not None
    assert error.code == "attempts_exhausted"


def test_jobs_beside_a_prompt_that_kills_its_process_end_done(bench: FaultBench) -> None:
    bench.submit(*jobs(4, "beside"), *jobs(1, "poison", at="generate", do="SIGKILL"))
    (submission,) = bench.ledger.acknowledged
    for _ in range(12):
        worker = bench.start()
        wait_until(
            lambda worker=worker: (
                not worker.is_alive() or bench.client.status(submission).is_complete
            ),
            "neither did the worker die, nor the jobs end",
        )
        if worker.is_alive():
            break
    assert bench.finish() == {"dead": 1, "done": 4}


def test_an_adapter_that_is_unloaded_by_force_fails_what_waits_and_lets_finish_what_runs(
    bench: FaultBench,
) -> None:
    bench.start(max_running=1)
    bench.submit(*jobs(1, "running", "b", at="generate", do="sleep", seconds=1.0))
    wait_until(lambda: len(bench.runs()) == 1, "the job did not begin")
    bench.submit(*jobs(30, "waiting", "b"), *jobs(5, "others", "a"))
    bench.client.unload_adapter("b", force=True)
    states = bench.finish()
    assert result(bench, "running-0").status == "done"
    assert [result(bench, f"others-{i}").status for i in range(5)] == ["done"] * 5
    assert states["failed"] > 0
    for id_, seen in bench.ledger.results.items():
        if seen.status == "failed":
            assert id_.startswith("waiting-")
            assert seen.error is not None
            assert seen.error.code in ("adapter_unloaded", "unknown_adapter")


def test_sigterm_finishes_what_runs_and_hands_back_the_rest(bench: FaultBench) -> None:
    first = bench.start(max_running=8)
    bench.submit(*jobs(40, at="generate", do="sleep", seconds=0.05))
    wait_until(lambda: len(bench.runs()) > 3, "the jobs did not begin")
    first.terminate()
    first.join(PATIENCE)
    assert first.exitcode == 0
    assert not bench.redis.exists(Keys(bench.queue).leases)
    bench.start()
    assert bench.finish() == {"done": 40}
    assert set(bench.runs().values()) == {1}


def test_a_second_sigterm_hands_back_what_runs_too(bench: FaultBench) -> None:
    first = bench.start()
    bench.submit(*jobs(40, at="generate", do="sleep", seconds=0.05))
    wait_until(lambda: len(bench.runs()) > 3, "the jobs did not begin")
    for _ in range(2):
        first.terminate()
        time.sleep(0.05)
    first.join(PATIENCE)
    assert first.exitcode == 0
    assert not bench.redis.exists(Keys(bench.queue).leases)
    bench.start()
    assert bench.finish() == {"done": 40}


def test_a_client_that_is_killed_while_it_submits_leaves_whole_runs(
    bench: FaultBench, redis_url: str
) -> None:
    """What it had sent is run; the sender is told that not all is known to have been sent."""
    proxy = bench.proxy()
    with Client(proxy.url, bench.queue) as client:
        many = jobs(1200)
        proxy.commands.clear()
        client.submit(["x"])
        bench.ledger.unsure += [r.id for r in bench.client.results(_only_submission(bench))]
        held = proxy.hold("submit", "reply")
        sender = _in_thread(lambda: bench.ledger.submit(client, many))
        held.wait()
        proxy.refuses = True
        proxy.reset()
        sender.join(PATIENCE)
        held.release()
    assert not sender.is_alive()
    assert len(bench.ledger.unsure) == 1201
    bench.start()
    violations = bench.check()
    assert violations == []
    num_stored = len(bench.runs())
    assert 1 < num_stored < 1201


def _in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread
