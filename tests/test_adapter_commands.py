"""The scripts that change the desired state, against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from redis import ResponseError

from broker.desired_state import RETIRE_LIMIT
from broker.job_queue import JobQueue
from broker.queue_reader import QueueReader
from broker.scripts import script_text
from schemas.adapter import AdapterRecord, AdapterVersion
from schemas.errors import LorryError, TooManyPinned
from schemas.worker_state import AdapterCounts, WorkerState
from tests.test_job_queue import claim, jobs, join, keys_left, result, submit


class Control:
    """Hears what is published about the desired state."""

    def __init__(self, queue: JobQueue) -> None:
        self._pubsub: Any = queue.client.pubsub()
        self._pubsub.subscribe(queue.keys.control)
        self._pubsub.get_message(timeout=5)

    def heard(self) -> list[int]:
        """The versions told since the last call."""
        messages = iter(lambda: self._pubsub.get_message(timeout=0.05), None)
        return [int(message["data"]) for message in messages]

    def close(self) -> None:
        self._pubsub.close()


@pytest.fixture
def control(queue: JobQueue) -> Iterator[Control]:
    with closing(Control(queue)) as control:
        yield control


def announced(source: str = "/sql", revision: str = "r1", *, pinned: bool = False) -> AdapterRecord:
    return AdapterRecord(source=source, revision=revision, pinned=pinned)


def record(queue: JobQueue, name: str = "sql") -> AdapterRecord:
    return queue.desired_state()[1][name]


def test_a_queue_that_nobody_has_joined_desires_nothing(queue: JobQueue) -> None:
    assert queue.desired_state() == (0, {})


def test_an_announced_adapter_is_desired_as_its_worker_has_it(
    queue: JobQueue, control: Control
) -> None:
    assert queue.announce({"sql": announced(pinned=True), "json": announced("/json")}) == 1
    version, records = queue.desired_state()
    assert version == 1
    assert records == {
        "json": AdapterRecord(source="/json", revision="r1", version=1),
        "sql": AdapterRecord(source="/sql", revision="r1", pinned=True, version=1),
    }
    assert control.heard() == [1]


def test_a_second_worker_that_announces_the_same_changes_nothing(
    queue: JobQueue, control: Control
) -> None:
    queue.announce({"sql": announced()})
    assert control.heard() == [1]
    assert queue.announce({"sql": announced(pinned=True)}) == 1
    assert queue.announce({}) == 1
    assert record(queue) == AdapterRecord(source="/sql", revision="r1", version=1)
    assert control.heard() == []


def test_other_weights_announced_from_the_same_source_are_a_replacement(queue: JobQueue) -> None:
    queue.announce({"sql": announced(pinned=True), "json": announced("/json")})
    assert queue.announce({"sql": announced(revision="r2"), "json": announced("/json")}) == 2
    assert record(queue) == AdapterRecord(source="/sql", revision="r2", pinned=True, version=2)
    assert record(queue, "json").version == 1


def test_an_adapter_announced_from_another_source_leaves_the_record_alone(queue: JobQueue) -> None:
    queue.set_adapter("sql", "/new", pinned=False)
    queue.adopt_revision("sql", 1, "r9")
    assert queue.announce({"sql": announced("/old")}) == 1
    assert record(queue) == AdapterRecord(source="/new", revision="r9", version=1)


def test_a_load_that_nobody_has_read_replaces_what_a_worker_announces(queue: JobQueue) -> None:
    queue.set_adapter("sql", "/gone", pinned=False)
    expected = AdapterRecord(
        source="/gone", version=2, previous=AdapterVersion(source="/own", revision="r1")
    )
    for source in ("/own", "/other worker's"):
        assert queue.announce({"sql": announced(source)}) == 2
        assert record(queue) == expected


def test_an_announcement_does_not_say_what_a_load_has_just_asked_for(queue: JobQueue) -> None:
    """The announcing worker may have read the folder before it was changed and loaded again."""
    queue.announce({"sql": announced()})
    version = queue.set_adapter("sql", "/sql", pinned=False)
    assert queue.announce({"sql": announced()}) == version
    assert record(queue).revision is None
    assert queue.adopt_revision("sql", version, "r2") == "r2"


def test_an_announcement_does_not_end_an_unloading(queue: JobQueue) -> None:
    queue.announce({"sql": announced()})
    queue.unload_adapter("sql", "drain")
    queue.announce({"sql": announced(revision="r2")})
    assert record(queue).unloading == "drain"
    assert record(queue).revision == "r2"


def test_a_load_is_told_to_the_workers_and_to_be_read_by_them(
    queue: JobQueue, control: Control
) -> None:
    assert queue.set_adapter("sql", "/a b/ü", pinned=True) == 1
    assert record(queue) == AdapterRecord(source="/a b/ü", pinned=True, version=1)
    assert control.heard() == [1]


def test_a_second_load_of_a_name_is_to_be_read_again(queue: JobQueue) -> None:
    queue.set_adapter("sql", "/sql", pinned=False)
    queue.adopt_revision("sql", 1, "r1")
    assert queue.set_adapter("sql", "/sql", pinned=False) == 2
    assert record(queue) == AdapterRecord(
        source="/sql", version=2, previous=AdapterVersion(source="/sql", revision="r1")
    )


@pytest.mark.parametrize("source", ["/sql", "/other", "hf:acme/sql"])
def test_a_load_keeps_a_pin_and_makes_none(queue: JobQueue, source: str) -> None:
    def load(name: str) -> bool:
        if source.startswith("/"):
            queue.set_adapter(name, source, pinned=False)
        else:
            id_ = queue.request_fetch(name, f"fetch-{name}", source, pinned=False)
            queue.publish_fetch(name, id_, f"{source}@{'0' * 40}", "r2")
        return record(queue, name).pinned

    queue.announce({"sql": announced(), "json": announced()})
    queue.pin_adapter("sql", True)
    assert load("sql")
    assert not load("json")
    queue.unload_adapter("sql", "drain")
    assert not load("sql")  # Whether it is gone already or still has jobs.
    queue.pin_adapter("sql", True)
    queue.pin_adapter("sql", False)
    assert not load("sql")


@pytest.mark.parametrize("later", ["the same", "another repository", "a folder"])
def test_a_load_keeps_the_pin_that_was_asked_for_with_a_fetch_under_way(
    queue: JobQueue, later: str
) -> None:
    queue.request_fetch("sql", "first", "hf:acme/sql", pinned=True)
    if later == "a folder":
        queue.set_adapter("sql", "/sql", pinned=False)
    else:
        source = "hf:acme/sql" if later == "the same" else "hf:acme/other"
        id_ = queue.request_fetch("sql", "second", source, pinned=False)
        assert id_ == ("first" if later == "the same" else "second")
        queue.publish_fetch("sql", id_, f"{source}@{'0' * 40}", "r1")
    assert record(queue).pinned


def test_a_request_for_a_pin_pins_what_is_being_fetched_already(queue: JobQueue) -> None:
    queue.request_fetch("sql", "first", "hf:acme/sql", pinned=False)
    assert queue.request_fetch("sql", "second", "hf:acme/sql", pinned=True) == "first"
    queue.publish_fetch("sql", "first", f"hf:acme/sql@{'0' * 40}", "r1")
    assert record(queue).pinned


@pytest.mark.parametrize("pinned", [True, False])
def test_what_was_said_last_of_a_pin_holds_whenever_a_fetch_is_over(
    queue: JobQueue, pinned: bool
) -> None:
    queue.announce({"sql": announced(pinned=not pinned)})
    queue.request_fetch("sql", "first", "hf:acme/sql", pinned=not pinned)
    queue.pin_adapter("sql", pinned)
    queue.publish_fetch("sql", "first", f"hf:acme/sql@{'0' * 40}", "r1")
    assert record(queue).pinned is pinned


def test_no_more_are_pinned_than_the_caller_allows_by_whatever_command(
    queue: JobQueue, control: Control
) -> None:
    queue.announce({name: announced(pinned=name < "c") for name in "abcd"})
    assert control.heard() == [1]
    before = queue.desired_state()
    for pin in (
        lambda: queue.pin_adapter("c", True, max_pinned=2),
        lambda: queue.set_adapter("c", "/c", pinned=True, max_pinned=2),
        lambda: queue.set_adapter("new", "/new", pinned=True, max_pinned=2),
        lambda: queue.request_fetch("new", "f", "hf:acme/new", pinned=True, max_pinned=2),
    ):
        with pytest.raises(TooManyPinned) as refused:
            pin()
        assert refused.value.pinned == ["a", "b"]
    assert queue.desired_state() == before
    assert queue.client.hgetall(queue.keys.fetches) == {}
    assert control.heard() == []
    assert queue.pin_adapter("unknown", True, max_pinned=2) is None
    assert queue.pin_adapter("a", True, max_pinned=1) == 1, "it is pinned already"
    queue.set_adapter("b", "/other", pinned=True, max_pinned=1)
    queue.set_adapter("new", "/new", pinned=False, max_pinned=0)
    queue.pin_adapter("c", True, max_pinned=3)
    queue.pin_adapter("d", True)


def test_a_pin_that_comes_with_a_fetch_counts_until_that_has_failed(queue: JobQueue) -> None:
    queue.announce({"sql": announced()})
    queue.request_fetch("hub", "f", "hf:acme/hub", pinned=True, max_pinned=1)
    with pytest.raises(TooManyPinned) as refused:
        queue.pin_adapter("sql", True, max_pinned=1)
    assert refused.value.pinned == ["hub"]
    queue.fail_fetch("hub", "f", "no such repository")
    assert queue.pin_adapter("sql", True, max_pinned=1) == 2


def test_a_damaged_request_keeps_no_adapter_from_being_loaded(queue: JobQueue) -> None:
    queue.client.hset(queue.keys.fetches, "sql", "{")
    queue.set_adapter("sql", "/sql", pinned=False)
    assert record(queue).source == "/sql"


def test_what_was_read_last_stays_on_record_until_its_replacement_was_read(
    queue: JobQueue, control: Control
) -> None:
    queue.announce({"sql": announced()})
    for version, source in enumerate(("/gone", "/gone too"), start=2):
        assert queue.set_adapter("sql", source, pinned=False) == version
        assert record(queue).previous == AdapterVersion(source="/sql", revision="r1")
    assert control.heard() == [1, 2, 3]
    assert queue.adopt_revision("sql", 3, "r2") == "r2"
    assert record(queue) == AdapterRecord(source="/gone too", revision="r2", version=3)
    assert control.heard() == [4]
    assert queue.adopt_revision("sql", 3, "r2") == "r2"
    assert control.heard() == []


def test_a_load_ends_an_unloading(queue: JobQueue) -> None:
    queue.announce({"sql": announced()})
    queue.unload_adapter("sql", "drain")
    queue.set_adapter("sql", "/sql", pinned=False)
    assert record(queue).unloading is None
    assert queue.retire_adapter("sql") is False


def test_pinning_changes_neither_the_weights_nor_what_is_to_be_read(
    queue: JobQueue, control: Control
) -> None:
    queue.announce({"sql": announced()})
    assert queue.pin_adapter("sql", True) == 2
    assert record(queue) == AdapterRecord(source="/sql", revision="r1", pinned=True, version=1)
    assert queue.pin_adapter("sql", True) == 2
    assert queue.pin_adapter("sql", False) == 3
    assert record(queue) == AdapterRecord(source="/sql", revision="r1", version=1)
    assert control.heard() == [1, 2, 3]


def test_a_pin_keeps_a_missing_revision_missing(queue: JobQueue) -> None:
    queue.set_adapter("sql", "/sql", pinned=False)
    queue.pin_adapter("sql", True)
    assert record(queue) == AdapterRecord(source="/sql", pinned=True, version=1)


def test_an_unknown_name_cannot_be_changed(queue: JobQueue, control: Control) -> None:
    queue.announce({"sql": announced()})
    assert control.heard() == [1]
    assert queue.pin_adapter("sqll", True) is None
    assert queue.unload_adapter("sqll", "drain") is None
    assert queue.adopt_revision("sqll", 1, "r1") is None
    assert queue.retire_adapter("sqll") is False
    assert queue.desired_state()[0] == 1
    assert control.heard() == []


def test_the_first_revision_that_was_read_is_adopted_and_told_to_the_others(
    queue: JobQueue, control: Control
) -> None:
    queue.set_adapter("sql", "/sql", pinned=False)
    assert control.heard() == [1]
    assert queue.adopt_revision("sql", 1, "r1") == "r1"
    assert queue.adopt_revision("sql", 1, "r2") == "r1"
    assert record(queue) == AdapterRecord(source="/sql", revision="r1", version=1)
    assert queue.desired_state()[0] == 1
    assert control.heard() == []


def test_what_was_read_before_another_load_is_not_adopted(queue: JobQueue) -> None:
    queue.set_adapter("sql", "/sql", pinned=False)
    queue.set_adapter("sql", "/other", pinned=False)
    assert queue.adopt_revision("sql", 1, "r1") is None
    assert record(queue).revision is None
    assert queue.adopt_revision("sql", 2, "r2") == "r2"


def test_every_change_raises_the_version_by_one(queue: JobQueue) -> None:
    versions = [
        queue.announce({}),
        queue.announce({"sql": announced()}),
        queue.set_adapter("json", "/json", pinned=False),
        queue.pin_adapter("sql", True),
        queue.unload_adapter("sql", "drain"),
        queue.unload_adapter("sql", "force"),
    ]
    queue.retire_adapter("sql")
    versions.append(queue.desired_state()[0])
    assert versions == [1, 2, 3, 4, 5, 6, 7]


def test_an_adapter_without_jobs_is_retired_at_once(queue: JobQueue, control: Control) -> None:
    join(queue)
    assert control.heard() == [1]
    assert queue.retire_adapter("a") is False
    queue.unload_adapter("a", "drain")
    assert queue.retire_adapter("a") is True
    assert queue.retire_adapter("a") is False
    version, records = queue.desired_state()
    assert (version, sorted(records)) == (3, ["b", "c"])
    assert control.heard() == [2, 3]


def test_a_draining_adapter_is_retired_once_its_jobs_have_ended(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(3, "a"))
    (first,) = claim(queue, 1)
    queue.unload_adapter("a", "drain")
    assert queue.retire_adapter("a") is False
    rest = claim(queue)
    assert len(rest) == 2
    assert queue.retire_adapter("a") is False
    queue.commit("w", [(job.lease, result(job)) for job in (first, *rest)])
    assert queue.retire_adapter("a") is True
    assert reader.submission("sub").counts["done"] == 3
    assert keys_left(queue) == set()


def test_force_fails_what_waits_and_lets_end_what_runs(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(4, "a"))
    running = claim(queue, 1)
    queue.unload_adapter("a", "force")
    assert queue.retire_adapter("a") is False
    counts = reader.submission("sub").counts
    assert (counts["failed"], counts["running"], counts["waiting"]) == (3, 1, 0)
    assert queue.retire_adapter("a") is False
    assert queue.commit("w", [(job.lease, result(job)) for job in running]) == [True]
    assert queue.retire_adapter("a") is True
    assert reader.submission("sub").is_complete
    assert keys_left(queue) == set()


def test_a_job_failed_by_force_says_why_and_tells_whoever_waits(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(1, "a"), "first")
    submit(queue, jobs(1, "a"), "second")
    queue.unload_adapter("a", "force")
    assert queue.retire_adapter("a") is True
    (failed,) = reader.results(["job-a-0"])
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "adapter_unloaded"
    assert failed.error.message == "adapter a was unloaded by force while the job waited"
    assert failed.timings.finished is not None
    for submission in ("first", "second"):
        assert reader.submission(submission).counts["failed"] == 1
        (finished,) = reader.finished({submission: "0"})
        assert finished.job_ids == ["job-a-0"]


def test_force_leaves_the_jobs_of_other_adapters_alone(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    for name in ("a", "b"):
        submit(queue, jobs(2, name), f"sub-{name}")
    queue.unload_adapter("a", "force")
    queue.retire_adapter("a")
    assert reader.submission("sub-b").counts["waiting"] == 2
    assert [job.adapter for job in claim(queue)] == ["b", "b"]


def test_a_running_job_that_comes_back_after_force_is_failed_by_the_next_retirement(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    submit(queue, jobs(1, "a"))
    (job,) = claim(queue)
    queue.unload_adapter("a", "force")
    assert queue.retire_adapter("a") is False
    queue.release("w", [job.lease])
    assert queue.retire_adapter("a") is True
    assert reader.submission("sub").counts["failed"] == 1
    assert queue.commit("w", [(job.lease, result(job))]) == [False]
    assert keys_left(queue) == set()


def test_a_long_backlog_is_failed_piece_by_piece(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    submit(queue, jobs(2 * RETIRE_LIMIT + 1, "a"))
    queue.unload_adapter("a", "force")
    assert [queue.retire_adapter("a") for _ in range(3)] == [False, False, True]
    assert reader.submission("sub").counts["failed"] == 2 * RETIRE_LIMIT + 1


def test_a_drain_may_be_changed_into_force(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    submit(queue, jobs(1, "a"))
    queue.unload_adapter("a", "drain")
    queue.unload_adapter("a", "force")
    assert queue.retire_adapter("a") is True
    assert reader.submission("sub").counts["failed"] == 1


def test_a_job_sent_to_an_adapter_that_has_just_gone_is_claimed_so_that_it_fails(
    queue: JobQueue,
) -> None:
    join(queue, "w", ("a",))
    queue.unload_adapter("a", "force")
    queue.retire_adapter("a")
    submit(queue, jobs(1, "a"))
    join(queue, "other", ("b",))
    assert len(claim(queue, worker="other", free_slots=0)) == 1


def test_the_adapter_can_be_loaded_again_after_it_was_retired(queue: JobQueue) -> None:
    join(queue, "w", ("a",))
    queue.unload_adapter("a", "drain")
    queue.retire_adapter("a")
    assert queue.set_adapter("a", "/a", pinned=False) == 4
    submit(queue, jobs(1, "a"))
    assert len(claim(queue)) == 1


def test_a_damaged_record_is_an_error_that_names_it(queue: JobQueue) -> None:
    queue.client.hset(queue.keys.adapters, "sql", '{"source": 7}')
    with pytest.raises(LorryError, match="The record of adapter 'sql' is damaged: source: "):
        queue.desired_state()


def test_the_state_of_an_older_worker_can_be_read(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    key = queue.keys.worker("old")
    queue.client.zadd(queue.keys.workers, {"old": 1})
    queue.client.hset(
        key,
        "state",
        '{"id": "old", "model": "m", "device": "cpu", "started": 0, "adapters": {"sql": "r"},'
        ' "max_loras_per_batch": 8}',
    )
    state = next(worker for worker in reader.workers() if worker.id == "old")
    assert (state.desired_version, state.adapter_errors, state.adapter_counts) == (0, {}, {})


def test_a_worker_reports_what_each_adapter_has_done(queue: JobQueue, reader: QueueReader) -> None:
    counts = AdapterCounts(requests=2, output_tokens=30, loads=1, load_seconds=0.25)
    state = WorkerState(
        id="w",
        model="m",
        device="cpu",
        started=0,
        adapters={"sql": "r1"},
        max_loras_per_batch=8,
        desired_version=3,
        adapter_errors={"json": "there is no folder /json"},
        adapter_counts={"sql": counts},
    )
    queue.heartbeat(state, alive_seconds=60)
    assert reader.workers() == [state]


def test_the_state_of_many_adapters_holds_no_more_than_has_happened(
    queue: JobQueue, reader: QueueReader
) -> None:
    names = [f"adapter-{number}" for number in range(10_000)]
    read = AdapterCounts().model_copy(update={"loads": 1, "load_seconds": 0.5})
    state = WorkerState(
        id="w",
        model="m",
        device="cpu",
        started=0,
        adapters=dict.fromkeys(names, "r" * 16),
        in_memory=None,
        adapter_counts=dict.fromkeys(names, read),
        max_loras_per_batch=8,
    )
    queue.heartbeat(state, alive_seconds=60)
    assert reader.workers() == [state]
    text: Any = queue.client.hget(queue.keys.worker("w"), "state")
    assert '"in_memory":null,' in text
    assert '"adapter-0":{"loads":1,"load_seconds":0.5}' in text
    assert len(text) < 90 * len(names)


def test_a_program_in_another_language_needs_the_scripts_alone(
    queue: JobQueue, control: Control
) -> None:
    """As docs/wire-contract.md tells it."""

    def run(script: str, *args: str) -> Any:
        return queue.client.eval(script_text(script), 1, f"{{{queue.name}}}:", *args)

    assert run("set_adapter", "sql", "/adapters/sql", "0") == 1
    assert run("change_adapter", "sql", "pin") == 2
    assert record(queue) == AdapterRecord(source="/adapters/sql", pinned=True, version=1)
    assert run("change_adapter", "sql", "unpin") == 3
    assert run("change_adapter", "sql", "drain") == 4
    assert record(queue).unloading == "drain"
    assert run("change_adapter", "sqll", "force") is None
    with pytest.raises(ResponseError, match="no such change: delete"):
        run("change_adapter", "sql", "delete")
    assert control.heard() == [1, 2, 3, 4]
