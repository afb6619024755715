"""The checker of the fault tests and the soak: silent about a queue that kept its promises, and
not about one that broke one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from benchmarks.ledger import Ledger
from benchmarks.null_worker import BAD_PROMPT, NullEngine, NullSettings
from broker.job_queue import JobQueue
from producer.client import Client
from schemas.keys import Keys
from worker.config import WorkerConfig
from worker.worker import Worker

#: Takes a server, the key names of a queue and the id of its submission, and breaks a promise.
Break = Callable[[redis.Redis, Keys, str], object]


def job(id_: str, **fields: object) -> dict[str, object]:
    return {"id": id_, "prompt": "x", **fields}


POISON = {"fault": {"at": "generate", "do": "raise"}}
BAD = {"fault": {"at": "read", "do": "fail"}}


@dataclass
class Sent:
    """What was sent to the queue called ``queue``, all of which has ended."""

    queue: str
    ledger: Ledger
    submission: str


@pytest.fixture(scope="module")
def template(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Sent:
    """Jobs that ended as dead, done (one of them sent twice) and failed."""
    ledger, queue = Ledger(), "ledger-template"
    settings = NullSettings(adapters=["a"], marks=tmp_path_factory.mktemp("marks"))
    jobs = [job("first"), job("second", lora="a"), job("bad", metadata=BAD), job("first")]
    with Client(redis_url, queue) as client:
        # By itself, so that it takes no other job with it.
        poison = ledger.submit(client, [job("poison", metadata=POISON)])
        work_until_complete(client, redis_url, poison, settings)
        submission = ledger.submit(client, jobs)
        work_until_complete(client, redis_url, submission, settings)
        ledger.note(client.results(poison, submission))
    return Sent(queue, ledger, submission)


def work_until_complete(client: Client, url: str, submission: str, settings: NullSettings) -> None:
    config = WorkerConfig(model_path=Path("null"), queue=client.queue, burst=True, device="cpu")
    for _ in range(9):
        if not client.status(submission).is_complete:
            Worker(config, NullEngine(settings), url).run()


@pytest.fixture
def sent(template: Sent, queue: JobQueue) -> Sent:
    """The same in a queue of the test's own."""
    former = Keys(template.queue).prefix
    for name in queue.client.scan_iter(match=former + "*"):
        queue.client.copy(name, queue.keys.prefix + name.removeprefix(former))
    sent = template.ledger
    ledger = Ledger(acknowledged=dict(sent.acknowledged), results=dict(sent.results))
    return Sent(queue.name, ledger, template.submission)


def test_a_queue_that_kept_its_promises_has_no_violation(queue: JobQueue, sent: Sent) -> None:
    assert sent.ledger.check(queue.client, queue.name) == []
    states = Counter(result.status for result in sent.ledger.results.values())
    assert states == {"done": 2, "failed": 1, "dead": 1}


BREAKS: dict[str, tuple[Break, str]] = {
    "a job is lost": (
        lambda r, k, s: r.delete(k.job("first")),
        "job first was acknowledged and is not there",
    ),
    "a job is replaced by another type": (
        lambda r, k, s: (r.delete(k.job("first")), r.set(k.job("first"), "x")),
        "job first was acknowledged and is not there",
    ),
    "a job comes from nowhere": (
        lambda r, k, s: r.copy(k.job("first"), k.job("stranger")),
        "job stranger is there and nobody sent it",
    ),
    "a job does not end": (
        lambda r, k, s: r.hset(k.job("first"), "state", "running"),
        "job first is in state running",
    ),
    "a job has two outcomes": (
        lambda r, k, s: r.hset(k.job("first"), "error_code", "attempts_exhausted"),
        "job first has a result and was also ended with attempts_exhausted",
    ),
    "a job is done without a result": (
        lambda r, k, s: r.hdel(k.job("first"), "result"),
        "job first is done without a result and without a reason",
    ),
    "a job is dead without a reason": (
        lambda r, k, s: r.hdel(k.job("poison"), "error_message"),
        "job poison is dead without a result and without a reason",
    ),
    "a job has the result of another": (
        lambda r, k, s: r.hset(k.job("first"), "result", r.hget(k.job("second"), "result")),
        "job first is done; its result says second is done",
    ),
    "a failed job gives no reason": (
        lambda r, k, s: r.hset(
            k.job("bad"),
            "result",
            str(r.hget(k.job("bad"), "result")).replace(BAD_PROMPT, ""),
        ),
        "job bad is failed without a reason",
    ),
    "a finished job keeps its delivery": (
        lambda r, k, s: r.hset(k.job("first"), "entry", "1-1"),
        "job first is done and still has a delivery",
    ),
    "a result changes": (
        lambda r, k, s: r.hset(
            k.job("first"),
            "result",
            str(r.hget(k.job("first"), "result")).replace("stop", "length"),
        ),
        "job first was seen as done, and its outcome has changed since",
    ),
    "a submission's counts are wrong": (
        lambda r, k, s: r.hincrby(k.submission(s), "done", 1),
        "counts {'done': 4, 'failed': 1}; its jobs are",
    ),
    "a submission is lost": (
        lambda r, k, s: (r.delete(k.submission(s)), r.zrem(k.submissions, s)),
        "was acknowledged and is not there",
    ),
    "a submission is not listed": (
        lambda r, k, s: r.zrem(k.submissions, s),
        "is not listed",
    ),
    "a submission lists other jobs": (
        lambda r, k, s: r.lset(k.submission_jobs(s), 0, "second"),
        "holds other jobs than were sent",
    ),
    "a result is not told": (
        lambda r, k, s: r.xtrim(k.submission_finished(s), maxlen=3, approximate=False),
        "times too seldom that job",
    ),
    "a result is told twice": (
        lambda r, k, s: r.xadd(k.submission_finished(s), {"id": "first"}),
        "tells 1 times too often that job first has finished",
    ),
    "a dead job is not among the dead letters": (
        lambda r, k, s: r.delete(k.dead),
        "job poison is dead and stands 0 times among the dead letters",
    ),
    "a job that is done is among the dead letters": (
        lambda r, k, s: r.xadd(k.dead, {"id": "first", "reason": "none", "attempts": 3}),
        "job first is done and stands 1 times among the dead letters",
    ),
    "work is left in a stream": (
        lambda r, k, s: r.xadd(k.prefix + "stream:a", {"id": "first"}),
        "stream:a is left with 1 entries",
    ),
    "an adapter is left ready": (
        lambda r, k, s: r.zadd(k.prefix + "ready", {"a": 1}),
        "ready (zset) is left over",
    ),
    "a lease is left": (
        lambda r, k, s: r.zadd(k.leases, {"first": 1}),
        "leases (zset) is left over",
    ),
    "a job stays delayed": (
        lambda r, k, s: r.zadd(k.prefix + "delayed", {"first": 1}),
        "delayed (zset) is left over",
    ),
    "a count of running jobs is left": (
        lambda r, k, s: r.hset(k.prefix + "running", "a", 1),
        "running (hash) is left over",
    ),
    "an end is never told": (
        lambda r, k, s: r.hset(k.submission(s), "webhook", "https://example.org/"),
        "has ended, and its webhook is in state None",
    ),
    "a notice is lost": (
        lambda r, k, s: r.hset(
            k.submission(s), mapping={"webhook": "https://example.org/", "webhook_state": "pending"}
        ),
        "is in state pending and not in the index",
    ),
    "a notice stays due": (
        lambda r, k, s: r.zadd(k.notices, {s: 1}),
        "is in state None and in the index",
    ),
    "a notice of nothing is due": (
        lambda r, k, s: r.zadd(k.notices, {"stranger": 1}),
        "the webhook of submission stranger, which is not there, is to be told",
    ),
    "a job is cancelled that nobody cancelled": (
        lambda r, k, s: r.hset(k.job("poison"), "state", "cancelled"),
        "job poison is cancelled and nobody asked for that",
    ),
    "a job has no deadline and expires": (
        lambda r, k, s: r.hset(k.job("poison"), "state", "expired"),
        "job poison is expired and its deadline had not come",
    ),
    "a job is claimed after its deadline": (
        lambda r, k, s: r.hset(k.job("first"), "deadline", r.hget(k.job("first"), "claimed")),
        "job first was claimed when its deadline had come",
    ),
    "a worker's record never expires": (
        lambda r, k, s: r.hset(k.worker("w"), "state", "{}"),
        "worker:w never expires",
    ),
}


@pytest.mark.parametrize(("breaks", "told"), BREAKS.values(), ids=BREAKS)
def test_the_checker_finds_that(queue: JobQueue, sent: Sent, breaks: Break, told: str) -> None:
    breaks(queue.client, queue.keys, sent.submission)
    violations = sent.ledger.check(queue.client, queue.name)
    assert any(told in violation for violation in violations), violations


def test_the_checker_finds_a_consumer_with_pending_work(queue: JobQueue, sent: Sent) -> None:
    stream = queue.keys.prefix + "stream:a"
    queue.client.xadd(stream, {"id": "first"})
    queue.client.xgroup_create(stream, "workers", "0")
    queue.client.xreadgroup("workers", "lost", {stream: ">"})
    assert "stream:a is left with 1 entries; consumer lost has 1 pending" in sent.ledger.check(
        queue.client, queue.name
    )


def test_counters_at_zero_and_records_that_expire_are_no_violation(
    queue: JobQueue, sent: Sent
) -> None:
    queue.client.hset(queue.keys.prefix + "running", "a", 0)
    queue.client.set(queue.keys.prefix + "fetch-turn", 1, ex=60)
    assert sent.ledger.check(queue.client, queue.name) == []


def test_what_was_not_acknowledged_may_be_stored_or_not(queue: JobQueue, sent: Sent) -> None:
    sent.ledger.acknowledged.clear()
    sent.ledger.unsure = ["first", "second", "bad", "poison", "never stored"]
    assert sent.ledger.check(queue.client, queue.name) == []


def test_what_a_refused_sender_sent_is_not_there(queue: JobQueue, sent: Sent) -> None:
    sent.ledger.acknowledged.clear()
    sent.ledger.unsure = ["first", "second", "bad"]
    sent.ledger.refused = {"poison"}
    assert sent.ledger.check(queue.client, queue.name) == [
        "job poison is there and its sender was told that it was not sent"
    ]


@pytest.mark.parametrize(
    ("adapter", "claims"),
    [("a", ["second"]), ("b", []), (None, ["bad", "first", "poison", "second"])],
)
def test_the_checker_finds_claims_in_a_pause(
    queue: JobQueue, sent: Sent, redis_url: str, adapter: str | None, claims: list[str]
) -> None:
    queue.client.delete(queue.keys.adapters_version)  # So that any adapter may be paused.
    with Client(redis_url, queue.name) as client:
        sent.ledger.pause(client, queue.client, adapter)
        sent.ledger.resume(client, queue.client, adapter)
    assert sent.ledger.check(queue.client, queue.name) == []
    sent.ledger.pauses[0].since = 0.0
    assert sent.ledger.check(queue.client, queue.name) == [
        f"job {id_} was claimed while {adapter or '*'} was paused" for id_ in claims
    ]


def test_a_job_that_runs_after_it_was_cancelled_is_found(
    queue: JobQueue, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger()
    with Client(redis_url, queue.name) as client:
        submission = ledger.submit(client, [job("kept"), job("gone")])
        ledger.cancel(client, "gone")
        assert ledger.found == []
        monkeypatch.setattr(Client, "cancel", lambda *_: None)
        ledger.cancel(client, submission)
    assert ledger.found == ["job kept was cancelled, and was waiting after that"]
    assert ledger.cancelled == {"kept", "gone"}


def test_of_what_a_flush_took_nothing_is_expected_and_of_what_came_later_all(
    redis_url: str, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger()
    flushed = [queue.keys.prefix + "*"]
    # The server is shared with other tests: only this queue's keys go.
    monkeypatch.setattr(redis.Redis, "flushall", lambda r: r.delete(*r.scan_iter(match=flushed[0])))
    with Client(redis_url, queue.name) as client:
        ledger.submit(client, [job("before")])
        ledger.pause(client, queue.client, None)
        ledger.flush(queue.client)
        assert ledger.check(queue.client, queue.name) == []
        assert ledger.num_flushed == 1
        assert ledger.pauses[0].until is not None
        ledger.submit(client, [job("after")])
        assert "job after is in state waiting" in ledger.check(queue.client, queue.name)
        queue.client.delete(queue.keys.job("after"))
    assert "job after was acknowledged and is not there" in ledger.check(queue.client, queue.name)


def test_a_submission_that_a_flush_may_have_taken_is_not_counted_as_acknowledged(
    redis_url: str, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, submit = Ledger(), Client.submit
    monkeypatch.setattr(redis.Redis, "flushall", lambda r: r.delete(queue.keys.submissions))

    def submit_and_flush(*args: object) -> str:
        submission = submit(*args)
        ledger.flush(queue.client)
        return submission

    monkeypatch.setattr(Client, "submit", submit_and_flush)
    with Client(redis_url, queue.name) as client:
        ledger.submit(client, [job("at-the-same-time")])
    assert ledger.acknowledged == {}
    assert ledger.unsure == ["at-the-same-time"]


def test_a_queue_whose_name_is_a_pattern_of_another_is_looked_at_alone(
    queue: JobQueue, sent: Sent
) -> None:
    assert Ledger().check(queue.client, queue.name + "x") == []
    assert Ledger().check(queue.client, queue.name) != []
