"""Cross entropy of given logits in plain torch. N rows, V vocabulary.

With z = softcap * tanh(logits / softcap), or the logits themselves:
    plain = logsumexp(z) - z[target]
    total = (1 - label_smoothing) * plain + label_smoothing * (logsumexp(z) - mean(z)) + z_loss * logsumexp(z)^2
Rows whose target is `ignore_index` have loss 0, are never correct, and pass no gradient.
"""

import torch
from torch import Tensor

from cllm.kernels.torch import accumulate_dtype


def capped(logits: Tensor, softcap: float) -> Tensor:
    z = logits.to(accumulate_dtype(logits.dtype))
    return softcap * torch.tanh(z / softcap) if softcap else z


def forward(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total loss, plain cross entropy, correct, log-sum-exp), each (N,); correct means that the first maximum is the target."""
    z = capped(logits, softcap)
    valid = targets != ignore_index
    target = targets.masked_fill(~valid, 0)
    lse = torch.logsumexp(z, dim=-1)
    log_p = torch.log_softmax(z, dim=-1)  # z - lse, without the cancellation where all logits share a large offset
    plain = -log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    total = plain
    if label_smoothing:
        total = (1 - label_smoothing) * plain - label_smoothing * log_p.mean(dim=-1)
    if z_loss:
        total = total + z_loss * lse.square()
    correct = (torch.argmax(z, dim=-1) == target) & valid
    return torch.where(valid, total, 0.0), torch.where(valid, plain, 0.0), correct, lse


def backward(
    dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Gradient of the logits, given the gradient of each row's total loss."""
    return logit_gradient(dlosses, logits, targets, lse, ignore_index, label_smoothing, z_loss, softcap).to(logits.dtype)


def logit_gradient(
    dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    """As `backward`, not yet rounded to the dtype of the logits."""
    z = capped(logits, softcap)
    valid = (targets != ignore_index).unsqueeze(1)
    lse = lse.to(z.dtype).unsqueeze(1)
    dz = torch.exp(z - lse)
    if z_loss:
        dz = dz * (1 + 2 * z_loss * lse)
    if label_smoothing:
        dz = dz - label_smoothing / logits.shape[1]
    target = targets.unsqueeze(1).masked_fill(~valid, 0)
    dz = dz.scatter_add(1, target, torch.full_like(lse, label_smoothing - 1.0))
    if softcap:
        dz = dz * (1 - (z / softcap).square())
    return torch.where(valid, dz * dlosses.to(z.dtype).unsqueeze(1), 0.0)
