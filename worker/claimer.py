"""Claims jobs from the queue and makes sequences of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from functools import partial
from queue import Empty, SimpleQueue

import structlog
from pydantic import ValidationError

from broker.claims import Claim, Claims
from broker.job_queue import JobQueue
from schemas import WIRE_VERSION
from schemas.errors import JobError
from schemas.faults import first_fault
from schemas.job import Job
from worker.adapters.peft_format import Adapter
from worker.aside import Aside, NotBegun
from worker.leases import Leases
from worker.publisher import Failed, Publisher, Retry, Unbegun
from worker.sequence import Sequence

log = structlog.get_logger()

#: Seconds until a queue that had nothing is asked again, in case that a message was lost.
_PAUSE = 1.0

#: Versions of job records that a worker can run.
_READS = [WIRE_VERSION - 1, WIRE_VERSION]

#: Seconds for which a worker runs suspects before it goes on with other jobs, and at least for how
#: long it does that, while there are such, before it comes back to suspects.
_TRIAL_SECONDS = 30.0


class Claimer:
    """Keeps the engine supplied: claimed jobs become sequences before the engine asks for them."""

    def __init__(
        self,
        queue: JobQueue,
        worker_id: str,
        leases: Leases,
        publisher: Publisher,
        aside: Aside,
        sequence_of: Callable[[Job, Adapter | None], Sequence],
        resident: Callable[[], Collection[str]],
        *,
        lease_seconds: float,
        patience: float,
    ) -> None:
        """``sequence_of`` prepares a job to run, with its adapter if that was read before, or
        raises JobError; ``resident`` names the adapters whose weights stand in a slot."""
        self._queue = queue
        self._worker_id = worker_id
        self._leases = leases
        self._publisher = publisher
        self._aside = aside
        self._sequence_of = sequence_of
        self._resident = resident
        self._lease_seconds = lease_seconds
        self._patience = patience
        self._ready: SimpleQueue[tuple[Claim, Sequence]] = SimpleQueue()
        self._is_trial = False
        """Whether no jobs are claimed but suspects, one at a time, once nothing else is held."""
        self._trial_end: float | None = None
        """On the monotonic clock, from the first suspect of a trial on."""
        self._next_trial = time.monotonic()
        self.found_nothing = False
        """Whether the last claim found no job that this worker can run now or soon, and it held
        none that kept others waiting for their slot."""

    def turn(self) -> None:
        """Claim once; if there was nothing to claim or no room for it, wait until there may be, or
        an adapter has been read."""
        self._leases.may_claim.clear()
        self._take_read()
        if not self._claim():
            self._leases.may_claim.wait(_PAUSE)

    def take(self, *, wait: float = 0.0) -> list[tuple[Claim, Sequence]]:
        """Sequences that are ready to run; if there are none, waits up to so many seconds."""
        ready = []
        try:
            ready.append(self._ready.get(timeout=wait) if wait else self._ready.get_nowait())
            while True:
                ready.append(self._ready.get_nowait())
        except Empty:
            return ready

    def _claim(self) -> bool:
        """False if there was nothing to claim or no room for it."""
        holds_nothing = not len(self._leases)
        if self._is_trial:
            return holds_nothing and self._try_suspect()
        being_read = self._aside.being_read
        request = self._leases.request(self._resident(), being_read)
        if not request.num_jobs:
            return False
        claims = self._queue.claim(
            self._worker_id, request, lease_seconds=self._lease_seconds, patience=self._patience
        )
        if claims.num_set_aside:
            log.warning("other_wire_version", set_aside=claims.num_set_aside, reads=_READS)
        brought_nothing = not claims.jobs and not claims.num_passed_over
        is_idle = holds_nothing and brought_nothing
        may_come = claims.suspect_waits is not None or claims.num_delayed or being_read
        self.found_nothing = is_idle and not may_come
        if drained := self._leases.drain_for(claims.starving):
            log.info("adapter_drains", adapter=drained, makes_room_for=claims.starving)
        self._take(claims.jobs)
        self._is_trial = self._is_time_for_suspects(claims, is_idle)
        return not brought_nothing

    def _is_time_for_suspects(self, claims: Claims, is_idle: bool) -> bool:
        """At once if there is nothing else to do; else once one has waited beyond the patience, and
        no other worker makes itself free for it, unless it is the others' time."""
        if claims.suspect_waits is None or is_idle:
            return claims.suspect_waits is not None
        may_be = claims.suspect_waits > self._patience and time.monotonic() >= self._next_trial
        return may_be and self._queue.reserve_suspect(self._worker_id, patience=self._patience)

    def _try_suspect(self) -> bool:
        """Claim a job that runs with no other beside it, as it may have ended its last worker, or
        end the trial."""
        now, claim = time.monotonic(), None
        if self._trial_end is None or now < self._trial_end:
            claim = self._queue.claim_suspect(self._worker_id, lease_seconds=self._lease_seconds)
        if claim is None:
            self._is_trial, self._trial_end = False, None
            self._next_trial = now + _TRIAL_SECONDS
            return True
        self._trial_end = self._trial_end or now + _TRIAL_SECONDS
        log.info("suspect_runs_alone", job=claim.lease.job_id, attempts=claim.attempts)
        self._take([claim])
        return True

    def _take(self, claims: Collection[Claim]) -> None:
        """Make sequences of jobs that were claimed, but for those whose adapter has to be read."""
        self._leases.add(claims)
        self._make_sequences(claims, self._prepare)

    def _take_read(self) -> None:
        """Make sequences of those whose adapter has been read."""
        while waited := self._aside.take():
            claims, read = waited
            held = [claim for claim in claims if self._leases.holds(claim.lease)]
            if isinstance(read, NotBegun):
                for claim in held:
                    self._publisher.publish(Unbegun(claim))
                continue
            self._make_sequences(held, partial(self._prepare, read=read))

    def _make_sequences(self, claims: Iterable[Claim], prepare: Callable[[Claim], None]) -> None:
        """If that breaks, which ends this worker, the lease of the job to blame is left to expire,
        and those behind it go back at once. What waits aside goes back with the worker's end."""
        left = deque(claims)
        try:
            while left:
                prepare(left[0])
                left.popleft()
        except Exception:
            self._leases.remove([left.popleft().lease])
            for claim in left:
                self._publisher.publish(Unbegun(claim))
            raise

    def _prepare(self, claim: Claim, read: Adapter | Exception | None = None) -> None:
        """``read`` is the job's adapter, or why it could not be read, once it has waited for it."""
        job = None
        try:
            job = _job_of(claim)
            if isinstance(read, Exception):
                raise read
            if read or not self._aside.keeps(claim, job):
                self._ready.put((claim, self._sequence_of(job, read)))
        except JobError as error:
            if error.may_heal:
                self._publisher.publish(Retry(claim, error))
                return
            log.warning("job_failed", job=claim.lease.job_id, code=error.code)
            self._publisher.publish(Failed(claim, job, error))


def _job_of(claim: Claim) -> Job:
    try:
        return Job.from_wire(claim.payload)
    except ValidationError as error:
        raise JobError("bad_record", f"the stored job is damaged: {first_fault(error)}") from error
