"""What comes to its time: leases, delays, deadlines and results."""

from __future__ import annotations

from typing import NamedTuple

from broker.scripts import QueueScripts

#: How many jobs one sweep looks at; the next one follows within a second if there are more.
SWEEP_LIMIT = 1000

#: Milliseconds for which the counts of a submission stay when its results have expired: 30 days.
COUNTS_STAY_MS = 30 * 86400 * 1000


class Swept(NamedTuple):
    """Jobs of expired leases that one sweep found."""

    num_again: int
    """To be tried again alone."""
    num_given_up: int
    num_spared: int
    """Left to their workers."""


class Sweeping(QueueScripts):
    """Jobs of one queue whose time is over; whoever comes first does it."""

    def sweep(self, *, spare_leases: bool = False) -> Swept:
        """Take jobs of expired leases from their workers, to be tried again alone or given up,
        unless these are to be spared. Delayed jobs whose time has come have their turn."""
        return Swept(*self._run("sweep", SWEEP_LIMIT, int(spare_leases)))

    def expire_jobs(self) -> int:
        """End waiting jobs whose deadline has come; returns how many, ``SWEEP_LIMIT`` if some may
        be left. Safe to repeat."""
        return int(self._run("expire_jobs", SWEEP_LIMIT))

    def expire_submissions(self) -> int:
        """Delete jobs and results of submissions that have expired; returns how many it looked at,
        ``SWEEP_LIMIT`` if some may be left. Safe to repeat."""
        return int(self._run("expire_submissions", SWEEP_LIMIT, COUNTS_STAY_MS))
