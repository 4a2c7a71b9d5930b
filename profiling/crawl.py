"""How fast the crawler is, beside Scrapy on the same pages, and whether its memory and its frontier stay as they are over many pages.

    python profiling/crawl.py                                        # speed, 5,000 pages
    python profiling/crawl.py --scrapy /path/to/python-with-scrapy   # beside Scrapy: follow all links, write all pages as JSON lines
    python profiling/crawl.py --pages 50000 --soak                   # memory over time
    python profiling/crawl.py --frontier                             # adding to and taking from a frontier of 100,000 URLs
    python profiling/crawl.py --write crawl                          # commit the figures

The server is a process of its own on 127.0.0.1 to 127.0.0.64, because one request in flight for each address is a rule that no setting lifts.
Its pages have 4 kB of text and 20 links. Both crawlers have a delay of 0, obey robots.txt and have 64 requests in flight. Seconds of processor time
stand beside those of the clock: on a machine that does other work they are what can be compared.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import plots
import psutil
from report import add_output_options, finish, print_table

HOSTS, PORT, LINKS = 64, 8765, 20

SPIDER = """
import scrapy
class Spider(scrapy.Spider):
    name = "all"
    start_urls = {seeds!r}
    custom_settings = dict(ROBOTSTXT_OBEY=True, CONCURRENT_REQUESTS=64, CONCURRENT_REQUESTS_PER_DOMAIN=1, DOWNLOAD_DELAY=0, LOG_LEVEL="WARNING",
                           TELNETCONSOLE_ENABLED=False, FEEDS={{"pages.jsonl": {{"format": "jsonlines"}}}}, CLOSESPIDER_PAGECOUNT=0)
    def parse(self, response):
        yield {{"url": response.url, "body": response.text}}
        yield from response.follow_all(css="a")
"""


def serve(pages: int) -> None:
    """A tree of `pages` pages over all hosts, each page made anew from its number; as little work as a server can do."""
    per_host = pages // HOSTS
    letters = "abcdefghijklmnopqrstuvwxyz"
    rng = random.Random(0)
    words = ["".join(rng.choice(letters) for _ in range(rng.randrange(3, 9))) for _ in range(4000)]

    def page(host: str, number: int) -> bytes:
        rng = random.Random(f"{host} {number}")
        text = "".join(f"<p>{' '.join(rng.choices(words, k=80))}</p>" for _ in range(8))
        links = [2 * number + 1, 2 * number + 2, *(rng.randrange(per_host) for _ in range(LINKS - 2))]
        anchors = "".join(f'<a href="/{each % 7}/{each}.html">{each}</a>' for each in links if each < per_host)
        return f"<html><head><title>{host} {number}</title></head><body>{text}{anchors}</body></html>".encode()

    class Server(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport, self.host = transport, transport.get_extra_info("sockname")[0]
            self.waiting = b""

        def data_received(self, data):
            self.waiting += data
            while b"\r\n\r\n" in self.waiting:
                head, _, self.waiting = self.waiting.partition(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode()
                if path in ("/robots.txt", "/sitemap.xml"):
                    self.transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                    continue
                body = page(self.host, 0 if path == "/" else int(path.rpartition("/")[2].partition(".")[0]))
                self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in range(HOSTS):
            await loop.create_server(Server, f"127.0.0.{number + 1}", PORT)
        print("ready", flush=True)
        await asyncio.Event().wait()

    asyncio.run(run())


def seeds() -> list[str]:
    return [f"http://127.0.0.{number + 1}:{PORT}/" for number in range(HOSTS)]


def watched(command: list[str], folder: Path) -> tuple[float, float, list[tuple[float, float]]]:
    """Runs a command. Returns seconds of the clock, of processor time, and (seconds, resident MB) along the way."""
    began, before, memory = time.perf_counter(), os.times(), []
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    inside = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            memory.append((time.perf_counter() - began, inside.memory_info().rss / 1e6))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.5)
    if process.wait():
        raise SystemExit(f"{command[:4]} failed")
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, processor, memory


def ours(folder: Path) -> tuple[float, float, list[tuple[float, float]], int]:
    allowed = [word for number in range(HOSTS) for word in ("--allow-private", f"127.0.0.{number + 1}")]
    figures = watched([sys.executable, "-m", "cllm", "crawl", *seeds(), *allowed, "--delay", "0", "--out", str(folder / "out")], folder)
    shown = subprocess.run([sys.executable, "-m", "cllm", "crawl", "status", str(folder / "out"), "--json"], capture_output=True, check=True)
    return *figures, json.loads(shown.stdout)["pages"]


def scrapy(python: str, folder: Path) -> tuple[float, float, list[tuple[float, float]], int]:
    (folder / "spider.py").write_text(SPIDER.format(seeds=seeds()))
    figures = watched([python, "-m", "scrapy", "runspider", "spider.py"], folder)
    with open(folder / "pages.jsonl") as file:
        return *figures, sum(1 for _ in file)


def frontier(count: int) -> list[dict]:
    """Microseconds for each URL that is added to and taken from a frontier, in tenths of its growth."""
    from cllm.data.sources.discovery import Discovery
    from cllm.data.sources.frontier import open_frontier
    from cllm.data.sources.settings import Settings

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        opened = open_frontier(Path(folder) / "crawl.sqlite")
        found = Discovery(opened, Settings(seeds=("http://example.org/",)))
        for tenth in range(10):
            began = time.process_time()
            for number in range(tenth * count // 10, (tenth + 1) * count // 10):
                found.found(f"http://example.org/{number % 97}/{number}", depth=1)
                if number % 1000 == 0:
                    opened.commit()
            added = time.process_time() - began
            site = opened.site("http://example.org")
            began = time.process_time()
            for _ in range(1000):
                opened.release(opened.take(site))
            took = time.process_time() - began
            rows.append({"what": "frontier", "urls": (tenth + 1) * count // 10, "add_us": added / (count / 10) * 1e6, "take_us": took / 1000 * 1e6})
    print_table(("URLs", "add, us", "take, us"), [(f"{row['urls']:,}", f"{row['add_us']:.1f}", f"{row['take_us']:.1f}") for row in rows])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--scrapy", metavar="PYTHON", help="a Python that has Scrapy")
    parser.add_argument("--soak", action="store_true", help="memory over time")
    parser.add_argument("--frontier", action="store_true", help="a frontier of 100,000 URLs")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.serve:
        serve(options.pages)
        return
    rows = frontier(100_000) if options.frontier else []
    if not options.frontier:
        server = subprocess.Popen([sys.executable, __file__, "--serve", "--pages", str(options.pages)], stdout=subprocess.PIPE)
        assert server.stdout is not None and server.stdout.readline()
        try:
            rows = crawls(options)
        finally:
            server.kill()
            server.wait()
    finish(options, rows, lambda path: draw(rows, path))


def crawls(options: argparse.Namespace) -> list[dict]:
    rows = []
    for _ in range(options.rounds):
        for name, call in {"cllm": ours, "scrapy": lambda folder: scrapy(options.scrapy, folder)}.items():
            if name == "scrapy" and not options.scrapy:
                continue
            folder = Path(tempfile.mkdtemp())
            seconds, processor, memory, pages = call(folder)
            shutil.rmtree(folder)
            row = {"what": name, "pages": pages, "seconds": seconds, "processor_seconds": processor, "pages_per_second": pages / seconds}
            row |= {"pages_per_processor_second": pages / processor, "peak_mb": max(each for _, each in memory)}
            if options.soak:
                row["memory_mb"] = [round(memory[len(memory) * share // 20][1], 1) for share in range(1, 20)]
            rows.append(row)
    header = ("crawler", "pages", "s", "CPU s", "pages/s", "pages/CPU s", "peak MB")
    cells = ("what", "pages", "seconds", "processor_seconds", "pages_per_second", "pages_per_processor_second", "peak_mb")
    print_table(header, [tuple(f"{row[cell]:,.0f}" if cell != "what" else row[cell] for cell in cells) for row in rows])
    if options.soak:
        print("resident MB in twentieths of the time:", *(row["memory_mb"] for row in rows))
    return rows


def draw(rows: list[dict], path: Path) -> None:
    timed = [row for row in rows if "pages_per_processor_second" in row]
    plots.bars(path, "Crawling", [row["what"] for row in timed], {"": [row["pages_per_processor_second"] for row in timed]}, "pages a CPU second")


if __name__ == "__main__":
    main()
