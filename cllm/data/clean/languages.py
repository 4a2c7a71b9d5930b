"""Which language a text is written in, by py3langid (Lui and Baldwin 2012, "langid.py"); never asked about code, which looks like Pidgin to it.

Its model is walked by compiled code: in Python the walk alone takes twice the time of all other rules on a text together.
"""

import functools
import math
from typing import Any

import numpy as np

from cllm.data.clean.compiling import jit
from cllm.runtime.errors import DataError

UNKNOWN = "unknown"
MIN_LETTERS = 200
_FIRST_IDEOGRAPH = "\u2e80"
_PIECE = 500  # characters of a long text that are looked at, at its beginning, in its middle and at its end
_MOST_VISITS = 4 * 3 * (_PIECE + 1)  # bytes of what is looked at


def language_of(text: str, letters: int | None = None) -> tuple[str, float]:
    """A language's code of two letters and how probable it is; ("unknown", 0.0) for a text of fewer than 200 letters (an ideograph is two).

    `letters`: how many the text has, where that was counted already. Raises DataError where py3langid is not installed.
    """
    if letters is None:
        letters = sum(2 if letter >= _FIRST_IDEOGRAPH else 1 for letter in filter(str.isalpha, text[: 3 * _PIECE]))
    if letters < MIN_LETTERS:
        return UNKNOWN, 0.0
    if len(text) > 3 * _PIECE:
        middle = (len(text) - _PIECE) // 2
        text = "\n".join((text[:_PIECE], text[middle : middle + _PIECE], text[-_PIECE:]))
    if text.isupper():
        text = text.lower()
    model = _model()
    data = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
    found = np.sort(_visited(data, model.moves, model.rows, model.outputs))
    if not len(found):
        return UNKNOWN, 0.0
    scores = _scores(found, model.weights, model.priors, model.logs)
    likely = np.exp((scores - scores.max()) / math.sqrt(len(data)))
    likely /= likely.sum()
    for first, other in model.aliases:
        likely[first] += likely[other]
        likely[other] = 0
    best = int(likely.argmax())
    return model.languages[best], round(float(likely[best]), 3)


@jit
def _scores(found, weights, priors, logs):
    """(C,) float32: for each language what speaks for it. `found`: features in ascending order, each as often as it occurs."""
    scores = priors.copy()
    first = 0
    for i in range(1, len(found) + 1):
        if i == len(found) or found[i] != found[first]:
            times, row = logs[i - first], weights[found[first]]
            for language in range(len(scores)):
                scores[language] += times * row[language]
            first = i
    return scores


class _Model:
    """An automaton over bytes that knows the sequences which tell languages apart, and how much each speaks for each language."""

    def __init__(self, found: Any) -> None:
        self.moves = np.frombuffer(found.tk_nextmove, np.uint32)
        self.rows = np.frombuffer(found.tk_row, np.uint16)
        self.outputs = np.asarray(found.tk_output, np.int32)
        self.weights = np.asarray(found.nb_ptc, np.float32)
        self.priors = np.asarray(found.nb_pc, np.float32)
        self.logs = np.log1p(np.arange(_MOST_VISITS + 1, dtype=np.float32))
        self.languages = list(found.nb_classes)
        self.aliases = found._alias_pairs  # a language that stands in the model under two names


@functools.cache
def _model() -> _Model:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise DataError("telling languages apart needs py3langid, which is not installed. Install it with: pip install 'cllm[data]'") from None
    return _Model(LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True))


@jit
def _visited(data, moves, rows, outputs):
    """(V,) int32: the feature that ends at a byte, for each byte at which one does."""
    found = np.empty(len(data), np.int32)
    count = 0
    state = np.int64(0)
    for byte in data:
        state = np.int64(moves[np.int64(rows[state]) * 256 + byte])
        if outputs[state] >= 0:
            found[count] = outputs[state]
            count += 1
    return found[:count]
