"""Who uses the queue during a soak: a sender of jobs, and an operator who gives commands."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

import redis

from benchmarks.ledger import Ledger
from benchmarks.soak.plan import COMMANDED, Command
from producer.client import Client
from schemas.errors import LorryError, ServerUnavailable, UnknownId

T = TypeVar("T")

#: Seconds after which the operator gives a command again that the server did not take.
REPEAT_AFTER = 0.2


class Person(threading.Thread, Generic[T]):
    """Does one thing after the other, while others go on."""

    def __init__(self, name: str, do: Callable[[T], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._do = do
        self._asked: SimpleQueue[T | None] = SimpleQueue()
        self.failure: Exception | None = None
        self.start()

    def ask(self, what: T) -> None:
        self._asked.put(what)

    def finish(self) -> None:
        """Nothing more will be asked for; the thread ends behind what was."""
        self._asked.put(None)

    def run(self) -> None:
        try:
            while (what := self._asked.get()) is not None:
                self._do(what)
        except Exception as error:
            self.failure = error


class Operator:
    """Gives commands, each until the server takes it or says why not."""

    def __init__(self, ledger: Ledger, client: Client, server: redis.Redis) -> None:
        self._ledger = ledger
        self._client = client
        self._server = server
        self.given: Counter[str] = Counter()
        """Commands by kind."""
        self.refused: Counter[str] = Counter()
        """Those of them that named what is not there, or were one pin too many."""

    def obey(self, command: Command) -> None:
        """Give one command; all of them may be repeated."""
        self.given[command.kind] += 1
        while True:
            try:
                self._give(command)
            except (ServerUnavailable, redis.RedisError):
                time.sleep(REPEAT_AFTER)
            except LorryError:
                self.refused[command.kind] += 1
                return
            else:
                return

    def _give(self, command: Command) -> None:
        client, name = self._client, command.adapter or ""
        match command.kind:
            case "cancel jobs":
                self._ledger.cancel(client, *command.job_ids)
            case "cancel submission":
                self._ledger.cancel(client, self._submission_of(command))
            case "read results":
                self._ledger.note(client.results(*command.job_ids))
            case "pause":
                self._pause(command.adapter)
            case "resume":
                self._ledger.resume(client, self._server, command.adapter)
            case "load":
                client.load_adapter(name, command.source, pinned=command.is_pinned)
            case "unload --drain" | "unload --force":
                client.unload_adapter(name, force=command.kind.endswith("force"))
            case "pin":
                client.pin_adapter(name)
            case "unpin":
                client.unpin_adapter(name)

    def _pause(self, adapter: str | None) -> None:
        if adapter in COMMANDED:  # An unload ends the pause, at a moment that nobody is told.
            self._client.pause(adapter)
        else:
            self._ledger.pause(self._client, self._server, adapter)

    def _submission_of(self, command: Command) -> str:
        """Raises UnknownId while its sender does not know it either."""
        first = command.job_ids[0]
        for submission, ids in reversed(list(self._ledger.acknowledged.items())):
            if ids[0] == first:
                return submission
        raise UnknownId(f"Nobody was told of the submission of {first}.")
