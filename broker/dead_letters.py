"""The jobs that were given up on: to be read, replayed and dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import redis

from broker.queue_reader import READ_CHUNK
from broker.records import read_record, seconds, sound_replies, whole_number
from broker.scripts import load_script
from schemas.keys import BASE, Keys
from schemas.result import Attempt

_FIELDS = (
    *("state", "dead", "submissions", "adapter", "attempts"),
    *("error_code", "error_message", "finished"),
)


@dataclass(frozen=True)
class DeadLetter:
    """A job that was given up on."""

    job_id: str
    submissions: list[str]
    lora: str | None
    attempts: int
    code: str
    reason: str
    given_up: float | None
    """Seconds since 1970 by the server's clock; None if its record is damaged."""


class DeadLetters:
    """Those of one queue on one server."""

    def __init__(self, client: redis.Redis, queue: str) -> None:
        self.client: Any = client
        self.keys = Keys(queue)
        self._replay = load_script(client, "replay_dead")
        self._drop = load_script(client, "drop_dead")

    def all(self) -> Iterator[DeadLetter]:
        """Every dead letter, the one given up first in front."""
        start = "-"
        while entries := self.client.xrange(self.keys.dead, start, count=READ_CHUNK):
            yield from self.of_jobs([fields["id"] for _, fields in entries])
            start = f"({entries[-1][0]}"

    def of_jobs(self, job_ids: Sequence[str]) -> Iterator[DeadLetter]:
        """Those among some jobs."""
        with self.client.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hmget(self.keys.job(job_id), _FIELDS)
            replies = sound_replies(pipeline)
        for job_id, values in zip(job_ids, replies, strict=True):
            if values is None:
                continue  # Damaged since: nothing is known of it any more.
            fields = dict(zip(_FIELDS, values, strict=True))
            if fields["state"] == "dead" and fields["dead"]:
                yield _letter(job_id, fields)

    def attempts(self, job_id: str) -> list[Attempt]:
        """How the attempts of a job ended that brought no result, from the first one on; the count
        begins anew with a replay. Raises LorryError for a damaged record."""
        with self.client.pipeline(transaction=False) as pipeline:
            pipeline.hget(self.keys.job(job_id), "history")
            (lines,) = sound_replies(pipeline)
        what = f"The history of job '{job_id}'"
        return [read_record(Attempt, line, what) for line in (lines or "").splitlines()]

    def replay(self, job_ids: Iterable[str]) -> int:
        """Let dead letters run again with a fresh count of attempts; returns their number, which
        leaves out jobs that are none. Safe to repeat."""
        return self._run(self._replay, job_ids)

    def drop(self, job_ids: Iterable[str]) -> int:
        """Take jobs off the dead letters; their results stay. Returns their number, which leaves
        out jobs that are none. Safe to repeat."""
        return self._run(self._drop, job_ids)

    def _run(self, script: Any, job_ids: Iterable[str]) -> int:
        ids, number = iter(job_ids), 0
        while chunk := list(islice(ids, READ_CHUNK)):
            number += script(keys=[self.keys.prefix], args=chunk)
        return number


def _letter(job_id: str, fields: dict[str, str | None]) -> DeadLetter:
    """What its record tells, which another program may have damaged."""
    return DeadLetter(
        job_id,
        (fields["submissions"] or "").split(),
        None if fields["adapter"] == BASE else fields["adapter"],
        whole_number(fields["attempts"]),
        fields["error_code"] or "bad_record",
        fields["error_message"] or "the stored job is damaged: why it was given up is gone",
        seconds(fields["finished"]),
    )
