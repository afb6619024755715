"""Pools of connections: to one server, to whichever the Sentinels name, or into a cluster.

All keys of a queue share one slot of a Redis Cluster, so one of its nodes holds the whole queue,
and a plain client that is connected to that node is all that is needed.
"""

from __future__ import annotations

from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import (
    Connection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.crc import key_slot
from redis.exceptions import AskError
from redis.retry import Retry
from redis.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)

from broker.address import Address
from schemas.keys import Keys

#: Seconds that a Sentinel or a node of a cluster has to say where the server is; then the next one
#: is asked.
_ASK_SECONDS = 1.0


def connection_pool(address: Address, queue: str, settings: dict[str, Any]) -> ConnectionPool:
    """A pool that connects to where ``queue`` is; ``settings`` are those of its connections."""
    login = {"username": address.username, "password": address.password}
    settings = {**settings, **login, "db": address.database}
    if address.kind == "socket":
        return _pool(UnixDomainSocketConnection, path=address.path, **settings)
    settings.update(address.tls or {}, socket_keepalive=True)
    is_plain = address.tls is None
    if address.kind == "server":
        ((host, port),) = address.nodes
        connection = Connection if is_plain else SSLConnection
        return _pool(connection, host=host, port=port, **settings)
    asking = settings | {
        "ssl": not is_plain,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": _ASK_SECONDS,
        "socket_connect_timeout": _ASK_SECONDS,
    }
    if address.kind == "cluster":
        slot = key_slot(Keys(queue).prefix.encode())
        owner = SlotOwner(address.nodes, slot, asking)
        return _pool(
            ClusterConnection if is_plain else ClusterSSLConnection, owner=owner, **settings
        )
    no_login: dict[str, Any] = {"username": None, "password": None, "db": 0}
    return SentinelConnectionPool(
        address.service,
        Sentinel(address.nodes, sentinel_kwargs={**asking, **no_login, **address.sentinel_login}),
        connection_class=SentinelManagedConnection if is_plain else SentinelManagedSSLConnection,
        **settings,
    )


def is_in_cluster(client: redis.Redis) -> bool:
    """Whether only the keys of one queue can be reached over this client's connections."""
    return issubclass(client.connection_pool.connection_class, ClusterConnection)


def _pool(
    connection: type[Connection | UnixDomainSocketConnection], **settings: Any
) -> ConnectionPool:
    return ConnectionPool(connection_class=connection, **settings)


class SlotOwner:
    """Finds the node of a Redis Cluster that holds one slot."""

    def __init__(
        self, nodes: tuple[tuple[str, int], ...], slot: int, settings: dict[str, Any]
    ) -> None:
        self._nodes = nodes
        self._slot = slot
        self._settings = settings
        self._last_found: tuple[str, int] | None = None

    def find(self) -> tuple[str, int]:
        """Ask the nodes, one after another; raises redis.ConnectionError if none answers."""
        # The node found last knows of the cluster as it is now, should the others have left it.
        last = (self._last_found,) if self._last_found else ()
        problem: Exception | None = None
        for host, port in (*self._nodes, *last):
            try:
                with redis.Redis(host=host, port=port, **self._settings) as node:
                    ranges: Any = node.execute_command("CLUSTER SLOTS")
            except (redis.ConnectionError, redis.TimeoutError) as error:
                problem = error
                continue
            for first, last_one, (owner, owner_port, *_), *_ in ranges:
                if first <= self._slot <= last_one:
                    # A node that does not know its own address leaves it empty.
                    self._last_found = (owner or host, owner_port)
                    return self._last_found
            problem = redis.ConnectionError(f"No node of the cluster holds slot {self._slot}")
        assert problem
        raise problem


class ClusterConnection(Connection):
    """A connection to the node that holds the queue's slot when it is made."""

    def __init__(self, *, owner: SlotOwner, **settings: Any) -> None:
        self._owner = owner
        super().__init__(**settings)  # type: ignore[no-untyped-call]

    def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_connected:
            self.host, self.port = self._owner.find()
        super().connect_check_health(*args, **kwargs)

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except (AskError, redis.ReadOnlyError) as error:  # A MovedError is an AskError.
            # What is tried next is sent over a new connection, and so to the new owner.
            self.disconnect()  # type: ignore[no-untyped-call]
            raise redis.ConnectionError("The queue has moved to another node") from error


class ClusterSSLConnection(ClusterConnection, SSLConnection):
    """The same, encrypted."""
