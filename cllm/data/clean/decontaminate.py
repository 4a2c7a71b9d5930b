"""Text for evaluation must not stand in text for training: 13 words in a row that both have give it away.

The method of GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C). A text for evaluation of 8 to 12 words counts as a whole; a shorter one says
nothing that others would not say as well.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from cllm.data.clean.compiling import jit
from cllm.data.clean.measures import slot, table_size
from cllm.data.clean.normalise import normalise
from cllm.data.clean.rules import Rules
from cllm.data.clean.words import Words, between, ngrams, power, prefixes, split

LENGTH = 13  # words
SHORTEST = 8
_LINK = re.compile(r"!?\[([^\[\]\n]*)\]\([^()\s]*(?:\([^()\s]*\)[^()\s]*)*(?: \"[^\"\n]*\")?\)")
_NOTE = re.compile(r"\[\^?\d{1,3}\]")


class Grams(NamedTuple):
    """What must not occur: runs of words as hashes."""

    hashes: np.ndarray
    """(G,) uint64, ascending: all that has to be stored."""
    sizes: np.ndarray
    """(S,) int64, ascending: of how many words there are runs."""
    table: np.ndarray
    """The same hashes, arranged so that one is found at once."""


def grams_of(texts: Iterable[str]) -> Grams:
    """The runs of words of texts for evaluation, as they are and as documents may be: cleaned, and with each letter in its plainest form."""
    found: list[np.ndarray] = []
    sizes: set[int] = set()
    for text in texts:
        cleaned = normalise(text, False, Rules())[0]
        for form in {text, cleaned, _plainest(cleaned)}:
            hashes = split(form).hashes
            size = min(len(hashes), LENGTH)
            if size >= SHORTEST:
                found.append(ngrams(hashes, size))
                sizes.add(size)
    return arranged(np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64), np.array(sorted(sizes), np.int64))


def arranged(hashes: np.ndarray, sizes: np.ndarray) -> Grams:
    """Stored runs, ready for use."""
    return Grams(hashes, sizes, _filled(hashes))


def overlap(words: Words, grams: Grams) -> float:
    """Share of the runs of words of a document that also stand in text for evaluation: of the length for which it is most."""
    return float(_overlap(words.hashes, grams.sizes, grams.table)) if len(grams.hashes) else 0.0


def judge(text: str, words: Words, grams: Grams, rules: Rules) -> str:
    """Why a document is dropped, or "". words: of the text."""
    if rules.max_evaluation_overlap is None:
        return ""
    share = overlap(words, grams)
    if (plainest := _plainest(text)) != text:
        share = max(share, overlap(split(plainest), grams))
    if share <= rules.max_evaluation_overlap:
        return ""
    return f"max_evaluation_overlap: {100 * share:.3g} % of its runs of {LENGTH} words stand in text for evaluation"


def _plainest(text: str) -> str:
    """The text without what may stand between its words, and with plain letters: no addresses of links and no marks of notes, as in Markdown, no
    ligatures, as in PDF, no letters of double width."""
    if "[" in text:
        text = _NOTE.sub("", _LINK.sub(r"\1", text))
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


@jit
def _filled(hashes):
    table = np.zeros(table_size(len(hashes)), np.uint64)
    for each in hashes:
        key = max(each, np.uint64(1))
        table[slot(table, key)] = key
    return table


@jit
def _overlap(hashes, sizes, table):
    sums = prefixes(hashes)
    most = 0.0
    for size in sizes:
        total = len(hashes) - size + 1
        base_power = power(size)
        found = 0
        for i in range(total):
            key = max(between(sums, i, i + size, base_power), np.uint64(1))
            found += table[slot(table, key)] == key
        if found:
            most = max(most, found / total)
    return most
