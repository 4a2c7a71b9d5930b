"""AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) in plain torch, with clipping by global norm and statistics."""

import math

import torch
from torch import Tensor

from cllm.kernels.torch import fixed_order_sum

_SLICE_ELEMENTS = 1 << 20  # gradients are measured in slices of this size, so that no whole embedding table is copied to float64


def _statistics(grads: list[Tensor]) -> tuple[float, float, int]:
    """(norm, max |g|, count of non-finite elements) over all gradients; squares are summed in float64 in a fixed order."""
    sums, largest, num_nonfinite = [], 0.0, 0
    for grad in grads:
        flat = grad.reshape(-1)
        for start in range(0, flat.numel(), _SLICE_ELEMENTS):
            part = flat[start : start + _SLICE_ELEMENTS].double()
            sums.append(float(fixed_order_sum(part.square())))
            part_largest = float(part.abs().amax())
            largest = part_largest if part_largest > largest or math.isnan(part_largest) else largest
            num_nonfinite += int(part.numel() - torch.isfinite(part).sum())
    total = math.fsum(sums) if all(map(math.isfinite, sums)) else sum(sums)
    return math.sqrt(total), largest, num_nonfinite


def statistics(grads: list[Tensor]) -> Tensor:
    """float32 [norm, max |g|, count of non-finite]."""
    norm, largest, num_nonfinite = _statistics(grads)
    return torch.tensor([norm, largest, float(num_nonfinite)], dtype=torch.float32, device=grads[0].device if grads else None)


def step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    learning_rate: float, beta1: float, beta2: float, eps: float, weight_decays: list[float], step: int,
    max_norm: float, skip_nonfinite: bool,
) -> Tensor:  # fmt: skip
    """Update all tensors in place; returns float32 [gradient norm before clipping, max |g|, count of non-finite]."""
    norm, largest, num_nonfinite = _statistics(grads)
    device = params[0].device if params else None
    stats = torch.tensor([norm, largest, float(num_nonfinite)], dtype=torch.float32, device=device)
    if skip_nonfinite and num_nonfinite:
        return stats
    clip = 1.0
    if max_norm > 0:  # the formula of torch.nn.utils.clip_grad_norm_
        clip = max_norm / (norm + 1e-6)
        clip = 1.0 if clip > 1.0 else clip
    step_size = learning_rate / (1 - beta1**step)
    root_correction2 = math.sqrt(1 - beta2**step)
    for param, grad, exp_avg, exp_avg_sq, weight_decay in zip(params, grads, exp_avgs, exp_avg_sqs, weight_decays):
        g = grad.to(exp_avg.dtype) * clip
        param.mul_(1 - learning_rate * weight_decay)
        exp_avg.mul_(beta1).add_(g, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        param.addcdiv_(exp_avg, exp_avg_sq.sqrt() / root_correction2 + eps, value=-step_size)
    return stats
