"""Weights as int8 with a float32 scale for every SCALE_BLOCK elements of a row: 8.5 bits each, for generation.

Symmetric, to nearest: w = q * s with s = max |w| / 127 over the block, q in -127 .. 127 (the blocks of GGUF's q8_0 are half as long). On a CPU,
bfloat16 activations become integers of 16 bits, scaled by their largest in each block of K, and the products of a block are summed exactly, with
the same bits on every processor. Elsewhere, and for float32, it is the product with the dequantised weights.

N outputs, K inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.kernels.strips import STRIP, by_rows, by_strips
from cllm.runtime.errors import UserError

SCALE_BLOCK = 64  # elements of one scale


@dataclass(frozen=True)
class Quantized:
    """A matrix (N, K) in the order in which decoding reads it: STRIP rows at a time, and of each four elements at a time.

    values int8 (strips, blocks, SCALE_BLOCK / 4, STRIP, 4), 0 beyond the edges; scales float32 (strips, blocks, STRIP).
    """

    values: Tensor
    scales: Tensor
    shape: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        return self.values.numel() + 4 * self.scales.numel()

    def rows(self, begin: int, end: int) -> "Quantized":
        """Some of the rows; a view where they begin with a strip."""
        shape = (end - begin, self.shape[1])
        if begin % STRIP == 0:
            strips = slice(begin // STRIP, -(-end // STRIP))
            return Quantized(self.values[strips], self.scales[strips], shape)
        values = by_strips(by_rows(self.values.permute(0, 3, 1, 2, 4))[begin:end]).unflatten(2, (-1, SCALE_BLOCK // 4, 4))
        scales = by_strips(by_rows(self.scales.transpose(1, 2))[begin:end])
        return Quantized(values.permute(0, 2, 3, 1, 4).contiguous(), scales.transpose(1, 2).contiguous(), shape)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(N, K) in `dtype`, each q * s rounded once."""
        wide = self.values.permute(0, 3, 1, 2, 4).flatten(3).float() * self.scales.transpose(1, 2)[..., None]
        return by_rows(wide)[: self.shape[0], : self.shape[1]].to(dtype)


def quantize(weight: Tensor) -> Quantized:
    """weight (N, K), any floating dtype and strides. Raises UserError for anything else, and for weights that are not finite."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise UserError(f"quantize: expected a floating-point matrix (N, K), got {tuple(weight.shape)} of {weight.dtype}.")
    rows, depth = weight.shape
    wide = by_strips(torch.nn.functional.pad(weight.detach().float(), (0, -depth % SCALE_BLOCK))).unflatten(2, (-1, SCALE_BLOCK))
    scales = wide.abs().amax(dim=3) / 127.0  # (strips, STRIP, blocks)
    if not bool(scales.isfinite().all()):
        raise UserError("quantize: the weights hold NaN or infinity, which int8 cannot. Train or load them again.")
    inverse = torch.where(scales > 0, 1.0 / scales, 0.0).nan_to_num_(posinf=0.0)  # a block of denormals becomes 0
    values = (wide * inverse[..., None]).round_().clamp_(-127, 127).to(torch.int8).unflatten(3, (-1, 4))
    return Quantized(values.permute(0, 2, 3, 1, 4).contiguous(), scales.transpose(1, 2).contiguous(), (rows, depth))
