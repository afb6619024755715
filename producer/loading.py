"""The commands ``lora load``, ``unload``, ``pin``, ``unpin`` and ``list``."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

import typer

from broker.fetches import FetchStatus
from producer.adapters import Change
from producer.advice import no_fetcher
from producer.bars import ProgressLines
from producer.client import Client
from producer.hub import describe
from producer.messages import notice, say, warn
from producer.place import Place
from schemas.errors import LorryError, NoWorker

#: Seconds between two lines about a download.
_DOWNLOAD_LINE_SECONDS = 5.0


@dataclass(frozen=True)
class Report:
    """What to tell about a command."""

    wait: bool
    timeout: float
    """Seconds."""
    json_wanted: bool

    def tell(self, client: Client, change: Change) -> None:
        """Print what became of the change, unless nobody is to be waited for.

        Raises LorryError if a worker failed, and NoWorker if none is alive.
        """
        lines = ProgressLines(f"jobs of '{change.name}' left", None)
        try:
            if self.wait:
                change = client.fetched(change, FetchLines())
            answers = client.answers(change, self.timeout, lines.update) if self.wait else []
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
        if not self.wait and change.fetch:
            say(f"'{change.name}' will be fetched and loaded; `producer lora list` shows how far.")
            if not client.has_fetcher():
                warn(no_fetcher(client.queue))
            return
        if not self.wait:
            say(f"Told the workers to {change.action} '{change.name}'.")
            return
        if not answers:
            raise NoWorker(
                f"No worker is alive on queue '{client.queue}'. The command is kept:"
                f" workers {change.action} '{change.name}' once they start."
            )
        if failed := sum(not answer.success for answer in answers):
            raise LorryError(
                f"{failed} of {len(answers)} workers did not {change.action} '{change.name}'."
            )


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
        report.tell(client, client.load_adapter(name, path, pinned=pinned))


def unload(place: Place, name: str, *, force: bool, report: Report) -> None:
    """Unload an adapter from all workers."""
    with place.client() as client:
        report.tell(client, client.unload_adapter(name, force=force))


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
