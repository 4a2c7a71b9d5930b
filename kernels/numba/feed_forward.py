"""Feed-forward layer on the CPU: products whose ends are the activation and its derivative (activation.py).

N rows, E embed, F hidden. What goes into the activation (z, and up when gated) has x's dtype whether it is kept for the backward
or made again there, so that both give the same bits, in training and in generation.
"""

import math
from functools import cached_property
from typing import Any

import torch

from cllm.kernels.numba import gemm as product
from cllm.kernels.numba.activation import ACTIVATE, DIFFERENTIATE, Epilogue
from cllm.kernels.numba.gemm import Packed, gemm, gemm_activated
from cllm.kernels.numba.launch import num_workers
from cllm.kernels.numba.sums import column_sums
from cllm.kernels.operations import Shapes
from cllm.kernels.strips import Columns, Strips

_HIDDEN_BYTES = 32 << 20  # a block of rows is cut so that its hidden values in float32 stay below this


def _row_blocks(rows: int, hidden: int) -> list[slice]:
    # From the shape alone: the gradient of a weight is a sum over these blocks, in this order.
    step = max(256, min(8192, _HIDDEN_BYTES // (4 * max(1, hidden)) // 128 * 128))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers the forward pass uses, of a layer that is as wide behind as before."""
    (*rows, embed), (hidden, _) = shapes
    blocks = _row_blocks(math.prod(rows), hidden)
    products = ((block.stop - block.start, *each) for block in blocks for each in ((embed, hidden), (hidden, embed)))
    return max((product.launched_workers(planned, *each, dtype, len(blocks) > 1) for each in products), default=1)


class _Weights:
    """The right-hand operands of one call, packed once where several row blocks use them, and only if they are used."""

    def __init__(
        self, w_gate: "torch.Tensor | Strips | None", w_up: "torch.Tensor | Strips", b_up: torch.Tensor | None, dtype: torch.dtype, blocks: int,
        workers: int,
    ):  # fmt: skip
        self.w_gate, self.w_up, self.b_up = w_gate, w_up, b_up
        self.dtype, self.blocks, self.workers = dtype, blocks, workers

    def right(self, weight: "torch.Tensor | Columns") -> "torch.Tensor | Packed | Columns":
        return Packed(weight, self.dtype, self.workers) if self.blocks > 1 and isinstance(weight, torch.Tensor) else weight

    @cached_property
    def up(self) -> "torch.Tensor | Packed | Columns":
        return self.right(self.w_up.t())

    @cached_property
    def gate(self) -> "torch.Tensor | Packed | Columns | None":
        return None if self.w_gate is None else self.right(self.w_gate.t())

    def activate(self, rows: torch.Tensor, activation: str, hidden: torch.Tensor, z: torch.Tensor | None, up: torch.Tensor | None) -> None:
        """rows (N, E) -> hidden (N, F); z (N, F) is needed when gated, and it and up are filled where given."""
        if self.gate is None:
            gemm_activated(rows, self.up, Epilogue(ACTIVATE, activation, hidden), keep=z, bias=self.b_up, workers=self.workers)
        else:
            assert z is not None
            gemm(rows, self.gate, out=z, compute=self.dtype, workers=self.workers)
            gemm_activated(rows, self.up, Epilogue(ACTIVATE, activation, hidden, z), keep=up, bias=self.b_up, workers=self.workers)


def _piece(t: torch.Tensor, block: slice) -> torch.Tensor:
    """A block of rows; all of them without a view, which costs microseconds."""
    return t if block.stop - block.start == t.shape[0] else t[block]


def forward(
    x: torch.Tensor, w_gate: torch.Tensor | Strips | None, w_up: torch.Tensor | Strips, w_down: torch.Tensor | Strips, activation: str,
    b_up: torch.Tensor | None, b_down: torch.Tensor | None, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """(y, z, up); z and up (N, F) in x's dtype only when `keep`, up only when gated. Weights packed at load serve inference alone."""
    workers = num_workers("feed_forward", (x.shape, w_up.shape), x.dtype, gated=w_gate is not None)
    rows = x.reshape(-1, x.shape[-1])  # (N, E)
    num_rows, hidden_size = rows.shape[0], w_up.shape[0]
    y = torch.empty((num_rows, w_down.shape[0]), dtype=x.dtype)
    blocks = _row_blocks(num_rows, hidden_size)
    weights = _Weights(w_gate, w_up, b_up, x.dtype, len(blocks), workers)
    down = weights.right(w_down.t())
    all_z = torch.empty((num_rows, hidden_size), dtype=x.dtype) if keep else None
    all_up = torch.empty_like(all_z) if all_z is not None and w_gate is not None else None
    for block in blocks:
        hidden = torch.empty((block.stop - block.start, hidden_size), dtype=x.dtype)
        z = _piece(all_z, block) if all_z is not None else None if w_gate is None else torch.empty_like(hidden)
        weights.activate(_piece(rows, block), activation, hidden, z, None if all_up is None else _piece(all_up, block))
        gemm(hidden, down, out=_piece(y, block), bias=b_down, compute=x.dtype, workers=workers)
    return y.view(*x.shape[:-1], w_down.shape[0]), all_z, all_up


class _Sum:
    """A weight's gradient in the weight's layout: the sum over row blocks in float32, then the weight's dtype."""

    def __init__(self, weight: torch.Tensor, blocks: int):
        once = blocks <= 1
        self.dtype = weight.dtype
        self.total = torch.empty_like(weight, dtype=weight.dtype if once else torch.float32)
        self.started = False
        if blocks == 0:
            self.total.zero_()

    def add(self, a: torch.Tensor, b: torch.Tensor, workers: int) -> None:
        gemm(a, b, out=self.total, add=self.total if self.started else None, compute=a.dtype, workers=workers)
        self.started = True

    def add_columns(self, x: torch.Tensor) -> None:
        part = column_sums(x, self.total.dtype)
        self.total = self.total.add_(part) if self.started else part
        self.started = True

    def result(self) -> torch.Tensor:
        return self.total.to(self.dtype)


def backward(
    dy: torch.Tensor, x: torch.Tensor, w_gate: torch.Tensor | None, w_up: torch.Tensor, w_down: torch.Tensor,
    activation: str, b_up: torch.Tensor | None, b_down: torch.Tensor | None, kept_z: torch.Tensor | None, kept_up: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """Gradients (dx, dw_gate, dw_up, dw_down, db_up, db_down); z and up are computed again where they were not kept."""
    dtype, hidden_size = x.dtype, w_up.shape[0]
    workers = num_workers("feed_forward", (x.shape, w_up.shape), dtype, gated=w_gate is not None, backward=True, recompute=kept_z is None)
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = torch.empty((rows.shape[0], rows.shape[1]), dtype=dtype)
    blocks = _row_blocks(rows.shape[0], hidden_size)
    count = len(blocks)
    weights = _Weights(w_gate, w_up, b_up, dtype, count, workers)
    down_back, up_back = weights.right(w_down), weights.right(w_up)
    sums = {name: _Sum(w, count) for name, w in (("up", w_up), ("down", w_down))}
    if w_gate is not None:
        gate_back = weights.right(w_gate)
        sums["gate"] = _Sum(w_gate, count)
    for name, bias in (("b_up", b_up), ("b_down", b_down)):
        if bias is not None:
            sums[name] = _Sum(bias, count)
    for block in blocks:
        part, dpart = _piece(rows, block), _piece(drows, block)
        hidden, dz = (torch.empty((part.shape[0], hidden_size), dtype=dtype) for _ in range(2))
        dup = None if w_gate is None else torch.empty_like(hidden)
        if kept_z is None:
            z, up = torch.empty_like(hidden), None if w_gate is None else torch.empty_like(hidden)
            weights.activate(part, activation, hidden, z, up)
        else:
            z, up = _piece(kept_z, block), None if kept_up is None else _piece(kept_up, block)
        gemm_activated(dpart, down_back, Epilogue(DIFFERENTIATE, activation, hidden, z, up, dz, dup), workers=workers)
        if dup is None:
            dup = dz
            gemm(dup, up_back, out=_piece(dx, block), compute=dtype, workers=workers)
        else:
            by_up = gemm(dup, up_back, out_dtype=torch.float32, compute=dtype, workers=workers)
            gemm(dz, gate_back, out=_piece(dx, block), add=by_up, compute=dtype, workers=workers)
            sums["gate"].add(dz.t(), part, workers)
        sums["up"].add(dup.t(), part, workers)
        sums["down"].add(dpart.t(), hidden, workers)
        if b_up is not None:
            sums["b_up"].add_columns(dup)
        if b_down is not None:
            sums["b_down"].add_columns(dpart)
    grads = {name: s.result() for name, s in sums.items()}
    return (
        dx.view(x.shape),
        grads.get("gate"),
        grads["up"],
        grads["down"],
        grads.get("b_up"),
        grads.get("b_down"),
    )
