"""An n-gram model of tokens with interpolated modified Kneser-Ney smoothing: what counting alone makes of the same training tokens.

    ngrams = NGrams.count(tokens, document_starts, vocab_size, order=5)
    bits = ngrams.bits(tokens, document_starts)         # of each token, given the four before it
    shares = ngrams.shares(history)                     # of each token that could follow, (vocab_size,)

Chen and Goodman 1998, "An empirical study of smoothing techniques for language modeling", section 3: three discounts for each order, taken from how
many n-grams occur once to four times, and lower orders that count in how many contexts something occurs instead of how often. The lowest order is
interpolated with the uniform distribution, so that every token has a probability. A document begins with a mark of its own, and no n-gram reaches
across it; n-grams that begin with the mark keep their counts, since nothing stands before them (as in KenLM, Heafield et al. 2013).

An n-gram is known by a number: the number of its context, which is the n-gram one shorter, together with its last token, is looked up in a sorted
table of one int64 for each n-gram. 5 orders take at most 100 bytes for each training token, and twice that while they are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ORDER = 5
MOST_TOKENS = 4_000_000  # of the training text that are counted: about 400 MB
_FALLBACK = (0.5, 1.0, 1.5)  # discounts of an order with too few n-grams to estimate them from, as in KenLM
_NONE = -1


@dataclass(frozen=True)
class Order:
    """The n-grams of one length. keys (n,): context * (vocab_size + 1) + token, ascending; adjusted (n,): their counts, of the highest order how
    often they occur, of the others before how many different tokens, the mark included.

    Of each context: total (c,): the sum of the adjusted counts behind it; left (c,): the share that the discounts leave for the lower order.
    """

    keys: np.ndarray
    adjusted: np.ndarray
    total: np.ndarray
    left: np.ndarray
    discounts: tuple[float, float, float]

    def discount(self, counts: np.ndarray) -> np.ndarray:
        """What is taken off each adjusted count."""
        return np.array([0.0, *self.discounts])[np.minimum(counts, 3)]


class NGrams:
    """An n-gram model. `orders[0]` has the unigrams, whose only context is number 0."""

    def __init__(self, orders: list[Order], vocab_size: int) -> None:
        self.orders, self.vocab_size = orders, vocab_size

    @classmethod
    def count(cls, tokens: np.ndarray, document_starts: np.ndarray, vocab_size: int, order: int = ORDER) -> NGrams:
        """From tokens (n,) below vocab_size, whose documents begin at `document_starts`."""
        marked = _marked(tokens, document_starts, vocab_size)
        base = vocab_size + 1
        grams = marked.astype(np.int64)  # the number of the n-gram that ends at each place; of unigrams the token itself
        tables: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []  # keys, counts, a place of each, numbers of all places
        tables.append((np.arange(base), np.bincount(grams, minlength=base), np.zeros(0, dtype=np.int64), grams))
        for _ in range(1, order):
            context = np.concatenate([[_NONE], grams[:-1]])
            there = np.flatnonzero((context != _NONE) & (marked != vocab_size))
            keys, first, numbers, counts = np.unique(
                context[there] * base + marked[there], return_index=True, return_inverse=True, return_counts=True
            )
            grams = np.full(len(marked), _NONE, dtype=np.int64)
            grams[there] = numbers
            tables.append((keys, counts, there[first], grams))
        orders = []
        for number, (keys, counts, places, grams) in enumerate(tables):
            if number + 1 < order:  # before how many tokens: each longer n-gram is one, found at one of its places
                longer = tables[number + 1][2]
                adjusted = np.bincount(grams[longer], minlength=len(keys))
                if number:  # what begins with the mark has nothing before it
                    begins = marked[places - number] == vocab_size
                    adjusted[begins] = counts[begins]
            else:
                adjusted = counts.copy()
            if not number:
                adjusted[vocab_size] = 0  # the mark is never predicted
            contexts = np.zeros(base, dtype=np.int64) if not number else keys // base
            orders.append(_order(keys, adjusted, contexts, 1 if not number else len(tables[number - 1][0])))
        return cls(orders, vocab_size)

    def bits(self, tokens: np.ndarray, document_starts: np.ndarray) -> np.ndarray:
        """-log2 of the probability of each token given those before it in its document, (n,) float64."""
        marked = _marked(tokens, document_starts, self.vocab_size)
        base = self.vocab_size + 1
        shares = np.full(len(marked), 1.0 / self.vocab_size)
        grams, context = marked.astype(np.int64), np.zeros(len(marked), dtype=np.int64)
        for number, order in enumerate(self.orders):
            if not len(order.keys):
                break  # no document was so long
            if number:
                context = np.concatenate([[_NONE], grams[:-1]])
                grams = _find(order.keys, np.where(context == _NONE, _NONE, context * base + marked))
                grams[marked == self.vocab_size] = _NONE
            known = np.flatnonzero((context != _NONE) & (order.total[context] > 0))
            counts = np.where(grams[known] == _NONE, 0, order.adjusted[grams[known]])
            behind = context[known]
            shares[known] = (counts - order.discount(counts)) / order.total[behind] + order.left[behind] * shares[known]
        return -np.log2(shares[marked != self.vocab_size])

    def shares(self, history: Sequence[int], begins: bool = False) -> np.ndarray:
        """The probability of each token behind `history`, (vocab_size,) float64. begins: whether the history is the beginning of a document."""
        base = self.vocab_size + 1
        seen = [*([self.vocab_size] if begins else []), *history][max(0, len(history) + begins - len(self.orders) + 1) :]
        shares = np.full(self.vocab_size, 1.0 / self.vocab_size)
        for number, order in enumerate(self.orders[: len(seen) + 1]):
            context = 0
            for length, token in enumerate(seen[len(seen) - number :]):
                if length and not len(self.orders[length].keys):
                    return shares
                context = token if not length else int(_find(self.orders[length].keys, np.array([context * base + token]))[0])
                if context == _NONE:
                    return shares  # a longer history was not seen either
            if not len(order.keys) or not order.total[context]:
                continue
            low, high = (0, base) if not number else np.searchsorted(order.keys, [context * base, (context + 1) * base])
            counts = order.adjusted[low:high]
            shares *= order.left[context]
            followers = order.keys[low:high] % base
            wanted = followers < self.vocab_size
            shares[followers[wanted]] += ((counts - order.discount(counts)) / order.total[context])[wanted]
        return shares


def _order(keys: np.ndarray, adjusted: np.ndarray, contexts: np.ndarray, num_contexts: int) -> Order:
    discounts = _discounts(adjusted)
    taken = np.array([0.0, *discounts])[np.minimum(adjusted, 3)]
    total = np.bincount(contexts, weights=adjusted, minlength=num_contexts)
    left = np.bincount(contexts, weights=taken, minlength=num_contexts) / np.maximum(total, 1)
    return Order(keys, adjusted.astype(np.int32), total, left, discounts)


def _discounts(adjusted: np.ndarray) -> tuple[float, float, float]:
    """Of n-grams that count once, twice, and three times or more (Chen and Goodman 1998, equation 17)."""
    n1, n2, n3, n4 = np.bincount(np.minimum(adjusted, 5), minlength=6)[1:5].tolist()
    if not (n1 and n2 and n3):
        return _FALLBACK
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    if not all(0 <= each <= count for count, each in enumerate(found, 1)):
        return _FALLBACK
    return found


def _marked(tokens: np.ndarray, document_starts: np.ndarray, vocab_size: int) -> np.ndarray:
    """The tokens with the mark, vocab_size, before each document."""
    return np.insert(tokens.astype(np.int64), document_starts.astype(np.int64), vocab_size)


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The place of each in ascending keys, -1 where it is not there."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, places, _NONE)
