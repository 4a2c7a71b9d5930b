"""The feed-forward layer on a GPU (gated: Shazeer 2020, arXiv 2002.05202): the activation and its derivative are ends of matrix products.

N rows, E embed, F hidden. Forward: one kernel multiplies x with the gate's and the up weights at once and ends with the activation. Backward: the
product dy W_down ends with the derivative, and leaves dz, dup and the hidden values; dx is one sum of two products.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.torch import as_rows
from cllm.kernels.triton.activation import KINDS, activate, slope
from cllm.kernels.triton.launch import Calls, launch
from cllm.kernels.triton.matmul import accumulate, column_sums, matmul, order, precision_of, product, tile_of, tiles
from cllm.runtime.gpu import GPU, gpu_of


@triton.jit
def activated_kernel(
    x_ptr, gate_ptr, up_ptr, bias_ptr, hidden_ptr, z_ptr, kept_up_ptr, x_row, x_depth, gate_depth, gate_column, up_depth, up_column, num_rows,
    num_columns, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden = act(x Wg) (x Wu + b), or act(x Wu + b) without a gate. What is activated is rounded first, as it is kept for the backward."""
    block_m, block_n = tile_of(tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N))
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    DTYPE: tl.constexpr = hidden_ptr.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_row + k[None, :] * x_depth
    up_at = up_ptr + k[:, None] * up_depth + column.to(tl.int64)[None, :] * up_column
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if gate_ptr is not None:
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        gate_at = gate_ptr + k[:, None] * gate_depth + column.to(tl.int64)[None, :] * gate_column
    for first in range(0, depth, BLOCK_K):
        left = depth - first
        x = tl.load(x_at, mask=(row < num_rows)[:, None] & (k < left)[None, :], other=0.0)
        here = (k < left)[:, None] & (column < num_columns)[None, :]
        if gate_ptr is not None:
            gate = tl.dot(x, tl.load(gate_at, mask=here, other=0.0), gate, input_precision=PRECISION)
            gate_at += tl.cast(gate_depth, tl.int64) * BLOCK_K
        up = tl.dot(x, tl.load(up_at, mask=here, other=0.0), up, input_precision=PRECISION)
        x_at += tl.cast(x_depth, tl.int64) * BLOCK_K
        up_at += tl.cast(up_depth, tl.int64) * BLOCK_K
    if bias_ptr is not None:
        up += tl.load(bias_ptr + column, mask=column < num_columns, other=0.0).to(tl.float32)[None, :]
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    at = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    up = up.to(DTYPE)
    if gate_ptr is not None:
        z = gate.to(DTYPE)
        hidden = activate(z.to(tl.float32), KIND) * up.to(tl.float32)
        if kept_up_ptr is not None:
            tl.store(kept_up_ptr + at, up, mask=inside)
    else:
        z = up
        hidden = activate(z.to(tl.float32), KIND)
    if z_ptr is not None:
        tl.store(z_ptr + at, z, mask=inside)
    tl.store(hidden_ptr + at, hidden, mask=inside)


@triton.jit
def differentiated_kernel(
    dy_ptr, down_ptr, z_ptr, up_ptr, hidden_ptr, dz_ptr, dup_ptr, dy_row, dy_depth, down_depth, down_column, num_rows, num_columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dhidden = dy W_down, and with it dz = dhidden act'(z) (up), dup = dhidden act(z), hidden = act(z) (up)."""
    block_m, block_n = tile_of(tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N))
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dhidden = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dhidden = accumulate(
        dhidden, dy_ptr, dy_row, dy_depth, down_ptr, down_depth, down_column, row, column, num_rows, num_columns, depth, BLOCK_K, PRECISION
    )  # fmt: skip
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    at = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    hidden = activate(z, KIND)
    dz = dhidden * slope(z, KIND)
    if up_ptr is not None:
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dup_ptr + at, dhidden * hidden, mask=inside)
        hidden = hidden * up
        dz = dz * up
    tl.store(dz_ptr + at, dz, mask=inside)
    tl.store(hidden_ptr + at, hidden, mask=inside)


def _activated(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, b_up: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(hidden, z, up), all (N, F) in x's dtype; the last two only when `keep`, up only when gated."""
    shape, depth = (x.shape[0], w_up.shape[0]), x.shape[1]
    hidden = torch.empty(shape, dtype=x.dtype, device=x.device)
    z = torch.empty_like(hidden) if keep else None
    up = torch.empty_like(hidden) if keep and w_gate is not None else None
    if hidden.numel():
        given: dict[str, Any] = tiles(x.dtype, gpu_of(x.device), shape[0], 1 if w_gate is None else 2)
        blocks = -(-shape[0] // given["BLOCK_M"]) * -(-shape[1] // given["BLOCK_N"])
        gate_strides = (0, 0) if w_gate is None else (w_gate.stride(1), w_gate.stride(0))
        launch(
            activated_kernel, (blocks,), x, w_gate, w_up, b_up, hidden, z, up, *x.stride(), *gate_strides, w_up.stride(1), w_up.stride(0), *shape,
            depth,
            **order({**given, "KIND": KINDS[activation], "PRECISION": precision_of(x.dtype)}, "KIND", "PRECISION"),
        )  # fmt: skip
    return hidden, z, up


def _rounded(weight: Tensor | None, dtype: torch.dtype) -> Any:
    """float32 masters become halves once: each tile of a weight is read by every block of rows."""
    return None if weight is None else weight.to(dtype)


def forward(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str, b_up: Tensor | None, b_down: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, z, up); z and up (N, F) in x's dtype only when `keep`, up only when gated."""
    hidden, z, up = _activated(as_rows(x), _rounded(w_gate, x.dtype), _rounded(w_up, x.dtype), b_up, activation, keep)
    y = matmul(hidden, w_down.T, b_down, x.dtype)
    return y.view(*x.shape[:-1], w_down.shape[0]), z, up


def backward(
    dy: Tensor, x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str,
    b_up: Tensor | None, b_down: Tensor | None, kept_z: Tensor | None, kept_up: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients (dx, dw_gate, dw_up, dw_down, db_up, db_down); z and up are computed again where they were not kept."""
    rows, drows, dtype = as_rows(x), as_rows(dy), x.dtype
    gate, up_weight, down = (_rounded(weight, dtype) for weight in (w_gate, w_up, w_down))
    z, up = (kept_z, kept_up) if kept_z is not None else _activated(rows, gate, up_weight, b_up, activation, True)[1:]
    assert z is not None
    hidden, dz = torch.empty_like(z), torch.empty_like(z)
    dup = None if w_gate is None else torch.empty_like(z)
    if z.numel():
        given = tiles(dtype, gpu_of(x.device), z.shape[0], 2)  # z, up and what comes of them beside the sums
        blocks = -(-z.shape[0] // given["BLOCK_M"]) * -(-z.shape[1] // given["BLOCK_N"])
        launch(
            differentiated_kernel, (blocks,), drows, down, z, up, hidden, dz, dup, *drows.stride(), *down.stride(), *z.shape, down.shape[0],
            **order({**given, "KIND": KINDS[activation], "PRECISION": precision_of(dtype)}, "KIND", "PRECISION"),
        )  # fmt: skip
    if dup is None:
        dx, dup, dw_gate = matmul(dz, up_weight, None, dtype), dz, None
    else:
        dx = product(dz, gate, None, dtype, second=(dup, up_weight))
        dw_gate = _weight_gradient(dz, rows, w_gate)
    return (
        dx.view(x.shape),
        dw_gate,
        _weight_gradient(dup, rows, w_up),
        _weight_gradient(drows, hidden, w_down),
        None if b_up is None else column_sums(dup, b_up.dtype),
        None if b_down is None else column_sums(drows, b_down.dtype),
    )


def _weight_gradient(doutput: Tensor, inputs: Tensor, weight: Any) -> Tensor:
    """doutput^T inputs in the weight's dtype and layout."""
    if weight.stride(1) != 1 and weight.stride(0) == 1:
        return matmul(inputs.T, doutput, None, weight.dtype).T
    return matmul(doutput.T, inputs, None, weight.dtype)


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    for rows in (32, 4096):
        x, up, down, z = empty(rows, 768), empty(2048, 768), empty(768, 2048), empty(rows, 2048)
        conv_up, conv_down, bias = empty(768, 2048).T, empty(2048, 768).T, empty(2048, of=torch.float32)
        for activation in KINDS if dtype == torch.bfloat16 and rows > 32 else ("silu", "gelu"):
            yield f"gated {activation} {rows} forward", partial(forward, x, up, up, down, activation, None, None, True)
            yield f"gated {activation} {rows} backward", partial(backward, x, x, up, up, down, activation, None, None, z, z)
            yield f"plain {activation} {rows} forward", partial(forward, x, None, conv_up, conv_down, activation, bias, bias[:768], True)
            yield f"plain {activation} {rows} backward", partial(backward, x, x, None, conv_up, conv_down, activation, bias, bias[:768], z, None)
