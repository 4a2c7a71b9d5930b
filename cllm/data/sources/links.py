"""What a page of HTML says about other pages: its links, its real address, whether it may be kept and followed.

A crawler reads every page once for this, in its own process, and pages may mean harm. So tags are found in one pass
that knows comments, scripts, quotes and tags that never end, and builds no tree. (libxml2 takes minutes for one tag of 200,000 attributes.)
"""

from __future__ import annotations

import codecs
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from cllm.data.sources.directives import Directives, of_tags
from cllm.data.sources.urls import BadURL, clean

MAX_LINKS = 5000  # of one page; a page with more is a list that a machine has written
_MAX_TAGS = 50_000  # of interest that are looked at, and bytes: both bound the time, to about half a second
_MAX_BYTES = 5_000_000
_CHARSET_BYTES = 2048  # browsers look at the first 1,024 for a declaration

# The begin of a comment or of a tag; only the names of interest go on. A tag's text goes to ">" outside of quotes, or to the end of the page where
# that never comes. No expression here tries a second way to match, so the time grows with the length of the page and nothing else.
_TAG = re.compile(r"<(?:!--|([aAbBlLmMfFsStTxXiInN][a-zA-Z]*+)[\s/>])")
_NAMES = {"a", "area", "base", "link", "meta", "frame"}
_RAW = ("script", "style", "textarea", "title", "xmp", "iframe", "noembed", "noframes")  # what is inside is no HTML
_RAW_ENDS = {name: re.compile(rf"</{name}[\s/>]", re.IGNORECASE) for name in _RAW}
_INSIDE = re.compile(r"""[^>"']*+(?:(?:"[^"]*+(?:"|\Z)|'[^']*+(?:'|\Z))[^>"']*+)*+""")
_ATTRIBUTE = re.compile(r"""([^\s"'<>/=]++)(?:\s*+=\s*+(?:"([^"]*+)"?|'([^']*+)'?|([^\s"'>]++)))?""")
_DECLARED = re.compile(rb"""<meta[^>]{0,300}?charset\s*=\s*["']?\s*([\w.:-]{1,40})""", re.IGNORECASE)
_REFRESH = re.compile(r"""\s*[\d.]*\s*[;,]?\s*(?:url\s*=\s*)?["']?([^"']+)""", re.IGNORECASE)
_NOT_CHARSETS = {"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "utf-7"}  # that Python has codecs for
_FEEDS = ("application/rss+xml", "application/atom+xml")
_WANTED_RELATIONS = {"next", "prev", "previous", "start", "contents", "chapter", "section", "help", "license"}


@dataclass(frozen=True)
class Links:
    """What a page says. All addresses are clean and absolute, in the order of the page, each once."""

    pages: tuple[str, ...] = ()
    """Links that may be followed: those marked nofollow are not among them, and there are none on a page that asks not to follow any."""
    feeds: tuple[str, ...] = ()
    """RSS and Atom feeds that the page names."""
    canonical: str = ""
    """The address that the page gives as its own."""
    refresh: str = ""
    """Where the page sends the reader on; it is the first of `pages`, too."""
    directives: Directives = field(default_factory=Directives)
    """Of its meta tags."""


def is_html(content_type: str, body: bytes) -> bool:
    """Whether a body is a page with links: by its type, or by its first bytes where the server tells none."""
    if content_type in ("text/html", "application/xhtml+xml"):
        return True
    return (
        not content_type
        and re.match(rb"\s*(?:<!--.{0,500}?-->\s*)*<(?:!doctype\s+html|html|head|body|title|a\s|p>|h1)", body[:1024], re.I | re.S) is not None
    )


def links(body: bytes, url: str, charset: str = "") -> Links:
    """Reads a page that came from `url`, with the charset that the server has told."""
    codec = codec_of(body, charset)
    text = body[:_MAX_BYTES].decode(codec, "replace")
    if codec.startswith("utf"):
        codec = "utf-8"  # queries are never written in UTF-16
    base, seen_base = url, False
    hrefs: dict[str, None] = {}
    feeds: list[str] = []
    canonical = refresh = ""
    said: list[tuple[str, str]] = []
    place = tags = 0
    while (found := _TAG.search(text, place)) and tags < _MAX_TAGS:
        tags += 1
        place = found.end()
        name = (found[1] or "").lower()
        if not name:  # a comment
            place = _after(text, "-->", found.end() - 2)  # "<!-->" is one, too
            continue
        if name not in _NAMES and name not in _RAW_ENDS:
            continue
        inside = _INSIDE.match(text, place - 1)
        assert inside  # it matches nothing at least
        place = inside.end()
        if name in _RAW_ENDS:
            if name == "iframe":
                hrefs.setdefault(_attributes(inside[0]).get("src", ""))
            end = _RAW_ENDS[name].search(text, place)
            place = end.end() if end else len(text)
            continue
        attributes = _attributes(inside[0])
        if name in ("a", "area"):
            if "href" in attributes and not {"nofollow", "ugc", "sponsored"} & set(attributes.get("rel", "").lower().split()):
                hrefs.setdefault(attributes["href"])
        elif name == "base" and not seen_base and "href" in attributes:
            seen_base = True  # the first one counts, for the links before it as well
            try:
                base = clean(attributes["href"], url, codec)
            except BadURL:
                pass
        elif name == "frame":
            hrefs.setdefault(attributes.get("src", ""))
        elif name == "link":
            relations = set(attributes.get("rel", "").lower().split())
            if "canonical" in relations:
                canonical = canonical or attributes.get("href", "")
            elif "alternate" in relations and attributes.get("type", "").lower().strip() in _FEEDS:
                feeds.append(attributes.get("href", ""))
            elif relations & _WANTED_RELATIONS:
                hrefs.setdefault(attributes.get("href", ""))
        elif name == "meta":
            content = attributes.get("content", "")
            if attributes.get("http-equiv", "").lower() == "refresh" and not refresh:
                sent = _REFRESH.match(content[:5000])
                refresh = sent[1] if sent and "url" in content.lower() else ""
            elif meta := attributes.get("name", "").lower().strip():
                said.append((meta, content[:500]))
    directives = of_tags(said)
    found_pages = () if directives.nofollow else tuple(_cleaned([refresh, *hrefs], base, codec, MAX_LINKS))
    return Links(
        pages=found_pages,
        feeds=tuple(_cleaned(feeds, base, codec, 20)),
        canonical=next(_cleaned([canonical], base, codec, 1), ""),
        refresh=next(_cleaned([refresh], base, codec, 1), ""),
        directives=directives,
    )


def _attributes(text: str) -> dict[str, str]:
    """The attributes of a tag; of several with one name the first counts (WHATWG)."""
    found = reversed(_ATTRIBUTE.findall(text[:20_000]))
    return {name.lower(): html.unescape(value) if "&" in value else value for name, *values in found for value in ("".join(values),)}


def _after(text: str, mark: str, place: int) -> int:
    end = text.find(mark, place)
    return end + len(mark) if end >= 0 else len(text)


def _cleaned(hrefs: list[str], base: str, codec: str, most: int) -> Iterator[str]:
    seen: set[str] = set()
    for href in hrefs:
        if len(seen) >= most:
            return
        if not href or href[0] == "#":
            continue
        try:
            url = clean(href, base, codec)
        except BadURL:
            continue
        if url not in seen:
            seen.add(url)
            yield url


def codec_of(body: bytes, told: str) -> str:
    """The charset of a page as browsers find it: byte order mark, server, declaration, and UTF-8 where its bytes fit."""
    for mark, codec in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if body.startswith(mark):
            return codec
    declared = _DECLARED.search(body[:_CHARSET_BYTES])
    for name in (told, declared[1].decode("ascii") if declared else ""):
        try:
            codec = codecs.lookup(name).name if name else ""
            if codec and codec not in _NOT_CHARSETS and codecs.lookup(codec)._is_text_encoding:
                return {"iso8859-1": "cp1252", "ascii": "cp1252"}.get(codec, codec)  # what browsers take these names for
        except (LookupError, ValueError):
            continue
    return "utf-8"
