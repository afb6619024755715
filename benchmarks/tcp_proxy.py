"""A TCP proxy before a Redis server that loses, holds and delays what passes through it.

The fault tests and the soak put one between a process and the server:

    with TcpProxy(server.url) as proxy:
        proxy.lose_replies("commit")     # executed, and never answered: the connection breaks
        with proxy.hold("commit") as held:
            held.wait()                  # a commit has come, and waits to be passed on

A command is called by its name, one of Lorry's scripts by that of its file.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from importlib.resources import files
from typing import Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

from broker.scripts import script_text

T = TypeVar("T")

#: Seconds for which a test waits for a command to come.
WAIT_SECONDS = 30.0


class Held:
    """Commands of one kind that are kept until the end of the ``with`` block, or ``release``."""

    def __init__(self, proxy: TcpProxy, command: str, part: Literal["request", "reply"]) -> None:
        self.command = command
        self.part = part
        self.reached = threading.Event()
        self._proxy = proxy
        self.released = asyncio.Event()

    def wait(self) -> None:
        """Return when one is held: the server has not seen it, or has executed it."""
        if not self.reached.wait(WAIT_SECONDS):
            raise TimeoutError(f"no {self.command} came in {WAIT_SECONDS:g} s")

    def release(self) -> None:
        self._proxy._call(self._proxy._holds.pop, self.command, None)
        self._proxy._call(self.released.set)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class TcpProxy:
    """Listens on 127.0.0.1 and passes on to one server; a context manager."""

    def __init__(self, url: str) -> None:
        """``url`` of the server: ``redis://`` or ``unix://``."""
        self._upstream = urlsplit(url)
        self._scripts = _script_names()
        self._connections: set[_Connection] = set()
        self._losses: Counter[str] = Counter()
        self._holds: dict[str, Held] = {}
        self.latency = 0.0
        """Seconds by which each answer is delayed."""
        self.refuses = False
        """Whether new connections are reset at once, as if there were no server."""
        self.commands: Counter[str] = Counter()
        """How many commands of each kind have been passed on."""
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._server.close)
        self.reset()
        self._run(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def lose_replies(self, command: str, times: int = 1) -> None:
        """Let the server execute the next ``times`` commands of a kind, and break the connection
        in place of the answer."""
        self._call(lambda: self._losses.update({command: times}))

    def hold(self, command: str, part: Literal["request", "reply"] = "request") -> Held:
        """Keep commands of a kind from the server, or its answers from the client."""
        held = Held(self, command, part)
        self._call(lambda: self._holds.update({command: held}))
        return held

    def stall(self) -> None:
        """Pass nothing on, in any direction, on old and new connections: they stay open."""
        self._call(self._open.clear)

    def resume(self) -> None:
        """Pass on what was stalled."""
        self._call(self._open.set)

    def reset(self) -> None:
        """Break every connection, with RST where the system allows it."""
        self._call(lambda: [connection.reset() for connection in [*self._connections]])

    def half_open(self) -> None:
        """Lose every connection without telling the client: they stay open and are never answered;
        new ones work."""
        self._call(lambda: [connection.deafen() for connection in [*self._connections]])

    @property
    def num_to_lose(self) -> int:
        """How many answers are still to be lost."""
        return self._losses.total()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.refuses:
                raise ConnectionResetError
            upstream = await self._connect()
        except OSError:
            _reset(writer)
            return
        connection = _Connection(self, (reader, writer), upstream)
        self._connections.add(connection)
        try:
            await connection.run()
        except asyncio.CancelledError:
            pass  # The proxy ends; asyncio would log it as an error.
        finally:
            self._connections.discard(connection)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._upstream.scheme == "unix":
            return await asyncio.open_unix_connection(unquote(self._upstream.path))
        return await asyncio.open_connection(self._upstream.hostname, self._upstream.port)

    def _name_of(self, args: list[bytes]) -> str:
        if args[0].upper() == b"EVALSHA":
            return self._scripts.get(args[1].decode(), "EVALSHA")
        return args[0].decode(errors="replace").upper()

    def _is_lost(self, command: str) -> bool:
        """Whether the answer to this command is to be lost; counts it."""
        if not self._losses[command]:
            return False
        self._losses[command] -= 1
        return True

    async def _finish(self) -> None:
        current = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the proxy's thread, and return what it does."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _call(self, function: Callable[..., object], *args: object) -> None:
        """Run a function in the proxy's thread, and return when it has."""

        async def call() -> None:
            function(*args)

        self._run(call())


class _Connection:
    """One client's connection and that to the server behind it."""

    def __init__(
        self,
        proxy: TcpProxy,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = client
        self._from_server, self._to_server = server
        self._loses_reply = False
        self._is_deaf = False
        self._reply_hold: Held | None = None

    async def run(self) -> None:
        """Pass on until one side ends."""
        pumps = [asyncio.ensure_future(self._requests()), asyncio.ensure_future(self._replies())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._to_client.close()
            self._to_server.close()

    def reset(self) -> None:
        _reset(self._to_client)
        self._to_server.transport.abort()

    def deafen(self) -> None:
        self._is_deaf = True

    async def _requests(self) -> None:
        proxy = self._proxy
        async for args, raw in _commands(self._from_client):
            command = proxy._name_of(args)
            held = proxy._holds.get(command)
            if held and held.part == "request":
                held.reached.set()
                await held.released.wait()
            elif held:
                self._reply_hold = held
            await proxy._open.wait()
            if self._is_deaf:
                continue
            self._loses_reply |= proxy._is_lost(command)
            proxy.commands[command] += 1
            self._to_server.write(raw)
            await self._to_server.drain()

    async def _replies(self) -> None:
        while data := await self._from_server.read(1 << 16):
            if self._loses_reply:
                self.reset()
                return
            if held := self._reply_hold:
                held.reached.set()
                await held.released.wait()
                self._reply_hold = None
            if self._proxy.latency:
                await asyncio.sleep(self._proxy.latency)
            await self._proxy._open.wait()
            if not self._is_deaf:
                self._to_client.write(data)
                await self._to_client.drain()


async def _commands(reader: asyncio.StreamReader) -> AsyncIterator[tuple[list[bytes], bytes]]:
    """The commands that a client sends, as arguments and as they came."""
    try:
        while header := await reader.readline():
            raw, args = [header], []
            for _ in range(int(header[1:])):
                size = await reader.readline()
                value = await reader.readexactly(int(size[1:]) + 2)
                raw += [size, value]
                args.append(value[:-2])
            yield args, b"".join(raw)
    except (asyncio.IncompleteReadError, ConnectionError):
        return


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once, and tell the other side by RST."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _script_names() -> dict[str, str]:
    """SHA-1 of each script -> the name of its file."""
    names = [
        file.name.removesuffix(".lua")
        for file in (files("broker") / "lua").iterdir()
        if file.name.endswith(".lua") and file.name != "common.lua"
    ]
    return {hashlib.sha1(script_text(name).encode()).hexdigest(): name for name in names}
