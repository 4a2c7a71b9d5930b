"""The gradient noise scale: the batch size beyond which more data in one update hardly helps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cllm.data.tokens.batch import Batch

SMOOTHING = 0.9  # weight of what was measured before: each of the two estimates is too noisy alone


class NoiseScale:
    """The simple noise scale tr(S) / |G|^2 in tokens, from the gradients of one update's microbatches against that of all of them
    (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1).

    With squared norms small (mean over the microbatches of b tokens each) and big (all B tokens):
        |G|^2 = (B big - b small) / (B - b)          S = (small - big) / (1 / b - 1 / B)
    Both are unbiased, their quotient is not: they are smoothed apart, then divided. Gradients are read, never changed.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.state = torch.zeros(3, dtype=torch.float64)  # smoothed |G|^2, smoothed S, measurements so far

    def begin(self, microbatches: Sequence[Batch]) -> None:
        """Before the backward passes of an update of at least two microbatches."""
        self._counts = [each.num_targets for each in microbatches]
        self._squares: list[float] = []  # squared norm of each microbatch's mean gradient
        self._before: list[torch.Tensor | None] = [None] * len(self.parameters)

    def observe(self) -> None:
        """After a microbatch's backward pass: what it added to the gradients, which are divided by the targets of all microbatches."""
        added = [_difference(parameter.grad, before) for parameter, before in zip(self.parameters, self._before)]
        count = self._counts[len(self._squares)]
        norm = _norm(added) * (sum(self._counts) / count) if count else 0.0
        self._squares.append(norm * norm)
        self._before = [None if parameter.grad is None else parameter.grad.clone() for parameter in self.parameters]

    def end(self) -> float | None:
        """After the last one: the smoothed noise scale in tokens; None where gradients are not finite or all targets in one microbatch."""
        seen = [(count, square) for count, square in zip(self._counts, self._squares) if count]
        big = _norm([gradient for gradient in self._before if gradient is not None]) ** 2
        self._before = []
        whole = sum(count for count, _ in seen)
        total = sum(square for _, square in seen) + big
        if len(seen) < 2 or not total < float("inf"):
            return None
        small = sum(square for _, square in seen) / len(seen)
        part = len(seen) / sum(1 / count for count, _ in seen)  # harmonic mean: the expected small is |G|^2 + S mean(1 / b)
        signal, noise = (whole * big - part * small) / (whole - part), (small - big) / (1 / part - 1 / whole)
        keep = SMOOTHING if self.state[2] else 0.0
        self.state.copy_(torch.stack((keep * self.state[0] + (1 - keep) * signal, keep * self.state[1] + (1 - keep) * noise, self.state[2] + 1)))
        return self.value

    @property
    def value(self) -> float | None:
        """The smoothed noise scale, None before the first measurement and while noise hides the gradient altogether."""
        signal, noise, count = self.state.tolist()
        return max(0.0, noise) / signal if count and signal > 0 else None


def _difference(now: torch.Tensor | None, before: torch.Tensor | None) -> torch.Tensor:
    if now is None:
        return torch.zeros(0)
    return now.detach() if before is None else now.detach() - before


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    from cllm import kernels

    return float(kernels.gradient_statistics(tensors)[0])
