"""Sites that mean harm: what a crawler has to live through. Each kind says which of its pages a crawl has to bring home, and what it must never ask.

with Web() as web:
    vault = web.site(nobody, VAULT)               # nothing may connect to it: its address is not allowed
    place = web.site(handler(KINDS["calendar"], vault))
    ... crawl place.url("/") with --allow-private for place alone ...
    faults(KINDS["calendar"], place, vault)       # empty when all went well
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from web_servers import Exchange, Handler, Site

VAULT = "127.0.0.250"
TEXT = "The quick brown fox number {0} jumps over the lazy dog of page {0}, and nobody minds. "


@dataclass(frozen=True)
class Kind:
    name: str
    serve: Callable[[Exchange, Site], Awaitable[None]]
    good: frozenset[str] = frozenset()
    """Paths that a crawl with enough pages has to store."""
    never: frozenset[str] = frozenset()
    """Paths that must not be asked for."""
    repeats: frozenset[str] = frozenset()
    """Paths that may be asked for more than once, because they fail."""
    endless: bool = False
    """Whether it has pages without end, of which a crawl should soon have enough."""
    most: int = 0
    """Requests after which a crawl has seen all there is; 0 where that is not known."""


KINDS: dict[str, Kind] = {}


def kind(
    good: str = "/", never: str = "", repeats: str = "", endless: bool = False, most: int = 0
) -> Callable[[Callable[[Exchange, Site], Awaitable[None]]], Kind]:
    def add(serve: Callable[[Exchange, Site], Awaitable[None]]) -> Kind:
        name = serve.__name__.strip("_").replace("_", " ")
        KINDS[name] = Kind(name, serve, *(frozenset(paths.split()) for paths in (good, never, repeats)), endless, most)
        return KINDS[name]

    return add


def handler(kind: Kind, vault: Site) -> Handler:
    async def serve(exchange: Exchange) -> None:
        await kind.serve(exchange, vault)

    return serve


async def nobody(exchange: Exchange) -> None:
    await exchange.send("the secret")


def faults(kind: Kind, site: Site, vault: Site | None = None) -> list[str]:
    """What a crawl has done wrong, as far as the servers have seen it."""
    found = [f"{path} was asked for, which is forbidden" for path in sorted(set(site.paths) & kind.never)]
    found += [f"{path} was asked for {count} times" for path, count in sorted(site.counts.items()) if count > 1 and path not in kind.repeats]
    found += [f"{path} was never asked for" for path in sorted(kind.good - set(site.paths))]
    found += [f"{len(site.hits)} requests for what {kind.most} bring"] if 0 < kind.most < len(site.hits) else []
    found += [f"{site.most_at_once} requests at one time"] if site.most_at_once > 1 else []
    found += ["a cookie was sent"] if any("cookie" in hit.headers for hit in site.hits) else []
    found += ["a password was sent"] if any("authorization" in hit.headers for hit in site.hits) else []
    found += ["another robot was named"] if any(not hit.headers.get("user-agent", "").startswith("cllm/") for hit in site.hits) else []
    found += ["robots.txt was not asked for first"] if site.hits and site.hits[0].path != "/robots.txt" else []
    found += [f"the vault was connected to {vault.connections} times"] if vault and vault.connections else []
    return found


def page(number: object, *links: str, head: str = "") -> str:
    """A page with text of its own."""
    text = "".join(f"<p>{TEXT.format(f'{number} {part}')}</p>" for part in "abcdef") + anchors(links)
    return f"<!doctype html><html><head><title>{number}</title>{head}</head><body>{text}</body></html>"


def anchors(links: Iterable[str]) -> str:
    return " ".join(f'<a href="{link}">x</a>' for link in links)


async def serve_pages(exchange: Exchange, pages: dict[str, str]) -> None:
    body = pages.get(exchange.path)
    await (exchange.send("nothing here", 404) if body is None else exchange.send(body))


def other(vault: Site, path: str = "/secret") -> dict[str, str]:
    """The vault in every spelling."""
    return {
        "plain": vault.url(path),
        "decimal": f"http://{127 << 24 | 250}:{vault.port}{path}",
        "hexadecimal": f"http://0x7f.0.0.0xfa:{vault.port}{path}",
        "octal": f"http://0177.0.0.0372:{vault.port}{path}",
        "short": f"http://127.250:{vault.port}{path}",
        "mapped": f"http://[::ffff:{VAULT}]:{vault.port}{path}",
        "user": f"http://example.org@{VAULT}:{vault.port}{path}",
        "relative": f"//{VAULT}:{vault.port}{path}",
        "backslash": f"\\\\{VAULT}:{vault.port}{path}",
        "name": f"http://localhost:{vault.port}{path}",
        "dotted name": f"http://localhost.:{vault.port}{path}",
    }


# -- sites without end ------------------------------------------------------------------------------------------------------


@kind(good="/ /about /contact", endless=True)
async def calendar(exchange: Exchange, vault: Site) -> None:
    pages = {"/": page("home", "/calendar/2026/01", "/about", "/contact"), "/about": page("about"), "/contact": page("contact")}
    if exchange.path.startswith("/calendar/"):
        year, month = map(int, exchange.path.split("/")[2:4])
        after = year * 12 + month
        nearby = [f"/calendar/{place // 12:04}/{place % 12 + 1:02}" for place in (after, after - 2, after + 11, after - 13)]
        pages[exchange.path] = f"<html><body><h1>Events</h1><p>There are no events in this month.</p>{anchors(nearby)}</body></html>"
    await serve_pages(exchange, pages)


@kind(good="/ /real", endless=True)
async def growing_paths(exchange: Exchange, vault: Site) -> None:
    await exchange.send(page("a page like any other", "more/", "other/", "/real"))


@kind(most=7)
async def session_identifiers(exchange: Exchange, vault: Site) -> None:
    """Each visit gets an identifier of its own, in every link."""
    visit = f"{len(exchange.site.hits) * 2654435761 % 2**64:016x}{'0a' * 8}"
    path = exchange.path.partition("?")[0].partition(";")[0]
    links = [f"/p/1?sid={visit}", f"/p/2;jsessionid={visit}", f"/?PHPSESSID={visit}"]
    await exchange.send(page(path, *links))


@kind(good="/ /about", endless=True)
async def faceted_search(exchange: Exchange, vault: Site) -> None:
    """Seven filters of five values each, in any combination and order."""
    path, _, query = exchange.path.partition("?")
    chosen = [pair for pair in query.split("&") if pair]
    links = ["&amp;".join([*chosen, f"{name}={value}"]) for name in "abcdefg" for value in range(5)]
    pages = {"/": page("home", "/search?", "/about"), "/about": page("about")}
    pages["/search"] = f"<html><body><p>Nothing found for this choice.</p>{anchors(f'/search?{link}' for link in links)}</body></html>"
    await exchange.send(pages.get(path, "nothing here"))


@kind(good="/ /deep/one /deep/two", endless=True)
async def fan_out(exchange: Exchange, vault: Site) -> None:
    """A page of ten thousand links to pages that say nothing."""
    pages = {"/": page("home", "/list", "/deep/one"), "/deep/one": page("one", "/deep/two"), "/deep/two": page("two")}
    pages["/list"] = "".join(f"<a href=/item/{number}>x</a>" for number in range(10_000))
    if exchange.path.startswith("/item/"):
        pages[exchange.path] = "<p>This item is no longer available in our shop.</p>"
    await serve_pages(exchange, pages)


@kind(good="/ /real", endless=True)
async def one_page_under_every_name(exchange: Exchange, vault: Site) -> None:
    number = len(exchange.site.hits)
    await exchange.send(page("the same again", "/real", *(f"/n{number * 10 + more}" for more in range(5))))


@kind(endless=True, good="/ /start")
async def endless_redirects(exchange: Exchange, vault: Site) -> None:
    """Each hop leads to a new address."""
    if exchange.path == "/":
        return await exchange.send(page("home", "/start"))
    if exchange.path == "/robots.txt":
        return await exchange.send("nothing here", 404)
    await exchange.redirect(f"/hop{len(exchange.site.hits)}")


# -- redirects --------------------------------------------------------------------------------------------------------------


@kind(good="/ /loop /self /end", repeats="/loop /loop2 /self")
async def redirect_loops(exchange: Exchange, vault: Site) -> None:
    targets = {"/loop": "/loop2", "/loop2": "/loop", "/self": "/self", "/fine": "/end"}
    if exchange.path in targets:
        return await exchange.redirect(targets[exchange.path], 301)
    await serve_pages(exchange, {"/": page("home", "/loop", "/self", "/fine"), "/end": page("end")})


@kind(good="/ /to/plain /fine")
async def redirects_to_the_vault(exchange: Exchange, vault: Site) -> None:
    """To an address inside, in every spelling."""
    names = other(vault)
    if exchange.path.startswith("/to/"):
        return await exchange.redirect(names[exchange.path[4:].replace("%20", " ")])
    await serve_pages(exchange, {"/": page("home", "/fine", *(f"/to/{name}" for name in names)), "/fine": page("fine")})


@kind(good="/ /to/0 /fine")
async def redirects_to_other_schemes(exchange: Exchange, vault: Site) -> None:
    targets = ["file:///etc/passwd", "data:text/html,x", "gopher://127.0.0.1:6379/_x", "javascript:alert(1)", "ftp://127.0.0.1/", "", "http://"]
    targets += ["//", "http://[::1", "http:///x", "https:evil", "http://a b/", "ws://127.0.0.1/", "about:blank", "x" * 5000, "http://%00/"]
    if exchange.path.startswith("/to/"):
        return await exchange.redirect(targets[int(exchange.path[4:])])
    await serve_pages(exchange, {"/": page("home", "/fine", *(f"/to/{number}" for number in range(len(targets)))), "/fine": page("fine")})


@kind(good="/ /in /fine", never="/private /private/x")
async def redirects_to_what_robots_forbids(exchange: Exchange, vault: Site) -> None:
    if exchange.path == "/robots.txt":
        return await exchange.send("User-agent: *\nDisallow: /private", Content_Type="text/plain")
    if exchange.path in ("/in", "/in2"):
        return await exchange.redirect({"/in": "/private", "/in2": "/a/../private/x"}[exchange.path])
    await serve_pages(exchange, {"/": page("home", "/in", "/in2", "/fine", "/private"), "/fine": page("fine")})


# -- bodies -----------------------------------------------------------------------------------------------------------------


def bomb(encoding: str, size: int = 100 << 20) -> bytes:
    """A few kilobytes that unpack to `size` zeros."""
    block = bytes(1 << 20)
    if encoding == "br":
        import brotli

        packer = brotli.Compressor(quality=1)
        return b"".join(packer.process(block) for _ in range(size >> 20)) + packer.finish()
    if encoding == "zstd":
        import zstandard

        made = zstandard.ZstdCompressor(level=1).compressobj()
        return b"".join(made.compress(block) for _ in range(size >> 20)) + made.flush()
    shrink = zlib.compressobj(1, zlib.DEFLATED, {"gzip": 31, "deflate": 15}[encoding])
    return b"".join(shrink.compress(block) for _ in range(size >> 20)) + shrink.flush()


_BOMBS: dict[str, bytes] = {}


@kind(good="/ /gzip /deflate /br /zstd /fine", repeats="/gzip /deflate /br /zstd")
async def bombs(exchange: Exchange, vault: Site) -> None:
    name = exchange.path[1:]
    if name in ("gzip", "deflate", "br", "zstd"):
        if name not in _BOMBS:
            _BOMBS[name] = await asyncio.to_thread(bomb, name)
        return await exchange.send(_BOMBS[name], Content_Encoding=name)
    await serve_pages(exchange, {"/": page("home", "/gzip", "/deflate", "/br", "/zstd", "/fine"), "/fine": page("fine")})


_SENT: dict[str, tuple[str, bytes]] = {
    "/members": ("gzip", b"".join(gzip.compress(f"<p>{TEXT.format(number)}</p>".encode()) for number in range(1000))),
    "/twice": ("gzip, gzip", gzip.compress(gzip.compress(page("twice").encode()))),
    "/raw": ("deflate", zlib.compress(page("raw").encode())[2:-4]),
    "/tail": ("gzip", gzip.compress(page("tail").encode()) + b"what follows the end"),
    "/cut": ("gzip", gzip.compress(page("cut").encode())[:-20]),
    "/false": ("gzip", page("not compressed at all").encode()),
    "/unknown": ("x-secret", page("unknown").encode()),
    "/many": (", ".join(["gzip"] * 50), gzip.compress(page("many").encode())),
}


@kind(good="/ /members /twice /raw /tail /cut /false", repeats="/cut /false /unknown /many")
async def compression(exchange: Exchange, vault: Site) -> None:
    if exchange.path in _SENT:
        encoding, body = _SENT[exchange.path]
        return await exchange.send(body, Content_Encoding=encoding)
    await serve_pages(exchange, {"/": page("home", *_SENT)})


@kind(good="/ /endless /fine", repeats="/endless /large")
async def endless_body(exchange: Exchange, vault: Site) -> None:
    if exchange.path == "/large":
        return await exchange.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 100000000000\r\n\r\n" + bytes(1000))
    if exchange.path == "/endless":
        await exchange.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")
        while True:
            await exchange.raw(b"<p>and so on</p>" * 1000)
    await serve_pages(exchange, {"/": page("home", "/endless", "/large", "/fine"), "/fine": page("fine")})


_OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
_BROKEN: dict[str, bytes] = {
    "/short": _OK + b"Content-Length: 5000\r\n\r\n<p>short",
    "/chunks": _OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzzzz\r\nrubbish",
    "/huge-chunk": _OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
    "/no-http": b"220 mail.example.org ESMTP\r\n",
    "/nothing": b"",
    "/binary": bytes(range(256)) * 4,
    "/version": b"HTTP/9.9 999 ?\r\n\r\n",
    "/two-lengths": _OK + b"Content-Length: 5\r\nContent-Length: 50\r\n\r\nhello",
    "/minus": _OK + b"Content-Length: -1\r\n\r\nhello",
    "/line": _OK + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    "/flood": _OK + b"".join(b"X-%d: y\r\n" % number for number in range(100_000)) + b"\r\n",
    "/interim": b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
}


@kind(good="/ /fine /short /chunks", repeats=" ".join(_BROKEN))
async def broken_http(exchange: Exchange, vault: Site) -> None:
    if exchange.path in _BROKEN:
        return await exchange.raw(_BROKEN[exchange.path])
    await serve_pages(exchange, {"/": page("home", *_BROKEN, "/fine"), "/fine": page("fine")})


@kind()
async def answers_nobody_asked_for(exchange: Exchange, vault: Site) -> None:
    """A second answer behind the first, which a client that uses the connection again may take for that to its next request to the same server.

    It may say no more by this than by its proper answers.
    """
    answer = page(exchange.path, "/a", "/b").encode()
    await exchange.send(answer)
    lie = page("lie", "/smuggled").encode()
    exchange.writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(lie) + lie)


# -- time -------------------------------------------------------------------------------------------------------------------


@kind(good="/ /silent /fine", repeats="/silent /stall /headers /body /chunked")
async def slow_answers(exchange: Exchange, vault: Site) -> None:
    """One byte at a time: no wait for a single byte is long."""
    starts = {"/silent": b"", "/headers": b"HTTP/1.1 200 OK\r\nX: ", "/stall": _OK + b"Content-Length: 9\r\n\r\nx"}
    starts |= {"/body": _OK + b"Content-Length: 100000\r\n\r\n", "/chunked": _OK + b"Transfer-Encoding: chunked\r\n\r\n"}
    if exchange.path not in starts:
        return await serve_pages(exchange, {"/": page("home", *starts, "/fine"), "/fine": page("fine")})
    await exchange.raw(starts[exchange.path])
    while True:
        await asyncio.sleep(0.05 if exchange.path not in ("/silent", "/stall") else 3600)
        await exchange.raw(b"1\r\nx\r\n" if exchange.path == "/chunked" else b"x")


@kind(good="/ /busy /down /fine", repeats="/busy /down")
async def busy(exchange: Exchange, vault: Site) -> None:
    """Both give in at the second try."""
    tries = exchange.site.paths.count(exchange.path)
    if exchange.path in ("/busy", "/down") and tries == 1:
        return await exchange.send("later", 429 if exchange.path == "/busy" else 503, Retry_After="1")
    await serve_pages(exchange, {"/": page("home", "/busy", "/down", "/fine"), **{path: page(path) for path in ("/busy", "/down", "/fine")}})


# -- robots.txt -------------------------------------------------------------------------------------------------------------

RULES = """\ufeff# a mark of byte order stands before
User-agent: otherbot
Disallow: /

User-agent: cllm
Disallow: /private/
Disallow: /*.pdf$
Allow: /private/open
Crawl-delay: 0

User-agent: cl
Allow: /

User-agent: *
Disallow: /for-others

User-agent: CLLM
Disallow: /second-group
Sitemap: /map.xml
"""


@kind(good="/ /private/open /for-others /a.pdf?x /mapped", never="/private/x /private/ /a.pdf /b/c.pdf /second-group /%73econd-group")
async def robots_rules(exchange: Exchange, vault: Site) -> None:
    links = ["/private/x", "/private/", "/private/open", "/a.pdf", "/b/c.pdf", "/a.pdf?x", "/for-others", "/second-group", "/%73econd-group"]
    pages = {"/": page("home", *links)} | {path: page(path) for path in ("/private/open", "/for-others", "/a.pdf?x", "/mapped")}
    pages |= {"/robots.txt": RULES, "/map.xml": f"<urlset><url><loc>{exchange.site.url('/mapped')}</loc></url></urlset>"}
    await serve_pages(exchange, pages)


def _closed(status: int) -> Callable[[Exchange, Site], Awaitable[None]]:
    async def serve(exchange: Exchange, vault: Site) -> None:
        await (exchange.send("no", status) if exchange.path == "/robots.txt" else exchange.send(page("home")))

    serve.__name__ = f"robots_status_{status}"
    return serve


for _status in (401, 403, 429, 500, 503):
    kind(good="", never="/")(_closed(_status))
for _status in (404, 410):
    kind()(_closed(_status))


@kind(good="", never="/")
async def robots_in_a_circle(exchange: Exchange, vault: Site) -> None:
    if exchange.path == "/robots.txt" or exchange.path.startswith("/r"):
        return await exchange.redirect(f"/r{len(exchange.site.hits)}")
    await exchange.send(page("home"))


@kind(good="", never="/")
async def robots_in_the_vault(exchange: Exchange, vault: Site) -> None:
    await (exchange.redirect(vault.url("/robots.txt")) if exchange.path == "/robots.txt" else exchange.send(page("home")))


@kind(good="", never="/")
async def robots_that_never_comes(exchange: Exchange, vault: Site) -> None:
    if exchange.path == "/robots.txt":
        await asyncio.sleep(3600)
    await exchange.send(page("home"))


@kind(good="/ /fine", never="/private")
async def robots_without_end(exchange: Exchange, vault: Site) -> None:
    """What comes before the limit counts."""
    if exchange.path == "/robots.txt":
        await exchange.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nUser-agent: *\nDisallow: /private\n")
        while True:
            await exchange.raw(b"Disallow: /nothing-of-this-name\n" * 1000)
    await serve_pages(exchange, {"/": page("home", "/private", "/fine"), "/fine": page("fine")})


# -- pages ------------------------------------------------------------------------------------------------------------------


@kind(good="/ /fine", never="/not-followed /not-linked /said /hidden")
async def pages_that_ask_robots(exchange: Exchange, vault: Site) -> None:
    """Each of these pages is asked for, and says what may not be done with it or its links."""
    pages = {
        "/": page("home", "/meta", "/header", "/fine") + '<a rel="nofollow" href="/said">x</a><!-- <a href="/hidden">x</a> -->',
        "/meta": page("meta", "/not-followed", head='<meta name="robots" content="noindex, nofollow">'),
        "/fine": page("fine"),
    }
    if exchange.path == "/header":
        return await exchange.send(page("header", "/not-linked"), X_Robots_Tag="none")
    await serve_pages(exchange, pages)


@kind(good="/ /fine /base")
async def links_into_the_vault(exchange: Exchange, vault: Site) -> None:
    """By links, a base, a canonical address, a refresh, frames, a sitemap and a feed."""
    there = other(vault)
    head = f'<link rel="canonical" href="{vault.url()}"><link rel="alternate" type="application/rss+xml" href="{vault.url()}feed">'
    pages = {
        "/": f'<iframe src="{vault.url()}"></iframe><img src="{vault.url()}">'
        + page("home", "/base", "/fine", "/refresh", *there.values(), head=head),
        "/base": f'<base href="{vault.url()}x/">' + page("base", "secret", "../secret"),
        "/refresh": f'<meta http-equiv="refresh" content="0;url={vault.url()}">' + page("refresh"),
        "/fine": page("fine"),
        "/robots.txt": f"Sitemap: {vault.url('/sitemap.xml')}\nSitemap: /map.xml",
        "/map.xml": f"<sitemapindex><sitemap><loc>{vault.url('/s.xml')}</loc></sitemap></sitemapindex>",
    }
    await serve_pages(exchange, pages)


_LAUGHS = '<!DOCTYPE l [<!ENTITY a0 "ha">' + "".join(f"<!ENTITY a{n} '" + 10 * f"&a{n - 1};" + "'>" for n in range(1, 12))
_LAUGHS += "]><urlset><url><loc>&a11;</loc></url></urlset>"


@kind(good="/ /mapped", repeats="/bomb.xml.gz /circle.xml")
async def sitemaps_that_harm(exchange: Exchange, vault: Site) -> None:
    names = ("/laughs.xml", "/circle.xml", "/bomb.xml.gz", "/good.xml", "/file.xml")
    pages = {
        "/": page("home"),
        "/mapped": page("mapped"),
        "/robots.txt": "".join(f"Sitemap: {exchange.site.url(name)}\n" for name in names),
        "/laughs.xml": _LAUGHS,
        "/circle.xml": f"<sitemapindex><sitemap><loc>{exchange.site.url('/circle.xml')}</loc></sitemap></sitemapindex>",
        "/file.xml": '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><urlset><url><loc>/x?&e;</loc></url></urlset>',
        "/good.xml": f"<urlset><url><loc>{exchange.site.url('/mapped')}</loc></url></urlset>",
    }
    if exchange.path == "/bomb.xml.gz":
        return await exchange.send(bomb("gzip"), Content_Type="application/gzip")
    await serve_pages(exchange, pages)


_ODD: dict[str, tuple[str, bytes]] = {
    "/utf16": ("text/html", page("utf16", "/after").encode("utf-16-le")),
    "/surrogate": ("text/html; charset=utf-8", page("surrogate").encode() + b"\xed\xa0\x80"),
    "/latin": ("text/html; charset=utf-8", page("latin").encode() + b"caf\xe9"),
    "/nul": ("text/html", page("nul").encode() + bytes(100)),
    "/unknown-charset": ("text/html; charset=x-klingon", page("klingon").encode()),
    "/codec": ("text/html; charset=punycode", page("codec").encode()),
    "/empty": ("text/html", b""),
    "/no-type": ("", page("no type").encode()),
    "/program": ("application/x-msdownload", b"MZ" + bytes(100)),
    "/type": ("text/html;;;;====,application/x", page("type").encode()),
}


@kind(good="/ /utf16 /latin /no-type /unknown-charset")
async def odd_bytes(exchange: Exchange, vault: Site) -> None:
    if exchange.path in _ODD:
        name, body = _ODD[exchange.path]
        return await exchange.send(body, Content_Type=name)
    if exchange.path == "/204":
        return await exchange.send(status=204, Content_Length="")
    await serve_pages(exchange, {"/": page("home", *_ODD, "/204")})


@kind(good="/ /fine /attributes")
async def pages_that_are_hard_to_read(exchange: Exchange, vault: Site) -> None:
    pages = {
        "/": page("home", "/attributes", "/nesting", "/links", "/fine"),
        "/attributes": page("attributes") + "<a " + " ".join(f"a{number}=1" for number in range(100_000)) + ">",
        "/nesting": page("nesting") + "<div>" * 100_000,
        "/links": page("links") + "<a href='" * 200_000,
        "/fine": page("fine"),
    }
    await serve_pages(exchange, pages)


@kind(good="/ /a /a%20b /b?x=1", never="/a/b/../../a /a?utm_source=x")
async def spellings_of_one_page(exchange: Exchange, vault: Site) -> None:
    """Cookies, and many spellings of few addresses."""
    place = exchange.site
    links = ["/a", "/a#1", "/a/b/../../a", "./a", place.url("/a"), f"HTTP://{place.address}:{place.port}/a", "/%61", " /a ", "/a b", "/a%20b"]
    links += ["/b?x=1", "/b?x=1&amp;utm_source=y", "/b?x=1#z"]
    await exchange.send(page(exchange.path, *links), Set_Cookie="visitor=1; Path=/")
