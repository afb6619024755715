"""What can be learned of a queue without changing it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

import redis

from broker.connection import BLOCK_SECONDS
from broker.job_records import JOB_FIELDS, damaged_result, read_result
from broker.outcomes import Limits, Size
from broker.records import (
    damaged_limits,
    read_adapter,
    read_adapters,
    read_record,
    read_webhook,
    sound_replies,
    whole_number,
)
from schemas.adapter import AdapterRecord
from schemas.errors import LorryError, UnknownId
from schemas.keys import Keys
from schemas.result import RESULT_TTL, STATES, TERMINAL_STATES, Result
from schemas.webhook import Webhook
from schemas.worker_state import WorkerState

#: Jobs read in one round trip.
READ_CHUNK = 500

#: Bytes of results or jobs after which a round trip takes no further one: a result with log
#: probabilities may have 45 MB, and the server holds a reply until it is read.
READ_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class SubmissionStatus:
    """A submission's counts. ``total`` jobs were announced; their states add up to ``sent``."""

    id: str
    name: str
    total: int
    created: float
    counts: dict[str, int]
    result_ttl: float = RESULT_TTL
    """Seconds for which results are kept after the last job has ended."""
    expired: float | None = None
    """When they were deleted."""
    webhook: Webhook | None = None
    """What is told of its end."""

    @property
    def sent(self) -> int:
        return sum(self.counts.values())

    @property
    def finished(self) -> int:
        return sum(self.counts[state] for state in TERMINAL_STATES)

    @property
    def is_complete(self) -> bool:
        return self.finished >= self.total


@dataclass(frozen=True, slots=True)
class Finished:
    """Jobs of one submission in the order in which they finished."""

    submission: str
    job_ids: list[str]
    position: str
    """Where to read on."""


class QueueReader:
    """Reads one queue on one server."""

    def __init__(self, client: redis.Redis, queue: str) -> None:
        # redis-py types a reply as everything it can be under any protocol and decoding;
        # connect() has fixed both, and each method says what comes.
        self.client: Any = client
        self.name = queue
        self.keys = Keys(queue)

    def is_submission(self, id_: str) -> bool:
        """Whether ``id_`` names a submission; raises UnknownId if it names a job neither."""
        # Other keys begin with the same name ("<id>:jobs"), but only a submission is a hash.
        if self.client.type(self.keys.submission(id_)) == "hash":
            return True
        if self.client.exists(self.keys.job(id_)):
            return False
        raise UnknownId(
            f"Queue '{self.name}' holds no job and no submission with the id '{id_}'."
            " `producer status --queue NAME` lists the submissions of a queue; results expire some"
            " time after their submission has ended, see `producer submit --result-ttl`."
        )

    def num_set_aside(self) -> dict[float, int]:
        """Jobs that workers left alone, by the version of their record; 0 if it is damaged."""
        found: dict[float, int] = {}
        least = "-inf"
        while first := self.client.zrange(
            self.keys.set_aside, least, "+inf", byscore=True, offset=0, num=1, withscores=True
        ):
            version = first[0][1]
            found[version] = int(self.client.zcount(self.keys.set_aside, version, version))
            least = f"({version}"
        return found

    def num_out_of_turn(self) -> tuple[int, int]:
        """Waiting jobs that are to run alone, and those that are to be tried again later."""
        with self.client.pipeline(transaction=False) as pipeline:
            pipeline.zcard(self.keys.suspects)
            pipeline.zcard(self.keys.delayed)
            num_suspects, num_delayed = pipeline.execute()
        return num_suspects, num_delayed

    def num_running(self) -> int:
        """Jobs that a worker has a lease of; one that died has it until somebody sweeps."""
        return int(self.client.zcard(self.keys.leases))

    def num_dead(self) -> int:
        """Jobs given up on that were neither replayed nor dropped."""
        return int(self.client.xlen(self.keys.dead))

    def submissions(self, last: int) -> list[SubmissionStatus]:
        """The ``last`` submissions, oldest first, without those whose record is gone or damaged."""
        found = []
        for id_ in self.client.zrange(self.keys.submissions, -last, -1):
            with suppress(LorryError):
                found.append(self.submission(id_))
        return found

    def num_submissions(self) -> int:
        return int(self.client.zcard(self.keys.submissions))

    def submission(self, id_: str) -> SubmissionStatus:
        """A submission's counts by state."""
        try:
            fields = self.client.hgetall(self.keys.submission(id_))
        except redis.ResponseError as error:
            if not str(error).startswith("WRONGTYPE"):
                raise
            raise _damaged_submission(id_) from error
        if not fields:
            raise UnknownId(f"Queue '{self.name}' holds no submission with the id '{id_}'.")
        try:
            return SubmissionStatus(
                id_,
                fields["name"],
                int(fields["total"]),
                int(fields["created"]) / 1000,
                {state: int(fields.get(state, 0)) for state in STATES},
                int(fields.get("result_ttl", RESULT_TTL * 1000)) / 1000,
                int(fields["expired_at"]) / 1000 if "expired_at" in fields else None,
                read_webhook(id_, fields),
            )
        except (KeyError, ValueError) as error:
            # Deleted while jobs of it ran, most likely: the next one that ended was counted anew.
            raise _damaged_submission(id_) from error

    def require_results(self, submission: str) -> None:
        """Raises UnknownId if the results of a submission have expired."""
        status = self.submission(submission)
        if status.expired is not None:
            raise UnknownId(
                f"The results of submission '{submission}' ({status.name}) are no longer kept: they"
                f" expired at {_moment(status.expired)}, {_duration(status.result_ttl)} after its"
                " last job had ended. `producer status` shows its counts; `producer submit"
                " --result-ttl` keeps results longer."
            )

    def job_ids(self, submission: str) -> Iterator[str]:
        """A submission's job ids in input order."""
        key = self.keys.submission_jobs(submission)
        start = 0
        while ids := self.client.lrange(key, start, start + READ_CHUNK - 1):
            yield from ids
            start += len(ids)

    def finished(
        self, positions: Mapping[str, str], *, wait: float = BLOCK_SECONDS
    ) -> list[Finished]:
        """What has finished in each submission after its position; "0" is before the first.

        Waits up to ``wait`` seconds, at most ``BLOCK_SECONDS``, until there is something.
        """
        streams = {self.keys.submission_finished(id_): id_ for id_ in positions}
        found = self.client.xread(
            {key: positions[id_] for key, id_ in streams.items()},
            count=READ_CHUNK,
            block=max(1, int(min(wait, BLOCK_SECONDS) * 1000)),  # 0 would block for ever.
        )
        return [
            Finished(streams[key], [fields["id"] for _, fields in entries], entries[-1][0])
            for key, entries in found or []
        ]

    def finished_position(self, submission: str) -> str:
        """The position after all that has finished by now."""
        last = self.client.xrevrange(self.keys.submission_finished(submission), count=1)
        return str(last[0][0]) if last else "0"

    def results(self, job_ids: Iterable[str]) -> Iterator[Result]:
        """The jobs' results in the order asked for; an unfinished job gives what is known of it.

        One whose record is damaged counts as failed, with the code ``bad_record``, so that it hides
        no other. Raises UnknownId for an id that the queue does not hold.
        """
        ids = iter(job_ids)
        while chunk := list(islice(ids, READ_CHUNK)):
            for part in self._parts(chunk, "result"):
                yield from self._results(part)

    def _results(self, job_ids: Sequence[str]) -> Iterator[Result]:
        with self.client.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hmget(self.keys.job(job_id), JOB_FIELDS)
            replies = sound_replies(pipeline)
        records = [
            None if values is None else dict(zip(JOB_FIELDS, values, strict=True))
            for values in replies
        ]
        found = list(zip(job_ids, records, strict=True))
        payloads = self.payloads([id_ for id_, record in found if record and not record["result"]])
        for job_id, record in found:
            if record is None:
                yield damaged_result(job_id, "its key holds no hash")
            elif any(record.values()):
                yield read_result(job_id, record, None if record["result"] else next(payloads))
            else:
                raise UnknownId(f"Queue '{self.name}' holds no job with the id '{job_id}'.")

    def payloads(self, job_ids: Sequence[str]) -> Iterator[str | None]:
        """The jobs stored under the ids, as they were sent; None for an id that is free, or whose
        key another program has replaced."""
        for part in self._parts(job_ids, "job"):
            with self.client.pipeline(transaction=False) as pipeline:
                for job_id in part:
                    pipeline.hget(self.keys.job(job_id), "job")
                yield from sound_replies(pipeline)

    def _parts(self, job_ids: Sequence[str], field: str) -> Iterator[list[str]]:
        """The ids in parts whose jobs have at most ``READ_BYTES`` in a field, or which are one."""
        with self.client.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hstrlen(self.keys.job(job_id), field)
            sizes = [size or 0 for size in sound_replies(pipeline)]
        part: list[str] = []
        num_bytes = 0
        for job_id, size in zip(job_ids, sizes, strict=True):
            if part and num_bytes + size > READ_BYTES:
                yield part
                part, num_bytes = [], 0
            part.append(job_id)
            num_bytes += size
        if part:
            yield part

    def adapters(self) -> dict[str, AdapterRecord]:
        """The desired state: every adapter that the queue knows, by name."""
        return read_adapters(self.client.hgetall(self.keys.adapters))

    def adapter(self, name: str) -> AdapterRecord | None:
        """The record of an adapter; None if the queue does not know it."""
        record = self.client.hget(self.keys.adapters, name)
        return None if record is None else read_adapter(name, record)

    def has_desired_state(self) -> bool:
        """Whether a worker has ever joined this queue or an adapter was loaded, so that the names
        of its adapters are known."""
        return bool(self.client.exists(self.keys.adapters_version))

    def workers(self) -> list[WorkerState]:
        """The observed state of every living worker."""
        ids: list[str] = self.client.zrange(self.keys.workers, 0, -1)
        with self.client.pipeline(transaction=False) as pipeline:
            for id_ in ids:
                pipeline.hget(self.keys.worker(id_), "state")
            states = pipeline.execute()
        return [
            read_record(WorkerState, state, "The state of a worker") for state in states if state
        ]

    def model(self) -> str | None:
        """What the worker that joined last calls its base model; None if none ever has."""
        name: str | None = self.client.hget(self.keys.settings, "model")
        return name

    def models(self) -> set[str]:
        """What living workers, and the one that joined last, call their base model."""
        last = self.model()
        return {worker.model for worker in self.workers()} | ({last} if last else set())

    def paused(self) -> dict[str, float]:
        """Adapters that nothing is claimed of, and since when; ``schemas.keys.WHOLE_QUEUE`` if that
        is so for all."""
        return {
            name: int(since) / 1000 for name, since in self.client.hgetall(self.keys.paused).items()
        }

    def backlog(self) -> Size:
        """What waits in the queue; nothing where that is damaged."""
        with self.client.pipeline(transaction=False) as pipeline:
            pipeline.hmget(self.keys.backlog, "jobs", "bytes")
            (counts,) = sound_replies(pipeline)
        return Size(*map(whole_number, counts or ("", "")))

    def limits(self) -> Limits:
        """What may wait at most; raises LorryError if that is damaged."""
        with self.client.pipeline(transaction=False) as pipeline:
            pipeline.hmget(self.keys.limits, "jobs", "bytes")
            (limits,) = sound_replies(pipeline)
        damage = "it is no hash" if limits is None else None
        for limit in limits or ():
            # As the script that obeys it reads it: Python also takes " 1_0 ", Lua "0x10".
            if limit is not None and not re.fullmatch("[0-9]+", limit):
                damage = f"'{limit}' is no number"
        if damage:
            raise damaged_limits(self.name, damage)
        return Limits(*(None if limit is None else int(limit) for limit in limits))

    def unfinished_by_adapter(self) -> dict[str, int]:
        """Waiting and running jobs of every adapter that has waiting ones, most first. The base
        model is called ``schemas.keys.BASE``."""
        running = _numbers(self.client.hgetall(self.keys.running))
        waiting = self.num_waiting_by_adapter()
        unfinished = {name: number + running.get(name, 0) for name, number in waiting.items()}
        return dict(sorted(unfinished.items(), key=lambda item: (-item[1], item[0])))

    def num_waiting_by_adapter(self) -> dict[str, int]:
        """Jobs that nobody has claimed, of every adapter that has such."""
        return _numbers(self.client.hgetall(self.keys.waiting))

    def num_waiting_of(self, adapter: str) -> int:
        """Jobs of an adapter that nobody has claimed."""
        return int(self.client.hget(self.keys.waiting, adapter) or 0)

    def num_jobs_of(self, adapter: str) -> int:
        """Waiting and running jobs of an adapter."""
        with self.client.pipeline(transaction=True) as pipeline:
            pipeline.hget(self.keys.waiting, adapter)
            pipeline.hget(self.keys.running, adapter)
            return sum(int(number or 0) for number in pipeline.execute())


def _damaged_submission(id_: str) -> LorryError:
    return LorryError(
        f"The record of submission '{id_}' is damaged: its fields are missing, or not of"
        " their kind. Ask for its jobs by their ids, and send again what has none."
    )


def _numbers(fields: Mapping[str, str]) -> dict[str, int]:
    return {name: int(number) for name, number in fields.items()}


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def _duration(seconds: float) -> str:
    return f"{seconds / 86400:g} days" if seconds >= 86400 else f"{seconds:g} s"
