"""Requests to fetch adapters from the hub: made, fulfilled and given up."""

from __future__ import annotations

from broker.scripts import QueueScripts


class FetchRequests(QueueScripts):
    """Those of one queue; ``broker.fetches`` tells what became of them."""

    def request_fetch(
        self, name: str, id_: str, source: str, *, pinned: bool, max_pinned: int | None = None
    ) -> str:
        """Ask for an adapter to be fetched from the hub and then loaded; ``id_`` is new. What is
        pinned under the name stays so. Returns the id of the request: that of one for the same
        source that is not over yet, else ``id_``.

        Raises TooManyPinned if ``max_pinned`` others are pinned, and it is to be.
        """
        args = (name, id_, source, int(pinned))
        return str(self._run_pinning("request_fetch", *args, max_pinned=max_pinned))

    def publish_fetch(self, name: str, id_: str, source: str, revision: str) -> int | None:
        """Load an adapter that was fetched; returns the version of the desired state, None if the
        request was called off."""
        version: int | None = self._run("publish_fetch", name, id_, source, revision)
        return version

    def fail_fetch(self, name: str, id_: str, reason: str) -> bool:
        """Give a fetch up; False if its request was called off, or is over."""
        return bool(self._run("fail_fetch", name, id_, reason))

    def begin_fetch(self, *, seconds_apart: float) -> bool:
        """Whether a fetch of this queue may begin now, ``seconds_apart`` after the last one."""
        taken = self.client.set(self.keys.fetch_turn, 1, nx=True, px=round(seconds_apart * 1000))
        return bool(taken)
