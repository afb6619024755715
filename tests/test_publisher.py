"""When a job is tried again."""

from __future__ import annotations

from worker.publisher import retry_delay


def test_delays_double_up_to_the_longest_and_differ_by_chance() -> None:
    for attempts, longest in ((1, 10), (2, 20), (3, 40), (7, 600), (1000, 600)):
        delays = {retry_delay(attempts) for _ in range(100)}
        assert longest / 2 <= min(delays) <= max(delays) <= longest
        assert len(delays) > 50
