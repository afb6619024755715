"""By what rules a queue gives jobs out and takes them in."""

from __future__ import annotations

from broker.outcomes import Limits
from broker.scripts import QueueScripts
from schemas.keys import DEFAULT_MAX_ATTEMPTS, WHOLE_QUEUE


class Steering(QueueScripts):
    """The settings of one queue; whoever uses it obeys them at once."""

    def pause(self, adapter: str | None = None) -> bool:
        """Let nothing new be claimed of the queue, or of an adapter (``schemas.keys.BASE`` is the
        base model); what runs is finished. False if that was so already. Safe to repeat."""
        return bool(self._run("pause", adapter or WHOLE_QUEUE))

    def resume(self, adapter: str | None = None) -> bool:
        """End a pause; False if there was none. Safe to repeat."""
        return bool(self._run("resume", adapter or WHOLE_QUEUE))

    def set_limits(self, limits: Limits) -> None:
        """Bound what may wait in the queue; whoever submits obeys at once. Safe to repeat."""
        with self.client.pipeline(transaction=True) as pipeline:
            pipeline.delete(self.keys.limits)
            for field, limit in limits._asdict().items():
                if limit is not None:
                    pipeline.hset(self.keys.limits, field, limit)
            pipeline.execute()

    def set_model(self, name: str) -> None:
        """Say what the queue's base model is called: requests may name it when no worker is alive
        that could tell."""
        self.client.hset(self.keys.settings, "model", name)

    def set_max_attempts(self, number: int) -> int:
        """Let every worker of the queue give a job up after so many attempts; returns after how
        many it was until now. A damaged number counts as none, as it does in the scripts."""
        before = str(self.client.hget(self.keys.settings, "max_attempts") or "")
        self.client.hset(self.keys.settings, "max_attempts", number)
        return int(before) if before.isdecimal() else DEFAULT_MAX_ATTEMPTS
