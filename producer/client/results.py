"""What became of jobs and submissions, now or as it happens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from producer import following
from producer.client.session import Session, deadline_after
from producer.following import OnWake
from producer.status import Status, describe, is_finished
from schemas.errors import UnknownId
from schemas.result import Result


class Results(Session):
    """Reads states and results."""

    def status(self, id_: str) -> Status:
        """A submission's counts by state, or what is known of a job. Raises UnknownId."""
        with self._errors():
            self._tidy()
            if self._is_submission(id_):
                return self._reader.submission(id_)
            return next(self._reader.results([id_]))

    def job(self, job_id: str) -> Result:
        """What is known of a job. Raises UnknownId."""
        with self._errors():
            if self._is_submission(job_id):
                raise UnknownId(
                    f"'{job_id}' is a submission, and a job is asked for:"
                    f" `producer results {job_id}` and `producer dead list {job_id}` tell its jobs."
                )
            return next(self._reader.results([job_id]))

    def payloads(self, job_ids: Sequence[str]) -> list[str | None]:
        """What was sent under the ids, as JSON."""
        with self._errors():
            return list(self._reader.payloads(job_ids))

    def results(self, *ids: str) -> Iterator[Result]:
        """One result a job of the submissions and jobs, in input order, without waiting.

        An unfinished job gives what is known of it: look at ``status``. Raises UnknownId before
        the first result if the queue does not hold one of the ids.
        """
        with self._errors():
            self._tidy()
            kinds = self._kinds_with_results(ids)
            for id_, is_submission in kinds.items():
                job_ids = self._reader.job_ids(id_) if is_submission else [id_]
                yield from self._reader.results(job_ids)

    def follow(self, *ids: str, on_wake: OnWake | None = None) -> Iterator[Result]:
        """The results of the submissions and jobs as they finish, until all have."""
        with self._errors():
            kinds = self._kinds_with_results(ids)
            yield from following.in_completion_order(
                self._reader,
                [id_ for id_, is_submission in kinds.items() if is_submission],
                [id_ for id_, is_submission in kinds.items() if not is_submission],
                self._tidy_and(on_wake),
            )

    def follow_in_order(
        self, submission: str, on_wake: OnWake | None = None, timeout: float | None = None
    ) -> Iterator[Result]:
        """A submission's results in input order, each as soon as it and all before it have
        finished. Its jobs must all have been sent.

        ``timeout`` is in seconds, and ends it as it does ``watch``.
        """
        deadline = deadline_after(timeout)
        with self._errors():
            yield from following.in_input_order(
                self._reader, submission, self._tidy_and(on_wake), deadline
            )
        if deadline is not None and not is_finished(status := self.status(submission)):
            raise self.not_finished(f"{describe(status)} after {timeout:g} s")

    def watch(self, id_: str, timeout: float | None = None) -> Iterator[Status]:
        """The status of a submission or a job now, then whenever it may have changed, at least
        every two seconds, until it has finished.

        ``timeout`` is in seconds. Raises NotFinished when they are over, or NoWorker if then no
        worker is alive.
        """
        deadline = deadline_after(timeout)
        with self._errors():
            positions = following.positions(self._reader, id_, self._is_submission(id_))
            runs = following.finished_runs(self._reader, positions, deadline)
            while not is_finished(status := self.status(id_)):
                if deadline is not None and time.monotonic() >= deadline:
                    raise self.not_finished(f"{describe(status)} after {timeout:g} s")
                yield status
                next(runs)
            yield status

    def wait(self, id_: str, timeout: float | None = None) -> Status:
        """``watch`` to the end; returns the last status."""
        return deque(self.watch(id_, timeout), maxlen=1).pop()

    def _kinds_with_results(self, ids: Iterable[str]) -> dict[str, bool]:
        """Whether each is a submission or a job; raises UnknownId, also for one that expired."""
        kinds = {id_: self._is_submission(id_) for id_ in ids}
        for id_, is_submission in kinds.items():
            if is_submission:
                self._reader.require_results(id_)
        return kinds

    def _tidy_and(self, on_wake: OnWake | None) -> OnWake:
        def tidy_and_wake() -> None:
            self._tidy()
            if on_wake:
                on_wake()

        return tidy_and_wake
