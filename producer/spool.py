"""The validated jobs of one submission, between the pass that checks and the pass that sends."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from broker.submissions import JobRecord
from producer.terms import WhenFull
from schemas.errors import LorryError
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
    num_bytes: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.jobs) >= MAX_RUN_JOBS or self.num_bytes >= MAX_RUN_BYTES

    def append(self, record: str) -> None:
        line, *fields = record.rstrip("\n").split("\t", 5)
        job = JobRecord(*fields)
        self.jobs.append(job)
        self.lines.append(int(line))
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
        self.num_bytes = 0
        #: Seconds for which results are kept after the last job has ended.
        self.result_ttl = RESULT_TTL
        self.when_full: WhenFull = "wait"
        #: URL that is told when the last job has ended.
        self.webhook: str | None = None
        #: Number of jobs by adapter; None is the base model.
        self.num_jobs_by_adapter: Counter[str | None] = Counter()
        with _disk_errors():
            self._file = tempfile.TemporaryFile(buffering=1 << 20)  # noqa: SIM115 - see close().

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

    def append(self, line: int, job: JobRecord) -> None:
        """Add the job of a line."""
        # No field but the payload can hold a tab or the end of a line, and JSON escapes them.
        with _disk_errors():
            self._file.write("\t".join((str(line), *job)).encode() + b"\n")
        self.num_jobs += 1
        self.num_bytes += len(job.payload.encode())

    def runs(self) -> Iterator[Run]:
        """The jobs in input order."""
        with _disk_errors():
            self._file.seek(0)
        run = Run(0)
        for record in self._file:
            run.append(record.decode())
            if run.is_full:
                yield run
                run = Run(run.offset + len(run.jobs))
        if run.jobs:
            yield run


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LorryError(
            f"The temporary copy of the jobs cannot be written to {tempfile.gettempdir()}:"
            f" {error.strerror}. Set TMPDIR to a folder with room for it."
        ) from error
