"""The observed state of one worker, as its heartbeat writes it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class WorkerState(BaseModel):
    """What a worker is and what it is doing now."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    model: str
    device: str
    started: float
    adapters: dict[str, str]
    """Name -> revision of every adapter that this worker can run."""
    resident: list[str] = []
    """Adapters whose weights stand in a slot."""
    max_loras_per_batch: int
    running: int = 0
    waiting: int = 0
    batches: int = 0
    """Forward passes so far."""
    max_adapters_in_batch: int = 0
    """Largest number of distinct adapters that one batch has held so far."""
    output_tokens: int = 0
    kv_pages_used: int = 0
    kv_pages_total: int = 0
