"""``submit --webhook`` and what ``status`` says of it, against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.job_queue import JobQueue
from broker.notices import Notices
from producer.client import Client
from schemas.errors import BadInput
from schemas.webhook import WebhookUrl, parse_webhook_host
from tests.test_producer_cli import Producer, Worker, prompts

URL = "https://example.org:8443/hook?team=a"


@pytest.fixture
def producer(redis_url: str, queue_name: str) -> Producer:
    return Producer(redis_url, queue_name)


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


@pytest.fixture
def notices(queue: JobQueue) -> Notices:
    return Notices(queue.client, queue.name)


def alive(notices: Notices, *hosts: str) -> None:
    """Let a notifier be alive."""
    notices.allow_hosts(hosts, alive_seconds=60)


def test_without_a_notifier_it_is_kept_and_that_is_said(
    producer: Producer, client: Client, tmp_path: Path
) -> None:
    outcome = producer("submit", prompts(tmp_path, '"x"'), "--webhook", URL, "--json")
    assert outcome.exit_code == 0
    assert "Nobody delivers webhooks" in outcome.stderr
    assert "`notifier --webhook-hosts HOST`" in outcome.stderr
    status = client.status(json.loads(outcome.stdout)["submission"])
    assert status.webhook.url == URL  # type: ignore[union-attr]


def test_that_is_not_said_where_nothing_is_sent(producer: Producer, tmp_path: Path) -> None:
    outcome = producer("submit", prompts(tmp_path, "{"), "--webhook", URL)
    assert outcome.exit_code == 2
    assert "Nobody delivers webhooks" not in outcome.stderr


def test_with_one_nothing_is_said(producer: Producer, notices: Notices, tmp_path: Path) -> None:
    alive(notices, "example.org:8443")
    outcome = producer("submit", prompts(tmp_path, '"x"'), "--webhook", URL)
    assert outcome.exit_code == 0
    assert "webhook" not in outcome.stderr
    assert "webhook" not in producer("submit", prompts(tmp_path, '"x"')).stderr


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://other.org/", "other.org is not among the hosts that the notifier's --webhook-"),
        ("https://example.org/", "example.org is not among the hosts"),
        ("ftp://example.org:8443/", "it does not begin with https:// or http://"),
        ("https://me:pw@example.org:8443/", "it holds a user or a password"),
        ("https://example.org:8443/#x", "it has a #fragment"),
        ("https://example.org:8443/" + "x" * 2000, "it is longer than 2000 characters"),
        ("https://", "it names no host"),
    ],
)
def test_what_cannot_be_told_is_refused_and_nothing_is_sent(
    producer: Producer, client: Client, notices: Notices, tmp_path: Path, url: str, reason: str
) -> None:
    alive(notices, "example.org:8443")
    outcome = producer("submit", prompts(tmp_path, '"x"'), "--webhook", url)
    assert outcome.exit_code == 2
    assert reason in outcome.stderr
    assert client.overview().num_submissions == 0


def test_the_python_client_takes_it_too(client: Client, notices: Notices) -> None:
    assert client.status(client.submit(["x"])).webhook is None  # type: ignore[union-attr]
    assert not client.has_notifier()
    alive(notices, "example.org:8443")
    assert client.has_notifier()
    status = client.status(client.submit(["x"], webhook=URL))
    assert status.webhook.url == URL  # type: ignore[union-attr]
    with pytest.raises(BadInput, match="not among the hosts"):
        client.submit(["x"], webhook="http://127.0.0.1/")


def shown(producer: Producer, submission: str) -> str:
    """What status says of the webhook."""
    lines = producer("status", submission).stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("webhook")]
    return line.removeprefix("webhook").strip()


def test_status_shows_how_far_it_is(
    producer: Producer, client: Client, queue: JobQueue, notices: Notices
) -> None:
    submission = client.submit(["x"], webhook=URL)
    assert shown(producer, submission) == f"{URL}: told when all jobs have ended"
    Worker(queue).finish_all()
    assert shown(producer, submission) == f"{URL}: pending"
    ((_, event),) = notices.take(1, due_again=60)
    reason = "example.org answered 500 \x1b[31mred"
    notices.note_delivery(submission, event, 1, "failed", reason, delay=60, lifetime=600)
    text = shown(producer, submission)
    assert text.startswith(
        f"{URL}: pending, after 1 attempt: example.org answered 500 \\x1b[31mred"
    )
    assert "; next try at 20" in text
    notices.note_delivery(submission, event, 2, "dead", "no use", delay=60, lifetime=600)
    assert ": dead since 20" in shown(producer, submission)
    assert shown(producer, submission).endswith(", after 2 attempts: no use")
    found = json.loads(producer("status", submission, "--json").stdout)["webhook"]
    assert (found["url"], found["state"], found["event"]) == (URL, "dead", event)


def test_status_shows_a_delivery(
    producer: Producer, client: Client, queue: JobQueue, notices: Notices
) -> None:
    submission = client.submit(["x"], webhook=URL)
    Worker(queue).finish_all()
    ((_, event),) = notices.take(1, due_again=60)
    notices.note_delivery(submission, event, 1, "delivered", "", delay=60, lifetime=600)
    assert shown(producer, submission).startswith(f"{URL}: delivered at 20")
    assert shown(producer, submission).endswith(", by 1 attempt")


@pytest.mark.parametrize(
    ("url", "hosts", "is_allowed"),
    [
        ("https://a.org/x", ["a.org"], True),
        ("https://A.ORG:443/x", ["a.org"], True),
        ("https://a.org/x", ["a.org:443"], True),
        ("http://a.org/x", ["a.org"], True),
        ("http://a.org/x", ["a.org:443"], False),
        ("http://a.org:443/x", ["a.org"], False),
        ("https://a.org:8080/x", ["a.org"], False),
        ("https://a.org:8080/x", ["A.org:8080"], True),
        ("https://b.a.org/x", ["a.org"], False),
        ("https://a.org.evil.com/x", ["a.org"], False),
        ("http://[::1]:90/", ["[::1]:90"], True),
        ("http://[0:0:0:0:0:0:0:1]/", ["[::1]"], True),
        ("http://[::1]/", ["[::1]:90"], False),
        ("http://2130706433/", ["127.0.0.1"], False),
    ],
)
def test_a_host_is_allowed_at_the_port_that_is_named_or_the_schemes_own(
    url: str, hosts: list[str], is_allowed: bool
) -> None:
    allowed = [parse_webhook_host(host) for host in hosts]
    assert WebhookUrl.parse(url).is_among(allowed) == is_allowed


@pytest.mark.parametrize(
    "text", ["a.org/", "a.org/x", "a.org?x", "me@a.org", "*.org", "", "a b", "a:x", "a.org:0"]
)
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(it|give|there|\*.org) "):
        parse_webhook_host(text)
