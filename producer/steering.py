"""What the commands that steer a queue do and print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import typer

from producer.advice import counted
from producer.bars import bar_for
from producer.messages import say
from producer.place import Place
from producer.status import num_jobs


def cancel(place: Place, ids: Sequence[str], *, json_wanted: bool) -> None:
    """Cancel what has not ended of the jobs and submissions."""
    with place.client() as client:
        total = sum(num_jobs(client.status(id_)) for id_ in dict.fromkeys(ids))
        with bar_for("cancelling", total) as bar:
            try:
                cancelled = client.cancel(*ids, on_progress=bar.update)
            except KeyboardInterrupt:
                say("What was cancelled stays so; the same command goes on with the rest.")
                raise
    if json_wanted:
        typer.echo(json.dumps(asdict(cancelled)))
        return
    ended = f"; {cancelled.ended} had ended before" if cancelled.ended else ""
    number = cancelled.waiting + cancelled.running
    how = f" ({cancelled.waiting} waiting, {cancelled.running} running)" if number else ""
    typer.echo(f"Cancelled {counted(number)}{how}{ended}.")
