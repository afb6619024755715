"""The proxy does to a real server's connections what the fault tests say it does."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import redis

from benchmarks.tcp_proxy import TcpProxy
from broker.connection import connect
from broker.job_queue import JobQueue
from schemas.job import Job


@pytest.fixture
def proxy(redis_url: str) -> Iterator[TcpProxy]:
    with TcpProxy(redis_url) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: TcpProxy) -> Iterator[redis.Redis]:
    with connect(proxy.url, timeout=0.3) as client:
        yield client


@pytest.fixture
def key(queue: JobQueue) -> str:
    return queue.keys.prefix + "x"


def test_what_comes_is_passed_on_and_counted(
    client: redis.Redis, proxy: TcpProxy, key: str
) -> None:
    text = "a line\r\nand another " * 10_000
    client.set(key, text)
    assert client.get(key) == text
    assert (proxy.commands["SET"], proxy.commands["GET"]) == (1, 1)


def test_a_lost_reply_breaks_the_connection_once_the_command_is_executed(
    client: redis.Redis, proxy: TcpProxy, key: str
) -> None:
    proxy.lose_replies("INCRBY", times=2)
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            client.incr(key)
    assert client.incr(key) == 3


def test_a_script_is_known_by_its_name(proxy: TcpProxy, queue: JobQueue) -> None:
    queue.submit("s", "file", 1, 0, [Job(id="there", prompt="x")])  # Now the server knows it.
    with connect(proxy.url) as client:
        through_proxy = JobQueue(client, queue.name)
        proxy.lose_replies("submit")
        with pytest.raises(redis.ConnectionError):
            through_proxy.submit("s2", "file", 1, 0, [Job(id="lost", prompt="x")])
        through_proxy.submit("s2", "file", 1, 0, [Job(id="lost", prompt="x")])
    assert proxy.commands["submit"] == 2
    for submission in ("s", "s2"):
        assert queue.client.xlen(queue.keys.stream(None, "normal", submission)) == 1


@pytest.mark.parametrize(("part", "executed"), [("request", None), ("reply", "1")])
def test_a_held_command_is_kept_before_or_after_it_is_executed(
    proxy: TcpProxy, queue: JobQueue, key: str, part: str, executed: str | None
) -> None:
    with connect(proxy.url) as client:
        sender = threading.Thread(target=lambda: client.set(key, 1))
        with proxy.hold("SET", part) as held:  # type: ignore[arg-type]
            sender.start()
            held.wait()
            assert sender.is_alive()
            assert queue.client.get(key) == executed
        sender.join(timeout=10)
        assert queue.client.get(key) == "1"


def test_a_stalled_proxy_passes_nothing_on_until_it_resumes(
    client: redis.Redis, proxy: TcpProxy, key: str
) -> None:
    client.ping()
    proxy.stall()
    with pytest.raises(redis.TimeoutError):
        client.ping()
    proxy.resume()
    assert client.ping()


def test_half_open_connections_are_never_answered_and_new_ones_are(
    client: redis.Redis, proxy: TcpProxy, queue: JobQueue, key: str
) -> None:
    client.ping()
    proxy.half_open()
    with pytest.raises(redis.TimeoutError):
        client.set(key, 1)
    assert queue.client.get(key) is None
    assert client.ping()


def test_reset_connections_fail_at_once(client: redis.Redis, proxy: TcpProxy) -> None:
    with client.pubsub() as waiting:
        waiting.subscribe("x")
        assert waiting.get_message(timeout=5)
        proxy.reset()
        with pytest.raises(redis.ConnectionError):
            waiting.get_message(timeout=5)


def test_a_proxy_that_refuses_looks_like_no_server(client: redis.Redis, proxy: TcpProxy) -> None:
    proxy.refuses = True
    with pytest.raises(redis.ConnectionError):
        client.ping()
    proxy.refuses = False
    assert client.ping()


def test_latency_delays_each_command(client: redis.Redis, proxy: TcpProxy) -> None:
    client.ping()
    proxy.latency = 1.0
    with pytest.raises(redis.TimeoutError):
        client.ping()
    proxy.latency = 0.01
    assert client.ping()
