"""The sender's own record of what was sent, cancelled and paused, and what came of it.

The fault tests and the soak share it. ``Ledger.check`` reads every key of a queue at rest and says,
in sentences, whatever breaks a promise: an acknowledged job without exactly one outcome, counts
that do not add up, a result that has changed, work left over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import redis

from benchmarks.queue_check import QueueCheck
from producer.client import Client
from producer.intake import Line
from schemas.errors import BadInput, ServerUnavailable
from schemas.keys import WHOLE_QUEUE
from schemas.result import TERMINAL_STATES, Result


@dataclass
class Pause:
    """A time in which nothing of an adapter, or of the whole queue ("*"), may be claimed."""

    adapter: str
    since: float
    """From when the pause was acknowledged, in seconds by the server's clock."""
    until: float | None = None
    """Until it was to end; None while it lasts."""


@dataclass
class Ledger:
    """What was sent to one queue, and what came back. Threads may share it."""

    acknowledged: dict[str, list[str]] = field(default_factory=dict)
    """Job ids of each submission whose sender was told that all is stored."""
    unsure: list[str] = field(default_factory=list)
    """Job ids of the submissions that ended with an error: any number may be stored."""
    refused: set[str] = field(default_factory=set)
    """Job ids of the submissions of which the sender was told that nothing is stored."""
    cancelled: set[str] = field(default_factory=set)
    """Job ids that somebody asked to cancel."""
    results: dict[str, Result] = field(default_factory=dict)
    """The first final result that was read of each job."""
    pauses: list[Pause] = field(default_factory=list)
    num_flushed: int = 0
    """Jobs that were acknowledged before the server's data were deleted."""
    found: list[str] = field(default_factory=list)
    """Violations that showed while work went on."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        #: Rises when the server's data are deleted; what began before that proves nothing.
        self._generation = 0

    def submit(self, client: Client, jobs: Sequence[Line]) -> str | None:
        """Send jobs that carry ids; None if that ended with an error."""
        ids, generation = [_id_of(job) for job in jobs], self._generation
        try:
            submission = client.submit(jobs)
        except ServerUnavailable:
            self.unsure += ids
            return None
        except BadInput:
            self.refused.update(ids)
            return None
        with self._lock:
            if generation == self._generation:
                self.acknowledged[submission] = ids
            else:
                self.unsure += ids
        return submission

    def cancel(self, client: Client, *ids: str) -> None:
        """Cancel jobs, or submissions that were acknowledged; on return all of them have ended, so
        that no outcome may change from then on."""
        generation = self._generation
        for id_ in ids:
            self.cancelled.update(self.acknowledged.get(id_, [id_]))
        client.cancel(*ids)
        results = list(client.results(*ids))
        with self._lock:
            if generation == self._generation:
                self.found += [
                    f"job {result.id} was cancelled, and was {result.status} after that"
                    for result in results
                    if result.status not in TERMINAL_STATES
                ]
                self._note(results)

    def pause(self, client: Client, server: redis.Redis, adapter: str | None) -> None:
        """Pause an adapter, or with None the queue: nothing of it is claimed until ``resume``."""
        generation = self._generation
        client.pause(adapter)
        since = server_time(server)
        with self._lock:
            if generation == self._generation:
                self.pauses.append(Pause(adapter or WHOLE_QUEUE, since))

    def resume(self, client: Client, server: redis.Redis, adapter: str | None) -> None:
        """End a pause, if it lasts."""
        with self._lock:
            self._end_pauses(server_time(server), adapter or WHOLE_QUEUE)
        client.resume(adapter)

    def note(self, results: Iterable[Result]) -> None:
        """Keep the final ones among results, to see later that they did not change."""
        generation = self._generation
        read = list(results)
        with self._lock:
            if generation == self._generation:
                self._note(read)

    def flush(self, server: redis.Redis) -> None:
        """Delete all data of the server, and its scripts. Of what was sent so far nothing is
        expected any more; what is sent from now on is held to every promise."""
        now = server_time(server)
        server.flushall()
        server.script_flush()
        with self._lock:
            self._generation += 1
            # Any of them may still be stored, by a command that was under way.
            for ids in self.acknowledged.values():
                self.num_flushed += len(ids)
                self.unsure += ids
            self.acknowledged.clear()
            self.results.clear()
            self.found.clear()
            self._end_pauses(now)

    def check(self, client: redis.Redis, queue: str) -> list[str]:
        """Every violation in a queue at rest, as a sentence each; none is the promise kept."""
        return [*self.found, *QueueCheck(self, client, queue).violations()]

    def check_at_rest(self, client: redis.Redis, queue: str, *, timeout: float) -> list[str]:
        """``check`` until there is none, or what is left of them after so many seconds: the last
        jobs may still run, and a worker's next claim tidies up behind the last one."""
        deadline = time.monotonic() + timeout
        while (violations := self.check(client, queue)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return violations

    def _note(self, results: Iterable[Result]) -> None:
        for result in results:
            if result.status in TERMINAL_STATES:
                first = self.results.setdefault(result.id, result)
                if first != result:
                    self.found.append(
                        f"job {result.id} was read as {_outcome(first)}, then as {_outcome(result)}"
                    )

    def _end_pauses(self, now: float, adapter: str | None = None) -> None:
        """The pauses of an adapter, or all of them, last no longer."""
        for pause in self.pauses:
            if pause.until is None and adapter in (None, pause.adapter):
                pause.until = now


def server_time(server: redis.Redis) -> float:
    """Seconds since 1970 by the server's clock."""
    seconds, microseconds = server.time()  # type: ignore[misc]
    return float(seconds) + float(microseconds) / 1e6


def _outcome(result: Result) -> str:
    return f"{result.status} by {result.worker} at {result.timings.finished}"


def _id_of(job: Line) -> str:
    if not isinstance(job, dict):
        raise TypeError("the ledger wants jobs that carry their id")
    return str(job["id"])
