"""Feed-forward layer on the CPU: row blocks whose hidden values are made, activated and consumed before the next block.

N rows, E embed, F hidden. Hidden values stay float32 until they feed the next product, so nothing is rounded twice.
Only x is kept for the backward, which makes the hidden values again.
"""

import math

import numba
import numpy as np
import torch

from cllm.kernels.cpu.gemm import Packed, gemm, workers_for
from cllm.kernels.cpu.simd import (
    W,
    vadd,
    vdiv,
    verf,
    vexp,
    vfma,
    vload,
    vmax,
    vmul,
    vneg,
    vset,
    vstore,
    vstore_bf16,
    vsub,
    vtanh,
    vzero,
)
from cllm.runtime import threads

_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3}
_HIDDEN_BYTES = 16 << 20  # float32 hidden values of one row block
_BLOCK = 8192  # elements of one task of the activation kernels

_ONE, _HALF, _TWO = np.float32(1.0), np.float32(0.5), np.float32(2.0)
_SQRT_HALF = np.float32(math.sqrt(0.5))
_INV_SQRT_2PI = np.float32(1.0 / math.sqrt(2.0 * math.pi))
_SQRT_2_OVER_PI = np.float32(math.sqrt(2.0 / math.pi))
_CUBIC = np.float32(0.044715)


@numba.njit(cache=True, nogil=True)
def _store(half, address, i, v):
    if half:
        vstore_bf16(address, i, v)
    else:
        vstore(address, i, v)


@numba.njit(cache=True, nogil=True)
def _activate(code, gated, half, start, stop, z_at, up_at, hidden_at):
    """hidden = activation(z), times up when gated. start, stop: multiples of W."""
    one = vset(_ONE)
    for i in range(start, stop, W):
        z = vload(z_at, i)
        if code == 0:
            h = vdiv(z, vadd(one, vexp(vneg(z))))
        elif code == 1:
            h = vmul(vmul(vset(_HALF), z), vadd(one, verf(vmul(z, vset(_SQRT_HALF)))))
        elif code == 2:
            inner = vmul(vset(_SQRT_2_OVER_PI), vfma(vmul(vmul(vset(_CUBIC), z), z), z, z))
            h = vmul(vmul(vset(_HALF), z), vadd(one, vtanh(inner)))
        else:
            h = vmax(vzero(), z)
            h = vmul(h, h)
        if gated:
            h = vmul(h, vload(up_at, i))
        _store(half, hidden_at, i, h)


@numba.njit(cache=True, nogil=True)
def _differentiate(code, gated, half, start, stop, z_at, up_at, dhidden_at, hidden_at, dz_at, dup_at):
    """From z, up and the gradient of hidden: hidden again, and the gradients of z and up."""
    one = vset(_ONE)
    for i in range(start, stop, W):
        z, dh = vload(z_at, i), vload(dhidden_at, i)
        if code == 0:
            s = vdiv(one, vadd(one, vexp(vneg(z))))
            h = vmul(z, s)
            slope = vmul(s, vfma(z, vsub(one, s), one))
        elif code == 1:
            share = vmul(vset(_HALF), vadd(one, verf(vmul(z, vset(_SQRT_HALF)))))
            h = vmul(z, share)
            density = vmul(vexp(vmul(vmul(z, z), vneg(vset(_HALF)))), vset(_INV_SQRT_2PI))
            slope = vfma(z, density, share)
        elif code == 2:
            square = vmul(z, z)
            t = vtanh(vmul(vset(_SQRT_2_OVER_PI), vfma(vmul(vset(_CUBIC), square), z, z)))
            share = vmul(vset(_HALF), vadd(one, t))
            h = vmul(z, share)
            inner = vmul(vset(_SQRT_2_OVER_PI), vfma(vset(np.float32(3.0) * _CUBIC), square, one))
            slope = vfma(vmul(vmul(vset(_HALF), z), vfma(vneg(t), t, one)), inner, share)
        else:
            r = vmax(vzero(), z)
            h = vmul(r, r)
            slope = vmul(vset(_TWO), r)
        if gated:
            up = vload(up_at, i)
            _store(half, dup_at, i, vmul(dh, h))
            h = vmul(h, up)
            dh = vmul(dh, up)
        _store(half, hidden_at, i, h)
        _store(half, dz_at, i, vmul(dh, slope))


@numba.njit(cache=True, nogil=True, parallel=True)
def _run(backward, code, gated, half, size, z_at, up_at, dhidden_at, hidden_at, dz_at, dup_at, workers):
    tasks = (size + _BLOCK - 1) // _BLOCK
    for worker in numba.prange(workers):
        for task in range(worker, tasks, workers):
            start, stop = task * _BLOCK, min(size, (task + 1) * _BLOCK)
            if backward:
                _differentiate(code, gated, half, start, stop, z_at, up_at, dhidden_at, hidden_at, dz_at, dup_at)
            else:
                _activate(code, gated, half, start, stop, z_at, up_at, hidden_at)


class _Hidden:
    """Buffers (rows, F) of one row block, padded so that whole vectors may be read and written at the end."""

    def __init__(self, rows: int, hidden: int):
        self.shape, self.size = (rows, hidden), -(-rows * hidden // W) * W

    def empty(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(self.size, dtype=dtype)[: self.shape[0] * self.shape[1]].view(self.shape)


def _elementwise(backward: bool, activation: str, buffers: tuple[torch.Tensor | None, ...], half: bool, workers: int) -> None:
    """buffers: z, up, dhidden, hidden, dz, dup."""
    z, up = buffers[:2]
    assert z is not None
    size = -(-z.numel() // W) * W
    workers = max(1, min(workers, -(-size // _BLOCK)))
    threads.numba_workers(workers)
    z_at, up_at, dhidden_at, hidden_at, dz_at, dup_at = (0 if t is None else t.data_ptr() for t in buffers)
    _run(backward, _CODES[activation], up is not None, half, size, z_at, up_at, dhidden_at, hidden_at, dz_at, dup_at, workers)


def _row_blocks(rows: int, hidden: int) -> list[slice]:
    # From the shape alone: the gradient of a weight is a sum over these blocks, in this order.
    step = max(256, min(2048, _HIDDEN_BYTES // (4 * max(1, hidden)) // 128 * 128))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _right(weight: torch.Tensor, compute: torch.dtype, blocks: int, workers: int) -> "torch.Tensor | Packed":
    """A right-hand operand: packed once when several row blocks use it."""
    return Packed(weight, compute, workers) if blocks > 1 else weight


def _plan(x: torch.Tensor, w_gate: torch.Tensor | None, w_up: torch.Tensor, factor: float) -> int:
    work = factor * (2.0 if w_gate is None else 3.0) * x.numel() * w_up.shape[0]
    return workers_for("feed_forward", (tuple(x.shape), tuple(w_up.shape)), x.dtype, work)


def forward(
    x: torch.Tensor, w_gate: torch.Tensor | None, w_up: torch.Tensor, w_down: torch.Tensor, activation: str,
    b_up: torch.Tensor | None, b_down: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    workers = _plan(x, w_gate, w_up, 2.0)
    rows = x.reshape(-1, x.shape[-1])  # (N, E)
    y = torch.empty((rows.shape[0], w_down.shape[0]), dtype=x.dtype)
    blocks = _row_blocks(rows.shape[0], w_up.shape[0])
    up_w, down_w = (_right(w.t(), x.dtype, len(blocks), workers) for w in (w_up, w_down))
    gate_w = None if w_gate is None else _right(w_gate.t(), x.dtype, len(blocks), workers)
    for block in blocks:
        part = rows[block]
        buffers = _Hidden(part.shape[0], w_up.shape[0])
        up = gemm(part, up_w, out=buffers.empty(torch.float32), bias=b_up, compute=x.dtype, workers=workers)
        hidden = buffers.empty(x.dtype)
        z, gated_up = up, None
        if gate_w is not None:
            z = gemm(part, gate_w, out=buffers.empty(torch.float32), compute=x.dtype, workers=workers)
            gated_up = up
        half = x.dtype == torch.bfloat16
        _elementwise(False, activation, (z, gated_up, None, hidden, None, None), half, workers)
        gemm(hidden, down_w, out=y[block], bias=b_down, compute=x.dtype, workers=workers)
    return y.view(*x.shape[:-1], w_down.shape[0])


class _Sum:
    """A weight's gradient: the sum over row blocks in float32, then the weight's dtype."""

    def __init__(self, weight: torch.Tensor, blocks: int):
        once = blocks <= 1
        self.dtype = weight.dtype
        self.total = torch.empty(weight.shape, dtype=weight.dtype if once else torch.float32)
        self.started = False
        if blocks == 0:
            self.total.zero_()

    def add(self, a: torch.Tensor, b: torch.Tensor, workers: int) -> None:
        gemm(a, b, out=self.total, add=self.total if self.started else None, compute=a.dtype, workers=workers)
        self.started = True

    def result(self) -> torch.Tensor:
        return self.total.to(self.dtype)


def backward(
    dy: torch.Tensor, x: torch.Tensor, w_gate: torch.Tensor | None, w_up: torch.Tensor, w_down: torch.Tensor,
    activation: str, b_up: torch.Tensor | None, b_down: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """Gradients (dx, dw_gate, dw_up, dw_down, db_up, db_down)."""
    workers = _plan(x, w_gate, w_up, 6.0)
    dtype = x.dtype
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = torch.empty((rows.shape[0], rows.shape[1]), dtype=dtype)
    blocks = _row_blocks(rows.shape[0], w_up.shape[0])
    count = len(blocks)
    up_w, down_back, up_back = (_right(w, dtype, count, workers) for w in (w_up.t(), w_down, w_up))
    sums = {name: _Sum(w, count) for name, w in (("up", w_up), ("down", w_down))}
    if w_gate is not None:
        gate_w, gate_back = _right(w_gate.t(), dtype, count, workers), _right(w_gate, dtype, count, workers)
        sums["gate"] = _Sum(w_gate, count)
    for name, bias in (("b_up", b_up), ("b_down", b_down)):
        if bias is not None:
            sums[name] = _Sum(bias[None], count)
    for block in blocks:
        part, dpart = rows[block], drows[block]
        ones = torch.ones((1, part.shape[0]), dtype=dtype)  # sums over rows as products, in gemm's fixed order
        buffers = _Hidden(part.shape[0], w_up.shape[0])
        up = gemm(part, up_w, out=buffers.empty(torch.float32), bias=b_up, compute=dtype, workers=workers)
        dhidden = gemm(dpart, down_back, out=buffers.empty(torch.float32), compute=dtype, workers=workers)
        hidden, dup = buffers.empty(dtype), buffers.empty(dtype)
        half = dtype == torch.bfloat16
        if w_gate is None:
            _elementwise(True, activation, (up, None, dhidden, hidden, dup, None), half, workers)
            gemm(dup, up_back, out=dx[block], compute=dtype, workers=workers)
        else:
            gate = gemm(part, gate_w, out=buffers.empty(torch.float32), compute=dtype, workers=workers)
            dgate = buffers.empty(dtype)
            _elementwise(True, activation, (gate, up, dhidden, hidden, dgate, dup), half, workers)
            by_up = gemm(dup, up_back, out_dtype=torch.float32, compute=dtype, workers=workers)
            gemm(dgate, gate_back, out=dx[block], add=by_up, compute=dtype, workers=workers)
            sums["gate"].add(dgate.t(), part, workers)
        sums["up"].add(dup.t(), part, workers)
        sums["down"].add(dpart.t(), hidden, workers)
        if b_up is not None:
            sums["b_up"].add(ones, dup, workers)
        if b_down is not None:
            sums["b_down"].add(ones, dpart, workers)
    grads = {name: s.result() for name, s in sums.items()}
    return (
        dx.view(x.shape),
        grads.get("gate"),
        grads["up"],
        grads["down"],
        grads["b_up"][0] if b_up is not None else None,
        grads["b_down"][0] if b_down is not None else None,
    )
