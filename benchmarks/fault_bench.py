"""A queue under test: null workers, a client with its ledger, and the check at the end.

The fault tests and the soak share it.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import redis

from benchmarks.ledger import Ledger
from benchmarks.null_worker import NullSettings, NullWorkers
from benchmarks.tcp_proxy import TcpProxy
from benchmarks.waiting import PATIENCE, wait_until
from broker.connection import connect
from producer.client import Client
from producer.client.session import RETRIES

#: Seconds within which a queue comes to rest whose jobs are known to have ended.
REST_SECONDS = 60.0

#: Of leases under test: the shortest that a worker accepts.
LEASE_SECONDS = 1.0

ADAPTERS = ("a", "b", "c")


class FaultBench:
    """Workers, client and ledger of one queue; a context manager that ends what it started."""

    def __init__(self, url: str, queue: str, folder: Path, **settings: Any) -> None:
        """``folder`` gets logs, journal and marks; ``settings`` are those of all null workers."""
        self.url = url
        self.queue = queue
        self.ledger = Ledger()
        self.folder = folder
        self.journal = folder / "journal"
        self._stack = ExitStack()
        (folder / "marks").mkdir(parents=True, exist_ok=True)
        common: dict[str, Any] = {"lease_seconds": LEASE_SECONDS, "adapters": ADAPTERS, **settings}
        self.settings = NullSettings(
            redis_url=url,
            queue=queue,
            marks=folder / "marks",
            journal=self.journal,
            **common,
        )
        self.workers = self._stack.enter_context(NullWorkers(self.settings, folder))
        self.client = self._stack.enter_context(Client(url, queue))
        self.redis = self._stack.enter_context(connect(url, retries=RETRIES))

    def __enter__(self) -> FaultBench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def proxy(self) -> TcpProxy:
        """A proxy before the server, for as long as the bench lasts."""
        return self._stack.enter_context(TcpProxy(self.url))

    def client_through(self, proxy: TcpProxy) -> Client:
        return self._stack.enter_context(Client(proxy.url, self.queue))

    def redis_through(self, proxy: TcpProxy) -> redis.Redis:
        return self._stack.enter_context(connect(proxy.url))

    def start(self, **changes: Any) -> ForkServerProcess:
        """Start a worker and return once it is ready for work."""
        log = self.folder / f"null-{len(self.workers.processes)}.log"
        process = self.workers.start(**changes)
        wait_until(
            lambda: (log.exists() and "worker_ready" in log.read_text()) or not process.is_alive(),
            "the worker did not come up",
        )
        return process

    def submit(self, *jobs: dict[str, Any]) -> str:
        """Send jobs; they must be acknowledged."""
        submission = self.ledger.submit(self.client, jobs)
        assert submission, "the jobs were not acknowledged"
        return submission

    def finish(self) -> Counter[str]:
        """Wait until all acknowledged jobs have ended, and check the queue; the jobs by state."""
        for submission in self.ledger.acknowledged:
            self.client.wait(submission, timeout=PATIENCE)
            self.ledger.note(self.client.results(submission))
        violations = self.check()
        assert not violations, violations
        return Counter(result.status for result in self.ledger.results.values())

    def check(self) -> list[str]:
        """The ledger's violations, once the queue is at rest."""
        return self.ledger.check_at_rest(self.redis, self.queue, timeout=REST_SECONDS)

    def runs(self) -> Counter[str]:
        """How often each job was run."""
        return Counter(self.journal.read_text().split()) if self.journal.exists() else Counter()


def jobs(
    count: int, prefix: str = "job", lora: str | None = None, **fault: Any
) -> list[dict[str, Any]]:
    """Jobs called ``<prefix>-<number>``; ``fault`` happens to each."""
    metadata = {"metadata": {"fault": fault}} if fault else {}
    return [
        {
            "id": f"{prefix}-{i}",
            "prompt": f"{prefix} {i}",
            "lora": lora,
            "max_tokens": 1,
            **metadata,
        }
        for i in range(count)
    ]


def is_stopped(process: ForkServerProcess) -> bool:
    """Whether a process stands still because of SIGSTOP."""
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False  # It has just ended.
    return stat.rpartition(")")[2].split()[0] == "T"
