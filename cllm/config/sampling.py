"""How the next token is chosen: the settings of `cllm generate` and `cllm chat`, of `cllm.generate`, and of whoever asks for text."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cllm.config.setting import setting, settings_of, shortened
from cllm.runtime.errors import UserError

MOST_BIAS = 100.0


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits of a step. Raises UserError for a value outside its limits.

    They apply in this order, which is Hugging Face's: logit_bias, repetition_penalty, frequency_penalty and presence_penalty, which change the
    logits; temperature; top_k, top_p, min_p and typical_p, each of which keeps some of the tokens that are left; then one draw.

    Which tokens count: the repetition penalty looks at the prompt and at all that was generated (Hugging Face, vLLM); presence and frequency at
    what was generated alone, and not at the prompt (OpenAI, vLLM). An end token counts as well where the text goes on behind it.
    """

    temperature: float = setting(0.8, "Divides the logits; 0 always takes the likeliest token.", at_least=0.0, example=0.8)
    top_k: int | None = setting(None, "Choose among the k likeliest tokens. Default: all.", unit="tokens", at_least=1, example=40)
    top_p: float | None = setting(
        None, "Choose among the likeliest tokens that together reach this probability. Default: all.", above=0.0, at_most=1.0, example=0.95
    )
    min_p: float | None = setting(
        None, "Drop tokens below this share of the likeliest one's probability. Default: none.", at_least=0.0, at_most=1.0, example=0.05
    )
    typical_p: float | None = setting(
        None,
        "Choose among the tokens that are about as surprising as the next token is expected to be and together reach this probability. Default: all.",
        above=0.0,
        at_most=1.0,
        example=0.9,
    )
    repetition_penalty: float = setting(1.0, "Above 1 makes tokens that occurred less likely; 1 changes nothing.", above=0.0, example=1.1)
    presence_penalty: float = setting(
        0.0, "Taken off the logit of each token that was generated, however often; 0 changes nothing.", at_least=-2.0, at_most=2.0, example=0.5
    )
    frequency_penalty: float = setting(
        0.0, "Taken off the logit of each token as often as it was generated; 0 changes nothing.", at_least=-2.0, at_most=2.0, example=0.5
    )
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these token ids, -100 to 100: from about -100 a token is never chosen, from about 100 always (OpenAI). Keys may be
    texts of whole numbers, because JSON has no others."""

    def __post_init__(self) -> None:
        for name, each in SAMPLING.items():
            object.__setattr__(self, name, each.checked(getattr(self, name)))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))


SAMPLING = settings_of(Sampling)


def _checked_bias(given: Any) -> dict[int, float]:
    """The mapping by token id, in their order. Raises UserError for a key that is no token id and for a number outside its limits."""
    if not isinstance(given, Mapping):
        raise UserError(f"logit_bias must map token ids to numbers, got {shortened(given)}. Use a value like {{50256: -100}}.")
    found: dict[int, float] = {}
    for key, value in given.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 19 else key
        if isinstance(token, bool) or not isinstance(token, numbers.Integral) or token < 0:
            raise UserError(f"logit_bias must have token ids as its keys, whole numbers from 0, got {shortened(key)}.")
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or abs(float(value)) > MOST_BIAS:
            raise UserError(f"logit_bias of token {token} must be a number from -100 to 100, got {shortened(value)}.")
        found[int(token)] = float(value)
    return dict(sorted(found.items()))


STRETCHES = ("yarn", "dynamic")
"""Ways to a longer context than a model was trained with (`cllm.model.stretch`)."""
