"""The Lua scripts that change a queue: their texts, and what calls them by name."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import redis
from redis.commands.core import Script

from schemas import WIRE_VERSION
from schemas.errors import TooManyPinned
from schemas.job import PRIORITIES, Job
from schemas.keys import BASE, DEFAULT_MAX_ATTEMPTS, GROUP, KEY_NAMES, Keys

_FOLDER = files("broker") / "lua"

#: What all scripts share.
_COMMON = "common"


class QueueScripts:
    """The scripts of one queue on one server, under the operations that its subclasses name.

    Times go in and come out in seconds; Redis holds them in milliseconds by its own clock.
    """

    def __init__(self, client: redis.Redis, queue: str) -> None:
        self.client = client
        self.name = queue
        self.keys = Keys(queue)
        names = sorted(path.name.removesuffix(".lua") for path in _FOLDER.iterdir())
        self._scripts = {name: load_script(client, name) for name in names if name != _COMMON}

    def _run(self, script: str, *args: Any) -> Any:
        return self._scripts[script](keys=[self.keys.prefix], args=args)

    def _run_pinning(self, script: str, name: str, *args: Any, max_pinned: int | None) -> Any:
        """Run a script that may pin an adapter; raises TooManyPinned if as many are as may be."""
        reply = self._run(script, name, *args, "" if max_pinned is None else max_pinned)
        if isinstance(reply, list):
            raise TooManyPinned(name, reply)
        return reply


def load_script(client: redis.Redis, name: str) -> Script:
    """The script, which redis-py names by its hash; it sends the text once where the server does
    not know it."""
    return client.register_script(script_text(name))


def script_text(name: str) -> str:
    """The script ``lua/<name>.lua`` behind the key names and the functions that all share."""
    names = [f"local {name} = KEYS[1] .. '{suffix}'" for name, suffix in KEY_NAMES.items()]
    constants = [
        f"local GROUP = '{GROUP}'",
        f"local BASE = '{BASE}'",
        f"local PRIORITIES = {{ {', '.join(repr(name) for name in PRIORITIES)} }}",
        f"local WIRE_VERSION = {WIRE_VERSION}",
        f"local DEFAULT_PRIORITY = '{Job.model_fields['priority'].default}'",
        f"local DEFAULT_MAX_ATTEMPTS = {DEFAULT_MAX_ATTEMPTS}",
    ]
    texts = [(_FOLDER / f"{part}.lua").read_text("utf-8") for part in (_COMMON, name)]
    return "\n".join([*names, *constants, *texts])
