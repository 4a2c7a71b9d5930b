"""Lines that stand on many pages of a site (menus, footers, notices): counted over all pages, then taken out of each.

    counts = merge([count(line_keys(page, site) for page in pages), ...])     # in any order, over any cut of the pages
    text, dropped = drop_lines(page, site, boilerplate(counts, pages_of_the_site, rules))

A key stands for a line of a site without white space around it. Lines without a word ("---", "```") and those of code between fences are never
counted.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from cllm.data.clean import words as parts
from cllm.data.clean.rules import Rules
from cllm.data.clean.words import Words, distinct

COUNT = np.dtype([("key", np.uint64), ("pages", np.uint32)])

_LONGEST_POLICY_LINE = 300  # characters: what is longer is about the matter itself
# The first six are C4's; a line of them is about the site.
_POLICY = re.compile(
    "terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies|"
    r"(?:enable|activate|turn on) java ?script|java ?script (?:is|to be|must be) (?:disabled|required|enabled|turned off)|requires java ?script",
    re.IGNORECASE,
)


def line_keys(text: str, site: str = "", words: Words | None = None) -> np.ndarray:
    """(K,) uint64, ascending: the different lines of a page, for its site. `words`: those of the text, where they were cut already."""
    keys = _keys(text, site, parts.split(text) if words is None else words)
    return distinct(keys[keys != 0])


def count(pages: Iterable[np.ndarray]) -> np.ndarray:
    """(C,) of COUNT, ascending by key: on how many pages each line stands. `pages`: the keys of each."""
    found = list(pages)
    keys, numbers = np.unique(np.concatenate(found) if found else np.empty(0, np.uint64), return_counts=True)
    return _counted(keys, numbers)


def merge(counts: Sequence[np.ndarray]) -> np.ndarray:
    """(C,) of COUNT: several counts as one. The order does not matter."""
    together = np.concatenate(counts) if counts else np.empty(0, COUNT)
    keys, places = np.unique(together["key"], return_inverse=True)
    pages = np.zeros(len(keys), np.uint64)
    np.add.at(pages, places, together["pages"])
    return _counted(keys, pages)


def boilerplate(counts: np.ndarray, num_pages: int, rules: Rules) -> np.ndarray:
    """(D,) uint64, ascending: the lines that are taken out of all pages of a site of `num_pages` pages."""
    if rules.boilerplate_min_pages is None or rules.boilerplate_share is None:
        return np.empty(0, np.uint64)
    found: np.ndarray = counts["key"][counts["pages"] >= max(rules.boilerplate_min_pages, rules.boilerplate_share * num_pages)]
    return found


def drop_lines(text: str, site: str, keys: np.ndarray, words: Words | None = None) -> tuple[str, int]:
    """A page without the lines of these keys (ascending), and how many that were."""
    if not len(keys):
        return text, 0
    mine = _keys(text, site, parts.split(text) if words is None else words)
    drop = (keys[np.minimum(np.searchsorted(keys, mine), len(keys) - 1)] == mine) & (mine != 0)
    return _without(text, drop.tolist()) if drop.any() else (text, 0)


def drop_policy_lines(text: str) -> tuple[str, int]:
    """A page without lines about cookies, terms of use and a browser without JavaScript (rule `c4_policy_lines`), and how many that were."""
    if not _POLICY.search(text):
        return text, 0
    return _without(text, [len(line) <= _LONGEST_POLICY_LINE and bool(_POLICY.search(line)) for line in text.split("\n")])


def _without(text: str, drop: Sequence[bool]) -> tuple[str, int]:
    return "\n".join(line for line, away in zip(text.split("\n"), drop) if not away), sum(drop)


def _counted(keys: np.ndarray, pages: np.ndarray) -> np.ndarray:
    counts = np.empty(len(keys), COUNT)
    counts["key"], counts["pages"] = keys, pages
    return counts


def _keys(text: str, site: str, words: Words) -> np.ndarray:
    """(L,) uint64: a key for each line, 0 for those that are never boilerplate."""
    keys = words.lines ^ _site(site)
    keys[(words.lines == 0) | (np.diff(words.line_words) == 0)] = 0
    if "```" in text:
        keys[list(_inside_fences(text.split("\n")))] = 0
    return keys


@functools.lru_cache(4096)
def _site(name: str) -> np.uint64:
    return np.uint64(parts.split(name).lines[0])


def _inside_fences(lines: Sequence[str]) -> Iterator[int]:
    """The numbers of lines between fences of Markdown, with the fences."""
    inside = False
    for number, line in enumerate(lines):
        fence = line.lstrip().startswith("```")
        if fence or inside:
            yield number
        inside ^= fence
