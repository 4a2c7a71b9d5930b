"""What torch computes between the kernels of a training step, as launches: in recorded work (`runtime/workers/program.py`) a call of torch would take
as long as a small kernel.

Each function does to `out` what an operation of torch does, with the same bits, or returns False where it is not made for what it is given.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.launch import Kernel, copy_bytes, is_half, load, load_whole, num_workers, store, store_whole
from cllm.kernels.numba.simd import W, vadd
from cllm.runtime.workers.program import TRANSLATED

BYTES_PER_TASK = 32 << 10
ELEMENTS_PER_TASK = 8192


class _Piece(NamedTuple):
    """Rows that are copied: addresses, in bytes the distances from row to row, and the bytes of a row."""

    source: int
    source_row: int
    target: int
    target_row: int
    size: int
    rows: int
    rows_per_task: int
    first_task: int


class _Sum(NamedTuple):
    a: int  # addresses
    b: int
    out: int
    half: int  # whether all are bfloat16
    elements: int


PIECE, _piece = fields(_Piece)
SUM, _sum_arguments = fields(_Sum)


def _copy(p, f, task, worker):
    """A task of one piece; the pieces follow each other in the table, the first behind their number."""
    at = 1
    while at + len(PIECE) < 1 + p[0] * len(PIECE) and p[at + len(PIECE) + PIECE.first_task] <= task:
        at += len(PIECE)
    first = (task - p[at + PIECE.first_task]) * p[at + PIECE.rows_per_task]
    for row in range(first, min(first + p[at + PIECE.rows_per_task], p[at + PIECE.rows])):
        source, target = p[at + PIECE.source] + row * p[at + PIECE.source_row], p[at + PIECE.target] + row * p[at + PIECE.target_row]
        copy_bytes(target, source, p[at + PIECE.size])


def _sum(p, f, task, worker):
    a, b, out, half = p[SUM.a], p[SUM.b], p[SUM.out], p[SUM.half]
    end = min((task + 1) * ELEMENTS_PER_TASK, p[SUM.elements])
    whole = end - (end - task * ELEMENTS_PER_TASK) % W
    for c in range(task * ELEMENTS_PER_TASK, whole, W):
        store_whole(out, half, c, vadd(load_whole(a, half, c), load_whole(b, half, c)))
    if whole < end:
        store(out, half, whole, vadd(load(a, half, whole, end - whole), load(b, half, whole, end - whole)), end - whole)


_copy_kernel, _sum_kernel = Kernel(_copy), Kernel(_sum)


def _workers(out: Tensor) -> int:
    return num_workers("matmul", (tuple(out.shape),), out.dtype, work=2.0 * out.numel() * out.element_size())


def _rows(source: Tensor, target: Tensor) -> tuple[int, int, int, int] | None:
    """(rows, elements of a row, distance from row to row of the source, of the target) of two tensors of one shape; None where they are not rows."""
    dims: list[list[int]] = []  # (size, distance in the source, in the target), neighbours joined where both lie without a gap
    for size, step, other in zip(source.shape, source.stride(), target.stride()):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * step and dims[-1][2] == size * other:
            dims[-1] = [dims[-1][0] * size, step, other]
        else:
            dims.append([size, step, other])
    if not dims or dims[-1][1:] != [1, 1]:
        dims.append([1, 1, 1])
    if len(dims) > 2:
        return None
    (rows, step, other), (size, _, _) = dims if len(dims) == 2 else ([1, 0, 0], dims[0])
    return rows, size, step, other


def _copied(out: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Copies each first tensor into the second one, a part of `out`."""
    table, tasks = [0], 0
    for source, target in pairs:
        if source.dtype != out.dtype or source.shape != target.shape:
            return False
        if not source.numel():
            continue
        found = _rows(source, target)
        if found is None:
            return False
        rows, size, step, other = found
        item = out.element_size()
        if rows == 1:  # one stretch: cut into parts that several workers can take
            whole, part = size * item, BYTES_PER_TASK
            table[0] += 1 + (whole % part > 0)
            ends = [(0, part, whole // part)] + ([(whole - whole % part, whole % part, 1)] if whole % part else [])
            for offset, length, count in ends:
                table += _piece(
                    source=source.data_ptr() + offset, source_row=length, target=target.data_ptr() + offset, target_row=length, size=length,
                    rows=count, rows_per_task=1, first_task=tasks,
                )  # fmt: skip
                tasks += count
            continue
        each = max(1, BYTES_PER_TASK // (size * item))
        table[0] += 1
        table += _piece(
            source=source.data_ptr(), source_row=step * item, target=target.data_ptr(), target_row=other * item, size=size * item, rows=rows,
            rows_per_task=each, first_task=tasks,
        )  # fmt: skip
        tasks += -(-rows // each)
    _copy_kernel(tasks, _workers(out), table)
    return True


def clone(out: Tensor, source: Tensor, **options: Any) -> bool:
    return _copied(out, [(source, out)])


def cat(out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> bool:
    pairs, start = [], 0
    for each in tensors:
        if each.dim() != out.dim():
            return False
        pairs.append((each, out.narrow(dim, start, each.shape[dim])))
        start += each.shape[dim]
    return _copied(out, pairs)


def stack(out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> bool:
    return _copied(out, [(each, out.select(dim, number)) for number, each in enumerate(tensors)])


def add(out: Tensor, a: Tensor, b: Any, alpha: float = 1) -> bool:
    if not isinstance(b, Tensor) or alpha != 1 or out.dtype not in (torch.float32, torch.bfloat16):
        return False
    if any(each.dtype != out.dtype or each.shape != out.shape or each.stride() != out.stride() or not each.is_contiguous() for each in (a, b, out)):
        return False
    count = out.numel()
    arguments = _sum_arguments(a=a.data_ptr(), b=b.data_ptr(), out=out.data_ptr(), half=is_half(out), elements=count)
    _sum_kernel(-(-count // ELEMENTS_PER_TASK), _workers(out), arguments)
    return True


_aten = torch.ops.aten
TRANSLATED.update({_aten.clone.default: clone, _aten.cat.default: cat, _aten.stack.default: stack, _aten.add.Tensor: add})
