"""Delivers webhooks: takes the notices that are due, and posts each to its URL."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime

import redis
import structlog
from rq.timeouts import JobTimeoutException

from broker.connection import connect, may_pass
from broker.notices import Notices, Outcome
from broker.queue_reader import QueueReader, SubmissionStatus
from schemas.errors import LorryError, UnknownId
from schemas.result import TERMINAL_STATES
from schemas.webhook import (
    EVENT_TYPE,
    WEBHOOK_FUNCTION,
    WEBHOOK_KEPT,
    WEBHOOK_TIMEOUT,
    Webhook,
    WebhookUrl,
)
from worker.rq_job import OneFunctionJob
from worker.rq_place import RqPlace
from worker.webhooks.post import DeliveryFailed, post
from worker.webhooks.signature import signature

log = structlog.get_logger()

#: Seconds between two signs of life, and after which a silent notifier counts as gone: longer than
#: any try, since both are of one thread.
_HEARTBEAT_SECONDS, _ALIVE_SECONDS = 5.0, 60

#: Seconds before the second try, about; each further pause is twice as long, up to an hour.
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 3600.0

#: Seconds after the first try from which no other is made: a day.
LIFETIME = 86400.0

#: Seconds after which a notice is looked after again that became an rq job: its notifier may have
#: died.
_LOOK_AGAIN = 60.0

#: Notices that stand on the rq queue at once; what else is due waits in Lorry's own index.
_MAX_LISTED = 100

#: Seconds to the next try while Redis cannot be used.
_PAUSE = 1.0


class PostJob(OneFunctionJob):
    """A job whose record decides nothing but which notice is to be posted. It is one try: when the
    next one is, the notice says."""

    name_of_function = WEBHOOK_FUNCTION
    arguments = "a submission and the id of an event"

    def _set_terms(self) -> None:
        self.timeout, self.retries_left = WEBHOOK_TIMEOUT, 0
        self.result_ttl = self.failure_ttl = WEBHOOK_KEPT


class Undeliverable(LorryError):
    """A notice that no further try can deliver."""


class Notifier:
    """Delivers the notices of one queue, one at a time, until it is asked to end."""

    def __init__(
        self, redis_url: str, queue: str, hosts: Collection[str], secrets: Sequence[bytes]
    ) -> None:
        """``hosts`` are those that may be told, ``HOST`` or ``HOST:PORT``; each notice is signed
        with each of ``secrets``."""
        client = connect(redis_url, queue)
        self._queue = queue
        self._reader = QueueReader(client, queue)
        self._notices = Notices(client, queue)
        self._notices.require_rq()
        self._hosts = frozenset(hosts)
        self._secrets = secrets
        self.place = RqPlace(self._notices.rq_queue(), PostJob, alive_seconds=_ALIVE_SECONDS)
        self._next_beat = 0.0
        self._has_to_end = False

    def run(self, should_end: Callable[[], bool] = lambda: False) -> None:
        """Work until ``stop``, or until ``should_end``."""
        self.place.join()
        log.info("notifier_ready", notifier=self.place.name, hosts=sorted(self._hosts))
        while not self._has_to_end and not should_end():
            try:
                self.turn()
            except redis.RedisError as error:
                # Away, or somebody has written nonsense under its keys: neither ends a notifier.
                log.warning("redis_refuses", error=str(error), next_try_in=_PAUSE)
                time.sleep(_PAUSE)
        try:
            self.place.leave()
        except redis.RedisError as error:
            log.warning("redis_away", at="leave", error=str(error))
        log.info("notifier_ended", notifier=self.place.name)

    def stop(self) -> None:
        """Ask for the end; safe in a signal's handler. A try that runs is finished."""
        self._has_to_end = True

    def turn(self) -> None:
        """Make rq jobs of what is due, then take a job and run it, or wait for one."""
        self._beat()
        room = _MAX_LISTED - self.place.queue.count
        for submission, event in self._notices.take(max(0, room), due_again=_LOOK_AGAIN):
            self._look_after(submission, event)
        if job := self.place.take():
            job.function = self._deliver
            self.place.run(job)

    def _beat(self) -> None:
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + _HEARTBEAT_SECONDS
        self._notices.allow_hosts(self._hosts, alive_seconds=_ALIVE_SECONDS)
        self.place.beat()
        self.place.tidy()

    def _look_after(self, submission: str, event: str) -> None:
        """See that a notice which is due has an rq job that goes on: a new one, unless one waits or
        runs. What a notifier that died had taken off, or a try that failed, has left a record."""
        if self.place.is_listed(event):
            return
        job = self.place.read(event)
        if job and self.place.is_run_by_another(job):
            return
        self.place.forget(event)
        self._notices.enqueue(submission, event)

    def _deliver(self, submission: str, event: str) -> None:
        """The one function that rq jobs can have run: one try. Raises what it failed of."""
        try:
            status = self._reader.submission(submission)
        except UnknownId:
            log.info("notice_is_over", submission=submission, notice=event)
            return
        except (LorryError, KeyError, ValueError) as error:
            self._note(submission, event, 1, "dead", f"its record is damaged: {error}")
            raise
        webhook = status.webhook
        if webhook is None or webhook.event != event or webhook.state != "pending":
            log.info("notice_is_over", submission=submission, notice=event)
            return
        attempt = webhook.attempts + 1
        try:
            self._post(status, webhook, event)
        except Undeliverable as error:
            self._note(submission, event, attempt, "dead", str(error))
            raise
        except DeliveryFailed as error:
            self._note(submission, event, attempt, "failed", str(error))
            raise
        except JobTimeoutException as error:
            reason = f"no answer within {WEBHOOK_TIMEOUT} s"
            self._note(submission, event, attempt, "failed", reason)
            raise DeliveryFailed(reason) from error
        self._note(submission, event, attempt, "delivered", "")

    def _post(self, status: SubmissionStatus, webhook: Webhook, event: str) -> None:
        url = self._allowed(webhook.url)
        body = _body(self._queue, status, webhook, event)
        now = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "lorry",
            "webhook-id": event,
            "webhook-timestamp": str(now),
            "webhook-signature": signature(self._secrets, event, now, body),
        }
        post(url, headers, body)

    def _allowed(self, text: str) -> WebhookUrl:
        """The URL, if it may be told: whoever can write to Redis can write any."""
        try:
            url = WebhookUrl.parse(text)
        except ValueError as error:
            raise Undeliverable(f"the URL is refused: {error}") from None
        if not url.is_among(self._hosts):
            raise Undeliverable(
                f"{url.netloc} is not among the hosts that the notifier's --webhook-hosts names"
            )
        return url

    def _note(
        self, submission: str, event: str, attempt: int, outcome: Outcome, reason: str
    ) -> None:
        state = self._patiently(
            lambda: self._notices.note_delivery(
                *(submission, event, attempt, outcome, reason),
                delay=pause_after(attempt),
                lifetime=LIFETIME,
            )
        )
        about = {"submission": submission, "notice": event, "attempt": attempt}
        if outcome == "delivered":
            log.info("notice_delivered", **about)
        elif state == "dead":
            log.error("notice_dead", **about, reason=reason)
        else:
            log.warning("notice_not_delivered", **about, reason=reason)

    def _patiently(self, ask: Callable[[], str]) -> str:
        """The reply of Redis, asked until it can be used. If the job's time is over before, the
        notice is due again after a while."""
        while True:
            try:
                return ask()
            except redis.RedisError as error:
                if not may_pass(error) or self._has_to_end:
                    raise
                log.warning("redis_away", error=str(error), next_try_in=_PAUSE)
                time.sleep(_PAUSE)


def pause_after(attempt: int) -> float:
    """Seconds between a try that failed, number ``attempt``, and the next: about twice as many as
    before, up to an hour, and of random length, so that a receiver which comes back is not met by
    all at once."""
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempt - 1, 30))
    return longest * random.uniform(0.5, 1.0)


def _body(queue: str, status: SubmissionStatus, webhook: Webhook, event: str) -> bytes:
    """The same bytes in every try."""
    ended = datetime.fromtimestamp(webhook.ended or 0, UTC).isoformat(timespec="milliseconds")
    counts = {state: number for state, number in status.counts.items() if state in TERMINAL_STATES}
    return json.dumps(
        {
            "id": event,
            "type": EVENT_TYPE,
            "timestamp": ended.replace("+00:00", "Z"),
            "data": {
                "queue": queue,
                "submission": status.id,
                "jobs": status.total,
                "counts": counts,
            },
        }
    ).encode()
