"""Fetches adapters from the hub: downloads, validates, and lets workers load them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

import redis
import structlog

from broker.connection import connect, may_pass
from broker.job_queue import JobQueue
from schemas.adapter import is_adapter_name
from schemas.errors import BadInput, LorryError
from schemas.hub import FetchProgress, FetchRecord, HubSource
from worker.adapters.loader import AdapterChecker
from worker.background import BackgroundLoop
from worker.hub.failures import HubUnavailable
from worker.hub.fetch_job import FetchJob
from worker.hub.fetch_queue import HEARTBEAT_SECONDS, FetchQueue
from worker.hub.repository import HubRepository
from worker.reasons import kept

log = structlog.get_logger()

#: Seconds between the beginnings of two fetches of a queue, by however many fetchers: so that
#: nobody can make them call the hub faster.
SECONDS_BETWEEN_FETCHES = 2.0

#: Seconds between two notes of how far a download is.
_NOTE_SECONDS = 0.5

#: Seconds to the next try while Redis cannot be used.
_PAUSE = 1.0

Reply = TypeVar("Reply")


class CalledOff(BaseException):
    """Somebody has asked for something else under the adapter's name.

    No Exception, since libraries in between handle those.
    """


class Stopped(BaseException):
    """The fetcher was asked to end while it fetched."""


class Fetcher:
    """Runs the fetches of one queue, one at a time, until it is asked to end."""

    def __init__(
        self, redis_url: str, queue: str, owners: Collection[str], checker: AdapterChecker
    ) -> None:
        """``owners`` are those on the hub whose repositories may be fetched; ``checker`` says which
        adapters the model can serve."""
        self._queue = JobQueue(connect(redis_url, queue), queue)
        self._jobs = FetchQueue(self._queue, self._fetch)
        self._owners = frozenset(owners)
        self._checker = checker
        self._heart = BackgroundLoop(
            "heartbeat", self._jobs.place.beat, self.stop, interval=HEARTBEAT_SECONDS
        )
        self._has_to_end = False
        self._is_fetching = False

    def run(self, should_end: Callable[[], bool] = lambda: False) -> int:
        """Work until ``stop``, or until ``should_end``; returns the exit status."""
        self._jobs.place.join()
        self._heart.start()
        log.info("fetcher_ready", fetcher=self._jobs.place.name, owners=sorted(self._owners))
        while not self._has_to_end and not should_end():
            try:
                self._jobs.turn()
            except redis.RedisError as error:
                # Away, or somebody has written nonsense under its keys: neither ends a fetcher.
                log.warning("redis_refuses", error=str(error), next_try_in=_PAUSE)
                time.sleep(_PAUSE)
        self._heart.stop()
        self._heart.join()
        try:
            self._jobs.place.leave()
        except redis.RedisError as error:
            log.warning("redis_away", at="leave", error=str(error))
        log.info("fetcher_ended", fetcher=self._jobs.place.name)
        return 1 if self._heart.failure else 0

    def stop(self) -> None:
        """Ask for the end; safe in a signal's handler. A fetch that runs is broken off, and begun
        anew by the next fetcher."""
        self._has_to_end = True
        if self._is_fetching and threading.current_thread() is threading.main_thread():
            raise Stopped

    def _fetch(self, job: FetchJob, name: str, id_: str) -> None:
        """The one function that rq jobs can have run."""
        record = self._jobs.fetches.record(name)
        if record is None or record.id != id_ or record.is_over:
            log.info("fetch_is_over", adapter=name, request=id_)
            return
        attempt = job.attempt
        log.info("fetch_begins", adapter=name, source=record.source, attempt=attempt)
        try:
            with self._stoppable():
                self._fetch_and_load(job, name, record, attempt)
        except CalledOff:
            log.info("fetch_called_off", adapter=name, source=record.source)
        except BadInput as error:
            job.retries_left = 0
            reason = kept(str(error))
            self._give_up(name, id_, reason)
            raise BadInput(reason) from None  # rq keeps it, with all that led to it.
        except Stopped:
            job.retries_left = (job.retries_left or 0) + 1  # This try does not count.
            job.note_retry(attempt, "its fetcher was stopped")
            raise
        except Exception as error:
            reason = kept(str(error)) or type(error).__name__
            is_expected = isinstance(error, HubUnavailable)
            log.warning(
                "fetch_failed",
                adapter=name,
                attempt=attempt,
                reason=reason,
                exc_info=not is_expected,
            )
            if job.should_retry:
                job.note_retry(attempt + 1, reason)
            else:
                self._give_up(name, id_, f"{reason.rstrip('.')}; given up after {attempt} tries.")
            raise LorryError(reason) from None

    def _fetch_and_load(self, job: FetchJob, name: str, record: FetchRecord, attempt: int) -> None:
        source = HubSource.parse(record.source)
        if not is_adapter_name(name):
            raise BadInput(f"{name!r} cannot name an adapter.")
        if source is None:
            raise BadInput(f"{record.source} names no repository of the hub.")
        if source.owner not in self._owners:
            raise BadInput(
                f"{record.source}: {source.owner} is not among the owners that the fetcher's"
                f" --hub-owners names ({', '.join(sorted(self._owners)) or 'none'})."
            )
        job.note(FetchProgress(attempt=attempt))
        while not self._patiently(
            lambda: self._queue.begin_fetch(seconds_apart=SECONDS_BETWEEN_FETCHES)
        ):
            time.sleep(0.1)
        next_note = 0.0

        def on_bytes(done: int, total: int) -> None:
            nonlocal next_note
            if time.monotonic() < next_note and done < total:
                return
            next_note = time.monotonic() + _NOTE_SECONDS
            job.note(
                FetchProgress(
                    state="downloading", attempt=attempt, done_bytes=done, total_bytes=total
                )
            )
            if not self._is_wanted(name, record.id):
                raise CalledOff

        found, folder = HubRepository(source).download(on_bytes)
        job.note(FetchProgress(state="validating", attempt=attempt))
        revision = self._checker.revision(folder)
        version = self._patiently(
            lambda: self._queue.publish_fetch(name, record.id, str(found), revision)
        )
        if version is None:
            raise CalledOff
        log.info("fetched", adapter=name, source=str(found), revision=revision, version=version)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """``stop`` breaks off what runs in here."""
        self._is_fetching = True
        try:
            if self._has_to_end:
                raise Stopped
            yield
        finally:
            self._is_fetching = False

    def _is_wanted(self, name: str, id_: str) -> bool:
        """Whether the request is still the newest one for its name, as far as Redis tells."""
        try:
            record = self._jobs.fetches.record(name)
        except redis.RedisError:
            return True
        return record is not None and record.id == id_

    def _give_up(self, name: str, id_: str, reason: str) -> None:
        log.warning("fetch_given_up", adapter=name, reason=reason)
        self._patiently(lambda: self._queue.fail_fetch(name, id_, reason))

    def _patiently(self, ask: Callable[[], Reply]) -> Reply:
        """The reply of Redis, asked until it can be used; the time limit of the job bounds that."""
        while True:
            try:
                return ask()
            except redis.RedisError as error:
                if not may_pass(error) or self._has_to_end:
                    raise
                log.warning("redis_away", error=str(error), next_try_in=_PAUSE)
                time.sleep(_PAUSE)
