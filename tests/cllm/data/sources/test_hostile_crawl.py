"""The whole crawler over a site that means harm: each trick costs one URL, and the good pages beside it are stored."""

import asyncio
import gzip
import threading

import pytest
from command import PATIENCE

pytest.importorskip("aiohttp", reason="the crawler's library, of the extra [data]")
pytest.importorskip("protego", reason="reads robots.txt, of the extra [data]")

from cllm.data.sources import politeness
from cllm.data.sources.addresses import Guard
from cllm.data.sources.crawl import Crawl
from cllm.data.sources.settings import Settings, write_settings
from cllm.data.sources.summary import read_summary

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
GOOD = 5


def whole(body, more=b""):
    return OK + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def drip(writer, first, piece):
    writer.write(first)
    while True:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.02)


async def stream(writer, first, piece):
    writer.write(first)
    while True:
        writer.write(piece)
        await writer.drain()


def moved(place):
    return b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + place + b"\r\n\r\n"


TRICKS = {
    "/header-drip": lambda writer: drip(writer, b"HTTP/1.1 200 OK\r\nX-", b"a"),
    "/body-drip": lambda writer: drip(writer, OK + b"\r\n", b"<p>"),
    "/stall": lambda writer: asyncio.sleep(PATIENCE),
    "/endless": lambda writer: stream(writer, OK + b"\r\n", b"<p>more</p>" * 1000),
    "/endless-header": lambda writer: stream(writer, OK, b"X: " + b"y" * 1000 + b"\r\n"),
    "/bomb": whole(gzip.compress(bytes(30_000_000)), b"Content-Encoding: gzip\r\n"),
    "/bomb-twice": whole(gzip.compress(gzip.compress(bytes(30_000_000))), b"Content-Encoding: gzip, gzip\r\n"),
    "/not-gzip": whole(b"no gzip at all", b"Content-Encoding: gzip\r\n"),
    "/too-short": OK + b"Content-Length: 1000\r\n\r\nshort",
    "/chunks": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nwhat\r\n",
    "/no-http": b"\x00\x01\x02 what is this\r\n\r\n",
    "/loop": moved(b"/loop-back"),
    "/loop-back": moved(b"/loop"),
    "/self": moved(b"/self"),
    "/to-file": moved(b"file:///etc/passwd"),
    "/to-inside": moved(b"http://169.254.169.254/latest/meta-data/"),
    "/to-decimal": moved(b"http://2130706433/"),
    "/to-user": moved(b"http://admin:secret@127.0.0.1/"),
    "/hops": moved(b"/hops0"),
    **{f"/hops{i}": moved(b"/hops%d" % (i + 1)) for i in range(20)},
    "/nothing": b"HTTP/1.1 204 No Content\r\n\r\n",
    "/wrong-charset": whole(b"<p>\xff\xfe\x00 page of no charset</p><a href='/good0'>x</a>", b"Content-Type: text/html; charset=no-such\r\n"),
    "/nested": whole(b"<div>" * 100_000 + b"<a href='/good1'>x</a>"),
    "/attributes": whole(b"<a " + b"x=1 " * 100_000 + b">"),
    "/header-lines": whole(b"<p>split</p>", b"X-A: 1\r\n" * 90),
    "/binary": whole(bytes(range(256)) * 100),
}


class Harm:
    """The server, in a thread."""

    def __enter__(self):
        self.asked, started = [], threading.Event()
        self._loop = asyncio.new_event_loop()

        async def answer(reader, writer):
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode()
                self.asked.append(path)
                if path == "/":
                    links = [
                        *(each for each in TRICKS if not each[5:].isdigit()),
                        *(f"/good{i}" for i in range(GOOD)),
                        "javascript:alert(1)",
                        "file:///etc/passwd",
                        "http://[::1]/",
                        "http://0x7f.1/",
                    ]
                    writer.write(whole("".join(f'<a href="{each}">x</a>' for each in links).encode()))
                elif path.startswith("/good"):
                    writer.write(whole(b"<p>a good page, number " + path[5:].encode()))
                else:
                    trick = TRICKS.get(path, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                    if isinstance(trick, bytes):
                        writer.write(trick)
                    else:
                        await trick(writer)
                await writer.drain()
            except (OSError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        async def begin():
            self._server = await asyncio.start_server(answer, "127.0.0.1", 0)
            self.port = self._server.sockets[0].getsockname()[1]
            started.set()

        def serve():
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(begin())
            self._loop.run_forever()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        assert started.wait(PATIENCE)
        return self

    def __exit__(self, *exc):
        async def end():
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)


def test_each_trick_costs_one_url_and_good_pages_are_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(politeness, "SHORTEST_BACK_OFF", 0.01)
    with Harm() as site:
        settings = Settings(seeds=(f"http://127.0.0.1:{site.port}/",), delay=0.0, timeout=1.5, retries=1, max_bytes=1_000_000)
        write_settings(tmp_path, settings)
        crawl = Crawl(tmp_path, settings, Guard([f"127.0.0.1:{site.port}"]))
        assert crawl.run()
        summary = read_summary(tmp_path)[1]
        assert {f"/good{i}" for i in range(GOOD)} <= set(site.asked)
        assert max(site.asked.count(path) for path in site.asked) <= 2 and "/hops15" not in site.asked
    # The good ones, the first, and what is odd and yet a page.
    odd = {"/wrong-charset", "/nested", "/attributes", "/header-lines", "/binary"}
    assert GOOD + 1 <= summary.pages <= GOOD + 1 + len(odd) + 1, summary
    reasons = summary.failed | summary.left_out
    for words in ("time limit", "unpacked", "larger than", "damaged", "not HTTP", "12 times", "itself", "nothing may be fetched"):
        assert any(words in reason for reason in reasons), (words, reasons)
    assert not summary.queued and not summary.waiting
