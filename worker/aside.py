"""Jobs that wait for their adapter to be read, while those behind them go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Thread

import structlog

from broker.claims import Claim
from schemas.errors import JobError
from schemas.job import Job
from worker.adapters.peft_format import Adapter
from worker.adapters.readers import LATE_SECONDS, Readers
from worker.adapters.registry import KnownAdapter

log = structlog.get_logger()


class NotBegun(Exception):
    """An adapter's turn to be read has not come for long: others hold the threads that read."""


@dataclass(frozen=True)
class _Place:
    """An adapter where it is to be read from, and what has to be found there."""

    name: str
    known: KnownAdapter | None

    def __str__(self) -> str:
        return self.name


@dataclass
class _Group:
    """Jobs of one adapter, in the order of their claims."""

    read: Callable[[], Adapter | None]
    since: float
    claims: list[Claim] = field(default_factory=list)


class Aside:
    """Used by the thread that claims, and by the worker's own once that has ended."""

    def __init__(
        self,
        known: Callable[[str], KnownAdapter | None],
        is_loaded: Callable[[str], bool],
        adapter_of: Callable[[Job], Adapter | None],
        on_read: Callable[[], None],
    ) -> None:
        """``known`` tells what is served under a name, ``is_loaded`` whether that can be had
        without reading, ``adapter_of`` reads that of a job or raises JobError; ``on_read`` is
        called once there is something to take."""
        self._known = known
        self._is_loaded = is_loaded
        self._adapter_of = adapter_of
        self._readers: Readers[_Place, Adapter | None] = Readers(
            on_read, place_of=lambda place: (place.name, place.known and place.known.folder)
        )
        self._groups: dict[str, _Group] = {}

    @property
    def being_read(self) -> list[str]:
        """Adapters of which no more jobs should come for now."""
        # One may have been loaded from elsewhere, while its former source hangs.
        return [
            place.name
            for place in self._readers.keys
            if place == self._place_of(place.name) and not self._is_loaded(place.name)
        ]

    @property
    def threads(self) -> list[Thread]:
        return self._readers.threads

    def keeps(self, claim: Claim, job: Job) -> bool:
        """Whether a job waits here, since its adapter has to be read."""
        name = job.lora
        if name is None or (name not in self._groups and self._is_loaded(name)):
            return False
        read = partial(self._adapter_of, job)
        self._groups.setdefault(name, _Group(read, time.monotonic())).claims.append(claim)
        self._readers.want(self._place_of(name), read)
        return True

    def take(self) -> tuple[list[Claim], Adapter | Exception | None] | None:
        """Jobs of one adapter that has been read, and that, or why it could not be; None where it
        can be had in another way."""
        while read := self._readers.first():
            place, outcome = read
            self._readers.done()
            # What was read in a place that has been replaced is nothing to them.
            is_current = place == self._place_of(place.name)
            if is_current and (group := self._groups.pop(place.name, None)):
                return group.claims, outcome
        self._readers.drop(lambda place: place != self._place_of(place.name))
        for name, group in self._groups.items():
            if self._is_loaded(name):
                del self._groups[name]
                return group.claims, None
            self._readers.want(self._place_of(name), group.read)
        return self._take_late()

    def _take_late(self) -> tuple[list[Claim], Exception] | None:
        """Jobs that have waited for too long: another worker may be able to read their adapter."""
        late = time.monotonic() - LATE_SECONDS
        for name, group in self._groups.items():
            place = self._place_of(name)
            began = self._readers.began(place)
            if (began or group.since) >= late:
                continue
            del self._groups[name]
            log.warning("adapter_late", adapter=name, has_begun=began is not None)
            if began is None:
                self._readers.drop(lambda other, place=place: other == place)  # type: ignore[misc]
                return group.claims, NotBegun()
            reason = f"it was not read within {LATE_SECONDS:.0f} s: its source may hang"
            error = f"adapter '{name}': {reason}"
            return group.claims, JobError("adapter_unavailable", error, may_heal=True)
        return None

    def _place_of(self, name: str) -> _Place:
        known = self._known(name)
        # A load of the same files changes nothing but the version.
        return _Place(name, replace(known, version=0) if known else None)

    def give_up(self) -> list[Claim]:
        """All jobs that wait here, for which nothing is to be done any more."""
        claims = [claim for group in self._groups.values() for claim in group.claims]
        self._groups.clear()
        return claims
