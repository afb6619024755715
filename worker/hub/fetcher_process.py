"""The fetcher of ``worker --with-fetcher``: a process of its own, since rq jobs and a GPU's engine
should not share one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable

import structlog

from worker.adapters.loader import AdapterLimits
from worker.background import BackgroundLoop
from worker.config import WorkerConfig

log = structlog.get_logger()

#: Seconds before a fetcher that has ended is started again, and for which an asked one may take to
#: end.
_PAUSE, _END_SECONDS = 5.0, 10.0


class FetcherProcess:
    """Runs a fetcher, and another should it end, as long as it is entered. What a fetcher has not
    finished by the end is begun anew by the next one."""

    def __init__(self, config: WorkerConfig, limits: AdapterLimits, redis_url: str) -> None:
        """The fetcher accepts what is within ``limits``."""
        self._command = [
            *(sys.executable, "-m", "worker.hub.cli", "--end-with", str(os.getpid())),
            *("--model-path", str(config.model_path), "--queue", config.queue),
            *("--hub-owners", *config.hub_owners),
            *_flag("--max-lora-rank", [limits.max_rank]),
            *_flag("--lora-target-modules", sorted(limits.target_modules)),
        ]
        # By the environment, since a command line is for all to see, and the URL holds a password.
        self._environment = {**os.environ, "REDIS_URL": redis_url, "CUDA_VISIBLE_DEVICES": ""}
        self._watch = BackgroundLoop("fetcher", self._turn, lambda: None, interval=1.0)

    def __enter__(self) -> FetcherProcess:
        self._process = self._start()
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.stop()
        self._watch.join()
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C in the terminal ends the worker, which then ends it.
        return subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _turn(self) -> None:
        if (status := self._process.poll()) is not None:
            log.warning("fetcher_has_ended", status=status, next_try_in=_PAUSE)
            time.sleep(_PAUSE)
            self._process = self._start()


def _flag(name: str, values: Iterable[object]) -> list[str]:
    given = [str(value) for value in values if value]
    return [name, *given] if given else []
