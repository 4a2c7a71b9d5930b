"""AdamW."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cllm.train.optimizers.base import GradientStatistics, Optimizer


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101). One fused pass over all parameters measures the gradients, a second one updates.

    betas: decay rates of the running averages of the gradient and of its square. eps: added to the root of the latter.
    """

    name = "adamw"
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

    def update(self, learning_rate: float, max_norm: float = 0.0) -> GradientStatistics:
        names, grads = self._gradients()
        norm, largest, nonfinite = self._fused(names, grads, learning_rate, max_norm).tolist()
        if not nonfinite:
            self.num_updates += 1
        return GradientStatistics(norm, largest, int(nonfinite))

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
