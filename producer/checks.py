"""What only the queue can tell of a job before it is sent: its adapter's name and its id."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path

from broker.queue_reader import READ_CHUNK, QueueReader
from producer.advice import known_adapters, listed
from producer.lines import shown
from producer.problems import MAX_TOLD
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
        self._names_models = False
        # While no worker has ever joined the queue, nor an adapter was loaded, all are accepted.
        self._names_are_known = reader.has_desired_state()
        #: Number of jobs by adapter; None is the base model.
        self.num_jobs: Counter[str | None] = Counter()

    def add(self, name: str | None) -> None:
        """Count a job of the adapter; raises BadInput if the queue takes no jobs for it."""
        if name not in self.num_jobs:
            self.require(name)
        self.num_jobs[name] += 1

    def require(self, name: str | None, field: str = "lora") -> None:
        """Raises BadInput if the queue does not know the adapter, or is about to forget it; it was
        named in ``field``."""
        if name is None or not self._names_are_known:
            return
        if record := self._record_of(name):
            if record.unloading:
                raise BadInput(f"{field}: adapter '{name}' is being unloaded and takes no new jobs")
            return
        raise BadInput(f"{field}: unknown adapter {shown(name)}{self._hint(name, self._known)}")

    def of_model(self, model: str) -> str | None:
        """The adapter that a request's ``model`` stands for, None for the base model.

        The base model is called as workers call it, or by the last part of that; an adapter by its
        own name, or by both with a colon between. Raises BadInput if it is neither, or if no worker
        has ever joined the queue that could tell which.
        """
        self._names_models = True
        bases = self._base_models
        if model in bases:
            return None
        base, colon, adapter = model.rpartition(":")
        if colon and (base in bases or (base and not bases)):
            self.require(adapter, "body.model")
            return adapter
        if self._names_are_known and self._record_of(model):
            self.require(model, "body.model")
            return model
        if not bases:
            raise BadInput(
                f"body.model: {shown(model)} may be the base model or an adapter, and no worker has"
                f" joined queue '{self._reader.name}' that could tell: start one first, or write"
                " BASE:ADAPTER for an adapter"
            )
        hint = self._hint(model, [*bases, *self._known])
        raise BadInput(f"body.model: {shown(model)} is neither the base model nor an adapter{hint}")

    def _hint(self, name: str, known: Iterable[str]) -> str:
        self._num_refused += 1
        # The search takes its time, and nobody reads the hint of a line beyond the first ones.
        close = get_close_matches(name[:100], known, n=1) if self._num_refused <= MAX_TOLD else []
        return f"; did you mean '{close[0]}'?" if close else ""

    @property
    def remark(self) -> str:
        """The known adapters in one sentence, and the base model if its name is asked for, if
        another one was refused."""
        if not self._num_refused:
            return ""
        sentences = []
        if self._names_models and self._base_models:
            names = listed(sorted(self._base_models, key=len))
            sentences.append(f"The base model is called {names}.")
        if self._known:
            sentences.append(known_adapters(self._known))
        else:
            base = "" if self._names_models else "; leave lora out for the base model"
            sentences.append(f"Queue '{self._reader.name}' knows no adapter{base}.")
        return " ".join(sentences)

    @cached_property
    def _known(self) -> dict[str, AdapterRecord]:
        return self._reader.adapters()

    @cached_property
    def _base_models(self) -> set[str]:
        """What the base model is called: ``/models/llama`` or ``owner/llama``, and ``llama``."""
        return {name for model in self._reader.models() for name in (model, Path(model).name)}


class IdCheck:
    """Finds ids given by the caller that name two different jobs, in the input or on the queue, and
    ``custom_id``s of requests that two lines share.

    The ids are kept in a temporary database on disk, so that memory does not grow with them.
    """

    def __init__(self, reader: QueueReader) -> None:
        self._reader = reader
        self._held: list[tuple[int, str, str]] = []
        self._num_held_chars = 0
        self._database = sqlite3.connect("")  # An empty name: a file that nobody else sees.
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE ids (line INTEGER, field TEXT, id TEXT, digest BLOB)")
        self._database.execute("CREATE TABLE taken (line INTEGER, id TEXT)")

    def add(self, line: int, job_id: str, wire: str) -> None:
        """Check the job of a line, sooner or later."""
        self._held.append((line, job_id, wire))
        self._num_held_chars += len(wire)
        if len(self._held) >= READ_CHUNK or self._num_held_chars >= MAX_HELD_CHARS:
            self._compare_with_queue()

    def add_custom_id(self, line: int, custom_id: str) -> None:
        """Check what a line calls its request."""
        # No two lines are the same request, so the line serves as what differs.
        self._remember([(line, "custom_id", custom_id, b"%d" % line)])

    def conflicts(self) -> Iterator[tuple[int, str]]:
        """The lines whose ids are refused, in order, and why."""
        self._compare_with_queue()
        # One sort on disk at the end costs less than an index that grows with every line.
        found = self._database.execute(
            "SELECT line, 'id', id, NULL FROM taken UNION ALL"
            " SELECT line, field, id, first_line FROM ("
            " SELECT line, field, id, digest, FIRST_VALUE(line) OVER same_id AS first_line,"
            "  FIRST_VALUE(digest) OVER same_id AS first_digest"
            " FROM ids WINDOW same_id AS (PARTITION BY field, id ORDER BY line)"
            ") WHERE digest != first_digest ORDER BY line"
        )
        for line, field, id_, first_line in found:
            if first_line is None:
                queue = self._reader.name
                yield line, f"id: {shown(id_)} names a job of other content on queue '{queue}'"
            else:
                content = ", with other content" if field == "id" else ""
                yield (
                    line,
                    f"{field}: {shown(id_)} is also the {field} of line {first_line}{content}",
                )

    def close(self) -> None:
        self._database.close()

    def _compare_with_queue(self) -> None:
        new, taken = [], []
        stored = self._reader.payloads([job_id for _, job_id, _ in self._held])
        for (line, job_id, wire), known in zip(self._held, stored, strict=True):
            if known is None:
                digest = blake2b(wire.encode(), digest_size=16).digest()
                new.append((line, "id", job_id, digest))
            elif known != wire:
                taken.append((line, job_id))
        self._remember(new)
        self._database.executemany("INSERT INTO taken VALUES (?, ?)", taken)
        self._held.clear()
        self._num_held_chars = 0

    def _remember(self, ids: list[tuple[int, str, str, bytes]]) -> None:
        self._database.executemany("INSERT INTO ids VALUES (?, ?, ?, ?)", ids)
