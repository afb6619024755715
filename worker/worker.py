"""One worker: the engine's loop, and the threads that connect it to the queue."""

from __future__ import annotations

import os
import secrets
import socket
import time

import redis
import structlog

from broker.claims import Claim, Lease
from broker.connection import connect
from broker.job_queue import JobQueue
from schemas.errors import JobError
from schemas.worker_state import WorkerState
from worker.adapters.follower import DesiredStateFollower
from worker.aside import Aside
from worker.background import BackgroundLoop, keep_trying
from worker.claimer import Claimer
from worker.config import WorkerConfig
from worker.daemons import join_within
from worker.device_memory import free_memory, is_out_of_memory
from worker.engine import Engine
from worker.keeper import ALIVE_SECONDS, Keeper
from worker.leases import Leases
from worker.messages import Messages
from worker.publisher import Finished, Publisher, Retry, Unbegun
from worker.sequence import Sequence
from worker.summary import StepSummary

log = structlog.get_logger()

#: Seconds for which a worker that was asked to end goes on with what runs; what is left then is
#: handed back. docker-compose.yml gives it longer than that before it is killed.
DRAIN_SECONDS = 20.0

#: Seconds for which an idle worker waits for work before it looks whether it should end.
_IDLE_WAIT = 0.1

#: Seconds after which jobs that have not begun go back, so that other workers can have them.
_START_SECONDS = 10.0

#: Seconds between two looks at them.
_LOOK_SECONDS = 1.0

#: Seconds for the last results to reach Redis.
_FLUSH_SECONDS = 10.0

#: Seconds for a thread to end: a command to a server that is silent takes as long.
_END_SECONDS = 10.0

#: Seconds for threads that read to end: nobody wants any more what they read.
_READ_SECONDS = 2.0


class Worker:
    """Claims, runs and publishes until it is asked to end."""

    def __init__(self, config: WorkerConfig, engine: Engine, redis_url: str) -> None:
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self._config = config
        self._engine = engine
        self._started = time.time()
        # Each thread has a connection of its own: a slow reply to one does not delay another.
        self._connections = [connect(redis_url, config.queue) for _ in range(6)]
        queues = [JobQueue(connection, config.queue) for connection in self._connections]
        self._queue, self._claim_queue, publish_queue, *others = queues
        keep_queue, follow_queue, listen_queue = others
        # A few more than can run, so that the next ones are ready when others finish.
        self._num_ahead = max(4, config.running_limit // 8)
        self._max_jobs = config.running_limit + self._num_ahead
        self._next_look = time.monotonic()
        self._leases = Leases(
            max_jobs=self._max_jobs,
            max_adapters=config.max_loras_per_batch,
            pinned=lambda: engine.adapters.pinned_names,
        )
        engine.adapters.in_use = self._leases.adapters
        self._publisher = Publisher(publish_queue, self.id, self._leases, engine.tokenizer)
        self._aside = Aside(
            engine.adapters.known,
            engine.adapters.is_loaded,
            engine.adapter_of,
            self._leases.may_claim.set,
        )
        self._claimer = Claimer(
            self._claim_queue,
            self.id,
            self._leases,
            self._publisher,
            self._aside,
            engine.sequence_of,
            lambda: engine.resident,
            lease_seconds=config.lease_seconds,
            patience=config.patience,
        )
        self._keeper = Keeper(
            keep_queue, self.id, self._leases, self._state, lease_seconds=config.lease_seconds
        )
        self._follower = DesiredStateFollower(
            follow_queue,
            engine.adapters,
            is_enabled=config.has_lora,
            own_folders=[lora.folder for lora in config.lora_paths],
            roots=config.lora_root,
            own_repositories=[
                lora.repository.repo for lora in config.lora_paths if lora.repository
            ],
            hub_owners=config.hub_owners,
            max_pinned=config.max_loras_per_batch - 1,
            report=lambda: follow_queue.heartbeat(self._state(), alive_seconds=ALIVE_SECONDS),
        )
        self._claim_loop = BackgroundLoop("claim", self._claimer.turn, self._thread_failed)
        self._publish_loop = BackgroundLoop("publish", self._publisher.turn, self._thread_failed)
        self._keep_loop = BackgroundLoop(
            "keep", self._keeper.turn, self._thread_failed, interval=self._keeper.interval
        )
        self._follow_loop = BackgroundLoop("follow", self._follower.turn, self._thread_failed)
        self._listen_loop = BackgroundLoop(
            "listen", Messages(listen_queue, self._leases).turn, self._thread_failed
        )
        self._sequences: dict[str, tuple[Claim, Sequence]] = {}
        """By job id, from the engine's taking it in to its end."""
        self._summary = StepSummary(engine)
        self._stop_by: float | None = None
        self._failed = False

    def run(self) -> int:
        """Work until asked to stop, or, with --burst, until nothing is left; the exit status."""
        keep_trying(self._join, at="join")
        log.info("worker_ready", worker=self.id, queue=self._config.queue)
        for loop in (
            *(self._claim_loop, self._publish_loop, self._keep_loop),
            *(self._follow_loop, self._listen_loop),
        ):
            loop.start()
        try:
            while not self._failed and self._stop_by is None and not self._is_drained():
                self._step_within_memory()
            self._drain()
        except Exception as error:
            log.exception("engine_failed")
            self._failed = True
            self._end_attempts(f"the engine failed ({type(error).__name__})")
        return self._end()

    def _join(self) -> None:
        """Become known to the queue, and serve what it wants; may be repeated."""
        if self._stop_by is not None:
            return  # Asked to end while Redis was away.
        if self._config.max_attempts is not None:
            self._set_max_attempts(self._config.max_attempts)
        self._queue.set_model(self._config.model_name)
        self._follower.announce()
        self._follower.follow(is_ended=lambda: self._stop_by is not None)
        self._keeper.report()

    def step(self) -> None:
        """One turn of the way of data: claims, sequences, batch, forward, tokens, results."""
        self._take_in(wait=0.0 if self._sequences else _IDLE_WAIT)
        for lease in self._leases.take_lost():
            self._drop(lease)
        self._hand_back_what_waits()
        batch = self._engine.schedule()
        if batch:
            self._engine.launch(batch)
            self._summary.log_if_due(len(batch.adapters))
        for sequence in self._engine.collect(all_launched=batch is None):
            claim, _ = self._sequences.pop(sequence.job.id)
            self._publisher.publish(Finished(claim, sequence))

    def _step_within_memory(self) -> None:
        """``step``; jobs for which memory does not suffice are tried again later, each alone."""
        try:
            self.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("out_of_memory", running=len(self._engine.scheduler.running))
            reason = JobError("out_of_memory", "the worker's memory did not suffice for its batch")
            for claim, sequence in list(self._sequences.values()):
                if sequence.has_begun:
                    self._drop(claim.lease)
                    self._publisher.publish(Retry(claim, reason, alone=True))
            self._engine.forget_prefixes()
            free_memory()

    def stop(self) -> None:
        """Ask for the end: once, and what runs may finish; twice, and it is handed back."""
        now = time.monotonic()
        self._stop_by = now + DRAIN_SECONDS if self._stop_by is None else now

    def _is_drained(self) -> bool:
        """Whether a worker in --burst has nothing left to do."""
        found_nothing = self._claimer.found_nothing and self._keeper.found_nothing
        return self._config.burst and found_nothing

    def _drain(self) -> None:
        """Hand back what has not begun, and finish what has, as far as the time allows."""
        log.info("worker_stops", running=len(self._engine.scheduler.running))
        self._stop_claiming()
        while self._sequences and not self._failed and time.monotonic() < (self._stop_by or 0):
            self._step_within_memory()
        self._hand_back(self._claims())

    def _end(self) -> int:
        _stop(self._follow_loop, self._keep_loop, self._listen_loop)
        deadline = time.monotonic() + _FLUSH_SECONDS
        while len(self._leases) and self._publish_loop.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        _stop(self._publish_loop)
        join_within(_READ_SECONDS, [*self._aside.threads, *self._follower.threads])
        try:
            self._claim_queue.leave(self.id)
        except redis.RedisError as error:
            log.warning("redis_away", at="leave", error=str(error))
        for connection in self._connections:
            connection.close()
        log.info("worker_ended", worker=self.id, batches=self._engine.counters.batches)
        return 1 if self._failed else 0

    def _take_in(self, *, wait: float = 0.0) -> None:
        """Move claimed jobs into the engine; if there are none, wait up to so many seconds."""
        for claim, sequence in self._claimer.take(wait=wait):
            if not self._leases.holds(claim.lease):
                continue  # It was cancelled, or lost, before it could begin.
            # A job that was lost and claimed again may still run under its former lease.
            if former := self._sequences.get(sequence.job.id):
                self._drop(former[0].lease)
            self._sequences[sequence.job.id] = claim, sequence
            self._engine.add(sequence)

    def _hand_back_what_waits(self) -> None:
        """Hold no more jobs than begin within ``_START_SECONDS``, and the few ahead: the KV cache
        may have room for fewer than may run."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        unbegun = [held for held in self._sequences.values() if not held[1].has_begun]
        if not unbegun:
            self._leases.limit(self._max_jobs)
        elif now - unbegun[0][1].made > _START_SECONDS and len(unbegun) > self._num_ahead:
            self._leases.limit(len(self._sequences) - len(unbegun) + self._num_ahead)
            for claim, _ in unbegun[self._num_ahead :]:
                self._drop(claim.lease)
                self._publisher.publish(Unbegun(claim))

    def _stop_claiming(self) -> None:
        """Claim no more, and hand back what has not begun."""
        self._claim_loop.stop()
        self._leases.may_claim.set()  # It may be waiting for that.
        _stop(self._claim_loop)
        self._take_in()
        waiting = [claim for claim, s in self._sequences.values() if not s.has_begun]
        self._hand_back([*waiting, *self._aside.give_up()])

    def _claims(self) -> list[Claim]:
        return [claim for claim, _ in self._sequences.values()]

    def _hand_back(self, claims: list[Claim]) -> None:
        """Let other workers have jobs, which lose no attempt."""
        if not claims:
            return
        leases = self._let_go(claims)
        try:
            log.info("jobs_handed_back", jobs=self._queue.release(self.id, leases))
        except redis.RedisError as error:
            log.warning("redis_away", at="hand back; the leases will expire", error=str(error))

    def _end_attempts(self, reason: str) -> None:
        """Let the jobs that ran when the engine failed be tried alone: one of them may be to blame.
        Those that had not begun are handed back."""
        self._stop_claiming()
        if not self._sequences:
            return
        leases = self._let_go(self._claims())
        try:
            again, given_up = self._queue.retry(
                self.id, leases, outcome="engine_failed", message=reason, alone=True
            )
            log.warning("attempts_failed", tried_again_alone=again, given_up=given_up)
        except redis.RedisError as error:
            log.warning("redis_away", at="hand back; the leases will expire", error=str(error))

    def _let_go(self, claims: list[Claim]) -> list[Lease]:
        leases = [claim.lease for claim in claims]
        for lease in leases:
            self._drop(lease)
        self._leases.remove(leases)
        return leases

    def _set_max_attempts(self, number: int) -> None:
        before = self._queue.set_max_attempts(number)
        if before != number:
            log.info("max_attempts_changed", before=before, now=number)

    def _drop(self, lease: Lease) -> None:
        """Forget the sequence that runs under this lease, if there is one."""
        held = self._sequences.get(lease.job_id)
        if held and held[0].lease == lease:
            del self._sequences[lease.job_id]
            self._engine.drop(held[1])

    def _thread_failed(self) -> None:
        self._failed = True

    def _state(self) -> WorkerState:
        engine, counters = self._engine, self._engine.counters
        # Before what is served, which may come meanwhile: who finds nothing to be read finds that.
        desired, seen = self._follower.version, self._follower.seen_version
        reading = self._follower.reading
        return WorkerState(
            id=self.id,
            model=self._config.model_name,
            device=engine.device.type,
            started=self._started,
            adapters=engine.adapters.revisions,
            in_memory=engine.adapters.in_memory,
            resident=engine.resident,
            pinned=sorted(engine.adapters.pinned_names.difference(engine.adapters.evicted_pins)),
            desired_version=desired,
            seen_version=seen,
            reading=reading,
            adapter_errors=engine.adapters.errors,
            adapter_counts=engine.adapters.counts,
            max_loras_per_batch=self._config.max_loras_per_batch,
            running=len(engine.scheduler.running),
            waiting=len(engine.scheduler.waiting),
            batches=counters.batches,
            max_adapters_in_batch=counters.max_adapters_in_batch,
            output_tokens=counters.output_tokens,
            kv_pages_used=engine.scheduler.pool.num_used,
            kv_pages_total=engine.scheduler.pool.num_pages,
        )


def _stop(*loops: BackgroundLoop) -> None:
    """Let threads end, and wait until they have: as long as the slowest of them takes, not all."""
    for loop in loops:
        loop.stop()
    join_within(_END_SECONDS, loops)
