"""Which server a process uses: the one that was named, or the embedded one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from broker.address import parse_address, resolve_url, without_password
from broker.connection import connect, server_errors
from broker.embedded import EmbeddedServer
from broker.server_settings import ServerSettings, read_settings, require_fitting_mode


@dataclass(frozen=True)
class Server:
    """A server, and how to speak of it to a person."""

    url: str
    description: str

    def settings(self) -> ServerSettings:
        """What the server says of itself; of a cluster, one of its nodes.

        Raises what the driver raises if it does not answer, and ServerUnavailable if it is another
        kind of server than the URL says.
        """
        with connect(self.url) as client:
            client.ping()  # Everybody may, and a login that is refused is told as such.
            settings = read_settings(client)
        is_cluster = parse_address(self.url).kind == "cluster"
        require_fitting_mode(settings, without_password(self.url), is_cluster=is_cluster)
        return settings


@contextmanager
def find_server(url: str | None, password_file: Path | None = None) -> Iterator[Server]:
    """The server at ``url`` or ``REDIS_URL``, which need not answer; with neither, the embedded
    one while in use.

    ``password_file`` holds the password that does not stand in the URL. Raises BadInput if it
    cannot be read, and for what is no URL.
    """
    url = resolve_url(url, password_file)
    if url is None:
        with EmbeddedServer() as embedded:
            found = "started now" if embedded.started_here else "found running"
            yield Server(embedded.url, f"the embedded server, {found}; data in {embedded.folder}")
        return
    yield Server(url, f"the server at {without_password(url)}")


@contextmanager
def use_server(url: str | None, password_file: Path | None = None) -> Iterator[Server]:
    """``find_server``; raises ServerUnavailable if it does not answer."""
    with find_server(url, password_file) as server:
        with server_errors(server.url):
            server.settings()
        yield server
