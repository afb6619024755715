"""What stops jobs, or keeps them from coming in."""

from __future__ import annotations

from broker.outcomes import Cancelled, Limits
from producer import cancelling, limiting, pausing
from producer.cancelling import OnProgress
from producer.client.session import Session


class Controls(Session):
    """Cancels, pauses and bounds."""

    def cancel(self, *ids: str, on_progress: OnProgress | None = None) -> Cancelled:
        """End the jobs, and all jobs of the submissions, that have not ended: their results have
        the status ``cancelled``. The worker of one that runs drops it within a few steps.

        A job that several submissions sent ends for all of them. A submission that is still being
        sent takes no more jobs. ``on_progress`` is called with the number of jobs looked at so far.
        Raises UnknownId before the first job is cancelled.
        """
        with self._errors():
            kinds = {id_: self._is_submission(id_) for id_ in ids}
            return cancelling.cancel(self._job_queue, self._reader, kinds, on_progress or _ignore)

    def pause(self, adapter: str | None = None) -> bool:
        """Let workers claim nothing new of the queue, or of an adapter ("@base" is the base model);
        they finish what runs, and jobs may still be sent. False if that was so already.

        Raises UnknownId for an adapter that the queue does not know.
        """
        with self._errors():
            return pausing.pause(self._job_queue, self._reader, adapter)

    def resume(self, adapter: str | None = None) -> bool:
        """End a pause of the queue, or of an adapter; False if there was none."""
        with self._errors():
            return self._job_queue.resume(adapter)

    def limits(self) -> Limits:
        """How many jobs, and bytes of them, may wait in the queue."""
        with self._errors():
            return self._reader.limits()

    def set_limits(self, limits: Limits) -> None:
        """Bound what may wait in the queue, for all who submit; None is any number. What waits
        already stays."""
        with self._errors():
            limiting.set_limits(self._job_queue, limits)


def _ignore(number: int) -> None:
    pass
