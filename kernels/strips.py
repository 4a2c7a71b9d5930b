"""Weights in the order in which decoding on a CPU reads them: packed once for inference, in the place of the matrix.

A product of a few rows spends its time waiting for the weights. Rows of a matrix would have to be transposed block by block on their way to the
registers, for every token; strips are read from the first byte to the last. The numbers are those of the matrix, and so are a product's bits.

N outputs, K inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cllm.runtime.errors import UserError

STRIP = 16  # rows that kernels take together
_DEPTH_STEP = 32  # K is padded to a multiple with 0, so that kernels read whole registers


@dataclass(frozen=True)
class Strips:
    """A matrix (N, K) of STRIP rows at a time, 0 beyond the edges.

    values: float32 (strips, K, STRIP), or bfloat16 (strips, K / 2, STRIP, 2), whose two are neighbours along K.
    """

    values: Tensor
    shape: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def moved(self, copy: Callable[[Tensor], Tensor]) -> "Strips":
        """The same in other memory."""
        return Strips(copy(self.values), self.shape)

    def rows(self, begin: int, end: int) -> "Strips":
        """Some of the rows; a view where they begin with a strip."""
        if begin % STRIP == 0:
            return Strips(self.values[begin // STRIP : -(-end // STRIP)], (end - begin, self.shape[1]))
        return pack(self.dense(self.dtype)[begin:end], self.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K)."""
        order = (0, 2, 1, 3) if self.values.dim() == 4 else (0, 2, 1)
        return by_rows(self.values.permute(order))[: self.shape[0], : self.shape[1]].to(dtype)

    def t(self) -> "Columns":
        """The matrix (K, N) as the right-hand side of a product."""
        return Columns(self, (self.shape[1], self.shape[0]))


class Columns(NamedTuple):
    """The transpose of strips, (K, N)."""

    strips: Strips
    shape: tuple[int, int]


def by_rows(strips: Tensor) -> Tensor:
    """(strips, STRIP, ...) -> (rows, elements)."""
    return strips.flatten(2).flatten(0, 1)


def by_strips(rows: Tensor) -> Tensor:
    """(rows, elements) -> (strips, STRIP, elements), padded with 0."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % STRIP)).unflatten(0, (-1, STRIP))


def pack(weight: Tensor, dtype: torch.dtype) -> Strips:
    """weight (N, K), any strides, rounded to `dtype` (float32 or bfloat16). Raises UserError for anything else."""
    if weight.dim() != 2 or not weight.is_floating_point() or dtype not in (torch.float32, torch.bfloat16):
        raise UserError(f"pack: expected a floating-point matrix (N, K), float32 or bfloat16, got {tuple(weight.shape)} of {weight.dtype}, {dtype}.")
    strips = by_strips(torch.nn.functional.pad(weight.detach().to(dtype), (0, -weight.shape[1] % _DEPTH_STEP)))
    values = strips.transpose(1, 2) if dtype == torch.float32 else strips.unflatten(2, (-1, 2)).transpose(1, 2)
    return Strips(values.contiguous(), (weight.shape[0], weight.shape[1]))
