"""Which queue on which server a command is about."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from broker.address import has_password, without_password
from broker.interrupts import tidy_up_first
from producer.client import Client
from producer.messages import notice, warn


@dataclass(frozen=True)
class Place:
    """A queue and a server, as the command line names them."""

    redis_url: str | None
    queue: str
    redis_password_file: Path | None = None

    @contextmanager
    def client(self) -> Iterator[Client]:
        if has_password(self.redis_url):
            warn(
                "Every user of this machine can see the password in --redis-url, by ps."
                " REDIS_URL, REDIS_PASSWORD and --redis-password-file keep it to yourself."
            )
        # A client may start the embedded server, which must not outlive its last user.
        tidy_up_first()
        with Client(self.redis_url, self.queue, self.redis_password_file) as client:
            notice(f"Using {client.server}")
            yield client

    def command(self, text: str) -> str:
        """A command to type next, for the same place."""
        queue = f" --queue {self.queue}" if self.queue != "lorry" else ""
        url = ""
        if self.redis_url:
            is_public = without_password(self.redis_url) == self.redis_url
            url = f" --redis-url {self.redis_url if is_public else 'URL'}"
        file = self.redis_password_file
        password = f" --redis-password-file {shlex.quote(str(file))}" if file else ""
        return f"`producer {text}{queue}{url}{password}`"
