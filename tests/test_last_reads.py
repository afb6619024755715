"""Which batches a load into the slots must wait for."""

from __future__ import annotations

from worker.adapters.last_reads import LastReads


def test_nobody_reads_what_was_never_used() -> None:
    reads = LastReads[str](64, 8)
    reads.note(0, 32, "a batch")
    assert reads.of(32, 32) == set()


def test_the_last_reader_of_a_place_counts() -> None:
    reads = LastReads[str](64, 8)
    reads.note(8, 8, "a batch")
    reads.note(8, 8, "the next")
    assert reads.of(8, 8) == {"the next"}


def test_a_large_place_waits_for_the_readers_of_all_its_parts() -> None:
    reads = LastReads[str](64, 8)
    reads.note(0, 8, "one")
    reads.note(8, 16, "another")
    reads.note(32, 8, "a third")
    assert reads.of(0, 32) == {"one", "another"}


def test_a_small_place_in_a_large_one_waits_for_the_large_ones_reader() -> None:
    reads = LastReads[str](64, 8)
    reads.note(0, 64, "a batch")
    reads.note(0, 8, "the next")
    assert reads.of(16, 8) == {"a batch"}
    assert reads.of(0, 8) == {"the next"}
