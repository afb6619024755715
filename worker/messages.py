"""What the queue tells a worker at once: that work has come, and which jobs have been cancelled."""

from __future__ import annotations

import structlog

from broker.job_queue import JobQueue
from worker.leases import Leases

log = structlog.get_logger()

#: Seconds that one look waits for a message.
_LOOK_SECONDS = 0.5


class Messages:
    """Listens, so that claims need not ask again and again, and cancelled jobs stop within a few
    steps.

    A message that is lost does no harm: claims ask each second, and the next renewal of the leases
    tells of jobs that the queue has ended.
    """

    def __init__(self, queue: JobQueue, leases: Leases) -> None:
        self._leases = leases
        self._messages = queue.client.pubsub(ignore_subscribe_messages=True)
        self._work, self._cancelled = queue.keys.wake, queue.keys.cancelled

    def turn(self) -> None:
        """Wait a little for a message, and do what it says."""
        if not self._messages.subscribed:
            self._messages.subscribe(self._work, self._cancelled)
        message = self._messages.get_message(timeout=_LOOK_SECONDS)
        if not message:
            return
        if message["channel"] == self._work:
            self._leases.may_claim.set()
        elif lost := self._leases.lose_jobs(message["data"].split()):
            log.info("jobs_cancelled", jobs=sorted(lease.job_id for lease in lost))
