"""What a model of a size will come to after so many tokens of a text: the scaling law that `cllm train --hours` chooses by.

Its constants were fitted to short runs of `cllm.config.recipe` by profiling/scaling_law.py, which also measured how far it is off on a text that the
fit did not see. Runs, fit and errors are in profiling/results/scaling-law.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

COVERS = 0.8  # the share of runs that an interval is to hold
# Student's t for that share, by degrees of freedom from 1 on; 1.28 for many.
_T = (3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372)


@dataclass(frozen=True)
class ScalingLaw:
    """bits per byte = text^text_power (floor + size_factor / N^size_power + data_factor / D^data_power)

    N: parameters, of the blocks alone where `of_blocks`. D: tokens, counted as `effective` does. text: bits per byte of n-grams of `text_order`
    (`cllm.evaluate.baselines.ngram_bits_per_byte`). The form is that of Hoffmann et al. 2022, arXiv 2203.15556.
    """

    of_blocks: bool
    text_order: int
    text_power: float
    floor: float
    size_factor: float
    size_power: float
    data_factor: float
    data_power: float
    repeats: float

    def bits_per_byte(self, parameters: float, tokens: float, unique: float, text: float) -> float:
        """Of a model with `parameters` (of the blocks where `of_blocks`) after `tokens` tokens of a text that has `unique` ones."""
        of_size = self.size_factor / parameters**self.size_power
        of_data = self.data_factor / self.effective(tokens, unique) ** self.data_power
        return text**self.text_power * (self.floor + of_size + of_data)

    def effective(self, tokens: float, unique: float) -> float:
        """What `tokens` tokens of a text of `unique` ones are worth in tokens that are all different: those that come again count for less each
        time (Muennighoff et al. 2023, arXiv 2305.16264, equation 5)."""
        again = max(0.0, tokens / unique - 1.0)
        return min(tokens, unique) + unique * self.repeats * -math.expm1(-again / self.repeats)

    @property
    def most_passes(self) -> float:
        """Passes over a text after which 95 % of what its repetition can teach has been learnt."""
        return 1.0 + 3.0 * self.repeats


@dataclass(frozen=True)
class Errors:
    """How far a law is off, as root mean squares of ln(measured / predicted).

    of_texts: on a text that the fit did not see, over `texts` texts that were left out in turn. per_doubling: for each doubling of parameters times
    tokens beyond the largest run of the fit, `most_work`.
    """

    of_texts: float
    texts: int
    per_doubling: float
    most_work: float

    def factor(self, parameters: float, tokens: float) -> float:
        """The predicted loss divided and multiplied by this is an interval that holds `COVERS` of all runs on new texts."""
        doublings = max(0.0, math.log2(parameters * tokens / self.most_work))
        t = _T[self.texts - 2] if 2 <= self.texts < len(_T) + 2 else 1.282
        return math.exp(t * math.hypot(self.of_texts, self.per_doubling * doublings))


LAW = ScalingLaw(
    of_blocks=True,
    text_order=5,
    text_power=0.75,
    floor=0.33288,
    size_factor=30.603,
    size_power=0.5,
    data_factor=11.857,
    data_power=0.2,
    repeats=4.0,
)
ERRORS = Errors(of_texts=0.049171, texts=7, per_doubling=0.016246, most_work=199850000000.0)
