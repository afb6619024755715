"""The commands ``dead list``, ``show``, ``replay`` and ``drop``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import typer

from producer.advice import counted
from producer.client import Client
from producer.messages import say
from producer.place import Place
from schemas.errors import BadInput


def list_dead(place: Place, ids: Sequence[str], *, json_wanted: bool) -> None:
    """Print the dead letters of jobs and submissions, or all of them."""
    with place.client() as client:
        found = client.dead_letters(*ids)
        if json_wanted:
            typer.echo(json.dumps({"dead": [asdict(letter) for letter in found]}))
            return
        from producer import dead_tables

        typer.echo(dead_tables.dead_letters(client.queue, list(found)), nl=False)


def show(place: Place, job_id: str, *, json_wanted: bool) -> None:
    """Print a job and its history."""
    with place.client() as client:
        result, attempts = client.job(job_id), client.attempts(job_id)
        if json_wanted:
            found = {
                "job": result.model_dump(mode="json"),
                "attempts": [attempt.model_dump() for attempt in attempts],
            }
            typer.echo(json.dumps(found))
            return
        from producer import dead_tables, tables

        typer.echo(tables.job(result, client.payloads([job_id])[0]), nl=False)
        typer.echo(dead_tables.attempts(attempts), nl=False)


def replay(place: Place, ids: Sequence[str], *, all_wanted: bool, json_wanted: bool) -> None:
    """Let dead jobs run again."""
    with place.client() as client:
        number = client.replay_dead(*_chosen(client, ids, all_wanted))
        _tell("replayed", number, json_wanted=json_wanted)


def drop(place: Place, ids: Sequence[str], *, all_wanted: bool, json_wanted: bool) -> None:
    """Take dead jobs off the list."""
    with place.client() as client:
        number = client.drop_dead(*_chosen(client, ids, all_wanted))
        _tell("dropped", number, json_wanted=json_wanted)


def _chosen(client: Client, ids: Sequence[str], all_wanted: bool) -> list[str]:
    if bool(ids) == all_wanted:
        raise BadInput("Name jobs or submissions, or give --all.")
    return list(ids) or [letter.job_id for letter in client.dead_letters()]


def _tell(action: str, number: int, *, json_wanted: bool) -> None:
    if json_wanted:
        typer.echo(json.dumps({action: number}))
    else:
        say(f"{counted(number)} {action}.")
