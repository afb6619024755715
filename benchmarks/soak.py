"""Random faults over random work, and the check of the whole queue at the end.

    python -m benchmarks.soak --minutes 10 --seed 1

Workers are real processes around an engine that computes nothing; the server is a real one with an
append-only file; every process reaches it through a proxy of its own. The plan, all work and all
faults with their moments, follows from the seed. Ends with status 1 if the check against the
sender's ledger finds anything.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.fault_bench import ADAPTERS, LEASE_SECONDS, FaultBench, is_stopped
from benchmarks.own_server import OwnServer
from benchmarks.tcp_proxy import TcpProxy
from schemas.keys import Keys
from schemas.result import TERMINAL_STATES

QUEUE = "soak"

MAX_WORKERS = 5

#: Jobs that one worker runs at once.
MAX_RUNNING = 8

#: Mean seconds between two submissions, and between two faults.
SUBMISSION_EVERY, FAULT_EVERY = 0.7, 1.5

#: Longest time that a fault lasts, in seconds: well beyond a lease.
LONGEST_FAULT = 3 * LEASE_SECONDS

#: Seconds after which a worker that a job has stopped is woken.
WAKE_AFTER = 2 * LEASE_SECONDS

#: Seconds from which a recovery is told by itself.
SLOW_SECONDS = 10.0

#: Seconds after the last event for all jobs to end.
LAST_SECONDS = 180.0

#: Faults of one worker or its connections, of the sender's connection, of the server, of all.
WORKER_FAULTS = (
    *("kill worker", "end worker", "stop worker", "reset", "half-open", "stall", "latency", "away"),
    *("lose claim", "lose commit", "lose renew", "lose heartbeat", "lose sweep"),
)
OTHER_FAULTS = ("lose submit", "reset sender", "kill server", "memory full", "scale")


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
    worker: int
    """Which of the workers it befalls; how many there shall be, if they are scaled."""
    seconds: float
    times: int


Plan = list[Submission | Fault]


def make_plan(seed: int, seconds: float) -> Plan:
    """All work and all faults in the order of their moments."""
    draw = random.Random(seed)
    numbers = count()
    plan: Plan = []
    at = 0.0
    while (at := at + draw.expovariate(1 / SUBMISSION_EVERY)) < seconds:
        size = draw.choice((1, 3, 10, 40))
        plan.append(Submission(at, tuple(_job(draw, next(numbers)) for _ in range(size))))
    at = 2.0
    while (at := at + draw.expovariate(1 / FAULT_EVERY)) < seconds:
        kind = draw.choice(WORKER_FAULTS * 2 + OTHER_FAULTS)
        plan.append(
            Fault(
                at,
                kind,
                worker=draw.randint(1, MAX_WORKERS),
                seconds=draw.uniform(0.1, LONGEST_FAULT),
                times=draw.randint(1, 3),
            )
        )
    return sorted(plan, key=lambda event: event.at)


def _job(draw: random.Random, number: int) -> dict[str, Any]:
    """Most only take a moment; a few bring a fault of their own."""
    fault: dict[str, Any] | None = None
    lot = draw.random()
    if lot < 0.3:
        fault = {"at": "generate", "do": "sleep", "seconds": draw.uniform(0.001, 0.05)}
    elif lot < 0.31:
        fault = {"at": "read", "do": "fail"}
    elif lot < 0.316:
        do = draw.choice(("SIGKILL", "SIGSTOP", "raise"))
        fault = {"at": draw.choice(("read", "load", "generate")), "do": do, "times": 1}
    elif lot < 0.317:
        fault = {"at": "generate", "do": draw.choice(("SIGKILL", "raise"))}
    return {
        "id": f"{'poison' if fault and _is_poison(fault) else 'job'}-{number}",
        "prompt": "x",
        "lora": draw.choice((None, *ADAPTERS)),
        "metadata": {"fault": fault},
    }


def _is_poison(fault: dict[str, Any]) -> bool:
    return fault["do"] in ("SIGKILL", "raise") and "times" not in fault


@dataclass
class Recovery:
    """The jobs that ran when a fault ended, until all of them have ended too."""

    kind: str
    since: float
    job_ids: list[str]
    num_workers: int
    left: list[str] = field(default_factory=list)
    """Those that had not ended when it was last looked."""


@dataclass
class Figures:
    """What one soak has shown."""

    faults: Counter[str] = field(default_factory=Counter)
    recovered: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds by kind of fault."""
    slow: list[str] = field(default_factory=list)
    """Recoveries that took longer than ``SLOW_SECONDS``, in words."""
    server_bytes: list[int] = field(default_factory=list)
    num_keys: list[int] = field(default_factory=list)
    worker_bytes: list[int] = field(default_factory=list)
    """Largest resident memory of a worker at each sample."""
    num_restarts: int = 0
    violations: list[str] = field(default_factory=list)


class Soak:
    """Plays one plan."""

    def __init__(self, bench: FaultBench, server: OwnServer) -> None:
        self.bench = bench
        self.figures = Figures()
        self._server = server
        self._keys = Keys(QUEUE)
        self._num_workers = 3
        self._workers: list[ForkServerProcess | None] = [None] * MAX_WORKERS
        self._proxies = [bench.proxy() for _ in range(MAX_WORKERS)]
        self._sender_proxy = bench.proxy()
        self._submissions: SimpleQueue[Submission | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="sender", daemon=True)
        #: What ends faults: moment, tie-breaker, kind, function.
        self._ends: list[tuple[float, int, str, Callable[[], object]]] = []
        self._ties = count()
        self._recoveries: list[Recovery] = []
        self._stopped_since: dict[int, float] = {}
        self._held_down: set[int] = set()
        self._next_sample = self._started = 0.0
        self._is_server_up = True

    def play(self, plan: Plan) -> None:
        """Do what the plan says, let all jobs end, and check."""
        self._sender.start()
        self._started = time.monotonic()
        for event in plan:
            while (left := self._started + event.at - time.monotonic()) > 0:
                self._tick()
                time.sleep(min(left, 0.05))
            if isinstance(event, Submission):
                self._submissions.put(event)
            else:
                self._begin(event)
            self._tick()
        self._finish()

    def _send(self) -> None:
        with_proxy = self.bench.client_through(self._sender_proxy)
        while submission := self._submissions.get():
            self.bench.ledger.submit(with_proxy, submission.jobs)

    def _finish(self) -> None:
        self._submissions.put(None)
        deadline = time.monotonic() + LAST_SECONDS
        while time.monotonic() < deadline and (
            self._ends or self._sender.is_alive() or self._recoveries or not self._is_at_rest()
        ):
            self._tick()
            time.sleep(0.05)
        self._sender.join()
        self._sample()
        for submission in self.bench.ledger.acknowledged:
            self.bench.ledger.note(self.bench.client.results(submission))
        self.figures.violations = self.bench.check()

    def _is_at_rest(self) -> bool:
        overview = self.bench.client.overview()
        return not self._leased() and not any(
            s.counts["waiting"] + s.counts["running"] for s in overview.submissions
        )

    def _tick(self) -> None:
        now = time.monotonic()
        while self._ends and self._ends[0][0] <= now:
            _, _, kind, end = heapq.heappop(self._ends)
            end()
            self._watch(kind)
        self._supervise(now)
        if self._is_server_up:
            self._look_at_recoveries()
            if now >= self._next_sample:
                self._sample()
                self._next_sample = now + 5.0

    def _supervise(self, now: float) -> None:
        """Start workers that are missing, and wake those that a job has stopped."""
        for number, process in enumerate(self._workers):
            if process is None or not process.is_alive():
                self._stopped_since.pop(number, None)
                if number < self._num_workers and self._is_server_up:
                    self.figures.num_restarts += process is not None
                    self._workers[number] = self.bench.workers.start(
                        redis_url=self._proxies[number].url
                    )
            elif number in self._held_down or not is_stopped(process):
                self._stopped_since.pop(number, None)
            elif now - self._stopped_since.setdefault(number, now) > WAKE_AFTER:
                os.kill(process.pid, signal.SIGCONT)

    def _begin(self, fault: Fault) -> None:
        """Break what the plan says, and say when it is to be mended."""
        number = (fault.worker - 1) % self._num_workers
        worker, proxy = self._workers[number], self._proxies[number]
        kind = fault.kind
        if kind in ("kill worker", "end worker", "stop worker"):
            if worker is None or not worker.is_alive() or number in self._held_down:
                return
            self._break_worker(fault, number, worker)
        elif kind.startswith("lose "):
            lossy = self._sender_proxy if kind == "lose submit" else proxy
            lossy.lose_replies(kind.removeprefix("lose "), fault.times)
            self._watch(kind)
        elif kind in ("reset", "reset sender"):
            (self._sender_proxy if kind == "reset sender" else proxy).reset()
            self._watch(kind)
        elif kind == "half-open":
            proxy.half_open()
            self._watch(kind)
        elif kind == "scale":
            self._scale(fault.worker)
        elif kind in ("stall", "latency", "away"):
            self._break_connection(fault, proxy)
        elif not self._break_server(fault):
            return
        self.figures.faults[kind] += 1

    def _break_worker(self, fault: Fault, number: int, worker: ForkServerProcess) -> None:
        if fault.kind == "stop worker":
            os.kill(worker.pid, signal.SIGSTOP)
            self._held_down.add(number)

            def wake() -> None:
                self._held_down.discard(number)
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGCONT)

            self._end_after(fault, wake)
            return
        self._watch(fault.kind)
        if fault.kind == "kill worker":
            worker.kill()
        else:
            worker.terminate()

    def _scale(self, num_workers: int) -> None:
        for worker in self._workers[num_workers:]:
            if worker and worker.is_alive():
                worker.terminate()
        self._num_workers = num_workers

    def _break_connection(self, fault: Fault, proxy: TcpProxy) -> None:
        if fault.kind == "stall":
            proxy.stall()
            self._end_after(fault, proxy.resume)
        elif fault.kind == "latency":
            proxy.latency = fault.seconds / 10
            self._end_after(fault, lambda: setattr(proxy, "latency", 0.0))
        else:
            proxy.refuses = True
            proxy.reset()
            self._end_after(fault, lambda: setattr(proxy, "refuses", False))

    def _break_server(self, fault: Fault) -> bool:
        """False if it is broken already."""
        if not self._is_server_up:
            return False
        if fault.kind == "kill server":
            self._server.kill()
            self._is_server_up = False

            def restart() -> None:
                self._server.start()
                self._is_server_up = True

            self._end_after(fault, restart)
        else:
            self.bench.redis.config_set("maxmemory", "1")
            self._end_after(fault, self._empty_memory)
        return True

    def _empty_memory(self) -> None:
        if self._is_server_up:  # One that was killed meanwhile comes back without a limit.
            self.bench.redis.config_set("maxmemory", "0")

    def _end_after(self, fault: Fault, end: Callable[[], object]) -> None:
        moment = time.monotonic() + fault.seconds
        heapq.heappush(self._ends, (moment, next(self._ties), fault.kind, end))

    def _watch(self, kind: str) -> None:
        """Measure from now how long the jobs take that run now."""
        if self._is_server_up and (job_ids := self._leased()):
            self._recoveries.append(Recovery(kind, time.monotonic(), job_ids, self._num_workers))

    def _look_at_recoveries(self) -> None:
        now, going_on = time.monotonic(), []
        for recovery in self._recoveries:
            with self.bench.redis.pipeline(transaction=False) as pipeline:
                for job_id in recovery.job_ids:
                    pipeline.hget(self._keys.job(job_id), "state")
                states = pipeline.execute()
            left = [
                id_
                for id_, state in zip(recovery.job_ids, states, strict=True)
                if state not in TERMINAL_STATES
            ]
            recovery.left = left or recovery.left
            if not left:
                self._recovered(recovery, now)
            else:
                going_on.append(recovery)
        self._recoveries = going_on

    def _recovered(self, recovery: Recovery, now: float) -> None:
        seconds = now - recovery.since
        self.figures.recovered[recovery.kind].append(seconds)
        if seconds > SLOW_SECONDS:
            at, workers = recovery.since - self._started, recovery.num_workers
            self.figures.slow.append(
                f"{seconds:.1f} s from '{recovery.kind}' at {at:.1f} s, when there were to be"
                f" {workers} workers; the last: {recovery.left}"
            )

    def _leased(self) -> list[str]:
        leased: Any = self.bench.redis.zrange(self._keys.leases, 0, -1)
        return list(leased)

    def _sample(self) -> None:
        memory: Any = self.bench.redis.info("memory")
        self.figures.server_bytes.append(memory["used_memory"])
        self.figures.num_keys.append(int(self.bench.redis.dbsize()))  # type: ignore[arg-type]
        sizes = [0]
        for worker in self._workers:
            if worker and worker.is_alive():
                with suppress(psutil.Error):
                    sizes.append(psutil.Process(worker.pid).memory_info().rss)
        self.figures.worker_bytes.append(max(sizes))


def fault_table(figures: Figures) -> Table:
    """Faults by kind, and how long the jobs took that ran when each ended."""
    table = Table("fault", "times", "with jobs running", "recovered, p50 s", "p99 s", "longest s")
    everything: list[float] = []
    for kind, number in sorted(figures.faults.items()):
        seconds = figures.recovered.get(kind, [])
        everything += seconds
        table.add_row(kind, str(number), str(len(seconds)), *_percentiles(seconds))
    table.add_section()
    total = str(sum(figures.faults.values()))
    table.add_row("all", total, str(len(everything)), *_percentiles(everything))
    return table


def outcome_table(bench: FaultBench, figures: Figures) -> Table:
    """Jobs by outcome, executions, growth."""
    table = Table("what", "number")
    for name, value in _outcomes(bench, figures):
        table.add_row(name, value)
    return table


def _outcomes(bench: FaultBench, figures: Figures) -> Iterator[tuple[str, str]]:
    ledger, runs = bench.ledger, bench.runs()
    results = ledger.results.values()
    yield "submissions acknowledged", f"{len(ledger.acknowledged):,}"
    yield "jobs acknowledged", f"{sum(map(len, ledger.acknowledged.values())):,}"
    yield "jobs of submissions that ended with an error", f"{len(ledger.unsure):,}"
    for state, number in sorted(Counter(result.status for result in results).items()):
        yield f"acknowledged jobs that ended {state}", f"{number:,}"
    poison = sum(r.status == "dead" and r.id.startswith("poison") for r in results)
    yield "of the dead, jobs that kill their worker each time", f"{poison:,}"
    yield "executions beyond the first", f"{sum(runs.values()) - len(runs):,}"
    yield "most executions of one job", f"{max(runs.values(), default=0)}"
    yield "workers that ended and were replaced", f"{figures.num_restarts:,}"
    keys, memory, worker = figures.num_keys, figures.server_bytes, figures.worker_bytes
    num_jobs = sum(map(len, ledger.acknowledged.values())) + len(ledger.unsure)
    yield "keys at the end, per job sent", f"{keys[-1] / max(1, num_jobs):.2f}"
    yield "server memory at the start, at the end", f"{_mb(memory[0])}, {_mb(memory[-1])}"
    yield "server memory at the end, per job sent", f"{memory[-1] / max(1, num_jobs):,.0f} B"
    yield (
        "largest worker, first and last quarter",
        " and ".join(
            _mb(max(part))
            for part in (worker[: len(worker) // 4 + 1], worker[-(len(worker) // 4 + 1) :])
        ),
    )
    yield "violations", f"{len(figures.violations)}"


def _percentiles(seconds: list[float]) -> tuple[str, str, str]:
    if not seconds:
        return "-", "-", "-"
    p99 = statistics.quantiles(seconds, n=100)[98] if len(seconds) > 1 else seconds[0]
    return (
        f"{statistics.median(seconds):.2f}",
        f"{min(p99, max(seconds)):.2f}",
        f"{max(seconds):.2f}",
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def run(seed: int, seconds: float, folder: Path) -> tuple[FaultBench, Figures]:
    """Play the plan of a seed with a server of its own in ``folder``."""
    plan = make_plan(seed, seconds)
    with (
        OwnServer(folder / "server") as server,
        FaultBench(server.url, QUEUE, folder, max_running=MAX_RUNNING, max_loaded=2) as bench,
    ):
        soak = Soak(bench, server)
        soak.play(plan)
        return bench, soak.figures


def main() -> None:
    """Run the soak and print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for logs, to be kept")
    flags = parser.parse_args()
    console = Console(width=110)
    with ExitStack() as stack:
        folder = flags.keep or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="lorry-soak-"))
        )
        bench, figures = run(flags.seed, 60 * flags.minutes, folder)
        console.print(
            f"seed {flags.seed}, {flags.minutes:g} minutes, leases of {LEASE_SECONDS:g} s"
        )
        console.print(fault_table(figures))
        console.print(outcome_table(bench, figures))
    for text in figures.slow:
        console.print(text, soft_wrap=True)
    for violation in figures.violations:
        console.print(violation, style="red", soft_wrap=True)
    sys.exit(1 if figures.violations else 0)


if __name__ == "__main__":
    main()
