"""The observed state of one worker, as its heartbeat writes it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class AdapterCounts(BaseModel):
    """What one adapter has done on one worker since that started, or since it was loaded after an
    unload."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    requests: int = 0
    """Jobs that have ended with an answer."""
    output_tokens: int = 0
    loads: int = 0
    """How often it was read from its source."""
    evictions: int = 0
    """How often it was dropped from the worker's memory to make room for another one."""
    load_seconds: float = 0.0
    """Time that all its loads took."""
    slot_loads: int = 0
    """How often its weights were sent to a slot."""
    slot_evictions: int = 0
    """How often they left one, but for an unload or a replacement."""


class WorkerState(BaseModel):
    """What a worker is and what it is doing now."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    model: str
    device: str
    started: float
    adapters: dict[str, str]
    """Name -> revision of every adapter that this worker can run."""
    in_memory: list[str] | None = None
    """Those of them whose weights are in host memory; None if all are, so that thousands are not
    named twice."""
    resident: list[str] = []
    """Adapters whose weights stand in a slot."""
    pinned: list[str] = []
    """Adapters that keep their slot; not one that is to, but whose weights could not be read."""
    desired_version: int = 0
    """The version of the desired state that this worker has acted on."""
    seen_version: int = 0
    """The version that it has acted on but for ``reading``; 0 of a worker that does not tell."""
    reading: list[str] = []
    """Adapters that it has still to read for that."""
    adapter_errors: dict[str, str] = {}
    """Name -> why this worker cannot serve it, of adapters of the desired state."""
    adapter_counts: dict[str, AdapterCounts] = {}
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
