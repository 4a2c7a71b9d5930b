"""The learning-rate finder behind `cllm train DATA --find-lr`: one short run whose learning rate rises until the loss does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.runtime import progress
from cllm.runtime.errors import UserError
from cllm.train.build import make_batches, make_step

if TYPE_CHECKING:
    from cllm.config.train import TrainConfig
    from cllm.data import TokenSplit
    from cllm.model.model import Model

NUM_UPDATES, LOWEST, HIGHEST = 100, 1e-6, 1.0
SMOOTHING = 0.9  # weight of the past in the smoothed loss: batches differ more than one update changes
DIVERGED = 1.3  # times the lowest smoothed loss
SLOPE = 5  # updates to each side between which a slope is taken
MARGIN = 4.0  # how far below the rate of the lowest loss the suggestion lies at least
_TABLE_ROWS, _BAR = 24, 40


@dataclass(frozen=True)
class LearningRates:
    """What a range test saw: learning rate, loss in nats and smoothed loss of each update, in order."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged: bool

    @property
    def lowest(self) -> float:
        """The learning rate at which the smoothed loss was lowest."""
        return self.rates[min(range(len(self.smoothed)), key=self.smoothed.__getitem__)]

    @property
    def suggestion(self) -> float:
        """A learning rate to begin with, to two digits: that at which the smoothed loss fell fastest, and at most a quarter of that of the lowest
        loss. The latter alone is no guide: with clipped gradients a ruined model still learns how frequent each token is, and its loss may fall up
        to the highest rate tried."""
        last = len(self.rates) - 1
        falls = [self.smoothed[max(0, i - SLOPE)] - self.smoothed[min(last, i + SLOPE)] for i in range(last + 1)]
        return float(f"{min(self.rates[falls.index(max(falls))], self.lowest / MARGIN):.1e}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "suggestion": self.suggestion,
            "lowest": self.lowest,
            "diverged": self.diverged,
            "rates": self.rates,
            "losses": [each if math.isfinite(each) else str(each) for each in self.losses],
            "smoothed": self.smoothed,
        }


def find_learning_rate(model: Model, split: TokenSplit, config: TrainConfig, beat: Callable[[], None] | None = None) -> LearningRates:
    """A learning-rate range test (Smith 2017, arXiv 1506.01186) with the step and the data of `config`: up to 100 updates of `model`, whose
    learning rate grows by the same factor from 1e-6 to 1, ended early where the smoothed loss has risen by 30 %.

    The model is trained by it: throw it away. Raises UserError when not even the first loss is finite.
    """
    step, batches = make_step(model, config), make_batches(split, config)
    count = config.train.grad_accum
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    mean = 0.0
    diverged = False
    with progress.Progress(NUM_UPDATES, "finding the learning rate") as shown:
        for number in range(NUM_UPDATES):
            rate = LOWEST * (HIGHEST / LOWEST) ** (number / (NUM_UPDATES - 1))
            result = step.run([batches.batch(number * count + each) for each in range(count)], rate, beat)
            if not result.finite:
                diverged = True
                break
            mean = SMOOTHING * mean + (1 - SMOOTHING) * result.loss
            rates.append(rate)
            losses.append(result.loss)
            smoothed.append(mean / (1 - SMOOTHING ** (number + 1)))
            shown.update(number + 1, f"learning rate {rate:.1e}  loss {result.loss:.4f}")
            if smoothed[-1] > DIVERGED * min(smoothed):
                diverged = True
                break
    if not rates:
        raise UserError("the very first loss is not finite, before any update. Check the data and the precision.")
    return LearningRates(rates, losses, smoothed, diverged)


def as_rows(found: LearningRates) -> list[tuple[str, ...]]:
    """About 24 rows (learning rate, loss, smoothed, bar) for a terminal; the longest bar is the highest smoothed loss."""
    low, high = min(found.smoothed), max(found.smoothed)
    lowest = found.rates.index(found.lowest)
    every = max(1, round(len(found.rates) / _TABLE_ROWS))
    chosen = sorted({*range(0, len(found.rates), every), lowest, len(found.rates) - 1})
    rows: list[tuple[str, ...]] = [("learning rate", "loss", "smoothed", "")]
    for index in chosen:
        bar = "#" * (1 + round((_BAR - 1) * (found.smoothed[index] - low) / (high - low or 1.0)))
        mark = "  lowest" if index == lowest else ""
        rows.append((f"{found.rates[index]:.2e}", f"{found.losses[index]:.4f}", f"{found.smoothed[index]:.4f}", bar + mark))
    return rows


def draw(found: LearningRates, path: Path) -> bool:
    """The curve as a picture; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")  # no window, no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(found.rates, found.losses, ".", color="#b0b0b0", label="loss of each update")
    axes.plot(found.rates, found.smoothed, color="#2563a8", label="smoothed")
    axes.axvline(found.suggestion, color="#c2571a", linestyle="--", label=f"suggestion {found.suggestion:.1e}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title("Learning-rate range test", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
