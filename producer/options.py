"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
OutputFile = Annotated[
    Path | None,
    typer.Option(
        *("-o", "--output"),
        metavar="FILE",
        help="Write results to FILE. It grows as FILE.partial until it is complete.",
    ),
]

#: What the forms of results are, for the commands that write them.
FORMATS = (
    "openai: as OpenAI's batches have it, with an error file beside FILE (out.jsonl:"
    " out.errors.jsonl)."
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
