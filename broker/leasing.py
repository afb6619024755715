"""Jobs lent to workers: claimed, held, and ended by the one who holds the lease."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain

import redis

from broker.claims import Claim, ClaimRequest, Claims, Lease
from broker.scripts import QueueScripts
from schemas.keys import BASE
from schemas.result import Result

#: Bytes after which a script takes no further result. One with log probabilities may take 45 MB,
#: and a server holds all that a script is given twice while nobody else is served.
_COMMIT_BYTES = 16 * 1024 * 1024


class Leasing(QueueScripts):
    """The jobs of one queue, for its workers."""

    def __init__(self, client: redis.Redis, queue: str) -> None:
        super().__init__(client, queue)
        #: Of the next claim, or of the last while its reply is missing. It begins at the clock's
        #: microseconds, so that no other JobQueue of this worker has come to it.
        self._claim_number = time.time_ns() // 1000

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
        """Record results; False where the lease was lost. Safe to repeat.

        One script takes all of them, unless they are large: some hundreds at a time leave room for
        others.
        """
        return [
            bool(recorded)
            for fields in _commit_fields(results)
            for recorded in self._run("commit", worker, *fields)
        ]

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

    def leave(self, worker: str) -> None:
        """Take a worker that ends off the list of living ones, and hand back the jobs of a claim
        made here whose reply it never saw."""
        self._run("leave", worker, self._claim_number)

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


def _flat(leases: Iterable[Lease]) -> Iterable[str | int]:
    return chain.from_iterable((lease.job_id, lease.claim) for lease in leases)


def _commit_fields(results: Iterable[tuple[Lease, Result]]) -> Iterator[list[str | int]]:
    """What one script after the other takes of the results."""
    fields: list[str | int] = []
    num_bytes = 0
    for lease, result in results:
        line = result.model_dump_json()
        fields += (lease.job_id, lease.claim, result.status, line)
        num_bytes += len(line)
        if num_bytes >= _COMMIT_BYTES:
            yield fields
            fields, num_bytes = [], 0
    if fields:
        yield fields
