"""Processes of workers that start in a fraction of a second.

A fork server imports torch and the worker once, which takes seconds, for all of them.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
# The last is what transformers imports, for two seconds, when it reads a model's configuration.
_context.set_forkserver_preload(["worker.engine", "worker.worker", "transformers.activations"])


class ForkedProcesses:
    """A context manager that kills those that still run."""

    def __init__(self, logs: Path) -> None:
        """``logs`` is the folder of what the processes write to stderr."""
        self._logs = logs
        self.processes: list[ForkServerProcess] = []

    def __enter__(self) -> ForkedProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def fork(self, name: str, target: Callable[..., None], *args: object) -> ForkServerProcess:
        """Start one that calls the target, a function of a module; its log is
        ``<name>-<number>.log``."""
        log = self._logs / f"{name}-{len(self.processes)}.log"
        process = _context.Process(target=_run, args=(log, target, *args))
        process.start()
        self.processes.append(process)
        return process

    @property
    def alive(self) -> list[ForkServerProcess]:
        return [process for process in self.processes if process.is_alive()]


def _run(log: Path, target: Callable[..., None], *args: object) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    target(*args)
