"""The operations that change a queue, one Lua script each.

Times go in and come out in seconds; Redis holds them in milliseconds by its own clock.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from typing import Any, NamedTuple

import redis
from redis.commands.core import Script

from broker.outcomes import (
    NOTHING,
    Cancelled,
    FullError,
    Limits,
    Size,
    SubmissionCancelled,
)
from broker.records import read_adapters, read_version
from schemas import WIRE_VERSION
from schemas.adapter import AdapterRecord, Unloading
from schemas.errors import ServerUnavailable
from schemas.job import PRIORITIES, Job
from schemas.keys import BASE, DEFAULT_MAX_ATTEMPTS, GROUP, KEY_NAMES, WHOLE_QUEUE, Keys
from schemas.result import RESULT_TTL, Result
from schemas.worker_state import WorkerState

#: How many jobs one sweep looks at; the next one follows within a second if there are more.
SWEEP_LIMIT = 1000

#: Milliseconds for which the counts of a submission stay when its results have expired: 30 days.
COUNTS_STAY_MS = 30 * 86400 * 1000

#: How many jobs of an adapter that is unloaded by force one script fails.
RETIRE_LIMIT = 500


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's right to one delivery of a job, named by the number of the claim it came with."""

    job_id: str
    claim: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A job as a worker gets it."""

    lease: Lease
    adapter: str | None
    payload: str
    attempts: int
    submission: str
    queued: float
    claimed: float
    received: float
    """The moment ``claimed`` on this process's monotonic clock."""

    def server_time(self, moment: float | None) -> float | None:
        """A moment of the monotonic clock by the server's clock."""
        return None if moment is None else round(self.claimed + moment - self.received, 3)


@dataclass(frozen=True, slots=True)
class Claims:
    """What one claim brought."""

    jobs: list[Claim]
    starving: str | None
    """An adapter that has waited unserved beyond the worker's patience and found no slot."""
    suspect_waits: float | None
    """Seconds for which the first suspect that the worker can run waits; None if there is none."""
    num_delayed: int
    """Jobs of the queue that are to be tried again later."""
    num_set_aside: int
    """Jobs found now whose record is of a version that this one does not read."""
    num_passed_over: int
    """Stream entries that brought no job; there may be jobs behind them."""


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """What a worker can take now."""

    num_jobs: int
    free_slots: int
    in_use: Collection[str]
    """Adapters of the sequences that the worker holds."""
    draining: Collection[str] = ()
    """Those among them that get no new jobs, so that their slot becomes free."""
    resident: Collection[str] = ()
    """Adapters whose weights stand in a slot that is not in use."""


class Swept(NamedTuple):
    """Jobs of expired leases that one sweep found."""

    num_again: int
    """To be tried again alone."""
    num_given_up: int
    num_spared: int
    """Left to their workers."""


class ConflictError(Exception):
    """Job ids that already name jobs of other content; nothing of the run was stored."""

    def __init__(self, indices: list[int]) -> None:
        super().__init__(f"{len(indices)} job ids are taken")
        self.indices = indices


class JobQueue:
    """One queue on one server."""

    def __init__(self, client: redis.Redis, queue: str) -> None:
        self.client = client
        self.name = queue
        self.keys = Keys(queue)
        #: Of the next claim, or of the last while its reply is missing. It begins at the clock's
        #: microseconds, so that no other JobQueue of this worker has come to it.
        self._claim_number = time.time_ns() // 1000
        self._scripts = {
            name: load_script(client, name)
            for name in (
                *("submit", "sync", "claim", "claim_suspect", "reserve_suspect", "commit"),
                *("renew", "release", "retry", "sweep"),
                *("heartbeat", "announce", "set_adapter", "change_adapter"),
                *("adopt_revision", "retire_adapter", "leave"),
                *("request_fetch", "publish_fetch", "fail_fetch"),
                *("expire_jobs", "expire_submissions", "cancel", "close_submission"),
                *("pause", "resume"),
            )
        }

    def submit(
        self,
        submission: str,
        name: str,
        total: int,
        offset: int,
        jobs: Sequence[Job],
        *,
        result_ttl: float = RESULT_TTL,
        rest: Size = NOTHING,
    ) -> None:
        """Store the jobs number ``offset`` and following of a submission of ``total`` jobs.

        ``rest`` is what comes behind them and must find room too. Safe to repeat. Stores none of
        them and raises ConflictError, with indices into ``jobs``, if the id of one already names a
        job of other content; FullError if they find no room; SubmissionCancelled; or
        ServerUnavailable if the server has lost jobs that were sent before.
        """
        fields = chain.from_iterable(
            (job.id, job.lora or BASE, job.priority, _deadline(job), job.to_wire()) for job in jobs
        )
        status, *details = self._run(
            *("submit", submission, name, total, offset, round(result_ttl * 1000)),
            *(rest.jobs, rest.bytes, *fields),
        )
        if status == "conflict":
            raise ConflictError(details)
        if status == "full":
            num_fitting, num_waiting, num_bytes, *limits = details
            raise FullError(num_fitting, Size(num_waiting, num_bytes), _limits(*limits))
        if status == "cancelled":
            raise SubmissionCancelled(details[0])
        if status == "gap":
            raise ServerUnavailable(
                f"The server has lost jobs that were sent: it holds {details[0]} of {submission},"
                f" not {offset}. Send all again."
            )

    def add_sync(self, pipeline: redis.client.Pipeline, submission: str, num_jobs: int) -> None:
        """Let a pipeline write behind all jobs of a submission; its reply is how many of them the
        server holds, and nothing is written if some are missing. Safe to repeat."""
        self._scripts["sync"](keys=[self.keys.prefix], args=[submission, num_jobs], client=pipeline)

    def claim(
        self, worker: str, request: ClaimRequest, *, lease_seconds: float, patience: float
    ) -> Claims:
        """Take jobs that fit into one batch with those that the worker holds.

        After an error call it again: if only the reply was lost, the jobs it brought are given once
        more, whatever is asked for then.
        """
        now, starving, jobs, suspect_waits, *numbers = self._run(
            "claim",
            *(worker, self._claim_number, round(lease_seconds * 1000), request.num_jobs),
            *(request.free_slots, round(patience * 1000)),
            *(len(request.in_use), *request.in_use),
            *(len(request.draining), *request.draining),
            *request.resident,
        )
        return Claims(
            self._received(now, jobs),
            starving or None,
            None if suspect_waits < 0 else suspect_waits / 1000,
            *numbers,
        )

    def claim_suspect(self, worker: str, *, lease_seconds: float) -> Claim | None:
        """Take the job that waits for longest of those that must run alone, as it may have ended
        its last worker. For a worker that holds no other job; after an error call it again."""
        now, jobs = self._run(
            "claim_suspect", worker, self._claim_number, round(lease_seconds * 1000)
        )
        return next(iter(self._received(now, jobs)), None)

    def reserve_suspect(self, worker: str, *, patience: float) -> bool:
        """Whether a suspect has waited for longer than the patience (in seconds), so that a busy
        worker shall make itself free for it. Others are then told so only for further ones, or
        once that is as long ago."""
        return bool(self._run("reserve_suspect", worker, round(patience * 1000)))

    def commit(self, worker: str, results: Sequence[tuple[Lease, Result]]) -> list[bool]:
        """Record results in one round trip; False where the lease was lost. Safe to repeat."""
        if not results:
            return []
        with self.client.pipeline(transaction=False) as pipeline:
            for lease, result in results:
                self._scripts["commit"](
                    keys=[self.keys.prefix],
                    args=[
                        *(worker, lease.job_id, lease.claim, result.status),
                        result.model_dump_json(),
                    ],
                    client=pipeline,
                )
            return [bool(recorded) for recorded in pipeline.execute()]

    def renew(self, worker: str, leases: Collection[Lease], *, lease_seconds: float) -> set[Lease]:
        """Prolong leases; returns those that the worker no longer holds."""
        lost = self._run("renew", worker, round(lease_seconds * 1000), *_flat(leases))
        return {lease for lease in leases if lease.job_id in lost}

    def release(self, worker: str, leases: Iterable[Lease]) -> int:
        """Hand back jobs that have not begun, to be run by any worker; returns their number."""
        return int(self._run("release", worker, *_flat(leases)))

    def retry(
        self,
        worker: str,
        leases: Iterable[Lease],
        *,
        outcome: str,
        message: str,
        alone: bool,
        delay: float = 0.0,
    ) -> tuple[int, int]:
        """End attempts that brought no result, with a code and a sentence for the jobs' history.

        They are tried again after ``delay`` seconds, without others beside them if ``alone``, or
        given up if they have had all their attempts; returns the two numbers.
        """
        again, given_up = self._run(
            *("retry", worker, outcome, message, int(alone)),
            *(round(delay * 1000), *_flat(leases)),
        )
        return again, given_up

    def sweep(self, *, spare_leases: bool = False) -> Swept:
        """Take jobs of expired leases from their workers, to be tried again alone or given up,
        unless these are to be spared. Delayed jobs whose time has come have their turn."""
        return Swept(*self._run("sweep", SWEEP_LIMIT, int(spare_leases)))

    def set_max_attempts(self, number: int) -> int:
        """Let every worker of the queue give a job up after so many attempts; returns after how
        many it was until now."""
        before = self.client.hget(self.keys.settings, "max_attempts")
        self.client.hset(self.keys.settings, "max_attempts", number)
        return int(before or DEFAULT_MAX_ATTEMPTS)

    def cancel(self, job_ids: Iterable[str]) -> Cancelled:
        """End jobs as cancelled, also running ones. Safe to repeat.

        One script takes all of them: some hundreds at a time leave room for others.
        """
        return Cancelled(*self._run("cancel", *job_ids))

    def close_submission(self, submission: str) -> None:
        """Let a submission take no more jobs; what it holds by now is its total. Safe to repeat."""
        self._run("close_submission", submission)

    def pause(self, adapter: str | None = None) -> bool:
        """Let nothing new be claimed of the queue, or of an adapter (``schemas.keys.BASE`` is the
        base model); what runs is finished. False if that was so already. Safe to repeat."""
        return bool(self._run("pause", adapter or WHOLE_QUEUE))

    def resume(self, adapter: str | None = None) -> bool:
        """End a pause; False if there was none. Safe to repeat."""
        return bool(self._run("resume", adapter or WHOLE_QUEUE))

    def set_limits(self, limits: Limits) -> None:
        """Bound what may wait in the queue; whoever submits obeys at once. Safe to repeat."""
        with self.client.pipeline(transaction=True) as pipeline:
            pipeline.delete(self.keys.limits)
            for field, limit in limits._asdict().items():
                if limit is not None:
                    pipeline.hset(self.keys.limits, field, limit)
            pipeline.execute()

    def expire_submissions(self) -> int:
        """Delete jobs and results of submissions that have expired; returns how many it looked at,
        ``SWEEP_LIMIT`` if some may be left. Safe to repeat."""
        return int(self._run("expire_submissions", SWEEP_LIMIT, COUNTS_STAY_MS))

    def expire_jobs(self) -> int:
        """End waiting jobs whose deadline has come; returns how many, ``SWEEP_LIMIT`` if some may
        be left. Safe to repeat."""
        return int(self._run("expire_jobs", SWEEP_LIMIT))

    def heartbeat(self, state: WorkerState, *, alive_seconds: float) -> None:
        """Write a worker's observed state; it counts as alive for ``alive_seconds``."""
        alive_ms = round(alive_seconds * 1000)
        self._run("heartbeat", state.id, alive_ms, state.model_dump_json(), *state.adapters)

    def leave(self, worker: str) -> None:
        """Take a worker that ends off the list of living ones, and hand back the jobs of a claim
        made here whose reply it never saw."""
        self._run("leave", worker, self._claim_number)

    def announce(self, adapters: dict[str, AdapterRecord]) -> int:
        """Add the adapters that a worker was started with to the desired state, where that does
        not name another source for them already; returns its version."""
        fields = chain.from_iterable(
            (name, record.model_dump_json()) for name, record in adapters.items()
        )
        return int(self._run("announce", *fields))

    def set_adapter(self, name: str, source: str, *, pinned: bool) -> int:
        """Let every worker load an adapter, in place of one of that name if there is one; returns
        the version of the desired state."""
        return int(self._run("set_adapter", name, source, int(pinned)))

    def pin_adapter(self, name: str, pinned: bool) -> int | None:
        """Let an adapter keep a slot on every worker, or no longer; returns the version of the
        desired state, None if the name is unknown."""
        return _version(self._run("change_adapter", name, "pin" if pinned else "unpin"))

    def unload_adapter(self, name: str, how: Unloading) -> int | None:
        """Take an adapter off all workers, once its waiting jobs are finished ("drain") or failed
        ("force"); returns the version of the desired state, None if the name is unknown."""
        return _version(self._run("change_adapter", name, how))

    def adopt_revision(self, name: str, version: int, revision: str) -> str | None:
        """Say what was read of an adapter whose record has this version; returns the revision on
        record, which is that of the first who said so, or None if the name is gone or was loaded
        again."""
        adopted = self._run("adopt_revision", name, version, revision)
        return None if adopted is None else str(adopted)

    def retire_adapter(self, name: str) -> bool:
        """Take an adapter that is unloading off the desired state if no job of it is left, and let
        up to ``RETIRE_LIMIT`` of its waiting jobs fail before if that is by force.

        True once it is off. To be repeated until then; safe to repeat at any time.
        """
        return bool(self._run("retire_adapter", name, RETIRE_LIMIT))

    def request_fetch(self, name: str, id_: str, source: str, *, pinned: bool) -> str:
        """Ask for an adapter to be fetched from the hub and then loaded; ``id_`` is new. Returns
        the id of the request: that of an equal one that is not over yet, else ``id_``."""
        return str(self._run("request_fetch", name, id_, source, int(pinned)))

    def publish_fetch(self, name: str, id_: str, source: str, revision: str) -> int | None:
        """Load an adapter that was fetched; returns the version of the desired state, None if the
        request was called off."""
        return _version(self._run("publish_fetch", name, id_, source, revision))

    def fail_fetch(self, name: str, id_: str, reason: str) -> bool:
        """Give a fetch up; False if its request was called off, or is over."""
        return bool(self._run("fail_fetch", name, id_, reason))

    def begin_fetch(self, *, seconds_apart: float) -> bool:
        """Whether a fetch of this queue may begin now, ``seconds_apart`` after the last one."""
        taken = self.client.set(self.keys.fetch_turn, 1, nx=True, px=round(seconds_apart * 1000))
        return bool(taken)

    def desired_state(self) -> tuple[int, dict[str, AdapterRecord]]:
        """The version of the desired state, 0 if nobody has ever written it, and its adapters.

        Raises LorryError if a record is damaged.
        """
        with self.client.pipeline(transaction=True) as pipeline:
            pipeline.get(self.keys.adapters_version)
            pipeline.hgetall(self.keys.adapters)
            version, records = pipeline.execute()
        return read_version(version), read_adapters(records)

    def _received(self, now: str, jobs: list[list[str]]) -> list[Claim]:
        """The jobs of a reply that has come, which ends its claim."""
        received, number = time.monotonic(), self._claim_number
        self._claim_number += 1
        return [
            Claim(
                Lease(job_id, number),
                None if adapter == BASE else adapter,
                payload,
                int(attempts),
                submission,
                int(queued) / 1000,
                int(now) / 1000,
                received,
            )
            for job_id, adapter, payload, attempts, queued, submission in jobs
        ]

    def _run(self, script: str, *args: Any) -> Any:
        return self._scripts[script](keys=[self.keys.prefix], args=args)


def _deadline(job: Job) -> str:
    """As ``submit.lua`` takes it: a moment in ms, "+" and ms from then on, or nothing."""
    if isinstance(job.deadline, float):
        return f"+{round(job.deadline * 1000)}"
    moment = job.deadline_moment
    return "" if moment is None else str(round(moment * 1000))


def _limits(jobs: str, num_bytes: str) -> Limits:
    return Limits(int(jobs) if jobs else None, int(num_bytes) if num_bytes else None)


def _version(reply: int | None) -> int | None:
    return None if reply is None else int(reply)


def load_script(client: redis.Redis, name: str) -> Script:
    """The script, which redis-py names by its hash; it sends the text once where the server does
    not know it."""
    return client.register_script(script_text(name))


def script_text(name: str) -> str:
    """The script ``lua/<name>.lua`` behind the key names and the functions that all share."""
    names = [f"local {name} = KEYS[1] .. '{suffix}'" for name, suffix in KEY_NAMES.items()]
    constants = [
        f"local GROUP = '{GROUP}'",
        f"local BASE = '{BASE}'",
        f"local PRIORITIES = {{ {', '.join(repr(name) for name in PRIORITIES)} }}",
        f"local WIRE_VERSION = {WIRE_VERSION}",
        f"local DEFAULT_PRIORITY = '{Job.model_fields['priority'].default}'",
        f"local DEFAULT_MAX_ATTEMPTS = {DEFAULT_MAX_ATTEMPTS}",
    ]
    folder = files("broker") / "lua"
    texts = [(folder / f"{part}.lua").read_text("utf-8") for part in ("common", name)]
    return "\n".join([*names, *constants, *texts])


def _flat(leases: Iterable[Lease]) -> Iterable[str | int]:
    return chain.from_iterable((lease.job_id, lease.claim) for lease in leases)
