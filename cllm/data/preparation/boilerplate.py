"""Lines that stand on many pages of a site: counted over all pages, before any page is cleaned.

    count      a piece: on how many pages each line stands; PLACE.lines, sorted by key
    merge      a range of keys of all pieces; only lines that may be boilerplate are kept
    Boilerplate   what a page is cleaned by

How many pages a site has is counted like a line: each page has one more that all pages of the site share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from cllm.data.clean import lines
from cllm.data.clean.rules import Rules
from cllm.data.clean.words import split
from cllm.data.preparation.duplicates import save, slice_of
from cllm.data.preparation.rows import Row, read_rows
from cllm.data.preparation.versions import reasons
from cllm.runtime.mapped_file import mapped

_PAGE = "one page of this site"


def site_of(row: Row) -> str:
    """The site of a page: the host of its address, or its source; empty for what is no page of the web."""
    if row["kind"] != "html":
        return ""
    return urlsplit(row["url"]).netloc.lower() or row["source"]


def count(place: str, inputs: list[str], piece: int = 0, replaced: str = "") -> dict[str, Any]:
    """Writes PLACE.lines: the lines of the pages of an extracted piece, each page in its newest version."""
    found = []
    older = reasons(replaced, piece)
    for number, row in enumerate(read_rows(Path(inputs[0]), ("text", "url", "source", "kind", "dropped_because"))):
        site = site_of(row)
        if site and not row["dropped_because"] and number not in older:
            found.append(np.concatenate([lines.line_keys(row["text"], site), _page_key(site)]))
    return {"files": {".lines": save(Path(place + ".lines"), lines.count(found))}}


def merge(place: str, part: int, parts: int, inputs: list[str], least: int) -> dict[str, Any]:
    """Writes PLACE.lines: the lines whose keys lie in this part and that stand on `least` pages."""
    counts = lines.merge([slice_of(each, lines.COUNT, "key", part, parts) for each in inputs])
    return {"files": {".lines": save(Path(place + ".lines"), counts[counts["pages"] >= least])}}


def _page_key(site: str) -> np.ndarray:
    return lines.line_keys(_PAGE, site)


class Boilerplate:
    """The counted lines of all sites, by which pages are cleaned."""

    def __init__(self, inputs: list[str]) -> None:
        """inputs: the parts that `merge` has written, in their order."""
        self._counts = np.concatenate([np.empty(0, lines.COUNT), *(mapped(each, lines.COUNT) for each in inputs)])

    def without(self, text: str, site: str, rules: Rules) -> tuple[str, int]:
        """A page without the boilerplate of its site, and how many lines that were."""
        words = split(text)
        pages = self._of(_page_key(site))
        own = self._of(lines.line_keys(text, site, words))
        return lines.drop_lines(text, site, lines.boilerplate(own, int(pages["pages"].sum()), rules), words)

    def _of(self, keys: np.ndarray) -> np.ndarray:
        """The counts of those keys that have one."""
        if not len(self._counts):
            return self._counts
        places = np.minimum(np.searchsorted(self._counts["key"], keys), len(self._counts) - 1)
        return self._counts[places[self._counts["key"][places] == keys]]
