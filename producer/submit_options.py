"""The options of ``submit``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from producer.options import FORMATS


class PriorityName(StrEnum):
    high = "high"
    normal = "normal"
    low = "low"


class WhenFullName(StrEnum):
    wait = "wait"
    refuse = "refuse"


class LineFormat(StrEnum):
    jsonl = "jsonl"
    openai = "openai"


File = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="Prompts, one JSON object or string a line, or one of OpenAI's batch files; - is"
        " stdin.",
    ),
]
Lora = Annotated[
    str | None,
    typer.Option("--lora", metavar="NAME", help="Adapter for the lines that name none."),
]
Priority = Annotated[
    PriorityName,
    typer.Option("--priority", help="Which jobs go first, for the lines that give none."),
]
Deadline = Annotated[
    str | None,
    typer.Option(
        "--deadline",
        metavar="WHEN",
        help="Until when jobs must have begun: how long from now (600, 15m, 2h, 1d), or a"
        " moment (2026-12-24T18:00). One that has not begun by then is not run.",
    ),
]
ResultTtl = Annotated[
    str,
    typer.Option(
        "--result-ttl",
        metavar="TIME",
        help="How long results are kept once the last job has ended (3600, 12h, 30d).",
    ),
]
WhenFull = Annotated[
    WhenFullName,
    typer.Option(
        "--when-full",
        help="Where `producer limits` leaves no room: wait for it, or send nothing.",
    ),
]
Webhook = Annotated[
    str | None,
    typer.Option(
        "--webhook",
        metavar="URL",
        help="Tell this http(s) address, by a signed POST, once all jobs have ended; a notifier"
        " delivers it.",
    ),
]
Lenient = Annotated[
    bool,
    typer.Option(
        "--lenient",
        help="Send the other lines of a file with bad ones, which end as failed and say why.",
    ),
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait, and write the results in input order.")]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        min=0,
        help="With --wait: give up after this time, and after as long without room.",
    ),
]
Format = Annotated[
    LineFormat | None,
    typer.Option("--format", help=f"With --wait: {FORMATS} Default: jsonl."),
]
Durable = Annotated[
    bool,
    typer.Option("--durable", help="Say that they are submitted once the server has them on disk."),
]


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
