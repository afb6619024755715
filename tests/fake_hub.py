"""A server on this machine that speaks as much of the hub's API as a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>.+)")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


def commit_of(number: int) -> str:
    return f"{number:040x}"


@dataclass
class Repository:
    """Commits of files, and the names of some of them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    error: tuple[int, str] | None = None
    """Status and code by which every request for it is answered."""

    def push(self, folder: Path, *refs: str) -> str:
        """Add a commit of a folder's files, which is main and the ``refs`` from now on."""
        commit = commit_of(len(self.commits) + 1)
        self.commits[commit] = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.refs.update(dict.fromkeys(("main", *refs), commit))
        return commit


class FakeHub:
    """What the hub holds, how it shall misbehave, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        """Of the downloads that begin in the middle."""
        self.tokens: set[str | None] = set()
        self.failures: list[int] = []
        """Statuses of the next answers."""
        self.cut_downloads = 0
        """Downloads of weights that end in the middle."""
        self.corrupt_downloads = 0
        """Downloads of weights whose last byte is wrong."""
        self.may_go_on = threading.Event()
        """Until it is set, a download of weights waits in the middle."""
        self.may_go_on.set()
        self.is_waiting = threading.Event()
        """A download waits in the middle."""
        self.url = ""

    def push(self, repo: str, folder: Path, *refs: str) -> str:
        """Add a commit of a folder's files to a repository; returns it."""
        return self.repositories.setdefault(repo, Repository()).push(folder, *refs)

    def downloads(self) -> list[str]:
        """The files that were asked for, in order."""
        return [line.split("/")[-1] for line in self.requests if line.startswith("GET /")]


def _hashes(content: bytes, *, is_large: bool) -> str:
    if is_large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked = _INFO.fullmatch(path) or _FILE.fullmatch(path)
            if not asked:
                # Once a process huggingface_hub asks which agents there are.
                return self._fail(404, "")
            hub.requests.append(f"{self.command} {path}")
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.failures:
                return self._fail(hub.failures.pop(0), "")
            repository = hub.repositories.get(asked["repo"])
            if repository is None:
                return self._fail(401, "RepoNotFound")
            if repository.error:
                return self._fail(*repository.error)
            commit = repository.refs.get(asked["revision"], asked["revision"])
            if commit not in repository.commits:
                return self._fail(404, "RevisionNotFound")
            files = repository.commits[commit]
            if "file" not in asked.groupdict():
                return self._tell(asked["repo"], commit, files)
            if asked["file"] not in files:
                return self._fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return self._send_file(commit, asked["file"], files[asked["file"]])

        def _fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "X-Error-Code": code}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _tell(self, repo: str, commit: str, files: dict[str, bytes]) -> None:
            siblings = [
                {
                    "rfilename": name,
                    "size": len(content),
                    "blobId": _hashes(content, is_large=False),
                }
                for name, content in files.items()
            ]
            body = json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _send_file(self, commit: str, name: str, content: bytes) -> None:
            is_large = name.endswith(".safetensors")
            etag = _hashes(content, is_large=is_large)
            begin = 0
            if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                begin = int(found[1])
                hub.ranges.append(found[0])
            self.send_response(206 if begin else 200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{etag}"')
            if is_large:
                self.send_header("X-Linked-Etag", f'"{etag}"')
                self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("Content-Length", str(len(content) - begin))
            if begin:
                self.send_header(
                    "Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}"
                )
            self.end_headers()
            if self.command == "GET":
                self._send_body(content[begin:], is_large=is_large)

        def _send_body(self, content: bytes, *, is_large: bool) -> None:
            if not is_large:
                self.wfile.write(content)
                return
            middle = len(content) // 2
            if hub.cut_downloads:
                hub.cut_downloads -= 1
                self.wfile.write(content[:middle])
                self.close_connection = True
                return
            if hub.corrupt_downloads:
                hub.corrupt_downloads -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.wfile.write(content[:middle])
            if not hub.may_go_on.is_set():
                self.wfile.flush()
                hub.is_waiting.set()
                hub.may_go_on.wait(timeout=60)
            self.wfile.write(content[middle:])

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that are killed leave in the middle."""


@contextmanager
def run_fake_hub() -> Iterator[FakeHub]:
    """A hub without repositories, on a free port of 127.0.0.1."""
    hub = FakeHub()
    with _Server(("127.0.0.1", 0), _handler(hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.may_go_on.set()
            server.shutdown()
            thread.join()
