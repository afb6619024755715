"""What a person reads: tables of results, submissions and workers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from broker.queue_reader import SubmissionStatus
from producer import limiting, pausing
from producer.advice import START_A_WORKER, counted, listed, unserved
from producer.messages import printable
from producer.status import Overview, listed_states
from producer.webhooks import describe_webhook
from schemas import WIRE_VERSION
from schemas.keys import BASE
from schemas.result import Result

#: Columns where there is no terminal to ask. A table of results has to share some out before it
#: knows its rows; in others nothing is folded, since whoever reads a pipe may look for a word.
RESULTS_WIDTH, UNBOUNDED_WIDTH = 160, 1_000_000

#: Characters of a prompt or an answer that a row shows.
MAX_SHOWN = 300

_STATE_STYLES = {"waiting": "", "running": "cyan", "done": "green"}


_NUMBERS = {"jobs", "waiting", "running", "done", "other", "unfinished jobs"}
_NUMBERS |= {
    "attempt",
    "attempts",
    "in slots",
    "requests",
    "tokens",
    "loads",
    "evictions",
    "slot loads",
    "slot evictions",
    "s a load",
}


class ResultTable:
    """A table of results that grows at its end: every column has its width from the start."""

    def __init__(self, *, for_terminal: bool) -> None:
        self._console = _console(for_terminal, RESULTS_WIDTH)
        self._has_head = False

    def rows(self, results: Sequence[Result], payloads: Sequence[str | None]) -> str:
        """The rows of results, with the head before the first; ``payloads`` are the jobs as they
        were sent."""
        if not results:
            return ""
        table = self._columns()
        self._has_head = True
        for result, payload in zip(results, payloads, strict=True):
            table.add_row(
                cell(result.id),
                cell(result.lora or "(base)"),
                cell(prompt_of(payload)),
                _answer(result),
                str(result.usage.completion_tokens),
                _duration(result),
            )
        return _rendered(self._console, [table])

    def _columns(self) -> Table:
        text_width = max(20, self._console.width - 68)
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=not self._has_head)
        for name, width in (
            ("job", 30),
            ("adapter", 12),
            ("prompt", text_width * 2 // 5),
            ("answer", text_width * 3 // 5),
        ):
            table.add_column(name, width=width, overflow="fold")
        for name in ("tokens", "time"):
            table.add_column(name, width=7, justify="right")
        return table


def prompt_of(payload: str | None) -> str:
    """The prompt of a job as it was sent: of a chat its last turn, of token ids their number."""
    job = json.loads(payload or "{}")
    if messages := job.get("messages"):
        return str(messages[-1]["content"])
    if token_ids := job.get("prompt_token_ids"):
        return f"({counted(len(token_ids), 'token id')})"
    return str(job.get("prompt", ""))


def overview(queue: str, found: Overview) -> str:
    """A queue's submissions, workers and waiting adapters."""
    parts: list[RenderableType | None] = [
        _submissions(queue, found),
        _workers(queue, found),
        _adapters(found),
        _out_of_turn(found),
    ]
    if found.limits != (None, None):
        parts.append(f"{limiting.describe(found.backlog, found.limits)}.")
    parts += [Text(printable(s), style="yellow") for s in pausing.sentences(queue, found.paused)]
    if found.workers:
        names = [name for name in found.unfinished if name != BASE]
        parts += [Text(printable(s), style="yellow") for s in unserved(names, found.workers)]
    return printed(_with_blank_lines(filter(None, parts)))


def submission(status: SubmissionStatus) -> str:
    """A submission's counts."""
    rows = [
        ("submission", status.id),
        ("input", status.name),
        ("sent", f"{age(status.created)} ago"),
        ("jobs", f"{status.total}: {listed_states(status.counts)}"),
    ]
    if status.sent < status.total:
        rows.append(("not sent", f"{status.total - status.sent} (still sending, or interrupted)"))
    if status.expired is not None:
        rows.append(("results", f"expired at {moment(status.expired)}"))
    if status.webhook:
        rows.append(("webhook", f"{status.webhook.url}: {describe_webhook(status.webhook)}"))
    return _fields(rows)


def job(result: Result, payload: str | None) -> str:
    """All that is known of a job."""
    timings, usage, error = result.timings, result.usage, result.error
    sent = json.loads(payload or "{}")
    return _fields(
        [
            ("job", result.id),
            ("submission", result.submission),
            ("state", result.status),
            ("adapter", result.lora or "(base model)"),
            ("revision", result.revision),
            ("priority", sent.get("priority")),
            ("deadline", _deadline(sent.get("deadline"))),
            ("prompt", prompt_of(payload)),
            ("answer", result.text),
            ("finish reason", result.finish_reason),
            *((f"answer {choice.index}", choice.text) for choice in result.choices or ()),
            ("error", f"{error.code}: {error.message}" if error else None),
            ("tokens", f"{usage.prompt_tokens} read, {usage.completion_tokens} written"),
            ("worker", result.worker),
            ("queued", moment(timings.queued)),
            ("started", moment(timings.started)),
            ("first token", moment(timings.first_token)),
            ("finished", moment(timings.finished)),
            ("metadata", None if result.metadata is None else json.dumps(result.metadata)),
        ]
    )


def _submissions(queue: str, found: Overview) -> RenderableType:
    if not found.submissions:
        return f"Nothing was ever submitted to queue '{queue}': producer submit FILE"
    table = new_table("submission", "input", "jobs", "waiting", "running", "done", "other", "sent")
    if found.num_submissions > len(found.submissions):
        table.caption = f"the last {len(found.submissions)} of {found.num_submissions} submissions"
    for status in found.submissions:
        counts = status.counts
        other = status.finished - counts["done"]
        table.add_row(
            *cells(status.id, status.name, status.total),
            *cells(counts["waiting"], counts["running"], counts["done"]),
            Text(str(other), style="red" if other else ""),
            f"{age(status.created)} ago",
        )
    return table


def _workers(queue: str, found: Overview) -> RenderableType:
    if not found.workers:
        return Text(f"No worker is alive on queue '{queue}'. {START_A_WORKER}", style="yellow")
    table = new_table("worker", "model", "device", "running", "waiting", "in slots", "adapters")
    for worker in found.workers:
        table.add_row(
            *cells(worker.id, worker.model, worker.device, worker.running, worker.waiting),
            str(len(set(worker.resident))),
            cell(listed(sorted(worker.adapters)) or "(base model)"),
        )
    return table


def _adapters(found: Overview) -> RenderableType | None:
    if not found.unfinished:
        return None
    table = new_table("adapter", "unfinished jobs", "workers that serve it")
    for name, number in found.unfinished.items():
        serving = sum(name == BASE or name in worker.adapters for worker in found.workers)
        table.add_row(
            cell("(base model)" if name == BASE else name),
            str(number),
            Text(str(serving), style="" if serving else "yellow"),
        )
    return table


def _out_of_turn(found: Overview) -> RenderableType | None:
    """Sentences on jobs that do not simply wait for their turn."""
    sentences = []
    if found.num_suspects:
        sentences.append(
            f"{counted(found.num_suspects)} to be tried again alone: the worker died or failed."
        )
    if found.num_delayed:
        sentences.append(f"{counted(found.num_delayed)} to be tried again later.")
    if found.num_abandoned:
        sentences.append(
            f"{counted(found.num_abandoned)} left running by workers that are gone: the next worker"
            " lets them run again."
        )
    if found.num_dead:
        sentences.append(
            f"{counted(found.num_dead)} given up on: `producer dead list` says why,"
            " `producer dead replay` tries again."
        )
    sentences += [_set_aside(*item) for item in found.num_set_aside.items()]
    return Text("\n".join(sentences), style="yellow") if sentences else None


def _set_aside(version: str, number: int) -> str:
    if version == "0":
        left = f"{counted(number)} left alone: the record is damaged."
        return f"{left} Send its prompt again, under another id."
    return (
        f"{counted(number)} left alone: the record is of version {version}, and workers that have"
        f" met it read others (this release: {WIRE_VERSION - 1} and {WIRE_VERSION}). Start a worker"
        " of the release that sent it."
    )


def _fields(rows: Iterable[tuple[str, str | None]]) -> str:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            style = _STATE_STYLES.get(value, "red") if name == "state" else ""
            table.add_row(name, Text(printable(value), style=style))
    return printed([table])


def printed(parts: Iterable[RenderableType]) -> str:
    """The parts as stdout can show them."""
    return _rendered(_console(sys.stdout.isatty(), UNBOUNDED_WIDTH), parts)


def new_table(*columns: str) -> Table:
    """A table without rows."""
    table = Table(box=None, padding=(0, 2, 0, 0), caption_justify="left")
    for column in columns:
        table.add_column(
            column,
            overflow="fold",
            no_wrap=column in ("job", "submission", "worker", "name"),  # Ids are copied from here.
            justify="right" if column in _NUMBERS else "left",
        )
    return table


def _console(for_terminal: bool, width_elsewhere: int) -> Console:
    """Rich's idea of the output: as wide as the terminal, and without colour elsewhere."""
    return Console(
        force_terminal=for_terminal,
        width=None if for_terminal else width_elsewhere,
        highlight=False,
        markup=False,
        emoji=False,
    )


def _rendered(console: Console, parts: Iterable[RenderableType]) -> str:
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    # Cells are padded to their column's width; nobody needs the spaces at the end of a line.
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def _with_blank_lines(parts: Iterable[RenderableType]) -> Iterator[RenderableType]:
    for number, part in enumerate(parts):
        if number:
            yield ""
        yield part


def cells(*values: object) -> list[Text]:
    """``cell`` of each value."""
    return [cell(str(value)) for value in values]


def cell(text: str) -> Text:
    """Text as it is: no markup, no control characters, not endless."""
    shown = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
    return Text(printable(shown))


def _answer(result: Result) -> Text:
    if result.error:
        return Text(f"{result.status}: ", style="red") + cell(result.error.message)
    if result.status != "done":
        return Text(result.status, style="red")
    if result.choices:
        first = Text(f"(1 of {len(result.choices)}) ", style="dim")
        return first + cell((result.choices[0].text or "").strip())
    if result.text is None:
        return Text(f"({counted(len(result.token_ids or []), 'token id')})", style="dim")
    return cell(result.text.strip())


def _duration(result: Result) -> str:
    started, finished = result.timings.started, result.timings.finished
    return "" if started is None or finished is None else f"{finished - started:.1f} s"


def _deadline(value: float | str | None) -> str | None:
    return f"{value:g} s after it was sent" if isinstance(value, float) else value


def moment(seconds: float | None) -> str | None:
    """In local time."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "milliseconds")


def age(since: float) -> str:
    """ "5 s", "12 min", "3 h", "9 d" """
    seconds = max(0, int(time.time() - since))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
