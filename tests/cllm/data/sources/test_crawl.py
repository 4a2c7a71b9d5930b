"""The crawler against servers on the loopback: what it reaches and what it leaves, how it asks, and what a kill or a pause costs."""

import asyncio
import io
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from itertools import pairwise

import pytest
from command import PATIENCE, Started, cllm, wait_for, wait_until

aiohttp = pytest.importorskip("aiohttp", reason="the crawler's library, of the extra [data]")
pytest.importorskip("protego", reason="reads robots.txt, of the extra [data]")
fastwarc = pytest.importorskip("fastwarc", reason="another program's reader of WARC, of the extra [data]")

from aiohttp import web  # noqa: E402

from cllm.data.sources import politeness  # noqa: E402
from cllm.data.sources.addresses import Guard  # noqa: E402
from cllm.data.sources.crawl import Crawl  # noqa: E402
from cllm.data.sources.settings import CrawlLock, Settings, merged, read_settings, write_settings  # noqa: E402
from cllm.data.sources.summary import read_summary  # noqa: E402
from cllm.runtime.errors import DataError, UserError  # noqa: E402


class LocalSite:
    """A server in a thread. `pages`: by path, the HTML, or a function of the request; `asked`: (path, begin, end) of each request."""

    def __init__(self, pages, num_hosts=1, seconds=0.0):
        self.pages, self.num_hosts, self.seconds = pages, num_hosts, seconds
        self.asked = []
        self.headers = []
        self.most_at_once = 0
        self._now = Counter()

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(PATIENCE)
        return self

    def _serve(self, started):
        asyncio.set_event_loop(self._loop)

        async def begin():
            server = web.Application()
            server.router.add_route("GET", "/{path:.*}", self._answer)
            self._runner = web.AppRunner(server, access_log=None, shutdown_timeout=0.1)
            await self._runner.setup()
            first = web.TCPSite(self._runner, "127.0.0.1", 0)
            await first.start()
            self.port = self._runner.addresses[0][1]
            for number in range(1, self.num_hosts):
                await web.TCPSite(self._runner, f"127.0.0.{number + 1}", self.port).start()
            started.set()

        self._loop.run_until_complete(begin())
        self._loop.run_forever()

    async def _answer(self, request):
        host = request.host
        self._now[host] += 1
        self.most_at_once = max(self.most_at_once, self._now[host])
        begin = time.time()
        try:
            if self.seconds:
                await asyncio.sleep(self.seconds)
            page = self.pages(request) if callable(self.pages) else self.pages.get(request.path_qs)
            page = page(request) if callable(page) else page
            if page is None:
                return web.Response(status=404)
            return page if isinstance(page, web.StreamResponse) else web.Response(text=page, content_type="text/html")
        finally:
            self._now[host] -= 1
            self.asked.append((request.path_qs, begin, time.time()))
            self.headers.append((request.path_qs, dict(request.headers)))

    def __exit__(self, *exc):
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def count(self, path):
        return sum(asked == path for asked, _, _ in self.asked)


def page(*links, text=""):
    return f"<html><body><p>{text or links}</p>" + "".join(f'<a href="{each}">x</a>' for each in links) + "</body></html>"


def words(seed, count=60):
    rng = random.Random(seed)
    return " ".join("".join(rng.choice("abcdefghijklm") for _ in range(6)) for _ in range(count))


def crawl(site, folder, **settings):
    values = {"seeds": (f"{site.url}/",), "delay": 0.0} | settings
    folder.mkdir(exist_ok=True)
    allowed = [f"127.0.0.{number + 1}" for number in range(site.num_hosts)]
    settings = Settings(**values)
    write_settings(folder, settings)
    assert Crawl(folder, settings, Guard(allowed)).run()
    return read_summary(folder)[1]


def records(folder):
    """(kind, path) of each page, in the order of the segments."""
    found = []
    for path in sorted((folder / "pages").iterdir()):
        assert path.name.endswith(".warc.gz")
        for each in fastwarc.ArchiveIterator(io.BytesIO(path.read_bytes()), parse_http=True):
            if each.headers["WARC-Type"] != "warcinfo":
                found.append((each.headers["WARC-Type"], "/" + each.headers["WARC-Target-URI"].split("/", 3)[3], each.reader.read()))
    return found


def stored(folder):
    return [path for _, path, _ in records(folder)]


# -- what is reached -----------------------------------------------------------------------------------------------------------


def test_a_site_is_crawled_once_and_every_page_that_is_left_out_has_its_reason(tmp_path):
    pages = {
        "/": page("/a", "/b", "/private/x", "/gone", "/a?utm_source=mail", "http://127.0.0.99/", "/moved", "/picture", "/kept-out", "mailto:x@y"),
        "/a": page("/", "/b#part", "/c"),
        "/b": page(text="the same bytes"),
        "/c": page(text="the same bytes"),
        "/moved": lambda request: web.Response(status=301, headers={"Location": "/target"}),
        "/target": page(text="moved here"),
        "/picture": lambda request: web.Response(body=b"\x89PNG", content_type="image/png"),
        "/kept-out": "<html><head><meta name=robots content=noindex></head><a href=/behind>x</a></html>",
        "/behind": page(text="behind"),
        "/listed": page(text="only a sitemap names it"),
        "/robots.txt": lambda request: web.Response(text="User-agent: *\nDisallow: /private\nSitemap: /list.xml\n"),
        "/list.xml": lambda request: web.Response(
            text=f"<urlset><url><loc>http://{request.host}/listed</loc></url></urlset>", content_type="application/xml"
        ),
    }
    with LocalSite(pages) as site:
        summary = crawl(site, tmp_path / "out")
        assert Counter(stored(tmp_path / "out")) == Counter(["/", "/a", "/b", "/c", "/target", "/behind", "/listed"])
        assert site.count("/private/x") == 0 and site.count("/robots.txt") == 1
        assert all(site.count(path) == 1 for path in pages)
        assert {each["User-Agent"].partition("/")[0] for _, each in site.headers} == {"cllm"}
    assert summary.pages == 7 and summary.duplicates == 1 and summary.queued == summary.waiting == 0
    assert summary.failed == {"status 404": 1}
    assert summary.left_out["robots.txt forbids it"] == 1 and summary.left_out["its type is image/png"] == 1
    assert sum(count for reason, count in summary.left_out.items() if "noindex" in reason) == 1
    assert summary.not_queued == {"outside of --scope": 1}
    kinds = {path: kind for kind, path, _ in records(tmp_path / "out")}
    assert sorted(kinds[each] for each in ("/b", "/c")) == ["response", "revisit"]


def test_what_asks_not_to_be_trained_on_is_left_out_unless_that_is_ignored(tmp_path):
    reserved = web.Response(text=page(text="reserved"), content_type="text/html", headers={"Content-Signal": "search=yes, ai-train=no"})
    pages = {"/": page("/a", "/b"), "/a": lambda request: reserved, "/b": page(text="free")}
    with LocalSite(pages) as site:
        summary = crawl(site, tmp_path / "page")
        assert sorted(stored(tmp_path / "page")) == ["/", "/b"]
        assert summary.left_out == {"the page asks not to be trained on (Content-Signal: ai-train=no)": 1}
    pages |= {"/a": page(text="a"), "/robots.txt": "User-agent: *\nContent-Signal: search=yes,ai-train=no\nAllow: /\n"}
    with LocalSite(pages) as site:
        summary = crawl(site, tmp_path / "site")
        assert summary.pages == 0 and list(summary.left_out) == ["its robots.txt asks not to train on its pages (Content-Signal: ai-train=no)"]
        assert site.count("/") == 0
        assert crawl(site, tmp_path / "ignored", content_signals=False).pages == 3


def test_depth_and_the_number_of_pages_are_limits(tmp_path):
    pages = {f"/{i}": page(f"/{i + 1}", f"/{i}-side") for i in range(1, 9)}
    pages |= {"/": page("/1"), **{f"/{i}-side": page(text=f"{i}") for i in range(9)}}
    with LocalSite(pages) as site:
        assert crawl(site, tmp_path / "deep", depth=2).pages == 4
        assert set(stored(tmp_path / "deep")) == {"/", "/1", "/2", "/1-side"}
        assert crawl(site, tmp_path / "few", max_pages=3).pages == 3
        before = len(site.asked)
        assert crawl(site, tmp_path / "few", max_pages=3).pages == 3
        assert len(site.asked) - before <= 2  # robots.txt and nothing that is stored
        assert crawl(site, tmp_path / "few", max_pages=5).pages == 5
        assert len(stored(tmp_path / "few")) == len(set(stored(tmp_path / "few"))) == 5


def test_an_address_that_is_not_allowed_is_not_reached_by_link_or_redirect(tmp_path):
    with LocalSite({"/": page(text="secret")}) as secret:
        pages = {
            "/": page(f"http://localhost:{secret.port}/", "/there"),
            "/there": lambda request: web.Response(status=302, headers={"Location": f"http://127.0.0.1:{secret.port}/"}),
        }
        with LocalSite(pages) as site:
            folder = tmp_path / "out"
            folder.mkdir()
            seeds = (f"{site.url}/", f"{secret.url}/", f"http://localhost:{secret.port}/")
            settings = Settings(seeds=seeds, delay=0.0, retries=0)
            write_settings(folder, settings)
            Crawl(folder, settings, Guard([f"127.0.0.1:{site.port}"])).run()
        assert secret.asked == [] and stored(folder) == ["/"]


def test_a_larger_depth_goes_on_and_a_shorter_way_counts(tmp_path):
    pages = {"/": page("/1", "/map"), "/map": page(text="map"), **{f"/{i}": page(f"/{i + 1}", text=words(i)) for i in range(1, 9)}}
    with LocalSite(pages) as site:
        summary = crawl(site, tmp_path / "out", depth=2)
        assert set(stored(tmp_path / "out")) == {"/", "/map", "/1", "/2"} and summary.left_out["deeper than --depth"] == 1
        assert crawl(site, tmp_path / "out", depth=4).pages == 6
        pages["/map"] = page("/5", text="now it names a page that was too deep")
        summary = crawl(site, tmp_path / "out", depth=4, revisit=0.0)
        assert set(stored(tmp_path / "out")) == {"/", "/map", *(f"/{i}" for i in range(1, 8))} and summary.left_out["deeper than --depth"] == 1
        assert site.count("/8") == 0


def test_a_crawl_that_stores_nothing_says_why(tmp_path):
    with LocalSite({"/robots.txt": lambda request: web.Response(text="User-agent: *\nDisallow: /")}) as site:
        done = cllm("crawl", f"{site.url}/", "--allow-private", "127.0.0.1", "--delay", 0, "--out", tmp_path / "out")
        assert done.status == 1 and "no page was stored: robots.txt forbids it" in done.err
        done = cllm("crawl", f"{site.url}/", "--delay", 0, "--out", tmp_path / "other", "--retries", 0)
        assert done.status == 1 and "is not a public address" in done.err and "run it again with --allow-private" in done.err, done


# -- how it asks ---------------------------------------------------------------------------------------------------------------


def test_one_request_at_a_time_and_the_pause_between_them_is_kept_over_a_kill(tmp_path):
    pages = {"/": page(*(f"/{i}" for i in range(6))), **{f"/{i}": page(text=str(i)) for i in range(6)}}
    with LocalSite(pages, seconds=0.02) as site:
        process = start(site, tmp_path / "out", delay=0.3)
        wait_until(lambda: len(site.asked) >= 4, process)
        process.kill()
        process.wait()
        assert start(site, tmp_path / "out", delay=0.3).wait(PATIENCE) == 0
        assert site.most_at_once == 1
        order = sorted(site.asked, key=lambda each: each[1])
        gaps = [after[1] - before[2] for before, after in pairwise(order)]
        assert min(gaps) >= 0.29, gaps
    assert sorted(stored(tmp_path / "out")) == sorted(each for each in pages)


def test_a_server_that_is_busy_is_asked_again_when_it_says_and_at_most_four_times(tmp_path, monkeypatch):
    monkeypatch.setattr(politeness, "SHORTEST_BACK_OFF", 0.02)
    tries = Counter()

    def busy(request):
        tries[request.path] += 1
        if request.path == "/soon" and tries["/soon"] > 1:
            return page(text="at last")
        return web.Response(status=503, headers={"Retry-After": "1"} if request.path == "/soon" else {})

    with LocalSite({"/": page("/soon", "/never"), "/soon": busy, "/never": busy}) as site:
        summary = crawl(site, tmp_path / "out")
        soon = [begin for path, begin, _ in site.asked if path == "/soon"]
    assert tries == {"/soon": 2, "/never": 4} and soon[1] - soon[0] >= 1.0
    assert summary.failed == {"status 503": 1} and summary.pages == 2


def test_enough_pages_end_a_crawl_that_has_something_to_try_again_much_later(tmp_path):
    pages = {"/": page("/later", *(f"/{i}" for i in range(9))), **{f"/{i}": page(text=words(i)) for i in range(9)}}
    with LocalSite(pages | {"/later": lambda request: web.Response(status=500)}) as site:
        # One failure of one page does not hold up the others, and is not waited for.
        summary = crawl(site, tmp_path / "out", max_pages=10, retries=3)
    assert summary.pages == 10 and summary.waiting + summary.failed.get("status 500", 0) <= 1


def test_a_robots_txt_that_cannot_be_read_closes_the_site_until_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(politeness, "SHORTEST_BACK_OFF", 0.02)
    broken = [True]
    pages = {"/": page(text="x"), "/robots.txt": lambda request: web.Response(status=500 if broken[0] else 404)}
    with LocalSite(pages) as site:
        summary = crawl(site, tmp_path / "out", retries=1)
        assert site.count("/") == 0 and summary.pages == 0 and list(summary.left_out) == ["its robots.txt cannot be read: status 500"]
        broken[0] = False
        assert crawl(site, tmp_path / "out", retries=1).pages == 1


# -- traps ---------------------------------------------------------------------------------------------------------------------


def endless(request):
    """40 good pages behind a long chain, and a calendar, filters that combine and a deep path without end."""
    path, rng = request.path, random.Random(request.path_qs)
    if path.startswith("/good/"):
        number = int(path[6:])
        return page(*[f"/good/{number + 1}"] * (number < 40), "/calendar/0/1", "/shop/", "/deep/", text=words(number))
    if path.startswith("/calendar/"):
        day = int(path.split("/")[3])
        return page(*(f"/calendar/{rng.randrange(9)}/{day + i}" for i in range(1, 12)), text=f"No event takes place on this day, which is {day}")
    if path.startswith("/shop/"):
        filters = (f"/shop/?{request.query_string}&f{rng.randrange(50)}={i}" for i in range(6))
        return page(*filters, text="All things that our shop has to offer to you")
    if path.startswith("/deep/"):
        return page(f"{path}{rng.choice('abc')}{rng.randrange(9)}/", text=words(path))
    return page("/good/0", "/calendar/0/1", "/shop/", "/deep/") if path == "/" else None


def test_traps_leave_room_for_good_pages_and_come_to_an_end(tmp_path):
    with LocalSite(endless) as site:
        summary = crawl(site, tmp_path / "few", max_pages=150, depth=60)
        good = {path for path in stored(tmp_path / "few") if path.startswith("/good/")}
        assert len(good) >= 35, summary
        summary = crawl(site, tmp_path / "all", depth=45, max_per_site=5000)
        assert summary.pages < 600 and {f"/good/{i}" for i in range(41)} <= set(stored(tmp_path / "all")), summary
        assert "a part of the site that brings nothing new" in summary.left_out | summary.not_queued


# -- again ---------------------------------------------------------------------------------------------------------------------


def test_what_is_due_is_asked_for_with_its_etag_and_stored_again_only_where_it_changed(tmp_path):
    versions = {"/": 1, "/same": 1}

    def versioned(request):
        tag = f'"{versions[request.path]}"'
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304)
        return web.Response(text=page("/same", text=f"version {tag}"), content_type="text/html", headers={"ETag": tag})

    with LocalSite({"/": versioned, "/same": versioned}) as site:
        crawl(site, tmp_path / "out", revisit=0.0)
        versions["/"] = 2
        summary = crawl(site, tmp_path / "out", revisit=0.0)
        assert summary.pages == 2 and Counter(stored(tmp_path / "out")) == {"/": 2, "/same": 1}
        asked = [headers.get("If-None-Match") for path, headers in site.headers if path == "/same"]
        assert asked == [None, '"1"']
        assert crawl(site, tmp_path / "out", revisit=3600.0).pages == 2
        assert site.count("/same") == 2
    assert len(list((tmp_path / "out" / "pages").iterdir())) == 2


# -- kills, pauses, locks ------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from cllm.data.sources.addresses import Guard
from cllm.data.sources.crawl import Crawl
from cllm.data.sources.settings import CrawlLock, read_settings
folder, hosts = Path(sys.argv[1]), int(sys.argv[2])
with CrawlLock(folder):
    Crawl(folder, read_settings(folder), Guard([f"127.0.0.{i + 1}" for i in range(hosts)])).run()
"""


def start(site, folder, **settings):
    folder.mkdir(exist_ok=True)
    seeds = tuple(f"http://127.0.0.{number + 1}:{site.port}/" for number in range(site.num_hosts))
    write_settings(folder, Settings(**{"seeds": seeds, "delay": 0.0} | settings))
    return Started(folder, site.num_hosts, program=SCRIPT)


PER_HOST = 500


def tree(request):
    """PER_HOST pages a host, each linked from two others."""
    if request.path == "/robots.txt":
        return web.Response(text="")
    if request.path == "/sitemap.xml":
        return None
    number = int(request.path[1:] or 0)
    links = [each for each in (2 * number + 1, 2 * number + 2, number * 7 % PER_HOST) if each < PER_HOST]
    return page(*(f"/{each}" if each else "/" for each in links), text=words(f"{request.host} {number}"))


def test_a_crawl_that_is_killed_again_and_again_stores_each_page_once(tmp_path, request):
    kills, rng, folder = request.config.getoption("--kills"), random.Random(0), tmp_path / "out"
    num_hosts = 4 if kills > 3 else 1
    with LocalSite(tree, num_hosts) as site:
        per_kill = num_hosts * PER_HOST // (kills + 1)
        for _ in range(kills):
            process = start(site, folder)
            goal = len(site.asked) + rng.randrange(1, 2 * per_kill)
            while len(site.asked) < goal and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.random() * 0.3)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert start(site, folder).wait(PATIENCE) == 0
        tries = Counter((path, host["Host"]) for path, host in site.headers if path not in ("/robots.txt", "/sitemap.xml"))
    kept = Counter()
    for path in sorted((folder / "pages").iterdir()):
        for each in fastwarc.ArchiveIterator(io.BytesIO(path.read_bytes())):
            if each.headers["WARC-Type"] != "warcinfo":
                kept[each.headers["WARC-Target-URI"]] += 1
    assert len(kept) == len(tries) == num_hosts * PER_HOST and set(kept.values()) == {1}
    summary = read_summary(folder)[1]
    assert summary.pages == num_hosts * PER_HOST and not summary.failed and not summary.queued
    assert site.most_at_once == 1


def test_a_signal_pauses_within_seconds_and_the_same_command_goes_on(tmp_path):
    out = tmp_path / "out"
    with LocalSite(tree, num_hosts=2) as site:
        arguments = ["crawl", f"{site.url}/", f"http://127.0.0.2:{site.port}/", "--allow-private", "127.0.0.1", "--allow-private", "127.0.0.2"]
        arguments += ["--out", out, "--delay", "0", "--max-pages", "300"]
        process = Started(*arguments)
        wait_until(lambda: len(site.asked) > 40, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        assert process.returncode == 130 and "the same command goes on" in said and "Traceback" not in said
        assert not list((out / "pages").glob("*.open"))
        before = read_summary(out)[1]
        assert before.pages == len(stored(out)) > 0 and before.queued > 0
        done = cllm(*arguments[:-1], 200, "--json")
        events = done.out.splitlines()
        assert done.status == 0 and '"event": "begun"' in events[0] and '"event": "done"' in events[-1]
        assert "--max-pages is now 200; it was 300" in done.err
        assert len(stored(out)) == 200
        status = cllm("crawl", "status", out, "--json").json
        assert status["pages"] == 200 and status["state"] == "to be continued"


def test_two_crawls_into_one_folder_are_refused(tmp_path):
    with CrawlLock(tmp_path), pytest.raises(UserError, match=f"is being crawled by process {os.getpid()}"):
        CrawlLock(tmp_path)
    with CrawlLock(tmp_path):
        pass


def test_a_disk_that_is_full_ends_the_crawl_with_what_was_stored(tmp_path, monkeypatch):
    from cllm.data.sources.store import Store

    append = Store.append

    def full(self, rows):
        """Pages go on coming while the first ones are written."""
        if self.size > 3000:
            raise DataError("the disk is full")
        wait_for(lambda: len(site.asked) > 250)
        append(self, rows)

    with LocalSite(tree) as site:
        monkeypatch.setattr(Store, "append", full)
        with pytest.raises(DataError, match="the disk is full"):
            crawl(site, tmp_path / "out")
        monkeypatch.undo()
        assert crawl(site, tmp_path / "out").pages == 500
    assert len(stored(tmp_path / "out")) == len(set(stored(tmp_path / "out"))) == 500


# -- settings ------------------------------------------------------------------------------------------------------------------


def test_settings_are_kept_and_changes_are_told(tmp_path):
    first, changes = merged(None, {"seeds": ("http://a/",), "delay": 1.0, "max_pages": None})
    assert changes == [] and first.delay == 1.0
    write_settings(tmp_path, first)
    assert read_settings(tmp_path) == first
    older = {name: value for name, value in first.to_json().items() if name != "content_signals"}  # of a crawl that knew no such signals
    (tmp_path / "crawl.json").write_text(json.dumps(older))
    assert read_settings(tmp_path) == first
    second, changes = merged(read_settings(tmp_path), {"seeds": ("http://b/",), "delay": 3.0, "scope": None})
    assert second.seeds == ("http://a/", "http://b/") and second.delay == 3.0
    assert changes == ["http://b/ is one more beginning", "--delay is now 3; it was 1"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 2}', b'{"format": 1, "delay": "soon"}', b"\xff"])
def test_damaged_settings_are_one_line(tmp_path, content):
    (tmp_path / "crawl.json").write_bytes(content)
    with pytest.raises(DataError, match=r"crawl\.json cannot be read"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["example.com", "--out", "x"], "Did you mean https://example.com"),
        (["https://example.com/"], "--out is missing"),
        (["--out", "x"], "say where to begin"),
        (["https://example.com/", "--out", "x", "--retries", "9"], "retries"),
        (["https://example.com/", "--out", "x", "--contact", "me\nX: y"], "--contact must be"),
        (["status", "x"], "holds no crawl"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(tmp_path, arguments, words):
    done = cllm("crawl", *arguments, cwd=tmp_path)
    assert done.status in (1, 2) and words in done.err and len(done.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
