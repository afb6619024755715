"""The sequences that wait to run, by adapter."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from worker.adapters.peft_format import Adapter
from worker.sequence import Sequence


@dataclass(eq=False)
class Group:
    """What waits for one adapter, or for the base model, in the order of arrival."""

    adapter: Adapter | None
    unserved_since: float
    """When its first sequence came, or, if later, when one of it last began; on the scheduler's
    clock. The scores of the queue's READY set mean the same."""
    sequences: deque[Sequence] = field(default_factory=deque)


class Waiting:
    """Preempted sequences, the next to run first, and groups of those that never ran.

    The groups stand in the order in which they were last served, longest ago first.
    """

    def __init__(self) -> None:
        self.preempted: deque[Sequence] = deque()
        self._groups: dict[Adapter | None, Group] = {}

    def __len__(self) -> int:
        return len(self.preempted) + sum(len(group.sequences) for group in self.groups)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self.preempted, *(group.sequences for group in self.groups))

    @property
    def groups(self) -> list[Group]:
        """Those that hold a sequence."""
        # Other threads count what waits, while the engine's changes it: a copy is made in one step.
        return list(self._groups.values())

    @property
    def fullest(self) -> Group | None:
        """The group with the most sequences; of several, the one longest unserved."""
        return max(self.groups, key=lambda group: len(group.sequences), default=None)

    def add(self, sequence: Sequence, now: float) -> None:
        """Take in a sequence that never ran."""
        group = self._groups.get(sequence.adapter)
        if group is None:
            group = self._groups[sequence.adapter] = Group(sequence.adapter, now)
        group.sequences.append(sequence)

    def take_first(self, group: Group, now: float) -> Sequence:
        """Take out a group's first sequence; the group is the last one served."""
        sequence = group.sequences.popleft()
        group.unserved_since = now
        del self._groups[group.adapter]
        if group.sequences:
            self._groups[group.adapter] = group
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that will not run."""
        if sequence in self.preempted:
            self.preempted.remove(sequence)
            return
        group = self._groups[sequence.adapter]
        group.sequences.remove(sequence)
        if not group.sequences:
            del self._groups[sequence.adapter]
