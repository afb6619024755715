"""The adapters that workers shall serve, and what they have made of that."""

from __future__ import annotations

from itertools import chain
from typing import Any

from broker.records import read_adapters, read_version
from broker.scripts import QueueScripts
from schemas.adapter import AdapterRecord, Unloading

#: How many jobs of an adapter that is unloaded by force one script fails.
RETIRE_LIMIT = 500


class DesiredState(QueueScripts):
    """The desired state of one queue, which commands change and workers follow."""

    def desired_state(self) -> tuple[int, dict[str, AdapterRecord]]:
        """The version of the desired state, 0 if nobody has ever written it, and its adapters.

        Raises LorryError if a record is damaged.
        """
        with self.client.pipeline(transaction=True) as pipeline:
            pipeline.get(self.keys.adapters_version)
            pipeline.hgetall(self.keys.adapters)
            version, records = pipeline.execute()
        return read_version(version), read_adapters(records)

    def desired_version(self) -> int:
        """The version of the desired state, 0 if nobody has ever written it.

        Raises LorryError if it is damaged.
        """
        version: Any = self.client.get(self.keys.adapters_version)
        return read_version(version)

    def announce(self, adapters: dict[str, AdapterRecord]) -> int:
        """Add the adapters that a worker was started with to the desired state, where that does
        not name another source for them already; returns its version."""
        fields = chain.from_iterable(
            (name, record.model_dump_json()) for name, record in adapters.items()
        )
        return int(self._run("announce", *fields))

    def set_adapter(
        self, name: str, source: str, *, pinned: bool, max_pinned: int | None = None
    ) -> int:
        """Let every worker load an adapter, in place of one of that name if there is one, whose pin
        stays; returns the version of the desired state.

        Raises TooManyPinned if ``max_pinned`` others are pinned, and it is to be.
        """
        version = self._run_pinning("set_adapter", name, source, int(pinned), max_pinned=max_pinned)
        return int(version)

    def pin_adapter(self, name: str, pinned: bool, *, max_pinned: int | None = None) -> int | None:
        """Let an adapter keep a slot on every worker, or no longer; returns the version of the
        desired state, None if the name is unknown.

        Raises TooManyPinned if ``max_pinned`` others are pinned.
        """
        version: int | None = self._run_pinning(
            "change_adapter", name, "pin" if pinned else "unpin", max_pinned=max_pinned
        )
        return version

    def unload_adapter(self, name: str, how: Unloading) -> int | None:
        """Take an adapter off all workers, once its waiting jobs are finished ("drain") or failed
        ("force"); returns the version of the desired state, None if the name is unknown."""
        version: int | None = self._run("change_adapter", name, how)
        return version

    def adopt_revision(self, name: str, version: int, revision: str) -> str | None:
        """Say what was read of an adapter whose record has this version; returns the revision on
        record, which is that of the first who said so, or None if the name is gone or was loaded
        again."""
        adopted = self._run("adopt_revision", name, version, revision)
        return None if adopted is None else str(adopted)

    def retire_adapter(self, name: str) -> bool:
        """Take an adapter that is unloading off the desired state if no job of it is left, and let
        up to ``RETIRE_LIMIT`` of its waiting jobs fail before if that is by force.

        True once it is off. To be repeated until then; safe to repeat at any time.
        """
        return bool(self._run("retire_adapter", name, RETIRE_LIMIT))
