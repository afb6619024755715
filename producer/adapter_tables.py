"""Tables of adapters, and of what workers answer to commands about them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from producer.adapters import AdapterStatus, Answer
from producer.advice import listed
from producer.hub import describe
from producer.messages import printable
from producer.tables import cell, cells, new_table, printed

#: Characters of a revision that a row shows.
SHORT_REVISION = 8


def answers(found: Sequence[Answer]) -> str:
    """One row a worker."""
    table = new_table("worker", "success", "error_message", "loaded_adapters")
    for answer in found:
        table.add_row(
            cell(answer.worker),
            Text("yes", style="green") if answer.success else Text("no", style="red"),
            cell(answer.error_message or ""),
            cell(listed(sorted(answer.loaded_adapters))),
        )
    return printed([table])


def adapters(queue: str, found: Sequence[AdapterStatus]) -> str:
    """One row an adapter."""
    if not found:
        return printed([f"Queue '{queue}' knows no adapter: producer lora load NAME PATH"])
    table = new_table(
        *("name", "source", "revision", "pinned", "state", "waiting", "requests", "tokens"),
        *("loads", "evictions", "s a load"),
    )
    for adapter in found:
        mean = adapter.mean_load_seconds
        table.add_row(
            *cells(adapter.name, adapter.source, _short_revision(adapter)),
            "yes" if adapter.pinned else "",
            _state(adapter),
            *cells(adapter.waiting, adapter.requests, adapter.output_tokens),
            *cells(adapter.loads, adapter.evictions, "" if mean is None else f"{mean:.3f}"),
        )
    return printed([table, *_errors(found)])


def _short_revision(adapter: AdapterStatus) -> str:
    """Of what is served."""
    return (adapter.revision or adapter.previous_revision or "")[:SHORT_REVISION]


def _state(adapter: AdapterStatus) -> Text:
    if adapter.fetch is None:
        return _served(adapter)
    style = "red" if adapter.fetch.state == "failed" else ""
    fetch = cell(f"from the hub: {describe(adapter.fetch)}")
    fetch.stylize(style)
    if adapter.source == adapter.fetch.source and not adapter.revision:
        return fetch  # Nothing of that name is desired yet.
    return _served(adapter).append("; ").append_text(fetch)


def _served(adapter: AdapterStatus) -> Text:
    what = "old revision loaded" if adapter.previous_revision else "loaded"
    parts = [f"{what} on {adapter.num_loaded} of {adapter.num_workers} workers"]
    if adapter.num_resident:
        parts.append(f"in a slot on {adapter.num_resident}")
    if adapter.pinned and adapter.num_pinned < adapter.num_workers:
        parts.append(f"pinned on {adapter.num_pinned} of {adapter.num_workers} workers")
    if adapter.unloading:
        parts.insert(0, f"unloading ({adapter.unloading})")
    state = cell(", ".join(parts))
    if adapter.errors:
        state.append(f", failed on {len(adapter.errors)}", "red")
    return state


def _errors(found: Sequence[AdapterStatus]) -> list[Text]:
    """Below the table, where they have the whole width: what failed, where, and the remedy."""
    lines = [
        Text(printable(f"{adapter.name} on {listed(workers)}: "), "red") + Text(printable(error))
        for adapter in found
        for error, workers in _workers_by_error(adapter).items()
    ]
    if not lines:
        return []
    hint = "`producer lora load NAME PATH` loads it again, `producer lora unload NAME` forgets it."
    return [Text(), *lines, Text(hint, "dim")]


def _workers_by_error(adapter: AdapterStatus) -> dict[str, list[str]]:
    by_error: dict[str, list[str]] = {}
    for worker, error in adapter.errors.items():
        by_error.setdefault(error, []).append(worker)
    return by_error
