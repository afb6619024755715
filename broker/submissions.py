"""Submissions: sent in runs of jobs, and taken back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import redis

from broker.outcomes import (
    NOTHING,
    Cancelled,
    ConflictError,
    FullError,
    Limits,
    Size,
    SubmissionCancelled,
)
from broker.records import damaged_limits
from broker.scripts import QueueScripts
from schemas.errors import ServerUnavailable
from schemas.job import Job, RefusedJob
from schemas.keys import BASE
from schemas.result import RESULT_TTL


class JobRecord(NamedTuple):
    """What ``submit.lua`` takes of a job."""

    id: str
    adapter: str
    """``schemas.keys.BASE`` is the base model."""
    priority: str
    deadline: str
    """A moment in ms, "+" and ms from then on, or nothing."""
    payload: str
    """The job in its wire form."""
    refusal: str = ""
    """Why it has failed already, if it has."""

    @classmethod
    def of(cls, job: Job | RefusedJob | JobRecord) -> JobRecord:
        """The record of a job; one that was made before stays as it is."""
        if isinstance(job, JobRecord):
            return job
        if isinstance(job, RefusedJob):
            return cls(job.id, BASE, "normal", "", job.to_wire(), job.refusal)
        return cls(job.id, job.lora or BASE, job.priority, _deadline(job), job.to_wire())


class Submissions(QueueScripts):
    """Those of one queue, as their sender changes them."""

    def submit(
        self,
        submission: str,
        name: str,
        total: int,
        offset: int,
        jobs: Sequence[Job | RefusedJob | JobRecord],
        *,
        result_ttl: float = RESULT_TTL,
        rest: Size = NOTHING,
        webhook: str | None = None,
    ) -> None:
        """Store the jobs number ``offset`` and following of a submission of ``total`` jobs; refused
        ones have failed already.

        ``webhook`` is the URL that is told once the last of them has ended. ``rest`` is what comes
        behind them and must find room too. Safe to repeat. Stores none of them and raises
        ConflictError, with indices into ``jobs``, if the id of one already names a job of other
        content; FullError if they find no room; SubmissionCancelled; ServerUnavailable if the
        server has lost jobs that were sent before; or LorryError if what may wait is damaged.
        """
        fields = chain.from_iterable(map(JobRecord.of, jobs))
        status, *details = self._run(
            *("submit", submission, name, total, offset, round(result_ttl * 1000)),
            *(rest.jobs, rest.bytes, webhook or "", *fields),
        )
        if status == "conflict":
            raise ConflictError(details)
        if status == "full":
            num_fitting, num_waiting, num_bytes, *limits = details
            raise FullError(num_fitting, Size(num_waiting, num_bytes), _limits(*limits))
        if status == "damaged":
            raise damaged_limits(self.name, details[0])
        if status == "cancelled":
            raise SubmissionCancelled(details[0])
        if status == "gap":
            raise ServerUnavailable(
                f"The server has lost jobs that were sent: it holds {details[0]} of {submission},"
                f" not {offset}. Send all again."
            )

    def add_sync(self, pipeline: redis.client.Pipeline, submission: str, num_jobs: int) -> None:
        """Let a pipeline write behind all jobs of a submission; its reply is how many of them the
        server holds, and nothing is written if some are missing. Safe to repeat."""
        self._scripts["sync"](keys=[self.keys.prefix], args=[submission, num_jobs], client=pipeline)

    def cancel(self, job_ids: Iterable[str]) -> Cancelled:
        """End jobs as cancelled, also running ones. Safe to repeat.

        One script takes all of them: some hundreds at a time leave room for others.
        """
        return Cancelled(*self._run("cancel", *job_ids))

    def close_submission(self, submission: str) -> None:
        """Let a submission take no more jobs; what it holds by now is its total. Safe to repeat."""
        self._run("close_submission", submission)


def _deadline(job: Job) -> str:
    if isinstance(job.deadline, float):
        return f"+{round(job.deadline * 1000)}"
    moment = job.deadline_moment
    return "" if moment is None else str(round(moment * 1000))


def _limits(jobs: str, num_bytes: str) -> Limits:
    return Limits(int(jobs) if jobs else None, int(num_bytes) if num_bytes else None)
