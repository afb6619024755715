"""The bad lines of one input, told together."""

from __future__ import annotations

import heapq

from schemas.errors import BadInput

#: Bad lines that are told in full; the rest is counted.
MAX_TOLD = 20


class Problems:
    """The first bad lines of the input called ``name``, and how many there are."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        # A heap of (-line, message): its first entry is the last line, the one to give up.
        self._told: list[tuple[int, str]] = []

    def add(self, line: int, message: str) -> None:
        """Note what is wrong in a line; each line is noted once, in any order."""
        self.count += 1
        heapq.heappush(self._told, (-line, message))
        if len(self._told) > MAX_TOLD:
            heapq.heappop(self._told)

    def raise_if_any(self, remark: str = "") -> None:
        """Raises BadInput with the bad lines in order, and the remark after them."""
        if self.count:
            raise BadInput(self.describe("nothing was sent", remark))

    def describe(self, what_now: str, remark: str = "") -> str:
        """How many there are and what is done now, the bad lines in order, and the remark."""
        lines = "1 bad line" if self.count == 1 else f"{self.count} bad lines"
        told = [f"{self.name}:{-line}: {message}" for line, message in sorted(self._told)[::-1]]
        if self.count > len(told):
            told.append(f"... and {self.count - len(told)} more")
        if remark:
            told.append(remark)
        return "\n".join([f"{lines} in {self.name}; {what_now}.", *told])
