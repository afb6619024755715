"""The validated jobs of one submission, between the pass that checks and the pass that sends."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO

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
    jobs: list[Job | RefusedJob] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    """The line of each job in the input."""
    num_to_run: int = 0
    """Jobs that are not refused."""
    num_bytes: int = 0
    """Of those."""

    @property
    def is_full(self) -> bool:
        return len(self.jobs) >= MAX_RUN_JOBS or self.num_bytes >= MAX_RUN_BYTES

    def append(self, record: bytes) -> None:
        line, kind, wire = _fields(record)
        self.lines.append(line)
        if kind == _REFUSED:
            self.jobs.append(RefusedJob.from_wire(wire.decode()))
            return
        self.jobs.append(Job.from_wire(wire.decode()))
        self.num_to_run += 1
        self.num_bytes += len(wire)


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
        #: Number of jobs by adapter; None is the base model.
        self.num_jobs_by_adapter: Counter[str | None] = Counter()
        self._file = _temporary_file()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def append(self, line: int, wire: str) -> None:
        """Add the job of a line in its wire form."""
        record = wire.encode()
        self._write(line, _JOB, record)
        self.num_jobs += 1
        self.num_bytes += len(record)

    def append_refused(self, line: int, job: RefusedJob) -> None:
        """Add what stands for a line that is no job."""
        self._write(line, _REFUSED, job.to_wire().encode())
        self.num_jobs += 1
        self.num_refused += 1

    def refuse(self, refusals: Iterator[tuple[int, str]]) -> None:
        """Let jobs that were added be refused, by their lines in order, with the reasons."""
        with closing(self._file) as file:
            with _disk_errors():
                file.seek(0)
            self._file = _temporary_file()
            next_line, reason = next(refusals, _NO_LINE)
            for record in file:
                line, kind, wire = _fields(record)
                if line == next_line:
                    job = Job.from_wire(wire.decode())
                    self.num_jobs -= 1
                    self.num_bytes -= len(wire)
                    made_id = f"{self.submission}.{line}"
                    refused = RefusedJob(id=made_id, refusal=reason, metadata=job.metadata)
                    self.append_refused(line, refused)
                    next_line, reason = next(refusals, _NO_LINE)
                else:
                    self._write(line, kind, wire)

    def _write(self, line: int, kind: bytes, wire: bytes) -> None:
        with _disk_errors():
            self._file.write(b"%d\t%s\t%s\n" % (line, kind, wire))

    def runs(self) -> Iterator[Run]:
        """The jobs in input order."""
        with _disk_errors():
            self._file.seek(0)
        run = Run(0)
        for record in self._file:
            run.append(record)
            if run.is_full:
                yield run
                run = Run(run.offset + len(run.jobs))
        if run.jobs:
            yield run


#: What follows the last refusal.
_NO_LINE = (-1, "")

#: What a record of the file is.
_JOB, _REFUSED = b"job", b"refused"


def _fields(record: bytes) -> tuple[int, bytes, bytes]:
    """The line, the kind and the wire form of what the file holds."""
    line, kind, wire = record.rstrip(b"\n").split(b"\t", 2)
    return int(line), kind, wire


def _temporary_file() -> IO[bytes]:
    with _disk_errors():
        return tempfile.TemporaryFile(buffering=1 << 20)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LorryError(
            f"The temporary copy of the jobs cannot be written to {tempfile.gettempdir()}:"
            f" {error.strerror}. Set TMPDIR to a folder with room for it."
        ) from error
