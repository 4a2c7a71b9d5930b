"""Links, directives and listings of addresses out of what a site sends."""

import gzip
import resource

import pytest

from cllm.data.sources import sitemaps
from cllm.data.sources.directives import Directives, of_headers
from cllm.data.sources.links import MAX_LINKS, is_html, links

URL = "https://example.org/docs/page.html"


def pages(text, url=URL, charset="utf-8"):
    return list(links(text.encode(charset) if isinstance(text, str) else text, url, charset).pages)


def test_links_are_absolute_and_each_is_there_once_in_the_order_of_the_page():
    html = """<!doctype html><A HREF="a.html">1</A> <a class=x href=/b?x=1&amp;y=2#part>2</a> <a\nhref='../c'>3</a><a href=a.html#z>4</a>
    <area href="d"><frame src="f.html"><iframe src=g.html></iframe><link rel="next" href="n"><a name=x>5</a><a href>6</a><a href="#t">7</a>"""
    assert pages(html) == [
        "https://example.org/docs/a.html", "https://example.org/b?x=1&y=2", "https://example.org/c", "https://example.org/docs/d",
        "https://example.org/docs/f.html", "https://example.org/docs/g.html", "https://example.org/docs/n",
    ]  # fmt: skip


def test_what_is_no_link_is_none():
    html = """<!-- <a href=no1> --> <script>"<a href=no2>"</script><style><a href=no3></style><textarea><a href=no4></textarea>
    <title><a href=no5></title>
    <!--><a href=yes1><abbr href=no6><a href="mailto:x@example.org"><a href="javascript:x()"><a rel="x NOFOLLOW" href=no7><a rel=ugc href=no8>
    <link rel=stylesheet href=no9><img src=no10 srcset="no11 2x"><form action=no12></form><SCRIPT><a href=no13></script ><a href='yes2'"""
    assert pages(html) == ["https://example.org/docs/yes1", "https://example.org/docs/yes2"]


def test_the_first_base_counts_for_all_links():
    html = '<a href=x><base target=y><base href="//other.example/z/"><base href="/no/"><a href=../v>'
    assert pages(html) == ["https://other.example/z/x", "https://other.example/v"]
    assert pages('<base href="javascript:1"><a href=x>') == ["https://example.org/docs/x"]


def test_refresh_canonical_and_feeds():
    page = links(
        b"""<meta http-equiv=Refresh content="0; URL='/next'"><link href=/real rel="x canonical"><a href=/a>
        <link rel=alternate type="application/rss+xml" href=/feed><link rel=alternate hreflang=de href=/de>""",
        URL,
    )
    assert page.refresh == "https://example.org/next" and page.pages == ("https://example.org/next", "https://example.org/a")
    assert page.canonical == "https://example.org/real" and page.feeds == ("https://example.org/feed",)
    assert links(b'<meta http-equiv=refresh content="300">', URL).refresh == ""


def test_charsets():
    assert pages(b"<meta charset=iso-8859-1><a href='?\xe4'>", charset="") == ["https://example.org/docs/page.html?%E4"]
    assert pages("<a href='/ä?ö'>".encode("utf-16"), charset="utf-8") == ["https://example.org/%C3%A4?%C3%B6"]
    assert pages("<a href=?ö>".encode("utf-8-sig"), charset="") == ["https://example.org/docs/page.html?%C3%B6"]
    assert pages(b"<a href='/\xff\xfe'><a href=/b>", charset="utf-8") == ["https://example.org/%EF%BF%BD%EF%BF%BD", "https://example.org/b"]
    for unknown in ("x-unknown", "rot13", "hex", "\0", "idna", "utf-7", "punycode", "undefined", "unicode_escape", "x" * 99):
        assert pages(b"<a href=/b>", charset=unknown) == ["https://example.org/b"], unknown


@pytest.mark.parametrize(
    ("tag", "noindex", "nofollow"),
    [
        ("<meta name=robots content='noindex, nofollow'>", "noindex", True),
        ("<META NAME=' Robots ' CONTENT=NONE>", "none", True),
        ("<meta name=cllm content=noai>", "noai", False),
        ("<meta name=robots content='index,follow,max-snippet:-1'>", "", False),
        ("<meta name=otherbot content=noindex>", "", False),
        ("<meta name=robots content=nofollow>", "", True),
        ("<meta name='tdm-reservation' content='1'>", "tdm-reservation", False),
        ("<meta name='tdm-reservation' content='0'>", "", False),
        ("<!-- <meta name=robots content=noindex> -->", "", False),
    ],
)
def test_meta_tags_are_obeyed(tag, noindex, nofollow):
    page = links(f"<head>{tag}</head><a href=/x>".encode(), URL)
    assert page.directives == Directives(bool(noindex), nofollow, noindex)
    assert bool(page.pages) != nofollow


@pytest.mark.parametrize(
    ("value", "noindex", "nofollow"),
    [
        ("noindex", True, False),
        ("otherbot: noindex, nofollow", False, False),
        ("otherbot: noindex, cllm: nofollow", False, True),
        ("CLLM: NoIndex", True, False),
        ("max-snippet: 5, noai", True, False),
        ("all", False, False),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST, none", True, True),
    ],
)
def test_headers_are_obeyed(value, noindex, nofollow):
    found = of_headers([("Content-Type", "text/html"), ("x-robots-tag", value)])
    assert (found.noindex, found.nofollow) == (noindex, nofollow)


def test_a_page_gives_a_bounded_number_of_links():
    html = "".join(f"<a href=/{number}>" for number in range(3 * MAX_LINKS))
    assert pages(html) == [f"https://example.org/{number}" for number in range(MAX_LINKS)]


HOSTILE = {
    "attributes": b"<a " + b" ".join(b"a%d=1" % number for number in range(100_000)) + b">",
    "nesting": b"<div>" * 200_000, "comments": b"<!--" * 500_000, "tags that do not end": b"<a " * 500_000, "quotes": b"<x '\"" * 300_000,
    "quotes of links": b"<a href=\"'" * 300_000, "scripts": b"<script>" * 200_000, "blanks": b"<a href" + b" " * 1_000_000 + b"=x>",
    "equal signs": b"<a " + b"=" * 1_000_000, "ends": b"<title></title" * 100_000, "entities": b"<a href='" + b"&amp;" * 200_000 + b"'>",
    "dots": b"<a href=" + b"../" * 300_000 + b">", "numbers": b"<a href='" + b"&#9999999999;" * 50_000 + b"'>",
    "refresh": b"<meta http-equiv=refresh content='" + b"0" * 500_000 + b"'>",
}  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_page_costs_time_in_proportion_to_its_length(kind):
    """An expression that tries again from each place would not come back within hours."""
    assert len(links(HOSTILE[kind], URL).pages) <= 1


def test_html_is_known_by_its_type_or_its_begin():
    assert is_html("text/html", b"") and is_html("", b"\n<!-- x --><!DOCTYPE html>") and is_html("", b"<html>")
    assert not is_html("text/plain", b"<html>") and not is_html("", b"%PDF-1.7") and not is_html("application/pdf", b"<html>")


SITEMAP = b"""<?xml version="1.0"?><urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9" xmlns:image="http://www.google.com/schemas/sitemap-image/1.1">
<url><loc> https://example.org/a </loc><lastmod>2026-01-02</lastmod><image:image><image:loc>https://example.org/i.png</image:loc></image:image></url>
<url><loc>/b?x=1&amp;y=2</loc></url><url><loc>ftp://example.org/c</loc></url></urlset>"""


def test_sitemaps():
    expected = (("https://example.org/a", "2026-01-02"), ("https://example.org/b?x=1&y=2", ""))
    assert sitemaps.read(SITEMAP, URL).pages == sitemaps.read(gzip.compress(SITEMAP), URL).pages == expected
    index = b"<sitemapindex><sitemap><loc>https://example.org/s1.xml.gz</loc></sitemap><sitemap><loc>s2.xml</loc></sitemap></sitemapindex>"
    assert sitemaps.read(index, URL) == sitemaps.Listing(sitemaps=("https://example.org/s1.xml.gz", "https://example.org/docs/s2.xml"))
    assert sitemaps.read(b"\xef\xbb\xbfhttps://example.org/a\r\nx\nhttps://example.org/b\n", URL).pages == (
        ("https://example.org/a", ""),
        ("https://example.org/b", ""),
    )


def test_feeds():
    rss = b"<rss><channel><link>https://example.org/</link><item><title>x</title><link>https://example.org/1</link><pubDate>d</pubDate></item><item>"
    rss += b"<guid>https://example.org/2</guid></item><item><guid isPermaLink='false'>https://example.org/3</guid></item></channel></rss>"
    assert sitemaps.read(rss, URL).pages == (("https://example.org/1", "d"), ("https://example.org/2", ""))
    atom = b"<feed xmlns='http://www.w3.org/2005/Atom'><link href='/self'/><entry><link rel='edit' href='/no'/><link href='/1'/>"
    atom += b"<updated>u</updated></entry></feed>"
    assert sitemaps.read(atom, URL).pages == (("https://example.org/1", "u"),)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\0\0\0", b"<", b"<urlset>", b"<html><body>Not found</body></html>", b"%PDF-1.4", b"\x1f\x8b\x08truncated", b"<urlset>" * 100_000,
        b'<!DOCTYPE l [<!ENTITY a0 "aaaaaaaaaa">' + b"".join(b'<!ENTITY a%d "%s">' % (n, b"&a%d;" % (n - 1) * 10) for n in range(1, 12))
        + b"]><urlset><url><loc>https://example.org/&a11;</loc></url></urlset>",
        b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><urlset><url><loc>&e;</loc></url></urlset>',
    ],
)  # fmt: skip
def test_a_listing_that_is_none_is_a_problem_and_no_bomb(body):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    listing = sitemaps.read(body, URL)
    assert listing.problem or all("passwd" not in url and len(url) < 100 for url, _ in listing.pages)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_sitemap_that_unpacks_without_end_is_refused():
    bomb = gzip.compress(b"https://example.org/a\n" * 3_000_000)
    assert "larger than" in sitemaps.read(bomb, URL).problem


def test_a_long_sitemap_is_read_up_to_the_limit_of_the_protocol():
    body = b"<urlset>" + b"".join(b"<url><loc>https://example.org/%d</loc></url>" % number for number in range(60_000)) + b"</urlset>"
    listing = sitemaps.read(body, URL)
    assert len(listing.pages) == sitemaps.MAX_ADDRESSES and listing.pages[-1][0] == "https://example.org/49999"
