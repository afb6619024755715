"""A Valkey server of one's own on a TCP port, to be killed and started again."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

from broker.embedded import LOG_FILE, START_TIMEOUT, answers, server_command


class OwnServer:
    """Keeps its data in an append-only file in ``folder``; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Choose a port; ``start`` starts the server."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> OwnServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, with the data that it had, and return when it answers."""
        self._process = subprocess.Popen(
            [*server_command(self._folder), "--bind", "127.0.0.1", "--port", str(self.port)],
            stdin=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_TIMEOUT
        while not answers(self.url):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the server did not start; see {self._folder / LOG_FILE}")
            time.sleep(0.01)

    def kill(self) -> None:
        """End it by SIGKILL, as a machine's memory killer would."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it in order, as an operator would; ``start`` brings it back with its data."""
        if self._process:
            self._process.terminate()
            self._process.wait()
            self._process = None
