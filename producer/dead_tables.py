"""Tables of jobs that were given up on, and of how attempts ended."""

from __future__ import annotations

from collections.abc import Sequence

from broker.dead_letters import DeadLetter
from producer.tables import age, cell, cells, moment, new_table, printed
from schemas.result import Attempt


def dead_letters(queue: str, found: Sequence[DeadLetter]) -> str:
    """One row a job that was given up on."""
    if not found:
        return printed([f"No dead jobs on queue '{queue}'."])
    table = new_table("job", "submission", "adapter", "attempts", "given up", "reason")
    for letter in found:
        given_up = "" if letter.given_up is None else f"{age(letter.given_up)} ago"
        submission = next(iter(letter.submissions), "")
        table.add_row(
            *cells(letter.job_id, submission, letter.lora or "(base)", letter.attempts, given_up),
            cell(f"{letter.code}: {letter.reason}"),
        )
    return printed([table])


def attempts(found: Sequence[Attempt]) -> str:
    """One row an attempt that brought no result."""
    if not found:
        return ""
    table = new_table("attempt", "worker", "started", "ended", "how it ended")
    for attempt in found:
        table.add_row(
            *cells(attempt.attempt, attempt.worker or ""),
            *cells(moment(attempt.started) or "", moment(attempt.ended)),
            cell(f"{attempt.outcome}: {attempt.message}"),
        )
    return printed(["", table])
