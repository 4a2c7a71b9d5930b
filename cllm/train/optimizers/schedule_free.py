"""Schedule-free AdamW: an average of the iterates takes the place of the learning rate's decay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from cllm.kernels.update import UpdateAgain
from cllm.runtime.errors import UserError
from cllm.train.optimizers.base import Optimizer

if TYPE_CHECKING:
    from cllm.kernels.triton.adamw import Fused

SMALLEST = 1e-300  # divides where the sum of squares is 0, as long as every learning rate was


class ScheduleFreeAdamW(Optimizer):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682, algorithm 1), with decay at the point of the gradient.

        y = (1 - beta1) z + beta1 x                           where gradients are taken: the model's weights while it trains
        v = beta2 v + (1 - beta2) g^2
        d = g / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay y
        z = z - learning_rate d
        x = (1 - c) x + c z                                   the average, which is evaluated and exported

    c is this update's share of the sum of all squared (so far largest) learning rates. Only y, z and v are kept; x follows from y and z.
    The learning rate warms up and then stays: no step from which on it falls has to be known.
    """

    name = "schedule_free"
    kinds = ("z", "exp_avg_sq")
    averaging = True
    rule, rule_states = name, kinds

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(named_parameters, weight_decay=weight_decay)
        if not betas[0] > 0:
            raise UserError(f"schedule-free AdamW needs beta1 > 0, got {betas[0]:g}: with 0 nothing of the average is in the weights. Use 0.9.")
        self.betas, self.eps = betas, eps
        for name, z in self.slots["z"].items():
            z.copy_(self.parameters[name].detach())
        # float64: the sum grows by small squares for as long as the run lasts.
        device = next(iter(self.parameters.values())).device
        self.weights = torch.zeros(2, dtype=torch.float64, device=device)  # the sum of squared learning rates, the largest learning rate
        self._again = UpdateAgain("schedule_free")

    def step_clipped(self, names: Sequence[str], grads: Sequence[torch.Tensor], clip: float, learning_rate: float) -> None:
        """On a CPU as one launch over all parameters, with the bits of `step`."""
        weights, numbers = self._numbers(learning_rate)
        share, direct = numbers.tolist()
        served = self._again.call(
            [self.parameters[name].detach() for name in names], list(grads), [self.slots["z"][name] for name in names],
            [self.slots["exp_avg_sq"][name] for name in names], [self.decays[name] for name in names],
            learning_rate=learning_rate, clip=clip, beta2=self.betas[1], eps=self.eps, root=self._root(), share=share, direct=direct,
        )  # fmt: skip
        if served:
            self.weights.copy_(weights)
        else:
            super().step_clipped(names, grads, clip, learning_rate)

    def step(self, grads: Iterable[tuple[str, torch.Tensor]], learning_rate: float) -> None:
        beta2 = self.betas[1]
        weights, numbers = self._numbers(learning_rate)
        root, (share, direct) = self._root(), numbers.tolist()
        self.weights.copy_(weights)
        for name, grad in grads:
            y, z, v = self.parameters[name].detach(), self.slots["z"][name], self.slots["exp_avg_sq"][name]
            v.mul_(beta2).add_((grad * grad).mul_(1 - beta2))
            direction = grad / rounded_root(v).div_(root).add_(self.eps)
            if self.decays[name]:
                direction.add_(y * self.decays[name])
            # The equations above with x left out: y goes the share c towards z, then what z's step moves, directly and through x.
            y.add_((z - y).mul_(share)).add_(direction * direct)
            z.sub_(direction.mul_(learning_rate))

    def step_fused(self, fused: Fused, grads: Sequence[torch.Tensor]) -> None:
        _, learning_rate, left_out = fused.numbers()
        weights, numbers = self._numbers(learning_rate)
        fused.update(numbers)
        self.weights.copy_(torch.where(left_out, self.weights, weights))

    def _numbers(self, learning_rate: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what `weights` will be after this update, c and what d is multiplied with before it is added to y), float64 (2,) where `weights` lies.
        learning_rate: a number, or a float64 scalar there."""
        largest = self.weights[1].clamp(min=learning_rate)
        square = largest * largest
        total = self.weights[0] + square
        share = square / total.clamp(min=SMALLEST)
        return torch.stack((total, largest)), torch.stack((share, learning_rate * (self.betas[0] * (1 - share) - 1)))

    def _root(self) -> float:
        """sqrt(1 - beta2^t) of the next update."""
        return math.sqrt(1 - self.betas[1] ** (self.num_updates + 1))

    def averages(self) -> dict[str, torch.Tensor]:
        """x = y + (1 - 1 / beta1) (z - y) of each parameter."""
        factor = 1 - 1 / self.betas[0]
        with torch.no_grad():
            return {name: (self.slots["z"][name] - y).mul_(factor).add_(y) for name, y in self.parameters.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return super().state_dict() | {"weights": self.weights}


def rounded_root(x: torch.Tensor) -> torch.Tensor:
    """sqrt(x), rounded once: torch's own on a CPU is that of MKL, which is now and then one unit off."""
    if x.device.type != "cpu":
        return x.sqrt()
    root = torch.empty_like(x)
    np.sqrt(x.numpy(), out=root.numpy())
    return root
