"""Lists of addresses that a site publishes: sitemaps (XML, text, indexes of other sitemaps, gzipped) and feeds (RSS, Atom).

They come from the site like any page, so their XML declares no entity that is expanded, loads nothing, and is read as a stream that can be stopped.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

from cllm.data.sources.decoding import TooLarge, Undecodable, decode
from cllm.data.sources.urls import BadURL, clean

MAX_BYTES = 52_428_800  # unpacked, and addresses: what the protocol of sitemaps allows
MAX_ADDRESSES = 50_000


@dataclass(frozen=True)
class Listing:
    """What a sitemap or feed lists: clean addresses, each once, in its order."""

    pages: tuple[tuple[str, str], ...] = ()
    """Each with the date of its last change as the site writes it, empty where it tells none."""
    sitemaps: tuple[str, ...] = ()
    """Further sitemaps, of an index."""
    problem: str = ""
    """Why it could not be read to its end; what was read before stands."""


def read(body: bytes, url: str) -> Listing:
    """Reads a sitemap or feed that came from `url`, whatever its Content-Type said."""
    if body.startswith(b"\x1f\x8b"):
        try:
            body = decode(body, "gzip", MAX_BYTES)
        except TooLarge:
            return Listing(problem=f"it is larger than {MAX_BYTES:,} bytes once it is unpacked")
        except Undecodable as error:
            return Listing(problem=str(error))
    if len(body) > MAX_BYTES:
        return Listing(problem=f"it is larger than {MAX_BYTES:,} bytes")
    return _xml(body, url) if re.match(rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?[\s\0]*<", body[:200]) else _text(body, url)


def _text(body: bytes, url: str) -> Listing:
    """One address a line."""
    found = _Found(url)
    for line in body.decode("utf-8-sig", "replace").splitlines():
        line = line.strip()
        if line.startswith(("http://", "https://")) and not found.add(line, ""):
            break
    return found.listing("" if found.pages else "it is neither XML nor a list of addresses")


def _xml(body: bytes, url: str) -> Listing:
    from lxml import etree

    found = _Found(url)
    problem = ""
    entry = _Entry()
    events = etree.iterparse(
        io.BytesIO(body),
        events=("start", "end"),
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
        recover=True,
        remove_comments=True,
    )
    try:
        for event, element in events:
            name = etree.QName(element).localname.lower() if isinstance(element.tag, str) else ""
            if event == "start":
                if name in ("url", "sitemap", "item", "entry"):
                    entry = _Entry(name)
                continue
            words = (element.text or "").strip()
            if name == "link" and entry.kind in ("item", "entry"):
                relation = element.get("rel", "alternate")
                if relation == "alternate" and not entry.address:
                    entry.address = element.get("href", "") or words  # Atom has an attribute, RSS a text
            elif name == "loc" and not entry.address:  # a namespace of images has a loc of its own, after the page's
                entry.address = words
            elif name == "guid" and element.get("isPermaLink", "true").lower() == "true":
                entry.guid = words
            elif name in ("lastmod", "updated", "pubdate", "published", "date") and not entry.date:
                entry.date = words[:64]
            elif name in ("url", "sitemap", "item", "entry"):
                if not found.add(entry.address or entry.guid, entry.date, name == "sitemap"):
                    break
                entry = _Entry()
            element.clear(keep_tail=False)
            while element.getprevious() is not None:  # what was read is let go
                del element.getparent()[0]
    except etree.XMLSyntaxError as error:
        problem = f"its XML is damaged in line {error.lineno}"
    return found.listing(problem or ("" if found.pages or found.sitemaps else "it lists no addresses"))


@dataclass
class _Entry:
    kind: str = ""
    address: str = ""
    guid: str = ""
    date: str = ""


class _Found:
    """Collects addresses until there are too many."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.pages: dict[str, str] = {}
        self.sitemaps: dict[str, None] = {}

    def add(self, href: str, date: str, is_sitemap: bool = False) -> bool:
        """Whether there is room for more."""
        if href:
            try:
                address = clean(href, self._url)
            except BadURL:
                return True
            if is_sitemap:
                self.sitemaps.setdefault(address)
            else:
                self.pages.setdefault(address, date)
        return len(self.pages) + len(self.sitemaps) < MAX_ADDRESSES

    def listing(self, problem: str) -> Listing:
        return Listing(tuple(self.pages.items()), tuple(self.sitemaps), problem)
