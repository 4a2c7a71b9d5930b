"""Cross entropy of x @ weight.T on a GPU, a chunk of rows at a time: logits, losses and the gradient of the logits in one buffer, then the products
of that gradient. N rows, E embed, V vocabulary.

Adding a chunk's part to the gradient of the weight costs a pass over it, whatever the chunk's size, so chunks are as large as a budget of bytes
allows: one, where that is enough.
"""

from functools import partial

import torch
from torch import Tensor

from cllm.kernels.triton.cross_entropy import empty_statistics, run_rows
from cllm.kernels.triton.launch import Calls
from cllm.kernels.triton.matmul import matmul
from cllm.runtime.gpu import GPU, gpu_of

LOGIT_BYTES = 1 << 30
LOGIT_SHARE = 64  # and at most this part of the GPU's memory
FEWEST_ROWS = 4096
ROW_MULTIPLE = 64  # elements from one row of logits to the next: rows that begin anywhere are read two bytes at a time, and multiplied more slowly


def _row_stride(vocabulary: int) -> int:
    return -(-vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE


def row_chunks(num_rows: int, vocabulary: int, dtype: torch.dtype, gpu: GPU) -> list[slice]:
    """Equal chunks, from the shape and the GPU's memory alone."""
    budget = min(LOGIT_BYTES, gpu.memory_bytes // LOGIT_SHARE)
    most = max(1, min(FEWEST_ROWS, num_rows), budget // (_row_stride(vocabulary) * dtype.itemsize))
    count = max(1, -(-num_rows // most))
    rows = -(-num_rows // count)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)] if num_rows else []


class _Pass:
    """One walk over the chunks."""

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor, options: tuple[int, float, float, float]):
        self.x, self.targets, self.options = x.contiguous(), targets.contiguous(), options
        self.weight = weight.to(x.dtype)  # rounded once: each tile of it is read by every chunk
        self.dtype = weight.dtype
        self.chunks = row_chunks(x.shape[0], weight.shape[0], x.dtype, gpu_of(x.device))

    def run(
        self, statistics: tuple[Tensor, Tensor, Tensor, Tensor] | None, lse: Tensor, upstream: Tensor | float | None
    ) -> tuple[Tensor, Tensor] | None:
        """Gradients (dx, dweight) where there is an upstream gradient, for each row or one for all."""
        dx, dweight = torch.empty_like(self.x), None
        vocabulary = self.weight.shape[0]
        for rows in self.chunks:
            x = self.x[rows]
            logits = torch.empty((x.shape[0], _row_stride(vocabulary)), dtype=x.dtype, device=x.device)[:, :vocabulary]
            logits = matmul(x, self.weight.T, None, x.dtype, out=logits)
            part = None if statistics is None else (statistics[0][rows], statistics[1][rows], statistics[2][rows], statistics[3][rows])
            from_above = upstream[rows] if isinstance(upstream, Tensor) else 0.0 if upstream is None else upstream
            run_rows(logits, None if upstream is None else logits, self.targets[rows], from_above, part, lse[rows], *self.options)
            if upstream is None:
                continue
            dx[rows] = matmul(logits, self.weight, None, x.dtype)
            several = len(self.chunks) > 1
            share = matmul(logits.T, x, None, torch.float32 if several else self.dtype)
            dweight = share if dweight is None else dweight.add_(share)
        if upstream is None:
            return None
        if dweight is None:
            dweight = torch.zeros(self.weight.shape, dtype=self.dtype, device=self.x.device)
        return dx, dweight.to(self.dtype)


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float
) -> tuple[Tensor, ...]:
    """(total loss, plain cross entropy, correct, log-sum-exp), each (N,)."""
    statistics = empty_statistics(x.shape[0], x.device)
    _Pass(x, weight, targets, (ignore_index, label_smoothing, z_loss, softcap)).run(statistics, statistics[3], None)
    return statistics


def forward_with_grads(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, scale: float
) -> tuple[Tensor, ...]:
    """As `forward`, and the gradients of scale * sum(total loss) with respect to x and weight, while the logits are at hand."""
    statistics = empty_statistics(x.shape[0], x.device)
    gradients = _Pass(x, weight, targets, (ignore_index, label_smoothing, z_loss, softcap)).run(statistics, statistics[3], scale)
    assert gradients is not None
    return *statistics, *gradients


def backward(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, given the gradient of each row's total loss; the logits are computed again."""
    walk = _Pass(x, weight, targets, (ignore_index, label_smoothing, z_loss, softcap))
    gradients = walk.run(None, lse.to(torch.float32).contiguous(), dlosses.to(torch.float32))
    assert gradients is not None
    return gradients


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    x, weight = torch.empty((8192, 768), dtype=dtype, device="meta"), torch.empty((50304, 768), dtype=torch.float32, device="meta")
    targets, per_row = torch.empty(8192, dtype=torch.int64, device="meta"), torch.empty(8192, device="meta")
    for options in ((-100, 0.0, 0.0, 0.0), (-100, 0.1, 1e-4, 30.0)):
        yield "linear cross entropy", partial(forward, x, weight, targets, *options)
        yield "linear cross entropy with gradients", partial(forward_with_grads, x, weight, targets, *options, 1e-4)
        yield "linear cross entropy backward", partial(backward, per_row, x, weight, targets, per_row, *options)
