"""Threads that read adapters: how many, and what of a source that does not answer."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from threading import Event, Lock
from typing import TypeVar

import pytest
import torch

from benchmarks.waiting import wait_until
from worker.adapters.readers import READERS, Readers

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@pytest.fixture
def answer() -> Iterator[Event]:
    """Until it is set, sources that hang do."""
    event = Event()
    yield event
    event.set()


def take(readers: Readers[K, T], *, wait: float = 30) -> tuple[K, T | Exception] | None:
    read = readers.first(wait=wait)
    readers.done()
    return read


def take_all(readers: Readers[K, T]) -> dict[K, T | Exception]:
    found = {}
    while readers.keys:
        if read := take(readers):
            found[read[0]] = read[1]
    return found


def test_so_many_are_read_at_a_time_and_each_once() -> None:
    readers, lock, num_reading, most = Readers[str, str](), Lock(), 0, 0

    def read() -> str:
        nonlocal num_reading, most
        with lock:
            num_reading += 1
            most = max(most, num_reading)
        time.sleep(0.02)
        with lock:
            num_reading -= 1
        return "weights"

    def fail() -> str:
        raise ValueError("read twice")

    for name in "abcde":
        readers.want(name, read)
        readers.want(name, fail)
    assert sorted(readers.keys) == list("abcde")
    assert take_all(readers) == dict.fromkeys("abcde", "weights")
    assert most == READERS


def test_no_more_is_read_ahead_than_is_read_at_a_time() -> None:
    readers, num_read = Readers[str, str](), list[str]()
    for name in "abcde":
        readers.want(name, lambda name=name: num_read.append(name) or name)  # type: ignore[misc]
    wait_until(lambda: not any(thread.is_alive() for thread in readers.threads))
    assert sorted(num_read) == ["a", "b"]
    assert take(readers)
    assert len(take_all(readers)) == 4


def test_what_was_read_stays_wanted_until_it_is_done_with() -> None:
    readers = Readers[str, str]()
    readers.want("a", lambda: "weights")
    for _ in range(2):
        assert readers.first(wait=30) == ("a", "weights")
        assert readers.keys == ["a"]
    readers.done()
    assert readers.keys == []


def test_why_something_could_not_be_read_is_handed_over() -> None:
    readers, error = Readers[str, str](), ValueError("for a reason")

    def fail() -> str:
        raise error

    readers.want("a", fail)
    assert take(readers) == ("a", error)
    assert take(readers, wait=0) is None


def test_one_whose_source_hangs_keeps_its_thread_and_takes_that_of_no_other(
    answer: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = Readers[str, str]()

    def hang() -> str:
        answer.wait(60)
        return "late"

    for name in ("hangs", "hangs too"):
        readers.want(name, hang)
    readers.want("a", lambda: "weights")
    assert take(readers, wait=0.1) is None
    monkeypatch.setattr("worker.adapters.readers.LATE_SECONDS", 0.05)
    assert take(readers) == ("a", "weights")
    assert readers.keys == ["hangs", "hangs too"]
    answer.set()
    assert take_all(readers) == {"hangs": "late", "hangs too": "late"}


def test_sources_that_hang_take_so_many_threads_and_no_more(
    answer: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.adapters.readers.LATE_SECONDS", 0.0)
    readers = Readers[int, bool]()
    for number in range(20):
        readers.want(number, lambda: answer.wait(60))
    assert len(readers.threads) == 8


def test_they_compute_alone_and_leave_others_the_threads_they_had() -> None:
    readers, before = Readers[str, int](), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        readers.want("a", torch.get_num_threads)
        assert take(readers) == ("a", 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_of_one_place_one_is_read_at_a_time_and_what_is_outdated_not_at_all(answer: Event) -> None:
    readers = Readers[str, bool](place_of=lambda key: key[0])
    for key in ("a1", "a2", "a3", "b1"):
        readers.want(key, answer.is_set if key == "b1" else lambda: answer.wait(60))
    assert take(readers) == ("b1", False)
    assert readers.keys == ["a2", "a3", "a1"]
    assert [readers.began(key) is None for key in ("a1", "a2")] == [False, True]
    readers.drop(lambda key: key in ("a1", "a2"))
    assert readers.keys == ["a3", "a1"]  # What is under way is not dropped.
    answer.set()
    assert take_all(readers) == {"a1": True, "a3": True}
