"""The queue's scripts against a real server."""

from __future__ import annotations

import json
import time
from collections import Counter

import pytest
from redis.client import Pipeline

from broker import queue_reader
from broker.claims import Claim, ClaimRequest, Lease
from broker.job_queue import JobQueue
from broker.outcomes import ConflictError
from broker.queue_reader import QueueReader
from schemas.adapter import AdapterRecord
from schemas.errors import LorryError, ServerUnavailable
from schemas.job import Job
from schemas.keys import GROUP
from schemas.result import Result, Timings
from schemas.worker_state import WorkerState

ADAPTERS = ("a", "b", "c")


def jobs(count: int, lora: str | None = None, prefix: str = "job") -> list[Job]:
    return [Job(id=f"{prefix}-{lora}-{i}", lora=lora, prompt="x") for i in range(count)]


def submit(queue: JobQueue, batch: list[Job], submission: str = "sub") -> None:
    queue.submit(submission, "file", len(batch), 0, batch)


def join(queue: JobQueue, worker: str = "w", adapters: tuple[str, ...] = ADAPTERS) -> None:
    revisions = dict.fromkeys(adapters, "r")
    queue.announce({name: AdapterRecord(source="s", revision="r") for name in adapters})
    state = WorkerState(
        id=worker, model="m", device="cpu", started=0, adapters=revisions, max_loras_per_batch=8
    )
    queue.heartbeat(state, alive_seconds=60)


def claim(
    queue: JobQueue,
    num_jobs: int = 100,
    free_slots: int = 8,
    *,
    worker: str = "w",
    lease_seconds: float = 60,
    in_use: tuple[str, ...] = (),
    draining: tuple[str, ...] = (),
) -> list[Claim]:
    request = ClaimRequest(num_jobs, free_slots, in_use, draining)
    return queue.claim(worker, request, lease_seconds=lease_seconds, patience=60).jobs


def suspect(queue: JobQueue, worker: str = "w") -> Claim:
    """The next job that is to run alone."""
    claim = queue.claim_suspect(worker, lease_seconds=60)
    assert claim is not None
    return claim


def result(job: Claim, text: str = "answer") -> Result:
    return Result(
        id=job.lease.job_id,
        submission=job.submission,
        lora=job.adapter,
        status="done",
        text=text,
        timings=Timings(queued=job.queued),
    )


def keys_left(queue: JobQueue) -> set[str]:
    """What a queue at rest must not hold: waiting or running work."""
    names = queue.client.scan_iter(match=queue.keys.prefix + "*")
    kinds = {name.removeprefix(queue.keys.prefix).split(":")[0] for name in names}
    return kinds & {"stream", "ready", "leases", "suspects", "delayed"}


def test_a_run_sent_twice_is_stored_once(queue: JobQueue, reader: QueueReader) -> None:
    submit(queue, jobs(3))
    submit(queue, jobs(3))
    assert reader.submission("sub").counts["waiting"] == 3
    assert queue.client.xlen(queue.keys.stream(None, "normal", "sub")) == 3


def test_an_id_with_other_content_is_refused_and_nothing_of_the_run_is_stored(
    queue: JobQueue, reader: QueueReader
) -> None:
    submit(queue, [Job(id="taken", prompt="x")])
    run = [Job(id="new", prompt="x"), Job(id="taken", prompt="y")]
    with pytest.raises(ConflictError) as conflict:
        submit(queue, run, "other")
    assert conflict.value.indices == [1]
    assert list(reader.payloads(["new"])) == [None]


def test_two_jobs_of_one_run_that_share_an_id_conflict_unless_they_are_equal(
    queue: JobQueue, reader: QueueReader
) -> None:
    with pytest.raises(ConflictError):
        submit(queue, [Job(id="same", prompt="x"), Job(id="same", prompt="y")])
    submit(queue, [Job(id="same", prompt="x"), Job(id="same", prompt="x")])
    assert reader.submission("sub").counts["waiting"] == 2
    assert queue.client.xlen(queue.keys.stream(None, "normal", "sub")) == 1


def test_large_results_are_committed_by_several_scripts(queue: JobQueue) -> None:
    def num_scripts() -> int:
        return int(queue.client.info("commandstats")["cmdstat_evalsha"]["calls"])

    join(queue)
    submit(queue, jobs(20))
    results = [(job.lease, result(job, "x" * 2**21)) for job in claim(queue)]
    queue.commit("w", results[:1])
    before = num_scripts()
    assert queue.commit("w", results) == [True] * 20
    assert num_scripts() == before + 3  # 40 MiB, of which one takes 16.


def test_a_job_sent_by_two_submissions_runs_once_and_counts_in_both(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(1), "first")
    submit(queue, jobs(1), "second")
    claims = claim(queue)
    assert len(claims) == 1
    queue.commit("w", [(claims[0].lease, result(claims[0]))])
    submit(queue, jobs(1), "third")
    for submission in ("first", "second", "third"):
        assert reader.submission(submission).counts["done"] == 1
        (finished,) = reader.finished({submission: "0"})
        assert finished.job_ids == ["job-None-0"]


def test_a_run_that_does_not_follow_on_is_refused(queue: JobQueue) -> None:
    with pytest.raises(ServerUnavailable, match="it holds 0 of sub, not 5"):
        queue.submit("sub", "file", 10, 5, jobs(5))


def test_claims_never_name_more_new_adapters_than_slots_are_free(queue: JobQueue) -> None:
    join(queue)
    for name in ADAPTERS:
        submit(queue, jobs(2, name), f"sub-{name}")
    assert {job.adapter for job in claim(queue, free_slots=2)} == {"a", "b"}
    assert claim(queue, free_slots=0, in_use=("a", "b")) == []
    assert {job.adapter for job in claim(queue, free_slots=1, in_use=("a", "b"))} == {"c"}


def test_the_base_model_needs_no_slot(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(1))
    assert [job.adapter for job in claim(queue, free_slots=0)] == [None]


def test_a_small_claim_is_shared_among_the_adapters_in_turn(queue: JobQueue) -> None:
    join(queue)
    for name, count in (("a", 30), ("b", 10), ("c", 10)):
        submit(queue, jobs(count, name), f"sub-{name}")
    # By lot the one with the most waiting jobs takes its turn too.
    claimed = Counter(job.adapter for job in claim(queue, 6, in_use=ADAPTERS))
    assert claimed in ({"b": 3, "c": 3}, {"a": 2, "b": 2, "c": 2})


def test_what_the_others_leave_goes_to_the_adapter_with_more_waiting_jobs(queue: JobQueue) -> None:
    join(queue)
    for name, count in (("a", 10), ("b", 3), ("c", 1)):
        submit(queue, jobs(count, name), f"sub-{name}")
    assert Counter(job.adapter for job in claim(queue, 8)) == {"a": 4, "b": 3, "c": 1}


def test_a_large_backlog_goes_on_beside_a_small_one_that_never_ends(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(400, "a"))
    served: Counter[str | None] = Counter()
    for number in range(100):
        steady = [job.model_copy(update={"id": f"{number}-{job.id}"}) for job in jobs(2, "b")]
        submit(queue, steady, f"sub-{number}")
        served.update(job.adapter for job in claim(queue, 2, in_use=ADAPTERS))
    # By lot it takes its turn 25 times of 100; less than 5 comes once in ten million.
    assert served["a"] >= 5
    assert served["b"] >= 100


def test_the_adapter_with_the_most_waiting_jobs_is_not_passed_over_beyond_the_patience(
    queue: JobQueue,
) -> None:
    join(queue)
    submit(queue, jobs(10, "a"))
    time.sleep(0.05)
    submit(queue, jobs(3, "b"), "sub-b")
    request = ClaimRequest(2, 8, in_use=[])
    claims = queue.claim("w", request, lease_seconds=60, patience=0.04)
    assert [job.adapter for job in claims.jobs] == ["a", "b"]


def test_one_slot_is_for_the_most_waiting_jobs_and_the_others_for_the_fewest(
    queue: JobQueue,
) -> None:
    join(queue, adapters=("a", "b", "c", "d"))
    for name, count in (("a", 4), ("b", 9), ("c", 2), ("d", 1)):
        submit(queue, jobs(count, name), f"sub-{name}")
    assert {job.adapter for job in claim(queue, 20, free_slots=1)} == {"b"}
    assert {job.adapter for job in claim(queue, 20, free_slots=2)} == {"a", "d"}


def test_jobs_in_flight_do_not_count_as_waiting(queue: JobQueue) -> None:
    join(queue)
    join(queue, "other")
    submit(queue, jobs(10, "a"))
    claim(queue, 8, worker="other")
    claim(queue, 2)
    submit(queue, jobs(5, "a", "more"), "sub-more")
    submit(queue, jobs(6, "b"), "sub-b")
    assert {job.adapter for job in claim(queue, 20, free_slots=1)} == {"b"}


def test_a_claim_takes_all_of_one_adapter_when_no_other_has_work(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(10, "a"))
    submit(queue, jobs(1, "b"), "sub-b")
    assert len(claim(queue, 11)) == 11


def test_an_adapter_that_only_another_worker_has_is_left_to_it(queue: JobQueue) -> None:
    join(queue, "w", ("a",))
    join(queue, "other", ("b",))
    submit(queue, jobs(1, "b"))
    assert claim(queue) == []
    assert len(claim(queue, worker="other")) == 1


def test_an_adapter_that_the_queue_does_not_know_is_claimed_so_that_its_jobs_fail(
    queue: JobQueue,
) -> None:
    join(queue, "w", ("a",))
    submit(queue, jobs(1, "nobody-has-it"))
    assert len(claim(queue, free_slots=0)) == 1


def test_an_adapter_that_finds_no_slot_is_reported_once_its_patience_is_over(
    queue: JobQueue,
) -> None:
    join(queue)
    submit(queue, jobs(1, "b"))
    request = ClaimRequest(10, 0, in_use=["a"])
    assert queue.claim("w", request, lease_seconds=60, patience=60).starving is None
    time.sleep(0.05)
    assert queue.claim("w", request, lease_seconds=60, patience=0.02).starving == "b"


def test_a_starving_adapter_gets_the_next_slot_before_one_whose_weights_are_loaded(
    queue: JobQueue,
) -> None:
    join(queue)
    submit(queue, jobs(1, "b"))
    time.sleep(0.05)
    submit(queue, jobs(1, "a"), "sub-a")
    request = ClaimRequest(10, 1, in_use=[], resident=["a"])
    claims = queue.claim("w", request, lease_seconds=60, patience=0.04)
    assert [job.adapter for job in claims.jobs] == ["b"]
    assert claims.starving is None


def test_of_equal_adapters_one_whose_weights_are_loaded_gets_the_slot(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(1, "b"))
    submit(queue, jobs(1, "a"), "sub-a")
    submit(queue, jobs(2), "sub-base")
    request = ClaimRequest(10, 1, in_use=[], resident=["a"])
    claims = queue.claim("w", request, lease_seconds=60, patience=60)
    assert {job.adapter for job in claims.jobs} == {None, "a"}


def test_a_draining_adapter_gets_no_jobs(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(1, "a"))
    assert claim(queue, in_use=("a",), draining=("a",)) == []


def test_a_committed_job_leaves_nothing_behind_but_its_result(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(2, "a"))
    claims = claim(queue)
    assert queue.commit("w", [(job.lease, result(job)) for job in claims]) == [True, True]
    assert [r.text for r in reader.results(reader.job_ids("sub"))] == ["answer", "answer"]
    assert claim(queue) == []
    assert keys_left(queue) == set()


def test_only_the_first_result_of_a_job_is_recorded(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    submit(queue, jobs(1))
    (job,) = claim(queue)
    outcomes = [(job.lease, result(job, "first")), (job.lease, result(job, "second"))]
    assert queue.commit("w", outcomes) == [True, False]
    assert next(reader.results([job.lease.job_id])).text == "first"


def test_a_commit_whose_reply_was_lost_may_be_repeated(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(1))
    (job,) = claim(queue)
    assert queue.commit("w", [(job.lease, result(job))]) == [True]
    assert queue.commit("w", [(job.lease, result(job))]) == [True]


def test_a_worker_that_lost_its_lease_cannot_commit(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    submit(queue, jobs(1))
    (stalled,) = claim(queue, worker="stalled", lease_seconds=0.01)
    time.sleep(0.02)
    assert queue.sweep() == (1, 0, 0)
    assert queue.commit("stalled", [(stalled.lease, result(stalled, "late"))]) == [False]
    again = suspect(queue)
    assert again.attempts == 2
    assert queue.commit("stalled", [(stalled.lease, result(stalled, "later"))]) == [False]
    assert queue.commit("w", [(again.lease, result(again))]) == [True]
    assert reader.submission("sub").counts["done"] == 1
    assert keys_left(queue) == set()


def test_a_worker_does_not_pass_for_its_former_self(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(1))
    (first,) = claim(queue, lease_seconds=0.01)
    time.sleep(0.02)
    queue.sweep()
    second = suspect(queue)
    assert first.lease != second.lease
    assert queue.commit("w", [(first.lease, result(first))]) == [False]


def test_a_renewed_lease_is_not_swept(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(1))
    (job,) = claim(queue, lease_seconds=0.05)
    assert queue.renew("w", [job.lease], lease_seconds=60) == set()
    time.sleep(0.06)
    assert queue.sweep() == (0, 0, 0)


def test_renewal_names_the_leases_that_are_no_longer_held(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(2))
    mine, foreign = claim(queue)
    leases = [mine.lease, Lease(foreign.lease.job_id, 1)]
    assert queue.renew("w", leases, lease_seconds=60) == {leases[1]}


def test_a_job_handed_back_waits_again_without_having_used_an_attempt(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(1, "a"))
    (job,) = claim(queue)
    assert queue.release("w", [job.lease]) == 1
    assert queue.release("w", [job.lease]) == 0
    assert reader.submission("sub").counts["waiting"] == 1
    (waiting,) = reader.results([job.lease.job_id])
    assert waiting.timings.started is None
    assert waiting.worker is None
    (again,) = claim(queue)
    assert again.attempts == 1


def test_a_job_whose_workers_die_is_given_up_after_its_attempts(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(1, "a"))
    claim(queue, lease_seconds=0.01)
    for outcome in ((1, 0, 0), (1, 0, 0), (0, 1, 0)):
        time.sleep(0.02)
        assert queue.sweep() == outcome
        queue.claim_suspect("w", lease_seconds=0.01)
    (dead,) = reader.results(reader.job_ids("sub"))
    assert dead.status == "dead"
    assert dead.error is not None
    assert dead.error.code == "attempts_exhausted"
    assert queue.client.xlen(queue.keys.dead) == 1
    assert reader.submission("sub").is_complete
    assert keys_left(queue) == set()


def test_a_job_that_is_handed_back_after_failures_is_given_up_after_its_attempts(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(1, "a"))
    for outcome in ((1, 0), (1, 0), (0, 1)):
        (job,) = claim(queue)
        assert (
            queue.retry("w", [job.lease], outcome="engine_failed", message="x", alone=False)
            == outcome
        )
    (dead,) = reader.results(reader.job_ids("sub"))
    assert dead.status == "dead"
    assert dead.error is not None
    assert dead.error.code == "attempts_exhausted"
    assert queue.client.xlen(queue.keys.dead) == 1
    assert keys_left(queue) == set()


def test_a_deleted_job_fails_so_that_its_submission_ends(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(3))
    queue.client.delete(queue.keys.job("job-None-1"))
    claimed = claim(queue)
    assert [job.lease.job_id for job in claimed] == ["job-None-0", "job-None-2"]
    (found,) = reader.results(["job-None-1"])
    assert found.error
    assert found.error.message == "the stored job is damaged: it was deleted"
    assert queue.commit("w", [(job.lease, result(job)) for job in claimed]) == [True, True]
    assert reader.submission("sub").is_complete
    assert keys_left(queue) == set()


def test_a_submission_that_was_deleted_while_its_jobs_ran_is_told_of_in_a_sentence(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(2))
    submit(queue, jobs(1, prefix="other"), "other")
    first, *_ = claim(queue)
    queue.client.delete(queue.keys.submission("sub"))
    queue.commit("w", [(first.lease, result(first))])
    with pytest.raises(LorryError, match="The record of submission 'sub' is damaged: "):
        reader.submission("sub")
    assert [status.id for status in reader.submissions(20)] == ["other"]


def test_a_record_that_is_damaged_while_its_job_runs_keeps_no_other_from_being_recorded(
    queue: JobQueue,
) -> None:
    join(queue)
    submit(queue, jobs(4))
    claimed = claim(queue)
    queue.client.hdel(queue.keys.job("job-None-0"), "submissions")
    queue.client.delete(queue.keys.job("job-None-1"))
    queue.client.set(queue.keys.job("job-None-2"), "no hash")
    recorded = queue.commit("w", [(job.lease, result(job)) for job in claimed])
    assert recorded == [False, False, False, True]


def test_a_worker_goes_on_after_flushall(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(1))
    claim(queue)
    for name in queue.client.scan_iter(match=queue.keys.prefix + "*"):
        queue.client.delete(name)
    join(queue)
    submit(queue, jobs(1), "again")
    assert len(claim(queue)) == 1


def test_jobs_of_more_unknown_adapters_than_lua_has_room_for_are_claimed_as_any(
    queue: JobQueue,
) -> None:
    join(queue)
    batch = [Job(id=f"job-{i}", lora=f"nobody-has-{i}", prompt="x") for i in range(9000)]
    for start in range(0, len(batch), 500):
        queue.submit("sub", "file", len(batch), start, batch[start : start + 500])
    assert len(claim(queue, 16)) == 16


def test_a_silent_worker_drops_off_the_list(queue: JobQueue, reader: QueueReader) -> None:
    state = WorkerState(
        id="silent", model="m", device="cpu", started=0, adapters={}, max_loras_per_batch=8
    )
    queue.heartbeat(state, alive_seconds=0.02)
    assert [worker.id for worker in reader.workers()] == ["silent"]
    time.sleep(0.03)
    assert reader.workers() == []


@pytest.mark.parametrize("damage", ["nothing", "deleted", "replaced", "of its state"])
def test_a_heartbeat_writes_the_names_of_a_workers_adapters_where_they_are_not_noted(
    queue: JobQueue, damage: str
) -> None:
    noted, worker = f"{queue.keys.worker('w')}:adapters", queue.keys.worker("w")
    join(queue, adapters=("a", "b"))
    if damage == "deleted":
        queue.client.delete(noted)
    elif damage == "replaced":
        queue.client.set(noted, "x")
    elif damage == "of its state":
        queue.client.delete(worker)
    join(queue, adapters=("a", "b"))
    assert queue.client.smembers(noted) == {"a", "b"}
    assert 0 < queue.client.pttl(noted) <= 60_000
    join(queue, adapters=("b", "c"))
    assert queue.client.smembers(noted) == {"b", "c"}
    join(queue, adapters=())
    assert queue.client.exists(noted) == 0


def test_the_version_of_the_desired_state_rises_only_with_a_change(queue: JobQueue) -> None:
    record = {"a": AdapterRecord(source="s", revision="1")}
    assert queue.announce({}) == 1
    assert queue.announce(record) == 2
    assert queue.announce(record) == 2
    assert queue.announce({"a": AdapterRecord(source="s", revision="2")}) == 3


def test_a_damaged_record_is_an_error_that_names_it(queue: JobQueue) -> None:
    reader = QueueReader(queue.client, queue.name)
    join(queue, "w", ("a",))
    queue.client.hset(queue.keys.adapters, "a", '{"source": 7}')
    with pytest.raises(LorryError, match="The record of adapter 'a' is damaged: source: "):
        reader.adapters()
    queue.client.hset(queue.keys.worker("w"), "state", "[]")
    with pytest.raises(LorryError, match="The state of a worker is damaged"):
        reader.workers()
    submit(queue, jobs(1, "a"))
    queue.client.hset(queue.keys.job("job-a-0"), "result", '{"id": "job-a-0"}')
    (found,) = reader.results(["job-a-0"])
    assert found.error
    assert found.error.code == "bad_record"
    assert found.error.message.startswith("The result of job 'job-a-0' is damaged: submission: ")


def lose_reply(queue: JobQueue, worker: str = "w", num_jobs: int = 100) -> None:
    """A claim that reaches the server, and whose reply does not reach the worker."""
    number = queue._claim_number
    claim(queue, num_jobs, worker=worker)
    queue._claim_number = number


def test_a_claim_whose_reply_was_lost_is_given_its_jobs_again_and_no_others(
    queue: JobQueue,
) -> None:
    join(queue)
    submit(queue, jobs(5))
    lose_reply(queue, num_jobs=3)
    again = claim(queue, 1, lease_seconds=600)
    assert [(job.lease.job_id, job.attempts) for job in again] == [
        *(("job-None-0", 1), ("job-None-1", 1), ("job-None-2", 1)),
    ]
    now = queue.client.time()[0]
    assert queue.client.zscore(queue.keys.leases, "job-None-0") > 1000 * (now + 500)
    assert queue.commit("w", [(job.lease, result(job)) for job in again]) == [True] * 3
    assert len(claim(queue)) == 2


def test_a_claim_that_comes_late_brings_nothing(queue: JobQueue) -> None:
    """The server was stopped, the worker asked again, and both commands reach it in turn."""
    join(queue)
    submit(queue, jobs(5))
    late = queue._claim_number
    claim(queue, 2)
    next_one = queue._claim_number
    queue._claim_number = late - 1
    assert claim(queue, 2) == []
    queue._claim_number = next_one
    assert len(claim(queue)) == 3


def test_a_repeated_claim_brings_back_only_what_the_worker_still_holds(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(2))
    lose_reply(queue)
    queue.client.zadd(queue.keys.leases, {"job-None-0": 1})
    queue.sweep()
    assert [job.lease.job_id for job in claim(queue)] == ["job-None-1"]


def test_jobs_of_a_lost_reply_are_not_renewed_and_wait_again_when_the_worker_leaves(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(3))
    (seen,) = claim(queue, 1)
    lose_reply(queue)
    before = queue.client.zscore(queue.keys.leases, "job-None-1")
    assert queue.renew("w", [seen.lease], lease_seconds=600) == set()
    assert queue.client.zscore(queue.keys.leases, "job-None-1") == before
    queue.leave("w")
    assert reader.submission("sub").counts["running"] == 1
    assert [(job.lease.job_id, job.attempts) for job in claim(queue, worker="other")] == [
        *(("job-None-1", 1), ("job-None-2", 1)),
    ]


def test_workers_that_come_and_go_leave_no_consumer_behind(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(9))
    for number in range(4):
        (job,) = claim(queue, 1, worker=f"w{number}")
        queue.commit(f"w{number}", [(job.lease, result(job))])
        queue.leave(f"w{number}")
    assert len(queue.client.xinfo_consumers(queue.keys.stream(None, "normal", "sub"), GROUP)) == 1
    assert not list(queue.client.scan_iter(match=queue.keys.claim("*")))


def make_suspects(queue: JobQueue, num_jobs: int = 100, worker: str = "dead") -> None:
    """A worker claims jobs and is never heard of again."""
    join(queue, worker)
    claim(queue, num_jobs, worker=worker, lease_seconds=0.01)
    time.sleep(0.02)
    queue.sweep()


def history(queue: JobQueue, job_id: str) -> list[dict[str, object]]:
    lines = queue.client.hget(queue.keys.job(job_id), "history")
    return [json.loads(line) for line in lines.splitlines()]


def test_jobs_of_a_worker_that_died_are_given_one_at_a_time_to_workers_that_hold_nothing_else(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    join(queue, "other")
    submit(queue, jobs(2, "a"))
    make_suspects(queue)
    assert reader.submission("sub").counts["waiting"] == 2
    assert claim(queue) == []
    assert queue.client.xlen(queue.keys.stream("a", "normal", "sub")) == 2
    first, second = suspect(queue), suspect(queue, "other")
    assert {first.lease.job_id, second.lease.job_id} == {"job-a-0", "job-a-1"}
    assert queue.claim_suspect("w", lease_seconds=60) is None
    for job, worker in ((first, "w"), (second, "other")):
        assert queue.commit(worker, [(job.lease, result(job))]) == [True]
    assert keys_left(queue) == set()


def test_a_claim_tells_how_long_the_first_suspect_for_this_worker_waits(queue: JobQueue) -> None:
    join(queue, "w", ("a",))
    join(queue, "other", ("b",))
    submit(queue, jobs(1, "b"))
    make_suspects(queue)
    time.sleep(0.02)
    request = ClaimRequest(10, 8, in_use=[])
    found = {
        worker: queue.claim(worker, request, lease_seconds=60, patience=60).suspect_waits
        for worker in ("w", "other")
    }
    assert found["w"] is None
    assert found["other"] is not None
    assert found["other"] >= 0.02
    assert queue.claim_suspect("w", lease_seconds=60) is None


def test_a_suspect_that_is_handed_back_or_whose_claim_lost_its_reply_stays_one(
    queue: JobQueue,
) -> None:
    join(queue)
    submit(queue, jobs(1))
    make_suspects(queue)
    number = queue._claim_number
    suspect(queue)
    queue._claim_number = number
    again = suspect(queue)
    assert again.attempts == 2
    queue.release("w", [again.lease])
    assert claim(queue) == []
    assert suspect(queue).attempts == 2


def test_no_more_busy_workers_make_themselves_free_than_there_are_suspects(
    queue: JobQueue,
) -> None:
    for worker in ("w", "x", "y"):
        join(queue, worker)
    submit(queue, jobs(2))
    make_suspects(queue)
    assert not queue.reserve_suspect("w", patience=60)
    long_ago = dict.fromkeys(("job-None-0", "job-None-1"), 1)
    queue.client.zadd(queue.keys.suspects, long_ago)
    reserved = [queue.reserve_suspect(worker, patience=60) for worker in ("w", "x", "y")]
    assert reserved == [True, True, False]
    for job_id in long_ago:  # Those two have not come.
        queue.client.hset(queue.keys.job(job_id), "reserved", "1 w")
    assert queue.reserve_suspect("y", patience=60)
    assert len({suspect(queue).lease.job_id for _ in range(2)}) == 2


def test_a_suspect_that_a_worker_reserved_before_it_died_is_free(queue: JobQueue) -> None:
    for worker in ("w", "x"):
        join(queue, worker)
    submit(queue, jobs(1))
    make_suspects(queue)
    queue.client.zadd(queue.keys.suspects, {"job-None-0": 1})
    assert queue.reserve_suspect("w", patience=60)
    assert not queue.reserve_suspect("x", patience=60)
    queue.client.delete(queue.keys.worker("w"))  # As it expires when a worker is silent.
    assert queue.reserve_suspect("x", patience=60)


def test_a_suspect_is_not_overtaken_again_and_again_by_those_that_come_later(
    queue: JobQueue,
) -> None:
    join(queue)
    submit(queue, jobs(3))
    make_suspects(queue)
    first, *later = (f"job-None-{i}" for i in range(3))
    queue.client.zadd(queue.keys.suspects, {first: 1} | dict.fromkeys(later, 2))
    assert queue.reserve_suspect("w", patience=60)
    claimed = suspect(queue)
    assert claimed.lease.job_id == first
    assert not queue.client.hexists(queue.keys.job(first), "reserved")


def test_a_suspect_of_a_lost_reply_does_not_come_among_other_jobs(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(1))
    make_suspects(queue)
    submit(queue, jobs(1, "a"), "sub-a")
    number = queue._claim_number
    suspect(queue)
    queue._claim_number = number
    assert claim(queue) == []
    assert [job.lease.job_id for job in claim(queue)] == ["job-a-0"]
    assert suspect(queue, "other").attempts == 2


def test_the_history_of_a_job_tells_how_each_attempt_ended(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(1))
    make_suspects(queue)
    job = suspect(queue)
    queue.retry("w", [job.lease], outcome="adapter_unavailable", message="gone", alone=False)
    found = history(queue, "job-None-0")
    assert [(line["attempt"], line["worker"], line["outcome"]) for line in found] == [
        (1, "dead", "lease_expired"),
        (2, "w", "adapter_unavailable"),
    ]
    assert found[1]["message"] == "gone"
    assert found[0]["started"] < found[0]["ended"] <= found[1]["started"]  # type: ignore[operator]


@pytest.mark.parametrize("alone", [False, True])
def test_a_delayed_job_waits_until_its_time_and_the_next_sweep(
    queue: JobQueue, reader: QueueReader, alone: bool
) -> None:
    join(queue)
    submit(queue, jobs(1, "a"))
    (job,) = claim(queue)
    retried = queue.retry(
        "w", [job.lease], outcome="out_of_memory", message="x", alone=alone, delay=60
    )
    assert retried == (1, 0)
    request = ClaimRequest(10, 8, in_use=[])
    claims = queue.claim("w", request, lease_seconds=60, patience=60)
    assert (claims.jobs, claims.num_delayed) == ([], 1)
    assert queue.sweep() == (0, 0, 0)
    assert queue.claim_suspect("w", lease_seconds=60) is None
    assert reader.submission("sub").counts["waiting"] == 1
    queue.client.zadd(queue.keys.delayed, {job.lease.job_id: 1})
    queue.sweep()
    again = suspect(queue) if alone else claim(queue)[0]
    assert again.attempts == 2
    assert queue.commit("w", [(again.lease, result(again))]) == [True]
    assert keys_left(queue) == set()


def test_all_workers_follow_the_queues_number_of_attempts(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(2))
    assert queue.set_max_attempts(1) == 3
    assert queue.set_max_attempts(1) == 1
    first, _ = claim(queue, lease_seconds=0.01)
    assert queue.retry(
        "w", [first.lease], outcome="out_of_memory", message="too big", alone=True
    ) == (0, 1)
    time.sleep(0.02)
    assert queue.sweep() == (0, 1, 0)
    codes = [r.error.code for r in reader.results(reader.job_ids("sub")) if r.error]
    assert codes == ["out_of_memory", "attempts_exhausted"]


def test_unloading_by_force_fails_suspects_and_delayed_jobs_too(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(3, "a"))
    submit(queue, jobs(1, "b"), "sub-b")
    make_suspects(queue, 4)
    job = suspect(queue)
    queue.retry("w", [job.lease], outcome="x", message="x", alone=False, delay=60)
    queue.unload_adapter("a", "force")
    assert queue.retire_adapter("a") is True
    assert reader.submission("sub").counts["failed"] == 3
    assert suspect(queue).lease.job_id == "job-b-0"


def test_suspects_and_delayed_jobs_whose_records_were_deleted_stop_nobody(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(3))
    make_suspects(queue)
    job = suspect(queue)
    queue.retry("w", [job.lease], outcome="x", message="x", alone=False, delay=0.01)
    queue.client.delete(queue.keys.job(job.lease.job_id), queue.keys.job("job-None-1"))
    time.sleep(0.02)
    assert queue.sweep() == (0, 0, 0)
    assert suspect(queue).lease.job_id == "job-None-2"
    assert queue.client.zcard(queue.keys.suspects) + queue.client.zcard(queue.keys.delayed) == 0


@pytest.mark.parametrize("text", ["x", "1.5", ""])
def test_a_damaged_version_of_the_desired_state_is_an_error_with_its_remedy(
    queue: JobQueue, text: str
) -> None:
    queue.client.set(queue.keys.adapters_version, text)
    with pytest.raises(LorryError, match=r"desired state is damaged: .* Set the key"):
        queue.desired_state()


def test_a_claim_brings_no_more_bytes_than_a_worker_shall_hold_at_once(queue: JobQueue) -> None:
    join(queue)
    large = [Job(id=f"job-{i}", prompt="x" * 3_000_000) for i in range(20)]
    for first in range(0, 20, 5):
        queue.submit("sub", "file", 20, first, large[first : first + 5])
    claims = [claim(queue, 20) for _ in range(4)]
    assert [len(found) for found in claims] == [8, 8, 4, 0]
    assert [job.lease.job_id for found in claims for job in found] == [job.id for job in large]


def test_results_are_read_in_parts_of_bounded_bytes(
    queue: JobQueue, reader: QueueReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    join(queue)
    submit(queue, jobs(30))
    claims = claim(queue)
    # The last ten run on.
    queue.commit("w", [(job.lease, result(job, "x" * 1000)) for job in claims[:20]])
    ids = list(reader.job_ids("sub"))
    expected = list(reader.results(ids))
    sizes = []
    make_pipeline = reader.client.pipeline

    def measured_pipeline(**settings: bool) -> Pipeline:
        pipeline = make_pipeline(**settings)
        execute = pipeline.execute

        def measured_execute(**settings: bool) -> list[object]:
            replies = execute(**settings)
            sizes.append(len(str(replies)))
            return replies

        pipeline.execute = measured_execute
        return pipeline

    monkeypatch.setattr(reader.client, "pipeline", measured_pipeline)
    monkeypatch.setattr(queue_reader, "READ_BYTES", 5_000)
    assert list(reader.results(ids)) == expected
    assert max(sizes) < 10_000 < sum(sizes)
    assert [result.status for result in expected] == ["done"] * 20 + ["running"] * 10
