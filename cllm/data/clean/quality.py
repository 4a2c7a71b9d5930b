"""How much a text is like the user's own examples: logistic regression on hashed single words and pairs of words.

The classifier of GPT-3's data (Brown et al. 2020, arXiv 2005.14165, appendix A) and of many filters since, small enough to train in seconds. The same
texts in the same order give the same weights, bit for bit: one thread, a fixed order, and only operations whose rounding IEEE 754 defines.

Some of the other texts are as good as the examples: that is why they are looked for. So each is looked at about once, by small steps, examples and
others in turns, however many there are of each: after more, the score knows the others by heart. It must not judge a text that it has learnt from,
for which there are two, each of one half of the texts (`half_of`).
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cllm.data.clean.compiling import jit
from cllm.data.clean.words import Words, ngrams, split
from cllm.runtime.errors import DataError

BUCKETS = 1 << 18
_RATE = 0.3  # of the first step; features of a text have the length 1
_FEWEST_STEPS = 100  # on each side
_SHRINK = 1e-5  # of all weights that a step touches
_FEWEST, _FEWEST_OTHERS = 10, 3  # examples, and texts beside them; fewer say more about themselves than about what is wanted


class Quality(NamedTuple):
    """A trained score: 1 MB."""

    weights: np.ndarray
    """(BUCKETS + 1,) float32; the last one is added for every text."""

    def score(self, words: Words) -> float:
        """From 0 (like the others) to 1 (like the examples)."""
        places, values = _features(words.hashes, ngrams(words.hashes, 2))
        return round(float(_sigmoid(_margin(self.weights, places, values))), 4)


def half_of(number: str) -> int:
    """0 or 1, drawn by the id of a document."""
    return hashlib.blake2b(number.encode(), digest_size=1, person=b"half").digest()[0] & 1


def train(examples: Sequence[str], others: Sequence[str]) -> Quality:
    """A score for texts that are like `examples` rather than like `others` (a sample of what is to be filtered). Both sides weigh the same.

    Raises DataError where there are fewer than ten examples, or three others, with words in them.
    """
    sides = [[each for each in map(_features_of, texts) if len(each[0])] for texts in (others, examples)]
    for what, side, fewest in zip(("documents to compare them with", "examples of good text"), sides, (_FEWEST_OTHERS, _FEWEST)):
        if len(side) < fewest:
            raise DataError(f"a score of quality needs at least {fewest} {what}, and there are {len(side)}. Give more of them.")
    places = [place for side in sides for place, _ in side]
    values = [value for side in sides for _, value in side]
    ends = np.cumsum([0, *map(len, places)])
    num_others, num_examples = map(len, sides)
    steps = max(num_others, num_examples, _FEWEST_STEPS)
    draw = np.random.default_rng(0)
    order = np.stack([_drawn(draw, num_others, steps), num_others + _drawn(draw, num_examples, steps)], axis=1).ravel()
    weights = np.zeros(BUCKETS + 1)
    _fit(weights, np.concatenate(places), np.concatenate(values), ends, num_others, order)
    return Quality(weights.astype(np.float32))


def _drawn(draw: np.random.Generator, count: int, steps: int) -> np.ndarray:
    """(steps,) numbers below `count`, each as often as the others."""
    return np.concatenate([draw.permutation(count) for _ in range(-(-steps // count))])[:steps]


def loaded(weights: np.ndarray) -> Quality:
    """A score whose weights were kept. Raises DataError for an array of another shape."""
    if weights.shape != (BUCKETS + 1,) or weights.dtype != np.float32:
        raise DataError(
            f"the weights of a score of quality are {BUCKETS + 1} numbers of 32 bits, and these are {weights.dtype} of shape {weights.shape}."
        )
    return Quality(weights)


def _features_of(text: str) -> tuple[np.ndarray, np.ndarray]:
    words = split(text)
    return _features(words.hashes, ngrams(words.hashes, 2))


def _features(singles: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Buckets (F,) int64 and values (F,) float64 of a text; the squares of the values have the sum 1."""
    places, numbers = np.unique(np.concatenate([singles, pairs]) & np.uint64(BUCKETS - 1), return_counts=True)
    values = np.sqrt(numbers.astype(np.float64))
    return places.astype(np.int64), values / max(np.sqrt(numbers.sum()), 1.0)


@jit
def _sigmoid(x):
    """1 / (1 + e^-x), with e^x as (1 + x / 1024)^1024: the same bits on every machine, which a library's exponential does not give."""
    base = 1.0 + min(abs(x), 30.0) / 1024
    for _ in range(10):
        base *= base
    return base / (1.0 + base) if x >= 0 else 1.0 / (1.0 + base)


@jit
def _margin(weights, places, values):
    margin = float(weights[-1])
    for i in range(len(places)):
        margin += weights[places[i]] * values[i]
    return margin


@jit
def _fit(weights, places, values, ends, num_others, order):
    for step in range(len(order)):
        text = order[step]
        first, last = ends[text], ends[text + 1]
        error = (1.0 if text >= num_others else 0.0) - _sigmoid(_margin(weights, places[first:last], values[first:last]))
        rate = _RATE * (1.0 - step / len(order))
        for i in range(first, last):
            weights[places[i]] += rate * (error * values[i] - _SHRINK * weights[places[i]])
        weights[-1] += 0.1 * rate * error
