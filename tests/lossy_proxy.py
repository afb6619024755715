"""A TCP proxy in front of the tests' server that can lose a reply, as a network does."""

from __future__ import annotations

import socket
import threading
from urllib.parse import unquote, urlsplit


class LossyProxy:
    """Forwards to a Unix socket. After ``lose_reply(word)`` the next command with that word reaches
    the server, and its connection is cut instead of the reply."""

    def __init__(self, url: str) -> None:
        self._path = unquote(urlsplit(url).path)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._word: bytes | None = None
        self.num_lost = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_reply(self, word: str) -> None:
        self._word = word.encode()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # Closed.
            threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        is_lost = threading.Event()
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(self._path)
            replies = threading.Thread(target=_answer, args=[server, client, is_lost], daemon=True)
            replies.start()
            while data := client.recv(1 << 20):
                if self._word is not None and self._word in data:
                    self._word = None
                    is_lost.set()
                    server.sendall(data)
                    replies.join()
                    self.num_lost += 1
                    return
                server.sendall(data)


def _answer(server: socket.socket, client: socket.socket, is_lost: threading.Event) -> None:
    """Forward replies until one is to be lost."""
    try:
        while data := server.recv(1 << 20):
            if is_lost.is_set():
                return
            client.sendall(data)
    except OSError:
        return  # One of the two has been closed.
