"""What an optimizer is here, AdamW, and the choice between optimizers.

An optimizer owns the gradients' measure, the clipping and the update, and keeps its state as named tensors. All of them decay the same
parameters: every matrix, the token and position embeddings included, as GPT-2, Llama and OLMo do (a tied embedding is also the output
matrix). Vectors, that is biases and norm weights, are not decayed: the decay would only fight their scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch

from cllm.config.schema import OPTIMIZERS
from cllm.runtime.errors import CheckpointError, UserError


class Optimizer(ABC):
    """The part that all optimizers share; one of them fills `slots` (kind of state -> parameter's name -> tensor) and writes `step`.

    named_parameters: (name, parameter) pairs, float32 master weights with gradients in float32 or bfloat16. State is float32.

    Elementwise work in `step` uses operations that round once (mul, add, sub, div, sqrt, sign), never add with a factor, lerp or addcmul:
    torch cuts a tensor by its threads and may end each part in scalar code, and nothing promises that this rounds a pair of operations as
    vector code does, fused or not. Sums and products of matrices go through `cllm.kernels`. So no number of threads changes a bit.
    """

    kinds: Sequence[str] = ()  # the kinds of state that every parameter has
    averaging = False  # whether `averages` gives something

    def __init__(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], *, weight_decay: float = 0.1) -> None:
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        if not self.parameters:
            raise UserError("the model has no trainable parameters. Set requires_grad on what should be trained.")
        self.weight_decay = weight_decay
        self.decays = {name: weight_decay if parameter.dim() >= 2 else 0.0 for name, parameter in self.parameters.items()}
        self.slots = {kind: {name: _zeros(parameter) for name, parameter in self.parameters.items()} for kind in self.kinds}
        self.num_updates = 0

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def update(self, learning_rate: float, max_norm: float = 0.0) -> tuple[float, float, int]:
        """Clips to `max_norm` (0: not at all) and updates in place; returns (gradient norm before clipping, largest |g|, non-finite count).

        When any gradient is not finite, nothing changes and the update is not counted.
        """
        from cllm import kernels

        names, grads = self._gradients()
        norm, largest, nonfinite = kernels.gradient_statistics(grads).tolist()
        if not nonfinite:
            clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0  # the formula of torch.nn.utils.clip_grad_norm_
            with torch.no_grad():
                self.step(((name, grad.float() if clip == 1.0 else grad.float() * clip) for name, grad in zip(names, grads)), learning_rate)
            self.num_updates += 1
        return norm, largest, int(nonfinite)

    @abstractmethod
    def step(self, grads: Iterable[tuple[str, torch.Tensor]], learning_rate: float) -> None:
        """One update in place from clipped, finite float32 gradients, which are made one by one; `num_updates` counts the updates before."""

    def averages(self) -> dict[str, torch.Tensor] | None:
        """The weights to evaluate and to export, where they are not those that gradients are taken at."""
        return None

    def _gradients(self) -> tuple[list[str], list[torch.Tensor]]:
        # A parameter that took no part in the loss is skipped, as torch's own optimizers do: it is not decayed either.
        found = {name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None}
        return list(found), list(found.values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`KIND.NAME` and the number of updates: tensors only, so that safetensors holds them all."""
        state = {f"{kind}.{name}": tensor for kind, tensors in self.slots.items() for name, tensor in tensors.items()}
        return state | {"num_updates": torch.tensor(self.num_updates, dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
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


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over all parameters in two fused passes."""

    kinds = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(named_parameters, weight_decay=weight_decay)
        self.betas, self.eps = betas, eps
        self.exp_avg, self.exp_avg_sq = self.slots["exp_avg"], self.slots["exp_avg_sq"]

    def update(self, learning_rate: float, max_norm: float = 0.0) -> tuple[float, float, int]:
        names, grads = self._gradients()
        norm, largest, nonfinite = self._fused(names, grads, learning_rate, max_norm).tolist()
        if not nonfinite:
            self.num_updates += 1
        return norm, largest, int(nonfinite)

    def step(self, grads: Iterable[tuple[str, torch.Tensor]], learning_rate: float) -> None:
        names, tensors = zip(*grads)
        self._fused(list(names), list(tensors), learning_rate, 0.0)

    def _fused(self, names: list[str], grads: list[torch.Tensor], learning_rate: float, max_norm: float) -> torch.Tensor:
        from cllm import kernels

        return kernels.adamw_(
            [self.parameters[name].detach() for name in names],
            grads,
            [self.exp_avg[name] for name in names],
            [self.exp_avg_sq[name] for name in names],
            learning_rate=learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decays=[self.decays[name] for name in names],
            step=self.num_updates + 1,
            max_norm=max_norm,
            skip_nonfinite=True,
        )


def make_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    betas: tuple[float, float],
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
) -> Optimizer:
    """The optimizer called `name`, one of OPTIMIZERS. Each takes what it knows: `momentum` is Muon's, `eps` not Lion's."""
    from cllm.train.optimizers import Lion, Muon, ScheduleFreeAdamW

    if name == "adamw":
        return AdamW(named_parameters, betas=betas, eps=eps, weight_decay=weight_decay)
    if name == "muon":
        return Muon(named_parameters, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum)
    if name == "lion":
        return Lion(named_parameters, betas=betas, weight_decay=weight_decay)
    if name == "schedule_free":
        return ScheduleFreeAdamW(named_parameters, betas=betas, eps=eps, weight_decay=weight_decay)
    raise UserError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}.")


def _zeros(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32)
