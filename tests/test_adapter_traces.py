"""Random lives of adapters while sequences run: the real registry, slots, scheduler and batches."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.errors import BadInput
from schemas.job import Job
from tests.test_adapter_registry import load
from tests.test_adapter_slots import MAX_RANK, MODEL
from worker.adapters.loader import AdapterLoader
from worker.adapters.peft_format import Adapter
from worker.adapters.registry import AdapterRegistry
from worker.adapters.residency import AdapterResidency
from worker.adapters.slots import AdapterSlots
from worker.batch import Batch, build_batch
from worker.page_pool import PagePool
from worker.scheduler import Scheduler
from worker.sequence import Phase, Sequence

NUM_SLOTS = 3
NAMES = "abcdef"

#: Steps after which every sequence must have ended that came before them.
STEPS_TO_END = 400


class Memory(AdapterLoader):
    """Adapters of any rank, without factors; a folder's revision is how often it was trained."""

    trained: dict[str, int]

    def __init__(self) -> None:
        self.__dict__["trained"] = dict.fromkeys(NAMES, 0)

    def load(self, name: str, folder: Path) -> Adapter:
        rank = 1 + 7 * NAMES.index(folder.name) % MAX_RANK
        return Adapter(name, str(folder), self.revision(folder), rank, {})

    def revision(self, folder: Path) -> str:
        if folder.name not in self.trained:
            raise BadInput(f"there is no folder {folder}.")
        return f"{folder.name} {self.trained[folder.name]}"


class Worker:
    """What a worker has of its adapters, without a model."""

    def __init__(self, max_loaded: int) -> None:
        self.memory = Memory()
        self.registry = AdapterRegistry(self.memory, max_loaded=max_loaded)
        self.slots = AdapterSlots(
            MODEL,
            num_slots=NUM_SLOTS,
            max_rank=MAX_RANK,
            target_modules=frozenset(),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        self.scheduler = Scheduler(
            PagePool(12), max_running=6, max_prefill_tokens=24, max_adapters=NUM_SLOTS
        )
        self.residency = AdapterResidency(self.registry, self.slots, self.scheduler)
        self.registry.in_use = lambda: {s.adapter.name for s in self.sequences if s.adapter}
        self.sequences: list[Sequence] = []
        self.versions = count(1)
        self.pinned: set[str] = set()

    def load(self, name: str) -> None:
        load(self.registry, name, Path("/memory") / name, next(self.versions))

    def replace(self, name: str) -> None:
        self.memory.trained[name] += 1
        self.load(name)

    def fail(self, name: str) -> None:
        """A replacement that cannot be read: what is served stays."""
        before = self.registry.get(name)
        self.registry.refuse(name, next(self.versions), "for a reason")
        assert self.registry.get(name) is before

    def unload(self, name: str) -> None:
        self.registry.keep_only(self.registry.revisions.keys() - {name})
        self.unpin(name)

    def pin(self, name: str) -> None:
        if len(self.pinned) < NUM_SLOTS - 1:
            self.pinned.add(name)
            self.registry.pin(self.pinned)

    def unpin(self, name: str) -> None:
        self.pinned.discard(name)
        self.registry.pin(self.pinned)

    def submit(self, name: str) -> None:
        """Jobs for a name that is not served fail at once, and so do not come here."""
        if adapter := self.registry.get(name):
            ids = [1] * (1 + 5 * NAMES.index(name))
            job = Job(id=f"{len(self.sequences)}", lora=name, prompt_token_ids=ids)
            sequence = Sequence(job, ids, 3 + NAMES.index(name), adapter)
            self.sequences.append(sequence)
            self.scheduler.add(sequence)

    def cancel(self, name: str) -> None:
        for sequence in self.sequences:
            if sequence.job.lora == name and sequence.phase is not Phase.FINISHED:
                self.scheduler.finish(sequence)
                break
        self._drop_finished()

    def step(self) -> None:
        self.residency.follow()
        scheduled = self.scheduler.schedule()
        if scheduled:
            self.check(build_batch(scheduled, self.slots))
        for sequence, num_rows, _ in scheduled:
            sequence.num_cached += num_rows
            if sequence.num_cached == sequence.num_tokens:
                sequence.output_ids.append(1)
                if len(sequence.output_ids) == sequence.max_new_tokens:
                    self.scheduler.finish(sequence)
        self._drop_finished()

    def _drop_finished(self) -> None:
        self.sequences = [s for s in self.sequences if s.phase is not Phase.FINISHED]

    def check(self, batch: Batch) -> None:
        assert len(batch.adapters) <= NUM_SLOTS
        taken: set[int] = set()
        for adapter in batch.adapters:
            first = self.slots.first_rank(adapter)
            ranks = set(range(first, first + adapter.rank))
            assert not taken & ranks
            taken |= ranks
        for segment in batch.segments:
            owners = {
                item.sequence.adapter
                for item, row in zip(batch.scheduled, first_rows(batch), strict=True)
                if segment.first_row <= row < segment.end_row
            }
            assert len(owners) == 1
        if not self.residency._is_behind:
            assert {a.name for a in self.slots.pinned} <= set(self.slots.resident)


def first_rows(batch: Batch) -> list[int]:
    rows, row = [], 0
    for item in batch.scheduled:
        rows.append(row)
        row += item.num_rows
    return rows


ACTIONS = (
    "load",
    "replace",
    "fail",
    "unload",
    "pin",
    "unpin",
    "submit",
    "submit",
    "cancel",
    "step",
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(NUM_SLOTS, len(NAMES)),
    st.lists(st.tuples(st.sampled_from(ACTIONS), st.sampled_from(NAMES)), max_size=80),
)
def test_whatever_happens_to_adapters_no_batch_mixes_them_and_every_job_ends(
    max_loaded: int, trace: list[tuple[str, str]]
) -> None:
    worker = Worker(max_loaded)
    for action, name in trace:
        if action == "step":
            worker.step()
        else:
            getattr(worker, action)(name)
    for _ in range(STEPS_TO_END):
        worker.step()
    assert not worker.sequences
    assert worker.scheduler.pool.num_used == 0
    # Nothing is held that is not served any more.
    assert set(worker.slots._first_ranks) <= worker.registry.loaded
    assert worker.registry.pinned_names <= set(worker.slots.resident)
    worker.registry.keep_only(())
    worker.step()
    assert worker.slots.resident == []
    assert worker.registry.loaded == frozenset()
