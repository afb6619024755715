"""What the commands that steer a queue do and print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import typer

from producer.advice import counted
from producer.bars import bar_for
from producer.limiting import describe
from producer.messages import say, warn
from producer.pausing import sentences
from producer.place import Place
from producer.quantities import parse_size
from producer.status import num_jobs
from schemas.keys import BASE


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


def pause(place: Place, name: str | None) -> None:
    """Pause the queue, or an adapter."""
    with place.client() as client:
        is_new = client.pause(name)
        is_known = name in (None, BASE) or client.knows_adapters()
    what, again = _paused_thing(place, name), place.command(f"resume{f' {name}' if name else ''}")
    if is_new:
        typer.echo(f"Paused {what}: workers finish what runs and claim nothing new until {again}.")
    else:
        typer.echo(f"Paused already: {what}. {again} ends that.")
    if not is_known:
        warn(
            f"No worker has ever joined queue '{place.queue}', so nobody could tell whether it has"
            " that adapter; the pause holds if one of that name comes."
        )


def resume(place: Place, name: str | None) -> None:
    """End a pause."""
    with place.client() as client:
        was_paused = client.resume(name)
        what = _paused_thing(place, name)
        typer.echo(f"Resumed {what}." if was_paused else f"Not paused: {what}.")
        left = client.overview().paused
    for sentence in sentences(place.queue, left):
        say(sentence)


def limits(place: Place, jobs: str | None, num_bytes: str | None, *, json_wanted: bool) -> None:
    """Change the bounds that are given, and show what waits and what may."""
    given = {}
    if jobs is not None:
        given["jobs"] = parse_size(jobs, "--jobs")
    if num_bytes is not None:
        given["bytes"] = parse_size(num_bytes, "--bytes")
    with place.client() as client:
        limits = client.limits()._replace(**given)
        if given:
            client.set_limits(limits)
        waiting = client.overview().backlog
    if json_wanted:
        typer.echo(json.dumps({"waiting": waiting._asdict(), "limits": limits._asdict()}))
    else:
        typer.echo(f"Queue '{place.queue}': {describe(waiting, limits)}.")


def _paused_thing(place: Place, name: str | None) -> str:
    if name is None:
        return f"queue '{place.queue}'"
    return "the base model" if name == BASE else f"adapter '{name}'"
