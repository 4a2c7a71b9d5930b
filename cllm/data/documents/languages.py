"""How likely a text is in each of some fifty languages, for telling charsets apart.

Each language is a Markov chain over letters: the probability of a character depends on the one before it, as counted in a page of text of our own
(languages.txt, where a language is added by adding a page). What its page does not show is judged by kind: digits, punctuation, letters of the same
script, letters of another, symbols, control characters. Text read in a wrong charset is full of what no language has: symbols inside words, capitals
after small letters, letters of two scripts in one word.
"""

import functools
import unicodedata
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np

# Kinds of characters. The number of a kind is its row in the table of pairs; a language's own letters follow.
(
    SPACE, BREAK, DIGIT, STOP, APOSTROPHE, QUOTE, SIGN, LATIN, SAME_SCRIPT, OTHER_LETTER, SYMBOL, CONTROL, DAMAGE,
    HAN, HIRAGANA, KATAKANA, HANGUL, NARROW_KATAKANA, WIDE_SIGN,
) = range(19)  # fmt: skip
NUM_KINDS = 19
IDEOGRAPHIC = (HAN, HIRAGANA, KATAKANA, HANGUL)
# How often each kind counts as seen on every page, and among how many characters it is shared out.
_SHARE = np.array([20, 20, 10, 10, 3, 5, 3, 1, 0.2, 0.02, 0.2, 0.005, 0.00002, 0.02, 0.01, 0.01, 0.02, 0.003, 0.02])
_WIDTH = np.array([1.3, 1.5, 10, 10, 1.2, 12, 20, 26, 60, 200, 150, 60, 3, 20000, 80, 80, 11000, 60, 60])
_KEEPS_TO_ITSELF = (LATIN, OTHER_LETTER, HAN, HIRAGANA, KATAKANA, HANGUL, NARROW_KATAKANA)  # what follows such a character is mostly another one
_SELF = 20.0  # pairs of these kinds that count as seen
_SMOOTHING = 4.0  # pairs that count as seen after each character, shared out by how often a character occurs at all
_INSIDE_WORD = 4.0  # nats that a symbol or quotation mark costs in addition between two letters
# log P(case of a letter | case of the one before): of no case, small, capital.
_CASE = np.log(np.array([[1.0, 0.8, 0.2], [1.0, 0.997, 0.003], [1.0, 0.6, 0.4]])).astype(np.float32)
_LETTERS = (LATIN, OTHER_LETTER)
_QUOTES = (
    "\u00a0\u201c\u201d\u201e\u2018\u201a\u00ab\u00bb\u2013\u2014\u2026\u2022\u00a7\u00b0\u00a9\u20ac\u00a3\u00ae\u2122\u00b7\u00a1\u00bf\u00ba\u00ad"
)
_REPEATED = np.log(0.3)  # a dash, blank or line of a table after the same

_CEDILLAS = str.maketrans("\u0219\u021b\u0218\u021a", "\u015f\u0163\u015e\u0162")
_ARABIC_LETTERS = str.maketrans("\u06cc\u06a9", "\u064a\u0643")
_TONES = "\u0300\u0301\u0303\u0309\u0323"


class _Characters(NamedTuple):
    """What does not depend on the language; arrays over the code points of the basic plane."""

    kind: np.ndarray  # (65536,) uint8
    case: np.ndarray  # (65536,) uint8: 0 none, 1 small, 2 capital
    small: np.ndarray  # (65536,) uint16: the small letter of a capital, itself for all others
    repeats: np.ndarray  # (65536,) bool: may well stand many times in a row


def _kind(code: int, category: str) -> int:
    character = chr(code)
    if character in " \u3000":
        return SPACE
    if character in "\n\r\t":
        return BREAK
    if category == "Nd":
        return DIGIT
    if character in "'\u2019":
        return APOSTROPHE
    if character in '.,;:!?-()"':
        return STOP
    if character in _QUOTES:
        return QUOTE
    if code < 128:
        return LATIN if character.isalpha() else SIGN if category[0] in "PS" else CONTROL
    if code == 0xFFFD:
        return DAMAGE
    if 0xFF66 <= code <= 0xFF9F:
        return NARROW_KATAKANA
    if 0x3001 <= code <= 0x303F or 0xFF00 <= code <= 0xFF65 or code == 0x30FB:
        return WIDE_SIGN
    if 0x3041 <= code <= 0x309F:
        return HIRAGANA
    if 0x30A0 <= code <= 0x30FF:
        return KATAKANA
    if 0x3400 <= code <= 0x9FFF:
        return HAN
    if 0xAC00 <= code <= 0xD7A3:
        return HANGUL
    if category[0] in "LM":
        return OTHER_LETTER
    if category == "Cf" and 0x200B <= code <= 0x200F:
        return SYMBOL  # joiners and marks of direction in Persian and Hebrew
    return CONTROL if category[0] == "C" else SYMBOL


@functools.cache
def characters() -> _Characters:
    kind, case = np.empty(65536, np.uint8), np.zeros(65536, np.uint8)
    small = np.arange(65536, dtype=np.uint16)
    for code in range(65536):
        category = unicodedata.category(chr(code))
        kind[code] = _kind(code, category)
        if category in ("Lu", "Ll"):
            case[code] = 2 if category == "Lu" else 1
            lower = chr(code).lower()
            small[code] = ord(lower) if len(lower) == 1 else code
    return _Characters(kind, case, small, np.isin(kind, (SPACE, BREAK, STOP, SIGN, SYMBOL, WIDE_SIGN)))


def codes(text: str) -> np.ndarray:
    """(len(text),) uint16: code points. Those beyond the basic plane stand for one another: pictures for symbols, ideographs for rare ideographs."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    beyond = np.where(points < 0x20000, 0x2800, np.where(points < 0x40000, 0x3400, 0xE000)) | (points & 0xFF)
    return np.where(points < 0x10000, points, beyond).astype(np.uint16)


class Pairs(NamedTuple):
    """Characters and the ones after them in a text, and how often each pair occurs."""

    before: np.ndarray  # (num_pairs,) uint16, small letters
    after: np.ndarray  # (num_pairs,) uint16, small letters
    times: np.ndarray  # (num_pairs,) float32

    @classmethod
    def of(cls, before: np.ndarray, after: np.ndarray, times: np.ndarray) -> tuple["Pairs", float]:
        """The pairs that tell languages apart, of (num_pairs,) code points, and the nats of the others and of capitals: the same in all languages."""
        shared = characters()
        again = (before == after) & shared.repeats[before]
        nats = _REPEATED * float(times[again].sum()) + float((_CASE[shared.case[before], shared.case[after]] * times).sum())
        return cls(shared.small[before[~again]], shared.small[after[~again]], times[~again]), nats


class Sample(NamedTuple):
    """A text as a language judges it: pairs in or beside words with a letter outside ASCII, and pairs of plain words."""

    telling: Pairs
    plain: Pairs
    fixed: float  # nats that are the same in every language

    @classmethod
    def of(cls, telling: tuple[np.ndarray, ...], plain: tuple[np.ndarray, ...], triples: np.ndarray, times: np.ndarray) -> "Sample":
        """telling, plain: (before, after, times). triples: (3, n) code points, those outside ASCII between their neighbours; times: how often."""
        kinds = characters().kind[triples]
        inside = np.isin(kinds[1], (SYMBOL, QUOTE)) & np.isin(kinds[0], _LETTERS) & np.isin(kinds[2], _LETTERS)
        (first, nats), (second, _) = Pairs.of(*telling), Pairs.of(*plain)
        return cls(first, second, nats - _INSIDE_WORD * float(times[inside].sum()))


class Language:
    """A page of text as a Markov chain: `nats(pairs)` is the logarithm of the probability of a text."""

    def __init__(self, name: str, page: str, families: Sequence[str]):
        self.name, self.families = name, families
        shared = characters()
        text = shared.small[codes("\n" + page)]
        self._row = shared.kind.copy()  # of each character in the table of pairs
        if name in _DAILY:
            self._inside: np.ndarray | None = _ideographs(name, text)
            num_rows = NUM_KINDS
        else:
            self._inside = None
            latin = bool((shared.kind[text] == LATIN).mean() > 0.3)
            own = np.unique(text[np.isin(shared.kind[text], (OTHER_LETTER, LATIN) if latin else (OTHER_LETTER,))])
            own = np.union1d(own, np.arange(ord("a"), ord("z") + 1)) if latin else own
            self._row[_script_of(own)] = SAME_SCRIPT
            self._row[own] = NUM_KINDS + np.arange(len(own))
            num_rows = NUM_KINDS + len(own)
        rows = self._row[text]
        seen = np.zeros((num_rows, num_rows))
        np.add.at(seen, (rows[:-1], rows[1:]), 1.0)
        self._table = _chances(seen, one_of_kind=self._inside is None)

    def nats(self, pairs: Pairs) -> float:
        """The logarithm of the probability of a text, but for what it costs in every language."""
        each = self._table[self._row[pairs.before], self._row[pairs.after]]
        if self._inside is not None:
            each = each + self._inside[pairs.after]
        return float((each * pairs.times).sum())


def _chances(seen: np.ndarray, one_of_kind: bool) -> np.ndarray:
    """(rows, rows) float32: log P(row | row before) from pairs seen; with one_of_kind, log P(character | row before), all of a kind alike."""
    share = np.full(len(seen), 1.0)
    share[:NUM_KINDS] = _SHARE
    share += seen.sum(axis=0)
    share /= share.sum()
    for kind in _KEEPS_TO_ITSELF:
        seen[kind, kind] += _SELF
    table = np.log((seen + _SMOOTHING * share) / (seen.sum(axis=1, keepdims=True) + _SMOOTHING))
    if one_of_kind:
        table[:, :NUM_KINDS] -= np.log(_WIDTH)
    return table.astype(np.float32)


def _script_of(letters: np.ndarray) -> np.ndarray:
    """All letters of the scripts that these letters belong to, as far as charsets of one byte have them."""

    def script(code: int) -> str:
        return unicodedata.name(chr(code), "").partition(" ")[0]

    scripts = {script(int(code)) for code in letters}
    letter = characters().kind == OTHER_LETTER
    return np.array([code for code in range(0x80, 0x0700) if letter[code] and script(code) in scripts], dtype=np.int64)


# -- ideographs and syllables ---------------------------------------------------------------------------------------------------------

# The charset whose rows of lead bytes hold the characters in daily use, those rows, and how much of a text is written in the characters of our page.
_DAILY = {
    "ja": ("euc_jp", range(0xB0, 0xD0), 0.45),
    "zh": ("gb2312", range(0xB0, 0xD8), 0.6),
    "zht": ("big5", range(0xA4, 0xC7), 0.6),
    "ko": ("euc_kr", range(0xB0, 0xC9), 0.8),
}
_SELDOM = 0.01  # how much is written in characters that are not in daily use


def _ideographs(name: str, text: np.ndarray) -> np.ndarray:
    """(65536,) float32: log P(character | its kind)."""
    kind = characters().kind
    inside = -np.log(_WIDTH).astype(np.float32)[np.minimum(kind, NUM_KINDS - 1)]
    charset, leads, often = _DAILY[name]
    daily = codes("".join(bytes([lead, trail]).decode(charset, "ignore") for lead in leads for trail in range(0x40, 0xFF)))
    for each in IDEOGRAPHIC:
        found, counts = np.unique(text[kind[text] == each], return_counts=True)
        others = np.setdiff1d(daily[kind[daily] == each], found)
        chance = np.full(65536, _SELDOM / _WIDTH[each])
        if len(others):
            chance[others] += (1 - often - _SELDOM) / len(others)
        if len(found):
            chance[found] += often * counts / counts.sum()
        inside[kind == each] = np.log(chance[kind == each])
    return inside


# -- all of them ------------------------------------------------------------------------------------------------------------------------


class AnyScript(Language):
    """Text in a script of which there is no page: letters of one block of Unicode keep together. For Unicode charsets alone."""

    def __init__(self) -> None:
        self.name, self.families = "any", ()
        self._row = characters().kind.copy()
        self._inside = None
        blocks = range(0x0500, 0x2000, 0x80)
        for row, first in enumerate(blocks, start=NUM_KINDS):
            block = np.arange(first, first + 0x80)
            self._row[block[self._row[block] == OTHER_LETTER]] = row
        num_rows = NUM_KINDS + len(blocks)
        seen = np.zeros((num_rows, num_rows))
        own = np.arange(NUM_KINDS, num_rows)
        seen[own, own] = 6 * _SELF
        seen[own, SPACE] = seen[SPACE, own] = _SELF
        self._table = _chances(seen, one_of_kind=True)
        self._table[:, own] -= np.log(0x40)


@functools.cache
def languages() -> tuple[Language, ...]:
    """All languages of languages.txt, in its order. Its pages begin with "== name family...", of the charset families of guess.py."""
    pages = resources.files(__package__).joinpath("languages.txt").read_text("utf-8").split("== ")[1:]
    made = []
    for page in pages:
        title, _, text = page.partition("\n")
        name, *families = title.split()
        made.append(Language(name, text + _as_written_once(name, text), families))
    return tuple(made)


def _as_written_once(name: str, text: str) -> str:
    """The page again in the letters that older charsets have in place of some of Unicode's; empty where they have the same."""
    if name == "ro":
        return text.translate(_CEDILLAS)
    if name == "fa":
        return text.translate(_ARABIC_LETTERS)
    if name == "vi":
        return "".join(_tone_apart(character) for character in text)
    return ""


def _tone_apart(character: str) -> str:
    """A Vietnamese vowel as Windows-1258 writes it: the tone is a character of its own."""
    parts = unicodedata.normalize("NFD", character)
    base = unicodedata.normalize("NFC", "".join(part for part in parts if part not in _TONES))
    return base + "".join(part for part in parts if part in _TONES)
