"""How much may wait in a queue."""

from __future__ import annotations

from broker.job_queue import JobQueue
from broker.outcomes import Limits, Size
from producer.advice import counted, counted_bytes, exact_bytes
from schemas.errors import BadInput


def set_limits(queue: JobQueue, limits: Limits) -> None:
    """Raises BadInput for a bound that lets nothing in."""
    for name, limit in limits._asdict().items():
        if limit is not None and not 1 <= limit < 2**53:
            raise BadInput(
                f"At least 1 must be allowed to wait, not {limit} {name}; none lifts it."
            )
    queue.set_limits(limits)


def describe(waiting: Size, limits: Limits) -> str:
    """What waits and what may, in a sentence without its full stop."""
    bounds = [
        *([counted(limits.jobs)] if limits.jobs is not None else []),
        *([exact_bytes(limits.bytes)] if limits.bytes is not None else []),
    ]
    most = f"at most {' and '.join(bounds)} may" if bounds else "any number may"
    return f"{counted(waiting.jobs)} of {counted_bytes(waiting.bytes)} wait, and {most}"
