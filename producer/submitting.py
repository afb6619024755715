"""The command ``submit``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import typer

from producer.advice import counted, no_notifier
from producer.bars import Watcher, bar_for, shown
from producer.client import Client
from producer.lines import numbered_lines
from producer.messages import notice, say, warn
from producer.output import Outputs, error_file, open_outputs
from producer.place import Place
from producer.spool import Spool
from producer.status import by_state, describe, require_all_done
from producer.terms import Terms
from producer.writers import ResultFormat, has_error_file, writer
from schemas.errors import BadInput, NotFinished, NoWorker


def submit(place: Place, file: str, terms: Terms, *, durable: bool, json_wanted: bool) -> None:
    """Send a file and say what to type next."""
    with _sent(place, file, terms, durable=durable) as (client, spool):
        if json_wanted:
            typer.echo(json.dumps(_summary(client, spool)))
        else:
            typer.echo(_submitted(spool, durable))
            typer.echo(f"Results: {place.command(f'results {spool.submission} --follow')}")
        Watcher(client, spool.num_jobs_by_adapter).look()


def submit_and_wait(
    place: Place,
    file: str,
    terms: Terms,
    path: Path | None,
    *,
    form: ResultFormat,
    timeout: float | None,
    durable: bool,
    json_wanted: bool,
) -> None:
    """Send a file and write its results in input order, each as soon as those before it are, for
    at most ``timeout`` seconds after it was sent; for as long at most it waits for room before."""
    has_errors = has_error_file(form)
    _refuse_overwriting(file, path)
    if path and has_errors:
        _refuse_overwriting(file, error_file(path))
    with (
        open_outputs(path, has_error_file=has_errors) as outputs,
        _sent(place, file, terms, durable=durable, timeout=timeout) as (client, spool),
    ):
        try:
            say(_submitted(spool, durable))
            _write_in_order(client, spool, outputs, form, timeout)
        except (KeyboardInterrupt, NotFinished, NoWorker):
            say(f"The jobs go on: {place.command(f'results {spool.submission} --follow')}")
            raise
        status = client.status(spool.submission)
        if json_wanted:
            typer.echo(json.dumps(_summary(client, spool) | {"counts": by_state(status)}))
        require_all_done(status, "Their results say why.")
        say(f"{describe(status)}.")


@contextmanager
def _sent(
    place: Place, file: str, terms: Terms, *, durable: bool, timeout: float | None = None
) -> Iterator[tuple[Client, Spool]]:
    """A client, and the spool of a file whose jobs it has sent, once there was room for them within
    ``timeout`` seconds."""
    with _open_input(file) as (stream, name), place.client() as client:
        if durable:
            client.require_durability()
        for sentence in client.server_warnings():
            warn(sentence)
        with bar_for("checking") as bar:
            spool = client.prepare(shown(numbered_lines(stream), bar), name=name, **terms)
        with spool:
            if spool.refusals:
                warn(spool.refusals)
            if spool.webhook and not client.has_notifier():
                warn(no_notifier(client.queue))
            _send(client, spool, timeout)
            if durable:
                client.sync(spool)
            yield client, spool


def _submitted(spool: Spool, durable: bool) -> str:
    on_disk = ", on the server's disk" if durable else ""
    refused = f", {spool.num_refused} of them refused" if spool.num_refused else ""
    return f"Submitted {counted(spool.num_jobs)} as {spool.submission}{refused}{on_disk}"


def _send(client: Client, spool: Spool, timeout: float | None) -> None:
    num_sent = 0

    def on_sent(number: int) -> None:
        nonlocal num_sent
        num_sent = number
        bar.update(number)

    watcher = Watcher(client, spool.num_jobs_by_adapter)
    has_told = False

    def on_full(reason: str) -> None:
        nonlocal has_told
        if not has_told:
            notice(f"The queue is full, so sending waits for room: {reason}")
            has_told = True
        bar.update(num_sent, "the queue is full")
        watcher.look()

    with bar_for("sending", spool.num_jobs) as bar:
        try:
            client.send(spool, on_sent, on_full, timeout)
        except KeyboardInterrupt:
            say(
                f"At least {num_sent} of {counted(spool.num_jobs)} were sent, as"
                f" {spool.submission}, and will run."
            )
            raise


@contextmanager
def _open_input(file: str) -> Iterator[tuple[BinaryIO, str]]:
    """The bytes of a file or of stdin, and what errors call it."""
    if file == "-":
        if sys.stdin is None:
            raise BadInput("stdin is closed; pipe a file into it, or name one.")
        if sys.stdin.isatty():
            notice("Reading prompts from the terminal, one a line; Ctrl-D ends them.")
        yield sys.stdin.buffer, "<stdin>"
        return
    try:
        stream = open(file, "rb")  # noqa: SIM115 - only its opening is the caller's fault.
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror}.") from error
    with stream:
        yield stream, file


def _refuse_overwriting(file: str, path: Path | None) -> None:
    try:
        if path and file != "-" and path.is_file() and path.samefile(file):
            raise BadInput(f"-o {path} would overwrite the prompts.")
    except FileNotFoundError:
        pass  # Opening it says so.


def _summary(client: Client, spool: Spool) -> dict[str, object]:
    return {"submission": spool.submission, "queue": client.queue, "jobs": spool.num_jobs}


def _write_in_order(
    client: Client, spool: Spool, outputs: Outputs, form: ResultFormat, timeout: float | None
) -> None:
    write = writer(form, client, outputs)
    watcher = Watcher(client, spool.num_jobs_by_adapter)
    watcher.look()
    with bar_for("finished", spool.num_jobs) as bar:
        found = client.follow_in_order(
            spool.submission, lambda: watcher.look_at(spool.submission, bar), timeout
        )
        for result in found:
            with bar.taken_away() if outputs.results.is_terminal else nullcontext():
                write([result])
    outputs.complete()
