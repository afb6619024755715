"""Writes results back to the queue."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import structlog

from broker.claims import Claim, Lease
from broker.job_queue import JobQueue
from schemas.errors import JobError
from schemas.job import Job
from schemas.result import ErrorInfo, Result, Timings, Usage
from worker.choice import choice_of, prompt_logprobs_of
from worker.leases import Leases
from worker.sequence import Sequence
from worker.text import Tokenizer

log = structlog.get_logger()

#: Results committed in one round trip.
_COMMIT_CHUNK = 256

#: Seconds for which results are made before those that are there are committed. One of 500,000 log
#: probabilities takes some seconds and 300 MB until it is.
_COLLECT_SECONDS = 0.1

#: Seconds from a first attempt that failed to the second; doubled for each further one, up to the
#: last, and cut by up to a half at random, so that jobs that failed together do not come together.
_FIRST_DELAY, _LAST_DELAY = 10.0, 600.0


@dataclass(frozen=True)
class Finished:
    """A claimed job whose sequence came to its end."""

    claim: Claim
    sequence: Sequence


@dataclass(frozen=True)
class Failed:
    """A claimed job that cannot be run; ``job`` is None if its record could not be read."""

    claim: Claim
    job: Job | None
    error: JobError


@dataclass(frozen=True)
class Retry:
    """A claimed job that could not be run now, and may be later; ``alone`` if without others."""

    claim: Claim
    error: JobError
    alone: bool = False


@dataclass(frozen=True)
class Unbegun:
    """A claimed job that this worker cannot start soon, and hands back."""

    claim: Claim


Outcome = Finished | Failed | Retry | Unbegun


def retry_delay(attempts: int) -> float:
    """Seconds to wait after so many attempts."""
    longest = min(_FIRST_DELAY * 2.0 ** min(attempts - 1, 32), _LAST_DELAY)
    return random.uniform(longest / 2, longest)


class Publisher:
    """Makes results of outcomes and commits them, many at a time."""

    def __init__(
        self, queue: JobQueue, worker_id: str, leases: Leases, tokenizer: Tokenizer
    ) -> None:
        self._queue = queue
        self._worker_id = worker_id
        self._leases = leases
        self._tokenizer = tokenizer
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._uncommitted: list[tuple[Claim, Result]] = []
        self._retries: list[Retry] = []
        self._unbegun: list[Lease] = []

    def publish(self, outcome: Outcome) -> None:
        """Hand over an outcome; returns at once. Its lease is held until Redis has the result."""
        self._outcomes.put(outcome)

    def turn(self) -> None:
        """Commit what is there, or wait a little for it."""
        self._collect()
        self._commit()
        while self._retries:
            self._retry(self._retries[-1])
            self._retries.pop()
        if self._unbegun:
            log.info("jobs_handed_back", jobs=self._queue.release(self._worker_id, self._unbegun))
            self._leases.remove(self._unbegun)
            self._unbegun.clear()

    def _commit(self) -> None:
        chunk = self._uncommitted[:_COMMIT_CHUNK]
        recorded = self._queue.commit(
            self._worker_id, [(claim.lease, result) for claim, result in chunk]
        )
        del self._uncommitted[: len(chunk)]
        self._leases.remove(claim.lease for claim, _ in chunk)
        for (claim, _), is_recorded in zip(chunk, recorded, strict=True):
            if not is_recorded:
                log.warning("lease_lost", job=claim.lease.job_id, at="commit")

    def _retry(self, retry: Retry) -> None:
        """Let a job be tried again later, or be given up, as the number of its attempts says."""
        lease, error, delay = retry.claim.lease, retry.error, retry_delay(retry.claim.attempts)
        _, given_up = self._queue.retry(
            self._worker_id,
            [lease],
            outcome=error.code,
            message=error.message,
            alone=retry.alone,
            delay=delay,
        )
        self._leases.remove([lease])
        log.warning(
            "job_given_up" if given_up else "job_delayed",
            job=lease.job_id,
            code=error.code,
            attempts=retry.claim.attempts,
            seconds=None if given_up else round(delay, 1),
        )

    def _collect(self) -> None:
        """Move some outcomes to the lists of what is to be written, which stays there until it
        is."""
        try:
            is_behind = self._uncommitted or self._retries or self._unbegun
            outcome = self._outcomes.get(timeout=0 if is_behind else 0.1)
            end = time.monotonic() + _COLLECT_SECONDS
            while True:
                if isinstance(outcome, Retry):
                    self._retries.append(outcome)
                elif isinstance(outcome, Unbegun):
                    self._unbegun.append(outcome.claim.lease)
                else:
                    self._uncommitted.append((outcome.claim, self._result(outcome)))
                if time.monotonic() >= end:
                    return
                outcome = self._outcomes.get_nowait()
        except Empty:
            return

    def _result(self, outcome: Finished | Failed) -> Result:
        if isinstance(outcome, Failed):
            return self._failure(outcome.claim, outcome.job, outcome.error)
        sequence = outcome.sequence
        if sequence.error:
            return self._failure(outcome.claim, sequence.job, sequence.error)
        return self._answer(outcome.claim, sequence)

    def _failure(self, claim: Claim, job: Job | None, error: JobError) -> Result:
        return Result(
            id=claim.lease.job_id,
            submission=claim.submission,
            lora=claim.adapter,
            status="failed",
            error=ErrorInfo(code=error.code, message=error.message),
            timings=Timings(
                queued=claim.queued,
                started=claim.claimed,
                finished=claim.server_time(time.monotonic()),
            ),
            worker=self._worker_id,
            metadata=job.metadata if job else None,
        )

    def _answer(self, claim: Claim, sequence: Sequence) -> Result:
        choices = [choice_of(answer, self._tokenizer) for answer in sequence.answers]
        only = choices[0] if len(choices) == 1 else None
        return Result(
            id=claim.lease.job_id,
            submission=claim.submission,
            lora=claim.adapter,
            revision=sequence.adapter.revision if sequence.adapter else None,
            status="done",
            text=only and only.text,
            token_ids=only and only.token_ids,
            finish_reason=only and only.finish_reason,
            logprobs=only and only.logprobs,
            prompt_logprobs=prompt_logprobs_of(sequence, self._tokenizer),
            choices=None if only else choices,
            usage=Usage(
                prompt_tokens=len(sequence.prompt_ids),
                completion_tokens=sum(len(choice.token_ids) for choice in choices),
                cached_tokens=sequence.num_reused,
            ),
            timings=Timings(
                queued=claim.queued,
                started=claim.server_time(sequence.started),
                first_token=claim.server_time(sequence.first_token),
                finished=claim.server_time(sequence.finished),
            ),
            worker=self._worker_id,
            metadata=sequence.job.metadata,
        )
