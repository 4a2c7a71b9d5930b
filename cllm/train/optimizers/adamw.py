"""AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from cllm.kernels.adamw import AdamWAgain
from cllm.train.optimizers.base import GradientStatistics, Optimizer


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101). One fused pass over all parameters measures the gradients, a second one updates.

    betas: decay rates of the running averages of the gradient and of its square. eps: added to the root of the latter.
    """

    name = "adamw"
    kinds = ("exp_avg", "exp_avg_sq")
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
        self.betas, self.eps = betas, eps
        self._again = AdamWAgain()
        self.exp_avg, self.exp_avg_sq = self.slots["exp_avg"], self.slots["exp_avg_sq"]

    def update(self, learning_rate: float, max_norm: float = 0.0) -> GradientStatistics:
        names, grads = self._gradients()
        found = self._fused(names, grads, learning_rate, max_norm)
        assert found is not None
        norm, largest, nonfinite = found.tolist()
        if not nonfinite:
            self.num_updates += 1
        return GradientStatistics(norm, largest, int(nonfinite))

    def step(self, grads: Iterable[tuple[str, torch.Tensor]], learning_rate: float) -> None:
        names, tensors = zip(*grads)
        self._fused(list(names), list(tensors), learning_rate, 0.0)

    def step_clipped(self, names: Sequence[str], grads: Sequence[torch.Tensor], clip: float, learning_rate: float) -> None:
        if self._fused(list(names), list(grads), learning_rate, 0.0, clip) is None:
            super().step_clipped(names, grads, clip, learning_rate)

    def _fused(
        self, names: list[str], grads: list[torch.Tensor], learning_rate: float, max_norm: float, clip: float | None = None
    ) -> torch.Tensor | None:
        """What `adamw_` returns; None, with nothing done, where a `clip` that is known is not served."""
        from cllm import kernels

        whole = names == list(self.parameters)

        def tensors(table: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
            return list(table.values()) if whole else [table[name] for name in names]

        params, exp_avgs, exp_avg_sqs = tensors(self.parameters), tensors(self.exp_avg), tensors(self.exp_avg_sq)
        decays = [self.decays[name] for name in names]
        numbers: dict[str, Any] = {
            "learning_rate": learning_rate, "betas": self.betas, "eps": self.eps, "weight_decays": decays, "step": self.num_updates + 1,
            "max_norm": max_norm,
        }  # fmt: skip
        found = self._again.call(params, grads, exp_avgs, exp_avg_sqs, **numbers, clip=clip)
        if found is not None or clip is not None:
            return found
        return kernels.adamw_([each.detach() for each in params], grads, exp_avgs, exp_avg_sqs, **numbers, skip_nonfinite=True)
