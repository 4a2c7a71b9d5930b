"""The gradient noise scale: the batch size beyond which more data in one update hardly helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cllm.data.tokens.batch import Batch

SMOOTHING = 0.9  # weight of the measurements before: a single estimate is too noisy


class NoiseScale:
    """The simple noise scale tr(S) / |G|^2 in tokens (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1), measured by comparing the gradient
    of each microbatch of an update with the gradient of all of them.

    With the squared norms `small` (the mean over the microbatches, of b tokens each) and `big` (of all B tokens):
        |G|^2 = (B big - b small) / (B - b)          S = (small - big) / (1 / b - 1 / B)
    Each of the two is unbiased, their quotient is not. Therefore each is smoothed over the measurements before one is divided by the other.
    Gradients are read, never changed.

    parameters: the float32 parameters whose gradients are measured. every: the number of updates between two measurements.
    An update that is measured calls `begin`, then `observe` after each backward, then `end`.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], every: int = 1) -> None:
        self.parameters, self.every = parameters, every
        self.state = torch.zeros(3, dtype=torch.float64)  # smoothed |G|^2, smoothed S, measurements so far

    def due(self, num_updates: int, num_microbatches: int) -> bool:
        """Whether to measure the update after `num_updates` of them; one microbatch alone has nothing to be compared with."""
        return num_microbatches > 1 and num_updates % self.every == 0

    def begin(self, microbatches: Sequence[Batch], scale: float = 1.0) -> None:
        """Before the first backward of an update of at least two microbatches. scale: the factor that the gradients carry, the loss scale of fp16."""
        self._scale = scale
        self._counts = [each.num_targets for each in microbatches]
        self._squares: list[float] = []  # the squared norm of the mean gradient of each microbatch
        self._before: list[torch.Tensor | None] = [None] * len(self.parameters)

    def observing(self, beat: Callable[[], None] | None) -> Callable[[], None]:
        """What to call after each backward: `observe`, then `beat`."""

        def observe() -> None:
            self.observe()
            if beat is not None:
                beat()

        return observe

    def observe(self) -> None:
        """After the backward of a microbatch: measures what it has added to the gradients, which are divided by the number of all targets."""
        added = [_difference(parameter.grad, before) for parameter, before in zip(self.parameters, self._before)]
        count = self._counts[len(self._squares)]
        norm = _norm(added) / self._scale * (sum(self._counts) / count) if count else 0.0
        self._squares.append(norm * norm)
        self._before = [None if parameter.grad is None else parameter.grad.clone() for parameter in self.parameters]

    def end(self) -> float | None:
        """After the last backward: the smoothed noise scale in tokens; None where a gradient is not finite, or where all targets lie in one
        microbatch."""
        seen = [(count, square) for count, square in zip(self._counts, self._squares) if count]
        big = (_norm([gradient for gradient in self._before if gradient is not None]) / self._scale) ** 2
        self._before = []
        whole = sum(count for count, _ in seen)
        total = sum(square for _, square in seen) + big
        if len(seen) < 2 or not total < float("inf"):
            return None
        small = sum(square for _, square in seen) / len(seen)
        part = len(seen) / sum(1 / count for count, _ in seen)  # the harmonic mean, because the expected value of small is |G|^2 + S mean(1 / b)
        signal, noise = (whole * big - part * small) / (whole - part), (small - big) / (1 / part - 1 / whole)
        keep = SMOOTHING if self.state[2] else 0.0
        self.state.copy_(torch.stack((keep * self.state[0] + (1 - keep) * signal, keep * self.state[1] + (1 - keep) * noise, self.state[2] + 1)))
        return self.value

    @property
    def value(self) -> float | None:
        """The smoothed noise scale in tokens; None before the first measurement, and while the noise hides the gradient altogether."""
        signal, noise, count = self.state.tolist()
        return max(0.0, noise) / signal if count and signal > 0 else None


def _difference(now: torch.Tensor | None, before: torch.Tensor | None) -> torch.Tensor:
    if now is None:
        return torch.zeros(0)
    return now.detach() if before is None else now.detach() - before


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    from cllm import kernels

    return float(kernels.gradient_statistics(tensors)[0])
