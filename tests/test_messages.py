"""What reaches a worker without its asking."""

from __future__ import annotations

from broker.job_queue import JobQueue
from schemas.job import Job
from worker.leases import Leases
from worker.messages import Messages


def test_work_that_comes_lets_a_worker_claim(queue: JobQueue) -> None:
    leases = Leases(max_jobs=1, max_adapters=1)
    messages = Messages(queue, leases)
    for _ in range(3):  # Subscribes; there is no message yet.
        messages.turn()
    assert not leases.may_claim.is_set()
    queue.submit("s", "file", 1, 0, [Job(id="job", prompt="x")])
    messages.turn()
    assert leases.may_claim.is_set()
