"""Learns which of the jobs that this worker holds have been cancelled."""

from __future__ import annotations

import structlog

from broker.job_queue import JobQueue
from worker.leases import Leases

log = structlog.get_logger()

#: Seconds that one look waits for a message.
_LOOK_SECONDS = 0.5


class Cancellations:
    """Listens for cancelled jobs, so that they stop within a few steps.

    The queue has ended them already. A message that is lost does no harm: the next renewal of the
    leases tells the same.
    """

    def __init__(self, queue: JobQueue, leases: Leases) -> None:
        self._leases = leases
        self._messages = queue.client.pubsub(ignore_subscribe_messages=True)
        self._channel = queue.keys.cancelled

    def turn(self) -> None:
        """Wait a little for a message, and let go of the jobs that it names."""
        if not self._messages.subscribed:
            self._messages.subscribe(self._channel)
        message = self._messages.get_message(timeout=_LOOK_SECONDS)
        if message and (lost := self._leases.lose_jobs(message["data"].split())):
            log.info("jobs_cancelled", jobs=sorted(lease.job_id for lease in lost))
