"""Tables of adapters, and of what workers answer to commands about them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from producer.adapter_states import AdapterStatus
from producer.adapters import Answer
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
    """Where each adapter is, and below what each has done: side by side they need 150 columns."""
    if not found:
        return printed([f"Queue '{queue}' knows no adapter: producer lora load NAME PATH"])
    places = new_table("name", "source", "revision", "state", "waiting")
    for adapter in found:
        places.add_row(
            *cells(adapter.name, adapter.source, _short_revision(adapter)),
            _state(adapter),
            str(adapter.waiting),
        )
    return printed([places, "", _counts(found), *_errors(found)])


def _counts(found: Sequence[AdapterStatus]) -> Table:
    """What each adapter has done on the living workers."""
    table = new_table(
        *("name", "requests", "tokens", "loads", "s a load", "evictions"),
        *("slot loads", "slot evictions"),
    )
    for adapter in found:
        mean = adapter.mean_load_seconds
        table.add_row(
            *cells(adapter.name, adapter.requests, adapter.output_tokens, adapter.loads),
            *cells("" if mean is None else f"{mean:.3f}", adapter.evictions),
            *cells(adapter.slot_loads, adapter.slot_evictions),
        )
    return table


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
    parts = [f"{what} on {adapter.num_loaded} of {adapter.num_workers} workers{_where(adapter)}"]
    if adapter.pinned:
        is_held = adapter.num_pinned == adapter.num_workers
        by = "" if is_held else f" on {adapter.num_pinned} of {adapter.num_workers} workers"
        parts.append(f"pinned{by}")
    if adapter.unloading:
        parts.insert(0, f"unloading ({adapter.unloading})")
    state = cell(", ".join(parts))
    if adapter.errors:
        state.append(f", failed on {len(adapter.errors)}", "red")
    return state


def _where(adapter: AdapterStatus) -> str:
    """ " (1 in a slot, 2 in memory)": the nearest place of its weights on each worker."""
    in_slot = min(adapter.num_resident, adapter.num_loaded)
    in_memory = max(adapter.num_in_memory - in_slot, 0)
    numbers = {
        "in a slot": in_slot,
        "in memory": in_memory,
        "on disk": adapter.num_loaded - in_slot - in_memory,
    }
    places = [(place, number) for place, number in numbers.items() if number > 0]
    if len(places) == 1:
        return f" ({places[0][0]})"
    return f" ({', '.join(f'{number} {place}' for place, number in places)})" if places else ""


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
