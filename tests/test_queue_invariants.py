"""Random operations in random order: after each, every index agrees with a scan of the jobs."""

from __future__ import annotations

from collections import Counter
from itertools import count

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from redis import Redis

from broker.claims import Claim, ClaimRequest
from broker.connection import connect
from broker.dead_letters import DeadLetters
from broker.job_queue import JobQueue
from schemas.job import PRIORITIES, Job
from schemas.keys import BASE, GROUP
from schemas.result import TERMINAL_STATES
from tests.test_job_queue import join, result

LORAS = (None, "a", "b")
_numbers = count()

#: What an operation does is drawn beforehand; which jobs it concerns, by numbers taken modulo.
numbers = st.integers(0, 10**6)
operations = st.one_of(
    st.tuples(
        st.just("submit"),
        st.lists(
            st.tuples(
                st.integers(0, 30),  # Few ids, so that some are sent again.
                st.sampled_from(LORAS),
                st.sampled_from(PRIORITIES),
                st.sampled_from([None, 3600, "2020-01-01T00:00:00Z"]),
            ),
            min_size=1,
            max_size=8,
        ),
    ),
    st.tuples(st.just("claim"), st.integers(1, 6)),
    st.tuples(
        st.sampled_from(["commit", "release", "retry_alone", "retry_later", "lose", "cancel"]),
        st.lists(numbers),
    ),
    st.tuples(st.sampled_from(["pause", "resume"]), st.sampled_from([*LORAS, BASE])),
    st.tuples(
        st.sampled_from(
            ["claim_suspect", "come_due", "replay_dead", "expire_jobs", "sweep", "unload"]
        ),
        st.just(None),
    ),
)


class Run:
    """A queue, and the claims of its one worker."""

    def __init__(self, client: Redis) -> None:
        self.queue = JobQueue(client, f"invariants-{next(_numbers)}")
        self.claims: dict[str, Claim] = {}
        self._submissions = count()
        join(self.queue, "w", ("a", "b"))

    def do(self, name: str, argument: object) -> None:
        getattr(self, f"_{name}")(argument)

    def _submit(self, lines: list[tuple[int, str | None, str, object]]) -> None:
        # The id says what the job is, so that one sent again is the same.
        jobs = [
            Job(id=f"{n}-{lora}-{p}-{d}", prompt="x" * n, lora=lora, priority=p, deadline=d)
            for n, lora, p, d in lines
        ]
        number = next(self._submissions)
        webhook = "https://example.org/" if number % 2 else None
        self.queue.submit(f"sub-{number}", "file", len(jobs), 0, jobs, webhook=webhook)

    def _claim(self, num_jobs: int) -> None:
        request = ClaimRequest(num_jobs, free_slots=2, in_use=())
        found = self.queue.claim("w", request, lease_seconds=600, patience=60).jobs
        assert len(found) <= num_jobs
        self.claims |= {claim.lease.job_id: claim for claim in found}

    def _some_claims(self, wanted: list[int]) -> list[Claim]:
        names = sorted(self.claims)
        return [self.claims[names[n % len(names)]] for n in wanted] if names else []

    def _commit(self, wanted: list[int]) -> None:
        claims = self._some_claims(wanted)
        self.queue.commit("w", [(claim.lease, result(claim)) for claim in claims])

    def _release(self, wanted: list[int]) -> None:
        leases = [claim.lease for claim in self._some_claims(wanted)]
        self.queue.release("w", leases)

    def _retry_alone(self, wanted: list[int]) -> None:
        self._retry(wanted, alone=True, delay=0)

    def _retry_later(self, wanted: list[int]) -> None:
        self._retry(wanted, alone=len(wanted) % 2 == 0, delay=600)

    def _retry(self, wanted: list[int], *, alone: bool, delay: float) -> None:
        leases = [claim.lease for claim in self._some_claims(wanted)]
        self.queue.retry("w", leases, outcome="x", message="x", alone=alone, delay=delay)

    def _claim_suspect(self, _: None) -> None:
        if claim := self.queue.claim_suspect("w", lease_seconds=600):
            self.claims[claim.lease.job_id] = claim

    def _come_due(self, _: None) -> None:
        for id_ in self.queue.client.zrange(self.queue.keys.prefix + "delayed", 0, -1):
            self.queue.client.zadd(self.queue.keys.prefix + "delayed", {id_: 1})
        self.queue.sweep()

    def _replay_dead(self, _: None) -> None:
        dead = [id_ for id_, job in jobs_of(self.queue).items() if job["state"] == "dead"]
        assert DeadLetters(self.queue.client, self.queue.name).replay(dead) == len(dead)

    def _lose(self, wanted: list[int]) -> None:
        for claim in self._some_claims(wanted):
            self.queue.client.zadd(self.queue.keys.leases, {claim.lease.job_id: 1}, xx=True)

    def _cancel(self, wanted: list[int]) -> None:
        ids = sorted(jobs_of(self.queue))
        self.queue.cancel(ids[n % len(ids)] for n in wanted if ids)

    def _pause(self, adapter: str | None) -> None:
        self.queue.pause(adapter)

    def _resume(self, adapter: str | None) -> None:
        self.queue.resume(adapter)

    def _expire_jobs(self, _: None) -> None:
        self.queue.expire_jobs()

    def _sweep(self, _: None) -> None:
        self.queue.sweep()

    def _unload(self, _: None) -> None:
        self.queue.unload_adapter("b", "force")
        self.queue.retire_adapter("b")
        join(self.queue, "w", ("a", "b"))


def jobs_of(queue: JobQueue) -> dict[str, dict[str, str]]:
    prefix = queue.keys.job("")
    names = list(queue.client.scan_iter(match=f"{prefix}*", count=1000))
    return {name.removeprefix(prefix): queue.client.hgetall(name) for name in names}


def scored(queue: JobQueue, pattern: str) -> dict[str, set[str]]:
    """Members of the sorted sets of that name, by the rest of their name."""
    prefix = queue.keys.prefix + pattern
    names = list(queue.client.scan_iter(match=f"{prefix}*", count=1000))
    return {name.removeprefix(prefix): set(queue.client.zrange(name, 0, -1)) for name in names}


def numbers_in(fields: dict[str, str]) -> dict[str, int]:
    return {name: int(number) for name, number in fields.items()}


def check(queue: JobQueue) -> None:
    client, keys, jobs = queue.client, queue.keys, jobs_of(queue)
    waiting = {id_: job for id_, job in jobs.items() if job["state"] == "waiting"}
    running = {id_: job for id_, job in jobs.items() if job["state"] == "running"}
    for key, some in ((keys.waiting, waiting), (keys.running, running)):
        assert numbers_in(client.hgetall(key)) == Counter(job["adapter"] for job in some.values())
    size = {"jobs": len(waiting), "bytes": sum(len(job["job"]) for job in waiting.values())}
    assert numbers_in(client.hgetall(keys.backlog)) == (size if waiting else {})

    entries: dict[tuple[str, str], str] = {}
    in_flight: set[str] = set()
    for name in client.scan_iter(match=f"{keys.prefix}stream:*", count=1000):
        lane = name.removeprefix(f"{keys.prefix}stream:")
        for entry, fields in client.xrange(name):
            entries[lane, entry] = fields["id"]
        if client.xinfo_groups(name):
            found = client.xpending_range(name, GROUP, "-", "+", 1000)
            in_flight |= {entries[lane, pending["message_id"]] for pending in found}
    lanes = {
        id_: f"{job['adapter']}:{job['priority']}:{job['submissions'].split()[0]}"
        for id_, job in (waiting | running).items()
    }
    assert entries == {(lanes[id_], jobs[id_]["entry"]): id_ for id_ in lanes}
    suspects, delayed = (
        set(client.zrange(keys.prefix + name, 0, -1)) for name in ("suspects", "delayed")
    )
    assert suspects <= {id_ for id_, job in waiting.items() if "alone" in job}
    assert delayed <= set(waiting)
    assert not suspects & delayed
    assert in_flight == set(running) | suspects | delayed

    open_lanes = {lanes[id_] for id_ in set(waiting) - suspects - delayed}
    found_lanes = {
        f"{band}:{name}" for band, names in scored(queue, "lanes:").items() for name in names
    }
    # One whose last jobs have just been cancelled or have expired, while others of it run, is found
    # empty by the next claim.
    assert open_lanes <= found_lanes <= set(lanes.values())
    paused = client.hkeys(keys.paused)
    bands = {tuple(lane.split(":")[:2]) for lane in found_lanes}
    ready = {(name, p) for p, names in scored(queue, "ready:").items() for name in names}
    assert ready == {(name, priority) for name, priority in bands if name not in paused}

    assert set(client.zrange(keys.leases, 0, -1)) == set(running)
    with_deadline = {id_ for id_, job in waiting.items() if "deadline" in job}
    assert set(client.zrange(keys.prefix + "deadlines", 0, -1)) == with_deadline

    for submission in client.zrange(keys.submissions, 0, -1):
        ids = client.lrange(keys.submission_jobs(submission), 0, -1)
        states = Counter(jobs[id_]["state"] for id_ in ids)
        fields = client.hgetall(keys.submission(submission))
        found = {state: int(fields.get(state, 0)) for state in states}
        assert found == states
        assert sum(found.values()) == int(fields["total"]) == len(ids)
        finished = client.xrange(keys.submission_finished(submission))
        ended = Counter(id_ for id_ in ids if jobs[id_]["state"] in TERMINAL_STATES)
        assert Counter(fields["id"] for _, fields in finished) == ended
        has_ended = set(states) <= TERMINAL_STATES
        assert (client.zscore(keys.expiry, submission) is not None) == has_ended
        has_notice = has_ended and "webhook" in fields
        assert (client.zscore(keys.notices, submission) is not None) == has_notice
        assert (fields.get("webhook_state"), "webhook_event" in fields) == (
            ("pending", True) if has_notice else (None, False)
        )


# A failure is told as it was found: to make it smaller would take longer than a test may.
@settings(
    max_examples=35,
    deadline=None,
    phases=(Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(operations, min_size=5, max_size=25))
def test_every_index_agrees_with_the_jobs_after_every_operation(
    redis_url: str, steps: list[tuple[str, object]]
) -> None:
    with connect(redis_url) as client:
        run = Run(client)
        for name, argument in steps:
            run.do(name, argument)
            check(run.queue)
