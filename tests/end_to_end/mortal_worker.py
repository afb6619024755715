"""A worker that computes nothing, and that one prompt kills as a fault of memory would.

A job of the prompt "poison" ends the process by SIGKILL in the step that runs it. All others take
as many steps as their ``max_tokens``.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

from benchmarks import null_worker
from benchmarks.null_worker import NullBatch, NullEngine, NullSettings

#: Seconds of a step: a batch must be there for long enough to be shared.
STEP_SECONDS = 0.02


class MortalEngine(NullEngine):
    """Dies of one prompt."""

    def launch(self, batch: NullBatch) -> None:  # type: ignore[override]
        time.sleep(STEP_SECONDS)
        self._steps: Counter[str] = getattr(self, "_steps", Counter())
        self._steps.update(sequence.job.id for sequence in batch.sequences)
        if any(sequence.job.prompt == "poison" for sequence in batch.sequences):
            os.kill(os.getpid(), signal.SIGKILL)
        ended = [s for s in batch.sequences if self._steps[s.job.id] % s.job.max_tokens == 0]
        super().launch(NullBatch(ended, frozenset()))


def run_mortal(settings: NullSettings) -> None:
    """Run such a worker and end this process with its exit status."""
    null_worker.NullEngine = MortalEngine  # type: ignore[misc]
    null_worker.run_and_exit(settings)
