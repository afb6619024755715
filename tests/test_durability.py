"""What servers keep, and whether they say so: settings that lose jobs, and `submit --durable`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from broker import durability
from broker.connection import connect
from broker.durability import require_durability, sync
from broker.job_queue import JobQueue
from broker.server_settings import read_settings, warnings
from producer.client import Client
from schemas.errors import ServerUnavailable
from schemas.job import Job
from tests.servers import ValkeyServer
from tests.test_producer_cli import Producer, prompts

IN_MEMORY = ("--appendonly", "no", "--save", "")
EVICTING = ("--appendonly", "yes", "--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru")
NO_WAITAOF = ("--appendonly", "yes", "--rename-command", "WAITAOF", "")

StartServer = Callable[..., ValkeyServer]


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    with ExitStack() as servers:

        def start(*flags: str) -> ValkeyServer:
            server = ValkeyServer(tmp_path / "server", *flags)
            servers.callback(server.stop)
            return server

        yield start


# --- Settings -----------------------------------------------------------------------------------


def warnings_of(server: ValkeyServer) -> list[str]:
    with server.client() as client:
        return warnings(read_settings(client))


@pytest.mark.parametrize(
    ("flags", "what", "remedy"),
    [
        (IN_MEMORY, "the jobs that it holds are lost", "appendonly yes"),
        (("--save", "60 1"), "the jobs since its last snapshot are lost", "appendonly yes"),
        (EVICTING, r"maxmemory-policy allkeys-lru", "maxmemory-policy noeviction"),
        (("--appendonly", "yes", "--appendfsync", "no"), "appendfsync no", "appendfsync everysec"),
    ],
)
def test_a_setting_that_loses_jobs_is_told_with_its_remedy(
    start_server: StartServer, flags: tuple[str, ...], what: str, remedy: str
) -> None:
    (sentence,) = warnings_of(start_server(*flags))
    assert what in sentence
    assert f"CONFIG SET {remedy}" in sentence


def test_a_server_that_never_fills_up_may_have_any_policy(start_server: StartServer) -> None:
    flags = ("--appendonly", "yes", "--maxmemory-policy", "allkeys-lru")
    assert warnings_of(start_server(*flags)) == []


def test_a_server_that_keeps_its_settings_to_itself_is_used_without_a_warning(
    start_server: StartServer,
) -> None:
    server = start_server(*IN_MEMORY)
    with server.client() as admin:
        admin.execute_command("ACL SETUSER me on >pw ~* &* +@all -config -info")
    with Client(server.url.replace("//", "//me:pw@"), "q") as client:
        assert client.submit(["Hello"])
        assert client.server_warnings() == []


def test_a_server_without_config_is_used(start_server: StartServer) -> None:
    server = start_server("--appendonly", "yes", "--rename-command", "CONFIG", "")
    assert warnings_of(server) == []
    with Client(server.url, "q") as client:
        assert client.submit(["Hello"], durable=True)


def test_submit_warns_of_a_server_that_loses_jobs(
    start_server: StartServer, tmp_path: Path
) -> None:
    outcome = Producer(start_server(*IN_MEMORY).url, "q")("submit", prompts(tmp_path, '"x"'))
    assert outcome.exit_code == 0
    assert "warning: The server keeps no append-only file" in outcome.stderr


# --- Durable submissions ------------------------------------------------------------------------


@pytest.fixture
def durable_queue(start_server: StartServer) -> Iterator[JobQueue]:
    """On a server that appends to its file, and of which jobs of ``sub`` have been sent."""
    with connect(start_server().url) as client:
        queue = JobQueue(client, "q")
        queue.submit("sub", "file", 1, 0, [Job(id="job", prompt="Hello")])
        yield queue


def num_calls(queue: JobQueue, command: str) -> int:
    return int(queue.client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


def test_submit_durable_says_so_once_the_server_has_waited_for_its_disk(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server()
    outcome = Producer(server.url, "q")("submit", prompts(tmp_path, '"x"'), "--durable")
    assert outcome.exit_code == 0
    assert outcome.stdout.splitlines()[0].endswith(", on the server's disk")
    with connect(server.url) as client:
        # Once to see whether it can, and once behind the jobs.
        assert num_calls(JobQueue(client, "q"), "waitaof") == 2


@pytest.mark.parametrize("is_new_connection", [False, True])
def test_what_is_not_on_disk_is_waited_for_also_over_another_connection(
    durable_queue: JobQueue, monkeypatch: pytest.MonkeyPatch, is_new_connection: bool
) -> None:
    monkeypatch.setattr(durability, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(durability, "BLOCK_SECONDS", 0.1)
    durable_queue.client.config_set("appendfsync", "no")  # From here nothing is forced to disk.
    durable_queue.submit("more", "file", 1, 0, [Job(id="other", prompt="Hello")])
    if is_new_connection:
        durable_queue.client.connection_pool.disconnect()
    with pytest.raises(ServerUnavailable, match="has not written them to disk"):
        sync(durable_queue, "more", 1)
    monkeypatch.undo()
    durable_queue.client.config_set("appendfsync", "everysec")
    sync(durable_queue, "more", 1)


def test_jobs_that_the_server_has_lost_are_told(durable_queue: JobQueue) -> None:
    with pytest.raises(ServerUnavailable, match=r"it holds 1 of 2\. Send them again"):
        sync(durable_queue, "sub", 2)
    durable_queue.client.flushall()
    with pytest.raises(ServerUnavailable, match="it holds 0 of 1"):
        sync(durable_queue, "sub", 1)
    assert durable_queue.client.dbsize() == 0


@pytest.mark.parametrize(
    ("flags", "reason", "remedy"),
    [
        (IN_MEMORY, "it keeps no append-only file", "CONFIG SET appendonly yes"),
        (EVICTING, "drops keys when it is full", "CONFIG SET maxmemory-policy noeviction"),
        (("--appendonly", "yes", "--appendfsync", "no"), "appendfsync no", "appendfsync everysec"),
        (NO_WAITAOF, "it has no WAITAOF", "appendfsync always"),
    ],
)
def test_a_server_that_cannot_promise_durability_is_refused_before_anything_is_sent(
    start_server: StartServer, tmp_path: Path, flags: tuple[str, ...], reason: str, remedy: str
) -> None:
    server = start_server(*flags)
    outcome = Producer(server.url, "q")("submit", prompts(tmp_path, '"x"'), "--durable")
    assert outcome.exit_code == 4
    for text in (reason, remedy, "Nothing was sent."):
        assert text in outcome.stderr
    with server.client() as client:
        assert client.dbsize() == 0


def test_a_server_without_waitaof_that_writes_before_it_answers_will_do(
    start_server: StartServer,
) -> None:
    server = start_server(*NO_WAITAOF, "--appendfsync", "always")
    with Client(server.url, "q") as client:
        assert client.submit(["Hello"], durable=True)


def test_a_user_who_may_not_wait_for_the_disk_is_told(start_server: StartServer) -> None:
    server = start_server()
    with server.client() as admin:
        admin.execute_command("ACL SETUSER me on >pw ~* &* +@all -waitaof")
    with Client(server.url.replace("//", "//me:pw@"), "q") as client:
        with pytest.raises(ServerUnavailable, match=r"may not WAITAOF.*\+waitaof"):
            client.submit(["Hello"], durable=True)
        assert client.overview().num_submissions == 0


def test_the_embedded_server_promises_durability(queue: JobQueue) -> None:
    require_durability(queue.client)
    assert warnings(read_settings(queue.client)) == []
