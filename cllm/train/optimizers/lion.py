"""Lion: the sign of an interpolated momentum."""

from collections.abc import Iterable, Sequence

import torch

from cllm.kernels.update import UpdateAgain
from cllm.train.optimizers.base import Optimizer


class Lion(Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): half of AdamW's state.

        c = beta1 m + (1 - beta1) g
        w = w - learning_rate (sign(c) + weight_decay w)
        m = beta2 m + (1 - beta2) g

    Every weight moves by the learning rate, so it is 3 to 10 times lower than AdamW's, and the weight decay as much higher (section 5).
    """

    name = "lion"
    kinds = ("momentum",)
    rule, rule_states = name, ("momentum", "momentum")

    def __init__(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], *, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.1
    ) -> None:
        super().__init__(named_parameters, weight_decay=weight_decay)
        self.betas = betas
        self._again = UpdateAgain("lion")

    def step_clipped(self, names: Sequence[str], grads: Sequence[torch.Tensor], clip: float, learning_rate: float) -> None:
        """On a CPU as one launch over all parameters, with the bits of `step`."""
        momenta = [self.slots["momentum"][name] for name in names]
        served = self._again.call(
            [self.parameters[name].detach() for name in names], list(grads), momenta, momenta, [self.decays[name] for name in names],
            learning_rate=learning_rate, clip=clip, betas=self.betas,
        )  # fmt: skip
        if not served:
            super().step_clipped(names, grads, clip, learning_rate)

    def step(self, grads: Iterable[tuple[str, torch.Tensor]], learning_rate: float) -> None:
        beta1, beta2 = self.betas
        for name, grad in grads:
            weight, momentum = self.parameters[name].detach(), self.slots["momentum"][name]
            direction = (momentum * beta1).add_(grad * (1 - beta1)).sign_()
            weight.mul_(1 - learning_rate * self.decays[name]).sub_(direction.mul_(learning_rate))
            momentum.mul_(beta2).add_(grad * (1 - beta2))
