"""Matrix products on a GPU. M rows, K summed over, N columns.

A plain product goes to the vendor's library through torch, which is at the hardware's limit there; where that has no answer (Triton's
interpreter, float32 results of half operands before torch 2.8) and for products that end in more than a rounding (feed_forward.py), the kernels are
ours. Each tile of the result is one block's, and sums over K run in one order: no bit depends on the grid.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.triton.launch import Calls, is_recording, launch
from cllm.runtime.gpu import GPU, allows_tf32, gpu_of

GROUP = tl.constexpr(8)  # tiles of this many rows side by side share columns of B in the L2 cache
SUM_ROWS = 256  # rows whose sums of columns one block makes


@triton.jit
def tile_of(num_m, num_n):
    """The tile of this block: down GROUP rows, then to the next column."""
    index = tl.program_id(0)
    width = GROUP * num_n
    first = index // width * GROUP
    rows = tl.minimum(num_m - first, GROUP)
    return first + index % width % rows, index % width // rows


@triton.jit
def accumulate(
    acc, a_ptr, a_row, a_depth, b_ptr, b_depth, b_column, row, column, num_rows, num_columns, depth, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """acc + A[row, :] B[:, column]."""
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + row.to(tl.int64)[:, None] * a_row + k[None, :] * a_depth
    b_at = b_ptr + k[:, None] * b_depth + column.to(tl.int64)[None, :] * b_column
    # One step even where there is no depth, all of it masked: an accumulator that might skip the loop is copied behind it, and then Triton 3.6 has
    # ptxas serialise wgmma (C7515).
    for first in range(0, tl.maximum(depth, 1), BLOCK_K):
        left = depth - first
        a = tl.load(a_at, mask=(row < num_rows)[:, None] & (k < left)[None, :], other=0.0)
        b = tl.load(b_at, mask=(k < left)[:, None] & (column < num_columns)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_at += tl.cast(a_depth, tl.int64) * BLOCK_K
        b_at += tl.cast(b_depth, tl.int64) * BLOCK_K
    return acc


@triton.jit
def product_kernel(
    a_ptr, b_ptr, a2_ptr, b2_ptr, bias_ptr, out_ptr, a_row, a_depth, b_depth, b_column, a2_row, a2_depth, b2_depth, b2_column, out_row, num_rows,
    num_columns, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A B (+ A2 B2) (+ bias): two products in one sum where there is a second pair."""
    block_m, block_n = tile_of(tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N))
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = accumulate(acc, a_ptr, a_row, a_depth, b_ptr, b_depth, b_column, row, column, num_rows, num_columns, depth, BLOCK_K, PRECISION)
    if a2_ptr is not None:
        acc = accumulate(acc, a2_ptr, a2_row, a2_depth, b2_ptr, b2_depth, b2_column, row, column, num_rows, num_columns, depth, BLOCK_K, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=column < num_columns, other=0.0).to(tl.float32)[None, :]
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * out_row + column[None, :], acc, mask=inside)


@triton.jit
def column_sums_kernel(x_ptr, x_row, x_column, part_ptr, num_rows, num_columns, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    """part[program_id(0)] (C,) = the sums of ROWS rows of x, in order."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([STEP, COLUMNS], tl.float32)
    for first in range(0, ROWS, STEP):
        row = tl.program_id(0).to(tl.int64) * ROWS + first + tl.arange(0, STEP)
        inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
        total += tl.load(x_ptr + row[:, None] * x_row + column.to(tl.int64)[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * num_columns + column
    tl.store(part_ptr + at, tl.sum(total, 0), mask=column < num_columns)


def precision_of(dtype: torch.dtype) -> str:
    """Triton's `input_precision` of a product: for float32 what torch's setting allows; other dtypes are multiplied as they are."""
    return "ieee" if dtype == torch.float32 and not allows_tf32() else "tf32"


def tiles(dtype: torch.dtype, gpu: GPU, num_rows: int, results: int = 1) -> dict[str, Any]:
    """Tile sizes, warps and stages; `results`: tiles of sums that a block holds at once."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32 if results > 1 else 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    deep = gpu.shared_bytes >= 160 << 10
    blackwell = gpu.vendor == "nvidia" and gpu.arch // 10 == 10  # its compiler gives the ends of products few registers
    if num_rows <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 64 // results, "BLOCK_K": 64, "num_warps": 8 if blackwell else 4, "num_stages": 3 if deep else 2}
    columns = 64 if results > 1 or not deep else 128
    rows = 64 if blackwell and results > 1 else 128
    return {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": 64 if deep else 32, "num_warps": 8, "num_stages": 3}


def order(given: dict[str, Any], *more: str) -> dict[str, Any]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", *more, "num_warps", "num_stages")
    return {name: given[name] for name in names}


def product(
    a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype, second: tuple[Tensor, Tensor] | None = None, out: Tensor | None = None
) -> Tensor:
    """a (M, K) @ b (K, N) (+ second[0] @ second[1], of the same shapes) (+ bias) in out_dtype, by our kernel; a and b of one dtype, any strides.

    out (M, N): where the result goes, with dense rows; by default a tensor of its own.
    """
    assert second is None or (second[0].shape == a.shape and second[1].shape == b.shape)
    (num_rows, depth), num_columns = a.shape, b.shape[1]
    out = torch.empty((num_rows, num_columns), dtype=out_dtype, device=a.device) if out is None else out
    if out.numel() == 0:
        return out
    shape = tiles(a.dtype, gpu_of(a.device), num_rows)
    blocks = -(-num_rows // shape["BLOCK_M"]) * -(-num_columns // shape["BLOCK_N"])
    a2, b2 = second or (None, None)
    strides = (*a.stride(), *b.stride(), *((0,) * 4 if a2 is None or b2 is None else (*a2.stride(), *b2.stride())))
    launch(
        product_kernel, (blocks,), a, b, a2, b2, bias, out, *strides, out.stride(0), num_rows, num_columns, depth,
        **order({**shape, "PRECISION": precision_of(a.dtype)}, "PRECISION"),
    )  # fmt: skip
    return out


def _by_library(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype, out: Tensor | None) -> Tensor | None:
    """The product through torch, None where it has no kernel that keeps float32 sums until the one rounding."""
    if a.device.type != "cuda" or is_recording():
        return None
    if out is not None:
        return torch.mm(a, b, out=out) if bias is None and out_dtype == a.dtype else None
    if out_dtype == a.dtype:
        return torch.mm(a, b) if bias is None else torch.addmm(bias.to(a.dtype), a, b)
    if bias is None and out_dtype == torch.float32 and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.ops.aten.mm.dtype(a, b, torch.float32)
    return None


def matmul(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (K, N) + bias (N,), computed in a's dtype with float32 sums, rounded once to `out_dtype`; into `out` (M, N) where it is given.

    A float32 weight beside half activations is rounded once beforehand: the library multiplies one dtype, and the copy is small beside the product.
    """
    b = b.to(a.dtype)
    found = _by_library(a, b, bias, out_dtype, out)
    return product(a, b, bias, out_dtype, out=out) if found is None else found


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (N, C) -> (C,) in dtype: groups of rows, then the groups, each in order."""
    num_rows, num_columns = x.shape
    while True:
        groups = max(1, -(-num_rows // SUM_ROWS))
        part = torch.empty((groups, num_columns), dtype=dtype if groups == 1 else torch.float32, device=x.device)
        launch(
            column_sums_kernel, (groups, -(-num_columns // 64)), x, *x.stride(), part, num_rows, num_columns,
            ROWS=SUM_ROWS, STEP=32, COLUMNS=64,
        )  # fmt: skip
        if groups == 1:
            return part[0]
        x, num_rows = part, groups


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    bias = empty(2304)
    for rows in (32, 4096):
        x, weight, dy = empty(rows, 768), empty(2304, 768), empty(rows, 2304)
        yield f"matmul {rows} forward", partial(matmul, x, weight.T, bias, dtype)
        yield f"matmul {rows} dX", partial(matmul, dy, weight, None, dtype)
        yield f"matmul {rows} dW", partial(matmul, dy.T, x, None, torch.float32)
    yield "column sums", partial(column_sums, empty(4096, 2304), torch.float32)
