"""Measurements inside a model: the gradient and the update of each parameter, and the residual stream after each block.

Norms are taken over all values of a tensor, row by row, and rounded to six digits, so that they are the same for any number of threads. Updates
and histograms come from an evenly spaced sample of each tensor.
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

from cllm.monitor.records import LayersRow

if TYPE_CHECKING:
    from cllm.model.model import Model

SAMPLE = 8192  # about so many values of each tensor are in its sample
OUTLIER = 1000.0  # a gradient this many times larger or smaller than that of the median matrix is flagged
_BLOCK = re.compile(r"\.(?:layers|h)\.(\d+)\.")
DECADES = range(-12, 3)  # the powers of ten that the histogram of |gradient| counts


class LayerStats:
    """Measures one update: call `before`, make the update, call `after`.

    parameters: the weights by name. scale: the factor that the gradients carry, the loss scale of fp16.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], scale: float = 1.0) -> None:
        self.parameters, self.scale = parameters, scale
        self.samples: dict[str, torch.Tensor] = {}  # of the gradients, by parameter
        self._weights: dict[str, torch.Tensor] = {}
        self._norms: dict[str, float] = {}

    @torch.no_grad()
    def before(self) -> None:
        """When the gradients are complete and no weight has changed yet."""
        for name, parameter in self.parameters.items():
            self._weights[name] = _sample(parameter).clone()
            if parameter.grad is not None:
                self._norms[name] = _norm(parameter.grad) / self.scale
                self.samples[name] = _sample(parameter.grad).float().cpu() / self.scale

    @torch.no_grad()
    def after(self, step: int) -> LayersRow:
        """The row of the update by which `step` updates are done."""
        ratios = {}
        for name, old in self._weights.items():
            norm = float(old.double().norm())
            ratios[name] = _short(float((_sample(self.parameters[name]).double() - old.double()).norm()) / norm) if norm else 0.0
        sizes = {name: self._norms[name] / math.sqrt(self.parameters[name].numel()) for name in self._norms if self.parameters[name].dim() > 1}
        usual = statistics.median_low(sizes.values()) if sizes else 0.0
        finite = math.isfinite(usual) and usual > 0
        return LayersRow(
            step=step,
            gradient_norms={name: _short(norm) for name, norm in self._norms.items()},
            update_ratios=ratios,
            exploding=tuple(name for name, size in sizes.items() if not math.isfinite(size) or (finite and size > OUTLIER * usual)),
            vanishing=tuple(name for name, size in sizes.items() if size == 0 or (finite and size < usual / OUTLIER)),
            gradient_histogram=self._histogram(),
        )

    def by_block(self) -> dict[str, torch.Tensor]:
        """The sampled gradients of each block, and of the parameters outside the blocks."""
        found: dict[str, list[torch.Tensor]] = {}
        for name, values in self.samples.items():
            block = _BLOCK.search(name)
            found.setdefault(f"block {block[1]}" if block else "outside the blocks", []).append(values)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _histogram(self) -> dict[str, int]:
        """How many of the sampled gradients lie in each decade. The first counts all smaller ones too, the last all larger ones."""
        if not self.samples:
            return {}
        values = torch.cat(list(self.samples.values())).abs()
        decade = values.log10().floor().nan_to_num(DECADES[-1], DECADES[-1], DECADES[0]).clamp(DECADES[0], DECADES[-1]).long()
        counts = torch.bincount(decade - DECADES[0], minlength=len(DECADES)).tolist()
        return {f"1e{number}": count for number, count in zip(DECADES, counts)}


def _norm(values: torch.Tensor) -> float:
    """The L2 norm of a tensor. On a CPU it is numpy's, which is many times faster than torch's in float64 and runs on one thread."""
    rows = values.reshape(-1, values.shape[-1]) if values.dim() > 1 else values.reshape(1, -1)
    if values.device.type != "cpu":
        return float(torch.linalg.vector_norm(torch.linalg.vector_norm(rows.float(), dim=1).double()))
    flat = rows.float().numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # a norm that is not finite is reported as such
        return math.sqrt(np.einsum("ij,ij->i", flat, flat).sum(dtype=np.float64))


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().t().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


@contextmanager
def activation_stats(model: Model) -> Iterator[dict[str, dict[str, float]]]:
    """Yields a dict that every forward pass inside the block fills: "block N" -> mean, std and largest of the residual stream after block N."""
    found: dict[str, dict[str, float]] = {}

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            branch, stream = output  # the next norm adds the last branch of a block to the stream
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
