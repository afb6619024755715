"""The validating pass over an input: its lines -> a spool of jobs that may be sent as they are."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Literal, get_args

from broker.notices import Notices
from broker.queue_reader import QueueReader
from broker.submissions import JobRecord
from producer.checks import AdapterCheck, IdCheck
from producer.lines import Defaults, make_job, read_line, shown
from producer.openai_requests import is_request, job_fields, origin
from producer.problems import Problems
from producer.spool import Spool
from producer.terms import Terms, WhenFull
from producer.webhooks import check_webhook
from schemas.errors import BadInput, BadParameter, LorryError
from schemas.job import Job, RefusedJob
from schemas.result import RESULT_TTL

#: A line of a file, or what it stands for: an object with its fields, a request of OpenAI's batch
#: files, a prompt, or a Job.
Line = bytes | str | Mapping[str, object] | Job

#: The longest time in seconds for which results are kept: ten years.
MAX_RESULT_TTL = 10 * 365 * 86400.0

#: The terms that lines may have as fields.
_OF_A_LINE: tuple[Literal["lora", "priority", "deadline"], ...] = ("lora", "priority", "deadline")


def prepare(
    reader: QueueReader,
    notices: Notices,
    lines: Iterable[tuple[int, Line]],
    terms: Terms,
    *,
    name: str,
) -> Spool:
    """Reads numbered lines once, in constant memory, and checks all that can be checked.

    ``terms`` hold for lines that do not say otherwise; ``name`` is what errors call the input.
    Raises BadInput with all bad lines, unless the terms are lenient. The caller closes the spool.
    """
    adapters = AdapterCheck(reader)
    defaults: Defaults = dict(terms.get("sampling", {})) | {
        field: terms[field] for field in _OF_A_LINE if field in terms
    }
    _check_defaults(adapters, defaults)
    result_ttl = terms.get("result_ttl", RESULT_TTL)
    if not 0 < result_ttl <= MAX_RESULT_TTL:
        raise BadParameter(
            "result_ttl",
            f"should be more than 0 s and at most ten years (found {result_ttl:g} s)",
        )
    when_full = terms.get("when_full", "wait")
    if when_full not in get_args(WhenFull):
        raise BadParameter("when_full", f"should be 'wait' or 'refuse' (found {shown(when_full)})")
    if webhook := terms.get("webhook"):
        check_webhook(notices, webhook)
    problems = Problems(name)
    spool = Spool(name)
    try:
        with closing(IdCheck(reader)) as ids:
            for number, line in lines:
                _take(spool, problems, adapters, ids, number, line, defaults)
            for number, message in ids.conflicts():
                problems.add(number, message)
            if not terms.get("lenient"):
                problems.raise_if_any(adapters.remark)
            elif problems.count > spool.num_refused:
                spool.refuse(ids.conflicts())
        if not spool.num_jobs:
            raise BadInput(f"{name} holds no jobs; nothing was sent.")
    except sqlite3.Error as error:
        spool.close()
        raise LorryError(
            f"The ids cannot be compared in a temporary database: {error}."
            " Set TMPDIR to a folder with room for it."
        ) from error
    except BaseException:
        spool.close()
        raise
    spool.num_jobs_by_adapter = adapters.num_jobs
    spool.result_ttl = result_ttl
    spool.when_full = when_full
    spool.webhook = webhook
    if problems.count:
        spool.refusals = problems.describe("recorded as failed", adapters.remark)
    return spool


def _take(
    spool: Spool,
    problems: Problems,
    adapters: AdapterCheck,
    ids: IdCheck,
    number: int,
    line: Line,
    defaults: Defaults,
) -> None:
    """Adds the job of a line to the spool, or what stands for a line that is none."""
    made_id = f"{spool.submission}.{number}"
    value: object = None
    try:
        value = read_line(line) if isinstance(line, bytes) else line
        fields = job_fields(value, adapters.of_model) if is_request(value) else value
        job = make_job(fields, made_id=made_id, defaults=defaults)
        adapters.add(job.lora)
    except BadInput as error:
        problems.add(number, str(error))
        refused = RefusedJob(id=made_id, refusal=str(error), metadata=origin(value))
        spool.append(number, JobRecord.of(refused))
        return
    record = JobRecord.of(job)
    spool.append(number, record)
    if is_request(value):
        ids.add_custom_id(number, value["custom_id"])
    elif job.id != made_id:
        ids.add(number, job.id, record.payload)


def _check_defaults(adapters: AdapterCheck, defaults: Defaults) -> None:
    """Tells a wrong default once, not for every line that it serves."""
    try:
        adapters.require(make_job("", made_id="default", defaults=defaults).lora)
    except BadInput as error:
        fault = str(error)
        field, colon, what = fault.partition(": ")
        # The Python client's alone: a field that is not known, or one too many. No flag is either.
        if not colon or fault.startswith("unknown field "):
            raise BadParameter("sampling", fault) from None
        raise BadParameter(field, f"{what}\n{adapters.remark}".rstrip()) from None
