"""What may be said of a whole submission."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict

from schemas.job import Deadline, Priority

#: What to do when a queue has no room for more waiting jobs.
WhenFull = Literal["wait", "refuse"]


class Terms(TypedDict, total=False):
    """Any of these; what a line says of itself wins."""

    lora: str | None
    """Adapter of the jobs that name none; left out or None, the base model."""
    priority: Priority
    """"high", "normal" (if left out) or "low"."""
    deadline: Deadline
    """Until when they must have begun: seconds from when they are sent, or a moment in ISO 8601."""
    sampling: Mapping[str, object]
    """Any fields of ``schemas.job.SamplingParams``, for the jobs that do not have them."""
    result_ttl: float
    """Seconds for which results are kept after the last job has ended; left out, seven days."""
    when_full: WhenFull
    """"wait" for room (if left out), or "refuse" with QueueFull."""
    webhook: str | None
    """URL that is told when the last job has ended; left out or None, none is."""
    lenient: bool
    """Bad lines do not keep the others back: they end as failed jobs that say what is wrong."""
