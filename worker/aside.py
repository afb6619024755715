"""Jobs that wait for their adapter to be read, while those behind them go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from threading import Thread

import structlog

from broker.claims import Claim
from schemas.errors import JobError
from schemas.job import Job
from worker.adapters.peft_format import Adapter
from worker.adapters.readers import LATE_SECONDS, Readers

log = structlog.get_logger()


@dataclass
class _Group:
    """Jobs of one adapter, in the order of their claims."""

    since: float
    claims: list[Claim] = field(default_factory=list)


class Aside:
    """Used by the thread that claims, and by the worker's own once that has ended."""

    def __init__(
        self,
        is_loaded: Callable[[str], bool],
        adapter_of: Callable[[Job], Adapter | None],
        on_read: Callable[[], None],
    ) -> None:
        """``is_loaded`` tells whether an adapter can be had without reading, ``adapter_of`` reads
        that of a job or raises JobError; ``on_read`` is called once there is something to take."""
        self._is_loaded = is_loaded
        self._adapter_of = adapter_of
        self._readers: Readers[str, Adapter | None] = Readers(on_read)
        self._groups: dict[str, _Group] = {}

    @property
    def being_read(self) -> list[str]:
        """Adapters of which no more jobs should come for now."""
        # One may have been loaded from elsewhere, while its former source hangs.
        return [name for name in self._readers.keys if not self._is_loaded(name)]

    @property
    def threads(self) -> list[Thread]:
        return self._readers.threads

    def keeps(self, claim: Claim, job: Job) -> bool:
        """Whether a job waits here, since its adapter has to be read."""
        name = job.lora
        if name is None or (name not in self._groups and self._is_loaded(name)):
            return False
        self._groups.setdefault(name, _Group(time.monotonic())).claims.append(claim)
        self._readers.want(name, partial(self._adapter_of, job))
        return True

    def take(self) -> tuple[list[Claim], Adapter | Exception | None] | None:
        """Jobs of one adapter that has been read, and that, or why it could not be; None where it
        can be had in another way."""
        while read := self._readers.first():
            name, outcome = read
            self._readers.done()
            if group := self._groups.pop(name, None):
                return group.claims, outcome
        for name in self._groups:
            if self._is_loaded(name):
                return self._groups.pop(name).claims, None
        return self._take_late()

    def _take_late(self) -> tuple[list[Claim], JobError] | None:
        """Jobs that have waited for too long: another worker may be able to read their adapter."""
        late = time.monotonic() - LATE_SECONDS
        for name, group in self._groups.items():
            if group.since < late:
                del self._groups[name]
                reason = f"it was not read within {LATE_SECONDS:.0f} s: its source may hang"
                log.warning("adapter_late", adapter=name, reason=reason)
                error = f"adapter '{name}': {reason}"
                return group.claims, JobError("adapter_unavailable", error, may_heal=True)
        return None

    def give_up(self) -> list[Claim]:
        """All jobs that wait here, for which nothing is to be done any more."""
        claims = [claim for group in self._groups.values() for claim in group.claims]
        self._groups.clear()
        return claims
