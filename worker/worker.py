"""One worker: the engine's loop, and the threads that connect it to the queue."""

from __future__ import annotations

import os
import secrets
import socket
import time

import redis
import structlog

from broker.connection import connect
from broker.job_queue import Claim, JobQueue, Lease
from schemas.worker_state import WorkerState
from worker.adapters.follower import DesiredStateFollower
from worker.background import BackgroundLoop, keep_trying
from worker.claimer import Claimer
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.keeper import ALIVE_SECONDS, MAX_ATTEMPTS, Keeper
from worker.leases import Leases
from worker.publisher import Finished, Publisher
from worker.sequence import Sequence
from worker.summary import StepSummary

log = structlog.get_logger()

#: Seconds for which a worker that was asked to end goes on with what runs; what is left then is
#: handed back. docker-compose.yml gives it longer than that before it is killed.
DRAIN_SECONDS = 20.0

#: Seconds for which an idle worker waits for work before it looks whether it should end.
_IDLE_WAIT = 0.1

#: Seconds for the last results to reach Redis.
_FLUSH_SECONDS = 10.0


class Worker:
    """Claims, runs and publishes until it is asked to end."""

    def __init__(self, config: WorkerConfig, engine: Engine, redis_url: str) -> None:
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self._config = config
        self._engine = engine
        self._started = time.time()
        # Each thread has a connection of its own: a slow reply to one does not delay another.
        queues = [JobQueue(connect(redis_url, config.queue), config.queue) for _ in range(5)]
        self._queue, claim_queue, publish_queue, keep_queue, follow_queue = queues
        self._leases = Leases(
            # A few more than can run, so that the next ones are ready when others finish.
            max_jobs=config.running_limit + max(4, config.running_limit // 8),
            max_adapters=config.max_loras_per_batch,
            pinned=lambda: engine.adapters.pinned_names,
        )
        engine.adapters.in_use = self._leases.adapters
        self._publisher = Publisher(publish_queue, self.id, self._leases, engine.tokenizer)
        self._claimer = Claimer(
            claim_queue,
            self.id,
            self._leases,
            self._publisher,
            engine.sequence_of,
            lambda: engine.resident,
            lease_seconds=config.lease_seconds,
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
        self._sequences: dict[str, tuple[Claim, Sequence]] = {}
        """By job id, from the engine's taking it in to its end."""
        self._summary = StepSummary(engine)
        self._stop_by: float | None = None
        self._failed = False

    def run(self) -> int:
        """Work until asked to stop, or, with --burst, until nothing is left; the exit status."""
        keep_trying(self._join, at="join")
        log.info("worker_ready", worker=self.id, queue=self._config.queue)
        for loop in (self._claim_loop, self._publish_loop, self._keep_loop, self._follow_loop):
            loop.start()
        try:
            while not self._failed and self._stop_by is None and not self._is_drained():
                self.step()
            self._drain()
        except Exception:
            log.exception("engine_failed")
            self._failed = True
        return self._end()

    def _join(self) -> None:
        """Become known to the queue, and serve what it wants; may be repeated."""
        if self._stop_by is not None:
            return  # Asked to end while Redis was away.
        self._follower.announce()
        self._follower.follow()
        self._keeper.report()

    def step(self) -> None:
        """One turn of the way of data: claims, sequences, batch, forward, tokens, results."""
        self._take_in(wait=0.0 if self._sequences else _IDLE_WAIT)
        for lease in self._keeper.take_lost():
            self._drop(lease)
        batch = self._engine.schedule()
        if batch:
            self._engine.launch(batch)
            self._summary.log_if_due(len(batch.adapters))
        for sequence in self._engine.collect(all_launched=batch is None):
            claim, _ = self._sequences.pop(sequence.job.id)
            self._publisher.publish(Finished(claim, sequence))

    def stop(self) -> None:
        """Ask for the end: once, and what runs may finish; twice, and it is handed back."""
        now = time.monotonic()
        self._stop_by = now + DRAIN_SECONDS if self._stop_by is None else now

    def _is_drained(self) -> bool:
        """Whether a worker in --burst has nothing left to do."""
        return self._config.burst and self._claimer.found_nothing

    def _drain(self) -> None:
        """Hand back what has not begun, and finish what has, as far as the time allows."""
        log.info("worker_stops", running=len(self._engine.scheduler.running))
        self._stop_claiming()
        while self._sequences and not self._failed and time.monotonic() < (self._stop_by or 0):
            self.step()
        self._hand_back(self._claims(), attempt_counts=False)

    def _end(self) -> int:
        self._stop_claiming()
        _stop(self._follow_loop)
        _stop(self._keep_loop)
        # What is left here ran when the engine failed, and may be to blame. The attempt counts, so
        # that no job goes round for ever.
        self._hand_back(self._claims(), attempt_counts=True)
        deadline = time.monotonic() + _FLUSH_SECONDS
        while len(self._leases) and self._publish_loop.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        _stop(self._publish_loop)
        try:
            self._queue.leave(self.id)
        except redis.RedisError as error:
            log.warning("redis_away", at="leave", error=str(error))
        log.info("worker_ended", worker=self.id, batches=self._engine.counters.batches)
        return 1 if self._failed else 0

    def _take_in(self, *, wait: float = 0.0) -> None:
        """Move claimed jobs into the engine; if there are none, wait up to so many seconds."""
        for claim, sequence in self._claimer.take(wait=wait):
            # A job that was lost and claimed again may still run under its former lease.
            if former := self._sequences.get(sequence.job.id):
                self._drop(former[0].lease)
            self._sequences[sequence.job.id] = claim, sequence
            self._engine.add(sequence)

    def _stop_claiming(self) -> None:
        """Claim no more, and hand back what has not begun."""
        _stop(self._claim_loop)
        self._take_in()
        waiting = [claim for claim, s in self._sequences.values() if not s.has_begun]
        self._hand_back(waiting, attempt_counts=False)

    def _claims(self) -> list[Claim]:
        return [claim for claim, _ in self._sequences.values()]

    def _hand_back(self, claims: list[Claim], *, attempt_counts: bool) -> None:
        leases = [claim.lease for claim in claims]
        for lease in leases:
            self._drop(lease)
        self._leases.remove(leases)
        if not leases:
            return
        try:
            again, given_up = self._queue.release(
                self.id, leases, attempt_counts=attempt_counts, max_attempts=MAX_ATTEMPTS
            )
            log.info("jobs_handed_back", waiting_again=again, given_up=given_up)
        except redis.RedisError as error:
            log.warning("redis_away", at="hand back; the leases will expire", error=str(error))

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
        return WorkerState(
            id=self.id,
            model=str(self._config.model_path),
            device=engine.device.type,
            started=self._started,
            adapters=engine.adapters.revisions,
            resident=engine.resident,
            pinned=sorted(engine.adapters.pinned_names),
            desired_version=self._follower.version,
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


def _stop(loop: BackgroundLoop) -> None:
    loop.stop()
    if loop.is_alive():
        loop.join()
