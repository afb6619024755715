"""The embedded server: one for all who use a folder, from the first of them to the last."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from broker import embedded
from broker.connection import connect
from broker.embedded import EmbeddedServer
from schemas.errors import ServerUnavailable

#: Says whether it started the server, and uses it until its standard input is closed.
USER = """
import sys
from pathlib import Path
from broker.embedded import EmbeddedServer

with EmbeddedServer(Path(sys.argv[1])) as server:
    print("started" if server.started_here else "found", flush=True)
    sys.stdin.read()
"""

User = subprocess.Popen[str]


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: the path of a Unix socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="lorry-"))
    yield folder
    for server in servers_of(folder):
        server.kill()
    shutil.rmtree(folder)


@pytest.fixture
def start_user(folder: Path) -> Iterator[Callable[[], User]]:
    users = []

    def start() -> User:
        user = subprocess.Popen(
            [sys.executable, "-c", USER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        users.append(user)
        return user

    yield start
    for user in users:
        user.kill()
        user.communicate()


def servers_of(folder: Path) -> list[psutil.Process]:
    """The servers that live in a folder."""
    return [
        process
        for process in psutil.process_iter(["name", "cwd"])
        if process.info["name"] == "valkey-server" and process.info["cwd"] == str(folder)
    ]


def answer(user: User) -> str:
    assert user.stdout
    return user.stdout.readline().strip()


def test_the_first_user_starts_the_server_and_the_last_one_ends_it(
    folder: Path, start_user: Callable[[], User]
) -> None:
    first = start_user()
    assert answer(first) == "started"
    second = start_user()
    assert answer(second) == "found"
    first.communicate()
    assert len(servers_of(folder)) == 1
    second.communicate()
    assert not servers_of(folder)


def test_users_that_come_together_start_one_server(
    folder: Path, start_user: Callable[[], User]
) -> None:
    users = [start_user() for _ in range(4)]
    assert sorted(answer(user) for user in users) == ["found", "found", "found", "started"]
    assert len(servers_of(folder)) == 1


def test_what_a_killed_user_leaves_is_found_and_ended(
    folder: Path, start_user: Callable[[], User]
) -> None:
    user = start_user()
    assert answer(user) == "started"
    user.kill()
    user.wait()
    with EmbeddedServer(folder) as server:
        assert not server.started_here
    assert not servers_of(folder)


def test_a_killed_server_is_started_again_with_its_data(
    folder: Path, start_user: Callable[[], User]
) -> None:
    user = start_user()
    assert answer(user) == "started"
    with EmbeddedServer(folder) as server, connect(server.url) as client:
        client.set("key", "value")
    (process,) = servers_of(folder)
    process.kill()
    with EmbeddedServer(folder) as server, connect(server.url) as client:
        assert server.started_here
        assert client.get("key") == "value"
        user.communicate()


def test_a_server_that_is_slow_to_answer_is_waited_for_and_gets_no_twin(
    folder: Path, start_user: Callable[[], User]
) -> None:
    assert answer(start_user()) == "started"
    (server,) = servers_of(folder)
    server.suspend()
    waiting = start_user()
    assert waiting.stderr
    told = f"Waiting for the embedded server in {folder} to answer.\n"
    assert waiting.stderr.readline() == told
    assert servers_of(folder) == [server]
    server.resume()
    assert answer(waiting) == "found"


def test_a_server_that_never_answers_is_an_error_that_names_its_process(
    folder: Path, start_user: Callable[[], User], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "START_TIMEOUT", 0.1)
    assert answer(start_user()) == "started"
    (server,) = servers_of(folder)
    server.suspend()
    with pytest.raises(ServerUnavailable, match="runs, but has not answered") as error:
        EmbeddedServer(folder)
    assert str(folder / "valkey.pid") in str(error.value)
    assert int((folder / "valkey.pid").read_text()) == server.pid
    assert servers_of(folder) == [server]


def test_ctrl_c_while_the_server_starts_ends_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(url: str) -> bool:
        while not servers_of(folder):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            EmbeddedServer(folder)
    assert not servers_of(folder)
    with EmbeddedServer(folder) as server:
        assert server.started_here


def test_a_server_that_cannot_start_is_an_error_that_names_its_log(folder: Path) -> None:
    (folder / "appendonlydir").write_text("no folder")
    with pytest.raises(ServerUnavailable, match=r"did not start; .*valkey\.log tells why"):
        EmbeddedServer(folder)


@pytest.mark.parametrize("name", ["my state", "a#b", "a?b", "a%20b", "zustände"])
def test_the_folder_may_have_any_name(folder: Path, name: str) -> None:
    with EmbeddedServer(folder / name) as server, connect(server.url) as client:
        assert client.ping()
        assert (folder / name / "valkey.sock").is_socket()
