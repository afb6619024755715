"""How a server is named, reached and given up."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from benchmarks.waiting import wait_until
from broker import connection
from broker.address import parse_address, resolve_url, without_password
from broker.connection import (
    BLOCK_SECONDS,
    SOCKET_TIMEOUT,
    connect,
    is_refusal,
    may_pass,
    server_errors,
)
from producer.client import Client
from schemas.errors import BadInput, ServerUnavailable
from tests.servers import ValkeyServer
from tests.test_producer_cli import Producer, prompts


@contextmanager
def mute_server() -> Iterator[tuple[str, list[socket.socket]]]:
    """The URL of one that accepts connections and never answers, and those that it accepted."""
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            try:
                while True:
                    accepted.append(listener.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"redis://127.0.0.1:{listener.getsockname()[1]}", accepted
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connected in accepted:
                connected.close()


@pytest.mark.parametrize("retries", [0, 3])
def test_a_server_that_accepts_and_is_mute_is_tried_as_often_as_asked_for(retries: int) -> None:
    with mute_server() as (url, accepted):
        client = connect(url, retries=retries, timeout=0.05)
        with client, pytest.raises(redis.TimeoutError):
            client.ping()
        wait_until(lambda: len(accepted) > retries, "it was tried less often")
        assert len(accepted) == 1 + retries


def test_a_command_is_not_repeated_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RETRY_SECONDS", 0.1)
    with mute_server() as (url, accepted):
        client = connect(url, retries=1000, timeout=0.05)
        with client, pytest.raises(redis.TimeoutError):
            client.ping()
        assert len(accepted) <= 3


def test_a_command_whose_reply_was_lost_is_not_repeated_unasked(tmp_path: Path) -> None:
    server = ValkeyServer(tmp_path)
    try:
        with connect(server.url, timeout=0.2) as client:
            client.ping()
            server.suspend()
            with pytest.raises(redis.TimeoutError):
                client.incr("sent")
            server.resume()
            assert client.get("sent") == "1"
    finally:
        server.stop()


def test_a_producer_bridges_a_restart_of_the_server(tmp_path: Path) -> None:
    server = ValkeyServer(tmp_path)
    try:
        with Client(server.url, "q") as client:
            submission = client.submit(["Hello"])
            server.stop()
            server.start()
            assert client.status(submission).counts["waiting"] == 1  # type: ignore[union-attr]
            assert client.submit(["Hello again"])
    finally:
        server.stop()


def test_a_producer_whose_server_went_mute_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "producer.client.session.connect", lambda *a, **k: connect(*a, **k, timeout=0.05)
    )
    server = ValkeyServer(tmp_path)
    try:
        with Client(server.url, "q") as client:
            client.overview()
            server.suspend()
            with pytest.raises(ServerUnavailable, match="No Redis server answers at redis://127"):
                client.submit(["Hello"])
    finally:
        server.stop()


def test_a_blocking_read_ends_before_its_connection_counts_as_dead() -> None:
    assert BLOCK_SECONDS < SOCKET_TIMEOUT


# --- URLs ---------------------------------------------------------------------------------------


def test_a_url_names_one_server_a_socket_sentinels_or_a_cluster() -> None:
    server = parse_address("redis://me:p%40ss@host:7000/2")
    assert (server.kind, server.nodes, server.database) == ("server", (("host", 7000),), 2)
    assert (server.username, server.password, server.tls) == ("me", "p@ss", None)
    assert parse_address("rediss://[::1]").nodes == (("::1", 6379),)
    assert parse_address("rediss://host?ssl_cert_reqs=none").tls == {"ssl_cert_reqs": "none"}
    sock = parse_address("unix:///run/a%20b.sock?db=3")
    assert (sock.kind, sock.path, sock.database) == ("socket", "/run/a b.sock", 3)
    sentinel = parse_address("redis+sentinel://:pw@a,b:1/main/4?sentinel_password=s")
    assert (sentinel.kind, sentinel.service, sentinel.database) == ("sentinel", "main", 4)
    assert sentinel.nodes == (("a", 26379), ("b", 1))
    assert sentinel.sentinel_login == {"password": "s"}
    cluster = parse_address("rediss+cluster://a:7001,b:7002/0")
    assert (cluster.kind, cluster.nodes) == ("cluster", (("a", 7001), ("b", 7002)))
    assert cluster.tls == {}


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("http://host", "One looks like"),
        ("redis://host/name", "One looks like"),
        ("redis://host:port", "One looks like"),
        ("unix://", "One looks like"),
        ("redis+sentinel://host", "One looks like"),
        ("redis+cluster://host/1", "One looks like"),
        ("redis://host?socket_timeout=1", "With redis:// there are no options"),
        ("redis://host?ssl_ca_certs=/x", "With redis:// there are no options"),
        ("rediss://host?ssl_ca_cert=/x", "there may be ssl_ca_certs,"),
        ("rediss://host?ssl_ca_certs=/no/file", "/no/file cannot be read: No such file"),
        ("rediss://host?ssl_cert_reqs=maybe", "ssl_cert_reqs is one of required, none"),
        ("unix:///path?db=x", "db is not a number"),
    ],
)
def test_a_wrong_url_is_refused_with_what_it_may_be(url: str, remedy: str) -> None:
    with pytest.raises(BadInput) as error:
        parse_address(url)
    assert remedy in str(error.value)


# --- Passwords ----------------------------------------------------------------------------------


@pytest.fixture
def locked_server(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path / "server", "--requirepass", "se/c:r@t%#")
    yield server
    server.stop()


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    file = tmp_path / "password"
    file.write_text("se/c:r@t%#\n")
    return file


def test_the_password_comes_from_a_file_or_the_environment(
    locked_server: ValkeyServer, password_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = locked_server.url
    with pytest.raises(ServerUnavailable, match=r"refused the login: .*--redis-password-file"):
        Client(url, "q")
    with Client(url, "q", password_file) as client:
        client.overview()
    for name, value in (
        ("REDIS_PASSWORD", "se/c:r@t%#"),
        ("REDIS_PASSWORD_FILE", str(password_file)),
        ("REDIS_URL", url.replace("//", "//:se%2Fc%3Ar%40t%25%23@")),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with Client(None if name == "REDIS_URL" else url, "q") as client:
                client.overview()


def test_the_password_goes_into_the_url_of_any_kind(password_file: Path) -> None:
    for url in ("redis://me@h:1/2", "rediss://h", "unix:///p", "redis+sentinel://a,b/main"):
        resolved = resolve_url(url, password_file)
        assert resolved
        assert parse_address(resolved).password == "se/c:r@t%#"
        assert parse_address(resolved).nodes == parse_address(url).nodes
        assert parse_address(resolved).username == parse_address(url).username
        assert "c%3A" not in without_password(resolved)


def test_a_wrong_password_file_is_refused_with_its_name(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n")
    binary.write_bytes(b"\xff")
    for file, reason in (
        (tmp_path / "none", "cannot be read: No such file"),
        (binary, "cannot be read: it is not UTF-8"),
        (empty, "is empty"),
    ):
        with pytest.raises(BadInput, match=f"The password file {file} {reason}"):
            resolve_url("redis://h", file)


def test_two_passwords_and_one_without_a_server_are_refused(password_file: Path) -> None:
    with pytest.raises(BadInput, match="give one"):
        resolve_url("redis://:one@h", password_file)
    assert "REDIS_URL" not in os.environ
    with pytest.raises(BadInput, match="needs a server"):
        resolve_url(None, password_file)


def test_a_password_on_the_command_line_brings_a_warning(locked_server: ValkeyServer) -> None:
    url = locked_server.url.replace("//", "//:se%2Fc%3Ar%40t%25%23@")
    outcome = Producer(url, "q")("status")
    assert outcome.exit_code == 0
    assert "warning: Every user of this machine can see the password" in outcome.stderr
    assert "se%2Fc" not in outcome.output


def test_a_command_to_type_next_names_the_password_file(
    locked_server: ValkeyServer, password_file: Path, tmp_path: Path
) -> None:
    flags = ("--redis-password-file", str(password_file))
    outcome = Producer(locked_server.url, "q")("submit", prompts(tmp_path, '"x"'), *flags)
    assert outcome.exit_code == 0
    assert f"{' '.join(flags)}`" in outcome.stdout
    assert "warning: Every user" not in outcome.stderr


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("refused"),
        redis.TimeoutError("mute"),
        redis.BusyLoadingError("loading"),
        redis.ReadOnlyError("a replica"),
        redis.OutOfMemoryError("full"),
        redis.exceptions.ClusterDownError("CLUSTERDOWN no owner"),
        redis.exceptions.TryAgainError("moves"),
        redis.exceptions.NoScriptError("started anew"),
        redis.ResponseError("MISCONF full disk"),
    ],
)
def test_what_may_pass_is_waited_for(error: redis.RedisError) -> None:
    assert may_pass(error)
    assert not is_refusal(error)


@pytest.mark.parametrize(
    "error",
    [
        redis.AuthenticationError("WRONGPASS"),
        redis.exceptions.NoPermissionError("NOPERM"),
        redis.ResponseError("ERR unknown command"),
        redis.ResponseError("WRONGTYPE"),
    ],
)
def test_a_refusal_is_not_waited_for(error: redis.RedisError) -> None:
    assert is_refusal(error)


@pytest.mark.parametrize(
    "words",
    [
        "ACL failure in script: No permissions to access a key script: on @user_script:1.",
        "The user executing the script can't run this command or subcommand script: 1d46, on"
        " @user_script:1.",
        "The user executing the script can't access at least one of the keys mentioned in the"
        " command arguments script: 4d8e, on @user_script:1.",
    ],
)
def test_a_right_that_a_script_lacks_is_told_as_one_by_new_servers_and_by_redis_7_0(
    words: str,
) -> None:
    with pytest.raises(ServerUnavailable, match="does not let"), server_errors("redis://host"):
        raise redis.ResponseError(words)
    with pytest.raises(ServerUnavailable, match="refused a command"), server_errors("redis://host"):
        raise redis.ResponseError("ERR unknown command")
