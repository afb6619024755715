"""When a submission's webhook has something to tell: every way to end, on a real server."""

from __future__ import annotations

import pytest

from broker.dead_letters import DeadLetters
from broker.job_queue import JobQueue
from broker.notices import Notices
from broker.queue_reader import QueueReader
from schemas.job import Job
from schemas.webhook import Webhook
from tests.test_job_queue import claim, join, result

URL = "https://example.org/hook"


@pytest.fixture
def notices(queue: JobQueue) -> Notices:
    join(queue)
    return Notices(queue.client, queue.name)


def submit(
    queue: JobQueue,
    number: int = 2,
    *,
    submission: str = "sub",
    offset: int = 0,
    total: int | None = None,
    webhook: str | None = URL,
    **fields: object,
) -> None:
    numbers = range(offset, offset + number)
    jobs = [Job(id=f"job-{i}", prompt="x", **fields) for i in numbers]
    queue.submit(submission, "file", total or number, offset, jobs, webhook=webhook)


def commit(queue: JobQueue, *jobs: object) -> None:
    queue.commit("w", [(job.lease, result(job)) for job in jobs])


def due(queue: JobQueue) -> dict[str, float]:
    return dict(queue.client.zrange(queue.keys.notices, 0, -1, withscores=True))


def webhook(reader: QueueReader, submission: str = "sub") -> Webhook:
    found = reader.submission(submission).webhook
    assert found
    return found


def test_the_last_commit_makes_the_notice_due(
    queue: JobQueue, reader: QueueReader, notices: Notices
) -> None:
    submit(queue)
    first, second = claim(queue)
    commit(queue, first)
    assert webhook(reader) == Webhook(URL)
    assert due(queue) == {}
    commit(queue, second)
    found = webhook(reader)
    assert (found.state, found.attempts, found.error) == ("pending", 0, None)
    assert due(queue) == {"sub": (found.ended or 0) * 1000}
    assert notices.take(10, due_again=60) == [("sub", found.event)]


def test_a_commit_whose_reply_was_lost_makes_no_second_notice(
    queue: JobQueue, reader: QueueReader, notices: Notices
) -> None:
    submit(queue, 1)
    (job,) = claim(queue)
    commit(queue, job)
    event = webhook(reader).event
    commit(queue, job)
    assert webhook(reader).event == event


def test_without_a_webhook_nothing_is_written(queue: JobQueue, notices: Notices) -> None:
    submit(queue, webhook=None)
    commit(queue, *claim(queue))
    assert due(queue) == {}
    fields = queue.client.hkeys(queue.keys.submission("sub"))
    assert not [name for name in fields if name.startswith("webhook")]


def test_cancelling_ends_it(queue: JobQueue, reader: QueueReader, notices: Notices) -> None:
    submit(queue, 3)
    claim(queue, 1)
    queue.cancel(["job-0", "job-1"])
    assert due(queue) == {}
    queue.cancel(["job-2"])
    assert list(due(queue)) == ["sub"]


def test_deadlines_end_it(queue: JobQueue, notices: Notices) -> None:
    submit(queue, deadline="2020-01-01T00:00:00Z")
    assert due(queue) == {}
    assert queue.expire_jobs() == 2
    assert list(due(queue)) == ["sub"]


def test_a_deadline_that_a_claim_meets_ends_it(queue: JobQueue, notices: Notices) -> None:
    submit(queue, deadline="2020-01-01T00:00:00Z")
    assert claim(queue) == []
    assert list(due(queue)) == ["sub"]


@pytest.mark.parametrize("by", ["retry", "sweep"])
def test_giving_its_last_job_up_ends_it(queue: JobQueue, notices: Notices, by: str) -> None:
    queue.set_max_attempts(1)
    submit(queue, 1)
    (job,) = claim(queue)
    if by == "retry":
        queue.retry("w", [job.lease], outcome="x", message="x", alone=False)
    else:
        queue.client.zadd(queue.keys.leases, {"job-0": 1})
        queue.sweep()
    assert list(due(queue)) == ["sub"]


def test_unloading_its_adapter_by_force_ends_it(queue: JobQueue, notices: Notices) -> None:
    submit(queue, lora="a")
    queue.unload_adapter("a", "force")
    queue.retire_adapter("a")
    assert list(due(queue)) == ["sub"]


def test_jobs_that_have_ended_before_end_it_at_once(queue: JobQueue, notices: Notices) -> None:
    submit(queue, submission="first", webhook=None)
    commit(queue, *claim(queue))
    submit(queue)
    assert list(due(queue)) == ["sub"]


def test_a_job_of_two_submissions_ends_both(
    queue: JobQueue, reader: QueueReader, notices: Notices
) -> None:
    submit(queue, submission="first")
    submit(queue, submission="second")
    commit(queue, *claim(queue))
    assert set(due(queue)) == {"first", "second"}
    assert webhook(reader, "first").event != webhook(reader, "second").event


def test_what_is_not_all_sent_has_not_ended(queue: JobQueue, notices: Notices) -> None:
    submit(queue, 2, total=4)
    commit(queue, *claim(queue))
    assert due(queue) == {}
    submit(queue, 2, offset=2, total=4)
    commit(queue, *claim(queue))
    assert list(due(queue)) == ["sub"]


def test_cancelled_while_it_is_sent_it_ends_with_what_was_sent(
    queue: JobQueue, reader: QueueReader, notices: Notices
) -> None:
    """Also if no job is left that would tell."""
    submit(queue, 2, total=4)
    commit(queue, *claim(queue))
    queue.close_submission("sub")
    event = webhook(reader).event
    assert list(due(queue)) == ["sub"]
    queue.close_submission("sub")
    assert webhook(reader).event == event


def test_closing_what_has_ended_changes_nothing(
    queue: JobQueue, reader: QueueReader, notices: Notices
) -> None:
    submit(queue, 1)
    commit(queue, *claim(queue))
    before, expiry = webhook(reader), queue.client.zscore(queue.keys.expiry, "sub")
    queue.close_submission("sub")
    assert webhook(reader) == before
    assert queue.client.zscore(queue.keys.expiry, "sub") == expiry


def dead_submission(queue: JobQueue) -> None:
    queue.set_max_attempts(1)
    submit(queue, 1)
    (job,) = claim(queue)
    queue.retry("w", [job.lease], outcome="x", message="x", alone=False)


def test_a_replay_takes_the_notice_back_until_it_ends_again(
    queue: JobQueue, reader: QueueReader, notices: Notices
) -> None:
    dead_submission(queue)
    first = webhook(reader).event
    assert first
    notices.note_delivery("sub", first, 1, "failed", "x", delay=60, lifetime=600)
    DeadLetters(queue.client, queue.name).replay(["job-0"])
    assert webhook(reader) == Webhook(URL)
    assert due(queue) == {}
    assert notices.note_delivery("sub", first, 2, "delivered", "", delay=0, lifetime=600) == ""
    commit(queue, *claim(queue))
    assert webhook(reader).event not in (None, first)
    assert list(due(queue)) == ["sub"]


def test_after_it_was_delivered_a_replay_makes_another_event(
    queue: JobQueue, reader: QueueReader, notices: Notices
) -> None:
    dead_submission(queue)
    first = webhook(reader).event
    assert first
    notices.note_delivery("sub", first, 1, "delivered", "", delay=60, lifetime=600)
    assert webhook(reader).state == "delivered"
    DeadLetters(queue.client, queue.name).replay(["job-0"])
    commit(queue, *claim(queue))
    assert webhook(reader).state == "pending"
    assert webhook(reader).event != first


def ended(queue: JobQueue, reader: QueueReader) -> str:
    """The event of a submission that has ended."""
    submit(queue, 1)
    commit(queue, *claim(queue))
    event = webhook(reader).event
    assert event
    return event


def test_a_notice_is_given_to_one_of_those_who_take_and_again_later(
    queue: JobQueue, reader: QueueReader, notices: Notices
) -> None:
    event = ended(queue, reader)
    other = Notices(queue.client, queue.name)
    assert notices.take(10, due_again=60) == [("sub", event)]
    assert other.take(10, due_again=60) == []
    queue.client.zadd(queue.keys.notices, {"sub": 1})
    assert other.take(10, due_again=60) == [("sub", event)]


def test_tries_are_counted_and_end_after_their_time(
    queue: JobQueue, reader: QueueReader, notices: Notices
) -> None:
    event = ended(queue, reader)

    def fail(attempt: int, delay: float) -> str:
        return notices.note_delivery(
            "sub", event, attempt, "failed", f"why {attempt}", delay=delay, lifetime=3600
        )

    assert fail(1, 60) == "pending"
    found = webhook(reader)
    assert (found.attempts, found.error, found.settled) == (1, "why 1", None)
    assert due(queue) == {"sub": (found.next_try or 0) * 1000}
    assert fail(1, 60) == "pending"  # Its reply was lost.
    assert webhook(reader) == found
    assert fail(2, 3599) == "pending"
    assert fail(3, 3601) == "dead"
    found = webhook(reader)
    assert (found.state, found.attempts, found.error) == ("dead", 3, "why 3")
    assert due(queue) == {}
    assert fail(4, 1) == "dead"
    assert webhook(reader) == found


def test_when_results_expire_nothing_is_left_to_deliver(
    queue: JobQueue, reader: QueueReader, notices: Notices
) -> None:
    event = ended(queue, reader)
    queue.client.zadd(queue.keys.expiry, {"sub": 1})
    queue.expire_submissions()
    assert due(queue) == {}
    found = webhook(reader)
    assert (found.state, found.error) == ("dead", "the results expired before it was delivered")
    assert notices.note_delivery("sub", event, 1, "failed", "x", delay=1, lifetime=60) == "dead"
    assert due(queue) == {}
    assert queue.client.pttl(queue.keys.submission("sub")) > 0  # type: ignore[operator]


def test_expiry_leaves_what_was_delivered_as_it_is(
    queue: JobQueue, reader: QueueReader, notices: Notices
) -> None:
    event = ended(queue, reader)
    notices.note_delivery("sub", event, 1, "delivered", "", delay=1, lifetime=60)
    queue.client.zadd(queue.keys.expiry, {"sub": 1})
    queue.expire_submissions()
    assert webhook(reader).state == "delivered"


@pytest.mark.parametrize("damage", ["gone", "no hash", "no event", "bad event"])
def test_an_entry_of_the_index_that_leads_nowhere_is_taken_off(
    queue: JobQueue, reader: QueueReader, notices: Notices, damage: str
) -> None:
    ended(queue, reader)
    key = queue.keys.submission("sub")
    match damage:
        case "gone":
            queue.client.delete(key)
        case "no hash":
            queue.client.delete(key)
            queue.client.set(key, "x")
        case "no event":
            queue.client.hdel(key, "webhook_event")
        case "bad event":
            queue.client.hset(key, "webhook_event", "a b:c")
    assert notices.take(10, due_again=60) == []
    assert due(queue) == {}
