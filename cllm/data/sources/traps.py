"""What keeps a crawl out of parts of a site that never end: calendars, filters that combine, pages made of pages.

URLs of a site are grouped by how their path begins (`prefix_name`). Three rules look at a group; none of them looks at what a page says:

- **Share.** The more URLs a group has, the later its next ones come (`surplus`): each doubling costs as much as one more level of depth. A
  group without end is therefore crawled last, and leaves room for what is small.
- **Nothing new.** Pages are cut into their blocks of text, numbers left out, and each block is looked up among those of other pages. When
  STALE pages more than brought something new brought nothing, the group is closed.
- **Budget.** A site gives up after so many pages (`max_per_site` of the settings).

The signs of a trap in the URL itself (length, repeated parts) are `cllm.data.sources.urls`.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit
from zlib import crc32

FREE = 32  # URLs of a group before it has to wait
STALE = 30  # pages without anything new, less twice those with, after which a group is closed
NOVEL = 0.1  # share of a page's text that must be new
_SHORTEST = 24  # bytes of a block that counts
_LARGEST = 1 << 20  # bytes of a page that are looked at


def prefix_name(url: str) -> str:
    """The group of a URL: the first two folders of its path, numbers as #, and ? where a query follows.

    >>> prefix_name("https://example.org/calendar/2031/05/03?view=day")
    '/calendar/#?'
    """
    parts = urlsplit(url)
    folders = parts.path.split("/")[1:-1][:2]
    return "/" + "/".join(re.sub(r"\d+", "#", each[:40]) for each in folders) + ("?" if parts.query else "")


def surplus(found: int) -> int:
    """Levels of depth that the next URL of a group waits longer, where `found` are known already."""
    return (found // FREE).bit_length()


class Novelty:
    """Blocks of text that were seen lately, as two bitmaps of fixed size; the older one is dropped when the newer one is a quarter full.

    A block has one bit, so a few are taken for seen that were not; never the other way round, as long as both bitmaps last.
    """

    BITS = 1 << 22

    def __init__(self, saved: bytes | None = None) -> None:
        size = self.BITS // 8
        whole = saved if saved is not None and len(saved) == 2 * size else bytes(2 * size)
        self._new, self._old = bytearray(whole[:size]), bytearray(whole[size:])
        self._set = int.from_bytes(self._new).bit_count()
        self.has_changed = False

    def of(self, site: int, body: bytes) -> float:
        """The share of a page's text that was not seen on this site, from 0 to 1; its blocks count as seen from now on."""
        total = fresh = 0
        self.has_changed = True
        pieces = body[:_LARGEST].translate(None, b"0123456789").split(b"<")  # a tag, and the text behind it
        for block in {each.rpartition(b">")[2].strip() for each in pieces}:
            if len(block) < _SHORTEST:
                continue
            total += len(block)
            bit = crc32(block, site) & (self.BITS - 1)
            place, mask = bit >> 3, 1 << (bit & 7)
            if not (self._new[place] | self._old[place]) & mask:
                fresh += len(block)
            if not self._new[place] & mask:
                self._new[place] |= mask
                self._set += 1
        if self._set > self.BITS // 4:
            self._old, self._new, self._set = self._new, bytearray(self.BITS // 8), 0
        return fresh / total if total else 1.0

    def save(self) -> bytes:
        self.has_changed = False
        return bytes(self._new + self._old)
