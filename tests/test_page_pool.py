"""The page pool: owners, shared prefixes, and what goes first when room is needed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.page_pool import PagePool, prefix_keys

A, B, C = b"a", b"b", b"c"


def test_no_more_pages_are_handed_out_than_are_free() -> None:
    with pytest.raises(ValueError, match="3 pages asked for, 2 free"):
        PagePool(2).allocate(3)


def test_a_named_page_is_found_while_it_has_an_owner_and_after() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.name(pages[0], A)
    assert pool.find([A, B]) == pages[:1]
    pool.free(pages)
    assert (pool.find([A, B]), pool.num_free) == (pages[:1], 3)


def test_a_prefix_with_a_gap_is_found_up_to_the_gap() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.name(pages[0], A)
    pool.name(pages[1], C)
    assert pool.find([A, B, C]) == pages[:1]


def test_a_shared_page_is_free_once_its_last_owner_has_given_it_back() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.name(pages[0], A)
    pool.share(pool.find([A]))
    pool.free(pages)
    assert pool.num_used == 1
    pool.free(pages)
    assert pool.num_used == 0


def test_the_longest_unused_page_makes_room_and_of_a_prefix_its_end() -> None:
    pool = PagePool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    for page, key in zip(first + second, [b"1", b"2", b"3", b"4"], strict=True):
        pool.name(page, key)
    pool.free(first)
    pool.free(second)
    assert pool.allocate(1) == [first[1]]
    assert pool.find([b"1", b"2"]) == first[:1]
    assert pool.allocate(1) == [first[0]]
    assert pool.allocate(1) == [second[1]]
    assert pool.find([b"3", b"4"]) == second[:1]


def test_a_page_in_use_again_is_not_evicted() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.name(pages[0], A)
    pool.free(pages)
    pool.share(pool.find([A]))
    assert pool.num_free == 1
    assert pool.allocate(1) != pages


def test_the_first_page_of_two_with_one_prefix_is_the_one_that_is_found() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.name(first[0], A)
    pool.name(second[0], A)
    assert pool.find([A]) == first
    pool.free(second)
    assert pool.allocate(1) == second  # It was nobody's prefix, and went before the other.


def test_nothing_is_found_after_all_was_forgotten_and_nothing_is_lost() -> None:
    pool = PagePool(3)
    kept, freed = pool.allocate(1), pool.allocate(1)
    pool.name(kept[0], A)
    pool.name(freed[0], B)
    pool.free(freed)
    pool.forget()
    assert pool.find([A]) == pool.find([B]) == []
    pool.free(kept)
    assert sorted(pool.allocate(3)) == [0, 1, 2]


token_ids = st.lists(st.integers(0, 200_000), max_size=40)


@given(token_ids, token_ids, st.integers(1, 5))
@settings(deadline=None, database=None)
def test_keys_are_equal_for_equal_beginnings_and_for_no_others(
    some: list[int], others: list[int], page_size: int
) -> None:
    others = some[: len(others)] + others  # Else hardly any would begin alike.
    keys, other_keys = (prefix_keys("r", ids, page_size) for ids in (some, others))
    assert len(keys) == len(some) // page_size
    for place, (key, other) in enumerate(zip(keys, other_keys, strict=False), start=1):
        end = place * page_size
        assert (key == other) == (some[:end] == others[:end])


def test_keys_of_another_revision_and_of_the_base_model_differ() -> None:
    keys = [prefix_keys(revision, [1, 2], 2)[0] for revision in (None, "", "r", "base")]
    assert len(set(keys)) == 4


class Pools(RuleBasedStateMachine):
    """A pool beside a plain account of who owns what, and what was named."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(5)
        self.owners: list[list[int]] = []
        self.contents: dict[int, bytes] = {}
        """Of named pages; a page that is handed out loses them."""

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        if count <= self.pool.num_free:
            pages = self.pool.allocate(count)
            owned = {page for owner in self.owners for page in owner}
            assert len(set(pages)) == count
            assert not owned & set(pages)
            self.owners.append(pages)
            for page in pages:
                self.contents.pop(page, None)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data(), key=st.sampled_from([A, B, C]))
    def name(self, data: st.DataObject, key: bytes) -> None:
        page = data.draw(st.sampled_from([page for owner in self.owners for page in owner]))
        self.pool.name(page, key)
        if key not in self.contents.values():
            self.contents.setdefault(page, key)

    @rule(keys=st.permutations([A, B, C]), count=st.integers(0, 3))
    def share(self, keys: list[bytes], count: int) -> None:
        found = self.pool.find(keys[:count])
        left = self.pool.num_free_without(found)
        assert [self.contents[page] for page in found] == keys[: len(found)]
        assert len(found) == count or keys[len(found)] not in self.contents.values()
        self.pool.share(found)
        self.owners.append(found)
        assert self.pool.num_free == left

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.contents.clear()

    @invariant()
    def counts_add_up(self) -> None:
        owned = {page for owner in self.owners for page in owner}
        assert self.pool.num_used == len(owned)
        assert self.pool.num_free == 5 - len(owned)


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=60, deadline=None, database=None)


def test_new_pages_are_told_once() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    assert (pool.take_new(), pool.take_new()) == (pages, [])
    assert all(a != b for a, b in pairwise(sorted(pages)))
