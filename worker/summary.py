"""One log line at intervals about what the engine does."""

from __future__ import annotations

import time

import structlog

from worker.engine import Engine

log = structlog.get_logger()

#: Seconds between two lines.
_INTERVAL = 5.0


class StepSummary:
    """Counts from line to line."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._since = time.monotonic()
        self._batches = 0
        self._output_tokens = 0
        self._prompt_tokens = 0
        self._reused_tokens = 0

    def log_if_due(self, num_adapters: int) -> None:
        """``num_adapters``: distinct adapters in the newest batch."""
        now = time.monotonic()
        if now - self._since < _INTERVAL:
            return
        counters, scheduler = self._engine.counters, self._engine.scheduler
        seconds = now - self._since
        log.info(
            "steps",
            batches=counters.batches - self._batches,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            adapters=num_adapters,
            kv_use=f"{scheduler.pool.num_used / scheduler.pool.num_pages:.0%}",
            output_tokens_per_s=round((counters.output_tokens - self._output_tokens) / seconds, 1),
            prompt_tokens_per_s=round((counters.prompt_tokens - self._prompt_tokens) / seconds, 1),
            reused_tokens_per_s=round((counters.reused_tokens - self._reused_tokens) / seconds, 1),
        )
        self._since = now
        self._batches = counters.batches
        self._output_tokens = counters.output_tokens
        self._prompt_tokens = counters.prompt_tokens
        self._reused_tokens = counters.reused_tokens
