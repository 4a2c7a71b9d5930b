"""What a robots.txt means, and what its absence, slowness or failure means."""

import asyncio
import time

import pytest
from hostile_sites import KINDS, RULES, VAULT, handler, nobody
from web_servers import Web

from cllm.data.sources.addresses import Guard
from cllm.data.sources.fetch import Fetcher, Limits, agent
from cllm.data.sources.robots import MAX_BYTES, MAX_DELAY, Robots, parsed

pytest.importorskip("aiohttp", reason="crawling needs cllm[data]")
pytest.importorskip("protego", reason="crawling needs cllm[data]")

URL = "https://example.org/robots.txt"


def allows(text, path):
    site = parsed(text if isinstance(text, bytes) else text.encode(), URL)
    return not site.closed and site.rules.can_fetch(f"https://example.org{path}", site.agent)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", True), ("/private/x", False), ("/private/open", True), ("/private", True), ("/a.pdf", False), ("/a.pdf?x", True), ("/a.pdfx", True),
        ("/for-others", True), ("/second-group", False), ("/%73econd-group", False), ("/%70rivate/x", False), ("/robots.txt", True),
    ],
)  # fmt: skip
def test_rules_for_this_robot(path, allowed):
    assert allows(RULES, path) == allowed


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("", True),
        ("User-agent: *\nDisallow:", True),
        ("User-agent: *\nDisallow: /", False),
        ("User-agent: cl\nAllow: /\n\nUser-agent: *\nDisallow: /", False),  # another robot's name
        ("User-agent: cllm-images\nAllow: /\n\nUser-agent: *\nDisallow: /", False),
        ("User-agent: CLLM/2.0\nDisallow: /\n\nUser-agent: *\nAllow: /", False),
        ("User-agent: cllm # ours\nDisallow: /\n", False),
        ("user-agent:cllm\ndisallow:/", False),
        ("User-agent: a\nUser-agent: cllm\nDisallow: /\n", False),
        ("User-agent: *\nDisallow: /\nUser-agent: cllm\nDisallow: /other\n", True),
        ("\ufeffUser-agent: *\nDisallow: /x\n", False),
        ("User-agent: *\r\nDisallow: /x\r\n", False),
        ("User-agent: *\r\nDisallow:\r\n\r\nUser-agent: cllm\r\nDisallow: /x\r\n", False),
        ("User-agent: *\rAllow: /\rUser-agent: cllm\rDisallow: /x\r", False),
        ("User-agent: *\u2028Allow: /\u2028User-agent: cllm\u2028Disallow: /x", False),
        ("User-agent: *\nAllow: /\nUser-agent: cllm crawler 1.0\nDisallow: /x", False),
        ("User-agent: *\nAllow: /\nUser-agent: cllm*\nDisallow: /x", False),
        ("User agent cllm\nDisallow /x\n\nUser-agent: *\nAllow: /", False),
        ("User-agent: cllm2\nDisallow: /\n\nUser-agent: *\nDisallow: /y", True),
        ("User-agent: *\rDisallow: /x\r", False),
        ("User-agent: *\nDisallow: /*x", False),
        ("User-agent: *\nDisallow: /x$\nAllow: /", False),
        ("User-agent: *\nDisallow: /\nAllow: /x", True),
        ("User-agent: *\nDisallow: /x\nAllow: /x", True),
        ("User-agent: *\nNoise\n\x00\xff: /\nDisallow: /x", False),
        ("<html><body>Not found</body></html>", True),
        ("Disallow: /", True),
    ],
)
def test_files(text, allowed):
    assert allows(text, "/x") == allowed


def test_charsets_of_the_file():
    for codec in ("utf-16", "utf-8-sig", "utf-8"):
        assert not allows("User-agent: *\nDisallow: /ä".encode(codec), "/%C3%A4")
    assert allows(b"\xff\xfe\x00", "/x")


def test_a_file_that_is_too_long_is_read_as_far_as_its_last_whole_line():
    lines = b"User-agent: *\nDisallow: /private\n" + b"Disallow: /nothing\n" * 40_000
    for end in (b"\n", b"\r\n", b"\r"):
        text = lines.replace(b"\n", end)[:MAX_BYTES]
        assert not allows(text, "/private") and allows(text, "/x")
    assert allows((b"User-agent: *\n" + b"#" * MAX_BYTES)[: MAX_BYTES - 12] + b"\nDisallow: /", "/x"), "a rule cut in two would forbid everything"


def test_a_file_that_would_cost_time_for_every_address_closes_the_site():
    assert "wildcards" in parsed(b"User-agent: *\n" + b"Disallow: /*a*b*c\n" * 5000, URL).closed
    assert not parsed(b"User-agent: *\n" + b"Disallow: /abc\n" * 30_000, URL).closed


@pytest.mark.parametrize(
    ("line", "delay"),
    [("Crawl-delay: 5", 5), ("Crawl-delay: 0.5", 0.5), ("Crawl-delay: 1e9", MAX_DELAY), ("Crawl-delay: -1", 0), ("Crawl-delay: nan", 0),
     ("Crawl-delay: inf", 0), ("Crawl-delay: soon", 0), ("Request-rate: 1/10s", 10), ("Request-rate: 0/0", 0)],
)  # fmt: skip
def test_pauses_are_kept_up_to_a_limit(line, delay):
    assert parsed(f"User-agent: *\n{line}\n".encode(), URL).delay == delay


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("User-Agent: *\nContent-Signal: search=yes,ai-train=no,use=reference\nAllow: /\n", True),
        ("user-agent: *\nAllow: /\ncontent-signal: AI-Train = No # reserved\n", True),
        ("User-agent: *\nContent-Signal: search=yes, ai-train=yes, ai-input=no\n", False),
        ("# Content-Signal: ai-train=no\nUser-agent: *\nAllow: /\n", False),
        ("User-agent: GPTBot\nContent-Signal: ai-train=no\n\nUser-agent: *\nAllow: /\n", False),
        ("User-agent: GPTBot\nUser-agent: *\nContent-Signal: ai-train=no\n", True),
        ("User-agent: cllm/0.1\nAllow: /\n\nUser-agent: *\nContent-Signal: ai-train=no\n", False),
        ("User-agent: cllm\nContent-Signal: ai-train=no\n\nUser-agent: *\nAllow: /\n", True),
        ("Content-Signal: ai-train=no\nUser-agent: *\nAllow: /\n", True),
        ("User-agent: *\nSitemap: /a.xml\nContent-Signal: ai-train=no\n", True),
    ],
)
def test_a_signal_against_training_closes_the_site_unless_it_is_ignored(text, closed):
    found = parsed(text.encode(), URL)
    assert bool(found.closed) == closed and (not closed or "asks not to train on its pages" in found.closed)
    ignoring = parsed(text.encode(), URL, signals=False)
    assert not ignoring.closed and ignoring.rules.can_fetch("https://example.org/x", ignoring.agent)


def test_sitemaps_are_clean_addresses():
    text = (
        b"Sitemap: /a.xml\nSitemap: https://other.example/b.xml\nSitemap: file:///etc/passwd\nSitemap: https://u:p@x/\n" + b"Sitemap: /a.xml\n" * 500
    )
    assert parsed(text, URL).sitemaps == ("https://example.org/a.xml", "https://other.example/b.xml")


# -- fetching it ------------------------------------------------------------------------------------------------------------


def ask(paths, serve, limits=Limits(timeout=20.0)):
    """The verdicts on addresses of a site, asked for one after the other, and the site."""

    async def run(site, allowed):
        async with Fetcher(limits, Guard(allowed), agent()) as fetcher:
            robots = Robots(fetcher)
            return [await robots.verdict(site.url(path)) for path in paths], await robots.site(site.url())

    with Web() as web:
        vault = web.site(nobody, VAULT)
        site = web.site(handler(KINDS[serve], vault) if isinstance(serve, str) else serve)
        verdicts, said = asyncio.run(run(site, [f"{site.address}:{site.port}"]))
        assert not vault.connections
        return verdicts, said, site


@pytest.mark.parametrize(("status", "allowed", "final"), [
    (404, True, True), (410, True, True), (400, True, True), (401, False, True), (403, False, True),
    (429, False, False), (500, False, False), (503, False, False),
])  # fmt: skip
def test_other_answers(status, allowed, final):
    async def serve(exchange):
        await exchange.send("words", status)

    (verdict, again), _, site = ask(["/x", "/y"], serve)
    assert verdict.allowed == again.allowed == allowed and (verdict.wait == 0) == final and site.paths == ["/robots.txt"]
    assert allowed or verdict.reason


@pytest.mark.parametrize("name", ["robots in a circle", "robots in the vault", "robots that never comes"])
def test_a_file_that_cannot_be_had_closes_the_site_for_now(name):
    (verdict,), _, site = ask(["/x"], name, limits=Limits(timeout=1.0))
    assert not verdict.allowed and verdict.wait > 0 and "robots.txt cannot be read" in verdict.reason
    assert len(site.paths) <= 6


@pytest.mark.parametrize(("hops", "allowed"), [(5, True), (6, False)])
def test_five_redirects_are_followed(hops, allowed):
    async def serve(exchange):
        number = 0 if exchange.path == "/robots.txt" else int(exchange.path[2:])
        await (
            exchange.redirect(f"/r{number + 1}") if number < hops else exchange.send("User-agent: *\nDisallow: /private", Content_Type="text/x-odd")
        )

    (verdict, private), _, site = ask(["/x", "/private"], serve)
    assert verdict.allowed == allowed and not private.allowed and len(site.paths) == 6


def test_a_file_without_end_is_read_as_far_as_the_limit():
    (private, fine), _, _ = ask(["/private", "/fine"], "robots without end")
    assert not private.allowed and fine.allowed


def test_it_is_asked_for_once_however_many_want_to_know():
    async def serve(exchange):
        await asyncio.sleep(0.1)
        await exchange.send("User-agent: *\nDisallow: /b")

    async def run(site, allowed):
        async with Fetcher(Limits(), Guard(allowed), agent()) as fetcher:
            robots = Robots(fetcher)
            first = asyncio.create_task(robots.verdict(site.url("/a")))
            others = [asyncio.create_task(robots.verdict(site.url(path))) for path in ("/a", "/b") * 20]
            await asyncio.sleep(0)
            first.cancel()  # one who gives up does not take the file from the others
            return await asyncio.gather(*others)

    with Web() as web:
        site = web.site(serve)
        verdicts = asyncio.run(run(site, web.allowed))
        assert [verdict.allowed for verdict in verdicts] == [True, False] * 20 and site.paths == ["/robots.txt"]


def test_a_file_that_failed_is_asked_for_again_after_a_while():
    async def serve(exchange):
        tries = exchange.site.paths.count("/robots.txt")
        await (exchange.send("later", 503) if tries < 3 else exchange.send("User-agent: *\nDisallow: /private"))

    async def run(site, allowed):
        async with Fetcher(Limits(), Guard(allowed), agent()) as fetcher:
            robots = Robots(fetcher, first_retry=0.05)
            while not (verdict := await robots.verdict(site.url("/x"))).allowed:
                assert verdict.wait > 0
                await asyncio.sleep(0.02)
            return await robots.verdict(site.url("/private"))

    with Web() as web:
        site = web.site(serve)
        assert not asyncio.run(run(site, web.allowed)).allowed and site.paths == ["/robots.txt"] * 3


def test_ports_and_schemes_are_sites_of_their_own():
    async def closed(exchange):
        await exchange.send("User-agent: *\nDisallow: /")

    async def open_to_all(exchange):
        await exchange.send("no", 404)

    async def run(sites, allowed):
        async with Fetcher(Limits(), Guard(allowed), agent()) as fetcher:
            robots = Robots(fetcher)
            return [(await robots.verdict(site.url("/x"))).allowed for site in sites]

    with Web() as web:
        assert asyncio.run(run([web.site(closed, "127.0.0.7"), web.site(open_to_all, "127.0.0.7")], ["127.0.0.7"])) == [False, True]


def test_a_site_that_the_guard_refuses_is_closed_at_once_and_not_asked_again():
    async def nobody(exchange):
        raise AssertionError("the guard let it through")

    async def run(site):
        async with Fetcher(Limits(), Guard([]), agent()) as fetcher:
            return await Robots(fetcher).verdict(site.url("/x"))

    with Web() as web:
        verdict = asyncio.run(run(web.site(nobody)))
        assert not verdict.allowed and not verdict.wait and "is not a public address" in verdict.reason


def test_what_is_kept_is_bounded():
    async def serve(exchange):
        await exchange.send("User-agent: *\nDisallow: /b")

    async def run(sites, allowed):
        async with Fetcher(Limits(), Guard(allowed), agent()) as fetcher:
            robots = Robots(fetcher)
            for site in sites:
                await robots.verdict(site.url())
            begin = time.monotonic()
            assert (await robots.site(sites[-1].url())).until > begin + 23 * 3600
            return len(robots._sites)

    from cllm.data.sources import robots as module

    with Web() as web, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_KEPT_SITES", 3)
        sites = [web.site(serve) for _ in range(6)]
        assert asyncio.run(run(sites, web.allowed)) == 3
