"""What all optimizers share: the gradient norm, clipping, weight decay and a state of named tensors.

Weight decay applies to the same parameters in all of them: to every matrix, token and position embeddings included, as in GPT-2, Llama and OLMo
(a tied embedding is also the output matrix). Vectors, that is biases and norm weights, are not decayed, because decay would only fight their scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from cllm.runtime.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from cllm.kernels.triton.adamw import Fused


class GradientStatistics(NamedTuple):
    """Of all gradients together, before clipping: the L2 norm, the largest absolute value and the number of elements that are not finite."""

    norm: float
    largest: float
    num_nonfinite: int


class Optimizer(ABC):
    """Base class of the optimizers. A subclass gives its `name` and its `kinds` of state and implements `step`.

    named_parameters: (name, parameter) pairs; float32 master weights whose gradients are float32 or bfloat16. Those that do not require a
        gradient are left out. UserError when none is left.
    weight_decay: decoupled decay of the matrices, per unit of learning rate.

    The state lies in `slots[kind][name]`, a float32 tensor of the parameter's shape.

    Elementwise work in `step` uses only operations that round once (mul, add, sub, div, sign), never sqrt, lerp, addcmul or add with a factor.
    PyTorch cuts a tensor among its threads and may process the end of each part in scalar code, and scalar and vector code need not agree on
    whether they fuse a multiplication with an addition. Reductions and matrix products use `cllm.kernels`. Therefore the number of threads never
    changes a bit.
    """

    name: str  # how the settings call it
    kinds: Sequence[str] = ()  # the kinds of state that each parameter has, "exp_avg" for example
    averaging = False  # whether `averages` returns weights
    rule: str  # which of `kernels.triton.update.KERNELS` updates tensors on a GPU, those that have both of these states
    rule_states: Sequence[str]
    betas: tuple[float, float]
    eps = 0.0

    def __init__(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], *, weight_decay: float = 0.1) -> None:
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        if not self.parameters:
            raise UserError("the model has no trainable parameters. Set requires_grad on what should be trained.")
        self.weight_decay = weight_decay
        self.decays = {name: weight_decay if parameter.dim() >= 2 else 0.0 for name, parameter in self.parameters.items()}
        self.slots = {kind: {name: _zeros(parameter) for name, parameter in self.parameters.items()} for kind in self.kinds}
        self.num_updates = 0

    def zero_grad(self) -> None:
        """Sets every gradient to None."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def update(self, learning_rate: float, max_norm: float = 0.0) -> GradientStatistics:
        """Scales the gradients so that their norm is at most `max_norm` (0: no clipping) and updates the parameters in place.

        When any gradient is not finite, nothing changes and the update is not counted in `num_updates`.
        """
        from cllm import kernels

        names, grads = self._gradients()
        norm, largest, nonfinite = kernels.gradient_statistics(grads).tolist()
        if not nonfinite:
            clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0  # the formula of torch.nn.utils.clip_grad_norm_
            with torch.no_grad():
                self.step_clipped(names, grads, clip, learning_rate)
            self.num_updates += 1
        return GradientStatistics(norm, largest, int(nonfinite))

    def step_clipped(self, names: Sequence[str], grads: Sequence[torch.Tensor], clip: float, learning_rate: float) -> None:
        """`step` with gradients that are finite and still to be multiplied by `clip`."""
        self.step(((name, grad.float() if clip == 1.0 else grad.float() * clip) for name, grad in zip(names, grads)), learning_rate)

    @abstractmethod
    def step(self, grads: Iterable[tuple[str, torch.Tensor]], learning_rate: float) -> None:
        """One update in place. `grads`: (name, gradient) pairs, clipped, finite and float32, made as they are iterated over so that only one copy
        exists at a time. `num_updates` is the number of updates before this one."""

    def fused(self) -> Fused:
        """The kernels of `step_fused` over all parameters, which stay where they are, as do the tensors of the state."""
        from cllm.kernels.triton.adamw import Fused
        from cllm.kernels.triton.update import KERNELS

        first, second = ([self.slots.get(kind, {}).get(name) for name in self.parameters] for kind in self.rule_states)
        params = [parameter.detach() for parameter in self.parameters.values()]
        return Fused(params, first, second, list(self.decays.values()), kernel=KERNELS[self.rule])

    def step_fused(self, fused: Fused, grads: Sequence[torch.Tensor]) -> None:
        """One update in place after `fused.measure(grads, ...)`, by the numbers that it left on the device, where it also decided whether nothing
        may change: a step that can be captured in a CUDA graph. grads: those of all parameters, in their order."""
        fused.update()

    def averages(self) -> dict[str, torch.Tensor] | None:
        """The weights to evaluate and to export by name, where they differ from those that gradients are computed at; otherwise None."""
        return None

    def _gradients(self) -> tuple[list[str], list[torch.Tensor]]:
        # A parameter that took no part in the loss is skipped, as torch's own optimizers do: it is not decayed either.
        found = {name: grad for name, parameter in self.parameters.items() if (grad := parameter.grad) is not None}
        return list(found), list(found.values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`KIND.NAME` of each tensor of state, and `num_updates`, int64: tensors only, so that safetensors can hold them all."""
        state = {f"{kind}.{name}": tensor for kind, tensors in self.slots.items() for name, tensor in tensors.items()}
        return state | {"num_updates": torch.tensor(self.num_updates, dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copies what `state_dict` returned. CheckpointError, with nothing changed, when names or shapes are not this optimizer's."""
        own = self.state_dict()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise CheckpointError(f"the optimizer state does not fit this model and optimizer: {len(odd)} names differ, first {odd[0]}.")
        for name, tensor in state.items():
            if own[name].shape != tensor.shape:
                raise CheckpointError(f"optimizer state {name} has shape {tuple(tensor.shape)}, the model needs {tuple(own[name].shape)}.")
        for name, tensor in state.items():
            own[name].copy_(tensor)
        self.num_updates = int(state["num_updates"])


def _zeros(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32)
