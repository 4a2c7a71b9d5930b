"""The likeliest charset of text that does not say what it is written in, and of many files together.

Every pair of a charset and a language is a candidate. A sample is decoded as each, and the language model says how probable the text is that comes
out; what is no text (symbols inside words, undefined bytes) is improbable in every language. Charsets in wide use start with an advantage.

Files of one folder mostly share charset and language, so that a note of ten words follows its neighbours: `pool` estimates for each folder how common
each candidate is (the weights of a mixture, by two rounds of expectation maximization), and every file in it starts with that.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cllm.data.documents.languages import AnyScript, Language, Sample, codes, languages

# Nats that a charset starts with, by family. Windows wrote most of what is left of old text; then Unix, DOS and the Macintosh.
FAMILIES: dict[str, dict[str, float]] = {
    "western": {"cp1252": 0.0, "iso8859_15": -3.0, "cp850": -3.5, "cp437": -4.0, "mac_roman": -4.0},
    "nordic": {"cp865": -5.0, "iso8859_10": -6.0},
    "icelandic": {"cp861": -4.5, "mac_iceland": -5.0, "iso8859_10": -5.5},
    "portuguese": {"cp860": -5.0},
    "canadian": {"cp863": -5.0},
    "celtic": {"iso8859_14": -4.5},
    "southern": {"iso8859_3": -4.0},
    "central": {"cp1250": -0.5, "iso8859_2": -1.0, "cp852": -3.0, "mac_latin2": -4.5},
    "croatian": {"mac_croatian": -5.0},
    "romanian": {"iso8859_16": -3.0, "mac_romanian": -5.0},
    "baltic": {"cp1257": -0.5, "iso8859_13": -2.0, "iso8859_4": -3.0, "cp775": -3.5},
    "turkish": {"cp1254": -0.5, "cp857": -3.0, "mac_turkish": -4.5},
    "vietnamese": {"cp1258": -1.0},
    "cyrillic": {"cp1251": -0.5, "koi8_r": -1.0, "cp866": -2.0, "iso8859_5": -2.0, "mac_cyrillic": -4.0, "cp855": -4.5},
    "ukrainian": {"koi8_u": -1.1, "cp1125": -2.5},
    "greek": {"cp1253": -0.5, "iso8859_7": -1.0, "cp737": -2.5, "mac_greek": -4.5, "cp869": -4.5},
    "hebrew": {"cp1255": -0.5, "iso8859_8": -1.5, "cp862": -3.0},
    "arabic": {"cp1256": -0.5, "iso8859_6": -1.5, "cp720": -4.0},
    "thai": {"cp874": -0.5},
    "japanese": {"cp932": -0.5, "euc_jp": -1.0},
    "simplified": {"gb18030": -0.5},
    "traditional": {"big5": -0.5, "cp950": -1.0, "big5hkscs": -2.0},
    "korean": {"cp949": -0.5, "johab": -4.5},
}
WIDE = {"utf-16-le": -3.0, "utf-16-be": -4.0, "utf-32-le": -3.0, "utf-32-be": -4.0}
_UNICODE = {"utf-8": 0.0} | WIDE
DOUBLE_BYTE = {codec: family for family in ("japanese", "simplified", "traditional", "korean") for codec in FAMILIES[family]}
_ENDS_LINES_WITH_CR = 4.0  # nats that a charset of the old Macintosh gains where no line ends otherwise

# Words in ASCII tell the language, and only through it the charset. They count for less than others, and together for no more than a limit: text may
# hold much that is in no language, such as names, code and base64.
_PLAIN_WORD = 0.4
_PLAIN_LIMIT = 25.0  # nats
_MULTIBYTE_UTF8 = re.compile(rb"[\xc2-\xf4][\x80-\xbf]")
_TEXT_LIMIT, _SHORT_TEXT = 6.0, 6.0  # nats a byte, and in addition of a text of any length
_KEEP = 40.0  # nats below the best at which a candidate is forgotten
_PRIOR_FILES = 2.0  # files that what is common elsewhere counts as, against the files of a folder
_TRUST = 0.8  # letters of one text are not independent of each other, so that their pairs prove less than their sum says
_FILES_ASKED = 4096  # of a folder, at even distances in the order of their names, for how common each candidate is in it
_ROUNDS = 2  # of estimating how common each is; more would multiply a small advantage that all files share (a habit of the language) without bound


class Evidence(NamedTuple):
    """What a sample says about its charset: (codec, language) -> nats, the logarithm of the probability of the sample. Starts are not in it."""

    nats: dict[tuple[str, str], float]
    size: int  # bytes in the sample

    @property
    def best(self) -> float:
        """Nats of the likeliest candidate."""
        return max(self.nats.values())

    def is_text(self) -> bool:
        """Whether the likeliest candidate makes text of it: that costs 1 to 5 nats a byte, random bytes more than 7."""
        return -self.best < _TEXT_LIMIT * self.size + _SHORT_TEXT

    def certain(self) -> str | None:
        """The charset of two bytes a character to which there is no likely alternative, if there is one."""
        families = {DOUBLE_BYTE.get(codec) for codec, _ in self.nats}
        return self.alone() if len(families) == 1 and None not in families else None

    def alone(self) -> str:
        """The charset when there is no other file to ask."""
        return pool({"": self})[""]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"size": self.size, "nats": {" ".join(key): value for key, value in self.nats.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evidence":
        pairs = ((key.split(" "), float(value)) for key, value in values["nats"].items())
        return cls({(codec, language): value for (codec, language), value in pairs}, int(values["size"]))


@functools.cache
def _starts() -> dict[tuple[str, str], float]:
    starts: dict[tuple[str, str], float] = {}
    for language in languages():
        for family in language.families:
            for codec, start in FAMILIES[family].items():
                starts[codec, language.name] = max(start, starts.get((codec, language.name), -99.0))
        starts.update({(codec, language.name): start for codec, start in _UNICODE.items()})
    return starts | {(codec, "any"): start - 2.0 for codec, start in _UNICODE.items()}


@functools.cache
def _table(codec: str) -> np.ndarray:
    """(256,) uint16: the code point of each byte, U+FFFD where it has none."""
    return codes("".join(bytes([byte]).decode(codec, "replace")[0] for byte in range(256)))


def weigh(sample: bytes, codecs: Iterable[str] | None = None, plain_word: float = _PLAIN_WORD) -> Evidence:
    """The evidence of a sample for all candidates, or for those of some codecs. plain_word: the weight of words in ASCII."""
    if codecs is None:
        codecs = {codec for codec, _ in _starts()} - WIDE.keys() - (set() if _MULTIBYTE_UTF8.search(sample) else {"utf-8"})
    wanted = set(codecs)
    spoken: dict[str, list[Language]] = {}
    for codec, name in _starts():
        if codec in wanted:
            spoken.setdefault(codec, []).append(_language(name))
    telling, plain, triples, times = _byte_pairs(sample)
    macintosh = _ENDS_LINES_WITH_CR if b"\r" in sample and b"\n" not in sample else 0.0
    nats: dict[tuple[str, str], float] = {}
    plain_nats: dict[tuple[str, str], float] = {}
    for codec, candidates in spoken.items():
        if codec in DOUBLE_BYTE or codec in _UNICODE:
            read = _read_text(sample.decode(codec, "replace"))
        else:
            table = _table(codec)
            words, others = ((table[first], table[second], count) for first, second, count in (telling, plain))
            read = Sample.of(words, others, table[triples], times)
        for language in candidates:
            nats[codec, language.name] = language.nats(read.telling) + read.fixed + (macintosh if codec.startswith("mac") else 0.0)
            plain_nats[codec, language.name] = plain_word * language.nats(read.plain)
    likeliest = max(plain_nats.values())
    for key, value in plain_nats.items():
        nats[key] += likeliest - _PLAIN_LIMIT * (1 - math.exp((value - likeliest) / _PLAIN_LIMIT))
    best = max(nats.values())
    return Evidence({key: round(value, 2) for key, value in nats.items() if value > best - _KEEP}, len(sample))


def pool(evidence: Mapping[str, Evidence]) -> dict[str, str]:
    """The codec of each file, by name, from its own evidence and that of the files in its folder and around it.

    The names are paths with "/". The answer does not depend on the order of the files.
    """
    keys = sorted({key for each in evidence.values() for key in each.nats})
    return _Mixture(keys, evidence).choose() if keys else {}


class _Mixture:
    """The weights of a mixture of candidates, for each folder. Arrays are over the candidates, `keys`."""

    def __init__(self, keys: Sequence[tuple[str, str]], evidence: Mapping[str, Evidence]):
        self._evidence = evidence
        self._column = {key: column for column, key in enumerate(keys)}
        self._codecs, self._codec = np.unique([codec for codec, _ in keys], return_inverse=True)
        start = np.exp([_starts()[key] for key in keys])
        self._start = start / start.sum()

    def choose(self) -> dict[str, str]:
        """The codec of each file. Folders come before those in them, which start with what is common around them."""
        chosen: dict[str, str] = {}
        pending = [("", sorted(self._evidence), self._start)]
        while pending:
            folder, names, around = pending.pop()
            inside: dict[str, list[str]] = {}
            for name in names:
                child, slash, _ = name[len(folder) :].partition("/")
                inside.setdefault(folder + child + "/" if slash else "", []).append(name)
            own = inside.pop("", [])
            if own or len(inside) > 1:
                counts = self._counts(names, around)
                for name in own:
                    alone = self._chances([name])[0]
                    share = alone * self._common(counts, around)
                    others = np.maximum(counts - share / share.sum(), 0.0)  # a file is no witness for itself
                    codec = np.bincount(self._codec, weights=alone * self._common(others, around))
                    chosen[name] = str(self._codecs[int(codec.argmax())])
                around = self._common(counts, around)
            pending += [(child, members, around) for child, members in inside.items()]
        return chosen

    def _counts(self, names: Sequence[str], around: np.ndarray) -> np.ndarray:
        """How many of the files are in each candidate, every file in fractions."""
        chances = self._chances(names[:: -(-len(names) // _FILES_ASKED)])
        counts = np.zeros(len(self._column))
        for _ in range(_ROUNDS):
            shares = chances * self._common(counts, around)
            counts = (shares / shares.sum(axis=1, keepdims=True)).sum(axis=0)
        return counts

    def _chances(self, names: Sequence[str]) -> np.ndarray:
        """(len(names), keys): the probability of each sample in each candidate, scaled so that the likeliest has 1."""
        nats = np.full((len(names), len(self._column)), -_KEEP)
        for row, name in enumerate(names):
            found = self._evidence[name].nats
            best = max(found.values())
            for key, value in found.items():
                nats[row, self._column[key]] = value - best
        return np.exp(_TRUST * nats)

    def _common(self, counts: np.ndarray, around: np.ndarray) -> np.ndarray:
        """How common each candidate is, from the files that were counted and from what is common around.

        Half of it counts charset and language together, half the charset alone: French and German books in one folder are witnesses for the
        charset of an Italian one.
        """
        codec_counts, codec_around = np.bincount(self._codec, weights=counts), np.bincount(self._codec, weights=around)
        together = counts + _PRIOR_FILES * around
        alone = (codec_counts + _PRIOR_FILES * codec_around)[self._codec] * around / codec_around[self._codec]
        return (together + alone) / (2 * (counts.sum() + _PRIOR_FILES))


# -- pairs of characters in a sample --------------------------------------------------------------------------------------------------------

Counted = tuple[np.ndarray, np.ndarray, np.ndarray]  # first, second, how often
_OUTSIDE_ASCII = np.array([byte not in b"\t\n\r" and not 32 <= byte < 127 for byte in range(256)])
_IN_WORD = np.array([chr(byte).isalpha() or byte == 0x27 or byte >= 0x80 for byte in range(256)])


def _byte_pairs(sample: bytes) -> tuple[Counted, Counted, np.ndarray, np.ndarray]:
    """Distinct pairs of bytes in telling words and in plain ones, distinct bytes above 127 with their neighbours ((3, n) bytes), how often each."""
    values = np.frombuffer(b"\n" + sample + b"\n", np.uint8).astype(np.int64)
    telling = _telling(values)
    pairs = values[:-1] << 8 | values[1:]
    middle = np.flatnonzero(values >= 0x80)
    triples, times = np.unique(values[middle - 1] << 16 | values[middle] << 8 | values[middle + 1], return_counts=True)
    return _counted(pairs[telling]), _counted(pairs[~telling]), np.stack([triples >> 16, triples >> 8 & 255, triples & 255]), times


def _counted(pairs: np.ndarray) -> Counted:
    times = np.bincount(pairs, minlength=1 << 16)
    found = np.flatnonzero(times)
    return found >> 8, found & 255, times[found].astype(np.float32)


def _read_text(text: str) -> Sample:
    values = codes("\n" + text + "\n")
    telling = _telling(np.minimum(values, 0x80))
    middle = np.flatnonzero(values[1:-1] >= 0x80) + 1
    triples = np.stack([values[middle - 1], values[middle], values[middle + 1]])
    words, plain = ((values[:-1][part], values[1:][part], np.ones(int(part.sum()), np.float32)) for part in (telling, ~telling))
    return Sample.of(words, plain, triples, np.ones(len(middle)))


def _telling(values: np.ndarray) -> np.ndarray:
    """(n - 1,) bool: whether a pair of characters touches a word, or what is between words, that is not all printable ASCII."""
    in_word = _IN_WORD[values]
    begins = np.r_[True, in_word[1:] != in_word[:-1]]
    part = np.cumsum(begins) - 1
    tells = np.logical_or.reduceat(_OUTSIDE_ASCII[values], np.flatnonzero(begins))[part]
    return tells[:-1] | tells[1:]


@functools.cache
def _language(name: str) -> Language:
    return AnyScript() if name == "any" else next(language for language in languages() if language.name == name)
