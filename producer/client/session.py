"""The connection of a client, and what all its methods stand on."""

from __future__ import annotations

import re
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Self

import redis

from broker.connection import BLOCK_SECONDS, connect, server_errors
from broker.dead_letters import DeadLetters
from broker.fetches import Fetches
from broker.job_queue import JobQueue
from broker.notices import Notices
from broker.queue_reader import QueueReader
from broker.server import use_server
from producer import advice
from schemas.errors import (
    BadInput,
    LorryError,
    NotFinished,
    NoWorker,
    UnknownId,
)
from schemas.keys import QUEUE_NAME

#: How often a command is repeated whose reply was lost. All that is sent here may be repeated.
RETRIES = 5


class Session:
    """One queue on one server; a context manager."""

    def __init__(
        self,
        url: str | None = None,
        queue: str = "lorry",
        password_file: Path | str | None = None,
    ) -> None:
        """Use the server at ``url`` or ``REDIS_URL``; with neither, the embedded one.

        Its password stands in the URL, in ``password_file``, in the file that
        ``REDIS_PASSWORD_FILE`` names, or in ``REDIS_PASSWORD``.
        """
        if not re.fullmatch(QUEUE_NAME, queue):
            raise BadInput(
                f"'{queue}' cannot name a queue: use up to 64 letters, digits and . _ -"
                " beginning with a letter or digit."
            )
        with ExitStack() as stack:
            file = None if password_file is None else Path(password_file)
            server = stack.enter_context(use_server(url, file))
            connection = stack.enter_context(connect(server.url, queue, retries=RETRIES))
            self._stack = stack.pop_all()
        self._url = server.url
        self._job_queue = JobQueue(connection, queue)
        self._reader = QueueReader(connection, queue)
        self._fetches = Fetches(connection, queue)
        self._notices = Notices(connection, queue)
        self._dead_letters = DeadLetters(connection, queue)
        self._next_tidying = 0.0
        self.queue = queue
        #: How to speak of the server to a person.
        self.server = server.description

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect, and end the embedded server if nobody else uses it."""
        self._stack.close()

    def has_worker(self) -> bool:
        """Whether a worker is alive."""
        with self._errors():
            return bool(self._reader.workers())

    def has_notifier(self) -> bool:
        """Whether a notifier is alive, which delivers webhooks."""
        with self._errors():
            return self._notices.allowed_hosts() is not None

    def knows_adapters(self) -> bool:
        """Whether a worker has ever joined the queue or an adapter was loaded, so that a name can
        be unknown."""
        with self._errors():
            return self._reader.has_desired_state()

    def not_finished(self, what: str) -> LorryError:
        """The error that says so (``what`` is a sentence without its full stop): NotFinished, or
        NoWorker if no worker is alive."""
        if self.has_worker():
            return NotFinished(f"{what}.")
        return NoWorker(f"{what}. {advice.no_worker(self.queue)}")

    def _tidy(self) -> None:
        """End what has come to its time, as workers do, since there may be none alive."""
        if time.monotonic() < self._next_tidying:
            return
        self._next_tidying = time.monotonic() + BLOCK_SECONDS
        with suppress(redis.ResponseError):  # Who may only read leaves it to others.
            self._job_queue.expire_jobs()
            self._job_queue.expire_submissions()

    def _is_submission(self, id_: str) -> bool:
        try:
            id_.encode()
        except UnicodeEncodeError:
            raise UnknownId(f"No id is like '{id_}': it is not UTF-8.") from None
        return self._reader.is_submission(id_)

    def _errors(self) -> AbstractContextManager[None]:
        return server_errors(self._url)


def deadline_after(timeout: float | None) -> float | None:
    """The moment of ``time.monotonic`` at which so many seconds are over."""
    if timeout is None:
        return None
    if not timeout >= 0:  # Written so that it refuses NaN too.
        raise BadInput(f"A timeout is a number of seconds, not {timeout}.")
    return time.monotonic() + timeout
