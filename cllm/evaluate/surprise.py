"""How surprising each token of a text is to a model, in bits, with context for every token however long the text is.

    surprise = surprise_of(model, tokens)
    surprise.bits[i]        # -log2 of the probability that the model gave to token i
    surprise.expected[i]    # the mean of that over all tokens that could have stood there: the entropy of the prediction

A text that is longer than the context is read in windows that overlap by half, and each token counts where it has more before it: every token outside
of the first window is predicted from at least half a context. The first token has nothing before it and is not scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from cllm.model.model import Model

LONGEST_WINDOW = 1024  # tokens: longer ones cost memory for logits and add little to the prediction of a line
_LOGITS = 1 << 25  # that are held at a time, at most (128 MB)


@dataclass(frozen=True)
class Surprise:
    """Of each token of a text, in bits: both (num_tokens,) float64, and 0 for the first, which nothing predicts."""

    bits: np.ndarray
    expected: np.ndarray


class Window(NamedTuple):
    """The model reads tokens `start` to `end` and is asked for tokens `first` to `end`."""

    start: int
    first: int
    end: int


def windows(num_tokens: int, context: int) -> Iterator[Window]:
    """Windows of at most `context` inputs in which every token but the first is asked for exactly once."""
    stride = max(1, context // 2)
    start, first = 0, 1
    while first < num_tokens:
        end = min(num_tokens, start + context + 1)
        yield Window(start, first, end)
        start, first = start + stride, end


def window_of(model: Model) -> int:
    """Tokens that a window of this model reads."""
    return min(model.config.max_seq_len, LONGEST_WINDOW)


@torch.no_grad()
def surprise_of(model: Model, tokens: np.ndarray, progress: Callable[[int], None] | None = None) -> Surprise:
    """tokens (n,) int64 -> the surprise of each. `progress(count)` is called with the number of tokens that were scored since the last call.

    The same for any number of threads, and whatever else is scored in the same process.
    """
    bits, expected = np.zeros(len(tokens)), np.zeros(len(tokens))
    device, context = model.embedding_weight.device, window_of(model)
    rows = max(1, _LOGITS // (context * model.config.vocab_size))
    every = list(windows(len(tokens), context))
    for low in range(0, len(every), rows):
        here = every[low : low + rows]
        inputs = np.zeros((len(here), max(each.end - 1 - each.start for each in here)), dtype=np.int64)
        for row, each in enumerate(here):
            inputs[row, : each.end - 1 - each.start] = tokens[each.start : each.end - 1]
        logits = model(torch.from_numpy(inputs).to(device))
        for row, each in enumerate(here):
            wanted = logits[row, each.first - 1 - each.start : each.end - 1 - each.start].float()
            nats = torch.log_softmax(wanted, dim=1).cpu().numpy()
            bits[each.first : each.end] = -nats[np.arange(len(nats)), tokens[each.first : each.end]].astype(np.float64) / math.log(2)
            expected[each.first : each.end] = -(np.exp(nats) * nats).sum(axis=1, dtype=np.float64) / math.log(2)
        if progress is not None:
            progress(sum(each.end - each.first for each in here))
    return Surprise(bits, expected)
