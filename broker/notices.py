"""Notices of the ends of submissions, which their webhooks are told: what is due, and what became
of it.

``{queue}:notices`` says which are due and when; rq holds one job for each try to deliver one, and
notifiers run those.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

import redis

from broker.rq_queues import open_rq_queue, require_rq
from broker.scripts import load_script
from schemas.keys import Keys
from schemas.webhook import (
    WEBHOOK_FUNCTION,
    WEBHOOK_KEPT,
    WEBHOOK_QUEUE_PREFIX,
    WEBHOOK_TIMEOUT,
)

if TYPE_CHECKING:
    from rq import Queue

#: How a try to deliver ended; ``dead`` if there is no use in another one.
Outcome = Literal["delivered", "failed", "dead"]


class Notices:
    """Those of one queue. Times are in seconds."""

    def __init__(self, client: redis.Redis, queue: str) -> None:
        # As QueueReader: redis-py types a reply as everything it can be.
        self._client: Any = client
        self._keys = Keys(queue)
        self._rq_queue = WEBHOOK_QUEUE_PREFIX + queue
        self._take = load_script(client, "take_notices")
        self._note = load_script(client, "note_delivery")

    def take(self, most: int, *, due_again: float) -> list[tuple[str, str]]:
        """Submission and event of notices that are due, of which no other call is given one within
        ``due_again``. Safe to repeat."""
        found = self._take(keys=[self._keys.prefix], args=[most, round(due_again * 1000)])
        return list(zip(found[::2], found[1::2], strict=True))

    def note_delivery(
        self,
        submission: str,
        event: str,
        attempt: int,
        outcome: Outcome,
        reason: str,
        *,
        delay: float,
        lifetime: float,
    ) -> str:
        """Write down how the try number ``attempt`` ended; one that failed is followed by another
        after ``delay``, unless that is more than ``lifetime`` after the first one. Returns the
        state of the notice, "" if it is none any more. Safe to repeat."""
        moments = round(delay * 1000), round(lifetime * 1000)
        return str(
            self._note(
                keys=[self._keys.prefix],
                args=[submission, event, attempt, outcome, reason, *moments],
            )
        )

    def allow_hosts(self, hosts: Collection[str], *, alive_seconds: int) -> None:
        """Let it be known to which hosts notices go, as long as a notifier is alive."""
        self._client.set(self._keys.webhook_hosts, " ".join(sorted(hosts)), ex=alive_seconds)

    def allowed_hosts(self) -> list[str] | None:
        """The hosts to which notices go; None if no notifier is alive."""
        text: str | None = self._client.get(self._keys.webhook_hosts)
        return None if text is None else text.split()

    def require_rq(self) -> None:
        """Raises ServerUnavailable if rq cannot use this server."""
        require_rq(self._client, "A webhook", "follow the submission by `producer wait`")

    def enqueue(self, submission: str, event: str) -> None:
        """Let a notifier try to deliver a notice. Safe to repeat: an event has one job."""
        from rq.exceptions import DuplicateJobError

        try:
            self.rq_queue().enqueue_call(
                WEBHOOK_FUNCTION,
                args=(submission, event),
                job_id=event,
                description=f"tell the webhook of submission '{submission}'",
                timeout=WEBHOOK_TIMEOUT,
                result_ttl=WEBHOOK_KEPT,
                failure_ttl=WEBHOOK_KEPT,
                unique=True,
            )
        except DuplicateJobError:
            return

    def rq_queue(self) -> Queue:
        """The rq queue."""
        return open_rq_queue(self._client, self._rq_queue)
