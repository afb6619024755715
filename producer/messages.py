"""Sentences to a person, on stderr: stdout is for what was asked for."""

from __future__ import annotations

import os

import typer


def notice(text: str) -> None:
    """What is going on; dim."""
    _echo(typer.style(printable(text), dim=True))


def say(text: str) -> None:
    """What came out of it."""
    _echo(printable(text))


def warn(text: str) -> None:
    """What the person may want to change."""
    _echo(f"{typer.style('warning:', fg=typer.colors.YELLOW)} {printable(text)}")


def fail(text: str) -> None:
    """Why the program ends without having done what was asked."""
    _echo(f"{typer.style('error:', fg=typer.colors.RED, bold=True)} {printable(text)}")


def printable(text: str) -> str:
    """The text without what could command a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _echo(text: str) -> None:
    # Colours are left out where stderr is no terminal, and where the person wants none.
    typer.echo(text, err=True, color=False if os.environ.get("NO_COLOR") else None)
