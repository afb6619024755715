"""What a worker knows of the jobs it holds."""

from __future__ import annotations

from broker.claims import Claim, Lease
from worker.leases import Leases


def claim(number: int, adapter: str | None = "a") -> Claim:
    """One delivery of the same job."""
    return Claim(Lease("job", number), adapter, "{}", 1, "sub", 0, 0, 0)


def leases(max_jobs: int = 4) -> Leases:
    return Leases(max_jobs=max_jobs, max_adapters=2)


def test_a_job_that_is_claimed_again_is_held_once_under_its_new_lease() -> None:
    held = leases()
    held.add([claim(1)])
    held.add([claim(2)])
    assert held.held() == [Lease("job", 2)]
    assert held.request(()).num_jobs == 3
    held.remove([Lease("job", 2)])
    assert held.request(()).in_use == []


def test_removing_a_former_lease_leaves_the_new_one() -> None:
    held = leases()
    held.add([claim(1)])
    held.add([claim(2)])
    assert held.remove([Lease("job", 1)]) == set()
    assert held.held() == [Lease("job", 2)]
    assert held.remove([Lease("job", 2)]) == {Lease("job", 2)}
    assert len(held) == 0


def test_who_knows_what_is_pinned_may_ask_for_what_is_held() -> None:
    """The registry does, from another thread, while it holds a lock of its own."""
    leases = Leases(max_jobs=2, max_adapters=2, pinned=lambda: leases.adapters())
    assert leases.request(()).in_use == []
    assert leases.drain_for("starving") is None


def test_a_job_that_goes_and_a_bound_that_grows_make_room_for_a_claim() -> None:
    held = leases()
    held.add([claim(1)])
    held.remove([Lease("job", 2)])
    held.limit(3)
    assert not held.may_claim.is_set(), "there is no more room than before"
    held.remove([Lease("job", 1)])
    assert held.may_claim.is_set()
    held.may_claim.clear()
    held.limit(4)
    assert held.may_claim.is_set()


def test_what_is_held_of_an_adapter_that_is_read_takes_no_room_from_others() -> None:
    held = Leases(max_jobs=4, max_adapters=2)
    held.add([Claim(Lease(f"a{i}", 1), "a", "{}", 1, "sub", 0, 0, 0) for i in range(3)])
    held.add([Claim(Lease("b0", 1), "b", "{}", 1, "sub", 0, 0, 0)])
    assert held.request(()).num_jobs == 0
    request = held.request((), being_read=["a", "gone"])
    assert request.num_jobs == 3
    assert request.free_slots == 0
    assert request.in_use == ["a", "b", "gone"]
    assert request.draining == ["a", "gone"]


def test_jobs_of_adapters_that_are_read_take_no_room_while_fewer_are_held() -> None:
    held = Leases(max_jobs=4, max_adapters=2)
    held.add([Claim(Lease(f"a{i}", 1), "a", "{}", 1, "", 0, 0, 0) for i in range(4)])
    held.limit(1)
    assert held.request((), being_read=["a"]).num_jobs == 1


def test_no_more_than_twice_as_many_jobs_are_held_while_adapters_are_read() -> None:
    held = Leases(max_jobs=4, max_adapters=2)
    for name in "ab":
        held.add([Claim(Lease(f"{name}{i}", 1), name, "{}", 1, "", 0, 0, 0) for i in range(4)])
    assert held.request((), being_read=["a"]).num_jobs == 0
    assert held.request((), being_read=["a", "b"]).num_jobs == 0
