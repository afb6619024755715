"""Keeps up what expires: leases, the worker's sign of life, and other workers' lost jobs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import structlog

from broker.job_queue import JobQueue
from broker.sweeping import SWEEP_LIMIT
from schemas.worker_state import WorkerState
from worker.leases import Leases

log = structlog.get_logger()

#: Seconds between two signs of life, and after which a silent worker counts as gone.
HEARTBEAT_SECONDS, ALIVE_SECONDS = 2.0, 10.0

#: Pieces of ``SWEEP_LIMIT`` jobs that one turn sweeps at most: with a turn in 2 s one worker
#: deletes up to 10,000 jobs a second, more than are done.
MAX_PIECES = 20

#: Seconds for which a worker that comes back from an outage leaves leases alone that have expired,
#: at most: other workers, which pause for up to 5 s between their tries, come back to renew theirs.
#: One that starts does so too, as it cannot know whether there was an outage.
OUTAGE_GRACE_SECONDS = 10.0


class Keeper:
    """Renews leases three times in their life, reports the worker's state, sweeps expired ones."""

    def __init__(
        self,
        queue: JobQueue,
        worker_id: str,
        leases: Leases,
        state: Callable[[], WorkerState],
        *,
        lease_seconds: float,
    ) -> None:
        self._queue = queue
        self._worker_id = worker_id
        self._leases = leases
        self._state = state
        self._lease_seconds = lease_seconds
        self.interval = min(lease_seconds / 3, HEARTBEAT_SECONDS)
        """Seconds between two turns."""
        self._next_renewal = time.monotonic() + lease_seconds / 3
        self._last_turn = -math.inf
        self._spares_leases_until = math.inf
        self.found_nothing = False
        """Whether the last turn found no lease that has expired, neither swept nor spared one."""

    def turn(self) -> None:
        """Report, renew if it is time, sweep."""
        self.report()
        self._note_outage()
        if time.monotonic() >= self._next_renewal:
            self._renew()
        self._sweep()

    def report(self) -> None:
        """Write the worker's observed state, its sign of life."""
        self._queue.heartbeat(self._state(), alive_seconds=ALIVE_SECONDS)

    def _note_outage(self) -> None:
        """Spare leases for a while if the last turn is so long ago, or so unknown, that some may
        have expired which their workers could not renew: Redis was away, and most likely for all
        of them."""
        now = time.monotonic()
        away = now - self._last_turn
        grace = min(OUTAGE_GRACE_SECONDS, self._lease_seconds)
        # A lease has at least two thirds of its time left when it was renewed as it should be, and
        # its worker may need all of the grace to come back.
        if away > max(2 * self.interval, self._lease_seconds * 2 / 3 - grace):
            self._spares_leases_until = now + grace
            if away < math.inf:
                log.info("outage_over", seconds=round(away), sweeps_in=grace)
        self._last_turn = now

    def _renew(self) -> None:
        held = self._leases.held()
        lost = self._queue.renew(self._worker_id, held, lease_seconds=self._lease_seconds)
        self._next_renewal = time.monotonic() + self._lease_seconds / 3
        # One committed since `held` was read is not lost.
        if lost := self._leases.lose(lost):
            log.warning("leases_lost", jobs=sorted(lease.job_id for lease in lost))

    def _sweep(self) -> None:
        if expired := _swept(self._queue.expire_jobs):
            log.info("jobs_expired", jobs=expired)
        if deleted := _swept(self._queue.expire_submissions):
            log.info("results_expired", jobs=deleted)
        spares_leases = time.monotonic() < self._spares_leases_until
        again, given_up, num_spared = self._queue.sweep(spare_leases=spares_leases)
        self.found_nothing = not again + given_up + num_spared
        if again or given_up:
            log.warning("leases_expired", tried_again_alone=again, given_up=given_up)


def _swept(sweep: Callable[[], int]) -> int:
    """Repeat a sweep while there may be more for it; returns how many jobs it swept."""
    total = 0
    for _ in range(MAX_PIECES):
        number = sweep()
        total += number
        if number < SWEEP_LIMIT:
            break
    return total
