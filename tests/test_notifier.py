"""A notifier on a real server, with a receiver on this machine: what it sends, and what it
refuses."""

from __future__ import annotations

import base64
import json
import os
import pickle
import signal
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import trustme
from rq import Queue
from rq.job import Job as RqJob
from rq.serializers import DefaultSerializer, JSONSerializer
from structlog.testing import capture_logs

import worker.webhooks.notifier
import worker.webhooks.post
from benchmarks.waiting import PATIENCE, wait_until
from broker.job_queue import JobQueue
from broker.notices import Notices
from broker.queue_reader import QueueReader
from producer.client import Client
from schemas.webhook import WEBHOOK_FUNCTION, Webhook
from tests.servers import free_port
from tests.test_job_queue import claim, join, result
from tests.webhook_receiver import (
    Answer,
    Receiver,
    drip,
    flood,
    gibberish,
    hang_up,
    mute,
    redirect_to,
    run_receiver,
)
from worker.webhooks.notifier import FIRST_PAUSE, LIFETIME, LONGEST_PAUSE, Notifier, pause_after
from worker.webhooks.signature import signature

SECRET = b"0123456789abcdef01234567"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with run_receiver() as receiver:
        yield receiver


class Notifying:
    """A notifier, and submissions that end."""

    def __init__(self, redis_url: str, queue: JobQueue, receiver: Receiver) -> None:
        self._url = redis_url
        self.queue, self.receiver = queue, receiver
        self.notices = Notices(queue.client, queue.name)
        self.reader = QueueReader(queue.client, queue.name)
        self.notifier = self.make()
        join(queue)

    def make(self, *hosts: str) -> Notifier:
        return Notifier(self._url, self.queue.name, hosts or (self.receiver.host,), [SECRET])

    def ended(self, url: str | None = None, *, jobs: int = 2) -> str:
        """Submit jobs, and answer them; returns the submission."""
        with Client(self._url, self.queue.name) as client:
            submission = client.submit(["x"] * jobs, webhook=url or self.receiver.url)
        self.queue.commit("w", [(job.lease, result(job)) for job in claim(self.queue)])
        return submission

    def webhook(self, submission: str) -> Webhook:
        found = self.reader.submission(submission).webhook
        assert found
        return found

    def come_due(self) -> None:
        """Let the time pass until the next try of all that is due at some time."""
        for submission in self.queue.client.zrange(self.queue.keys.notices, 0, -1):
            self.queue.client.zadd(self.queue.keys.notices, {submission: 1})

    def turn(self) -> None:
        """Let the notifier take what is due, and make one try."""
        self.notifier.turn()

    def try_again(self, submission: str) -> Webhook:
        self.come_due()
        self.turn()
        return self.webhook(submission)

    @property
    def rq(self) -> Queue:
        return self.notices.rq_queue()


@pytest.fixture
def notifying(redis_url: str, queue: JobQueue, receiver: Receiver) -> Notifying:
    return Notifying(redis_url, queue, receiver)


# --- Success ------------------------------------------------------------------------------------


def test_the_end_of_a_submission_is_posted_once_with_its_counts(notifying: Notifying) -> None:
    submission = notifying.ended(jobs=3)
    notifying.turn()
    (received,) = notifying.receiver.received
    found = notifying.webhook(submission)
    assert (found.state, found.attempts, found.error) == ("delivered", 1, None)
    ended = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(found.ended))
    assert received.path == "/hook?a=b"
    timestamp = received.notice["timestamp"]
    assert timestamp.startswith(ended)
    assert received.notice == {
        "id": found.event,
        "type": "submission.finished",
        "timestamp": f"{ended}.{round((found.ended or 0) * 1000) % 1000:03}Z",
        "data": {
            "queue": notifying.queue.name,
            "submission": submission,
            "jobs": 3,
            "counts": {"done": 3, "failed": 0, "dead": 0, "cancelled": 0, "expired": 0},
        },
    }
    notifying.come_due()
    notifying.turn()
    assert len(notifying.receiver.received) == 1


def test_it_is_signed_as_standard_webhooks_has_it(notifying: Notifying) -> None:
    before = int(time.time())
    submission = notifying.ended()
    notifying.turn()
    (received,) = notifying.receiver.received
    headers = received.headers
    assert headers["content-type"] == "application/json"
    assert headers["host"] == notifying.receiver.host
    assert headers["webhook-id"] == notifying.webhook(submission).event
    timestamp = int(headers["webhook-timestamp"])
    assert before <= timestamp <= time.time()
    wanted = signature([SECRET], headers["webhook-id"], timestamp, received.body)
    assert headers["webhook-signature"] == wanted


def test_a_cancelled_submission_is_told(notifying: Notifying, redis_url: str) -> None:
    with Client(redis_url, notifying.queue.name) as client:
        submission = client.submit(["x"] * 2, webhook=notifying.receiver.url)
        client.cancel(submission)
    notifying.turn()
    assert notifying.receiver.received[0].notice["data"]["counts"]["cancelled"] == 2


def test_over_tls_the_certificate_is_checked(
    notifying: Notifying, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with run_receiver(context) as receiver:
        notifying.notifier = notifying.make(receiver.host)
        submission = notifying.ended(receiver.url)
        notifying.turn()
        found = notifying.webhook(submission)
        assert found.state == "pending"
        assert "certificate verify failed" in (found.error or "")
        assert receiver.received == []
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert notifying.try_again(submission).state == "delivered"
        assert len(receiver.received) == 1


# --- Failures -----------------------------------------------------------------------------------


def test_an_error_is_tried_again_with_the_same_event_and_body(notifying: Notifying) -> None:
    notifying.receiver.answers = [500, 404]
    submission = notifying.ended()
    notifying.turn()
    found = notifying.webhook(submission)
    assert (found.state, found.attempts) == ("pending", 1)
    assert found.error == f"{notifying.receiver.host} answered 500 Internal Server Error"
    job = RqJob.fetch(found.event or "", notifying.rq.connection, JSONSerializer)
    assert job.get_status() == "failed"
    assert "404" in (notifying.try_again(submission).error or "")
    found = notifying.try_again(submission)
    assert (found.state, found.attempts, found.error) == ("delivered", 3, None)
    assert notifying.receiver.ids == [found.event] * 3
    assert len({request.body for request in notifying.receiver.received}) == 1


def test_before_its_time_it_is_not_tried_again(notifying: Notifying) -> None:
    notifying.receiver.answers = [500]
    submission = notifying.ended()
    notifying.turn()
    notifying.turn()
    assert len(notifying.receiver.received) == 1
    assert notifying.webhook(submission).attempts == 1


def test_redirects_are_not_followed(notifying: Notifying) -> None:
    with run_receiver() as other:
        notifying.receiver.answers = [redirect_to(other.url)]
        submission = notifying.ended()
        notifying.turn()
        found = notifying.webhook(submission)
        assert found.state == "pending"
        assert (found.error or "").endswith(
            "answered 307 Temporary Redirect; redirects are not followed"
        )
        assert other.received == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (mute, "no answer within 1 s"),
        (drip, "no answer within 1 s"),
        (hang_up, "Remote end closed connection without response"),
        (gibberish, "220 smtp.example.org ready"),
    ],
)
def test_a_receiver_that_does_not_answer_holds_up_nobody_for_long(
    notifying: Notifying, monkeypatch: pytest.MonkeyPatch, answer: Answer, reason: str
) -> None:
    monkeypatch.setattr(worker.webhooks.notifier, "WEBHOOK_TIMEOUT", 1)
    notifying.receiver.answers = [answer]
    first = notifying.ended()
    notifying.turn()
    found = notifying.webhook(first)
    assert found.state == "pending"
    assert reason in (found.error or "")
    second = notifying.ended()
    notifying.turn()
    assert notifying.webhook(second).state == "delivered"
    assert notifying.try_again(first).state == "delivered"


def test_silence_while_connecting_is_bounded_too(
    notifying: Notifying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.webhooks.post, "_SILENCE", 0.1)
    notifying.receiver.answers = [mute]
    submission = notifying.ended()
    notifying.turn()
    assert "timed out" in (notifying.webhook(submission).error or "")


def test_the_body_of_an_answer_is_not_read(notifying: Notifying) -> None:
    notifying.receiver.answers = [flood]
    submission = notifying.ended()
    notifying.turn()
    assert notifying.webhook(submission).state == "delivered"


def test_a_receiver_that_is_away_is_tried_for_a_day(notifying: Notifying) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    notifying.notifier = notifying.make(f"127.0.0.1:{port}")
    submission = notifying.ended(url)
    key = notifying.queue.keys.submission(submission)
    pauses, elapsed = [], 0.0
    while (found := notifying.try_again(submission)).state == "pending":
        assert "refused" in (found.error or "")
        pause = notifying.queue.client.zscore(notifying.queue.keys.notices, submission)
        seconds = (pause or 0) / 1000 - time.time()
        pauses.append(seconds)
        elapsed += seconds
        # What the pause would do: the first try is so much longer ago.
        first = float(notifying.queue.client.hget(key, "webhook_first_try") or 0)
        notifying.queue.client.hset(key, "webhook_first_try", int(first - seconds * 1000))
    assert found.state == "dead"
    assert found.attempts == len(pauses) + 1
    assert "refused" in (found.error or "")
    assert LIFETIME - LONGEST_PAUSE < elapsed < LIFETIME + 1
    for number, pause in enumerate(pauses):
        most = min(LONGEST_PAUSE, FIRST_PAUSE * 2**number)
        assert most / 2 - 2 < pause <= most
    assert notifying.try_again(submission) == found


def test_pauses_are_of_random_length() -> None:
    assert len({pause_after(1) for _ in range(20)}) > 10
    assert pause_after(10**9) <= LONGEST_PAUSE


def test_a_notifier_that_was_away_for_days_delivers_what_it_finds(notifying: Notifying) -> None:
    submission = notifying.ended()
    key = notifying.queue.keys.submission(submission)
    ended = int(notifying.queue.client.hget(key, "webhook_ended") or 0)
    notifying.queue.client.hset(key, "webhook_ended", ended - 3 * 86400 * 1000)
    notifying.receiver.answers = [500]
    notifying.turn()
    assert notifying.webhook(submission).state == "pending"
    assert notifying.try_again(submission).state == "delivered"


# --- What must not be asked for -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.org/", "example.org is not among the hosts"),
        ("http://127.0.0.1:1/", "127.0.0.1:1 is not among the hosts"),
        ("http://127.0.0.1/", "127.0.0.1 is not among the hosts"),
        ("http://127.0.0.1:{port}@example.org/", "a user or a password"),
        ("file:///etc/passwd", "does not begin with https:// or http://"),
        ("gopher://127.0.0.1:{port}/", "does not begin with https:// or http://"),
        ("http://127.0.0.1:{port}/\r\nX: y", "spaces, backslashes or other characters"),
        ("http://example.org\\@127.0.0.1:{port}/", "spaces, backslashes or other characters"),
        ("", "does not begin with"),
    ],
)
def test_a_url_that_is_not_allowed_is_dead_at_once(
    notifying: Notifying, url: str, reason: str
) -> None:
    """Written into Redis past the checks of whoever submits."""
    submission = notifying.ended()
    _, port = notifying.receiver.host.split(":")
    hostile = url.replace("{port}", port)
    notifying.queue.client.hset(notifying.queue.keys.submission(submission), "webhook", hostile)
    notifying.turn()
    found = notifying.webhook(submission)
    assert (found.state, found.attempts) == ("dead", 1)
    assert reason in (found.error or "")
    assert notifying.receiver.received == []


@pytest.mark.parametrize(
    ("field", "value"), [("attempts", "many"), ("ended", "9" * 18), ("ended", "soon")]
)
def test_a_damaged_record_is_dead_and_stops_no_other(
    notifying: Notifying, field: str, value: str
) -> None:
    damaged, good = notifying.ended(), notifying.ended()
    key = notifying.queue.keys.submission(damaged)
    notifying.queue.client.hset(key, f"webhook_{field}", value)
    notifying.turn()
    notifying.turn()
    assert notifying.webhook(good).state == "delivered"
    state, error = notifying.queue.client.hmget(key, "webhook_state", "webhook_error")
    assert state == "dead"
    assert "is damaged: " in (error or "")
    assert list(notifying.queue.client.zrange(notifying.queue.keys.notices, 0, -1)) == []


# --- What is lost is found again ----------------------------------------------------------------


def test_a_notifier_that_died_before_it_made_the_rq_job(notifying: Notifying) -> None:
    submission = notifying.ended()
    assert notifying.notices.take(10, due_again=60)
    notifying.turn()
    assert notifying.receiver.received == []
    assert notifying.try_again(submission).state == "delivered"


def test_a_notifier_that_died_when_it_had_taken_the_job_off(notifying: Notifying) -> None:
    submission = notifying.ended()
    ((_, event),) = notifying.notices.take(10, due_again=60)
    notifying.notices.enqueue(submission, event)
    assert notifying.rq.pop_job_id() == event
    assert notifying.try_again(submission).state == "delivered"
    assert notifying.receiver.ids == [event]


def test_a_notifier_that_is_killed_between_the_post_and_its_note_delivers_twice_by_one_id(
    notifying: Notifying, redis_url: str, tmp_path: Path
) -> None:
    arrived = threading.Event()
    notifying.receiver.answers = [lambda handler: (arrived.set(), mute(handler))[0]]
    submission = notifying.ended()
    with notifier_process(notifying, redis_url, tmp_path) as process:
        assert arrived.wait(60)
        process.kill()
        process.wait()
    event = notifying.webhook(submission).event or ""
    record = RqJob.fetch(event, notifying.rq.connection, JSONSerializer)
    assert record.get_status() == "started"
    notifying.try_again(submission)
    assert notifying.receiver.ids == [event]  # It still passes for alive.
    notifying.rq.connection.delete(f"rq:worker:{record.worker_name}")
    assert notifying.try_again(submission).state == "delivered"
    assert notifying.receiver.ids == [event, event]


def test_enqueued_twice_it_is_delivered_once(
    notifying: Notifying, monkeypatch: pytest.MonkeyPatch
) -> None:
    submission = notifying.ended()
    ((_, event),) = notifying.notices.take(10, due_again=60)
    notifying.notices.enqueue(submission, event)
    notifying.notices.enqueue(submission, event)
    assert notifying.rq.job_ids == [event]
    with monkeypatch.context() as patch:
        patch.setattr(notifying.notifier.place, "take", lambda: None)
        notifying.try_again(submission)  # Due again while it waits on the queue.
    assert notifying.rq.job_ids == [event]
    notifying.turn()
    notifying.turn()
    assert notifying.receiver.ids == [event]


def test_two_notifiers_deliver_each_notice_once(notifying: Notifying) -> None:
    submissions = [notifying.ended(jobs=1) for _ in range(20)]
    other = notifying.make()
    while any(notifying.webhook(submission).state == "pending" for submission in submissions):
        notifying.turn()
        other.turn()
    assert sorted(notifying.receiver.ids) == sorted(
        notifying.webhook(submission).event or "" for submission in submissions
    )


def test_what_is_due_does_not_fill_the_rq_queue(
    notifying: Notifying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.webhooks.notifier, "_MAX_LISTED", 3)
    submissions = [notifying.ended(jobs=1) for _ in range(5)]
    notifying.turn()
    assert notifying.rq.count == 2
    for _ in range(4):
        notifying.turn()
    assert {notifying.webhook(submission).state for submission in submissions} == {"delivered"}


def test_redis_is_away_for_a_moment_when_the_delivery_is_to_be_noted(
    notifying: Notifying, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, refusals = Notices.note_delivery, [redis.ConnectionError("away")]

    def note_later(self: Notices, *args: object, **kwargs: object) -> str:
        if refusals:
            raise refusals.pop()
        return note(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Notices, "note_delivery", note_later)
    monkeypatch.setattr(worker.webhooks.notifier, "_PAUSE", 0.01)
    submission = notifying.ended()
    notifying.turn()
    assert notifying.webhook(submission).state == "delivered"
    assert len(notifying.receiver.received) == 1


def test_opened_again_by_a_replay_while_it_is_on_the_rq_queue_it_is_not_posted(
    notifying: Notifying,
) -> None:
    submission = notifying.ended()
    ((_, event),) = notifying.notices.take(10, due_again=60)
    notifying.notices.enqueue(submission, event)
    key = notifying.queue.keys.submission(submission)
    notifying.queue.client.hdel(key, "webhook_event", "webhook_state")
    notifying.turn()
    assert notifying.receiver.received == []


def test_a_submission_that_was_deleted_is_not_posted(notifying: Notifying) -> None:
    submission = notifying.ended()
    ((_, event),) = notifying.notices.take(10, due_again=60)
    notifying.notices.enqueue(submission, event)
    notifying.queue.client.delete(notifying.queue.keys.submission(submission))
    notifying.turn()
    assert notifying.receiver.received == []


# --- What nobody of Lorry sends -----------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def push(notifying: Notifying, **fields: object) -> None:
    """Put a job on the rq queue as any program could; it is a good one but for the fields."""
    id_ = f"hostile-{notifying.queue.name}"
    record = {
        "data": json.dumps([WEBHOOK_FUNCTION, None, ["sub", id_], {}]).encode(),
        "origin": notifying.rq.name,
        "status": "queued",
        "created_at": "2026-01-01T00:00:00.000000Z",
        **fields,
    }
    connection = notifying.rq.connection
    connection.hset(f"rq:job:{id_}", mapping=record)  # type: ignore[arg-type]
    connection.rpush(notifying.rq.key, id_)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"data": b'["os.system", null, ["touch /tmp/x", "y"], {}]'}, "it asks for 'os.system'"),
        (
            {"data": json.dumps([WEBHOOK_FUNCTION, None, ["http://x", "y"], {}]).encode()},
            "and is for 'y'",
        ),
        (
            {"data": json.dumps([WEBHOOK_FUNCTION, None, ["sub"], {}]).encode()},
            "its arguments are not a submission and the id of an event",
        ),
        ({"failure_callback_name": "os.getcwd"}, "it names a callback"),
        ({"webhooks": '[{"url": "http://127.0.0.1:9", "job_status": "failed"}]'}, "a web address"),
        ({"timeout": "soon"}, "its record is damaged"),
    ],
)
def test_a_job_that_asks_for_anything_else_is_refused_and_reported(
    notifying: Notifying, fields: dict[str, object], reason: str
) -> None:
    push(notifying, **fields)
    with capture_logs() as logs:
        notifying.turn()
    (told,) = [line["reason"] for line in logs if line["event"] == "rq_job_refused"]
    assert reason in told
    submission = notifying.ended()
    notifying.turn()
    assert notifying.webhook(submission).state == "delivered"


def test_nothing_unpickles_what_a_job_holds(notifying: Notifying, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    push(notifying, data=zlib.compress(pickle.dumps(Bomb(mark))))
    notifying.turn()
    push(notifying, meta=zlib.compress(pickle.dumps(Bomb(mark))))
    notifying.turn()
    pickling = Queue(
        notifying.rq.name, connection=notifying.rq.connection, serializer=DefaultSerializer
    )
    pickling.enqueue(Path.touch, mark)
    notifying.turn()
    assert not mark.exists()
    assert notifying.receiver.received == []


def test_a_job_that_squats_on_the_id_of_an_event_does_not_hold_it_up(
    notifying: Notifying,
) -> None:
    submission = notifying.ended()
    event = notifying.webhook(submission).event
    notifying.rq.connection.hset(f"rq:job:{event}", "failure_callback_name", "os.getcwd")
    notifying.turn()
    assert notifying.webhook(submission).state == "delivered"


# --- The command --------------------------------------------------------------------------------


class notifier_process:  # noqa: N801 - it is used like a function.
    """The command ``notifier`` in a process of its own; killed at the end if it still runs."""

    def __init__(self, notifying: Notifying, redis_url: str, folder: Path) -> None:
        file = folder / "secret"
        file.write_text(f"whsec_{base64.b64encode(SECRET).decode()}\n")
        self._command = [
            *(sys.executable, "-m", "worker.webhooks.cli", "--queue", notifying.queue.name),
            *("--webhook-hosts", notifying.receiver.host, "--webhook-secret-file", str(file)),
        ]
        self._environment = {**os.environ, "REDIS_URL": redis_url}

    def __enter__(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            self._command, env=self._environment, stderr=subprocess.PIPE, text=True
        )
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def test_the_command_delivers_and_ends_in_order(
    notifying: Notifying, redis_url: str, tmp_path: Path
) -> None:
    submission = notifying.ended()
    with notifier_process(notifying, redis_url, tmp_path) as process:
        wait_until(
            lambda: notifying.webhook(submission).state == "delivered", "it is not delivered"
        )
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
    lines = [json.loads(line) for line in errors.splitlines()]
    events = [line["event"] for line in lines if "notice" in line or "notifier" in line]
    assert events == ["notifier_ready", "notice_delivered", "notifier_ended"]
    assert base64.b64encode(SECRET).decode() not in errors


@pytest.mark.parametrize(
    ("flags", "environment", "reason"),
    [
        (["--webhook-hosts", "a/b"], {}, "--webhook-hosts a/b: give HOST or HOST:PORT alone"),
        (["--webhook-hosts", "*"], {}, "--webhook-hosts *: * is no host's name"),
        (["--webhook-hosts", "a"], {}, "WEBHOOK_SECRET holds no secret"),
        (["--webhook-hosts", "a"], {"WEBHOOK_SECRET": "hunter2"}, "is not whsec_ and the base64"),
        (
            ["--webhook-hosts", "a", "--webhook-secret-file", "/none"],
            {},
            "--webhook-secret-file /none cannot be read: No such file",
        ),
        (
            ["--webhook-hosts", "a"],
            {"WEBHOOK_SECRET_FILE": "/none"},
            "WEBHOOK_SECRET_FILE /none cannot be read",
        ),
        (["--webhook-hosts", "a", "--queue", "a b"], {}, "--queue a b: use up to 64 letters"),
    ],
)
def test_a_wrong_flag_or_secret_is_answered_by_a_sentence(
    flags: list[str], environment: dict[str, str], reason: str
) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "worker.webhooks.cli", *flags],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert run.returncode == 2
    assert reason in run.stderr
    assert "Traceback" not in run.stderr
    assert "hunter2" not in run.stderr
