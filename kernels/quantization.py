"""Weights as int8 with a float32 scale for every SCALE_BLOCK elements of a row, 8.5 bits each, or as int4 with a bfloat16 scale for every
SCALE_GROUP, 4.5 bits each: for generation.

Rows of activations, such as cached keys and values, as int8 with one float32 scale each (`quantize_rows`).

Symmetric, to nearest. int8: w = q * s with s = max |w| / 127 over the block, q in -127 .. 127 (the blocks of GGUF's q8_0 are half as long). int4: q
in -8 .. 7, with the scale of least squared error of a few (GGUF's q4_0 takes max / -8, and a scale of float16). On a CPU, bfloat16 activations become
integers of 16 bits, scaled by their largest in each block of K, and the products of a block are summed exactly, with the same bits on every
processor. Elsewhere, and for float32, it is the product with the dequantised weights.

N outputs, K inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.kernels.strips import STRIP, by_rows, by_strips
from cllm.runtime.errors import UserError

SCALE_BLOCK = 64  # elements of one scale of int8, and of one scale of the activations
SCALE_GROUP = 32  # elements of one scale of int4
CHUNK_ROWS = 1024  # rows that are quantised to int4 at a time, to bound the memory that it takes


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

    def moved(self, copy: Callable[[Tensor], Tensor]) -> "Quantized":
        """The same in other memory."""
        return Quantized(copy(self.values), copy(self.scales), self.shape)

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


@dataclass(frozen=True)
class Quantized4:
    """A matrix (N, K) of int4 in the order in which decoding reads it: STRIP rows at a time, and of each eight elements at a time.

    values uint8 (strips, groups, SCALE_GROUP / 8, STRIP, 4): q + 8 of two neighbours in a byte, the first in its low half; the bytes of eight
    elements are those of (0, 1), (4, 5), (2, 3), (6, 7). scales bfloat16 (strips, groups, STRIP); the number of groups is even.
    """

    values: Tensor
    scales: Tensor
    shape: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        return self.values.numel() + 2 * self.scales.numel()

    def moved(self, copy: Callable[[Tensor], Tensor]) -> "Quantized4":
        """The same in other memory."""
        return Quantized4(copy(self.values), copy(self.scales), self.shape)

    def rows(self, begin: int, end: int) -> "Quantized4":
        """Some of the rows; a view where they begin with a strip."""
        shape = (end - begin, self.shape[1])
        if begin % STRIP == 0:
            strips = slice(begin // STRIP, -(-end // STRIP))
            return Quantized4(self.values[strips], self.scales[strips], shape)
        values = by_strips(by_rows(self.values.permute(0, 3, 1, 2, 4))[begin:end]).unflatten(2, (-1, SCALE_GROUP // 8, 4))
        scales = by_strips(by_rows(self.scales.transpose(1, 2))[begin:end])
        return Quantized4(values.permute(0, 2, 3, 1, 4).contiguous(), scales.transpose(1, 2).contiguous(), shape)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(N, K) in `dtype`, each q * s rounded once."""
        pairs = self.values.permute(0, 3, 1, 2, 4)[..., [0, 2, 1, 3]]  # (strips, STRIP, groups, SCALE_GROUP / 8, 4)
        q = torch.stack((pairs & 15, pairs >> 4), dim=5).flatten(3).float() - 8.0
        return by_rows(q * self.scales.float().transpose(1, 2)[..., None])[: self.shape[0], : self.shape[1]].to(dtype)


def quantize4(weight: Tensor) -> Quantized4:
    """weight (N, K), any floating dtype and strides. Raises UserError for anything else, and for weights that are not finite."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise UserError(f"quantize4: expected a floating-point matrix (N, K), got {tuple(weight.shape)} of {weight.dtype}.")
    rows, depth = weight.shape
    parts = [_int4_rows(weight[first : first + CHUNK_ROWS].detach()) for first in range(0, rows, CHUNK_ROWS)]
    values, scales = (torch.cat(each) for each in zip(*parts))
    return Quantized4(values, scales, (rows, depth))


def _int4_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales of some rows."""
    wide = by_strips(torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % SCALE_BLOCK))).unflatten(2, (-1, SCALE_GROUP))
    if not bool(wide.isfinite().all()):
        raise UserError("quantize4: the weights hold NaN or infinity, which int4 cannot. Train or load them again.")
    largest = wide.gather(3, wide.abs().argmax(3, keepdim=True))  # (strips, STRIP, groups, 1), with its sign
    best = torch.full_like(largest, torch.inf)
    scale = torch.zeros_like(largest)
    # The largest becomes -8 or a little less far, where the others then fall better; or 7, where there is another of its size and other sign.
    for level in (-8.0, -8.5, -7.6, -7.2, -6.8, 7.0):
        tried = (largest / level).bfloat16().float()
        q = _int4_levels(wide, tried)
        fitted = ((wide * q).sum(3, keepdim=True) / (q * q).sum(3, keepdim=True).clamp_min(1.0)).bfloat16().float()  # least squares for these levels
        for each in (tried, fitted):
            error = (wide - _int4_levels(wide, each) * each).square().sum(3, keepdim=True)
            scale = torch.where(error < best, each, scale)
            best = torch.minimum(error, best)
    levels = (_int4_levels(wide, scale) + 8.0).to(torch.uint8).unflatten(3, (-1, 4, 2))
    values = (levels[..., 0] | levels[..., 1] << 4)[..., [0, 2, 1, 3]]  # (strips, STRIP, groups, SCALE_GROUP / 8, 4)
    return values.permute(0, 2, 3, 1, 4).contiguous(), scale.squeeze(3).bfloat16().transpose(1, 2).contiguous()


def _int4_levels(wide: Tensor, scale: Tensor) -> Tensor:
    """-8 .. 7; 0 where the scale is, or is so small that its inverse is none."""
    inverse = torch.where(scale != 0, 1.0 / scale, 0.0).nan_to_num_(posinf=0.0, neginf=0.0)
    return (wide * inverse).round_().clamp_(-8, 7)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) of any floating dtype -> values (..., D) int8 and scales (...) float32: x is about q * s with s = max |x| / 127 over the row, and q
    the nearest whole number, of two the even one.

    A row depends on nothing but itself. One that holds NaN or infinity gets the scale NaN, so that whatever looks at it shows that it is damaged.
    """
    wide = x.detach().float()
    largest = wide.abs().amax(-1)
    finite = largest < torch.inf
    scales = torch.where(finite, largest / 127.0, torch.nan)
    divisor = torch.where(scales > 0, scales, 1.0)[..., None]  # of denormals there may be no 127th part
    values = (wide / divisor).round_().clamp_(-127, 127)
    return torch.where(finite[..., None], values, 0.0).to(torch.int8), scales


def dequantize_rows(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """values (..., D) int8, scales (...) float32 -> (..., D) in `dtype`, each q * s rounded once more where that has fewer bits than float32."""
    return (values.float() * scales[..., None]).to(dtype)
