"""What comes to its time: leases, delays, deadlines and results."""

from __future__ import annotations

from broker.scripts import QueueScripts

#: How many jobs one sweep looks at; the next one follows within a second if there are more.
SWEEP_LIMIT = 1000

#: Milliseconds for which the counts of a submission stay when its results have expired: 30 days.
COUNTS_STAY_MS = 30 * 86400 * 1000


class Sweeping(QueueScripts):
    """Jobs of one queue whose time is over; whoever comes first does it."""

    def sweep(self) -> tuple[int, int]:
        """Take jobs of expired leases from their workers, to be tried again alone or given up;
        returns the two numbers. Delayed jobs whose time has come have their turn."""
        again, given_up = self._run("sweep", SWEEP_LIMIT)
        return again, given_up

    def expire_jobs(self) -> int:
        """End waiting jobs whose deadline has come; returns how many, ``SWEEP_LIMIT`` if some may
        be left. Safe to repeat."""
        return int(self._run("expire_jobs", SWEEP_LIMIT))

    def expire_submissions(self) -> int:
        """Delete jobs and results of submissions that have expired; returns how many it looked at,
        ``SWEEP_LIMIT`` if some may be left. Safe to repeat."""
        return int(self._run("expire_submissions", SWEEP_LIMIT, COUNTS_STAY_MS))
