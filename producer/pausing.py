"""Queues and adapters of which nothing new is claimed for a while."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from producer import adapters
from producer.advice import listed
from schemas.keys import BASE, WHOLE_QUEUE


def pause(queue: JobQueue, reader: QueueReader, adapter: str | None) -> bool:
    """Pause an adapter, or the queue; False if it was paused already. Raises BadInput for what
    cannot be a name, and UnknownId for an adapter that the queue does not know."""
    if adapter is not None and adapter != BASE:
        adapters.require_name(adapter)
        is_known = reader.adapter(adapter) or not reader.has_desired_state()
        if not is_known:
            raise adapters.unknown(reader, adapter)
    return queue.pause(adapter)


def sentences(queue: str, paused: Iterable[str]) -> list[str]:
    """Why jobs wait, if it is for a pause, and what to do."""
    names = sorted(paused)
    if WHOLE_QUEUE in names:
        return [
            f"Queue '{queue}' is paused: workers finish what runs and claim nothing new until"
            " `producer resume`."
        ]
    if not names:
        return []
    shown = listed(["the base model (@base)" if name == BASE else name for name in names])
    return [f"Paused, so that jobs wait until `producer resume NAME`: {shown}."]


def of_adapters(paused: Mapping[str, float], names: Iterable[str | None]) -> list[str]:
    """What of the paused things concerns jobs of these adapters; None is the base model."""
    return [name for name in {WHOLE_QUEUE, *(name or BASE for name in names)} if name in paused]
