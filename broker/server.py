"""Which server a process uses: the one that was named, or the embedded one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from broker.connection import connect, server_errors, url_from_environment, without_password
from broker.embedded import EmbeddedServer


@dataclass(frozen=True)
class Server:
    """A server that answers, and how to speak of it to a person."""

    url: str
    description: str


@contextmanager
def use_server(url: str | None) -> Iterator[Server]:
    """The server at ``url`` or ``REDIS_URL``; with neither, the embedded one while in use.

    Raises ServerUnavailable if it does not answer.
    """
    url = url or url_from_environment()
    if url is None:
        with EmbeddedServer() as embedded:
            found = "started now" if embedded.started_here else "found running"
            yield Server(embedded.url, f"the embedded server, {found}; data in {embedded.folder}")
        return
    with server_errors(url), connect(url) as client:
        client.ping()
    yield Server(url, f"the server at {without_password(url)}")
