"""What is known of a job, a submission or a queue, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from broker.outcomes import Limits, Size
from broker.queue_reader import QueueReader, SubmissionStatus
from producer.advice import counted
from schemas.errors import LorryError
from schemas.result import STATES, TERMINAL_STATES, Result
from schemas.worker_state import WorkerState

#: Submissions that an overview lists.
MAX_LISTED = 20

Status = SubmissionStatus | Result


@dataclass(frozen=True)
class Overview:
    """A queue at one moment."""

    num_submissions: int
    submissions: list[SubmissionStatus]
    """The last ``MAX_LISTED``, oldest first."""
    workers: list[WorkerState]
    """Those alive."""
    adapters: list[str]
    """Every adapter that the queue knows."""
    unfinished: dict[str, int]
    """Unfinished jobs of each adapter that has waiting ones; the base model is ``@base``."""
    num_suspects: int
    """Waiting jobs whose worker died or failed; each is tried again alone."""
    num_delayed: int
    """Waiting jobs that failed in a way that may heal, and are tried again later."""
    num_abandoned: int
    """Jobs that count as running though no worker is alive."""
    num_dead: int
    """Jobs given up on."""
    num_set_aside: dict[str, int]
    """Jobs that workers leave alone, by the version of their record, which they cannot read."""
    backlog: Size
    """What waits."""
    limits: Limits
    """What may wait at most."""
    paused: dict[str, float]
    """Adapters that nothing is claimed of, and since when; ``*`` if that is so for all."""


def read_overview(reader: QueueReader) -> Overview:
    num_suspects, num_delayed = reader.num_out_of_turn()
    set_aside = {f"{version:g}": number for version, number in reader.num_set_aside().items()}
    workers = reader.workers()
    return Overview(
        reader.num_submissions(),
        reader.submissions(MAX_LISTED),
        workers,
        list(reader.adapters()),
        reader.unfinished_by_adapter(),
        num_suspects,
        num_delayed,
        0 if workers else reader.num_running(),
        reader.num_dead(),
        set_aside,
        reader.backlog(),
        reader.limits(),
        reader.paused(),
    )


def is_finished(status: Status) -> bool:
    """Whether a job has its result, or all jobs of a submission have."""
    if isinstance(status, Result):
        return status.status in TERMINAL_STATES
    return status.is_complete


def num_jobs(status: Status) -> int:
    """How many results there will be."""
    return 1 if isinstance(status, Result) else status.total


def by_state(status: Status) -> dict[str, int]:
    """How many jobs are in which state."""
    return {status.status: 1} if isinstance(status, Result) else status.counts


def num_not_done(status: Status) -> int:
    """Jobs that have ended, but not as done."""
    return sum(
        number
        for state, number in by_state(status).items()
        if state in TERMINAL_STATES and state != "done"
    )


def listed_states(counts: dict[str, int]) -> str:
    """ "3 waiting, 6 done": the states that occur, in the order of a job's life."""
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts.get(state))


def describe(status: Status) -> str:
    """The status in a sentence without its full stop."""
    if isinstance(status, Result):
        return f"Job {status.id} is {status.status}"
    unsent = f", {status.total - status.sent} not sent" if status.sent < status.total else ""
    return (
        f"{status.finished} of {counted(status.total)} of {status.id} finished"
        f" ({listed_states(status.counts)}{unsent})"
    )


def require_all_done(status: Status, remedy: str) -> None:
    """Raises LorryError, with the remedy, if a job has ended but not as done."""
    if number := num_not_done(status):
        raise LorryError(f"{counted(number)} did not end as done: {describe(status)}. {remedy}")


def as_json(found: Status | Overview) -> str:
    """One JSON object, on one line."""
    if isinstance(found, Result):
        return found.model_dump_json()
    if isinstance(found, SubmissionStatus):
        return json.dumps(_submission(found))
    return json.dumps(
        {
            "num_submissions": found.num_submissions,
            "submissions": [_submission(status) for status in found.submissions],
            "workers": [worker.model_dump() for worker in found.workers],
            "adapters": found.adapters,
            "unfinished": found.unfinished,
            "suspects": found.num_suspects,
            "delayed": found.num_delayed,
            "abandoned": found.num_abandoned,
            "dead": found.num_dead,
            "set_aside": found.num_set_aside,
            "backlog": found.backlog._asdict(),
            "limits": found.limits._asdict(),
            "paused": found.paused,
        }
    )


def _submission(status: SubmissionStatus) -> dict[str, object]:
    return {**asdict(status), "sent": status.sent, "finished": status.finished}
