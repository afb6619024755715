"""Adapters that are fetched from the hub before workers load them."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from broker.fetches import Fetches, FetchStatus
from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from producer.adapters import LOOK_SECONDS, Change, require_name, slots_to_keep
from producer.advice import no_fetcher
from schemas.errors import BadInput, LorryError, NoWorker
from schemas.hub import FETCH_BACKOFF, HUB_PREFIX, HubSource

#: Seconds for which a fetch is waited for though no fetcher is alive: one may just be starting, and
#: imports torch meanwhile.
_PATIENCE = 10.0

#: Told how far a fetch is, before every pause.
OnFetch = Callable[[FetchStatus], None]


def hub_source(text: str) -> HubSource | None:
    """The repository that a person means; None for a folder.

    A folder of that name on this machine wins; with ``hf:`` before it, it is the repository.
    """
    if text.startswith(HUB_PREFIX):
        if source := HubSource.parse(text):
            return source
        raise BadInput(f"'{text}' names no repository of the hub: write hf:OWNER/NAME[@REVISION].")
    return None if os.path.isdir(text) else HubSource.parse(text)


def request(
    queue: JobQueue,
    reader: QueueReader,
    fetches: Fetches,
    name: str,
    source: HubSource,
    *,
    pinned: bool,
) -> Change:
    """Let a fetcher fetch an adapter, and every worker load it then."""
    require_name(name)
    fetches.require_rq()
    new_id = f"fetch-{secrets.token_hex(8)}"
    with slots_to_keep(reader, name, pinned) as limit:
        id_ = queue.request_fetch(name, new_id, str(source), pinned=pinned, max_pinned=limit)
    fetches.enqueue(name, id_)
    return Change("load", name, 0, pinned, fetch=id_)


def wait_until_fetched(fetches: Fetches, change: Change, queue: str, on_fetch: OnFetch) -> Change:
    """Waits until the adapter has been fetched; returns the change that workers act on.

    Raises LorryError if it cannot be fetched or somebody has asked for something else under that
    name, and NoWorker if no fetcher is alive.
    """
    last_alive = time.monotonic()
    while True:
        status = fetches.status(change.name)
        if status is None or status.id != change.fetch:
            raise LorryError(
                f"'{change.name}' was loaded from elsewhere, or unloaded, while it was fetched."
            )
        if status.state == "failed":
            raise LorryError(f"'{change.name}' was not loaded: {status.reason}")
        if status.version is not None:
            return replace(change, version=status.version)
        if fetches.has_fetcher():
            last_alive = time.monotonic()
        elif time.monotonic() - last_alive > _PATIENCE:
            raise NoWorker(f"{no_fetcher(queue)} The request for '{change.name}' is kept.")
        on_fetch(status)
        time.sleep(LOOK_SECONDS)


def describe(status: FetchStatus) -> str:
    """How far a fetch is, in a few words."""
    if status.state == "downloading":
        done, total = status.done_bytes / 1e6, status.total_bytes / 1e6
        return f"downloading {done:.1f} of {total:.1f} MB" if total else "downloading"
    if status.state == "retrying":
        at = datetime.fromtimestamp(status.retry_at or 0).strftime("%H:%M:%S")
        tries = len(FETCH_BACKOFF) + 1
        return f"try {status.attempt} of {tries} at {at}: {status.reason}"
    return f"failed: {status.reason}" if status.state == "failed" else status.state
