"""Plays a plan: breaks and mends what it says, and checks the queue when all is over."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from benchmarks.fault_bench import ADAPTERS, FaultBench
from benchmarks.own_server import OwnServer
from benchmarks.soak.crew import Crew, End
from benchmarks.soak.outcomes import wrong_outcomes
from benchmarks.soak.people import Operator, Person
from benchmarks.soak.plan import (
    FLUSH,
    WORKER_FAULTS,
    Command,
    Fault,
    Plan,
    Submission,
    make_plan,
)
from benchmarks.soak.recoveries import Recoveries
from benchmarks.waiting import wait_until

QUEUE = "soak"

#: Adapters of one batch, fewer than there are.
MAX_LORAS_PER_BATCH = 3

#: Jobs that one worker runs at once.
MAX_RUNNING = 8

#: Seconds after the last event for all jobs to end.
LAST_SECONDS = 180.0


@dataclass
class Growth:
    """What may grow without bound, every few seconds."""

    server_bytes: list[int] = field(default_factory=list)
    num_keys: list[int] = field(default_factory=list)
    worker_bytes: list[int] = field(default_factory=list)
    """Of the largest worker."""


class Soak:
    """Plays one plan."""

    def __init__(self, bench: FaultBench, server: OwnServer) -> None:
        self.bench = bench
        self.faults: Counter[str] = Counter()
        self.growth = Growth()
        self.crew = Crew(bench)
        self.recoveries = Recoveries(bench.redis, QUEUE)
        self.violations: list[str] = []
        self._server = server
        self._is_server_up = True
        self._sender_proxy, self._operator_proxy = bench.proxy(), bench.proxy()
        client = bench.client_through(self._sender_proxy)
        self._sender = Person[Submission]("sender", lambda s: bench.ledger.submit(client, s.jobs))
        self.operator = Operator(
            bench.ledger,
            bench.client_through(self._operator_proxy),
            bench.redis_through(self._operator_proxy),
        )
        self._operator_thread = Person[Command]("operator", self.operator.obey)
        #: What ends faults: moment, tie-breaker, kind, function.
        self._ends: list[tuple[float, int, str, End]] = []
        self._ties = count()
        self._next_sample = 0.0

    def play(self, plan: Plan) -> None:
        """Do what the plan says, let all jobs end, and check."""
        self.crew.supervise(may_start=True)
        wait_until(
            lambda: len(self.bench.client.overview().workers) == self.crew.size,
            "the workers did not come up",
        )
        started = time.monotonic()
        for event in plan:
            while (left := started + event.at - time.monotonic()) > 0:
                self._tick()
                time.sleep(min(left, 0.05))
            if isinstance(event, Submission):
                self._sender.ask(event)
            elif isinstance(event, Command):
                self._operator_thread.ask(event)
            elif self._break(event):
                self.faults[event.kind] += 1
            self._tick()
        self._finish()
        self.violations += wrong_outcomes(plan, self.bench.ledger.results.values())

    def _finish(self) -> None:
        people = (self._sender, self._operator_thread)
        for person in people:
            person.finish()
        deadline = time.monotonic() + LAST_SECONDS
        while time.monotonic() < deadline and (
            self._ends
            or any(person.is_alive() for person in people)
            or self.recoveries.going_on
            or not self._is_at_rest()
        ):
            self._tick()
            time.sleep(0.05)
        for person in people:
            if person.failure or person.is_alive():
                self.violations.append(f"the {person.name} hangs, or failed: {person.failure!r}")
        self._sample()
        for submission in list(self.bench.ledger.acknowledged):
            self.bench.ledger.note(self.bench.client.results(submission))
        self.violations += self.bench.check()

    def _is_at_rest(self) -> bool:
        return not any(
            submission.counts["waiting"] + submission.counts["running"]
            for submission in self.bench.client.overview().submissions
        )

    def _tick(self) -> None:
        now = time.monotonic()
        while self._ends and self._ends[0][0] <= now:
            _, _, kind, end = heapq.heappop(self._ends)
            end()
            self._recover(kind)
        self.crew.supervise(may_start=self._is_server_up)
        if self._is_server_up:
            self.recoveries.look()
            if now >= self._next_sample:
                self._sample()
                self._next_sample = now + 5.0

    def _break(self, fault: Fault) -> bool:
        """Let a fault happen, and note when it is to be mended; False if there is nothing that it
        could break."""
        try:
            if fault.kind in WORKER_FAULTS:
                ends = list(self.crew.befall(fault))
            else:
                ends = self._break_other(fault)
        except LookupError:
            return False
        for end in ends:
            moment = time.monotonic() + fault.seconds
            heapq.heappush(self._ends, (moment, next(self._ties), fault.kind, end))
        if not ends:
            self._recover(fault.kind)
        return True

    def _break_other(self, fault: Fault) -> list[End]:
        """How it ends; raises LookupError if the server is down already."""
        match fault.kind:
            case "lose submit":
                self._sender_proxy.lose_replies("submit", fault.times)
            case "lose cancel":
                self._operator_proxy.lose_replies("cancel", fault.times)
            case "reset sender":
                self._sender_proxy.reset()
            case "scale":
                self.crew.scale(fault.worker)
            case _:
                return self._break_server(fault)
        return []

    def _break_server(self, fault: Fault) -> list[End]:
        if not self._is_server_up:
            raise LookupError("the server is down")
        if fault.kind == FLUSH:
            self.bench.ledger.flush(self.bench.redis)
            self.recoveries.going_on.clear()
            return []
        if fault.kind == "memory full":
            self.bench.redis.config_set("maxmemory", "1")
            return [self._empty_memory]
        self._is_server_up = False
        if fault.kind == "kill server":
            self._server.kill()
        else:
            self._server.stop()
        return [self._start_server]

    def _start_server(self) -> None:
        self._server.start()
        self._is_server_up = True

    def _empty_memory(self) -> None:
        if self._is_server_up:  # One that was ended meanwhile comes back without a limit.
            self.bench.redis.config_set("maxmemory", "0")

    def _recover(self, kind: str) -> None:
        if self._is_server_up:
            self.recoveries.begin(kind, self.crew.size)

    def _sample(self) -> None:
        memory: dict[str, int] = self.bench.redis.info("memory")  # type: ignore[assignment]
        self.growth.server_bytes.append(memory["used_memory"])
        self.growth.num_keys.append(int(self.bench.redis.dbsize()))  # type: ignore[arg-type]
        self.growth.worker_bytes.append(self.crew.largest_bytes())


def run(seed: int, seconds: float, folder: Path) -> Soak:
    """Play the plan of a seed with a server of its own in ``folder``."""
    plan = make_plan(seed, seconds)
    with (
        OwnServer(folder / "server") as server,
        FaultBench(
            server.url,
            QUEUE,
            folder,
            adapters=ADAPTERS,
            max_running=MAX_RUNNING,
            max_loaded=2,
            flags={"max_loras_per_batch": MAX_LORAS_PER_BATCH},
        ) as bench,
    ):
        soak = Soak(bench, server)
        soak.play(plan)
        return soak
