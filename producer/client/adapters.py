"""Adapters, while workers run."""

from __future__ import annotations

from pathlib import Path

from broker.fetches import FetchStatus
from producer import adapter_states, adapters, hub
from producer.adapter_states import AdapterStatus
from producer.adapters import Answer, Change, OnPause
from producer.client.session import Session
from producer.hub import OnFetch


class Adapters(Session):
    """Loads, unloads and pins them, and says what workers made of it."""

    def load_adapter(self, name: str, source: Path | str, *, pinned: bool = False) -> Change:
        """Let every worker load an adapter, in place of one of that name: jobs that run go on with
        the old one. Returns at once; ``answers`` waits for the workers.

        ``source`` is a folder as the workers see it; a relative one counts from the current folder
        of this process. Or it is a text like ``owner/name[@revision]``, if there is no such folder:
        a repository of the hub, which a fetcher fetches first (``hf:owner/name`` in any case). A
        ``pinned`` adapter keeps a slot; without it the name stays pinned or unpinned as it is.
        Raises BadInput for what cannot be a name or a source, and for more pinned adapters than a
        worker can keep.
        """
        repository = hub.hub_source(source) if isinstance(source, str) else None
        with self._errors():
            queue, reader = self._job_queue, self._reader
            if repository:
                return hub.request(queue, reader, self._fetches, name, repository, pinned=pinned)
            return adapters.load(queue, reader, name, source, pinned=pinned)

    def unload_adapter(self, name: str, *, force: bool = False) -> Change:
        """Take an adapter off all workers once its waiting jobs are finished, or, by force, failed;
        it gets no new ones. Returns at once, with the waiting jobs failed if that was by force.
        Raises UnknownId."""
        with self._errors():
            return adapters.unload(self._job_queue, self._reader, name, force=force)

    def pin_adapter(self, name: str) -> Change:
        """Let an adapter keep a slot on every worker. Returns at once.

        Raises UnknownId, and BadInput if a worker keeps as many as it can already.
        """
        with self._errors():
            return adapters.pin(self._job_queue, self._reader, name)

    def unpin_adapter(self, name: str) -> Change:
        """Let an adapter give up its slot like any other. Returns at once. Raises UnknownId."""
        with self._errors():
            return adapters.unpin(self._job_queue, self._reader, name)

    def fetched(self, change: Change, on_fetch: OnFetch | None = None) -> Change:
        """The change that workers act on, once the adapter has been fetched if it comes from the
        hub.

        Waits as long as a fetcher is alive; its tries are bounded. Raises LorryError if it cannot
        be fetched or the request was called off, and NoWorker if no fetcher is alive.
        """
        if change.fetch is None or change.version:
            return change
        with self._errors():
            return hub.wait_until_fetched(
                self._fetches, change, self.queue, on_fetch or _ignore_fetch
            )

    def has_fetcher(self) -> bool:
        """Whether a fetcher is alive, which brings adapters from the hub."""
        with self._errors():
            return self._fetches.has_fetcher()

    def answers(
        self, change: Change, timeout: float | None = None, on_pause: OnPause | None = None
    ) -> list[Answer]:
        """What every living worker made of a change of the adapters, once all have acted on it.

        One that has not within ``timeout`` seconds answers that. Left out, these are 60, and an
        adapter that is unloaded may take as long as its jobs do. No worker is alive if there are
        no answers. An adapter from the hub is waited for first, as ``fetched`` does. ``on_pause``
        is told how many of its jobs are left, and whether they are paused.
        """
        change = self.fetched(change)
        with self._errors():
            return adapters.answers(
                self._reader, change, timeout=timeout, on_pause=on_pause or _ignore
            )

    def adapters(self) -> list[AdapterStatus]:
        """Every adapter that the queue knows or fetches, by name, and how the living workers serve
        it."""
        with self._errors():
            return adapter_states.read_statuses(self._reader, self._fetches)


def _ignore(number: int, obstacle: str) -> None:
    pass


def _ignore_fetch(status: FetchStatus) -> None:
    pass
