"""What a training step needs beside the model's weights for an exact resume, and the names it has in a checkpoint.

KIND.NAME, num_updates   the optimizer's state, exp_avg.model.norm.weight for example
ema.NAME                 the average of each weight, where an average is kept
training.NAME            the weights that training continues from, where the checkpoint's weights are averages
noise_scale              float64 (3,), the smoothed estimates of `NoiseScale`
loss_scale               float64 (4,), the counters of `DeviceStep`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from cllm.runtime.errors import CheckpointError
from cllm.train.averages import put

if TYPE_CHECKING:
    from cllm.train.averages import Ema
    from cllm.train.noise_scale import NoiseScale
    from cllm.train.optimizers.base import Optimizer
    from cllm.train.step_graph import DeviceStep

EMA, TRAINING = "ema.", "training."  # beginnings of names
NOISE_SCALE, LOSS_SCALE = "noise_scale", "loss_scale"


class StepState:
    """Reads and writes the state of the parts of a step; a part that the step does not have is None."""

    def __init__(self, optimizer: Optimizer, ema: Ema | None, noise_scale: NoiseScale | None, graphs: DeviceStep | None) -> None:
        self._optimizer, self._ema, self._noise_scale, self._graphs = optimizer, ema, noise_scale, graphs

    def to_dict(self, training_weights: bool) -> dict[str, torch.Tensor]:
        """The state by name. The tensors are the step's own: a later update changes them."""
        state = self._optimizer.state_dict()
        if self._ema is not None:
            state |= {EMA + name: tensor for name, tensor in self._ema.weights.items()}
        if training_weights or self._ema is not None or self._optimizer.averaging:
            state |= {TRAINING + name: parameter.detach() for name, parameter in self._optimizer.parameters.items()}
        if self._noise_scale is not None:
            state[NOISE_SCALE] = self._noise_scale.state
        if self._graphs is not None:
            state[LOSS_SCALE] = self._graphs.state()
        return state

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copies a state into the parts of the step. What belongs to a part that only the run before had is left out; CheckpointError where the
        optimizer's state or the averages are not those of this step."""
        others = {name for name in state if name in (LOSS_SCALE, NOISE_SCALE) or name.startswith((EMA, TRAINING))}
        self._optimizer.load_state_dict({name: tensor for name, tensor in state.items() if name not in others})
        put(self._optimizer.parameters, _below(TRAINING, state))
        if self._ema is not None:
            averages = _below(EMA, state)
            if averages.keys() != self._ema.weights.keys():
                raise CheckpointError("the checkpoint holds no average of this model's weights. Resume with the settings of its run.")
            put(self._ema.weights, averages)
        if self._noise_scale is not None and NOISE_SCALE in state:
            put({NOISE_SCALE: self._noise_scale.state}, {NOISE_SCALE: state[NOISE_SCALE]})
        if self._graphs is not None:
            self._graphs.resume(self._optimizer.num_updates, state.get(LOSS_SCALE))


def _below(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
