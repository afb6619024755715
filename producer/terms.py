"""What may be said of a whole submission."""

from __future__ import annotations

from typing import TypedDict

from schemas.job import Deadline, Priority


class Terms(TypedDict, total=False):
    """Any of these; what a line says of itself wins."""

    lora: str | None
    """Adapter of the jobs that name none; left out or None, the base model."""
    priority: Priority
    """"high", "normal" (if left out) or "low"."""
    deadline: Deadline
    """Until when they must have begun: seconds from when they are sent, or a moment in ISO 8601."""
