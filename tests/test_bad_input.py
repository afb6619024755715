"""Random and hostile records: nothing crashes, nothing is lost, each ends with a reason."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fault_bench import FaultBench, jobs
from benchmarks.waiting import PATIENCE, wait_until
from broker.claims import Claim, Lease
from broker.dead_letters import DeadLetters
from broker.job_queue import JobQueue
from broker.outcomes import Limits, Size
from broker.queue_reader import QueueReader
from producer.client import Client
from producer.lines import parse_line
from schemas.errors import BadInput, JobError, LorryError
from schemas.job import Job
from schemas.keys import BASE, DEFAULT_MAX_ATTEMPTS, Keys
from schemas.result import TERMINAL_STATES
from tests.test_job_queue import claim, join, result
from worker.adapters.peft_config import CONFIG_FILE, PeftConfig, read_config
from worker.claimer import _job_of
from worker.reasons import kept

#: Much more than a stack holds.
DEEP = 100_000

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)

field_names = st.sampled_from([*Job.model_fields, "role", "content", "fault", "v", ""])

#: Records that look like jobs: their fields, with any values.
job_like = st.dictionaries(field_names, json_values, max_size=5)

#: Jobs of which one field has any value.
almost_jobs = st.builds(
    lambda name, value: {"id": "x", "prompt": "x", "max_tokens": 1} | {name: value},
    field_names,
    json_values,
)

hostile = st.sampled_from(
    [
        b"",
        b"\x00",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"1e999",
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b'{"id":"x","prompt":"x","metadata":' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"id":"x","prompt":"' + b"x" * 5_000_000 + b'"}',
        b'{"id":"x","prompt":"\xff"}',
        b'{"id":"x","prompt":"\\ud800"}',
        b'{"id":"x","prompt":"x","metadata":NaN}',
        b'{"id":"x","prompt":"x","metadata":{"fault":' + b"9" * 5000 + b"}}",
        b'{"id":"x","prompt":"x","seed":1e308}',
        b'{"id":"x","id":"y","prompt":"x"}',
        b'{"__reduce__":["os.system",["false"]]}',
        b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    ]
)

records = (
    st.binary(max_size=200)
    | hostile
    | (json_values | job_like | almost_jobs).map(lambda value: json.dumps(value).encode())
)


@given(records)
@settings(deadline=None)
def test_a_line_is_a_job_that_a_worker_reads_or_is_refused_with_a_reason(line: bytes) -> None:
    try:
        job = parse_line(line, made_id="made")
    except BadInput as error:
        reason = str(error)
    else:
        assert Job.from_wire(job.to_wire()) == job
        return
    assert 0 < len(reason) < 2000, "a person reads it"


@given(records)
@settings(deadline=None)
def test_a_stored_job_is_read_or_fails_with_a_reason(payload: bytes) -> None:
    text = payload.decode(errors="replace")  # As a connection reads it.
    claim = Claim(Lease("x", "1-1"), None, text, 1, "s", 0.0, 0.0, 0.0)
    try:
        found: Job | str = _job_of(claim)
    except JobError as error:
        found = f"{error.code}: {error.message}"
    assert isinstance(found, Job) or found.startswith("bad_record: the stored job is damaged: ")


#: As Python reads it from JSON: halves of characters too, and numbers that no float holds.
any_text = st.text(st.characters(exclude_categories=()), max_size=8)
config_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)

#: Configs that would be served, but for some settings.
almost_configs = st.builds(
    lambda changes: {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "x"} | changes,
    st.dictionaries(
        st.sampled_from([*PeftConfig.model_fields, "init_lora_weights", "task_type"]) | any_text,
        config_values,
        max_size=3,
    ),
)

hostile_configs = st.sampled_from(
    [
        b'{"peft_type":"\\ud800"}',
        b'{"peft_type":"\xed\xa0\x80"}',
        b'{"\\udfff":1}',
        b'{"peft_type":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"peft_type":"' + b"x" * 3_000_000 + b'"}',
    ]
)

configs = (
    st.binary(max_size=200)
    | hostile
    | hostile_configs
    | (almost_configs | config_values).map(lambda value: json.dumps(value).encode())
)


@given(configs)
@settings(deadline=None)
def test_an_adapters_config_is_read_or_refused_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder, module = tmp_path_factory.getbasetemp(), "model.layers.0.mlp.up_proj"
    (folder / CONFIG_FILE).write_bytes(content)
    try:
        config = read_config(folder, [module])
    except BadInput as error:
        reason = kept(str(error))
    else:
        assert config.scaling_of(module) < float("inf")
        return
    assert 0 < len(reason) <= 500, "a person reads it"
    assert reason.encode().decode().isprintable()


@pytest.fixture(scope="module")
def bench(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultBench]:
    """A worker that must survive all tests of this module."""
    with FaultBench(redis_url, "bad-input", tmp_path_factory.mktemp("bench")) as bench:
        bench.start()
        yield bench


@pytest.fixture
def survivor(bench: FaultBench) -> Iterator[FaultBench]:
    """The bench; in the end its worker is the same, and works."""
    (worker,) = bench.workers.processes
    yield bench
    submission = bench.client.submit(["x"])
    assert bench.client.wait(submission, timeout=PATIENCE).counts["done"] == 1  # type: ignore[union-attr]
    assert worker.is_alive()


_numbers = count()


def submit_raw(bench: FaultBench, payloads: list[bytes], adapter: str | bytes = BASE) -> list[str]:
    """Send records by the script alone, as a program in another language may; their ids."""
    number = next(_numbers)
    ids = [f"raw-{number}-{i}" for i in range(len(payloads))]
    fields: list[Any] = []
    for id_, payload in zip(ids, payloads, strict=True):
        fields += [id_, adapter, "normal", "", payload, ""]
    queue = JobQueue(bench.redis, bench.queue)
    queue._run("submit", f"raw-{number}", "raw", len(payloads), 0, 60_000, 0, 0, "", *fields)
    return ids


def states(bench: FaultBench, ids: list[str]) -> list[str | None]:
    keys = Keys(bench.queue)
    return [bench.redis.hget(keys.job(id_), "state") for id_ in ids]  # type: ignore[misc]


def wait_for_reasons(bench: FaultBench, ids: list[str]) -> None:
    """All jobs end; those that are not done say why."""
    wait_until(lambda: TERMINAL_STATES.issuperset(states(bench, ids)), "jobs do not end")
    for found in bench.client.results(*ids):
        assert found.status == "done" or found.error, found
        assert found.status == "done" or found.error.message


over_the_wire = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(payloads=st.lists(records, min_size=1, max_size=8))
@over_the_wire
def test_records_that_another_program_stored_end_with_a_reason(
    survivor: FaultBench, payloads: list[bytes]
) -> None:
    wait_for_reasons(survivor, submit_raw(survivor, payloads))


@given(adapter=st.text(min_size=1, max_size=40) | st.binary(min_size=1, max_size=40))
@over_the_wire
def test_adapter_names_that_another_program_stored_end_with_a_reason(
    survivor: FaultBench, adapter: str | bytes
) -> None:
    name = adapter if isinstance(adapter, bytes) else adapter.encode(errors="replace")
    payload = json.dumps({"id": "x", "prompt": "x", "lora": name.decode(errors="replace")})
    wait_for_reasons(survivor, submit_raw(survivor, [payload.encode()], name))


@given(records=st.dictionaries(st.text(max_size=20), st.text(max_size=60), min_size=1, max_size=3))
@over_the_wire
def test_a_damaged_desired_state_is_reported_and_followed_again_once_it_is_mended(
    survivor: FaultBench, records: dict[str, str]
) -> None:
    keys, client = Keys(survivor.queue), survivor.redis
    damaged = {f"?{name}".encode(errors="replace"): text for name, text in records.items()}
    client.hset(keys.adapters, mapping={n: t.encode(errors="replace") for n, t in damaged.items()})
    client.publish(keys.control, client.incr(keys.adapters_version))
    submission = survivor.client.submit(["x"])
    survivor.client.wait(submission, timeout=PATIENCE)
    client.hdel(keys.adapters, *damaged)
    version = client.incr(keys.adapters_version)
    client.publish(keys.control, version)
    wait_until(
        lambda: survivor.client.overview().workers[0].desired_version == version,
        "the worker does not follow any more",
    )


@given(message=st.binary(max_size=100))
@over_the_wire
def test_messages_of_strangers_on_the_channels_are_harmless(
    survivor: FaultBench, message: bytes
) -> None:
    keys = Keys(survivor.queue)
    for channel in (keys.wake, keys.control, keys.cancelled):
        survivor.redis.publish(channel, message)


@pytest.mark.parametrize("number", ["x", "-1", "1.5", "nan", ""])
def test_a_damaged_number_of_attempts_is_the_default(queue: JobQueue, number: str) -> None:
    join(queue)
    queue.client.hset(queue.keys.settings, "max_attempts", number)
    queue.submit("sub", "file", 1, 0, [Job(id="x", prompt="x")])
    ends = []
    for _ in range(DEFAULT_MAX_ATTEMPTS):
        leases = [job.lease for job in claim(queue)]
        ends.append(queue.retry("w", leases, outcome="x", message="x", alone=False))
    assert ends == [(1, 0), (1, 0), (0, 1)]
    assert queue.set_max_attempts(5) == DEFAULT_MAX_ATTEMPTS


@pytest.mark.parametrize("bound", ["many", "0x10", " 1_0", "-1", "1.5", "", None])
def test_a_damaged_bound_is_told_with_the_remedy_which_works(
    redis_url: str, queue: JobQueue, bound: str | None
) -> None:
    key = queue.keys.limits
    if bound is None:
        queue.client.set(key, "x")
        damage = "it is no hash"
    else:
        queue.client.hset(key, "bytes", bound)
        damage = f"'{bound}' is no number"
    told = f"is damaged: {damage}. Delete the key '{key}', and set it again with `producer limits`."
    with Client(redis_url, queue.name) as client:
        with pytest.raises(LorryError, match=re.escape(told)):
            client.limits()
        with pytest.raises(LorryError, match=re.escape(told)):
            client.submit(["x"])
        queue.client.delete(key)
        client.set_limits(Limits(bytes=10_000))
        client.submit(["x"])


@pytest.mark.parametrize("count", ["many", "1.5", "9" * 40, "9" * 5000, None])
def test_a_damaged_count_of_what_waits_keeps_nothing_from_being_sent_and_run(
    queue: JobQueue, reader: QueueReader, count: str | None
) -> None:
    key = queue.keys.backlog
    queue.submit("before", "file", 1, 0, [Job(id="before", prompt="x")])
    queue.client.delete(key)
    if count is None:
        queue.client.set(key, "x")
    else:
        queue.client.hset(key, mapping={"jobs": count, "bytes": count})
    assert reader.backlog() == Size(0, 0)
    queue.set_limits(Limits(jobs=5, bytes=10_000))
    queue.submit("after", "file", 2, 0, [Job(id=f"after-{i}", prompt="x") for i in range(2)])
    # Who submits has no right to delete what is no hash: the next claim does.
    assert reader.backlog().jobs == (2 if count else 0)
    leases = [job.lease for job in claim(queue, num_jobs=3)]
    assert [lease.job_id for lease in leases] == ["before", "after-0", "after-1"]
    assert reader.backlog() == Size(0, 0)
    assert queue.client.exists(key) == 0


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "9" * 40, ""])
def test_a_damaged_version_of_the_desired_state_ends_no_worker(
    survivor: FaultBench, text: str
) -> None:
    keys, client = Keys(survivor.queue), survivor.redis
    version = str(client.get(keys.adapters_version))
    client.set(keys.adapters_version, text)
    client.publish(keys.control, "x")
    time.sleep(0.3)
    client.set(keys.adapters_version, int(version) + 1)


#: What becomes of a job's record while it waits or runs.
Damage = Callable[[JobQueue, str], object]

DAMAGES: dict[str, Damage] = {
    "deleted": lambda q, key: q.client.delete(key),
    "a string": lambda q, key: (q.client.delete(key), q.client.set(key, "x")),
    "a list": lambda q, key: (q.client.delete(key), q.client.rpush(key, "x")),
    "of version 99": lambda q, key: q.client.hset(key, "v", 99),
    "of no version": lambda q, key: q.client.hset(key, "v", "x"),
    "without its job": lambda q, key: q.client.hdel(key, "job"),
    "without its state": lambda q, key: q.client.hdel(key, "state"),
    "without its submissions": lambda q, key: q.client.hdel(key, "submissions"),
    "without its moment": lambda q, key: q.client.hdel(key, "queued"),
    "with a moment that is none": lambda q, key: q.client.hset(key, "queued", "now"),
    "without its attempts": lambda q, key: q.client.hdel(key, "attempts"),
    "with attempts that are no number": lambda q, key: q.client.hset(key, "attempts", "many"),
    "without its entry": lambda q, key: q.client.hdel(key, "entry"),
    "without its worker": lambda q, key: q.client.hdel(key, "worker"),
    "with a deadline that is none": lambda q, key: q.client.hset(key, "deadline", "soon"),
    "claimed at a moment that is none": lambda q, key: q.client.hset(key, "claimed", "soon"),
    "of an unknown submission": lambda q, key: q.client.hset(key, "submissions", "nobody"),
}


#: What becomes of a submission while its jobs wait, run or have ended.
DAMAGED_SUBMISSIONS: dict[str, Damage] = {
    "deleted": lambda q, key: q.client.delete(key),
    "a string": lambda q, key: (q.client.delete(key), q.client.set(key, "x")),
    "counts that are no numbers": lambda q, key: q.client.hset(
        key, mapping=dict.fromkeys(["waiting", "running", "done", "result_ttl"], "x")
    ),
    "counts at their end": lambda q, key: q.client.hset(key, "done", 2**63 - 1),
    "jobs that are no list": lambda q, key: (
        q.client.delete(f"{key}:jobs"),
        q.client.set(f"{key}:jobs", "x"),
    ),
    "ends that are no stream": lambda q, key: (
        q.client.delete(f"{key}:finished"),
        q.client.set(f"{key}:finished", "x"),
    ),
}

damaged_submissions = pytest.mark.parametrize(
    "damage", DAMAGED_SUBMISSIONS.values(), ids=DAMAGED_SUBMISSIONS
)


def submit_two(queue: JobQueue) -> None:
    for name in ("bad", "good"):
        sent = [Job(id=f"{name}-{i}", prompt="x") for i in range(2)]
        queue.submit(name, "file", 2, 0, sent, result_ttl=0.001)


def all_states(queue: JobQueue) -> list[str | None]:
    ids = [f"{name}-{i}" for name in ("bad", "good") for i in range(2)]
    return [queue.client.hget(queue.keys.job(id_), "state") for id_ in ids]  # type: ignore[misc]


@damaged_submissions
def test_a_submission_that_is_damaged_keeps_no_job_from_being_claimed(
    queue: JobQueue, damage: Damage
) -> None:
    join(queue)
    submit_two(queue)
    damage(queue, queue.keys.submission("bad"))
    assert len(claim(queue)) == 4
    assert all_states(queue) == ["running"] * 4


@damaged_submissions
def test_a_submission_that_is_damaged_keeps_no_result_from_being_recorded(
    queue: JobQueue, reader: QueueReader, damage: Damage
) -> None:
    join(queue)
    submit_two(queue)
    claims = claim(queue)
    damage(queue, queue.keys.submission("bad"))
    assert queue.commit("w", [(job.lease, result(job)) for job in claims]) == [True] * 4
    assert all_states(queue) == ["done"] * 4
    assert reader.submission("good").is_complete
    assert [found.id for found in reader.results(["bad-0", "good-1"])] == ["bad-0", "good-1"]
    assert "good" in [status.id for status in reader.submissions(10)]


@damaged_submissions
def test_a_submission_that_is_damaged_keeps_no_job_from_being_cancelled(
    queue: JobQueue, damage: Damage
) -> None:
    join(queue)
    submit_two(queue)
    claim(queue, 1)
    damage(queue, queue.keys.submission("bad"))
    queue.cancel(["bad-0", "bad-1", "good-0", "good-1"])
    assert all_states(queue) == ["cancelled"] * 4


@damaged_submissions
def test_a_submission_that_is_damaged_keeps_no_other_from_expiring(
    queue: JobQueue, damage: Damage
) -> None:
    join(queue)
    submit_two(queue)
    queue.commit("w", [(job.lease, result(job)) for job in claim(queue)])
    damage(queue, queue.keys.submission("bad"))
    time.sleep(0.01)
    queue.expire_submissions()
    assert all_states(queue)[2:] == [None] * 2
    assert queue.client.zcard(queue.keys.expiry) == 0


damaged_jobs = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


def run_one_damaged(queue: JobQueue, damage: Damage) -> list[Lease]:
    """Three leases, the first one of a record that is damaged while it runs."""
    join(queue)
    queue.submit("sub", "file", 3, 0, [Job(id=name, prompt="x") for name in ("bad", "a", "b")])
    leases = [job.lease for job in claim(queue)]
    damage(queue, queue.keys.job("bad"))
    return leases


def lose_a_claims_reply(queue: JobQueue, damage: Damage) -> None:
    """As ``run_one_damaged``, but what they were claimed by has not come back: it is the next."""
    number = queue._claim_number
    run_one_damaged(queue, damage)
    queue._claim_number = number


def states_of_others(queue: JobQueue) -> list[str | None]:
    return [queue.client.hget(queue.keys.job(id_), "state") for id_ in "ab"]  # type: ignore[misc]


@damaged_jobs
def test_a_record_that_is_damaged_while_it_runs_keeps_no_lease_from_being_renewed(
    queue: JobQueue, damage: Damage
) -> None:
    leases = run_one_damaged(queue, damage)
    assert queue.renew("w", leases, lease_seconds=90) <= set(leases[:1])


@damaged_jobs
def test_a_record_that_is_damaged_while_it_runs_keeps_no_job_from_being_handed_back(
    queue: JobQueue, damage: Damage
) -> None:
    queue.release("w", run_one_damaged(queue, damage))
    assert states_of_others(queue) == ["waiting"] * 2


@damaged_jobs
@pytest.mark.parametrize("alone", [False, True])
def test_a_record_that_is_damaged_while_it_runs_keeps_no_job_from_being_tried_again(
    queue: JobQueue, damage: Damage, alone: bool
) -> None:
    leases = run_one_damaged(queue, damage)
    queue.retry("w", leases, outcome="x", message="x", alone=alone)
    assert states_of_others(queue) == ["waiting"] * 2


@damaged_jobs
def test_a_record_that_is_damaged_while_it_runs_keeps_no_worker_from_asking_again_for_its_claim(
    queue: JobQueue, damage: Damage
) -> None:
    lose_a_claims_reply(queue, damage)
    assert {"a", "b"} <= {job.lease.job_id for job in claim(queue)}


@damaged_jobs
def test_a_record_that_is_damaged_while_it_runs_keeps_no_worker_from_leaving(
    queue: JobQueue, damage: Damage
) -> None:
    lose_a_claims_reply(queue, damage)
    queue.leave("w")
    assert states_of_others(queue) == ["waiting"] * 2


@damaged_jobs
def test_a_record_that_is_damaged_while_it_runs_keeps_no_lost_lease_from_being_swept(
    queue: JobQueue, damage: Damage
) -> None:
    run_one_damaged(queue, damage)
    queue.client.zadd(queue.keys.leases, dict.fromkeys(["bad", "a", "b"], 1))
    queue.sweep()
    assert states_of_others(queue) == ["waiting"] * 2


@damaged_jobs
def test_a_record_that_is_damaged_while_it_runs_keeps_no_other_from_being_cancelled(
    queue: JobQueue, damage: Damage
) -> None:
    run_one_damaged(queue, damage)
    queue.cancel(["bad", "a", "b"])
    assert states_of_others(queue) == ["cancelled"] * 2


#: What becomes of the record of a running job so that no result can be made of it.
UNREADABLE: dict[str, Damage] = {
    "a string": DAMAGES["a string"],
    "a list": DAMAGES["a list"],
    "without its state": DAMAGES["without its state"],
    "in a state that is none": lambda q, key: q.client.hset(key, "state", "x"),
    "without its submissions": DAMAGES["without its submissions"],
    "of submissions without a name": lambda q, key: q.client.hset(key, "submissions", " "),
    "without its moment": DAMAGES["without its moment"],
    "with a moment that is none": DAMAGES["with a moment that is none"],
    "claimed at a moment that is none": DAMAGES["claimed at a moment that is none"],
    "with a job that is no JSON": lambda q, key: q.client.hset(key, "job", "[" * DEEP),
    "with a job that is no object": lambda q, key: q.client.hset(key, "job", "null"),
    "with a result that is none": lambda q, key: q.client.hset(key, "result", "{}"),
}


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
def test_a_record_that_cannot_be_read_is_a_failed_result_and_hides_no_other(
    redis_url: str, queue: JobQueue, damage: Damage
) -> None:
    join(queue)
    queue.submit("sub", "file", 3, 0, [Job(id=name, prompt="x") for name in ("a", "bad", "b")])
    answered = [job for job in claim(queue) if job.lease.job_id != "bad"]
    queue.commit("w", [(job.lease, result(job)) for job in answered])
    damage(queue, queue.keys.job("bad"))
    with Client(redis_url, queue.name) as client:
        a, bad, b = client.results("sub")
        assert [found.id for found in client.follow("bad", "a")] == ["bad", "a"]
        assert client.wait("bad") == client.job("bad") == bad
        assert client.attempts("bad") == []
    assert (a.status, b.status) == ("done", "done")
    assert bad.error
    assert (bad.status, bad.error.code) == ("failed", "bad_record")
    assert re.match(r"(The record of|The result of|What was sent as) job 'bad'", bad.error.message)


def test_an_id_whose_key_is_replaced_is_taken(redis_url: str, queue: JobQueue) -> None:
    queue.client.set(queue.keys.job("bad"), "x")
    with (
        Client(redis_url, queue.name) as client,
        pytest.raises(LorryError, match=r"other jobs under ids of this input: .*:2: id 'bad'"),
    ):
        client.submit([{"id": "good", "prompt": "x"}, {"id": "bad", "prompt": "x"}])
    assert not queue.client.exists(queue.keys.job("good"))


def test_a_dead_job_whose_key_is_replaced_hides_no_other(redis_url: str, queue: JobQueue) -> None:
    join(queue)
    queue.set_max_attempts(1)
    leases = run_one_damaged(queue, lambda *_: None)
    queue.retry("w", leases, outcome="x", message="x", alone=False)
    DAMAGES["a string"](queue, queue.keys.job("bad"))
    with Client(redis_url, queue.name) as client:
        assert [letter.job_id for letter in client.dead_letters()] == ["a", "b"]
        assert DeadLetters(queue.client, queue.name).drop(["bad", "a"]) == 1
        assert DeadLetters(queue.client, queue.name).replay(["bad", "b"]) == 1


@damaged_jobs
def test_a_record_that_is_damaged_while_it_waits_harms_no_other_job(
    redis_url: str, queue: JobQueue, tmp_path: Path, damage: Damage
) -> None:
    with FaultBench(redis_url, queue.name, tmp_path) as bench:
        bench.submit(*jobs(3, "before"))
        bench.submit(*jobs(1, "bad"))
        bench.submit(*jobs(3, "after"))
        damage(queue, queue.keys.job("bad-0"))
        worker = bench.start()
        others = [f"{name}-{i}" for name in ("before", "after") for i in range(3)]
        wait_until(
            lambda: states(bench, others) == ["done"] * 6 or not worker.is_alive(),
            "the other jobs do not end",
        )
        bench.submit(*jobs(3, "later"))
        wait_until(
            lambda: (
                states(bench, [f"later-{i}" for i in range(3)]) == ["done"] * 3
                or not worker.is_alive()
            ),
            "later jobs do not end",
        )
        assert worker.is_alive()
