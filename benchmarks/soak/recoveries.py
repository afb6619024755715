"""How long it takes after a fault until the jobs have ended that ran then, and why so long."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import redis

from schemas.keys import Keys
from schemas.result import TERMINAL_STATES

#: Seconds from which a recovery is told by itself.
SLOW_SECONDS = 10.0


@dataclass
class Recovery:
    """The jobs that ran when a fault ended, until all of them have ended too."""

    kind: str
    since: float
    """In seconds since 1970."""
    job_ids: list[str]
    num_workers: int
    left: list[str] = field(default_factory=list)
    """Those that had not ended when it was last looked."""


class Recoveries:
    """Measures them on one queue."""

    def __init__(self, client: redis.Redis, queue: str) -> None:
        # As QueueReader: redis-py types a reply as everything it can be.
        self._client: Any = client
        self._keys = Keys(queue)
        self._started = time.time()
        self.going_on: list[Recovery] = []
        self.seconds: dict[str, list[float]] = defaultdict(list)
        """By kind of fault."""
        self.slow: list[str] = []
        """Those that took longer than ``SLOW_SECONDS``, with the life of the last job, in words."""

    def begin(self, kind: str, num_workers: int) -> None:
        """Measure from now how long the jobs take that run now."""
        if job_ids := self._client.zrange(self._keys.leases, 0, -1):
            self.going_on.append(Recovery(kind, time.time(), job_ids, num_workers))

    def look(self) -> None:
        """See which are over."""
        for recovery in self.going_on[:]:
            with self._client.pipeline(transaction=False) as pipeline:
                for job_id in recovery.job_ids:
                    pipeline.hget(self._keys.job(job_id), "state")
                states = pipeline.execute()
            left = [
                id_
                for id_, state in zip(recovery.job_ids, states, strict=True)
                if state not in TERMINAL_STATES
            ]
            if left:
                recovery.left = left
            else:
                self._end(recovery)

    def _end(self, recovery: Recovery) -> None:
        self.going_on.remove(recovery)
        seconds = time.time() - recovery.since
        self.seconds[recovery.kind].append(seconds)
        if seconds > SLOW_SECONDS:
            (last, *others) = recovery.left
            self.slow.append(
                f"{seconds:.1f} s from '{recovery.kind}' at {recovery.since - self._started:.1f} s,"
                f" when there were to be {recovery.num_workers} workers;"
                f" {last} and {len(others)} more were the last. In seconds from then, {last} was"
                f" {self._life(last, recovery.since)}"
            )

    def _life(self, job_id: str, since: float) -> str:
        """What became of a job, with moments in seconds from ``since``."""
        fields = self._client.hgetall(self._keys.job(job_id))
        attempts = [json.loads(line) for line in fields.get("history", "").splitlines()]
        ended = fields.get("finished")
        if "result" in fields:
            ended = 1000 * json.loads(fields["result"])["timings"]["finished"]
        steps = [
            ("sent", float(fields["queued"]) / 1000),
            *((f"{a['outcome']} after {a['ended'] - a['started']:.1f} s", a["ended"])
              for a in attempts),
            *([("claimed last", float(fields["claimed"]) / 1000)] if "claimed" in fields else []),
            (str(fields["state"]), float(ended or 0) / 1000),
        ]  # fmt: skip
        return ", ".join(f"{what} {moment - since:+.1f}" for what, moment in steps)
