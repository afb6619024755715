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
from producer.lines import Defaults, make_job, parse_line
from producer.problems import Problems
from producer.spool import Spool
from producer.terms import Terms, WhenFull
from producer.webhooks import check_webhook
from schemas.errors import BadInput, LorryError
from schemas.job import Job
from schemas.result import RESULT_TTL

#: A line of a file, or what it stands for: an object with its fields, a prompt, or a Job.
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
    Raises BadInput with all bad lines. The caller closes the spool.
    """
    adapters = AdapterCheck(reader)
    defaults: Defaults = dict(terms.get("sampling", {})) | {
        field: terms[field] for field in _OF_A_LINE if field in terms
    }
    _check_defaults(adapters, defaults)
    result_ttl = terms.get("result_ttl", RESULT_TTL)
    if not 0 < result_ttl <= MAX_RESULT_TTL:
        raise BadInput(
            f"--result-ttl is a time of more than 0 and at most ten years, not {result_ttl:g} s."
        )
    when_full = terms.get("when_full", "wait")
    if when_full not in get_args(WhenFull):
        raise BadInput(f"--when-full is 'wait' or 'refuse', not '{when_full}'.")
    if webhook := terms.get("webhook"):
        check_webhook(notices, webhook)
    problems = Problems(name)
    spool = Spool(name)
    try:
        with closing(IdCheck(reader, problems)) as ids:
            for number, line in lines:
                try:
                    _take(spool, adapters, ids, number, line, defaults)
                except BadInput as error:
                    problems.add(number, str(error))
            ids.finish()
        problems.raise_if_any(adapters.remark)
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
    return spool


def _take(
    spool: Spool,
    adapters: AdapterCheck,
    ids: IdCheck,
    number: int,
    line: Line,
    defaults: Defaults,
) -> None:
    made_id = f"{spool.submission}.{number}"
    if isinstance(line, bytes):
        job = parse_line(line, made_id=made_id, defaults=defaults)
    else:
        job = make_job(line, made_id=made_id, defaults=defaults)
    adapters.add(job.lora)
    record = JobRecord.of(job)
    spool.append(number, record)
    if job.id != made_id:
        ids.add(number, job.id, record.payload)


def _check_defaults(adapters: AdapterCheck, defaults: Defaults) -> None:
    """Tells a wrong default once, not for every line that it serves."""
    try:
        adapters.require(make_job("", made_id="default", defaults=defaults).lora)
    except BadInput as error:
        field, colon, what = str(error).partition(":")
        flag = f"--{field.replace('_', '-')}{colon}{what}"
        raise BadInput(f"{flag}\n{adapters.remark}".rstrip()) from None
