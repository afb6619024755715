"""The tables of a soak."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator

from rich.table import Table

from benchmarks.soak.player import Soak


def fault_table(soak: Soak) -> Table:
    """Faults by kind, and how long the jobs took that ran when each ended."""
    table = Table("fault", "times", "with jobs running", "recovered, p50 s", "p99 s", "longest s")
    everything: list[float] = []
    for kind, number in sorted(soak.faults.items()):
        seconds = soak.recoveries.seconds.get(kind, [])
        everything += seconds
        table.add_row(kind, str(number), str(len(seconds)), *_percentiles(seconds))
    table.add_section()
    total = str(soak.faults.total())
    table.add_row("all", total, str(len(everything)), *_percentiles(everything))
    return table


def command_table(soak: Soak) -> Table:
    """What the operator asked for, and how often the answer was a reason why not."""
    table = Table("command", "times", "refused")
    for kind, number in sorted(soak.operator.given.items()):
        table.add_row(kind, str(number), str(soak.operator.refused[kind]))
    return table


def outcome_table(soak: Soak) -> Table:
    """Jobs by outcome, executions, growth."""
    table = Table("what", "number")
    for name, value in _outcomes(soak):
        table.add_row(name, value)
    return table


def _outcomes(soak: Soak) -> Iterator[tuple[str, str]]:
    ledger, runs, growth = soak.bench.ledger, soak.bench.runs(), soak.growth
    results = ledger.results.values()
    yield "submissions acknowledged, and not flushed", f"{len(ledger.acknowledged):,}"
    yield "their jobs", f"{sum(map(len, ledger.acknowledged.values())):,}"
    yield "acknowledged before a flushall, which took them", f"{ledger.num_flushed:,}"
    yield (
        "jobs of submissions that ended with an error",
        f"{len(ledger.unsure) - ledger.num_flushed:,}",
    )
    yield "jobs of submissions that were refused", f"{len(ledger.refused):,}"
    for state, number in sorted(Counter(result.status for result in results).items()):
        yield f"acknowledged jobs that ended {state}", f"{number:,}"
    poison = sum(r.status == "dead" and r.id.startswith("poison") for r in results)
    yield "of the dead, jobs that kill their worker each time", f"{poison:,}"
    yield "executions beyond the first", f"{sum(runs.values()) - len(runs):,}"
    yield "most executions of one job", f"{max(runs.values(), default=0)}"
    yield "workers that ended and were replaced", f"{soak.crew.num_replaced:,}"
    keys, memory, worker = growth.num_keys, growth.server_bytes, growth.worker_bytes
    num_jobs = sum(map(len, ledger.acknowledged.values())) + len(ledger.unsure)
    yield "keys at the end, per job sent", f"{keys[-1] / max(1, num_jobs):.2f}"
    yield "server memory at the start, at the end", f"{_mb(memory[0])}, {_mb(memory[-1])}"
    yield "server memory at the end, per job sent", f"{memory[-1] / max(1, num_jobs):,.0f} B"
    yield (
        "largest worker, first and last quarter",
        " and ".join(
            _mb(max(part))
            for part in (worker[: len(worker) // 4 + 1], worker[-(len(worker) // 4 + 1) :])
        ),
    )
    yield "violations", f"{len(soak.violations)}"


def _percentiles(seconds: list[float]) -> tuple[str, str, str]:
    if not seconds:
        return "-", "-", "-"
    p99 = statistics.quantiles(seconds, n=100)[98] if len(seconds) > 1 else seconds[0]
    return (
        f"{statistics.median(seconds):.2f}",
        f"{min(p99, max(seconds)):.2f}",
        f"{max(seconds):.2f}",
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
