"""Averaged weights, which are evaluated and exported while training continues from others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from cllm.runtime.errors import CheckpointError


class Ema:
    """Exponential moving average of the weights (Polyak & Juditsky 1992), float32.

        average = d average + (1 - d) weight,     d = min(decay, (1 + t) / (10 + t)) after t updates

    Because d rises, the average soon forgets the random weights of the beginning (as in TensorFlow's ExponentialMovingAverage).

    parameters: the weights by name. decay: within (0, 1). `weights` holds the averages by name.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def update(self, num_updates: int) -> None:
        """Takes in the weights after update number `num_updates`, counted from 1. Each operation rounds once, so that the number of threads
        changes no bit (see `cllm.train.optimizers.Optimizer`)."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        with torch.no_grad():
            for name, average in self.weights.items():
                average.mul_(decay).add_(self.parameters[name] * (1 - decay))

    def update_where(self, updated: torch.Tensor, num_updates: torch.Tensor) -> None:
        """The same, with the same bits, where the host does not know whether there was an update: `updated`, a scalar bool, and `num_updates`, a
        scalar float64, lie on the device. Where there was none nothing changes, whatever the weights hold."""
        decay = ((1 + num_updates) / (10 + num_updates)).clamp(max=self.decay)
        with torch.no_grad():
            for name, average in self.weights.items():
                average.copy_(torch.where(updated, (average * decay).add_(self.parameters[name] * (1 - decay)), average))


@contextmanager
def swapped(parameters: Mapping[str, torch.nn.Parameter], weights: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """While entered, the parameters hold `weights` (None: their own); afterwards their own bits again, also after an error."""
    if weights is None:
        yield
        return
    own = {name: parameters[name].detach().clone() for name in weights}
    try:
        put(parameters, weights)
        yield
    finally:
        put(parameters, own)


def put(parameters: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """Copies `weights` into the tensors of the same names. CheckpointError, with nothing copied, where a name or a shape does not fit."""
    for name, tensor in weights.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise CheckpointError(f"the checkpoint's averaged weights do not fit this model: {name} has shape {tuple(tensor.shape)}.")
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
