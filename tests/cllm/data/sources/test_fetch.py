"""One request against servers of every temper: what it brings, what it costs, and whom it reaches."""

import asyncio
import email.utils
import gzip
import os
import resource
import shutil
import socket
import ssl
import subprocess
import time
import zlib

import pytest
from hostile_sites import KINDS, VAULT, faults, handler, nobody, other
from hypothesis import given, settings
from hypothesis import strategies as st
from web_servers import Site, Web

from cllm.data.sources.addresses import Guard
from cllm.data.sources.decoding import TooLarge, Undecodable, decode
from cllm.data.sources.fetch import Fetcher, Limits, agent
from cllm.data.sources.urls import BadURL, clean
from cllm.runtime.errors import UserError

pytest.importorskip("aiohttp", reason="crawling needs cllm[data]")
pytest.importorskip("brotli", reason="crawling needs cllm[data]")
pytest.importorskip("zstandard", reason="crawling needs cllm[data]")

SMALL = Limits(timeout=20.0, max_bytes=1_000_000)


async def anywhere(url):
    return ""


def fetch(urls, allowed, limits=SMALL, may_follow=anywhere, resolver=None, **options):
    """The answers to requests made one after the other over one Fetcher."""

    async def run():
        async with Fetcher(limits, Guard(allowed), agent("https://example.org/crawler"), resolver) as fetcher:
            return [await fetcher.fetch(url, may_follow=may_follow, **options) for url in urls]

    return asyncio.run(run())


@pytest.fixture
def web():
    with Web() as web:
        yield web


@pytest.fixture
def vault(web):
    """A server that must not be reached; its port is open on other addresses, too."""
    return web.site(nobody, VAULT)


def test_an_answer_is_told_as_it_came(web):
    async def answer(exchange):
        await exchange.send("<p>hello", Content_Type="Text/HTML; Charset='ISO-8859-1'", X_Robots_Tag="noai", ETag='"1"')

    site = web.site(answer)
    (got,) = fetch([site.url("/a?b=%41;c")], web.allowed)
    assert (got.status, got.body, got.content_type, got.charset, got.problem) == (200, b"<p>hello", "text/html", "iso-8859-1", "")
    assert got.header("etag") == '"1"' and ("X-Robots-Tag", "noai") in got.headers and got.address == site.address and got.seconds > 0
    assert site.paths == ["/a?b=%41;c"], "an address is sent as it is written"
    sent = site.hits[0].headers
    assert sent["user-agent"].startswith("cllm/") and sent["user-agent"].endswith("(+https://example.org/crawler)")
    assert not {"cookie", "authorization", "referer"} & set(sent)


@pytest.mark.parametrize(
    "contact", ["x", "ftp://example.org", "https://example.org/\r\nX: y", "a@b\nX: y", "https://exa mple.org", "https://", "a" * 999]
)
def test_a_contact_is_a_web_address_or_an_email_address(contact):
    with pytest.raises(UserError, match="--contact"):
        agent(contact)


def test_contacts():
    assert agent().startswith("cllm/") and agent("crawl@example.org").endswith("(+crawl@example.org)")


def test_what_has_not_changed_is_not_sent_again(web):
    async def answer(exchange):
        same = exchange.headers.get("if-none-match") == '"1"' and exchange.headers.get("if-modified-since") == "Sun, 06 Nov 1994 08:49:37 GMT"
        await (exchange.send(status=304, Content_Length="") if same else exchange.send("new"))

    site = web.site(answer)
    (got,) = fetch([site.url()], web.allowed, etag='"1"', last_modified="Sun, 06 Nov 1994 08:49:37 GMT")
    assert got.not_modified and not got.problem and not got.body
    (got,) = fetch([site.url()], web.allowed, etag='"2"\r\nX: y', last_modified="\r\n")
    assert got.body == b"new" and "x" not in site.hits[-1].headers, "what a server gave as its tag is not trusted either"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), ("0", 0), ("999999999", 3600), ("-5", None), ("soon", None), ("", None), ("Fri, 31 Dec 1999 23:59:59 GMT", 0), ("Fri, 99 Foo", None)],
)
def test_retry_after(web, value, seconds):
    async def answer(exchange):
        await exchange.send("later", 503, Retry_After=value)

    (got,) = fetch([web.site(answer).url()], web.allowed)
    assert (got.retry_after, got.transient, got.problem) == (seconds, True, "status 503")


def test_retry_after_a_date(web):
    async def answer(exchange):
        await exchange.send("later", 429, Retry_After=email.utils.formatdate(time.time() + 600, usegmt=True))

    (got,) = fetch([web.site(answer).url()], web.allowed)
    assert 0 < got.retry_after <= 600


@pytest.mark.parametrize(
    ("status", "transient"), [(404, False), (410, False), (400, False), (403, False), (408, True), (429, True), (500, True), (999, True)]
)
def test_other_answers_are_problems(web, status, transient):
    async def answer(exchange):
        await exchange.send("words", status)

    (got,) = fetch([web.site(answer).url()], web.allowed)
    assert (got.status, got.transient, got.body, got.problem) == (status, transient, b"", f"status {status}")


# -- whom it reaches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", list(other(Site(VAULT, 1))))
def test_an_address_inside_is_refused_in_every_spelling(web, vault, spelling):
    site = web.site(nobody)
    try:
        url = clean(other(vault)[spelling], site.url())
    except BadURL:
        return
    (got,) = fetch([url], [f"{site.address}:{site.port}"])
    assert got.problem and not got.body and not vault.connections


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_leads_inside(web, vault, status):
    names = other(vault)

    async def answer(exchange):
        await exchange.redirect(names[exchange.path[1:]], status)

    site = web.site(answer)
    for got in fetch([site.url(f"/{name}".replace(" ", "%20")) for name in names if " " not in name], [f"{site.address}:{site.port}"]):
        assert got.problem and not got.body
    assert not vault.connections


class Names:
    """A name server that changes its mind: each look-up gives the next of its answers."""

    def __init__(self, *answers):
        self.answers = list(answers)

    async def resolve(self, host, port=0, family=socket.AF_INET):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [
            {"hostname": host, "host": address, "port": port, "family": socket.AF_INET6 if ":" in address else socket.AF_INET, "proto": 6, "flags": 0}
            for address in answer
        ]

    async def close(self):
        pass


def test_a_name_cannot_lead_inside_whatever_its_server_says(web, vault):
    for answers in ([[VAULT]], [["127.0.0.1"], [VAULT]], [["::ffff:127.0.0.250", VAULT]], [["64:ff9b::7f00:fa", "::127.0.0.250", "2002:7f00:fa::"]]):
        (got,) = fetch([f"http://rebinding.example:{vault.port}/secret"], [], resolver=Names(*answers))
        assert "refused" in got.problem, answers
    assert not vault.connections


def test_a_name_with_several_addresses_reaches_the_allowed_one_alone(web, vault):
    async def answer(exchange):
        await exchange.send("fine")

    site = web.site(answer, port=vault.port)
    (got,) = fetch([f"http://mixed.example:{site.port}/"], [site.address], resolver=Names([VAULT, site.address, VAULT]))
    assert got.body == b"fine" and not vault.connections


def test_a_connection_that_is_used_again_still_goes_to_the_peer_that_was_looked_at(web, vault):
    async def answer(exchange):
        await exchange.send("fine")

    site = web.site(answer, port=vault.port)
    answers = fetch([f"http://rebinding.example:{site.port}/{n}" for n in range(5)], [site.address], resolver=Names([site.address], [VAULT]))
    assert [got.body for got in answers] == [b"fine"] * 5 and site.connections == 1 and not vault.connections


def test_proxies_of_the_environment_are_not_used(web, vault, monkeypatch):
    async def answer(exchange):
        await exchange.send("fine")

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, vault.url())
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NETRC", os.devnull)
    (got,) = fetch([web.site(answer).url()], web.allowed)
    assert got.body == b"fine" and not vault.connections


def test_an_allowed_port_allows_no_other(web):
    async def answer(exchange):
        await exchange.redirect(other_port.url())

    other_port = web.site(nobody, "127.0.0.9")
    site = web.site(answer, "127.0.0.9")
    (got,) = fetch([site.url()], [f"127.0.0.9:{site.port}"])
    assert "refused" in got.problem and not other_port.connections


# -- redirects --------------------------------------------------------------------------------------------------------------


def test_redirects_are_followed_one_by_one_as_far_as_the_caller_likes(web):
    async def answer(exchange):
        number = int(exchange.path[1:])
        await (exchange.redirect(f"{number - 1}", 301) if number else exchange.send("here"))

    async def until_two(url):
        return "that is enough" if url.endswith("/2") else ""

    site = web.site(answer)
    far, too_far, three, unasked = (
        *fetch([site.url("/12"), site.url("/13")], web.allowed),
        *fetch([site.url("/5")], web.allowed, may_follow=until_two),
        *fetch([site.url("/1")], web.allowed, may_follow=None),
    )
    assert (far.body, far.url, far.final_url, len(far.hops)) == (b"here", site.url("/12"), site.url("/0"), 12)
    assert far.hops[0].url == site.url("/12") and far.hops[0].location == site.url("/11") and far.hops[0].status == 301
    assert too_far.problem == "it redirects more than 12 times" and not too_far.body
    assert (three.problem, three.redirect, three.final_url) == ("that is enough", site.url("/2"), site.url("/3"))
    assert unasked.redirect == site.url("/0") and unasked.problem.startswith("it redirects to")
    assert "/2" not in site.paths[27:]


def test_the_time_of_the_caller_does_not_count(web):
    async def answer(exchange):
        await (exchange.redirect("/b") if exchange.path == "/a" else exchange.send("here"))

    async def slowly(url):
        await asyncio.sleep(3)
        return ""

    (got,) = fetch([web.site(answer).url("/a")], web.allowed, Limits(timeout=2.5), may_follow=slowly)
    assert got.body == b"here"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_nobody_vouches_for_is_refused(web, tmp_path):
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.2"]
    subprocess.run([*made, "-keyout", tmp_path / "key", "-out", tmp_path / "cert"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    site = web.site(nobody, encrypted=context)
    (got,) = fetch([f"https://{site.address}:{site.port}/"], web.allowed)
    assert "its certificate is not valid" in got.problem and not got.transient and not site.hits


def test_a_redirect_does_not_leave_https():
    from cllm.data.sources.fetch import downgrade

    assert downgrade("https://example.org/a", "http://example.org/a")
    assert not downgrade("http://example.org/a", "https://example.org/a") and not downgrade("https://a.example/", "https://b.example/")


# -- the kinds of sites -----------------------------------------------------------------------------------------------------


def visit(web, vault, name, limits, paths=None):
    """Asks for every page that a site names on its first page, one after the other: what a crawl without any sense would do."""
    from cllm.data.sources.links import links

    site = web.site(handler(KINDS[name], vault))
    (home,) = fetch([site.url()], [f"{site.address}:{site.port}"], limits)
    urls = [url for url in links(home.body, site.url()).pages if site.url() in url]
    answers = fetch(urls, [f"{site.address}:{site.port}"], limits)
    assert not vault.connections
    return site, {url[len(site.url()) - 1 :]: got for url, got in zip(urls, answers)}


def test_bombs_are_refused_and_cost_no_memory(web, vault):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, answers = visit(web, vault, "bombs", SMALL)
    for name in ("gzip", "deflate", "br", "zstd"):
        assert "larger than 1,000,000 bytes" in answers[f"/{name}"].problem, name
        assert not answers[f"/{name}"].body
    assert answers["/fine"].body
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_compression_of_every_kind(web, vault):
    _, answers = visit(web, vault, "compression", SMALL)
    for name in ("members", "twice", "raw", "tail"):
        assert answers[f"/{name}"].body.startswith((b"<p>The quick", b"<!doctype")), name
    assert answers["/members"].body.count(b"<p>") == 1000
    for name in ("cut", "false", "unknown", "many"):
        assert answers[f"/{name}"].problem and not answers[f"/{name}"].body, name


def test_bodies_without_end_are_cut_off(web, vault):
    _, answers = visit(web, vault, "endless body", SMALL)
    assert answers["/endless"].problem == answers["/large"].problem == "it is larger than 1,000,000 bytes"
    assert answers["/fine"].body


def test_the_begin_of_a_long_body_can_be_asked_for(web, vault):
    site = web.site(handler(KINDS["endless body"], vault))
    (got,) = fetch([site.url("/endless")], [site.address], head_bytes=1000)
    assert len(got.body) == 1000 and got.cut and not got.problem


def test_broken_http_is_a_problem_and_never_an_exception(web, vault):
    _, answers = visit(web, vault, "broken http", SMALL)
    for path, got in answers.items():
        assert bool(got.problem) == (path != "/fine"), (path, got.problem, got.body[:50])
        assert got.problem.isprintable() and len(got.problem) < 300


def test_an_answer_nobody_asked_for_is_not_taken_for_that_of_another_server(web, vault):
    async def answer(exchange):
        await exchange.send("mine")

    liar, honest = web.site(handler(KINDS["answers nobody asked for"], vault)), web.site(answer)
    urls = [url for number in range(10) for url in (liar.url(f"/{number}"), honest.url(f"/{number}"))]
    answers = fetch(urls, [f"{liar.address}:{liar.port}", f"{honest.address}:{honest.port}"])
    assert all(got.body == b"mine" for got in answers[1::2]) and all(b"<title>" in got.body or got.transient for got in answers[::2])


def test_slow_answers_end_with_the_time_limit(web, vault):
    _, answers = visit(web, vault, "slow answers", Limits(timeout=1.0))
    for path, got in answers.items():
        assert (path == "/fine") == (not got.problem), path
        assert got.transient == (path != "/fine") and ("time limit of 1 s" in got.problem) == (path != "/fine")


def test_odd_bytes_are_kept_as_they_are(web, vault):
    _, answers = visit(web, vault, "odd bytes", SMALL)
    assert answers["/latin"].body.endswith(b"caf\xe9") and answers["/surrogate"].body.endswith(b"\xed\xa0\x80")
    assert answers["/empty"].status == 200 and answers["/empty"].body == b"" and not answers["/empty"].problem
    assert answers["/204"].status == 204 and answers["/no-type"].content_type == ""
    assert answers["/program"].problem == "its type is application/x-msdownload"


def test_redirects_to_other_schemes_lead_nowhere(web, vault):
    site, answers = visit(web, vault, "redirects to other schemes", SMALL)
    for path, got in answers.items():
        assert bool(got.problem) == (path != "/fine"), (path, got.problem)
    assert not faults(KINDS["redirects to other schemes"], site, vault)[1:]


def test_redirect_loops_are_seen(web, vault):
    _, answers = visit(web, vault, "redirect loops", SMALL)
    assert answers["/loop"].problem == answers["/self"].problem == "it redirects in a circle" and answers["/fine"].body


def test_no_cookie_comes_back(web):
    async def answer(exchange):
        await exchange.send("x", Set_Cookie="a=b; Path=/")

    site = web.site(answer)
    names = Names([site.address])  # cookies are never kept for an address in numbers
    fetch([f"http://cookies.example:{site.port}/{number}" for number in range(2)], web.allowed, resolver=names)
    assert len(site.hits) == 2 and not any("cookie" in hit.headers for hit in site.hits)


def test_the_time_limit_is_for_all_redirects_together(web):
    async def answer(exchange):
        await asyncio.sleep(0.4)
        await exchange.redirect(f"/{len(exchange.site.hits)}")

    (got,) = fetch([web.site(answer).url()], web.allowed, Limits(timeout=1.0))
    assert "time limit of 1 s" in got.problem and got.transient and len(got.hops) <= 2


def test_many_hanging_servers_do_not_hold_up_the_others(web):
    async def hang(exchange):
        await asyncio.sleep(3600)

    async def answer(exchange):
        await exchange.send("fine")

    hanging, fine = web.site(hang), web.site(answer)

    async def run():
        async with Fetcher(Limits(timeout=30), Guard(web.allowed), agent()) as fetcher:
            waiting = [asyncio.create_task(fetcher.fetch(hanging.url(f"/{number}"))) for number in range(60)]
            got = await fetcher.fetch(fine.url())
            assert not any(task.done() for task in waiting)
            for task in waiting:
                task.cancel()
            return got

    assert asyncio.run(run()).body == b"fine"


# -- compression ------------------------------------------------------------------------------------------------------------


def packed(data, encoding):
    import brotli
    import zstandard

    return {
        "gzip": gzip.compress,
        "deflate": zlib.compress,
        "br": brotli.compress,
        "zstd": zstandard.ZstdCompressor().compress,
        "identity": bytes,
    }[encoding](data)


ENCODINGS = ("gzip", "deflate", "br", "zstd", "identity")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=2000) | st.binary(max_size=20).map(lambda part: part * 5000), st.lists(st.sampled_from(ENCODINGS), min_size=1, max_size=2))
def test_what_was_packed_is_unpacked_up_to_the_limit_and_never_beyond(data, encodings):
    body = data
    for encoding in encodings:
        body = packed(body, encoding)
    assert decode(body, ", ".join(encodings), 100_000) == data
    if data:
        with pytest.raises(TooLarge):
            decode(body, ", ".join(encodings), len(data) - 1)


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(ENCODINGS[:-1]), st.integers(0, 10_000), st.integers(1, 255))
def test_damage_gives_bytes_or_one_error(data, encoding, place, change):
    body = bytearray(packed(data, encoding))
    body[place % len(body)] ^= change
    for damaged in (bytes(body), bytes(body[: place % len(body)]), data):
        try:
            assert len(decode(damaged, encoding, 5000)) <= 5000
        except (Undecodable, TooLarge):
            pass
