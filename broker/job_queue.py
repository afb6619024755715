"""The operations that change a queue, one Lua script each, by what they change."""

from __future__ import annotations

from broker.desired_state import DesiredState
from broker.fetch_requests import FetchRequests
from broker.leasing import Leasing
from broker.steering import Steering
from broker.submissions import Submissions
from broker.sweeping import Sweeping
from schemas.worker_state import WorkerState


class JobQueue(Submissions, Leasing, Sweeping, Steering, DesiredState, FetchRequests):
    """One queue on one server."""

    def heartbeat(self, state: WorkerState, *, alive_seconds: float) -> None:
        """Write a worker's observed state; it counts as alive for ``alive_seconds``.

        What is unset stays out: of 10,000 adapters' counts most are, and a third of the state.
        """
        alive_ms, text = round(alive_seconds * 1000), state.model_dump_json(exclude_unset=True)
        self._run("heartbeat", state.id, alive_ms, text, *state.adapters)
