"""Connections over TLS, with a certificate authority of the tests' own."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import trustme
from structlog.testing import capture_logs

from benchmarks.waiting import wait_until
from broker.connection import connect
from broker.server import find_server
from producer.client import Client
from schemas.errors import ServerUnavailable
from tests.servers import ValkeyServer, free_port
from tests.test_producer_cli import Producer
from tests.tls_proxy import tls_proxy
from worker.background import keep_trying


class Certificates:
    """An authority, what servers show that want a client's certificate, and such a one."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(self.server)
        authority.issue_cert("127.0.0.1").configure_cert(self.server)
        client = authority.issue_cert("client@example.org")
        self.ca, self.certificate, key = (
            folder / name for name in ("ca.pem", "client.pem", "client.key")
        )
        authority.cert_pem.write_to_path(str(self.ca))
        client.cert_chain_pems[0].write_to_path(str(self.certificate))
        client.private_key_pem.write_to_path(str(key))
        self.options = f"ssl_ca_certs={self.ca}&ssl_certfile={self.certificate}&ssl_keyfile={key}"


class TlsServer:
    """A server that wants TLS, and a certificate of its clients."""

    def __init__(self, port: int, certificates: Certificates) -> None:
        self.port = port
        self.ca = certificates.ca
        self.url = f"rediss://127.0.0.1:{port}?{certificates.options}"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls(
    certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TlsServer]:
    server = ValkeyServer(tmp_path_factory.mktemp("server"))
    with tls_proxy(server.port, certificates.server) as port:
        yield TlsServer(port, certificates)
    server.stop()


def test_a_producer_works_over_tls_with_its_own_certificate(tls: TlsServer) -> None:
    with Client(tls.url, "q") as client:
        submission = client.submit(["Hello"])
        assert client.status(submission).counts["waiting"] == 1  # type: ignore[union-attr]


def test_a_command_works_over_tls_and_shows_no_option(tls: TlsServer) -> None:
    outcome = Producer(tls.url, "q")("status", "--json")
    assert json.loads(outcome.stdout)["workers"] == []
    assert f"Using the server at rediss://127.0.0.1:{tls.port}\n" in outcome.stderr


def test_a_certificate_of_an_unknown_authority_is_refused_with_the_remedy(tls: TlsServer) -> None:
    with pytest.raises(ServerUnavailable, match="CERTIFICATE_VERIFY_FAILED") as error:
        Client(f"rediss://127.0.0.1:{tls.port}", "q")
    assert "ssl_ca_certs=FILE" in str(error.value)


def test_a_certificate_for_another_host_is_refused_unless_that_is_allowed(tls: TlsServer) -> None:
    url = tls.url.replace("127.0.0.1", "localhost")
    with pytest.raises(ServerUnavailable, match="for that host name"):
        Client(url, "q")
    with Client(f"{url}&ssl_check_hostname=false", "q") as client:
        client.overview()


def test_without_a_certificate_of_its_own_a_client_is_refused(tls: TlsServer) -> None:
    with pytest.raises(ServerUnavailable):
        Client(f"rediss://127.0.0.1:{tls.port}?ssl_ca_certs={tls.ca}", "q")


def test_a_worker_does_not_wait_for_a_certificate_to_become_right(tls: TlsServer) -> None:
    with (
        find_server(f"rediss://127.0.0.1:{tls.port}") as server,
        pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        keep_trying(server.settings, at="start")


def test_a_worker_waits_for_a_server_that_goes_away_in_the_handshake(tls: TlsServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"rediss://127.0.0.1:{listener.getsockname()[1]}"
        goes_away = threading.Thread(target=_go_away_in_the_handshake, args=[listener])
        goes_away.start()
        urls = iter((url, tls.url))

        def ask() -> object:
            with connect(next(urls)) as client:
                return client.ping()

        with capture_logs() as logs:
            assert keep_trying(ask, at="start") is True
        goes_away.join()
    assert [entry["event"] for entry in logs] == ["redis_away"]
    assert "EOF" in logs[0]["error"]


def _go_away_in_the_handshake(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)  # What is unread would reset the connection.


def test_sentinels_and_the_server_that_they_name_are_spoken_to_over_tls(
    tls: TlsServer, certificates: Certificates, tmp_path: Path
) -> None:
    sentinel = ValkeyServer(tmp_path, "--sentinel")
    try:
        with sentinel.client() as client:
            # It cannot speak TLS itself, and so would find the server dead.
            client.sentinel_monitor("jobs", "127.0.0.1", tls.port, 1)
            client.sentinel_set("jobs", "down-after-milliseconds", 3_600_000)
        with tls_proxy(sentinel.port, certificates.server) as port:
            url = f"rediss+sentinel://127.0.0.1:{port}/jobs?{certificates.options}"
            with Client(url, "q") as client:
                assert client.submit(["Hello"])
    finally:
        sentinel.stop()


def test_a_cluster_is_spoken_to_over_tls(certificates: Certificates, tmp_path: Path) -> None:
    port = free_port()
    with tls_proxy(port, certificates.server) as tls_port:
        flags = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        announced = ("--cluster-announce-port", str(tls_port))
        node = ValkeyServer(tmp_path, *flags, *announced, port=port)
        try:
            with node.client() as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
                wait_until(
                    lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok",
                    "the cluster did not form",
                )
            url = f"rediss+cluster://127.0.0.1:{tls_port}?{certificates.options}"
            with Client(url, "q") as client:
                assert client.submit(["Hello"])
        finally:
            node.stop()
