"""What only the queue can tell of a job before it is sent: its adapter's name and its id."""

from __future__ import annotations

import sqlite3
from collections import Counter
from difflib import get_close_matches
from functools import cached_property, lru_cache
from hashlib import blake2b

from broker.queue_reader import READ_CHUNK, QueueReader
from producer.advice import known_adapters
from producer.problems import MAX_TOLD, Problems
from schemas.adapter import AdapterRecord
from schemas.errors import BadInput

#: Characters of job records that are held for one look at the queue.
MAX_HELD_CHARS = 4 * 1024 * 1024


class AdapterCheck:
    """Refuses adapters that the queue does not know, once it was told which there are, and those
    that are being unloaded.

    Memory grows by the number of distinct adapters, not by the number of jobs.
    """

    def __init__(self, reader: QueueReader) -> None:
        self._reader = reader
        self._record_of = lru_cache(maxsize=4096)(reader.adapter)
        self._num_refused = 0
        # While no worker has ever joined the queue, nor an adapter was loaded, all are accepted.
        self._names_are_known = reader.has_desired_state()
        #: Number of jobs by adapter; None is the base model.
        self.num_jobs: Counter[str | None] = Counter()

    def add(self, name: str | None) -> None:
        """Count a job of the adapter; raises BadInput if the queue takes no jobs for it."""
        if name not in self.num_jobs:
            self.require(name)
        self.num_jobs[name] += 1

    def require(self, name: str | None) -> None:
        """Raises BadInput if the queue does not know the adapter, or is about to forget it."""
        if name is None or not self._names_are_known:
            return
        if record := self._record_of(name):
            if record.unloading:
                raise BadInput(f"lora: adapter '{name}' is being unloaded and takes no new jobs")
            return
        self._num_refused += 1
        # The search takes its time, and nobody reads the hint of a line beyond the first ones.
        close = get_close_matches(name, self._known, n=1) if self._num_refused <= MAX_TOLD else []
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise BadInput(f"lora: unknown adapter '{name}'{hint}")

    @property
    def remark(self) -> str:
        """The known adapters in one sentence, if another one was refused."""
        if not self._num_refused:
            return ""
        if not self._known:
            queue = self._reader.name
            return f"Queue '{queue}' knows no adapter; leave lora out for the base model."
        return known_adapters(self._known)

    @cached_property
    def _known(self) -> dict[str, AdapterRecord]:
        return self._reader.adapters()


class IdCheck:
    """Refuses ids given by the caller that name two different jobs, in the input or on the queue.

    The ids are kept in a temporary database on disk, so that memory does not grow with them.
    """

    def __init__(self, reader: QueueReader, problems: Problems) -> None:
        self._reader = reader
        self._problems = problems
        self._held: list[tuple[int, str, str]] = []
        self._num_held_chars = 0
        self._database: sqlite3.Connection | None = None

    def add(self, line: int, job_id: str, wire: str) -> None:
        """Check the job of a line, sooner or later."""
        self._held.append((line, job_id, wire))
        self._num_held_chars += len(wire)
        if len(self._held) >= READ_CHUNK or self._num_held_chars >= MAX_HELD_CHARS:
            self._compare_with_queue()

    def finish(self) -> None:
        """Check what is left, and find ids that lines share."""
        if self._held:
            self._compare_with_queue()
        if self._database:
            self._compare_lines(self._database)

    def close(self) -> None:
        if self._database:
            self._database.close()

    def _compare_with_queue(self) -> None:
        new = []
        stored = self._reader.payloads([job_id for _, job_id, _ in self._held])
        for (line, job_id, wire), known in zip(self._held, stored, strict=True):
            if known is None:
                new.append((line, job_id, blake2b(wire.encode(), digest_size=16).digest()))
            elif known != wire:
                self._problems.add(
                    line,
                    f"id: '{job_id}' names a job of other content on queue '{self._reader.name}'",
                )
        self._remember(new)
        self._held.clear()
        self._num_held_chars = 0

    def _remember(self, ids: list[tuple[int, str, bytes]]) -> None:
        if self._database is None:
            self._database = sqlite3.connect("")  # An empty name: a file that nobody else sees.
            self._database.execute("PRAGMA journal_mode = OFF")
            self._database.execute("CREATE TABLE ids (line INTEGER, id TEXT, digest BLOB)")
        self._database.executemany("INSERT INTO ids VALUES (?, ?, ?)", ids)

    def _compare_lines(self, database: sqlite3.Connection) -> None:
        # One sort on disk at the end costs less than an index that grows with every line.
        found = database.execute(
            "SELECT line, id, first_line FROM ("
            " SELECT line, id, digest, FIRST_VALUE(line) OVER same_id AS first_line,"
            "  FIRST_VALUE(digest) OVER same_id AS first_digest"
            " FROM ids WINDOW same_id AS (PARTITION BY id ORDER BY line)"
            ") WHERE digest != first_digest"
        )
        for line, job_id, first_line in found:
            self._problems.add(
                line, f"id: '{job_id}' is also the id of line {first_line}, with other content"
            )
