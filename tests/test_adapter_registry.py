"""Adapters in host memory: which are there, which come back, and what is never mixed up."""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier

import pytest
import torch
from structlog.testing import capture_logs

from schemas.errors import BadInput, JobError
from worker.adapters.at_start import load_registry
from worker.adapters.loader import AdapterLoader
from worker.adapters.peft_format import Adapter
from worker.adapters.registry import AdapterRegistry, KnownAdapter
from worker.adapters.sources import FoundAdapter
from worker.config import WorkerConfig


class TextLoader(AdapterLoader):
    """An adapter's files are one text file here, and its revision is that text."""

    num_read: Counter[str]

    def __init__(self) -> None:
        self.__dict__["num_read"] = Counter()

    def load(self, name: str, folder: Path) -> Adapter:
        self.num_read[name] += 1
        return Adapter(name, str(folder), self.revision(folder), rank=1, factors={})

    def check(self, folder: Path) -> None:  # type: ignore[override]
        self.revision(folder)

    def revision(self, folder: Path) -> str:
        try:
            return (folder / "weights").read_text()
        except OSError as error:
            raise BadInput(f"there is no folder {folder}.") from error


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abcde":
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(f"first {name}")
    return tmp_path


def registry(folder: Path, names: str, **limits: object) -> AdapterRegistry:
    made = AdapterRegistry(TextLoader(), **limits)  # type: ignore[arg-type]
    for version, name in enumerate(names, start=1):
        load(made, name, folder / name, version)
    return made


def load(known: AdapterRegistry, name: str, source: Path, version: int) -> None:
    """Read an adapter and serve it, as a worker does at its start."""
    known.serve(name, known.read(name, source, version))


def pin(known: AdapterRegistry, names: Iterable[str]) -> None:
    """Pin adapters, and read those of them that were evicted, as a worker does."""
    known.pin(names)
    for name in known.evicted_pins:
        with suppress(JobError):
            known.get(name)


def loaded(known: AdapterRegistry) -> str:
    return "".join(sorted(adapter.name for adapter in known.loaded))


def num_read(known: AdapterRegistry, name: str) -> int:
    assert isinstance(known.loader, TextLoader)
    return known.loader.num_read[name]


# --- Room in host memory ------------------------------------------------------------------------


def test_the_least_recently_used_adapter_makes_room(folder: Path) -> None:
    known = registry(folder, "abc", max_loaded=3)
    known.get("a")
    load(known, "d", folder / "d", 4)
    assert loaded(known) == "acd"
    assert set(known.revisions) == set("abcd")
    assert known.counts["b"].evictions == 1


def test_by_fifo_the_first_one_loaded_makes_room(folder: Path) -> None:
    known = registry(folder, "abc", max_loaded=3, policy="fifo")
    known.get("a")
    load(known, "d", folder / "d", 4)
    assert loaded(known) == "bcd"


def test_those_in_memory_are_named_where_some_are_not(folder: Path) -> None:
    known = registry(folder, "abc", max_loaded=3)
    assert known.in_memory is None
    load(known, "d", folder / "d", 4)
    assert known.in_memory == ["b", "c", "d"]
    known.forget("a")
    assert known.in_memory is None


def test_what_leaves_a_slot_for_good_was_not_evicted(folder: Path) -> None:
    known = registry(folder, "abc", max_loaded=3)
    replaced, unloaded, evicted = (known.get(name) for name in "abc")
    assert replaced
    assert unloaded
    assert evicted
    for adapter in (replaced, unloaded, evicted):
        known.count_in_slot(adapter, loads=1)
    (folder / "a" / "weights").write_text("second a")
    load(known, "a", folder / "a", 5)
    known.keep_only("ac")
    for adapter in (replaced, unloaded, evicted):
        known.count_in_slot(adapter, evictions=1)
    slots = {name: (c.slot_loads, c.slot_evictions) for name, c in known.counts.items()}
    assert slots == {"a": (1, 0), "c": (1, 1)}


def test_names_of_the_same_files_share_an_adapter_until_one_is_replaced(folder: Path) -> None:
    known = registry(folder, "ab")
    prepared: list[Adapter] = []
    known.prepare = prepared.append
    load(known, "twin", folder / "a", 3)
    shared = known.get("a")
    assert shared
    assert known.get("twin") is shared
    assert prepared == []  # Its weights are laid out already.
    assert sorted(known.names_of([shared])) == ["a", "twin"]
    known.count_in_slot(shared, loads=1)
    assert [known.counts[name].slot_loads for name in ("a", "b", "twin")] == [1, 0, 1]
    (folder / "a" / "weights").write_text("second a")
    load(known, "twin", folder / "a", 4)
    assert known.get("a") is shared
    assert known.get("twin") is not shared
    assert known.names_of([shared]) == ["a"]
    known.forget("twin")
    load(known, "a", folder / "a", 5)
    assert known.names_of([shared]) == []


def test_files_that_two_threads_read_at_once_under_two_names_are_kept_once(folder: Path) -> None:
    known = registry(folder, "")
    reads = [known.read(name, folder / "a", 1) for name in ("a", "twin")]
    for name, read in zip(("a", "twin"), reads, strict=True):
        known.serve(name, read)
    assert reads[0].adapter is not reads[1].adapter
    assert known.get("a") is known.get("twin") is reads[0].adapter


def test_what_is_loaded_again_while_a_job_holds_it_is_the_same(folder: Path) -> None:
    known = registry(folder, "a")
    held = known.get("a")
    known.forget("a")
    load(known, "a", folder / "a", 2)
    assert known.get("a") is held


def test_adapters_in_use_and_pinned_ones_stay(folder: Path) -> None:
    known = registry(folder, "abc", max_loaded=3)
    known.in_use = lambda: ["a"]
    known.pin("b")
    load(known, "d", folder / "d", 4)
    assert loaded(known) == "abd"


def test_while_all_are_in_use_there_is_one_too_many_until_the_next_load(folder: Path) -> None:
    known = registry(folder, "ab", max_loaded=2)
    known.in_use = lambda: ["a", "b"]
    load(known, "c", folder / "c", 3)
    assert loaded(known) == "abc"
    known.in_use = list
    load(known, "d", folder / "d", 4)
    assert loaded(known) == "cd"


def test_an_evicted_adapter_comes_back_with_the_same_revision(folder: Path) -> None:
    known = registry(folder, "ab", max_loaded=1)
    assert loaded(known) == "b"
    adapter = known.get("a")
    assert adapter is not None
    assert adapter.revision == "first a"
    assert loaded(known) == "a"
    assert num_read(known, "a") == 2


def test_an_evicted_adapter_that_a_sequence_still_holds_is_not_read_again(folder: Path) -> None:
    known = registry(folder, "a", max_loaded=1)
    held = known.get("a")
    load(known, "b", folder / "b", 2)
    assert known.get("a") is held
    assert num_read(known, "a") == 1


def test_an_evicted_adapter_whose_files_changed_fails_its_jobs_with_both_revisions(
    folder: Path,
) -> None:
    known = registry(folder, "ab", max_loaded=1)
    (folder / "a" / "weights").write_text("second a")
    with pytest.raises(JobError, match=r"another revision now \(second a\).*\(first a\)") as error:
        known.get("a")
    assert error.value.code == "adapter_unavailable"


def test_an_evicted_adapter_whose_files_are_gone_fails_its_jobs(folder: Path) -> None:
    known = registry(folder, "ab", max_loaded=1)
    (folder / "a" / "weights").unlink()
    with pytest.raises(JobError, match="adapter 'a': there is no folder"):
        known.get("a")


def test_that_an_evicted_adapter_cannot_come_back_is_told_until_it_does(folder: Path) -> None:
    known = registry(folder, "ab", max_loaded=1)
    weights = folder / "a" / "weights"
    for content in ("second a", None):
        weights.write_text(content) if content else weights.unlink()
        with pytest.raises(JobError) as error:
            known.get("a")
        assert error.value.message == f"adapter 'a': {known.errors['a']}"
        # It is no load that failed: the desired state was followed.
        assert known.seen_version("a") == 1
    weights.write_text("first a")
    assert known.get("a")
    assert known.errors == {}


def test_an_evicted_adapter_whose_reading_fails_as_nobody_foresaw_fails_its_jobs(
    folder: Path,
) -> None:
    known = registry(folder, "ab", max_loaded=1)
    (folder / "a" / "weights").write_bytes(b"\xff")  # The loader of these tests reads text.
    with capture_logs() as logs, pytest.raises(JobError) as error:
        known.get("a")
    reason = "reading it failed (UnicodeDecodeError); the worker's log has the traceback."
    assert (error.value.code, error.value.message) == (
        "adapter_unavailable",
        f"adapter 'a': {reason}",
    )
    assert known.errors == {"a": reason}
    assert logs[0]["event"] == "adapter_reading_failed"
    assert logs[0]["exc_info"]
    assert known.get("b")


def test_a_reason_is_kept_as_it_can_be_written_and_read(folder: Path) -> None:
    known = registry(folder, "")
    known.refuse("a", 1, "half of one: \ud800,\n\x1b[31m " + "x" * 3_000_000)
    reason = known.errors["a"]
    assert reason.startswith("half of one: \\ud800, \\x1b[31m xxx")
    assert len(reason) == 500
    assert reason.endswith("x...")


def test_what_could_not_come_back_and_is_loaded_again_or_forgotten_is_told_no_more(
    folder: Path,
) -> None:
    known = registry(folder, "abc", max_loaded=1)
    for name in "ab":
        (folder / name / "weights").write_text("changed")
        with pytest.raises(JobError):
            known.get(name)
    load(known, "a", folder / "a", 4)
    known.forget("b")
    assert known.errors == {}


def test_an_evicted_adapter_that_is_pinned_comes_back(folder: Path) -> None:
    known = registry(folder, "abc", max_loaded=2)
    assert loaded(known) == "bc"
    known.pin("a")
    assert known.pinned == []
    assert known.evicted_pins == ["a"]
    known.get("a")
    assert [adapter.name for adapter in known.pinned] == ["a"]
    assert loaded(known) == "ac"


def test_an_evicted_adapter_that_is_pinned_and_has_gone_is_told(folder: Path) -> None:
    known = registry(folder, "ab", max_loaded=1)
    (folder / "a" / "weights").unlink()
    pin(known, "a")
    assert known.errors == {"a": f"there is no folder {folder / 'a'}."}
    assert known.pinned == []


def test_what_came_back_is_no_longer_told_as_unavailable_once_it_is_loaded_again(
    folder: Path,
) -> None:
    known = registry(folder, "ab", max_loaded=1)
    weights = (folder / "a" / "weights").rename(folder / "kept")
    with pytest.raises(JobError):
        known.get("a")
    assert "a" in known.errors
    weights.rename(folder / "a" / "weights")
    known.accept("a", 9)  # Another worker was first to read it.
    assert known.errors == {}
    assert known.get("a")


def test_an_adapter_unloaded_while_it_is_read_again_does_not_come_back(folder: Path) -> None:
    known = registry(folder, "ab", max_loaded=1)
    known.prepare = lambda adapter: known.keep_only({"b"})
    assert known.get("a")
    assert known.get("a") is None
    assert loaded(known) == "b"


# --- Loading again, refusing, forgetting --------------------------------------------------------


def test_loading_unchanged_files_again_reads_nothing(folder: Path) -> None:
    known = registry(folder, "a")
    before = known.get("a")
    load(known, "a", folder / "a", 7)
    assert known.get("a") is before
    assert num_read(known, "a") == 1
    assert known.seen_version("a") == 7


def test_loading_changed_files_again_is_a_replacement(folder: Path) -> None:
    known = registry(folder, "a")
    before, generation = known.get("a"), known.generation
    (folder / "a" / "weights").write_text("second a")
    load(known, "a", folder / "a", 7)
    after = known.get("a")
    assert after is not before
    assert after is not None
    assert after.revision == "second a"
    assert known.loaded == {after}
    assert known.generation > generation


def test_what_is_served_stays_while_its_replacement_cannot_be_read(folder: Path) -> None:
    known = registry(folder, "a")
    before = known.get("a")
    with pytest.raises(BadInput, match="there is no folder"):
        known.read("a", folder / "gone", 7)
    known.refuse("a", 7, "for a reason")
    assert known.get("a") is before
    assert known.errors == {"a": "for a reason"}
    assert known.seen_version("a") == 7
    known.forget("a")
    assert known.get("a") is None
    assert known.seen_version("a") == 7


def test_a_load_after_a_refusal_serves_the_name_again(folder: Path) -> None:
    known = registry(folder, "")
    known.refuse("a", 3, "for a reason")
    load(known, "a", folder / "a", 4)
    assert known.errors == {}
    assert known.get("a")


def test_forgotten_names_are_unknown(folder: Path) -> None:
    known = registry(folder, "ab")
    known.refuse("c", 3, "for a reason")
    known.keep_only({"b"})
    assert known.get("a") is None
    assert known.revisions == {"b": "first b"}
    assert known.errors == {}
    assert loaded(known) == "b"


def test_counts_go_with_their_names(folder: Path) -> None:
    known = registry(folder, "ab")
    for name in "ab":
        known.count(name, output_tokens=5)
    known.keep_only({"b"})
    known.count("a", output_tokens=7)  # It ran when its adapter was unloaded.
    assert {name: c.output_tokens for name, c in known.counts.items()} == {"b": 5}
    load(known, "a", folder / "a", 3)
    assert (known.counts["a"].loads, known.counts["a"].requests) == (1, 0)


def test_what_was_replaced_or_unloaded_a_hundred_times_leaves_nothing_in_memory(
    folder: Path,
) -> None:
    known = registry(folder, "b", max_loaded=2)
    held = []
    for number in range(100):
        (folder / "a" / "weights").write_text(f"a {number}")
        load(known, "a", folder / "a", number)
        adapter = known.get("a")
        assert adapter
        held.append(weakref.ref(adapter))
        if number % 3 == 0:
            known.keep_only({"b"})
    del adapter
    gc.collect()
    assert [number for number, ref in enumerate(held) if ref()] == []
    assert loaded(known) == "b"
    assert set(known.counts) == {"b"}
    assert len(known._alive) == 1


def test_only_known_names_count_as_pinned(folder: Path) -> None:
    known = registry(folder, "a")
    known.pin(name for name in "az")
    assert known.pinned_names == {"a"}
    assert [adapter.name for adapter in known.pinned] == ["a"]


def test_a_replacement_of_which_no_weights_were_read_leaves_no_former_ones(folder: Path) -> None:
    known = registry(folder, "ab", max_loaded=2)
    before, generation = known.get("a"), known.generation
    (folder / "a" / "weights").write_text("second a")
    known.serve("a", known.check(KnownAdapter("a", folder / "a", "second a", 7)))
    assert loaded(known) == "b"
    assert known.generation > generation
    assert known.seen_version("a") == 7
    after = known.get("a")
    assert after is not before
    assert after is not None
    assert after.revision == "second a"


# --- Several threads ----------------------------------------------------------------------------


class MeetingLoader(TextLoader):
    """Reads an adapter only while another one is read."""

    def __init__(self, readers: int) -> None:
        super().__init__()
        self.__dict__["meeting"] = Barrier(readers)

    def load(self, name: str, folder: Path) -> Adapter:
        self.__dict__["meeting"].wait(timeout=60)
        return super().load(name, folder)


def test_reading_one_adapter_does_not_wait_for_another(folder: Path) -> None:
    known = AdapterRegistry(MeetingLoader(2))
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda name: load(known, name, folder / name, 1), "ab"))
    assert loaded(known) == "ab"


def test_two_threads_that_want_an_adapter_read_it_once(folder: Path) -> None:
    known = registry(folder, "ab", max_loaded=1)
    start = Barrier(8)

    def get(_: int) -> Adapter | None:
        start.wait(timeout=60)
        return known.get("a")

    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(get, range(8)))
    assert len(found) == 1
    assert num_read(known, "a") == 2  # At first, and after its eviction.


def test_the_first_adapter_that_cannot_be_served_is_named(folder: Path) -> None:
    found = [FoundAdapter(name, name, folder / name, pinned=False) for name in ("a", "x", "y")]
    config = WorkerConfig(model_path=folder)
    with pytest.raises(BadInput, match="--lora-paths x: there is no folder"):
        load_registry(config, found, TextLoader())


class FirstIsSlow(TextLoader):
    def load(self, name: str, folder: Path) -> Adapter:
        if name == "a":
            time.sleep(0.3)
        return super().load(name, folder)


def test_adapters_of_the_command_line_come_in_its_order_however_long_each_takes(
    folder: Path,
) -> None:
    found = [FoundAdapter(name, name, folder / name, pinned=False) for name in "abcd"]
    config = WorkerConfig(
        model_path=folder,
        max_loaded_loras=2,
        max_loras_per_batch=2,
        lora_eviction_policy="fifo",
    )
    assert loaded(load_registry(config, found, FirstIsSlow())) == "cd"


def test_reading_them_leaves_torch_its_threads(folder: Path) -> None:
    before = torch.get_num_threads()
    found = [FoundAdapter(name, name, folder / name, pinned=False) for name in "ab"]
    load_registry(WorkerConfig(model_path=folder), found, TextLoader())
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(torch.get_num_threads).result() == before


def test_adapters_of_the_command_line_are_pinned_as_it_says(folder: Path) -> None:
    found = [FoundAdapter(name, name, folder / name, pinned=name == "a") for name in "abc"]
    config = WorkerConfig(model_path=folder, max_loaded_loras=2, max_loras_per_batch=2)
    known = load_registry(config, found, TextLoader())
    assert [adapter.name for adapter in known.pinned] == ["a"]
    assert set(known.revisions) == set("abc")
    assert loaded(known) == "ac"


def test_a_fault_that_nobody_foresaw_in_an_adapter_of_the_command_line_is_told_as_such(
    folder: Path,
) -> None:
    class Faulty(TextLoader):
        def load(self, name: str, folder: Path) -> Adapter:
            raise ZeroDivisionError

    found = [FoundAdapter("a", "a", folder / "a", pinned=False)]
    with pytest.raises(BadInput, match=r"--lora-paths a: reading it failed \(ZeroDivisionError\)"):
        load_registry(WorkerConfig(model_path=folder), found, Faulty())
