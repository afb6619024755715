"""Queues of rq, on a server that Lorry uses too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import redis

from broker.connection import undecoded
from broker.pools import is_in_cluster
from schemas.errors import ServerUnavailable

if TYPE_CHECKING:
    from rq import Queue


def require_rq(client: redis.Redis, what: str, remedy: str) -> None:
    """Raises ServerUnavailable if rq, which ``what`` needs, cannot use this server."""
    if is_in_cluster(client):
        raise ServerUnavailable(
            f"{what} needs rq, whose keys do not fit into one slot of a Redis Cluster. Use a single"
            f" server or Sentinels; or {remedy}."
        )


def open_rq_queue(client: redis.Redis, name: str) -> Queue:
    """The rq queue, on a connection of its own: rq wants replies as bytes."""
    # Only now: reading needs rq's key names alone.
    from rq import Queue
    from rq.serializers import JSONSerializer

    return Queue(name, connection=undecoded(client), serializer=JSONSerializer)
