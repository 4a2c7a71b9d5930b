"""Cross entropy of `x @ weight.T` in plain torch, a chunk of rows at a time, so that all logits never exist at once.

N rows, E embed, V vocabulary. The logits of a chunk stay in the accumulation dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cllm.kernels.torch import accumulate_dtype, cross_entropy, rounded_weight

_CHUNK_ELEMENTS = 1 << 22  # as many logits are held at a time: 16 MB in float32


def _row_chunks(num_rows: int, vocab_size: int) -> list[slice]:
    rows = max(1, _CHUNK_ELEMENTS // max(1, vocab_size))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _concatenated(parts: Sequence[tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    if not parts:
        empty = x.new_zeros(0, dtype=accumulate_dtype(x.dtype))
        return empty, empty.clone(), empty.bool(), empty.clone()
    return tuple(torch.cat(column) for column in zip(*parts))


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float
) -> tuple[Tensor, ...]:
    """(total loss, plain cross entropy, correct, log-sum-exp), each (N,)."""
    wide_weight = rounded_weight(weight, x.dtype)
    parts = []
    for rows in _row_chunks(x.shape[0], weight.shape[0]):
        logits = x[rows].to(wide_weight.dtype) @ wide_weight.T
        parts.append(cross_entropy.forward(logits, targets[rows], ignore_index, label_smoothing, z_loss, softcap))
    return _concatenated(parts, x)


def forward_with_grads(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `forward`, and the gradients of scale * sum(total loss) with respect to x and weight, while the logits are at hand."""
    wide_weight = rounded_weight(weight, x.dtype)
    dx, dweight = torch.zeros_like(x, memory_format=torch.contiguous_format), torch.zeros_like(wide_weight)
    parts = []
    for rows in _row_chunks(x.shape[0], weight.shape[0]):
        wide_x = x[rows].to(wide_weight.dtype)
        logits = wide_x @ wide_weight.T
        part = cross_entropy.forward(logits, targets[rows], ignore_index, label_smoothing, z_loss, softcap)
        parts.append(part)
        dlosses = torch.full_like(part[3], scale)
        dlogits = cross_entropy.logit_gradient(dlosses, logits, targets[rows], part[3], ignore_index, label_smoothing, z_loss, softcap)
        dx[rows] = (dlogits @ wide_weight).to(x.dtype)
        dweight += dlogits.T @ wide_x
    return *_concatenated(parts, x), dx, dweight.to(weight.dtype)


def backward(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and weight, given the gradient of each row's total loss; the logits are computed again."""
    wide_weight = rounded_weight(weight, x.dtype)
    dx, dweight = torch.zeros_like(x, memory_format=torch.contiguous_format), torch.zeros_like(wide_weight)
    for rows in _row_chunks(x.shape[0], weight.shape[0]):
        wide_x = x[rows].to(wide_weight.dtype)
        dlogits = cross_entropy.logit_gradient(
            dlosses[rows], wide_x @ wide_weight.T, targets[rows], lse[rows], ignore_index, label_smoothing, z_loss, softcap
        )
        dx[rows] = (dlogits @ wide_weight).to(x.dtype)
        dweight += dlogits.T @ wide_x
    return dx, dweight.to(weight.dtype)
