"""Connections over TLS, with a certificate authority of the tests' own."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from producer.client import Client
from schemas.errors import ServerUnavailable
from tests.servers import ValkeyServer
from tests.test_producer_cli import Producer
from tests.tls_proxy import tls_proxy


class TlsServer:
    """A server that wants TLS, and a certificate of its clients."""

    def __init__(self, server: ValkeyServer, port: int, folder: Path) -> None:
        self.server = server
        self.port = port
        self.ca, self.certificate, self.key = (
            folder / name for name in ("ca.pem", "client.pem", "client.key")
        )

    @property
    def url(self) -> str:
        files = f"ssl_certfile={self.certificate}&ssl_keyfile={self.key}"
        return f"rediss://127.0.0.1:{self.port}?ssl_ca_certs={self.ca}&{files}"


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    folder = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    ca.configure_trust(context)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    server = ValkeyServer(folder / "server")
    with tls_proxy(server.port, context) as port:
        tls = TlsServer(server, port, folder)
        ca.cert_pem.write_to_path(str(tls.ca))
        client = ca.issue_cert("client@example.org")
        client.cert_chain_pems[0].write_to_path(str(tls.certificate))
        client.private_key_pem.write_to_path(str(tls.key))
        yield tls
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
