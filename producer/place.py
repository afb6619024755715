"""Which queue on which server a command is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from broker.connection import without_password
from producer.client import Client
from producer.messages import notice


@dataclass(frozen=True)
class Place:
    """A queue and a server, as the command line names them."""

    redis_url: str | None
    queue: str

    @contextmanager
    def client(self) -> Iterator[Client]:
        with Client(self.redis_url, self.queue) as client:
            notice(f"Using {client.server}")
            yield client

    def command(self, text: str) -> str:
        """A command to type next, for the same place."""
        queue = f" --queue {self.queue}" if self.queue != "lorry" else ""
        url = ""
        if self.redis_url:
            is_public = without_password(self.redis_url) == self.redis_url
            url = f" --redis-url {self.redis_url if is_public else 'URL'}"
        return f"`producer {text}{queue}{url}`"
