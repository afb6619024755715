"""Submissions: checked, sent, and kept on disk if that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Unpack

from broker import durability
from producer import sending
from producer.client.session import Session, deadline_after
from producer.intake import Line, prepare
from producer.lines import numbered_lines
from producer.sending import OnFull
from producer.spool import Spool
from producer.terms import Terms
from schemas.errors import (
    ServerUnavailable,
)


class Submissions(Session):
    """Sends jobs."""

    def submit(
        self,
        jobs: Iterable[Line],
        *,
        name: str = "<jobs>",
        durable: bool = False,
        **terms: Unpack[Terms],
    ) -> str:
        """Send jobs once all of them are found valid; returns the submission's id.

        A job is a prompt, a mapping with the fields of a line, or of a request of OpenAI's batch
        files, or a ``Job``; ``terms`` are what holds for all of them (``producer.terms``). ``name``
        is what errors and lists call the input. If ``durable``, they are on the server's disk on
        return. Raises BadInput with all that is wrong, or ServerUnavailable if the server cannot
        promise that; nothing was sent then.
        """
        return self._submit(enumerate(jobs, start=1), terms, name=name, durable=durable)

    def submit_file(
        self, path: Path | str, *, durable: bool = False, **terms: Unpack[Terms]
    ) -> str:
        """``submit`` the lines of a prompts file, of any size, in constant memory."""
        with Path(path).open("rb") as stream:
            return self._submit(numbered_lines(stream), terms, name=str(path), durable=durable)

    def _submit(
        self, lines: Iterable[tuple[int, Line]], terms: Terms, *, name: str, durable: bool
    ) -> str:
        if durable:
            self.require_durability()
        with self.prepare(lines, name=name, **terms) as spool:
            self.send(spool)
            if durable:
                self.sync(spool)
            return spool.submission

    def require_durability(self) -> None:
        """Raises ServerUnavailable, with what to set, if the server cannot promise to keep what it
        is sent."""
        with self._errors():
            durability.require_durability(self._job_queue.client)

    def sync(self, spool: Spool) -> None:
        """Return once all jobs of a spool, which has been sent, are on the server's disk."""
        try:
            with self._errors():
                durability.sync(self._job_queue, spool.submission, spool.num_jobs)
        except ServerUnavailable as error:
            raise ServerUnavailable(f"{error} {sending.sent(spool, spool.num_jobs)}") from error

    def prepare(
        self, lines: Iterable[tuple[int, Line]], *, name: str, **terms: Unpack[Terms]
    ) -> Spool:
        """The first half of ``submit``: checks numbered lines, sends nothing. Close the spool."""
        with self._errors():
            return prepare(self._reader, self._notices, lines, terms, name=name)

    def send(
        self,
        spool: Spool,
        on_sent: Callable[[int], None] | None = None,
        on_full: OnFull | None = None,
        timeout: float | None = None,
    ) -> None:
        """The second half of ``submit``; ``on_sent`` is called with the number of jobs sent, and
        ``on_full`` with the reason, again and again, while the queue has no room, for at most
        ``timeout`` seconds from now.

        Raises BadInput if somebody else has meanwhile sent another job under the id of one, or if
        one is larger than all that may wait; QueueFull if there is no room and nobody is to wait
        for it, or to wait any longer; and LorryError if the submission is cancelled meanwhile. Each
        says how many jobs were sent; those will run.
        """
        deadline = deadline_after(timeout)
        for run in spool.runs():
            try:
                with self._errors():
                    sending.send_run(self._job_queue, spool, run, on_full, deadline)
            except ServerUnavailable as error:
                raise ServerUnavailable(f"{error} {sending.sent(spool, run.offset)}") from error
            if on_sent:
                on_sent(run.offset + len(run.jobs))
