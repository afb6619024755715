"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        metavar="URL",
        help="Redis or Valkey server; else the one in REDIS_URL, else an embedded one.",
    ),
]
RedisPasswordFile = Annotated[
    Path | None,
    typer.Option(
        "--redis-password-file",
        metavar="FILE",
        help="Its password; else REDIS_PASSWORD_FILE, REDIS_PASSWORD, or in the URL.",
    ),
]
Queue = Annotated[str, typer.Option("--queue", metavar="NAME", help="Name of the queue.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _sampling(name: str, metavar: str, help_: str) -> Any:
    panel = "Sampling, for the lines that say nothing else"
    return typer.Option(name, metavar=metavar, help=help_, rich_help_panel=panel)


MaxTokens = Annotated[int | None, _sampling("--max-tokens", "N", "Tokens of an answer at most.")]
Temperature = Annotated[
    float | None, _sampling("--temperature", "T", "0, the default, takes the likeliest token.")
]
TopP = Annotated[
    float | None, _sampling("--top-p", "P", "Draw from the likeliest tokens that sum to P.")
]
TopK = Annotated[int | None, _sampling("--top-k", "K", "Draw from the K likeliest.")]
MinP = Annotated[
    float | None,
    _sampling("--min-p", "P", "Draw from those at least P times as likely as the likeliest."),
]
Seed = Annotated[int | None, _sampling("--seed", "N", "Draw the same again; else by the job's id.")]
Stop = Annotated[
    list[str] | None,
    _sampling("--stop", "TEXT", "End an answer before TEXT; may be repeated."),
]
NumAnswers = Annotated[int | None, _sampling("-n", "N", "Answers a job.")]
