"""Pages whose scripts are run, with a browser that does what a test says: what a page may load, and what is kept of it."""

import asyncio
import time

import pytest
from web_servers import Web

pytest.importorskip("aiohttp", reason="the crawler's library, of the extra [data]")
pytest.importorskip("protego", reason="reads robots.txt, of the extra [data]")

from cllm.data.sources.addresses import Guard
from cllm.data.sources.browser import Rendered
from cllm.data.sources.crawl import Crawl
from cllm.data.sources.fetch import Fetched, Fetcher, Limits
from cllm.data.sources.politeness import Turns
from cllm.data.sources.rendering import REQUESTS, Rendering
from cllm.data.sources.robots import Robots
from cllm.data.sources.settings import Settings, write_settings
from cllm.data.sources.summary import read_summary


class Scripted:
    """In place of Chromium. act(url, load): what the scripts of a page do; the text that they write, or Rendered."""

    def __init__(self, act):
        self._act = act

    async def render(self, page, url, load, bounds):
        found = await self._act(url, load)
        return found if isinstance(found, Rendered) else Rendered(found.encode())


@pytest.mark.parametrize(
    ("told", "text", "given"),
    [
        ("text/html", "gr\u00fcn".encode(), "text/html; charset=utf-8"),
        ("", b"green", "text/html; charset=utf-8"),
        ("text/html", "gr\u00fcn".encode("latin-1"), "text/html"),
        ("text/html; charset=koi8-r", b"green", "text/html; charset=koi8-r"),
        ("text/html", b"<meta charset=koi8-r>", "text/html"),
    ],
)
def test_the_browser_is_told_the_charset_that_a_page_does_not_tell(told, text, given):
    seen = []

    class Looking(Scripted):
        async def render(self, page, url, load, bounds):
            seen.append(page.headers["content-type"])
            return Rendered(b"x")

    async def run():
        async with Rendering(Looking(None), Settings(), Limits(), "cllm/1", None, None, Turns()) as rendering:
            await rendering.of(Fetched("http://x.org/", "http://x.org/", 200, headers=(("Content-Type", told),) if told else (), body=text))

    asyncio.run(run())
    assert seen == [given]


@pytest.fixture
def web():
    with Web() as found:
        yield found


def load_all(web, paths, page, **settings):
    """What a page at `page`, a site or the address of a public one, gets for what its scripts ask for; and the seconds its site is left alone."""
    guard, limits = Guard(web.allowed), Limits(max_bytes=1000)
    url, address = ("http://public.example/", "1.1.1.1") if isinstance(page, str) else (page.url(), page.address)
    found = []

    async def act(url, load):
        found.extend([await load(each, "text/plain") for each in paths])
        return "text"

    async def run():
        async with Fetcher(limits, guard, "cllm/1") as fetcher:
            crawl = Settings(delay=0.0, **settings), limits, "cllm/1", fetcher, Robots(fetcher), Turns()
            async with Rendering(Scripted(act), *crawl) as rendering:
                return await rendering.of(Fetched(url, url, 200, body=b"<script>", address=address))

    pause = asyncio.run(run())[1]
    return [each and (each.status, each.body) for each in found], pause


async def answers(exchange):
    match exchange.path:
        case "/robots.txt":
            await exchange.send("User-agent: *\nDisallow: /forbidden")
        case "/moved":
            await exchange.redirect("/forbidden/more")
        case "/away":
            await exchange.redirect("http://127.0.0.1:9/")
        case "/gone":
            await exchange.send("gone", 404)
        case "/large":
            await exchange.send("x" * 2000)
        case "/not-for-models":
            await exchange.send("x", Content_Signal="ai-train=no")
        case "/noai":
            await exchange.send("x", X_Robots_Tag="noindex, noai")
        case "/noindex":
            await exchange.send("data", X_Robots_Tag="noindex")
        case "/busy":
            await exchange.send("", 429, Retry_After="77")
        case path:
            await exchange.send(path)


def test_scripts_load_what_the_rules_for_pages_allow(web):
    site, other = web.site(answers), web.site(answers)
    paths = ["/one", "/one", "/forbidden", "/moved", "/away", "/gone", "/large", "/not-for-models", "/denied/x", "/noai", "/noindex"]
    urls = [*map(site.url, paths), other.url("/two"), "ftp://x.org/", "http://127.0.0.1:9/", site.url("/busy"), site.url("/after")]
    found, pause = load_all(web, urls, site, deny=("/denied/",))
    one, two = (200, b"/one"), (200, b"/two")
    assert found == [one, one, None, None, None, (404, b""), None, None, None, None, (200, b"data"), two, None, None, (429, b""), None]
    assert site.counts["/one"] == 1 and not {"/forbidden", "/forbidden/more", "/denied/x", "/after"} & set(site.paths)
    assert 70 < pause <= 77
    assert other.hits[-1].headers["origin"] == site.url("") and "origin" not in site.hits[-1].headers
    assert site.hits[-1].headers["accept"] == "text/plain" and site.hits[-1].headers["user-agent"] == "cllm/1"


def test_a_public_page_reaches_no_address_that_was_allowed_for_others(web):
    site = web.site(answers)
    assert load_all(web, [site.url("/secret")], "public") == ([None], 0.0) and site.connections == 0


def test_a_page_costs_so_many_requests_and_no_more(web):
    site = web.site(answers)
    found, _ = load_all(web, [site.url(f"/{number}") for number in range(REQUESTS + 10)], site)
    assert sum(each is not None for each in found) == site.counts.total() == REQUESTS


def test_a_page_is_stored_again_where_its_scripts_write_something_else_and_not_where_they_fail(tmp_path, web):
    gone = None
    site = web.site(lambda exchange: exchange.send("<script>" if exchange.path == "/" else "", 404 if text is gone else 200, ETag='"x"'))
    texts = ["one", "one", gone, Rendered(problem="Chromium crashed"), "two", "<meta name=robots content=noindex>"]
    settings = Settings(seeds=(site.url(),), delay=0.0, sitemaps=False, revisit=0.0, browser=True)
    write_settings(tmp_path, settings)
    stored, told = [], []
    for text in texts:

        async def act(url, load, text=text):
            return text

        time.sleep(0.001)
        Crawl(tmp_path, settings, Guard(web.allowed), browser=Scripted(act)).run()
        summary = read_summary(tmp_path)[1]
        stored.append(summary.segments)
        told.append((summary.rendered, summary.not_rendered))
    assert stored == [1, 1, 1, 1, 2, 2] and told[:5] == [(1, {}), (1, {}), (0, {}), (1, {}), (1, {})]
    assert site.counts["/"] == len(texts) and not any("if-none-match" in hit.headers for hit in site.hits)


def test_scripts_are_seen_in_a_page_of_utf_16_too(tmp_path, web):
    site = web.site(lambda exchange: exchange.send("<script>".encode("utf-16")))

    async def act(url, load):
        return "text"

    settings = Settings(seeds=(site.url(),), delay=0.0, sitemaps=False, browser=True)
    write_settings(tmp_path, settings)
    Crawl(tmp_path, settings, Guard(web.allowed), browser=Scripted(act)).run()
    assert read_summary(tmp_path)[1].rendered == 1
