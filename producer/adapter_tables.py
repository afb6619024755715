"""Tables of adapters, and of what workers answer to commands about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.text import Text

from producer.adapters import AdapterStatus, Answer
from producer.advice import listed
from producer.hub import describe
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
            *cells(adapter.name, adapter.source, (adapter.revision or "")[:SHORT_REVISION]),
            "yes" if adapter.pinned else "",
            _state(adapter),
            *cells(adapter.waiting, adapter.requests, adapter.output_tokens),
            *cells(adapter.loads, adapter.evictions, "" if mean is None else f"{mean:.3f}"),
        )
    return printed([table])


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
    parts = [f"loaded on {adapter.num_loaded} of {adapter.num_workers} workers"]
    if adapter.num_resident:
        parts.append(f"in a slot on {adapter.num_resident}")
    if adapter.unloading:
        parts.insert(0, f"unloading ({adapter.unloading})")
    state = cell(", ".join(parts))
    for error, number in Counter(adapter.errors.values()).items():
        state.append("; error: ", "red")
        state.append_text(cell(f"{error} (on {number})"))
    return state
