"""What a model of prose is worth: whether it knows what belongs together, and whether what it writes varies or only repeats.

pairs = next_pairs(documents, tokenizer, count=100)
prefers(pairs, model_bits(model))                        # how often it finds the true next paragraph likelier than one from elsewhere
prompts = starts(documents, count=100)
variety(texts)                                           # distinct-n and repetition
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cllm.data.documents.scan import file_of
from cllm.data.tokens.batch import spread
from cllm.evaluate.held_out import Document
from cllm.evaluate.shares import Share
from cllm.evaluate.surprise import surprise_of

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.evaluate.ngram import NGrams
    from cllm.model.model import Model

PROMPT_TOKENS, SAMPLE_TOKENS = 32, 128
LEAST_WORDS = 12  # of a paragraph that is asked about
PARAGRAPH_TOKENS = 96  # of a paragraph that are read, at most
_GRAM = 4  # words: what counts as a repetition (Welleck et al. 2020)

Bits = Callable[[np.ndarray], np.ndarray]  # tokens (n,) -> the surprise of each in bits, (n,)


# -- what belongs together -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A paragraph, and two of which one is asked for: `true` from the right place, `other` from elsewhere; texts and tokens."""

    before: str
    true: str
    other: str
    before_tokens: np.ndarray
    true_tokens: np.ndarray
    other_tokens: np.ndarray


def source_of(name: str) -> str:
    """The top folder of a document, or its file where it lies in none."""
    top, slash, _ = name.partition("/")
    return top if slash else file_of(name)


def paragraphs(text: str) -> list[str]:
    """The paragraphs of at least LEAST_WORDS words, which blank lines separate; shorter ones are passed over."""
    return [each for part in re.split(r"\n[ \t]*\n", text) if len((each := part.strip()).split()) >= LEAST_WORDS]


def next_pairs(documents: Sequence[Document], tokenizer: Tokenizer, count: int) -> list[Pair]:
    """At most `count` paragraphs at even distances, each with the one that follows it and one from another document; where there is a single
    document, from the half of it that is further away."""
    places = [(number, place) for number, document in enumerate(documents) for place in range(len(paragraphs(document.text)) - 1)]
    every = [paragraphs(document.text) for document in documents]
    found = []
    for turn, (number, place) in enumerate(spread(places, count)):
        elsewhere = [each for each in range(len(every)) if each != number and every[each]]
        if elsewhere:
            other = every[elsewhere[turn % len(elsewhere)]]
            chosen = other[turn * 7919 % len(other)]
        else:
            chosen = every[number][(place + 1 + len(every[number]) // 2) % len(every[number])]
        if chosen not in (every[number][place], every[number][place + 1]):
            found.append(_pair(every[number][place], every[number][place + 1], chosen, tokenizer))
    return found


def source_pairs(documents: Sequence[Document], tokenizer: Tokenizer, count: int) -> list[Pair]:
    """The same over sources (top folders, or files that lie in none): the right one is a paragraph from elsewhere in the same source, at least two
    further on, and the other is from another source. None where all documents are of one source."""
    every: dict[str, list[str]] = {}
    for document in documents:
        every.setdefault(source_of(document.name), []).extend(paragraphs(document.text))
    every = {name: texts for name, texts in every.items() if len(texts) > 2}
    places = [(name, place) for name, texts in every.items() for place in range(len(texts) - 2)]
    found = []
    for turn, (name, place) in enumerate(spread(places, count) if len(every) > 1 else []):
        others = [each for each in every if each != name]
        other = every[others[turn % len(others)]]
        true = every[name][place + 2 + turn * 7919 % (len(every[name]) - place - 2)]
        found.append(_pair(every[name][place], true, other[turn * 104729 % len(other)], tokenizer))
    return found


def _pair(before: str, true: str, other: str, tokenizer: Tokenizer) -> Pair:
    first, one, two = (np.array(tokenizer.encode(text), dtype=np.int64) for text in (before + "\n\n", true, other))
    return Pair(before, true, other, first[-PARAGRAPH_TOKENS:], one[:PARAGRAPH_TOKENS], two[:PARAGRAPH_TOKENS])


def prefers(pairs: Sequence[Pair], bits: Bits, progress: Callable[[int], None] | None = None) -> Share:
    """How often the paragraph before helps to foretell the true one more than the other.

    Some paragraphs are easy to foretell wherever they stand. So what counts is how many bits fewer a token of a paragraph has behind the one before
    than it has alone, and that on average over its tokens without the first. Of draws every other one counts.
    """
    helps = []
    for done, pair in enumerate(pairs, 1):
        helps.append((_help(pair.before_tokens, pair.true_tokens, bits), _help(pair.before_tokens, pair.other_tokens, bits)))
        if progress is not None:
            progress(done)
    return _wins(helps)


def _wins(scores: Sequence[tuple[float, float]]) -> Share:
    """How often the first of two is larger. A draw says nothing and is no defeat: who only ever draws gets the half that chance gets."""
    draws = sum(one == two for one, two in scores)
    return Share(sum(one > two for one, two in scores) + draws // 2, len(scores))


def _help(before: np.ndarray, tokens: np.ndarray, bits: Bits) -> float:
    alone, behind = bits(tokens)[1:], bits(np.concatenate([before, tokens]))[len(before) + 1 :]
    return float((alone - behind).mean()) if len(alone) else 0.0


def prefers_by_words(pairs: Sequence[Pair]) -> Share:
    """The same by counting: the paragraph wins of whose different words a larger share stands in the one before. Of draws every other one counts."""
    shares = []
    for pair in pairs:
        before = _words(pair.before)
        one, two = (len(before & words) / max(1, len(words)) for words in map(_words, (pair.true, pair.other)))
        shares.append((one, two))
    return _wins(shares)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def model_bits(model: Model) -> Bits:
    return lambda tokens: surprise_of(model, tokens).bits


def ngram_bits(ngrams: NGrams) -> Bits:
    return lambda tokens: ngrams.bits(tokens, np.array([0]))


# -- what is written -------------------------------------------------------------------------------------------------------


def starts(documents: Iterable[Document], count: int) -> list[tuple[list[int], list[int]]]:
    """(PROMPT_TOKENS of a document, the SAMPLE_TOKENS that really follow), at most `count`, at even distances over all documents."""
    size = PROMPT_TOKENS + SAMPLE_TOKENS
    pieces = [(document, first) for document in documents for first in range(0, len(document.tokens) - size + 1, size)]
    chosen = [document.tokens[first : first + size].tolist() for document, first in spread(pieces, count)]
    return [(tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS:]) for tokens in chosen]


@dataclass(frozen=True)
class Variety:
    """distinct: of n = 1, 2, 3 the share of different n-grams of words among those of all texts together (Li et al. 2016). repetition: the share of
    the 4-grams of words of a text that stood in that text before, the mean over all texts (Welleck et al. 2020)."""

    distinct: tuple[float, float, float]
    repetition: float
    num_words: int

    def to_dict(self) -> dict[str, Any]:
        return {f"distinct_{n}": value for n, value in enumerate(self.distinct, 1)} | {"repetition": self.repetition, "words": self.num_words}


def variety(texts: Sequence[str]) -> Variety:
    """Longer texts have fewer distinct n-grams: compare only texts of about as many words."""
    split = [re.findall(r"\w+|[^\w\s]", text) for text in texts]
    shares = []
    for n in (1, 2, 3):
        grams = [tuple(words[first : first + n]) for words in split for first in range(len(words) - n + 1)]
        shares.append(len(set(grams)) / max(1, len(grams)))
    repeated = []
    for words in split:
        grams = [tuple(words[first : first + _GRAM]) for first in range(len(words) - _GRAM + 1)]
        repeated.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return Variety((shares[0], shares[1], shares[2]), sum(repeated) / max(1, len(repeated)), sum(map(len, split)))
