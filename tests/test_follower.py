"""Workers' registries against the desired state on a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from itertools import count
from pathlib import Path
from threading import Event

import pytest
from structlog.testing import capture_logs

from benchmarks.waiting import wait_until
from broker.claims import ClaimRequest
from broker.job_queue import JobQueue
from schemas.adapter import AdapterRecord
from schemas.errors import BadInput, JobError
from schemas.job import Job
from tests.test_adapter_registry import TextLoader, load
from worker.adapters.follower import DesiredStateFollower
from worker.adapters.peft_config import CONFIG_FILE, WEIGHTS_FILE
from worker.adapters.peft_format import Adapter
from worker.adapters.readers import READERS
from worker.adapters.registry import AdapterRegistry


class Follower(DesiredStateFollower):
    """A worker's follower, with its registry at hand."""

    def __init__(self, queue: JobQueue, **settings: object) -> None:
        self.registry = AdapterRegistry(TextLoader())
        self.num_reports = 0
        super().__init__(
            queue,
            self.registry,
            **{  # type: ignore[arg-type]
                "is_enabled": True,
                "own_folders": (),
                "roots": (),
                "max_pinned": 7,
                "report": self._count_report,
                **settings,
            },
        )

    def load(self, name: str, source: Path | str, *, pinned: bool = False) -> None:
        """Follow a command to load an adapter."""
        self._queue.set_adapter(name, str(source), pinned=pinned)
        self.follow()

    def _count_report(self) -> None:
        self.num_reports += 1


MakeFollower = Callable[..., Follower]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in ("sql", "chat", "new"):
        (root / name).mkdir(parents=True)
        (root / name / "weights").write_text(f"{name} weights")
    return root


@pytest.fixture
def make_follower(queue: JobQueue, root: Path) -> MakeFollower:
    return lambda **settings: Follower(queue, **{"roots": (root,), **settings})


def record(queue: JobQueue, name: str) -> AdapterRecord:
    return queue.desired_state()[1][name]


# --- Load ---------------------------------------------------------------------------------------


def test_what_is_loaded_once_every_worker_has(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    first, second = make_follower(), make_follower()
    version = queue.set_adapter("sql", str(root / "sql"), pinned=False)
    first.follow()
    second.follow()
    later = make_follower()
    later.follow()
    for follower in (first, second, later):
        assert follower.registry.revisions == {"sql": "sql weights"}
        assert follower.version == version
        assert follower.num_reports == 1
    assert record(queue, "sql").revision == "sql weights"


def test_without_a_change_nothing_is_read_or_reported_again(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower()
    queue.set_adapter("sql", str(root / "sql"), pinned=False)
    for _ in range(3):
        follower.follow()
    assert follower.num_reports == 1


def test_the_records_are_read_when_their_version_changes_or_some_unload(
    queue: JobQueue, make_follower: MakeFollower, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_reads = count()
    read = queue.desired_state

    def counted() -> tuple[int, dict[str, AdapterRecord]]:
        next(num_reads)
        return read()

    monkeypatch.setattr(queue, "desired_state", counted)

    def reads_of_a_look() -> bool:
        before = next(num_reads)
        follower.follow()
        return next(num_reads) > before + 1

    follower = make_follower()
    queue.set_adapter("sql", str(root / "sql"), pinned=False)
    assert reads_of_a_look()
    assert not reads_of_a_look()
    queue.submit("sub", "file", 1, 0, [Job(id="job", prompt="x", lora="sql")])
    queue.unload_adapter("sql", "drain")
    assert reads_of_a_look()
    assert reads_of_a_look(), "a job of it is left, which may end without a change of the version"
    queue.cancel(["job"])
    follower.follow()
    assert read() == (follower.version, {})
    assert not reads_of_a_look()


def test_a_queue_that_lost_all_before_it_was_followed_is_told_again(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower(own_folders=(root / "sql",))
    load(follower.registry, "sql", root / "sql", 0)
    follower.announce()
    queue.client.delete(queue.keys.adapters, queue.keys.adapters_version)
    follower.follow()
    assert set(queue.desired_state()[1]) == {"sql"}


def test_a_turn_looks_when_it_is_told_or_when_it_is_time_to(
    make_follower: MakeFollower, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    now = [100.0]
    monkeypatch.setattr("worker.adapters.follower.time.monotonic", lambda: now[0])
    follower = make_follower()
    monkeypatch.setattr(follower, "_look", lambda: looks.append(now[0]) or False)
    told = iter([False, False, True, False])
    monkeypatch.setattr(follower, "_is_told", lambda: next(told))
    for moment in (100.0, 101.0, 101.5, 104.0):
        now[0] = moment
        follower.turn()
    assert looks == [100.0, 101.5, 104.0]


def test_a_load_of_other_weights_under_a_name_replaces_it(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower()
    follower.load("sql", root / "sql")
    follower.load("sql", root / "new")
    assert follower.registry.revisions == {"sql": "new weights"}
    assert record(queue, "sql").revision == "new weights"


def test_files_changed_in_place_are_served_once_they_are_loaded_again(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower()
    follower.load("sql", root / "sql")
    (root / "sql" / "weights").write_text("trained on")
    follower.follow()
    assert follower.registry.revisions == {"sql": "sql weights"}
    follower.load("sql", root / "sql")
    assert follower.registry.revisions == {"sql": "trained on"}


def test_a_worker_that_finds_other_files_than_the_first_one_refuses_them(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    first, second = make_follower(), make_follower()
    first.load("sql", root / "sql")
    (root / "sql" / "weights").write_text("another machine's")
    second.follow()
    assert second.registry.revisions == {}
    assert "holds revision another machine's here, and sql weights" in second.registry.errors["sql"]


# --- What commands may name ---------------------------------------------------------------------


def refusal(queue: JobQueue, follower: Follower, source: Path) -> str:
    follower.load("sql", source)
    assert follower.registry.revisions == {}
    return follower.registry.errors["sql"]


def test_a_folder_outside_the_roots_is_refused(
    queue: JobQueue, make_follower: MakeFollower, root: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "rooted"
    (root / "sql").rename(outside)
    (root / "link").symlink_to(outside)
    for source in (outside, root / "link", root / ".." / "rooted"):
        reason = refusal(queue, make_follower(), source)
        assert reason == f"{source} is not below --lora-root {root}."


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_that_leads_out_of_the_roots_is_not_read(
    queue: JobQueue, make_follower: MakeFollower, root: Path, tmp_path: Path, file: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("secret")
    (root / "sql" / file).symlink_to(elsewhere / "secret")
    assert refusal(queue, make_follower(), root / "sql") == (
        f"{root / 'sql' / file} leads out of --lora-root {root}, and is not read. Put the file"
        " itself there, or start the worker with the folder that holds it as a further root."
    )
    for settings in (
        {"roots": (root, elsewhere)},
        {"own_folders": [elsewhere]},
        {"own_folders": [root / "sql"]},
    ):
        follower = make_follower(**settings)
        follower.load("sql", root / "sql")
        assert follower.registry.revisions == {"sql": "sql weights"}, settings


def test_a_root_may_be_a_cache_of_the_hub_whose_files_are_links_within_it(
    make_follower: MakeFollower, root: Path
) -> None:
    blobs, snapshot = root / "models--acme--sql" / "blobs", root / "models--acme--sql/snapshots/1"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for file in (CONFIG_FILE, WEIGHTS_FILE, "weights"):
        (blobs / file).write_text("cached")
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    follower = make_follower()
    follower.load("sql", snapshot)
    assert follower.registry.revisions == {"sql": "cached"}


@pytest.mark.parametrize("name", ["a" * 300, "circle/sql", "a\0b"])
def test_a_path_that_no_system_can_look_up_is_refused_and_ends_no_worker(
    make_follower: MakeFollower, root: Path, name: str
) -> None:
    (root / "circle").symlink_to(root / "circle")
    follower = make_follower()
    follower.load("sql", root / "sql")
    follower.load("odd", f"{root}/{name}")
    assert follower.registry.revisions == {"sql": "sql weights"}
    assert follower.registry.errors.keys() == {"odd"}


def test_without_roots_commands_load_nothing(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    reason = refusal(queue, make_follower(roots=()), root / "sql")
    assert "started without --lora-root" in reason


def test_a_worker_without_adapters_says_so(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    reason = refusal(queue, make_follower(is_enabled=False), root / "sql")
    assert reason.startswith("this worker serves no adapters; start it with --enable-lora")


def test_a_folder_of_the_command_line_needs_no_root(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower(roots=(), own_folders=[root / "sql"])
    follower.load("sql", root / "sql")
    assert follower.registry.revisions == {"sql": "sql weights"}


def test_a_refused_adapter_leaves_the_others_alone_and_is_served_once_loaded_right(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower()
    queue.set_adapter("chat", str(root / "chat"), pinned=False)
    follower.load("sql", root / "gone")
    assert follower.registry.revisions == {"chat": "chat weights"}
    assert follower.registry.errors == {"sql": f"there is no folder {root / 'gone'}."}
    follower.load("sql", root / "sql")
    assert follower.registry.errors == {}
    assert set(follower.registry.revisions) == {"chat", "sql"}


def test_what_nobody_foresaw_in_reading_an_adapter_is_a_refusal_and_ends_no_worker(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower()
    queue.set_adapter("chat", str(root / "chat"), pinned=False)
    (root / "sql" / "weights").write_bytes(b"\xff")  # The loader of these tests reads text.
    with capture_logs() as logs:
        follower.load("sql", root / "sql")
    assert follower.registry.revisions == {"chat": "chat weights"}
    reason = "reading it failed (UnicodeDecodeError); the worker's log has the traceback."
    assert follower.registry.errors == {"sql": reason}
    (told,) = [entry for entry in logs if entry["event"] == "adapter_reading_failed"]
    assert (told["adapter"], told["exc_info"]) == ("sql", True)


# --- A replacement that fails -------------------------------------------------------------------


def replaced_by_nothing(queue: JobQueue, root: Path, *followers: Follower) -> None:
    """All serve `sql`, and then are told to load it from a folder that is not there."""
    queue.set_adapter("sql", str(root / "sql"), pinned=False)
    for follower in followers:
        follower.follow()
    queue.set_adapter("sql", str(root / "later"), pinned=False)
    for follower in followers:
        follower.follow()


def write_later(root: Path) -> None:
    (root / "later").mkdir()
    (root / "later" / "weights").write_text("later weights")


def test_a_failed_replacement_takes_nothing_out_of_service(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    workers = make_follower(), make_follower()
    replaced_by_nothing(queue, root, *workers)
    for worker in workers:
        assert worker.registry.revisions == {"sql": "sql weights"}
        assert worker.registry.errors == {"sql": f"there is no folder {root / 'later'}."}


def test_a_worker_that_starts_after_a_failed_replacement_serves_what_the_others_serve(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    replaced_by_nothing(queue, root, make_follower())
    bare, with_other_paths = make_follower(), make_follower(own_folders=[root / "new"])
    load(with_other_paths.registry, "sql", root / "new", version=0)
    for worker in (bare, with_other_paths):
        queue.announce(worker.registry.records)
        worker.follow()
        assert worker.registry.revisions == {"sql": "sql weights"}
        assert worker.registry.errors == {"sql": f"there is no folder {root / 'later'}."}


@pytest.mark.parametrize("content", ["trained on", None])
def test_what_was_replaced_in_vain_is_not_served_from_files_that_have_changed_or_gone(
    queue: JobQueue, make_follower: MakeFollower, root: Path, content: str | None
) -> None:
    replaced_by_nothing(queue, root, make_follower())
    weights = root / "sql" / "weights"
    weights.write_text(content) if content else weights.unlink()
    later = make_follower()
    later.follow()
    assert later.registry.revisions == {}
    assert later.registry.errors == {"sql": f"there is no folder {root / 'later'}."}


def test_an_adapter_that_is_loaded_anew_while_it_is_read_is_served_as_it_was_loaded_last(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower()
    reads = []

    def load_anew(adapter: Adapter) -> None:
        reads.append(adapter.revision)
        if len(reads) == 1:
            queue.set_adapter("sql", str(root / "new"), pinned=False)

    follower.registry.prepare = load_anew
    follower.load("sql", root / "sql")
    assert follower.registry.revisions == {}
    follower.follow()
    assert reads == ["sql weights", "new weights"]
    assert follower.registry.revisions == {"sql": "new weights"}
    assert record(queue, "sql").revision == "new weights"


def test_once_one_worker_has_read_the_replacement_none_serves_what_it_replaces(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    cannot, can = make_follower(roots=(root / "sql",)), make_follower()
    replaced_by_nothing(queue, root, cannot, can)
    write_later(root)
    other = make_follower()
    for worker in (other, can, cannot):
        worker.follow()
    assert other.registry.revisions == can.registry.revisions == {"sql": "later weights"}
    assert can.registry.errors == {}
    assert cannot.registry.revisions == {}
    assert "is not below --lora-root" in cannot.registry.errors["sql"]
    assert record(queue, "sql").previous is None


def test_a_load_that_follows_a_failed_one_still_replaces_what_is_served(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    worker = make_follower()
    replaced_by_nothing(queue, root, worker)
    worker.load("sql", root / "nowhere")
    assert worker.registry.revisions == {"sql": "sql weights"}
    worker.load("sql", root / "new")
    assert worker.registry.revisions == {"sql": "new weights"}
    assert worker.registry.errors == {}


def test_a_server_that_lost_everything_after_a_failed_replacement_is_told_what_is_served(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    worker = make_follower()
    replaced_by_nothing(queue, root, worker)
    queue.client.delete(queue.keys.adapters, queue.keys.adapters_version)
    worker.follow()
    assert record(queue, "sql").source == str(root / "sql")
    assert worker.registry.revisions == {"sql": "sql weights"}
    assert worker.registry.errors == {}


# --- From the hub -------------------------------------------------------------------------------

COMMIT = "0123456789" * 4


@pytest.fixture
def cached(cache: Path) -> Path:
    """The folder of ``acme/sql`` at ``COMMIT`` in the hub cache."""
    folder = cache / "models--acme--sql" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "weights").write_text("hub weights")
    return folder


def test_a_repository_of_a_named_owner_is_read_from_the_cache(
    queue: JobQueue, make_follower: MakeFollower, cached: Path
) -> None:
    follower = make_follower(hub_owners=["acme"])
    follower.load("sql", f"hf:acme/sql@{COMMIT}")
    assert follower.registry.revisions == {"sql": "hub weights"}
    assert follower.registry.records["sql"].source == f"hf:acme/sql@{COMMIT}"
    queue.pin_adapter("sql", True)
    follower.follow()
    assert follower.registry.loader.num_read["sql"] == 1  # type: ignore[attr-defined]


def test_a_repository_of_the_command_line_needs_no_owner(
    queue: JobQueue, make_follower: MakeFollower, cached: Path
) -> None:
    follower = make_follower(own_repositories=["acme/sql"])
    follower.load("sql", f"hf:acme/sql@{COMMIT}")
    assert follower.registry.revisions == {"sql": "hub weights"}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (f"hf:evil/sql@{COMMIT}", "evil is not among the worker's --hub-owners (acme)."),
        ("hf:acme/sql", "hf:acme/sql is not in the hub cache"),
        ("hf:acme/sql@main", "hf:acme/sql@main is not in the hub cache"),
        (f"hf:acme/sql@{'f' * 40}", "is not in the hub cache"),
        (f"hf:acme/other@{COMMIT}", "is not in the hub cache"),
        ("hf:acme/../../etc", "names no repository of the hub"),
        ("hf:acme/sql@../../../../etc", "names no repository of the hub"),
        ("hf:/etc", "names no repository of the hub"),
    ],
)
def test_what_is_not_cached_or_not_allowed_is_refused(
    queue: JobQueue, make_follower: MakeFollower, cached: Path, source: str, reason: str
) -> None:
    follower = make_follower(hub_owners=["acme"])
    follower.load("x", source)
    assert reason in follower.registry.errors["x"]
    assert follower.registry.revisions == {}


def test_the_cache_itself_cannot_be_loaded_as_a_folder(
    queue: JobQueue, make_follower: MakeFollower, cached: Path
) -> None:
    follower = make_follower(hub_owners=["acme"])
    assert "is not below --lora-root" in refusal(queue, follower, cached)


def test_what_a_worker_reads_is_what_the_fetcher_read(
    queue: JobQueue, make_follower: MakeFollower, cached: Path
) -> None:
    queue.request_fetch("sql", "fetch-1", "hf:acme/sql", pinned=False)
    queue.publish_fetch("sql", "fetch-1", f"hf:acme/sql@{COMMIT}", "other weights")
    follower = make_follower(hub_owners=["acme"])
    follower.follow()
    assert "holds revision hub weights here, and other weights" in follower.registry.errors["sql"]


def test_a_second_fetch_of_what_is_served_leaves_nothing_to_replace(
    queue: JobQueue, make_follower: MakeFollower, cached: Path
) -> None:
    follower = make_follower(hub_owners=["acme"])
    for number in range(2):
        id_ = queue.request_fetch("sql", f"fetch-{number}", "hf:acme/sql", pinned=False)
        queue.publish_fetch("sql", id_, f"hf:acme/sql@{COMMIT}", "hub weights")
        follower.follow()
        assert record(queue, "sql").previous is None
    assert follower.registry.loader.num_read["sql"] == 1  # type: ignore[attr-defined]


# --- The command line's adapters ----------------------------------------------------------------


def test_what_a_worker_was_started_with_is_announced_and_not_read_again(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower(own_folders=[root / "sql"])
    load(follower.registry, "sql", root / "sql", version=0)
    queue.announce(follower.registry.records)
    follower.follow()
    assert follower.registry.loader.num_read["sql"] == 1  # type: ignore[attr-defined]
    assert follower.registry.revisions == {"sql": "sql weights"}


def test_a_name_that_a_command_gave_other_weights_keeps_them_when_a_worker_starts(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    queue.set_adapter("sql", str(root / "new"), pinned=False)
    follower = make_follower(own_folders=[root / "sql"])
    load(follower.registry, "sql", root / "sql", version=0)
    queue.announce(follower.registry.records)
    follower.follow()
    assert follower.registry.revisions == {"sql": "new weights"}


def start_with(
    make_follower: MakeFollower, folder: Path, *, pinned: bool = False
) -> list[MutableMapping[str, object]]:
    """What a worker logs that joins the queue with an adapter `sql` on its command line."""
    follower = make_follower(own_folders=[folder])
    load(follower.registry, "sql", folder, version=0)
    follower.registry.pin(["sql"] if pinned else [])
    with capture_logs() as logs:
        follower.announce()
        follower.follow()
    return [entry for entry in logs if entry["event"] != "adapter_read"]


def test_a_worker_says_which_of_its_adapters_a_command_has_overruled(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    queue.set_adapter("sql", str(root / "new"), pinned=False)
    assert start_with(make_follower, root / "sql") == [
        {
            "event": "lora_path_overruled",
            "log_level": "warning",
            "adapter": "sql",
            "lora_path": str(root / "sql"),
            "desired_source": str(root / "new"),
            "unloading": None,
            "remedy": f"producer lora load sql {root / 'sql'}",
        }
    ]
    assert start_with(make_follower, root / "new") == []


def test_a_worker_says_that_one_of_its_adapters_is_not_pinned_as_it_was_told(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    def start_pinned() -> list[MutableMapping[str, object]]:
        return start_with(make_follower, root / "sql", pinned=True)

    (told,) = start_pinned()
    assert told["event"] == "adapter_announced"
    assert start_pinned() == []
    queue.pin_adapter("sql", False)
    assert start_pinned() == [
        {
            "event": "lora_path_not_pinned",
            "log_level": "warning",
            "adapter": "sql",
            "remedy": "producer lora pin sql",
        }
    ]
    assert not record(queue, "sql").pinned


def test_a_load_that_nobody_can_read_does_not_take_a_workers_own_adapter_out_of_service(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    other = make_follower()
    other.load("sql", root / "gone")
    assert other.registry.revisions == {}
    own = make_follower(own_folders=[root / "sql"])
    load(own.registry, "sql", root / "sql", version=0)
    own.announce()
    for worker in (own, other):
        worker.follow()
        assert worker.registry.revisions == {"sql": "sql weights"}
        assert worker.registry.errors == {"sql": f"there is no folder {root / 'gone'}."}


def test_a_worker_says_that_one_of_its_adapters_is_being_unloaded(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    queue.set_adapter("sql", str(root / "sql"), pinned=False)
    queue.submit("submission", "", 1, 0, [Job(id="one", lora="sql", prompt_token_ids=[1])])
    queue.unload_adapter("sql", "drain")
    (told,) = start_with(make_follower, root / "sql")
    assert (told["event"], told["unloading"]) == ("lora_path_overruled", "drain")
    assert record(queue, "sql").unloading == "drain"


def test_an_adapter_that_was_unloaded_comes_back_with_a_worker_started_with_it_which_says_so(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    other = make_follower()
    queue.set_adapter("sql", str(root / "sql"), pinned=False)
    queue.unload_adapter("sql", "drain")
    other.follow()
    assert queue.desired_state()[1] == {}
    (told,) = start_with(make_follower, root / "sql")
    assert (told["event"], told["source"]) == ("adapter_announced", str(root / "sql"))
    other.follow()
    assert other.registry.revisions == {"sql": "sql weights"}


def test_a_server_that_lost_everything_is_told_again(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower()
    follower.load("sql", root / "sql")
    queue.client.delete(queue.keys.adapters, queue.keys.adapters_version)
    follower.follow()
    assert record(queue, "sql").source == str(root / "sql")
    assert follower.registry.revisions == {"sql": "sql weights"}


def test_every_worker_tells_a_server_that_lost_everything_what_it_serves(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    sql, both = make_follower(roots=(root / "sql",)), make_follower()
    for name in ("sql", "chat"):
        queue.set_adapter(name, str(root / name), pinned=name == "chat")
        sql.follow()
        both.follow()
    queue.client.delete(queue.keys.adapters, queue.keys.adapters_version)
    for worker in (sql, both, sql):
        worker.follow()
    assert both.registry.revisions == {"sql": "sql weights", "chat": "chat weights"}
    assert sql.registry.revisions == {"sql": "sql weights"}
    assert record(queue, "chat").pinned


def test_a_damaged_record_stops_nothing_that_is_served(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower()
    follower.load("sql", root / "sql")
    queue.client.hset(queue.keys.adapters, "chat", "{")
    follower.follow()
    assert follower.registry.revisions == {"sql": "sql weights"}
    (told,) = start_with(make_follower, root / "sql")
    assert told["event"] == "desired_state_damaged"
    assert "The record of adapter 'chat' is damaged" in str(told["error"])


# --- More adapters than memory holds ------------------------------------------------------------

MANY = [f"adapter-{number}" for number in range(12)]


def make_many(queue: JobQueue, root: Path, *, settled: bool = True) -> None:
    for name in MANY:
        (root / name).mkdir()
        (root / name / "weights").write_text(f"{name} weights")
        version = queue.set_adapter(name, str(root / name), pinned=False)
        if settled:
            queue.adopt_revision(name, version, f"{name} weights")


def start(make_follower: MakeFollower, *, max_loaded: int | None) -> Follower:
    follower = make_follower()
    follower.registry._max_loaded = max_loaded
    follower.follow()
    return follower


def num_read(follower: Follower) -> int:
    assert isinstance(follower.registry.loader, TextLoader)
    return sum(follower.registry.loader.num_read.values())


def test_a_worker_that_starts_reads_no_more_than_memory_holds_and_knows_them_all(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    make_many(queue, root)
    follower = start(make_follower, max_loaded=4)
    known = follower.registry
    assert 4 <= num_read(follower) <= 4 + READERS - 1  # Two at a time may see the last room.
    assert known.revisions == {name: f"{name} weights" for name in MANY}
    assert follower.version == queue.desired_version()
    (first, *_) = [name for name in MANY if not known.is_loaded(name)]
    adapter = known.get(first)
    assert adapter
    assert adapter.revision == f"{first} weights"


@pytest.mark.parametrize(("settled", "max_loaded"), [(False, 4), (True, None)])
def test_what_nobody_has_read_before_or_memory_has_room_for_is_read(
    queue: JobQueue,
    make_follower: MakeFollower,
    root: Path,
    settled: bool,
    max_loaded: int | None,
) -> None:
    make_many(queue, root, settled=settled)
    assert num_read(start(make_follower, max_loaded=max_loaded)) == len(MANY)
    assert {r.revision for r in queue.desired_state()[1].values()} == {f"{n} weights" for n in MANY}


def test_a_pinned_adapter_is_read_though_memory_is_full(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    make_many(queue, root)
    queue.pin_adapter(MANY[-1], True)
    follower = start(make_follower, max_loaded=4)
    assert [adapter.name for adapter in follower.registry.pinned] == [MANY[-1]]


def test_what_is_not_read_yet_is_checked_as_far_as_it_can_be(
    queue: JobQueue, make_follower: MakeFollower, root: Path, tmp_path: Path
) -> None:
    make_many(queue, root)
    for name, source in {"gone": root / "gone", "outside": tmp_path}.items():
        version = queue.set_adapter(name, str(source), pinned=False)
        queue.adopt_revision(name, version, "some weights")
    follower = start(make_follower, max_loaded=1)
    assert follower.registry.errors == {
        "gone": f"there is no folder {root / 'gone'}.",
        "outside": f"{tmp_path} is not below --lora-root {root}.",
    }


def test_other_weights_than_were_settled_fail_their_jobs_once_they_are_read(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    make_many(queue, root)
    follower = start(make_follower, max_loaded=1)
    (name, *_) = [name for name in MANY if not follower.registry.is_loaded(name)]
    (root / name / "weights").write_text("others")
    with pytest.raises(JobError, match=rf"another revision now \(others\).*\({name} weights\)"):
        follower.registry.get(name)


# --- Adapters that take long to read ------------------------------------------------------------


@pytest.fixture
def answers() -> Iterator[Event]:
    """Until it is set, a source that hangs gives no weights."""
    event = Event()
    yield event
    event.set()


def hang(follower: Follower, answers: Event, *folders: Path) -> None:
    """Let these folders hang, for this worker alone."""

    def wait(adapter: Adapter) -> None:
        if Path(adapter.source) in folders:
            answers.wait(60)

    follower.registry.prepare = wait


def turn_until(follower: Follower, is_so: Callable[[], object]) -> None:
    """Look as the worker's thread does, without its pauses."""
    follower._next_look = 0.0

    def turn() -> bool:
        follower._next_look = 0.0
        follower.turn()
        return bool(is_so())

    wait_until(turn)


def test_one_adapter_that_takes_long_delays_no_load_pin_unload_or_report_of_others(
    queue: JobQueue, make_follower: MakeFollower, root: Path, answers: Event
) -> None:
    follower = make_follower()
    known = follower.registry
    hang(follower, answers, root / "sql")
    slow = queue.set_adapter("sql", str(root / "sql"), pinned=False)
    queue.set_adapter("chat", str(root / "chat"), pinned=False)
    turn_until(follower, lambda: "chat" in known.revisions)
    queue.set_adapter("new", str(root / "new"), pinned=False)
    queue.pin_adapter("chat", True)
    turn_until(follower, lambda: known.pinned_names == {"chat"} and "new" in known.revisions)
    version = queue.unload_adapter("new", "drain")
    turn_until(follower, lambda: set(known.revisions) == {"chat"})
    assert version
    assert follower.reading == ["sql"]
    assert follower.version < slow <= version <= follower.seen_version
    num_reports = follower.num_reports
    assert num_reports >= 3
    answers.set()
    turn_until(follower, lambda: "sql" in known.revisions)
    assert follower.reading == []
    assert follower.version == follower.seen_version
    assert follower.num_reports == num_reports + 1


def test_a_load_does_not_wait_for_the_one_that_it_replaces_which_is_dropped(
    queue: JobQueue, make_follower: MakeFollower, root: Path, answers: Event
) -> None:
    follower = make_follower()
    hang(follower, answers, root / "sql")
    queue.set_adapter("sql", str(root / "sql"), pinned=False)
    turn_until(follower, lambda: follower.reading)
    queue.set_adapter("sql", str(root / "new"), pinned=False)
    turn_until(follower, lambda: follower.registry.revisions == {"sql": "new weights"})
    answers.set()
    turn_until(follower, lambda: not follower.reading)
    assert follower.registry.revisions == {"sql": "new weights"}
    assert record(queue, "sql").revision == "new weights"


def test_however_often_what_hangs_is_loaded_others_are_read(
    queue: JobQueue, make_follower: MakeFollower, root: Path, answers: Event
) -> None:
    follower = make_follower()
    known = follower.registry
    hang(follower, answers, root / "sql")
    for _ in range(2 * READERS):
        queue.set_adapter("sql", str(root / "sql"), pinned=False)
        turn_until(follower, lambda: follower.seen_version == queue.desired_version())
    queue.set_adapter("chat", str(root / "chat"), pinned=False)
    turn_until(follower, lambda: "chat" in known.revisions)
    assert len(follower.threads) == 1
    answers.set()
    turn_until(follower, lambda: not follower.reading)
    assert set(known.revisions) == {"sql", "chat"}
    assert known.seen_version("sql") == record(queue, "sql").version


def test_what_is_pinned_while_it_is_only_checked_is_read(
    queue: JobQueue, make_follower: MakeFollower, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = make_follower()
    known = follower.registry
    known._max_loaded = 1
    follower.load("chat", root / "chat")
    version = queue.set_adapter("sql", str(root / "sql"), pinned=False)
    queue.adopt_revision("sql", version, "sql weights")
    may_end, check = Event(), known.loader.check

    def check_late(folder: Path) -> None:
        may_end.wait(60)
        check(folder)

    monkeypatch.setitem(known.loader.__dict__, "check", check_late)
    turn_until(follower, lambda: follower.reading)
    queue.pin_adapter("sql", True)
    turn_until(follower, lambda: follower.seen_version == queue.desired_version())
    may_end.set()
    turn_until(follower, lambda: not follower.reading)
    assert [adapter.name for adapter in known.pinned] == ["sql"]


def test_what_is_unloaded_while_it_is_read_is_not_served(
    queue: JobQueue, make_follower: MakeFollower, root: Path, answers: Event
) -> None:
    follower = make_follower()
    hang(follower, answers, root / "sql")
    queue.set_adapter("sql", str(root / "sql"), pinned=False)
    turn_until(follower, lambda: follower.reading)
    queue.unload_adapter("sql", "drain")
    turn_until(follower, lambda: not queue.desired_state()[1])
    answers.set()
    turn_until(follower, lambda: not follower.reading)
    assert follower.registry.revisions == {}


def test_what_failed_here_while_another_worker_read_it_is_tried_once_more(
    queue: JobQueue, make_follower: MakeFollower, root: Path, answers: Event
) -> None:
    slow, other = make_follower(), make_follower()
    replaced_by_nothing(queue, root, slow, other)
    write_later(root)

    def fail_late(adapter: Adapter) -> None:
        if not answers.is_set():
            answers.wait(60)
            raise BadInput("its files were changed while they were read; load it again.")

    slow.registry.prepare = fail_late
    queue.set_adapter("sql", str(root / "later"), pinned=False)
    turn_until(slow, lambda: slow.reading)
    other.follow()
    turn_until(slow, lambda: slow.seen_version == queue.desired_version())
    assert slow.registry.revisions == {"sql": "sql weights"}
    answers.set()
    turn_until(slow, lambda: not slow.reading)
    assert slow.registry.revisions == {"sql": "later weights"}
    assert slow.registry.errors == {}


def test_a_worker_that_is_asked_to_end_while_it_starts_waits_for_no_source(
    queue: JobQueue, make_follower: MakeFollower, root: Path, answers: Event
) -> None:
    follower = make_follower()
    hang(follower, answers, root / "sql")
    queue.set_adapter("sql", str(root / "sql"), pinned=False)
    follower.follow(is_ended=lambda: True)
    assert follower.reading == ["sql"]
    assert follower.version == 0


# --- Unload and pin -----------------------------------------------------------------------------


def test_an_adapter_is_unloaded_once_its_jobs_are_done(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower()
    follower.load("sql", root / "sql")
    job = Job(id="one", lora="sql", prompt_token_ids=[1])
    queue.submit("submission", "", 1, 0, [job])
    queue.unload_adapter("sql", "drain")
    follower.follow()
    assert follower.registry.get("sql")
    request = ClaimRequest(num_jobs=1, free_slots=0, in_use=["sql"])
    claims = queue.claim("worker", request, lease_seconds=60, patience=30).jobs
    follower.follow()
    assert follower.registry.get("sql")
    queue.set_max_attempts(1)
    queue.retry("worker", [claims[0].lease], outcome="x", message="x", alone=False)
    follower.follow()
    assert follower.registry.get("sql") is None
    assert queue.desired_state()[1] == {}


def test_no_more_adapters_are_pinned_than_leave_a_slot(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower(max_pinned=1)
    for name in ("sql", "chat"):
        queue.set_adapter(name, str(root / name), pinned=True)
    follower.follow()
    assert follower.registry.pinned_names == {"chat"}
    queue.pin_adapter("chat", False)
    follower.follow()
    assert follower.registry.pinned_names == {"sql"}
    queue.unload_adapter("sql", "drain")
    follower.follow()
    assert follower.registry.pinned_names == set()


def test_an_adapter_pinned_beyond_the_limit_takes_no_slot_from_one_pinned_before(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower(max_pinned=1)
    follower.load("sql", root / "sql", pinned=True)
    follower.load("chat", root / "chat", pinned=True)
    assert follower.registry.pinned_names == {"sql"}
    queue.pin_adapter("sql", False)
    follower.follow()
    assert follower.registry.pinned_names == {"chat"}


def test_an_evicted_adapter_is_read_again_when_it_is_pinned(
    queue: JobQueue, make_follower: MakeFollower, root: Path
) -> None:
    follower = make_follower()
    follower.registry._max_loaded = 1
    for name in ("sql", "chat"):
        follower.load(name, root / name)
    queue.pin_adapter("sql", True)
    follower.follow()
    assert [adapter.name for adapter in follower.registry.pinned] == ["sql"]
    (root / "chat" / "weights").write_text("others")
    queue.pin_adapter("chat", True)
    follower.follow()
    assert "chat holds another revision now (others)" in follower.registry.errors["chat"]
