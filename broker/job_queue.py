"""The operations that change a queue, one Lua script each.

Times go in and come out in seconds; Redis holds them in milliseconds by its own clock.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from typing import Any

import redis
from redis.commands.core import Script

from broker.records import read_adapters, read_version
from schemas import WIRE_VERSION
from schemas.adapter import AdapterRecord, Unloading
from schemas.job import Job
from schemas.keys import BASE, GROUP, KEY_NAMES, Keys
from schemas.result import Result
from schemas.worker_state import WorkerState

#: How many jobs one sweep looks at; the next one follows within a second if there are more.
SWEEP_LIMIT = 1000

#: How many jobs of an adapter that is unloaded by force one script fails.
RETIRE_LIMIT = 500


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's right to one delivery of a job, named by the delivery's stream entry."""

    job_id: str
    entry: str


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
        self._scripts = {
            name: load_script(client, name)
            for name in (
                *("submit", "claim", "commit", "renew", "release", "sweep"),
                *("heartbeat", "announce", "set_adapter", "change_adapter"),
                *("adopt_revision", "retire_adapter"),
                *("request_fetch", "publish_fetch", "fail_fetch"),
            )
        }

    def submit(
        self, submission: str, name: str, total: int, offset: int, jobs: Sequence[Job]
    ) -> None:
        """Store the jobs number ``offset`` and following of a submission of ``total`` jobs.

        Safe to repeat. Raises ConflictError, with indices into ``jobs``, and stores none of them
        if the id of one already names a job of other content.
        """
        fields = chain.from_iterable((job.id, job.lora or BASE, job.to_wire()) for job in jobs)
        status, *details = self._run("submit", submission, name, total, offset, *fields)
        if status == "conflict":
            raise ConflictError(details)
        if status == "gap":
            raise ValueError(f"submission {submission} holds {details[0]} jobs, not {offset}")

    def claim(
        self, worker: str, request: ClaimRequest, *, lease_seconds: float, patience: float
    ) -> Claims:
        """Take jobs that fit into one batch with those that the worker holds.

        Not safe to repeat: jobs of a lost reply wait until their lease has expired.
        """
        now, starving, *jobs = self._run(
            "claim",
            *(worker, round(lease_seconds * 1000), request.num_jobs),
            *(request.free_slots, round(patience * 1000)),
            *(len(request.in_use), *request.in_use),
            *(len(request.draining), *request.draining),
            *request.resident,
        )
        received = time.monotonic()
        return Claims(
            [
                Claim(
                    Lease(job_id, entry),
                    None if adapter == BASE else adapter,
                    payload,
                    int(attempts),
                    submission,
                    int(queued) / 1000,
                    int(now) / 1000,
                    received,
                )
                for job_id, adapter, entry, payload, attempts, queued, submission in jobs
            ],
            starving or None,
        )

    def commit(self, worker: str, results: Sequence[tuple[Lease, Result]]) -> list[bool]:
        """Record results in one round trip; False where the lease was lost. Safe to repeat."""
        if not results:
            return []
        with self.client.pipeline(transaction=False) as pipeline:
            for lease, result in results:
                self._scripts["commit"](
                    keys=[self.keys.prefix],
                    args=[
                        *(worker, lease.job_id, lease.entry, result.status),
                        result.model_dump_json(),
                    ],
                    client=pipeline,
                )
            return [bool(recorded) for recorded in pipeline.execute()]

    def renew(self, worker: str, leases: Collection[Lease], *, lease_seconds: float) -> set[Lease]:
        """Prolong leases; returns those that the worker no longer holds."""
        lost = self._run("renew", worker, round(lease_seconds * 1000), *_flat(leases))
        return {lease for lease in leases if lease.job_id in lost}

    def release(
        self, worker: str, leases: Iterable[Lease], *, attempt_counts: bool, max_attempts: int
    ) -> tuple[int, int]:
        """Hand jobs back to be run by any worker, or give up those tried ``max_attempts`` times;
        returns the two numbers."""
        again, given_up = self._run(
            "release", worker, int(attempt_counts), max_attempts, *_flat(leases)
        )
        return again, given_up

    def sweep(self, *, max_attempts: int) -> tuple[int, int]:
        """Make the jobs of expired leases wait again, or give up those tried ``max_attempts``
        times; returns the two numbers."""
        again, given_up = self._run("sweep", max_attempts, SWEEP_LIMIT)
        return again, given_up

    def heartbeat(self, state: WorkerState, *, alive_seconds: float) -> None:
        """Write a worker's observed state; it counts as alive for ``alive_seconds``."""
        alive_ms = round(alive_seconds * 1000)
        self._run("heartbeat", state.id, alive_ms, state.model_dump_json(), *state.adapters)

    def leave(self, worker: str) -> None:
        """Take a worker that ends off the list of living ones."""
        with self.client.pipeline() as pipeline:
            pipeline.zrem(self.keys.workers, worker)
            pipeline.delete(self.keys.worker(worker), self.keys.worker_adapters(worker))
            pipeline.execute()

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

    def _run(self, script: str, *args: Any) -> Any:
        return self._scripts[script](keys=[self.keys.prefix], args=args)


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
        f"local WIRE_VERSION = {WIRE_VERSION}",
    ]
    folder = files("broker") / "lua"
    texts = [(folder / f"{part}.lua").read_text("utf-8") for part in ("common", name)]
    return "\n".join([*names, *constants, *texts])


def _flat(leases: Iterable[Lease]) -> Iterable[str]:
    return chain.from_iterable((lease.job_id, lease.entry) for lease in leases)
