"""Random lives of adapters while sequences run: the real registry, slots, scheduler and batches."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.errors import BadInput, JobError
from schemas.job import Job
from tests.test_adapter_registry import load, pin
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

NUM_SLOTS = 2
NAMES = "abcdef"

#: Two names are read from one folder, and share an adapter while they are of one revision.
FOLDERS = {**dict(zip(NAMES, NAMES, strict=True)), "f": "a"}

#: Steps after which every sequence must have ended that came before them.
STEPS_TO_END = 400


class Memory(AdapterLoader):
    """Adapters of any rank, without factors; a folder's revision is how often it was trained."""

    trained: dict[str, int]

    def __init__(self) -> None:
        self.__dict__["trained"] = dict.fromkeys(NAMES, 0)

    def load(self, name: str, folder: Path) -> Adapter:
        # Some take half a slot, so that two of them share one.
        rank = MAX_RANK // (1 + NAMES.index(folder.name) % 2)
        return Adapter(name, str(folder), self.revision(folder), rank, {})

    def revision(self, folder: Path) -> str:
        if folder.name not in self.trained:
            raise BadInput(f"there is no folder {folder}.")
        return f"{folder.name} {self.trained[folder.name]}"


class Worker:
    """What a worker has of its adapters, without a model."""

    def __init__(self, max_loaded: int, policy: str) -> None:
        self.memory = Memory()
        self.registry = AdapterRegistry(self.memory, max_loaded=max_loaded, policy=policy)
        self.slots = AdapterSlots(
            MODEL,
            num_slots=NUM_SLOTS,
            max_rank=MAX_RANK,
            target_modules=frozenset(),
            device=torch.device("cpu"),
            dtype=torch.float32,
            policy=policy,
        )
        self.scheduler = Scheduler(
            PagePool(12), max_running=6, max_prefill_tokens=24, max_adapters=NUM_SLOTS
        )
        self.residency = AdapterResidency(self.registry, self.slots, self.scheduler)
        self.registry.in_use = lambda: {s.job.lora or "" for s in self.sequences}
        self.sequences: list[Sequence] = []
        """The first of each job."""
        self.num_jobs = 0
        self.versions = count(1)
        self.pinned: set[str] = set()

    def load(self, name: str) -> None:
        load(self.registry, name, Path("/memory") / FOLDERS[name], next(self.versions))

    def replace(self, name: str) -> None:
        self.change(name)
        self.load(name)

    def change(self, name: str) -> None:
        """Other weights come where the adapter is read from, which nobody loads."""
        self.memory.trained[FOLDERS[name]] += 1

    def fail(self, name: str) -> None:
        """A replacement that cannot be read: what is served stays."""
        before = self.registry.known(name)
        self.registry.refuse(name, next(self.versions), "for a reason")
        assert self.registry.known(name) is before

    def unload(self, name: str) -> None:
        self.registry.keep_only(self.registry.revisions.keys() - {name})
        self.unpin(name)

    def pin(self, name: str) -> None:
        if len(self.pinned) < NUM_SLOTS - 1:
            self.pinned.add(name)
            pin(self.registry, self.pinned)

    def unpin(self, name: str) -> None:
        self.pinned.discard(name)
        pin(self.registry, self.pinned)

    def submit(self, name: str) -> None:
        """A job for one or two answers; it fails at once if its adapter is not served, or was
        evicted and has changed since."""
        known, reason, adapter = self.registry.known(name), "", None
        try:
            adapter = self.registry.get(name)
        except JobError as error:
            reason = error.message
        if known is None or adapter is None:
            assert known is None or f"({known.revision}); load it again" in reason
            assert known is None or known.revision != self.memory.revision(Path(FOLDERS[name]))
            return
        assert adapter.revision == known.revision
        self.num_jobs += 1
        number = NAMES.index(name)
        ids = [1] * (1 + 5 * number)
        job = Job(id=f"{self.num_jobs}", lora=name, prompt_token_ids=ids, n=1 + number % 2)
        first = Sequence(job, ids, 3 + number, adapter)
        first.others = [
            Sequence(job, ids, 4 + number, adapter, index=index, first=first)
            for index in range(1, job.n)
        ]
        self.sequences.append(first)
        for sequence in first.answers:
            self.scheduler.add(sequence)

    def cancel(self, name: str) -> None:
        for first in self.sequences:
            if first.job.lora == name:
                for sequence in first.answers:
                    self.scheduler.finish(sequence)
                break
        self._drop_finished()

    def step(self) -> None:
        pinned = self.slots.pinned & frozenset(self.registry.pinned)
        places = {adapter: self.slots.first_rank(adapter) for adapter in pinned}
        self.residency.follow()
        assert pinned <= self.slots.pinned
        self.check_pinned()
        scheduled = self.scheduler.schedule()
        if scheduled:
            self.check(build_batch(scheduled, self.slots))
        assert all(map(self.has_slot, self.slots.pinned))
        assert all(self.slots.first_rank(adapter) == place for adapter, place in places.items())
        for sequence, num_rows, _ in scheduled:
            sequence.num_cached += num_rows
            if sequence.num_cached == sequence.num_tokens:
                sequence.output_ids.append(1)
                if len(sequence.output_ids) == sequence.max_new_tokens:
                    self.scheduler.finish(sequence)
        self._drop_finished()

    def _drop_finished(self) -> None:
        self.sequences = [
            first
            for first in self.sequences
            if any(sequence.phase is not Phase.FINISHED for sequence in first.answers)
        ]

    def has_slot(self, adapter: Adapter) -> bool:
        return adapter in self.slots._first_ranks

    def check_pinned(self) -> None:
        """Who is pinned has a slot, or gets the next that is free."""
        pinned = self.registry.pinned
        served = self.pinned & self.registry.revisions.keys()
        assert served & set(self.registry.evicted_pins) <= self.registry.errors.keys()
        assert all(map(self.has_slot, self.slots.pinned))
        loaded = self.registry.loaded
        assert len({adapter.revision for adapter in loaded}) == len(loaded)
        if not all(self.has_slot(adapter) for adapter in pinned):
            # Sequences hold the slots that are left, and had them when it was pinned.
            assert len(self.scheduler.adapters_in_use.union(pinned)) > NUM_SLOTS

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


def first_rows(batch: Batch) -> list[int]:
    rows, row = [], 0
    for item in batch.scheduled:
        rows.append(row)
        row += item.num_rows
    return rows


#: Mostly jobs and steps, so that adapters ask again and again for slots that others are pinned in.
ACTIONS = (
    *("load", "load", "replace", "change", "fail", "unload"),
    *("pin", "pin", "unpin", "cancel"),
    *("submit",) * 5,
    *("step",) * 7,
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(NUM_SLOTS, len(NAMES)),
    st.sampled_from(["lru", "fifo"]),
    # Left to itself, hypothesis makes traces of five actions.
    st.lists(st.tuples(st.sampled_from(ACTIONS), st.sampled_from(NAMES)), min_size=40, max_size=80),
)
def test_whatever_happens_to_adapters_no_batch_mixes_them_and_every_job_ends(
    max_loaded: int, policy: str, trace: list[tuple[str, str]]
) -> None:
    worker = Worker(max_loaded, policy)
    for action, name in trace:
        if action == "step":
            worker.step()
        else:
            getattr(worker, action)(name)
    for _ in range(STEPS_TO_END):
        if not worker.sequences:
            break
        worker.step()
    worker.step()
    assert not worker.sequences
    assert worker.scheduler.pool.num_used == 0
    # Nothing is held that is not served any more.
    assert set(worker.slots._first_ranks) <= worker.registry.loaded
    assert worker.pinned & worker.registry.revisions.keys() <= (
        set(worker.registry.names_of(worker.slots.resident)) | worker.registry.errors.keys()
    )
    worker.registry.keep_only(())
    worker.step()
    assert worker.slots.resident == []
    assert worker.registry.loaded == frozenset()
