"""Queues behind Sentinels and in a Redis Cluster, on servers of the binary that all tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import redis
from redis.crc import key_slot

from benchmarks.waiting import PATIENCE, wait_until
from broker.claims import ClaimRequest
from broker.connection import connect
from broker.fetches import Fetches
from broker.job_queue import JobQueue
from producer.client import Client
from schemas.errors import ServerUnavailable
from schemas.result import Result, Timings
from tests.servers import ValkeyServer, free_port
from worker.background import BackgroundLoop
from worker.hub.fetch_queue import FetchQueue
from worker.webhooks.notifier import Notifier

pytestmark = pytest.mark.slow

SLOTS = 16384

#: The hash tag of this queue's keys has a slot in the first third of all, which is node 0's.
QUEUE = next(f"q{i}" for i in range(100) if key_slot(f"{{q{i}}}:".encode()) < SLOTS // 3)

LONG_LEASE = 60.0

CLUSTER = ("--cluster-enabled", "yes", "--cluster-node-timeout", "5000", "--appendonly", "yes")


@pytest.fixture(scope="module")
def start_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., ValkeyServer]]:
    with ExitStack() as servers:

        def start(*flags: str, port: int | None = None) -> ValkeyServer:
            server = ValkeyServer(tmp_path_factory.mktemp("server"), *flags, port=port)
            servers.callback(server.stop)
            return server

        yield start


def run_all(queue: JobQueue) -> list[str]:
    """Claim and commit what waits, as a worker does; the ids of those jobs."""
    request = ClaimRequest(num_jobs=10, free_slots=1, in_use=())
    claims = queue.claim("w", request, lease_seconds=LONG_LEASE, patience=LONG_LEASE).jobs
    results = [
        (
            claim.lease,
            Result(
                id=claim.lease.job_id,
                submission=claim.submission,
                lora=None,
                status="done",
                timings=Timings(queued=claim.queued),
            ),
        )
        for claim in claims
    ]
    assert all(queue.commit("w", results))
    return [claim.lease.job_id for claim in claims]


@contextmanager
def looping(queue: JobQueue) -> Iterator[BackgroundLoop]:
    """A worker's thread that keeps trying to run what waits."""

    def turn() -> None:
        run_all(queue)

    loop = BackgroundLoop("claim", turn, lambda: None, interval=0.05)
    loop.start()
    yield loop
    loop.stop()
    loop.join()
    assert loop.failure is None


def assert_is_served(client: Client, queue: JobQueue) -> None:
    """Jobs go in, run, and their results come out as they finish."""
    submission = client.submit(["Hello", "again"])
    assert len(run_all(queue)) == 2
    assert [result.status for result in client.follow(submission)] == ["done", "done"]


# --- Cluster ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(start_server: Callable[..., ValkeyServer]) -> list[ValkeyServer]:
    """Three nodes, each with a third of the slots."""
    bus_ports = [free_port() for _ in range(3)]
    nodes = [start_server(*CLUSTER, "--cluster-port", str(port)) for port in bus_ports]
    for i, node in enumerate(nodes):
        with node.client() as client:
            first, last = i * SLOTS // 3, (i + 1) * SLOTS // 3 - 1
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
            client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port, bus_ports[0])
    for node in nodes:
        wait_until(lambda node=node: knows_three(node), "the cluster did not form")
    return nodes


def knows_three(node: ValkeyServer) -> bool:
    with node.client() as client:
        info = client.execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == "3"


def cluster_url(*nodes: ValkeyServer) -> str:
    return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_a_queue_in_a_cluster_is_found_by_any_node(cluster: list[ValkeyServer], asked: int) -> None:
    url = cluster_url(cluster[asked])
    with Client(url, QUEUE) as client, connect(url, QUEUE) as connection:
        assert_is_served(client, JobQueue(connection, QUEUE))
        submission = client.submit(["Hello"])
        run_all(JobQueue(connection, QUEUE))
    with cluster[0].client() as owner:
        assert owner.exists(f"{{{QUEUE}}}:submission:{submission}")


def test_a_node_that_is_away_is_passed_over(cluster: list[ValkeyServer]) -> None:
    url = f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{cluster[2].port}"
    with Client(url, QUEUE) as client:
        client.overview()


def test_a_message_reaches_who_listens_in_a_cluster(cluster: list[ValkeyServer]) -> None:
    url = cluster_url(*cluster)
    with connect(url, QUEUE) as connection, Client(url, QUEUE) as client:
        wake = connection.pubsub(ignore_subscribe_messages=True)
        wake.subscribe(f"{{{QUEUE}}}:wake")
        assert wake.get_message(timeout=5) is None  # The confirmation.
        client.submit(["Hello"])
        message = wake.get_message(timeout=5)
        assert message
        wake.close()
        run_all(JobQueue(connection, QUEUE))


def test_a_queue_that_moves_to_another_node_is_followed(cluster: list[ValkeyServer]) -> None:
    url = cluster_url(*cluster)
    queue = JobQueue(connect(url, QUEUE), QUEUE)
    with queue.client, Client(url, QUEUE) as client, looping(queue):
        before = client.submit(["Hello"])
        client.wait(before, timeout=PATIENCE)
        move_queue(cluster[0], cluster[1])
        after = client.submit(["again"])
        client.wait(after, timeout=PATIENCE)
        assert client.wait(before, timeout=PATIENCE).counts["done"] == 1  # type: ignore[union-attr]
    with cluster[1].client() as owner:
        assert owner.exists(f"{{{QUEUE}}}:submission:{before}", f"{{{QUEUE}}}:submission:{after}")
    move_queue(cluster[1], cluster[0])


def move_queue(source: ValkeyServer, target: ValkeyServer) -> None:
    slot = key_slot(f"{{{QUEUE}}}:".encode())
    with source.client() as from_, target.client() as to:
        id_ = to.execute_command("CLUSTER MYID")
        from_.execute_command("CLUSTER MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", id_)
        wait_until(lambda: owns(to, slot) and not owns(from_, slot), "the slot did not move")


def owns(node: redis.Redis, slot: int) -> bool:
    try:
        node.execute_command("GET", f"{{{QUEUE}}}:")
    except redis.exceptions.MovedError:
        return False
    return True


def test_what_needs_rq_is_refused_in_a_cluster(cluster: list[ValkeyServer]) -> None:
    url = cluster_url(*cluster)
    with Client(url, QUEUE) as client:
        with pytest.raises(ServerUnavailable, match="Fetching from the hub needs rq"):
            client.load_adapter("sql", "acme/sql")
        assert client.adapters() == []
        with pytest.raises(ServerUnavailable, match="A webhook needs rq"):
            client.submit(["x"], webhook="https://example.org/")
    with connect(url, QUEUE) as connection:
        assert not connection.exists(f"{{{QUEUE}}}:fetches")
        with pytest.raises(ServerUnavailable, match="Fetching from the hub needs rq"):
            FetchQueue(JobQueue(connection, QUEUE), lambda *_: None)
    with pytest.raises(ServerUnavailable, match="A webhook needs rq"):
        Notifier(url, QUEUE, ["example.org"], [b"x" * 24])


def test_a_cluster_that_is_named_like_a_server_is_refused(cluster: list[ValkeyServer]) -> None:
    with pytest.raises(ServerUnavailable, match=r"redis\+cluster://"):
        Client(cluster[0].url, QUEUE)


def test_so_is_a_cluster_whose_user_may_not_ask_what_it_is(cluster: list[ValkeyServer]) -> None:
    with cluster[1].client() as admin:
        admin.execute_command("ACL SETUSER me on >pw ~* +@all -info")
    with (
        Client(cluster[1].url.replace("//", "//me:pw@"), QUEUE) as client,
        pytest.raises(ServerUnavailable, match=r"redis\+cluster://"),
    ):
        client.overview()


def test_a_queue_in_a_cluster_survives_a_failover(
    cluster: list[ValkeyServer], start_server: Callable[..., ValkeyServer]
) -> None:
    replica = start_server(*CLUSTER, "--cluster-port", str(free_port()))
    with cluster[0].client() as owner, replica.client() as client:
        owner_id = owner.execute_command("CLUSTER MYID")
        bus_port = cluster_port(owner)
        client.execute_command("CLUSTER MEET", "127.0.0.1", cluster[0].port, bus_port)
        wait_until(lambda: is_known(client, owner_id), "the replica does not know its master")
        client.execute_command("CLUSTER REPLICATE", owner_id)
        wait_until(
            lambda: client.info("replication").get("master_link_status") == "up", "no replica"
        )
    queue = JobQueue(connect(cluster_url(*cluster), QUEUE), QUEUE)
    with queue.client, Client(cluster_url(*cluster), QUEUE) as client, looping(queue):
        before = client.submit(["Hello"])
        client.wait(before, timeout=PATIENCE)
        for former, new in ((cluster[0], replica), (replica, cluster[0])):
            with new.client() as promoted:
                promoted.execute_command("CLUSTER FAILOVER")
                wait_until(
                    lambda promoted=promoted: promoted.info("replication")["role"] == "master",
                    "no failover",
                )
            with former.client() as demoted:
                wait_until(
                    lambda demoted=demoted: demoted.info("replication")["role"] == "slave",
                    "the former master has not followed",
                )
            after = client.submit(["again"])
            assert client.wait(after, timeout=PATIENCE).counts["done"] == 1  # type: ignore[union-attr]
        assert client.wait(before).counts["done"] == 1  # type: ignore[union-attr]


def cluster_port(node: redis.Redis) -> str:
    return node.config_get("cluster-port")["cluster-port"]


def is_known(node: redis.Redis, id_: str) -> bool:
    return id_ in str(node.execute_command("CLUSTER NODES"))


# --- Sentinel -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentinel(start_server: Callable[..., ValkeyServer]) -> Iterator[ValkeyServer]:
    """It watches over a master and a replica, called ``jobs``."""
    flags = ("--appendonly", "yes", "--repl-diskless-sync-delay", "0")
    master = start_server(*flags)
    replica = start_server(*flags, "--replicaof", f"127.0.0.1 {master.port}")
    sentinel = start_server("--sentinel")
    with sentinel.client() as client:
        client.sentinel_monitor("jobs", "127.0.0.1", master.port, 1)
        client.sentinel_set("jobs", "down-after-milliseconds", 5000)
        wait_until(lambda: client.sentinel_master("jobs")["num-slaves"] == 1, "no replica")
    with replica.client() as client:
        wait_until(
            lambda: client.info("replication")["master_link_status"] == "up", "no replication"
        )
    return sentinel


def sentinel_url(sentinel: ValkeyServer) -> str:
    return f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}/jobs"


def test_a_queue_behind_sentinels_survives_a_failover(sentinel: ValkeyServer) -> None:
    url = sentinel_url(sentinel)
    queue = JobQueue(connect(url, QUEUE), QUEUE)
    with queue.client, sentinel.client() as asked, Client(url, QUEUE) as client, looping(queue):
        before = client.submit(["Hello"])
        client.wait(before, timeout=PATIENCE)
        old = asked.sentinel_get_master_addr_by_name("jobs")
        asked.sentinel_failover("jobs")
        wait_until(lambda: asked.sentinel_get_master_addr_by_name("jobs") != old, "no failover")
        after = client.submit(["again"])
        client.wait(after, timeout=PATIENCE)
        assert client.wait(before).counts["done"] == 1  # type: ignore[union-attr]


def test_rq_finds_the_server_by_sentinels_too(sentinel: ValkeyServer) -> None:
    with connect(sentinel_url(sentinel), QUEUE) as client:
        fetches = Fetches(client, QUEUE)
        fetches.enqueue("sql", "fetch-1")
        assert fetches.rq_queue().job_ids == ["fetch-1"]


def test_sentinels_may_want_a_login_of_their_own(sentinel: ValkeyServer) -> None:
    with sentinel.client() as client:
        client.execute_command("ACL SETUSER me on >pw +@all")
        client.execute_command("ACL SETUSER default off")
    try:
        with pytest.raises(ServerUnavailable):
            Client(sentinel_url(sentinel), QUEUE)
        login = "?sentinel_username=me&sentinel_password=pw"
        with Client(sentinel_url(sentinel) + login, QUEUE) as client:
            client.overview()
    finally:
        with sentinel.client(username="me", password="pw") as client:
            client.execute_command("ACL SETUSER default on")


def test_a_service_that_sentinels_do_not_know_is_told(sentinel: ValkeyServer) -> None:
    with pytest.raises(ServerUnavailable, match="No master found for 'others'"):
        Client(f"redis+sentinel://127.0.0.1:{sentinel.port}/others", QUEUE)


def test_a_sentinel_that_is_named_like_a_server_is_refused(sentinel: ValkeyServer) -> None:
    with pytest.raises(ServerUnavailable, match=r"redis\+sentinel://"):
        Client(sentinel.url, QUEUE)
