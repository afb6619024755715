"""When a job is tried again, and when results are committed."""

from __future__ import annotations

import time

from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from schemas.job import Job
from tests.test_job_queue import claim, jobs, join, submit
from worker.leases import Leases
from worker.publisher import Finished, Publisher, retry_delay
from worker.sequence import Sequence


def test_delays_double_up_to_the_longest_and_differ_by_chance() -> None:
    for attempts, longest in ((1, 10), (2, 20), (3, 40), (7, 600), (1000, 600)):
        delays = {retry_delay(attempts) for _ in range(100)}
        assert longest / 2 <= min(delays) <= max(delays) <= longest
        assert len(delays) > 50


class SlowTokenizer:
    """Results take as long to make as those of many tokens."""

    def decode(self, token_ids: list[int]) -> str:
        time.sleep(0.06)
        return ""


def test_results_that_take_long_to_make_are_committed_before_all_are_made(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(5))
    leases = Leases(max_jobs=10, max_adapters=1)
    publisher = Publisher(queue, "w", leases, SlowTokenizer())  # type: ignore[arg-type]
    claims = claim(queue)
    leases.add(claims)
    for one in claims:
        sequence = Sequence(Job.from_wire(one.payload), [1], 1, finish_reason="length")
        sequence.started = sequence.first_token = sequence.finished = time.monotonic()
        publisher.publish(Finished(one, sequence))
    publisher.turn()
    assert 0 < reader.submission("sub").counts["done"] < 5
    while len(leases):
        publisher.turn()
    assert reader.submission("sub").counts["done"] == 5
