"""How training goes inside: gradient norms, updates and their flags layer by layer, and what the activations look like.

Looking changes no bit of training. Norms are taken over all values, row by row, and told to six digits, so that they too are the same for any
number of threads; updates and histograms come from an evenly spaced sample of each tensor.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from cllm.model.model import Model

SAMPLE = 8192  # values of a tensor
OUTLIER = 1000.0  # a matrix whose gradient is so many times larger or smaller than the median matrix's is flagged
_BLOCK = re.compile(r"\.(?:layers|h)\.(\d+)\.")
DECADES = range(-12, 3)  # of the histogram of |gradient|


class LayerStats:
    """Gradient norms and update-to-weight ratios of one update: `before` it, then `after` it. `scale`: what gradients were multiplied by (fp16)."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], scale: float = 1.0) -> None:
        self.parameters, self.scale = parameters, scale
        self.samples: dict[str, torch.Tensor] = {}  # of the gradients
        self._weights: dict[str, torch.Tensor] = {}
        self._norms: dict[str, float] = {}

    @torch.no_grad()
    def before(self) -> None:
        """Gradients are complete and no weight has changed yet."""
        for name, parameter in self.parameters.items():
            self._weights[name] = _sample(parameter).clone()
            if parameter.grad is not None:
                self._norms[name] = _norm(parameter.grad) / self.scale
                self.samples[name] = _sample(parameter.grad).float().cpu() / self.scale

    @torch.no_grad()
    def after(self) -> dict[str, Any]:
        """The row for the metrics: `gradient_norms` and `update_ratios` (||change|| / ||weight||) by parameter name, flags and a histogram."""
        ratios = {}
        for name, old in self._weights.items():
            norm = float(old.double().norm())
            ratios[name] = _short(float((_sample(self.parameters[name]).double() - old.double()).norm()) / norm) if norm else 0.0
        sizes = {name: self._norms[name] / math.sqrt(self.parameters[name].numel()) for name in self._norms if self.parameters[name].dim() > 1}
        usual = statistics.median_low(sizes.values()) if sizes else 0.0
        finite = math.isfinite(usual) and usual > 0
        return {
            "gradient_norms": {name: _short(norm) for name, norm in self._norms.items()},
            "update_ratios": ratios,
            "exploding": [name for name, size in sizes.items() if not math.isfinite(size) or (finite and size > OUTLIER * usual)],
            "vanishing": [name for name, size in sizes.items() if size == 0 or (finite and size < usual / OUTLIER)],
            "gradient_histogram": self._histogram(),
        }

    def by_block(self) -> dict[str, torch.Tensor]:
        """The sampled gradients of each block together, and of what belongs to none."""
        found: dict[str, list[torch.Tensor]] = {}
        for name, values in self.samples.items():
            block = _BLOCK.search(name)
            found.setdefault(f"block {block[1]}" if block else "outside the blocks", []).append(values)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _histogram(self) -> dict[str, int]:
        """How many sampled gradients lie in each decade of |g|; what is smaller than all of them is in the first, what is larger in the last."""
        if not self.samples:
            return {}
        values = torch.cat(list(self.samples.values())).abs()
        decade = values.log10().floor().nan_to_num(DECADES[-1], DECADES[-1], DECADES[0]).clamp(DECADES[0], DECADES[-1]).long()
        counts = torch.bincount(decade - DECADES[0], minlength=len(DECADES)).tolist()
        return {f"1e{number}": count for number, count in zip(DECADES, counts)}


def _norm(values: torch.Tensor) -> float:
    """On a CPU by numpy, whose sums over rows are many times faster than torch's float64 ones and run on one thread."""
    rows = values.reshape(-1, values.shape[-1]) if values.dim() > 1 else values.reshape(1, -1)
    if values.device.type != "cpu":
        return float(torch.linalg.vector_norm(torch.linalg.vector_norm(rows.float(), dim=1).double()))
    flat = rows.float().numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is what one wants to see
        return math.sqrt(np.einsum("ij,ij->i", flat, flat).sum(dtype=np.float64))


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().t().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


@contextmanager
def activation_stats(model: Model) -> Iterator[dict[str, dict[str, float]]]:
    """While entered, every forward fills the dict: block -> mean, std and largest absolute value of the residual stream after it."""
    found: dict[str, dict[str, float]] = {}

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            branch, stream = output  # a block leaves it to the next norm to add its last branch
            each = (branch if stream is None else branch + stream).detach().double()
            mean = float(each.mean())
            found[name] = {"mean": _short(mean), "std": _short(float(each.std(unbiased=False))), "largest": _short(float(each.abs().max()))}

        return hook

    handles = [block.register_forward_hook(watch(f"block {number}")) for number, block in enumerate(model.backbone.blocks)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
