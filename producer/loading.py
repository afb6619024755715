"""The commands ``lora load``, ``unload``, ``pin``, ``unpin`` and ``list``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import typer

from producer.adapters import Change
from producer.bars import ProgressLines
from producer.client import Client
from producer.messages import say
from producer.place import Place
from schemas.errors import LorryError, NoWorker


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
            answers = client.answers(change, self.timeout, lines.update) if self.wait else []
        except KeyboardInterrupt:
            say("The workers act on it all the same.")
            raise
        if self.json_wanted:
            found = {"version": change.version, "workers": [asdict(answer) for answer in answers]}
            typer.echo(json.dumps(found))
        elif answers:
            from producer import adapter_tables

            typer.echo(adapter_tables.answers(answers), nl=False)
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
