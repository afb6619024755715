"""What a job's record says of it, which another program may have damaged."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, JsonValue

from broker.records import read_record, seconds
from schemas.errors import LorryError
from schemas.result import STATES, ErrorInfo, Result, Timings

#: Of a job's hash, what its result is made of; beside them its payload if it has no answer.
JOB_FIELDS = (
    *("state", "result", "submissions", "adapter", "worker"),
    *("queued", "claimed", "finished", "error_code", "error_message"),
)

Fields = Mapping[str, str | None]


class _Sent(BaseModel):
    """What a result repeats of a job as it was sent."""

    lora: str | None = None
    metadata: JsonValue = None


def read_result(job_id: str, fields: Fields, payload: str | None) -> Result:
    """A job's answer, or what is known of a job without one; a failed one, with the code
    ``bad_record``, if its record is damaged."""
    try:
        if fields["result"]:
            return read_record(Result, fields["result"], f"The result of job '{job_id}'")
        return _without_answer(job_id, fields, payload)
    except LorryError as error:
        return _bad_record(job_id, fields["submissions"], error)


def damaged_result(job_id: str, reason: str) -> Result:
    """What is told of a job of whose record nothing can be read."""
    return _bad_record(job_id, None, _damaged(job_id, reason))


def _without_answer(job_id: str, fields: Fields, payload: str | None) -> Result:
    """Raises LorryError for a damaged record."""
    submissions = (fields["submissions"] or "").split()
    moments = {name: seconds(fields[name]) for name in ("queued", "claimed", "finished")}
    are_sound = all(moments[name] is not None or not fields[name] for name in moments)
    if not submissions or not are_sound or not fields["queued"] or fields["state"] not in STATES:
        raise _damaged(job_id, "fields are missing, or not of their kind")
    code = fields["error_code"]
    job = read_record(_Sent, payload, f"What was sent as job '{job_id}'") if payload else _Sent()
    return Result(
        id=job_id,
        submission=submissions[0],
        lora=job.lora,
        status=fields["state"],
        error=ErrorInfo(code=code, message=fields["error_message"] or "") if code else None,
        timings=Timings(
            queued=moments["queued"], started=moments["claimed"], finished=moments["finished"]
        ),
        worker=fields["worker"],
        metadata=job.metadata,
    )


def _bad_record(job_id: str, submissions: str | None, error: LorryError) -> Result:
    """What is told of a damaged job, as far as its record still says it."""
    return Result(
        id=job_id,
        submission=next(iter((submissions or "").split()), ""),
        lora=None,
        status="failed",
        error=ErrorInfo(code="bad_record", message=str(error)),
        timings=Timings(queued=0),
    )


def _damaged(job_id: str, reason: str) -> LorryError:
    return LorryError(f"The record of job '{job_id}' is damaged: {reason}")
