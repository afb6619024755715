"""The users of examples/users.acl on a real server: what each may do, and may not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis.exceptions import NoPermissionError
from structlog.testing import capture_logs

from broker.claims import ClaimRequest, Lease
from broker.connection import connect, server_errors
from broker.job_queue import JobQueue
from broker.outcomes import Limits
from broker.queue_reader import QueueReader
from producer.client import Client
from schemas.adapter import AdapterRecord
from schemas.errors import ServerUnavailable
from schemas.job import Job
from schemas.result import Result, Timings
from schemas.worker_state import WorkerState
from tests.fake_hub import FakeHub
from tests.servers import ValkeyServer
from tests.test_producer_cli import Producer, prompts
from tests.tiny_models import make_adapter, make_llama
from tests.webhook_receiver import run_receiver
from worker.adapters.loader import AdapterChecker
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.hub.fetcher import Fetcher
from worker.lora_path import LoraPath
from worker.model.config import ModelConfig
from worker.webhooks.notifier import Notifier
from worker.worker import Worker

ROLES = ("producer", "operator", "worker", "fetcher", "notifier", "reader")

#: Those who may read the whole queue.
READERS = tuple(role for role in ROLES if role != "notifier")

RULES = Path(__file__).parent.parent / "examples" / "users.acl"

QUEUE = "lorry"


class Users:
    """A server that has loaded the rules, and the ways into it."""

    def __init__(self, server: ValkeyServer) -> None:
        self._server = server

    def url(self, role: str) -> str:
        return self._server.url.replace("//", f"//lorry-{role}:CHANGE-ME-{role}@")

    def connect(self, role: str) -> redis.Redis:
        return connect(self.url(role))

    def admin(self) -> redis.Redis:
        return self._server.client(username="admin", password="CHANGE-ME-admin")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    flags = ("--aclfile", str(RULES), "--appendonly", "yes", "--save", "")
    server = ValkeyServer(tmp_path_factory.mktemp("server"), *flags)
    yield server
    server.stop()


@pytest.fixture
def users(server: ValkeyServer) -> Iterator[Users]:
    users = Users(server)
    yield users
    with users.admin() as admin:
        admin.flushall()


# --- Each operation as each role ----------------------------------------------------------------

JOBS = [Job(id=id_, prompt="Hello", lora="sql") for id_ in ("job", "next")]
STATE = WorkerState(
    id="w", model="m", device="cpu", started=0, adapters={"sql": "r"}, max_loras_per_batch=8
)
RESULT = Result(id="job", submission="sub", lora="sql", status="done", timings=Timings(queued=0))
REQUEST = ClaimRequest(num_jobs=1, free_slots=1, in_use=())


def in_use(queue: JobQueue) -> Lease:
    """Give a queue a worker, adapters, and two jobs, one of which is running under this lease."""
    queue.heartbeat(STATE, alive_seconds=60)
    queue.announce({name: AdapterRecord(source="/x", revision="r") for name in ("sql", "old")})
    queue.set_adapter("new", "/new", pinned=False)
    queue.unload_adapter("old", "drain")
    queue.request_fetch("fetched", "f", "hf:a/b", pinned=False)
    queue.submit("sub", "file", 2, 0, JOBS)
    (claim,) = queue.claim("w", REQUEST, lease_seconds=60, patience=60).jobs
    return claim.lease


def add_sync(queue: JobQueue) -> None:
    with queue.client.pipeline(transaction=False) as pipeline:
        queue.add_sync(pipeline, "sub", 2)
        pipeline.execute_command("WAITAOF", 1, 0, 1)
        pipeline.execute()


STAFF = {"operator", "worker", "fetcher"}
SENDERS = {"producer", *STAFF}

#: Every operation, and who may do it. A new one has to be added here, and so be decided on.
OPERATIONS: dict[str, tuple[Callable[[JobQueue, Lease], object], set[str]]] = {
    "submit": (lambda q, _: q.submit("2", "f", 1, 0, [Job(id="2", prompt="")]), SENDERS),
    "add_sync": (lambda q, _: add_sync(q), {"producer", "operator"}),
    "claim": (lambda q, _: q.claim("w", REQUEST, lease_seconds=9, patience=9), STAFF),
    "commit": (lambda q, lease: q.commit("w", [(lease, RESULT)]), STAFF),
    "renew": (lambda q, lease: q.renew("w", [lease], lease_seconds=9), STAFF),
    "claim_suspect": (lambda q, _: q.claim_suspect("w", lease_seconds=9), STAFF),
    # It writes into a job, as who submits may anyway.
    "reserve_suspect": (lambda q, _: q.reserve_suspect("w", patience=9), SENDERS),
    "release": (lambda q, lease: q.release("w", [lease]), STAFF),
    "retry": (
        lambda q, lease: q.retry("w", [lease], outcome="x", message="x", alone=True),
        STAFF,
    ),
    "sweep": (lambda q, _: q.sweep(), STAFF),
    "set_max_attempts": (lambda q, _: q.set_max_attempts(5), STAFF),
    "set_model": (lambda q, _: q.set_model("llama"), STAFF),
    "cancel": (lambda q, _: q.cancel(["job", "next"]), STAFF),
    "close_submission": (lambda q, _: q.close_submission("sub"), {"notifier", *SENDERS}),
    "pause": (lambda q, _: q.pause("sql"), STAFF),
    "resume": (lambda q, _: (q.pause(), q.resume()), STAFF),
    "set_limits": (lambda q, _: q.set_limits(Limits(9, 9)), STAFF),
    "expire_submissions": (lambda q, _: q.expire_submissions(), STAFF),
    "expire_jobs": (lambda q, _: q.expire_jobs(), STAFF),
    "heartbeat": (lambda q, _: q.heartbeat(STATE, alive_seconds=9), STAFF),
    "leave": (lambda q, _: q.leave("w"), STAFF),
    "announce": (
        lambda q, _: q.announce({"chat": AdapterRecord(source="/x", revision="r")}),
        STAFF,
    ),
    "set_adapter": (lambda q, _: q.set_adapter("sql", "/x", pinned=False), STAFF),
    "pin_adapter": (lambda q, _: q.pin_adapter("sql", True), STAFF),
    "unload_adapter": (lambda q, _: q.unload_adapter("sql", "force"), STAFF),
    "request_fetch": (
        lambda q, _: q.request_fetch("hub", "f", "hf:a/b", pinned=False),
        STAFF,
    ),
    "begin_fetch": (lambda q, _: q.begin_fetch(seconds_apart=1), STAFF),
    "publish_fetch": (lambda q, _: q.publish_fetch("fetched", "f", "hf:a/b@c", "r"), STAFF),
    "fail_fetch": (lambda q, _: q.fail_fetch("fetched", "f", "x"), STAFF),
    "adopt_revision": (lambda q, _: q.adopt_revision("new", 2, "r"), STAFF),
    "retire_adapter": (lambda q, _: q.retire_adapter("old"), STAFF),
    "desired_state": (lambda q, _: q.desired_state(), set(READERS)),
    "desired_version": (lambda q, _: q.desired_version(), set(READERS)),
}

#: Every way to read.
READINGS: dict[str, Callable[[QueueReader], object]] = {
    "is_submission": lambda r: r.is_submission("sub") or r.is_submission("job"),
    "submissions": lambda r: r.submissions(9),
    "num_submissions": lambda r: r.num_submissions(),
    "submission": lambda r: r.submission("sub"),
    "job_ids": lambda r: list(r.job_ids("sub")),
    "finished": lambda r: r.finished({"sub": "0"}, wait=0.01),
    "finished_position": lambda r: r.finished_position("sub"),
    "results": lambda r: list(r.results(["job", "next"])),
    "payloads": lambda r: list(r.payloads(["job"])),
    "adapters": lambda r: r.adapters(),
    "adapter": lambda r: r.adapter("sql"),
    "has_desired_state": lambda r: r.has_desired_state(),
    "workers": lambda r: r.workers(),
    "model": lambda r: r.model(),
    "models": lambda r: r.models(),
    "require_results": lambda r: r.require_results("sub"),
    "num_set_aside": lambda r: r.num_set_aside(),
    "num_out_of_turn": lambda r: r.num_out_of_turn(),
    "num_running": lambda r: r.num_running(),
    "num_dead": lambda r: r.num_dead(),
    "paused": lambda r: r.paused(),
    "backlog": lambda r: r.backlog(),
    "limits": lambda r: r.limits(),
    "unfinished_by_adapter": lambda r: r.unfinished_by_adapter(),
    "num_waiting_by_adapter": lambda r: r.num_waiting_by_adapter(),
    "num_waiting_of": lambda r: r.num_waiting_of("sql"),
    "num_jobs_of": lambda r: r.num_jobs_of("sql"),
}


def methods(kind: type) -> set[str]:
    return {name for name in dir(kind) if callable(getattr(kind, name)) and name[0] != "_"}


def test_every_operation_is_in_these_tables() -> None:
    assert set(OPERATIONS) == methods(JobQueue)
    assert set(READINGS) == methods(QueueReader)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_for_those_whom_the_table_names(
    users: Users, operation: str, role: str
) -> None:
    call, allowed = OPERATIONS[operation]
    with users.admin() as admin, users.connect(role) as client:
        lease = in_use(JobQueue(admin, QUEUE))
        # Something for those who look first.
        if operation == "sweep":
            admin.zadd(f"{{{QUEUE}}}:leases", {lease.job_id: 1})
        if operation == "reserve_suspect":
            admin.zadd(f"{{{QUEUE}}}:suspects", {"next": 1})
        if operation == "expire_jobs":
            admin.zadd(f"{{{QUEUE}}}:deadlines", {"next": 1})
            admin.hset(f"{{{QUEUE}}}:job:next", "deadline", 1)
        if operation == "expire_submissions":
            admin.zadd(f"{{{QUEUE}}}:expiry", {"sub": 1})
        if role in allowed:
            call(JobQueue(client, QUEUE), lease)
            return
        refused = pytest.raises(ServerUnavailable, match="does not let this user do that")
        with refused, server_errors(users.url(role)):
            call(JobQueue(client, QUEUE), lease)


@pytest.mark.parametrize("count", ["many", None])
def test_a_producer_may_send_though_the_count_of_what_waits_is_damaged(
    users: Users, count: str | None
) -> None:
    with users.admin() as admin, users.connect("producer") as client:
        queue = JobQueue(client, QUEUE)
        if count is None:
            admin.set(queue.keys.backlog, "x")
        else:
            admin.hset(queue.keys.backlog, "jobs", count)
        for job in JOBS:
            queue.submit(job.id, "file", 1, 0, [job])


@pytest.mark.parametrize("role", READERS)
def test_every_role_but_the_notifier_may_read_the_queue(users: Users, role: str) -> None:
    with users.admin() as admin, users.connect(role) as client:
        queue = JobQueue(admin, QUEUE)
        queue.commit("w", [(in_use(queue), RESULT)])
        reader = QueueReader(client, QUEUE)
        for read in READINGS.values():
            read(reader)


def test_a_notifier_sees_no_prompt_and_no_result(users: Users) -> None:
    with users.admin() as admin, users.connect("notifier") as client:
        queue = JobQueue(admin, QUEUE)
        queue.commit("w", [(in_use(queue), RESULT)])
        reader = QueueReader(client, QUEUE)
        assert reader.submission("sub").finished == 1
        for read in (reader.payloads, reader.results):
            with pytest.raises(NoPermissionError):
                list(read(["job"]))


# --- What a role can be made to do by other means -----------------------------------------------


def test_a_producer_can_write_nothing_that_workers_act_on_but_jobs(users: Users) -> None:
    with users.connect("producer") as client:
        for key in ("adapters", "adapters:version", "workers", "worker:w", "leases", "dead", "x"):
            for write in (
                lambda name: client.hset(name, "field", "value"),
                lambda name: client.set(name, "value"),
                lambda name: client.zadd(name, {"member": 1}),
            ):
                with pytest.raises(NoPermissionError):
                    write(f"{{{QUEUE}}}:{key}")
        with pytest.raises(NoPermissionError):
            client.publish(f"{{{QUEUE}}}:control", "1")


def test_a_reader_may_run_no_command_that_writes(users: Users) -> None:
    with users.admin() as admin:
        for category in ("write", "admin", "scripting", "dangerous", "pubsub", "blocking"):
            commands = admin.execute_command("COMMAND LIST FILTERBY ACLCAT", category)
            assert commands
            for command in commands:
                if command not in ("xread", "info"):
                    assert_refused(admin, "lorry-reader", command)


def assert_refused(admin: redis.Redis, user: str, command: str) -> None:
    ((_, arity, *_),) = admin.execute_command("COMMAND INFO", command)
    words = command.split("|")
    arguments = ["1"] * max(0, abs(arity) - len(words))
    answer = admin.execute_command("ACL DRYRUN", user, *words, *arguments)
    assert "has no permissions to run" in answer, (command, answer)


@pytest.mark.parametrize("role", ROLES)
def test_no_role_sees_or_changes_what_belongs_to_others(users: Users, role: str) -> None:
    with users.admin() as admin, users.connect(role) as client:
        admin.hset("{other}:job:1", "job", "secret")
        for key in ("{other}:job:1", "lorry:x", "x"):
            with pytest.raises(NoPermissionError):
                client.hgetall(key)
            with pytest.raises(NoPermissionError):
                client.hset(key, "field", "value")
        for command in ("KEYS *", "SCAN 0", "RANDOMKEY", "FLUSHALL", "CONFIG GET *", "ACL LIST"):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command.split())


# --- Real commands and workers ------------------------------------------------------------------


def test_a_producer_sends_a_worker_runs_and_a_reader_looks_on(users: Users, tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    make_adapter(model, tmp_path / "sql", rank=4, seed=0)
    config = WorkerConfig(
        model_path=model,
        lora_paths=(LoraPath(lora_name="sql", lora_path=str(tmp_path / "sql")),),
        device="cpu",
        max_total_tokens=1024,
        burst=True,
    )
    file = prompts(tmp_path, *['{"prompt_token_ids": [1], "max_tokens": 2, "lora": "sql"}'] * 3)
    assert Producer(users.url("producer"), QUEUE)("submit", file, "--durable").exit_code == 0
    with capture_logs() as logs:
        assert Worker(config, Engine(config), users.url("worker")).run() == 0
    assert not [entry for entry in logs if entry["event"] in ("redis_refused", "redis_away")]
    with Client(users.url("reader"), QUEUE) as client:
        (submission,) = client.overview().submissions
        assert submission.counts["done"] == 3
        assert len(list(client.follow(submission.id))) == 3
        assert client.wait(submission.id)


def test_a_fetcher_fetches_what_an_operator_asks_for_and_a_reader_sees_it(
    users: Users, hub: FakeHub, tmp_path: Path
) -> None:
    model = make_llama(tmp_path / "model")
    hub.push("acme/sql", make_adapter(model, tmp_path / "sql", rank=4, seed=0))
    checker = AdapterChecker(ModelConfig.from_folder(model), 8, None)
    asked = Producer(users.url("operator"), QUEUE)("lora", "load", "sql", "acme/sql", "--no-wait")
    assert asked.exit_code == 0
    fetcher = Fetcher(users.url("fetcher"), QUEUE, ["acme"], checker)
    with users.connect("reader") as reader, capture_logs() as logs:
        assert fetcher.run(lambda: QueueReader(reader, QUEUE).adapter("sql") is not None) == 0
    assert not [entry for entry in logs if entry["log_level"] != "info"]
    listed = Producer(users.url("reader"), QUEUE)("lora", "list", "--json")
    assert "hf:acme/sql@" in listed.stdout


def test_a_notifier_delivers_what_a_producer_asks_for_and_a_reader_sees_it(
    users: Users, tmp_path: Path
) -> None:
    with users.admin() as admin, run_receiver() as receiver:
        notifier = Notifier(users.url("notifier"), QUEUE, [receiver.host], [b"x" * 24])
        file = prompts(tmp_path, '"x"')
        sent = Producer(users.url("producer"), QUEUE)("submit", file, "--webhook", receiver.url)
        assert sent.exit_code == 0
        receiver.answers = [500]
        with Client(users.url("operator"), QUEUE) as client:
            (submission,) = client.overview().submissions
            client.cancel(submission.id)

        def is_delivered() -> bool:
            notices = f"{{{QUEUE}}}:notices"
            for due in admin.zrange(notices, 0, -1):
                admin.zadd(notices, {due: 1})
            return len(receiver.received) == 2

        with capture_logs() as logs:
            notifier.run(is_delivered)
    events = [entry["event"] for entry in logs]
    assert events == [
        *("notifier_ready", "notice_not_delivered", "notice_delivered", "notifier_ended")
    ]
    status = Producer(users.url("reader"), QUEUE)("status", submission.id)
    assert "delivered at" in status.stdout


def test_a_producer_ends_its_own_submission_by_what_has_ended_before(users: Users) -> None:
    """The script of a producer then makes the notice due itself."""
    with users.admin() as admin, users.connect("producer") as client:
        queue = JobQueue(admin, QUEUE)
        queue.commit("w", [(in_use(queue), RESULT)])
        JobQueue(client, QUEUE).submit("2", "f", 1, 0, JOBS[:1], webhook="https://example.org/")
        assert admin.zrange(f"{{{QUEUE}}}:notices", 0, -1) == ["2"]
        with pytest.raises(NoPermissionError):
            client.set(f"{{{QUEUE}}}:webhook-hosts", "[]")


@pytest.mark.parametrize(("role", "exit_code"), [("operator", 6), ("producer", 4), ("reader", 4)])
def test_only_an_operator_loads_adapters(users: Users, role: str, exit_code: int) -> None:
    outcome = Producer(users.url(role), QUEUE)("lora", "load", "sql", "/adapters/sql")
    assert outcome.exit_code == exit_code  # 6: it is written down, and no worker is alive.
    assert ("does not let this user do that" in outcome.stderr) == (exit_code == 4)
    assert "docs/server.md" in outcome.stderr or exit_code == 6


def test_a_worker_without_the_rights_ends_with_a_sentence(users: Users, tmp_path: Path) -> None:
    config = WorkerConfig(
        model_path=make_llama(tmp_path / "model"), device="cpu", max_total_tokens=1024, burst=True
    )
    worker = Worker(config, Engine(config), users.url("reader"))
    with pytest.raises(ServerUnavailable, match="does not let"), server_errors("redis://x"):
        worker.run()
