"""Options that several commands have."""

from __future__ import annotations

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
Queue = Annotated[str, typer.Option("--queue", metavar="NAME", help="Name of the queue.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
