"""A web server on this machine that receives webhooks, and misbehaves as it is told."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def notice(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


#: What to do with a request: answer by a status, or whatever a function does.
Answer = int | Callable[["Handler"], None]


class Receiver:
    """What was received, and how the next requests are answered; 200 if nothing is said."""

    def __init__(self, port: int, scheme: str) -> None:
        self.host = f"127.0.0.1:{port}"
        self.url = f"{scheme}://{self.host}/hook?a=b"
        self.received: list[Received] = []
        self.answers: list[Answer] = []
        self.ends = threading.Event()

    @property
    def ids(self) -> list[str]:
        """The event ids of all requests."""
        return [request.headers["webhook-id"] for request in self.received]


class Handler(BaseHTTPRequestHandler):
    receiver: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.receiver.received.append(Received(self.path, headers, body))
        answer = self.receiver.answers.pop(0) if self.receiver.answers else 200
        if not isinstance(answer, int):
            answer(self)
            return
        self.send_response(answer)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there.
        pass


def redirect_to(url: str) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(307)
        handler.send_header("Location", url)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def mute(handler: Handler) -> None:
    """Nothing comes for as long as the receiver lives."""
    handler.receiver.ends.wait(60)


def drip(handler: Handler) -> None:
    """A header that never ends, a letter now and then."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while not handler.receiver.ends.wait(0.1):
        try:
            handler.wfile.write(b"x")
        except OSError:
            return


def flood(handler: Handler) -> None:
    """200, and a body without an end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not handler.receiver.ends.is_set():
        try:
            handler.wfile.write(b"x" * 65536)
        except OSError:
            return


def hang_up(handler: Handler) -> None:
    """The connection ends without an answer."""


def gibberish(handler: Handler) -> None:
    handler.wfile.write(b"\x00\x01 220 smtp.example.org ready\r\n")


@contextmanager
def run_receiver(context: ssl.SSLContext | None = None, *, port: int = 0) -> Iterator[Receiver]:
    """One that speaks TLS if a context is given."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    receiver = Receiver(server.server_port, "https" if context else "http")
    server.RequestHandlerClass = type("OwnHandler", (Handler,), {"receiver": receiver})
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.ends.set()
        server.shutdown()
        thread.join()
        server.server_close()
