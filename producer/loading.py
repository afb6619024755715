"""The commands ``lora load``, ``unload``, ``pin``, ``unpin`` and ``list``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import typer

from broker.fetches import FetchStatus
from producer.adapter_states import AdapterStatus
from producer.adapters import Answer, Change
from producer.advice import counted, no_fetcher, remedy
from producer.bars import ProgressLines
from producer.client import Client
from producer.hub import describe
from producer.messages import notice, say, warn
from producer.place import Place
from schemas.errors import LorryError, NotFinished, NoWorker
from schemas.hub import HUB_PREFIX

#: Seconds between two lines about a download.
_DOWNLOAD_LINE_SECONDS = 5.0


@dataclass(frozen=True)
class Report:
    """What to tell about a command."""

    wait: bool
    timeout: float | None
    """Seconds; None as long as it takes, see ``Client.answers``."""
    json_wanted: bool

    def tell(self, client: Client, change: Change) -> None:
        """Print what became of the change, unless nobody is to be waited for.

        Raises LorryError if a worker failed, NotFinished if an adapter is still unloading, and
        NoWorker if none is alive to act on it.
        """
        lines = JobLines(change.name)
        try:
            if self.wait:
                change = client.fetched(change, FetchLines())
            answers = client.answers(change, self.timeout, lines) if self.wait else []
        except KeyboardInterrupt:
            say("The workers act on it all the same.")
            raise
        if self.json_wanted:
            found = {
                "version": change.version or None,
                "workers": [asdict(answer) for answer in answers],
            }
            typer.echo(json.dumps(found))
        elif answers:
            from producer import adapter_tables

            typer.echo(adapter_tables.answers(answers), nl=False)
        if answers:
            _require_success(client, change, answers, lines.obstacle)
        elif change.is_retired:
            say(f"Queue '{client.queue}' does not know '{change.name}' any more.")
        elif not self.wait and change.fetch:
            say(f"'{change.name}' will be fetched and loaded; `producer lora list` shows how far.")
            if not client.has_fetcher():
                warn(no_fetcher(client.queue))
        elif not self.wait:
            say(f"Told the workers to {change.action} '{change.name}'.")
        else:
            raise NoWorker(
                f"No worker is alive on queue '{client.queue}'. The command is kept:"
                f" {_once_started(change)}"
            )


def _once_started(change: Change) -> str:
    if change.action == "unload":
        return f"workers finish the jobs of '{change.name}' and unload it once they start."
    return f"workers {change.action} '{change.name}' once they start."


def _require_success(
    client: Client, change: Change, answers: Sequence[Answer], obstacle: str
) -> None:
    """``obstacle``: what keeps the workers from the jobs of an adapter that is unloading."""
    failed = [answer for answer in answers if not answer.success]
    if not failed:
        return
    name = change.name
    status = next((adapter for adapter in client.adapters() if adapter.name == name), None)
    if change.action == "unload" and status and status.unloading and status.num_loaded:
        raise NotFinished(
            f"'{name}' takes no new jobs, but is not unloaded yet;"
            f" {obstacle or 'the workers go on with it'}."
            f" `producer lora unload {name}` waits again, and with --force fails the jobs that"
            " wait."
        )
    sentence = f"{len(failed)} of {len(answers)} workers did not {change.action} '{name}'."
    if change.action == "load" and status and not status.unloading:
        sentence += f" {_after_failed_load(status)}"
    raise LorryError(sentence)


def _after_failed_load(status: AdapterStatus) -> str:
    if status.previous_revision:
        return f"What it was to replace, revision {status.previous_revision}, is served as before."
    if status.num_loaded:
        return f"{status.num_loaded} of {status.num_workers} serve it."
    return f"Its name stays on the queue: {remedy(status.name)}"


class JobLines:
    """Tells on stderr how many jobs of an adapter are left, now and then, and what keeps workers
    from them, as soon as that changes."""

    def __init__(self, name: str) -> None:
        self._lines = ProgressLines(f"jobs of '{name}' left", None)
        self.obstacle = ""

    def __call__(self, num_jobs: int, obstacle: str) -> None:
        if obstacle and obstacle != self.obstacle:
            notice(f"{counted(num_jobs)} left; {obstacle}.")
        self.obstacle = obstacle
        self._lines.update(num_jobs)


class FetchLines:
    """Tells on stderr how far a fetch is: when that changes, and a download now and then."""

    def __init__(self) -> None:
        self._told: tuple[str, int] | None = None
        self._next_line = 0.0

    def __call__(self, status: FetchStatus) -> None:
        step, now = (status.state, status.attempt), time.monotonic()
        if step != self._told or (status.state == "downloading" and now >= self._next_line):
            self._told, self._next_line = step, now + _DOWNLOAD_LINE_SECONDS
            notice(f"{status.source}: {describe(status)}")


def load(place: Place, name: str, path: str, *, pinned: bool, report: Report) -> None:
    """Load an adapter on all workers."""
    with place.client() as client:
        change = client.load_adapter(name, path, pinned=pinned)
        if change.fetch and not path.startswith(HUB_PREFIX):
            notice(f"There is no folder {path} here, so it is fetched from the hub.")
        report.tell(client, change)


def unload(place: Place, name: str, *, force: bool, report: Report) -> None:
    """Unload an adapter from all workers."""
    with place.client() as client:
        change = client.unload_adapter(name, force=force)
        if change.num_failed:
            jobs = counted(change.num_failed)
            say(f"{jobs} that waited for it failed with adapter_unloaded.")
        if change.is_withdrawn:
            say(f"The request to fetch '{name}' from the hub is withdrawn.")
        report.tell(client, change)


def pin(place: Place, name: str, report: Report) -> None:
    """Pin an adapter on all workers."""
    with place.client() as client:
        report.tell(client, client.pin_adapter(name))


def unpin(place: Place, name: str, report: Report) -> None:
    """Unpin an adapter on all workers."""
    with place.client() as client:
        report.tell(client, client.unpin_adapter(name))


def list_adapters(place: Place, *, json_wanted: bool) -> None:
    """Show every adapter that the queue knows."""
    with place.client() as client:
        found = client.adapters()
        if json_wanted:
            typer.echo(json.dumps({"adapters": [asdict(adapter) for adapter in found]}))
            return
        from producer import adapter_tables

        typer.echo(adapter_tables.adapters(client.queue, found), nl=False)
        is_fetching = any(a.fetch and a.fetch.state != "failed" for a in found)
        if is_fetching and not client.has_fetcher():
            warn(no_fetcher(client.queue))
