"""What a soak does, and when: all of it follows from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from benchmarks.fault_bench import LEASE_SECONDS
from benchmarks.null_worker import FOLDERS
from schemas.keys import BASE

MAX_WORKERS = 5

#: Adapters that every worker is started with, and that no command touches.
STABLE = ("a", "b")

#: Adapters that commands load, replace, unload and pin; workers are started with the first one.
COMMANDED = ("c", "d")

#: Mean seconds between two submissions, faults, commands about an adapter, and pauses.
SUBMISSION_EVERY, FAULT_EVERY, ADAPTER_EVERY, PAUSE_EVERY = 0.7, 1.5, 4.0, 15.0

#: Which part of the submissions is cancelled, or some of its jobs, shortly after it was sent.
CANCELLED_PART = 0.2

#: Mean seconds from then to the cancellation: it meets jobs that wait, run, and have just ended.
CANCELLED_AFTER = 0.1

#: Longest time that a fault lasts, in seconds: well beyond a lease.
LONGEST_FAULT = 3 * LEASE_SECONDS

#: Longest time of a pause and of an adapter's absence, in seconds.
LONGEST_PAUSE, LONGEST_ABSENCE = 3.0, 4.0

#: Seconds of a plan from which the server's data are deleted twice in it, and not once; early, so
#: that most of the work is held to all promises at the end.
FLUSHED_TWICE = 600.0

#: Faults of one worker or its connections, of the sender's or operator's connection, of the server,
#: of all.
WORKER_FAULTS = (
    *("kill worker", "end worker", "stop worker", "reset", "half-open", "stall", "latency", "away"),
    *("lose claim", "lose commit", "lose renew", "lose heartbeat", "lose sweep"),
)
OTHER_FAULTS = (
    *("lose submit", "lose cancel", "reset sender", "kill server", "restart server"),
    *("memory full", "scale"),
)
#: The one fault that has its moments by itself.
FLUSH = "flushall"

#: What the operator does.
COMMANDS = (
    *("cancel jobs", "cancel submission", "read results", "pause", "resume"),
    *("load", "unload --drain", "unload --force", "pin", "unpin"),
)


@dataclass(frozen=True)
class Submission:
    """Jobs to send at a moment, in seconds since the start."""

    at: float
    jobs: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Fault:
    """Something to break at a moment, for so many seconds."""

    at: float
    kind: str
    worker: int = 1
    """Which of the workers it befalls; how many there shall be, if they are scaled."""
    seconds: float = 0.0
    times: int = 1


@dataclass(frozen=True)
class Command:
    """What the operator asks for at a moment, once all before it is done."""

    at: float
    kind: str
    adapter: str | None = None
    """None is the whole queue."""
    source: str = ""
    is_pinned: bool = False
    job_ids: tuple[str, ...] = ()
    """Jobs of one submission."""


Event = Submission | Fault | Command
Plan = list[Event]


def make_plan(seed: int, seconds: float) -> Plan:
    """All work, faults and commands in the order of their moments."""
    draw = random.Random(seed)
    numbers = count()
    plan = [
        *_submissions(draw, numbers, seconds),
        *_faults(draw, seconds),
        *_adapter_commands(draw, numbers, seconds),
        *_pauses(draw, seconds),
    ]
    return sorted(plan, key=lambda event: event.at)


def _moments(draw: random.Random, mean: float, start: float, seconds: float) -> Iterator[float]:
    """Random moments that lie ``mean`` seconds apart on average."""
    at = start
    while (at := at + draw.expovariate(1 / mean)) < seconds:
        yield at


def _submissions(draw: random.Random, numbers: Iterator[int], seconds: float) -> Iterator[Event]:
    """Work, and who thinks better of it, or looks what became of it."""
    for at in _moments(draw, SUBMISSION_EVERY, 0.0, seconds):
        size = draw.choice((1, 3, 10, 40))
        jobs = tuple(_job(draw, next(numbers)) for _ in range(size))
        ids = [job["id"] for job in jobs]
        yield Submission(at, jobs)
        lot, later = draw.random(), at + draw.expovariate(1 / CANCELLED_AFTER)
        if lot < CANCELLED_PART / 2:
            yield Command(later, "cancel submission", job_ids=tuple(ids))
        elif lot < CANCELLED_PART:
            some = draw.sample(ids, draw.randint(1, size))
            yield Command(later, "cancel jobs", job_ids=tuple(some))
        elif lot < 2 * CANCELLED_PART:
            yield Command(later + draw.uniform(0, 5), "read results", job_ids=tuple(ids))


def _job(draw: random.Random, number: int) -> dict[str, Any]:
    """Most only take a moment; a few bring a fault of their own."""
    fault: dict[str, Any] | None = None
    lot = draw.random()
    if lot < 0.3:
        fault = {"at": "generate", "do": "sleep", "seconds": draw.uniform(0.001, 0.15)}
    elif lot < 0.31:
        fault = {"at": "read", "do": "fail"}
    elif lot < 0.316:
        do = draw.choice(("SIGKILL", "SIGSTOP", "raise"))
        fault = {"at": draw.choice(("read", "load", "generate")), "do": do, "times": 1}
    elif lot < 0.317:
        fault = {"at": "generate", "do": draw.choice(("SIGKILL", "raise"))}
    job = {
        "id": f"{'poison' if fault and _is_poison(fault) else 'job'}-{number}",
        "prompt": "x",
        "lora": draw.choice((None, *STABLE, *COMMANDED)),
        "priority": draw.choices(("high", "normal", "low"), (1, 8, 1))[0],
        "metadata": {"fault": fault},
    }
    if draw.random() < 0.05:
        job["deadline"] = draw.uniform(0.05, 5.0)
    return job


def _is_poison(fault: dict[str, Any]) -> bool:
    return fault["do"] in ("SIGKILL", "raise") and "times" not in fault


def _faults(draw: random.Random, seconds: float) -> Iterator[Event]:
    for at in _moments(draw, FAULT_EVERY, 2.0, seconds):
        yield Fault(
            at,
            draw.choice(WORKER_FAULTS * 2 + OTHER_FAULTS),
            worker=draw.randint(1, MAX_WORKERS),
            seconds=draw.uniform(0.1, LONGEST_FAULT),
            times=draw.randint(1, 3),
        )
    for last in (0.1, 0.2) if seconds >= FLUSHED_TWICE else (0.2,):
        yield Fault(seconds * last * draw.uniform(0.5, 1), FLUSH)


def _adapter_commands(
    draw: random.Random, numbers: Iterator[int], seconds: float
) -> Iterator[Event]:
    """Each comes while jobs of the adapter wait and run."""
    versions = count()
    yield Command(1.0, "load", COMMANDED[-1], f"{FOLDERS}/{COMMANDED[-1]}-{next(versions)}")
    for at in _moments(draw, ADAPTER_EVERY, 2.0, seconds):
        name = draw.choice(COMMANDED)
        source = f"{FOLDERS}/{name}-{next(versions)}"
        jobs = [_job(draw, next(numbers)) | {"lora": name} for _ in range(20)]
        yield Submission(at - draw.uniform(0, 0.3), tuple(jobs))
        kind = draw.choice(("load", "load", "unload --drain", "unload --force", "pin"))
        later = at + draw.uniform(0.2, LONGEST_ABSENCE)
        if kind == "load":
            yield Command(at, kind, name, source, is_pinned=draw.random() < 0.2)
        elif kind == "pin":
            yield Command(at, kind, name)
            yield Command(later, "unpin", name)
        else:
            yield Command(at, kind, name)
            yield Command(later, "load", name, source)


def _pauses(draw: random.Random, seconds: float) -> Iterator[Event]:
    for at in _moments(draw, PAUSE_EVERY, 2.0, seconds):
        adapter = draw.choice((None, BASE, *STABLE, *COMMANDED))
        yield Command(at, "pause", adapter)
        yield Command(at + draw.uniform(0.2, LONGEST_PAUSE), "resume", adapter)
