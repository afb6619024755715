"""The commands ``results``, ``status`` and ``wait``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import typer

from broker.queue_reader import READ_CHUNK, SubmissionStatus
from producer.advice import counted
from producer.bars import Watcher, bar_for, show
from producer.client import Client
from producer.output import open_outputs
from producer.place import Place
from producer.status import (
    Overview,
    as_json,
    describe,
    is_finished,
    listed_states,
    num_jobs,
    require_all_done,
)
from producer.writers import ResultFormat, WriteResults, has_error_file, writer
from schemas.result import TERMINAL_STATES, Result


def results(
    place: Place, ids: Sequence[str], path: Path | None, *, follow: bool, form: ResultFormat
) -> None:
    """Write the finished results in input order, or all of them as they finish."""
    has_errors = has_error_file(form)
    with place.client() as client, open_outputs(path, has_error_file=has_errors) as outputs:
        write = writer(form, client, outputs)
        if follow:
            for result in client.follow(*ids, on_wake=Watcher(client).look):
                write([result])
            outputs.complete()
            return
        total = sum(num_jobs(client.status(id_)) for id_ in dict.fromkeys(ids))
        seen = _write_finished(client, ids, write)
        unfinished = total - sum(seen[state] for state in TERMINAL_STATES)
        if not unfinished:
            outputs.complete()
            return
        states = listed_states({state: seen[state] for state in ("waiting", "running")})
        files = " and ".join(str(file) for file in outputs.partial_files)
        kept = f" The finished ones are in {files}." if files else ""
        raise client.not_finished(
            f"{unfinished} of {counted(total)} not finished yet ({states or 'not sent'}).{kept}"
            " --follow waits for the rest"
        )


def wait(place: Place, id_: str, timeout: float | None) -> None:
    """Wait until a submission or a job has finished."""
    with place.client() as client:
        watcher = Watcher(client)
        status = client.status(id_)
        with bar_for("finished", num_jobs(status)) as bar:
            for status in client.watch(id_, timeout):
                show(status, bar)
                if not is_finished(status):
                    watcher.look()
        require_all_done(status, f"{place.command(f'results {id_}')} says why.")
        typer.echo(f"{describe(status)}.")


def status(place: Place, id_: str | None, *, json_wanted: bool) -> None:
    """Show the queue, a submission or a job."""
    with place.client() as client:
        found = client.status(id_) if id_ is not None else client.overview()
        if json_wanted:
            typer.echo(as_json(found))
            return
        from producer import dead_tables, tables

        if not isinstance(found, Overview) and not is_finished(found):
            Watcher(client, [found.lora] if isinstance(found, Result) else None).look()
        if isinstance(found, Result):
            text = tables.job(found, client.payloads([found.id])[0])
            text += dead_tables.attempts(client.attempts(found.id))
        elif isinstance(found, SubmissionStatus):
            text = tables.submission(found)
        else:
            text = tables.overview(client.queue, found)
        typer.echo(text, nl=False)


def _write_finished(client: Client, ids: Sequence[str], write: WriteResults) -> Counter[str]:
    """Writes the results that are there; returns how many jobs it saw in which state."""
    seen: Counter[str] = Counter()
    found = client.results(*ids)
    while chunk := list(islice(found, READ_CHUNK)):
        seen.update(result.status for result in chunk)
        write([result for result in chunk if is_finished(result)])
    return seen
