"""The Python client of a queue.

from producer.client import Client

with Client() as client:
    submission = client.submit(["Hello", {"prompt": "How many users?", "lora": "sql"}])
    for result in client.follow(submission):
        print(result.id, result.text)
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Unpack

import redis

from broker import durability, server_settings
from broker.connection import BLOCK_SECONDS, connect, server_errors
from broker.dead_letters import DeadLetter, DeadLetters
from broker.fetches import Fetches, FetchStatus
from broker.job_queue import JobQueue
from broker.notices import Notices
from broker.outcomes import Cancelled, Limits
from broker.queue_reader import QueueReader
from broker.server import use_server
from producer import adapters, advice, cancelling, following, hub, limiting, pausing, sending
from producer.adapters import AdapterStatus, Answer, Change, OnPause
from producer.cancelling import OnProgress
from producer.following import OnWake
from producer.hub import OnFetch
from producer.intake import Line, prepare
from producer.lines import numbered_lines
from producer.sending import OnFull
from producer.spool import Spool
from producer.status import Overview, Status, describe, is_finished, read_overview
from producer.terms import Terms
from schemas.errors import (
    BadInput,
    LorryError,
    NotFinished,
    NoWorker,
    ServerUnavailable,
    UnknownId,
)
from schemas.keys import BASE, QUEUE_NAME
from schemas.result import Attempt, Result

#: How often a command is repeated whose reply was lost. All that is sent here may be repeated.
RETRIES = 5


class Client:
    """One queue on one server; a context manager. A thread needs a client of its own.

    Every method raises ServerUnavailable if the server cannot be reached or refuses a command.
    """

    def __init__(
        self,
        url: str | None = None,
        queue: str = "lorry",
        password_file: Path | str | None = None,
    ) -> None:
        """Use the server at ``url`` or ``REDIS_URL``; with neither, the embedded one.

        Its password stands in the URL, in ``password_file``, in the file that
        ``REDIS_PASSWORD_FILE`` names, or in ``REDIS_PASSWORD``.
        """
        if not re.fullmatch(QUEUE_NAME, queue):
            raise BadInput(
                f"'{queue}' cannot name a queue: use up to 64 letters, digits and . _ -"
                " beginning with a letter or digit."
            )
        with ExitStack() as stack:
            file = None if password_file is None else Path(password_file)
            server = stack.enter_context(use_server(url, file))
            connection = stack.enter_context(connect(server.url, queue, retries=RETRIES))
            self._stack = stack.pop_all()
        self._url = server.url
        self._job_queue = JobQueue(connection, queue)
        self._reader = QueueReader(connection, queue)
        self._fetches = Fetches(connection, queue)
        self._notices = Notices(connection, queue)
        self._dead_letters = DeadLetters(connection, queue)
        self._next_tidying = 0.0
        self.queue = queue
        #: How to speak of the server to a person.
        self.server = server.description

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect, and end the embedded server if nobody else uses it."""
        self._stack.close()

    def submit(
        self,
        jobs: Iterable[Line],
        *,
        name: str = "<jobs>",
        durable: bool = False,
        **terms: Unpack[Terms],
    ) -> str:
        """Send jobs once all of them are found valid; returns the submission's id.

        A job is a prompt, a mapping with the fields of a line, or a ``Job``; ``terms`` are what
        holds for all of them (``producer.terms``). ``name`` is what errors and lists call the
        input. If ``durable``, they are on the server's disk on return. Raises BadInput with all
        that is wrong, or ServerUnavailable if the server cannot promise that; nothing was sent
        then.
        """
        return self._submit(enumerate(jobs, start=1), terms, name=name, durable=durable)

    def submit_file(
        self, path: Path | str, *, durable: bool = False, **terms: Unpack[Terms]
    ) -> str:
        """``submit`` the lines of a prompts file, of any size, in constant memory."""
        with Path(path).open("rb") as stream:
            return self._submit(numbered_lines(stream), terms, name=str(path), durable=durable)

    def _submit(
        self, lines: Iterable[tuple[int, Line]], terms: Terms, *, name: str, durable: bool
    ) -> str:
        if durable:
            self.require_durability()
        with self.prepare(lines, name=name, **terms) as spool:
            self.send(spool)
            if durable:
                self.sync(spool)
            return spool.submission

    def require_durability(self) -> None:
        """Raises ServerUnavailable, with what to set, if the server cannot promise to keep what it
        is sent."""
        with self._errors():
            durability.require_durability(self._job_queue.client)

    def sync(self, spool: Spool) -> None:
        """Return once all jobs of a spool, which has been sent, are on the server's disk."""
        try:
            with self._errors():
                durability.sync(self._job_queue, spool.submission, spool.num_jobs)
        except ServerUnavailable as error:
            raise ServerUnavailable(f"{error} {sending.sent(spool, spool.num_jobs)}") from error

    def prepare(
        self, lines: Iterable[tuple[int, Line]], *, name: str, **terms: Unpack[Terms]
    ) -> Spool:
        """The first half of ``submit``: checks numbered lines, sends nothing. Close the spool."""
        with self._errors():
            return prepare(self._reader, self._notices, lines, terms, name=name)

    def send(
        self,
        spool: Spool,
        on_sent: Callable[[int], None] | None = None,
        on_full: OnFull | None = None,
    ) -> None:
        """The second half of ``submit``; ``on_sent`` is called with the number of jobs sent, and
        ``on_full`` with the reason, again and again, while the queue has no room.

        Raises BadInput if somebody else has meanwhile sent another job under the id of one, or if
        one is larger than all that may wait; QueueFull if there is no room and nobody is to wait
        for it; and LorryError if the submission is cancelled meanwhile. Each says how many jobs
        were sent; those will run.
        """
        for run in spool.runs():
            try:
                with self._errors():
                    sending.send_run(self._job_queue, spool, run, on_full)
            except ServerUnavailable as error:
                raise ServerUnavailable(f"{error} {sending.sent(spool, run.offset)}") from error
            if on_sent:
                on_sent(run.offset + len(run.jobs))

    def server_warnings(self) -> list[str]:
        """By which settings the server may lose jobs, in sentences that say what to set."""
        with self._errors():
            return server_settings.warnings(server_settings.read_settings(self._job_queue.client))

    def warnings(self, adapters: Iterable[str | None] | None = None) -> list[str]:
        """Why jobs of the adapters may have to wait, in sentences: a pause, no worker, or none that
        serves one of them, and why not. None is the base model. Left out, they are those of the
        waiting jobs."""
        with self._errors():
            if adapters is None:
                waiting = self._reader.num_waiting_by_adapter()
                adapters = [None if name == BASE else name for name in waiting]
            names = list(adapters)
            paused = pausing.of_adapters(self._reader.paused(), names)
            return [
                *pausing.sentences(self.queue, paused),
                *advice.warnings(self._reader, names),
            ]

    def has_notifier(self) -> bool:
        """Whether a notifier is alive, which delivers webhooks."""
        with self._errors():
            return self._notices.allowed_hosts() is not None

    def has_worker(self) -> bool:
        """Whether a worker is alive."""
        with self._errors():
            return bool(self._reader.workers())

    def overview(self) -> Overview:
        """The queue at this moment."""
        with self._errors():
            self._tidy()
            return read_overview(self._reader)

    def status(self, id_: str) -> Status:
        """A submission's counts by state, or what is known of a job. Raises UnknownId."""
        with self._errors():
            self._tidy()
            if self._is_submission(id_):
                return self._reader.submission(id_)
            return next(self._reader.results([id_]))

    def job(self, job_id: str) -> Result:
        """What is known of a job. Raises UnknownId."""
        with self._errors():
            return next(self._reader.results([job_id]))

    def attempts(self, job_id: str) -> list[Attempt]:
        """How the attempts of a job ended that brought no result, from the first one on; none if
        its first attempt was its last."""
        with self._errors():
            return self._dead_letters.attempts(job_id)

    def dead_letters(self, *ids: str) -> Iterator[DeadLetter]:
        """The jobs given up on, of the jobs and submissions, or without ids all of the queue, those
        given up first in front. Raises UnknownId before the first."""
        with self._errors():
            wanted = {id_: self._is_submission(id_) for id_ in ids}
            for letter in self._dead_letters.all():
                if not ids or not wanted.keys().isdisjoint([letter.job_id, *letter.submissions]):
                    yield letter

    def replay_dead(self, *ids: str) -> int:
        """Let dead jobs run again with a fresh count of attempts, and keep their history; a
        submission's id stands for all its dead jobs. Returns their number.

        Raises UnknownId, and BadInput if one of the jobs is no dead letter; nothing was done then.
        """
        with self._errors():
            return self._dead_letters.replay(self._dead_job_ids(ids))

    def drop_dead(self, *ids: str) -> int:
        """Take jobs off the dead letters, as ``replay_dead`` does, and let them be: their results
        still say why they were given up."""
        with self._errors():
            return self._dead_letters.drop(self._dead_job_ids(ids))

    def _dead_job_ids(self, ids: Sequence[str]) -> list[str]:
        """Of jobs and submissions; raises BadInput for a job that is no dead letter."""
        if not ids:
            return []
        found = [letter.job_id for letter in self.dead_letters(*ids)]
        jobs = [id_ for id_ in dict.fromkeys(ids) if not self._is_submission(id_)]
        alive = [result for result in self._reader.results(jobs) if result.id not in found]
        if alive:
            states = advice.listed([f"'{result.id}' ({result.status})" for result in alive])
            raise BadInput(
                f"Not among the dead jobs of queue '{self.queue}': {states}."
                " `producer dead list` shows them."
            )
        return found

    def payloads(self, job_ids: Sequence[str]) -> list[str | None]:
        """What was sent under the ids, as JSON."""
        with self._errors():
            return self._reader.payloads(job_ids)

    def results(self, *ids: str) -> Iterator[Result]:
        """One result a job of the submissions and jobs, in input order, without waiting.

        An unfinished job gives what is known of it: look at ``status``. Raises UnknownId before
        the first result if the queue does not hold one of the ids.
        """
        with self._errors():
            self._tidy()
            kinds = self._kinds_with_results(ids)
            for id_, is_submission in kinds.items():
                job_ids = self._reader.job_ids(id_) if is_submission else [id_]
                yield from self._reader.results(job_ids)

    def follow(self, *ids: str, on_wake: OnWake | None = None) -> Iterator[Result]:
        """The results of the submissions and jobs as they finish, until all have."""
        with self._errors():
            kinds = self._kinds_with_results(ids)
            yield from following.in_completion_order(
                self._reader,
                [id_ for id_, is_submission in kinds.items() if is_submission],
                [id_ for id_, is_submission in kinds.items() if not is_submission],
                self._tidy_and(on_wake),
            )

    def follow_in_order(
        self, submission: str, on_wake: OnWake | None = None, timeout: float | None = None
    ) -> Iterator[Result]:
        """A submission's results in input order, each as soon as it and all before it have
        finished. Its jobs must all have been sent.

        ``timeout`` is in seconds, and ends it as it does ``watch``.
        """
        deadline = _deadline(timeout)
        with self._errors():
            yield from following.in_input_order(
                self._reader, submission, self._tidy_and(on_wake), deadline
            )
        if deadline is not None and not is_finished(status := self.status(submission)):
            raise self.not_finished(f"{describe(status)} after {timeout:g} s")

    def watch(self, id_: str, timeout: float | None = None) -> Iterator[Status]:
        """The status of a submission or a job now, then whenever it may have changed, at least
        every two seconds, until it has finished.

        ``timeout`` is in seconds. Raises NotFinished when they are over, or NoWorker if then no
        worker is alive.
        """
        deadline = _deadline(timeout)
        with self._errors():
            positions = following.positions(self._reader, id_, self._is_submission(id_))
            runs = following.finished_runs(self._reader, positions, deadline)
            while not is_finished(status := self.status(id_)):
                if deadline is not None and time.monotonic() >= deadline:
                    raise self.not_finished(f"{describe(status)} after {timeout:g} s")
                yield status
                next(runs)
            yield status

    def wait(self, id_: str, timeout: float | None = None) -> Status:
        """``watch`` to the end; returns the last status."""
        return deque(self.watch(id_, timeout), maxlen=1).pop()

    def cancel(self, *ids: str, on_progress: OnProgress | None = None) -> Cancelled:
        """End the jobs, and all jobs of the submissions, that have not ended: their results have
        the status ``cancelled``. The worker of one that runs drops it within a few steps.

        A job that several submissions sent ends for all of them. A submission that is still being
        sent takes no more jobs. ``on_progress`` is called with the number of jobs looked at so far.
        Raises UnknownId before the first job is cancelled.
        """
        with self._errors():
            kinds = {id_: self._is_submission(id_) for id_ in ids}
            return cancelling.cancel(self._job_queue, self._reader, kinds, on_progress or _ignore)

    def pause(self, adapter: str | None = None) -> bool:
        """Let workers claim nothing new of the queue, or of an adapter ("@base" is the base model);
        they finish what runs, and jobs may still be sent. False if that was so already.

        Raises UnknownId for an adapter that the queue does not know.
        """
        with self._errors():
            return pausing.pause(self._job_queue, self._reader, adapter)

    def resume(self, adapter: str | None = None) -> bool:
        """End a pause of the queue, or of an adapter; False if there was none."""
        with self._errors():
            return self._job_queue.resume(adapter)

    def limits(self) -> Limits:
        """How many jobs, and bytes of them, may wait in the queue."""
        with self._errors():
            return self._reader.limits()

    def set_limits(self, limits: Limits) -> None:
        """Bound what may wait in the queue, for all who submit; None is any number. What waits
        already stays."""
        with self._errors():
            limiting.set_limits(self._job_queue, limits)

    def load_adapter(self, name: str, source: Path | str, *, pinned: bool = False) -> Change:
        """Let every worker load an adapter, in place of one of that name: jobs that run go on with
        the old one. Returns at once; ``answers`` waits for the workers.

        ``source`` is a folder as the workers see it; a relative one counts from the current folder
        of this process. Or it is a text like ``owner/name[@revision]``, if there is no such folder:
        a repository of the hub, which a fetcher fetches first (``hf:owner/name`` in any case). A
        ``pinned`` adapter keeps a slot. Raises BadInput for what cannot be a name or a source, and
        for more pinned adapters than a worker can keep.
        """
        repository = hub.hub_source(source) if isinstance(source, str) else None
        with self._errors():
            if repository:
                adapters.check_load(self._reader, name, pinned=pinned)
                return hub.request(self._job_queue, self._fetches, name, repository, pinned=pinned)
            return adapters.load(self._job_queue, self._reader, name, source, pinned=pinned)

    def unload_adapter(self, name: str, *, force: bool = False) -> Change:
        """Take an adapter off all workers once its waiting jobs are finished, or, by force, failed;
        it gets no new ones. Returns at once, with the waiting jobs failed if that was by force.
        Raises UnknownId."""
        with self._errors():
            return adapters.unload(self._job_queue, self._reader, name, force=force)

    def pin_adapter(self, name: str) -> Change:
        """Let an adapter keep a slot on every worker. Returns at once.

        Raises UnknownId, and BadInput if a worker keeps as many as it can already.
        """
        with self._errors():
            return adapters.pin(self._job_queue, self._reader, name)

    def unpin_adapter(self, name: str) -> Change:
        """Let an adapter give up its slot like any other. Returns at once. Raises UnknownId."""
        with self._errors():
            return adapters.unpin(self._job_queue, self._reader, name)

    def fetched(self, change: Change, on_fetch: OnFetch | None = None) -> Change:
        """The change that workers act on, once the adapter has been fetched if it comes from the
        hub.

        Waits as long as a fetcher is alive; its tries are bounded. Raises LorryError if it cannot
        be fetched or the request was called off, and NoWorker if no fetcher is alive.
        """
        if change.fetch is None or change.version:
            return change
        with self._errors():
            return hub.wait_until_fetched(
                self._fetches, change, self.queue, on_fetch or _ignore_fetch
            )

    def has_fetcher(self) -> bool:
        """Whether a fetcher is alive, which brings adapters from the hub."""
        with self._errors():
            return self._fetches.has_fetcher()

    def answers(
        self, change: Change, timeout: float | None = None, on_pause: OnPause | None = None
    ) -> list[Answer]:
        """What every living worker made of a change of the adapters, once all have acted on it.

        One that has not within ``timeout`` seconds answers that. Left out, these are 60, and an
        adapter that is unloaded may take as long as its jobs do. No worker is alive if there are
        no answers. An adapter from the hub is waited for first, as ``fetched`` does.
        """
        change = self.fetched(change)
        with self._errors():
            return adapters.answers(
                self._reader, change, timeout=timeout, on_pause=on_pause or _ignore
            )

    def adapters(self) -> list[AdapterStatus]:
        """Every adapter that the queue knows or fetches, by name, and how the living workers serve
        it."""
        with self._errors():
            return adapters.read_statuses(self._reader, self._fetches)

    def not_finished(self, what: str) -> LorryError:
        """The error that says so (``what`` is a sentence without its full stop): NotFinished, or
        NoWorker if no worker is alive."""
        if self.has_worker():
            return NotFinished(f"{what}.")
        return NoWorker(f"{what}. {advice.no_worker(self.queue)}")

    def _kinds_with_results(self, ids: Iterable[str]) -> dict[str, bool]:
        """Whether each is a submission or a job; raises UnknownId, also for one that expired."""
        kinds = {id_: self._is_submission(id_) for id_ in ids}
        for id_, is_submission in kinds.items():
            if is_submission:
                self._reader.require_results(id_)
        return kinds

    def _tidy(self) -> None:
        """End what has come to its time, as workers do, since there may be none alive."""
        if time.monotonic() < self._next_tidying:
            return
        self._next_tidying = time.monotonic() + BLOCK_SECONDS
        with suppress(redis.ResponseError):  # Who may only read leaves it to others.
            self._job_queue.expire_jobs()
            self._job_queue.expire_submissions()

    def _tidy_and(self, on_wake: OnWake | None) -> OnWake:
        def tidy_and_wake() -> None:
            self._tidy()
            if on_wake:
                on_wake()

        return tidy_and_wake

    def _is_submission(self, id_: str) -> bool:
        try:
            id_.encode()
        except UnicodeEncodeError:
            raise UnknownId(f"No id is like '{id_}': it is not UTF-8.") from None
        return self._reader.is_submission(id_)

    def _errors(self) -> AbstractContextManager[None]:
        return server_errors(self._url)


def _deadline(timeout: float | None) -> float | None:
    """The moment of ``time.monotonic`` at which so many seconds are over."""
    if timeout is None:
        return None
    if not timeout >= 0:  # Written so that it refuses NaN too.
        raise BadInput(f"A timeout is a number of seconds, not {timeout}.")
    return time.monotonic() + timeout


def _ignore(number: int) -> None:
    pass


def _ignore_fetch(status: FetchStatus) -> None:
    pass
