"""A queue and its server as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from broker import server_settings
from producer import advice, pausing
from producer.client.session import Session
from producer.status import Overview, read_overview
from schemas.keys import BASE


class QueueState(Session):
    """Reads them, and says what is amiss."""

    def overview(self) -> Overview:
        """The queue at this moment."""
        with self._errors():
            self._tidy()
            return read_overview(self._reader)

    def base_model(self) -> str:
        """What the worker that joined last calls its base model, without the folder or owner before
        it; "@base" if none ever has."""
        with self._errors():
            return Path(self._reader.model() or BASE).name

    def warnings(self, adapters: Iterable[str | None] | None = None) -> list[str]:
        """Why jobs of the adapters may have to wait, in sentences: a pause, no worker, or none that
        serves one of them, and why not. None is the base model. Left out, they are those of the
        waiting jobs."""
        with self._errors():
            if adapters is None:
                waiting = self._reader.num_waiting_by_adapter()
                adapters = [None if name == BASE else name for name in waiting]
            names = list(adapters)
            paused = pausing.of_adapters(self._reader.paused(), names)
            return [
                *pausing.sentences(self.queue, paused),
                *advice.warnings(self._reader, names),
            ]

    def server_warnings(self) -> list[str]:
        """By which settings the server may lose jobs, in sentences that say what to set."""
        with self._errors():
            return server_settings.warnings(server_settings.read_settings(self._job_queue.client))
