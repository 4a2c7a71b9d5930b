"""A web of servers on 127.0.0.x in a thread of this process, which write whatever a test wants, byte for byte.

with Web() as web:
    site = web.site(handler)          each site has an address and a port of its own
    ... crawl site.url("/") ...
    site.hits                         what was asked for, in order
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Hit:
    """A request that arrived."""

    path: str
    headers: dict[str, str]
    time: float


@dataclass
class Site:
    address: str
    port: int
    hits: list[Hit] = field(default_factory=list)
    connections: int = 0
    active: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list, repr=False)
    most_at_once: int = 0
    """Requests that were being answered at one time, to clients that were still there."""

    def url(self, path: str = "/") -> str:
        return f"http://{self.address}:{self.port}{path}"

    @property
    def paths(self) -> list[str]:
        return [hit.path for hit in self.hits]

    @property
    def counts(self) -> Counter[str]:
        """How often each path was asked for, robots.txt left out."""
        return Counter(path for path in self.paths if path != "/robots.txt")


@dataclass
class Exchange:
    """One request, and the ways to answer it."""

    site: Site
    path: str
    headers: dict[str, str]
    writer: asyncio.StreamWriter
    keep: bool = True

    async def raw(self, data: bytes) -> None:
        """Bytes as they are; the connection is closed after the last."""
        self.keep = False
        self.writer.write(data)
        await self.writer.drain()

    async def send(self, body: bytes | str = b"", status: int = 200, **headers: str) -> None:
        """A proper answer. Underscores in the names of headers stand for hyphens."""
        content = body.encode() if isinstance(body, str) else body
        told = {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(content))}
        told |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in told.items() if value)
        self.writer.write(f"HTTP/1.1 {status} Words\r\n{lines}\r\n".encode() + content)
        await self.writer.drain()

    async def redirect(self, location: str, status: int = 302) -> None:
        await self.send(status=status, Location=location)


Handler = Callable[[Exchange], Awaitable[None]]


class Web:
    """The servers. A context manager; everything ends with the block, also answers that never would."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self.sites: list[Site] = []

    def __enter__(self) -> Web:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def site(self, handler: Handler, address: str = "", port: int = 0, encrypted: ssl.SSLContext | None = None) -> Site:
        """One more server; by itself it gets the next free address from 127.0.0.2 on."""
        address = address or f"127.0.0.{2 + len(self.sites)}"
        site = Site(address, 0)
        server = asyncio.run_coroutine_threadsafe(self._start(site, handler, port, encrypted), self._loop).result()
        site.port = server.sockets[0].getsockname()[1]
        self.sites.append(site)
        return site

    @property
    def allowed(self) -> list[str]:
        """For `--allow-private`: the servers that may be reached."""
        return [f"{site.address}:{site.port}" for site in self.sites]

    async def _start(self, site: Site, handler: Handler, port: int, encrypted: ssl.SSLContext | None) -> asyncio.Server:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            self._tasks.add(task)
            site.connections += 1
            try:
                while await self._exchange(site, handler, reader, writer):
                    pass
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                self._tasks.discard(task)
                writer.close()

        server = await asyncio.start_server(serve, site.address, port, ssl=encrypted)
        self._servers.append(server)
        return server

    async def _exchange(self, site: Site, handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request, *lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        exchange = Exchange(site, request.split(" ")[1], headers, writer)
        site.hits.append(Hit(exchange.path, headers, time.monotonic()))
        peer = reader, writer
        site.active.append(peer)
        site.most_at_once = max(site.most_at_once, sum(not _gone(*each) for each in site.active))
        answer = asyncio.ensure_future(handler(exchange))
        try:
            while not answer.done() and not _gone(*peer):
                await asyncio.wait({answer}, timeout=0.02)
            if answer.done():
                answer.result()
        finally:
            answer.cancel()
            site.active.remove(peer)
        return exchange.keep

    async def _stop(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _gone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    return reader.at_eof() or writer.transport.is_closing()
