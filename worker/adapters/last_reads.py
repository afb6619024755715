"""Which batch was the last to read each part of the slots."""

from __future__ import annotations

from typing import Generic, TypeVar

Event = TypeVar("Event")


class LastReads(Generic[Event]):
    """An event for each ``grain`` ranks: the end of the last batch that reads them.

    A load waits for those of the ranks that it overwrites, and for no other batch.
    """

    def __init__(self, capacity: int, grain: int) -> None:
        self._grain = grain
        self._events: list[Event | None] = [None] * -(-capacity // grain)

    def note(self, first: int, size: int, event: Event) -> None:
        """A batch whose end ``event`` marks reads ``size`` ranks from ``first`` on."""
        for place in self._places(first, size):
            self._events[place] = event

    def of(self, first: int, size: int) -> set[Event]:
        """The ends of the batches that may still read these ranks."""
        return {event for place in self._places(first, size) if (event := self._events[place])}

    def _places(self, first: int, size: int) -> range:
        return range(first // self._grain, -(-(first + size) // self._grain))
