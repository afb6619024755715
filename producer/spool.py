"""The validated jobs of one submission, between the pass that checks and the pass that sends."""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import IO

from broker.submissions import JobRecord
from producer.terms import WhenFull
from schemas.errors import LorryError
from schemas.job import Job, RefusedJob
from schemas.result import RESULT_TTL

#: Bounds of what is sent in one round trip.
MAX_RUN_JOBS = 500
MAX_RUN_BYTES = 4 * 1024 * 1024


def new_submission_id() -> str:
    """An id that nobody else makes; ids sort by the second in which they were made (UTC)."""
    return f"sub-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


@dataclass(slots=True)
class Run:
    """Jobs that follow each other in a submission and are sent together."""

    offset: int
    """Number of the submission's jobs before them."""
    jobs: list[JobRecord] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    """The line of each job in the input."""
    num_to_run: int = 0
    """Jobs that are not refused."""
    num_bytes: int = 0
    """Of those."""
    num_refused_bytes: int = 0
    """Of the others, which may hold as much metadata."""

    @property
    def is_full(self) -> bool:
        num_bytes = self.num_bytes + self.num_refused_bytes
        return len(self.jobs) >= MAX_RUN_JOBS or num_bytes >= MAX_RUN_BYTES

    def append(self, line: int, job: JobRecord) -> None:
        self.jobs.append(job)
        self.lines.append(line)
        if job.refusal:
            self.num_refused_bytes += len(job.payload.encode())
        else:
            self.num_to_run += 1
            self.num_bytes += len(job.payload.encode())


class Spool:
    """A submission's jobs in a temporary file, which is gone when the spool is closed.

    The input may be a pipe, or change while it is read: it is read once, and what is sent is what
    was checked. The file takes about as much room as the input, where TMPDIR points.
    """

    def __init__(self, name: str) -> None:
        self.submission = new_submission_id()
        #: What the input is called.
        self.name = name
        self.num_jobs = 0
        #: Of those, lines that are no jobs and stand there as failed.
        self.num_refused = 0
        #: Which they are, in sentences.
        self.refusals = ""
        #: Of the others.
        self.num_bytes = 0
        #: Seconds for which results are kept after the last job has ended.
        self.result_ttl = RESULT_TTL
        self.when_full: WhenFull = "wait"
        #: URL that is told when the last job has ended.
        self.webhook: str | None = None
        #: Number of jobs by adapter; None is the base model.
        self.num_jobs_by_adapter: Counter[str | None] = Counter()
        self._file = _temporary_file()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def append(self, line: int, job: JobRecord) -> None:
        """Add the job of a line, or what stands for a line that is none."""
        self._write(line, job)
        self.num_jobs += 1
        if job.refusal:
            self.num_refused += 1
        else:
            self.num_bytes += len(job.payload.encode())

    def refuse(self, refusals: Iterator[tuple[int, str]]) -> None:
        """Let jobs that were added be refused, by their lines in order, with the reasons."""
        with closing(self._file) as file:
            with _disk_errors():
                file.seek(0)
            self._file = _temporary_file()
            next_line, reason = next(refusals, _NO_LINE)
            for record in file:
                line, job = _read(record)
                if line == next_line:
                    self.num_jobs -= 1
                    self.num_bytes -= len(job.payload.encode())
                    made_id = f"{self.submission}.{line}"
                    metadata = Job.from_wire(job.payload).metadata
                    refused = RefusedJob(id=made_id, refusal=reason, metadata=metadata)
                    self.append(line, JobRecord.of(refused))
                    next_line, reason = next(refusals, _NO_LINE)
                else:
                    self._write(line, job)

    def _write(self, line: int, job: JobRecord) -> None:
        # None of the other fields can hold a tab or the end of a line, and JSON escapes them.
        *fields, refusal = job
        record = "\t".join((str(line), *fields, refusal and json.dumps(refusal)))
        try:
            self._file.write(record.encode() + b"\n")
        except OSError as error:
            raise _disk_error(error) from error

    def runs(self) -> Iterator[Run]:
        """The jobs in input order."""
        with _disk_errors():
            self._file.seek(0)
        run = Run(0)
        for record in self._file:
            run.append(*_read(record))
            if run.is_full:
                yield run
                run = Run(run.offset + len(run.jobs))
        if run.jobs:
            yield run


#: What follows the last refusal.
_NO_LINE = (-1, "")


def _read(record: bytes) -> tuple[int, JobRecord]:
    """The line and the job that stand in a line of the file."""
    line, *fields, refusal = record.decode().rstrip("\n").split("\t")
    return int(line), JobRecord._make((*fields, refusal and json.loads(refusal)))


def _temporary_file() -> IO[bytes]:
    with _disk_errors():
        return tempfile.TemporaryFile(buffering=1 << 20)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _disk_error(error) from error


def _disk_error(error: OSError) -> LorryError:
    return LorryError(
        f"The temporary copy of the jobs cannot be written to {tempfile.gettempdir()}:"
        f" {error.strerror}. Set TMPDIR to a folder with room for it."
    )
