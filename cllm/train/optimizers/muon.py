"""Muon: momentum whose matrices are made orthogonal before they move the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from cllm.kernels.muon import NUM_STEPS, MuonAgain
from cllm.runtime.gpu import multiplies_bf16
from cllm.train.optimizers.adamw import AdamW
from cllm.train.optimizers.base import Optimizer

if TYPE_CHECKING:
    from cllm.kernels.triton.adamw import Fused

# Five steps of an odd quintic polynomial with these coefficients bring singular values into about [0.7, 1.2]: the slope at 0 is as steep as it
# can be, and 1 is not quite reached (Keller Jordan, https://kellerjordan.github.io/posts/muon/).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
GROUP_ELEMENTS = 1 << 26  # of matrices of one shape that a GPU updates together: 256 MB of float32, and half as much for each of three copies
# Matrices that are looked up, or that write the logits: AdamW's.
TABLES = ("embed_tokens", "embed_bigrams", "embed_trigrams", "wte", "wpe", "lm_head")


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for embeddings, output matrix, norms and biases.

        m = momentum m + (1 - momentum) g
        u = momentum m + (1 - momentum) g                      (Nesterov)
        w = w - learning_rate (0.2 sqrt(max(rows, columns)) orthogonal(u) + weight_decay w)

    The factor gives the update the root mean square that AdamW's usually has, 0.2, whatever the shape (Liu et al. 2025, arXiv 2502.16982), so
    that one learning rate and one weight decay serve both kinds of parameters; Jordan's own factor is sqrt(max(1, rows / columns)).
    A fused matrix (GPT-2's query, key and value) is made orthogonal as a whole.
    """

    name = "muon"
    rule, rule_states = AdamW.name, AdamW.kinds

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(named_parameters, weight_decay=weight_decay)
        self.betas, self.eps, self.momentum = betas, eps, momentum
        matrices = [name for name, parameter in self.parameters.items() if parameter.dim() == 2 and not any(each in name for each in TABLES)]
        others = [(name, parameter) for name, parameter in self.parameters.items() if name not in matrices]
        self.adamw = AdamW(others, betas=betas, eps=eps, weight_decay=weight_decay) if others else None
        self.slots = {"momentum": {name: torch.zeros_like(self.parameters[name], dtype=torch.float32) for name in matrices}}
        if self.adamw is not None:
            self.slots |= self.adamw.slots
        self._again = MuonAgain(COEFFICIENTS, NUM_STEPS)

    def step_clipped(self, names: Sequence[str], grads: Sequence[torch.Tensor], clip: float, learning_rate: float) -> None:
        """On a CPU as one list of launches over all matrices, on a GPU those of a shape together, both multiplying bfloat16 where the hardware does;
        elsewhere `step`."""
        found = dict(zip(names, grads))
        rest = {name: found.pop(name) for name in names if name not in self.slots["momentum"]}
        served = self._again.call(
            [self.parameters[name].detach() for name in found], list(found.values()), [self.slots["momentum"][name] for name in found],
            learning_rate=learning_rate, momentum=self.momentum, weight_decays=[self.decays[name] for name in found], clip=clip,
        )  # fmt: skip
        if not served and found and next(iter(found.values())).device.type == "cuda":
            for group in _groups(found):
                self._step_together(group, [found[name] for name in group], clip, learning_rate)
        elif not served:
            super().step_clipped(list(found), list(found.values()), clip, learning_rate)
        if self.adamw is not None and rest:
            self.adamw.num_updates = self.num_updates
            self.adamw.step_clipped(list(rest), list(rest.values()), clip, learning_rate)

    def step_fused(self, fused: Fused, grads: Sequence[torch.Tensor]) -> None:
        super().step_fused(fused, grads)  # AdamW's tensors
        matrices = {name: grad for name, grad in zip(self.parameters, grads, strict=True) if name in self.slots["momentum"]}
        for group in _groups(matrices):
            self._step_together(group, [matrices[name] for name in group], *fused.numbers())

    def _step_together(
        self, names: Sequence[str], grads: Sequence[torch.Tensor], clip: float | torch.Tensor, learning_rate: float | torch.Tensor,
        left_out: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """`step` for matrices of one shape, as few operations: a GPU would wait for the host to launch each matrix's own. clip and learning_rate:
        numbers, or scalars on the device; left_out: a bool there, whether nothing changes."""
        weights, momenta = [self.parameters[name].detach() for name in names], [self.slots["momentum"][name] for name in names]
        new = torch.stack([grad.float() for grad in grads]).mul_((1 - self.momentum) * clip)
        momentum = torch.stack(momenta).mul_(self.momentum).add_(new)
        update = orthogonal_together(new.add_(momentum * self.momentum)).mul_(learning_rate * 0.2 * math.sqrt(max(weights[0].shape)))
        _put(momenta, momentum, left_out)
        keep = 1 - learning_rate * self.decays[names[0]]  # all matrices have one decay
        _put(weights, torch.stack(weights).mul_(keep).sub_(update), left_out)

    def step(self, grads: Iterable[tuple[str, torch.Tensor]], learning_rate: float) -> None:
        rest = []
        for name, grad in grads:
            momentum = self.slots["momentum"].get(name)
            if momentum is None:
                rest.append((name, grad))
                continue
            new = grad * (1 - self.momentum)
            momentum.mul_(self.momentum).add_(new)
            weight = self.parameters[name].detach()
            scale = learning_rate * 0.2 * math.sqrt(max(weight.shape))
            update = orthogonal((momentum * self.momentum).add_(new)).mul_(scale)
            weight.mul_(1 - learning_rate * self.decays[name]).sub_(update)
        if self.adamw is not None and rest:
            self.adamw.num_updates = self.num_updates
            self.adamw.step(rest, learning_rate)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of matrix (R, C) = U S V^T, float32, by Newton-Schulz iteration: products of matrices only."""
    from cllm import kernels

    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).contiguous()
    x = x / kernels.gradient_statistics([x])[0].clamp_min(1e-7)  # the largest singular value is then at most 1
    for _ in range(NUM_STEPS):
        gram = kernels.matmul(x, x.T)
        polynomial = kernels.matmul(gram, gram).mul_(c).add_(gram.mul_(b))
        x = kernels.matmul(polynomial, x).add_(x.mul_(a))
    return x.T if tall else x


def _groups(matrices: dict[str, torch.Tensor]) -> list[list[str]]:
    """Names of matrices of one shape, of at most GROUP_ELEMENTS together where there is more than one."""
    groups: list[list[str]] = []
    open_group: dict[torch.Size, list[str]] = {}
    for name, matrix in matrices.items():
        group = open_group.get(matrix.shape)
        if group is None or (len(group) + 1) * matrix.numel() > GROUP_ELEMENTS:
            group = open_group[matrix.shape] = []
            groups.append(group)
        group.append(name)
    return groups


def _put(places: list[torch.Tensor], values: torch.Tensor, left_out: torch.Tensor | None) -> None:
    """Copies values (N, R, C) into N matrices, unless they are left out."""
    if left_out is not None:
        values = torch.where(left_out, torch.stack(places), values)
    torch._foreach_copy_(places, list(values.unbind()))


def orthogonal_together(matrices: torch.Tensor) -> torch.Tensor:
    """`orthogonal` of each of matrices (N, R, C) on a GPU -> float32 (N, R, C); its products are of bfloat16 where the GPU multiplies that, as in the
    original."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp_min(1e-7)
    x = (x.mT if tall else x).to(torch.bfloat16 if multiplies_bf16(x.device) else torch.float32)
    for _ in range(NUM_STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()
