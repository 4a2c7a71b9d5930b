"""Muon's update (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) of many matrices on the CPU, as one list of launches over all.

A step of the iteration takes X to a X + (b G + c G G) X with G = X X^T. Completing the square leaves three products, and between them nothing but a
diagonal to add:

    Y = c^(1/4) X,    H = Y Y^T + b / (2 sqrt(c)) I,    Y <- (H H + (a - b^2 / (4 c)) I) Y

Of a matrix with more rows than columns Y^T Y is the smaller square, and Y is multiplied from the right. The products are made of bfloat16 with
float32 sums where the processor multiplies pairs of them, as in the original, else of float32; what lies between the products is float32. A symmetric
operand is packed once for both sides.

Matrices are taken in groups whose work space stays in the caches. A launch has the tasks of all matrices of its group.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba.adamw import (
    BLOCK_ELEMENTS,
    TENSOR,
    Table,
    add_squares,
    no_squares,
    sum_squares,
)
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.gemm import FP32, WIDENED, kernel_for
from cllm.kernels.numba.launch import Kernel, float32_at, int64_at, load, num_workers, put_float32, store
from cllm.kernels.numba.products import Product, Products, packed_bytes, scratch_bytes
from cllm.kernels.numba.simd import W, vadd, vmul, vset, vsub
from cllm.kernels.numba.together import together
from cllm.runtime.workers import Launch, run, table_of

GROUP_BYTES = 4 << 20  # of work space, where a group has more than one matrix


class _Arguments(NamedTuple):
    tensors: int  # addresses: the table of tensors (its second average is Y here),
    block_tensor: int  # and int64, the tensor of each block
    squares: int  # where the floats hold the sum of squares of each block


class _Options(NamedTuple):
    """Floats. Behind them two for each matrix: what it is multiplied with, and what its Y is multiplied with before it is subtracted."""

    clip: float
    momentum: float
    root: float  # c^(1/4)


class _Diagonal(NamedTuple):
    matrix: int  # address of contiguous float32
    size: int


P, _arguments = fields(_Arguments)
F, _options = fields(_Options)
D, _diagonal_arguments = fields(_Diagonal)


def _average(p, f, task, worker):
    """A block of m = momentum m + (1 - momentum) g and of u = momentum m + (1 - momentum) g, and the sum of its squares."""
    tensor = int64_at(p[P.block_tensor], task)
    row = p[P.tensors] + tensor * len(TENSOR) * 8
    grad, average, y = int64_at(row, TENSOR.grad), int64_at(row, TENSOR.avg), int64_at(row, TENSOR.avg_sq)
    half = int64_at(row, TENSOR.grad_half)
    start = (task - int64_at(row, TENSOR.first_block)) * BLOCK_ELEMENTS
    end = min(start + BLOCK_ELEMENTS, int64_at(row, TENSOR.size))
    clip, keep, rest = vset(np.float32(f[F.clip])), vset(np.float32(f[F.momentum])), vset(np.float32(1.0 - f[F.momentum]))
    squares = no_squares()
    for c in range(start, end, W):
        new = vmul(vmul(load(grad, half, c, end - c), clip), rest)
        m = vadd(vmul(load(average, False, c, end - c), keep), new)
        u = vadd(vmul(m, keep), new)
        store(average, False, c, m, end - c)
        store(y, False, c, u, end - c)
        squares = add_squares(squares, u)
    f[p[P.squares] + task] = sum_squares(squares)


def _normalise(p, f, task, worker):
    """A block of Y = c^(1/4) u / |u|: the largest singular value of X is then at most 1."""
    tensor = int64_at(p[P.block_tensor], task)
    row = p[P.tensors] + tensor * len(TENSOR) * 8
    y, size, first = int64_at(row, TENSOR.avg_sq), int64_at(row, TENSOR.size), int64_at(row, TENSOR.first_block)
    total = 0.0
    for block in range(first, first + (size + BLOCK_ELEMENTS - 1) // BLOCK_ELEMENTS):
        total += f[p[P.squares] + block]
    factor = vset(np.float32(f[F.root] / max(math.sqrt(total), 1e-7)))
    start = (task - first) * BLOCK_ELEMENTS
    end = min(start + BLOCK_ELEMENTS, size)
    for c in range(start, end, W):
        store(y, False, c, vmul(load(y, False, c, end - c), factor), end - c)


def _move(p, f, task, worker):
    """A block of w = keep w - scale Y."""
    tensor = int64_at(p[P.block_tensor], task)
    row = p[P.tensors] + tensor * len(TENSOR) * 8
    weight, y = int64_at(row, TENSOR.param), int64_at(row, TENSOR.avg_sq)
    start = (task - int64_at(row, TENSOR.first_block)) * BLOCK_ELEMENTS
    end = min(start + BLOCK_ELEMENTS, int64_at(row, TENSOR.size))
    keep, scale = vset(np.float32(f[len(F) + 2 * tensor])), vset(np.float32(f[len(F) + 2 * tensor + 1]))
    for c in range(start, end, W):
        n = end - c
        store(weight, False, c, vsub(vmul(load(weight, False, c, n), keep), vmul(load(y, False, c, n), scale)), n)


def _add_to_diagonal(p, f, task, worker):
    step = p[D.size] + 1
    for i in range(p[D.size]):
        put_float32(p[D.matrix], i * step, float32_at(p[D.matrix], i * step) + np.float32(f[0]))


_average_kernel, _normalise_kernel, _move_kernel, _diagonal_kernel = map(Kernel, (_average, _normalise, _move, _add_to_diagonal))


def way() -> str:
    """How the products are made: of bfloat16 where that is faster than float32."""
    found = kernel_for(torch.bfloat16)
    return FP32 if found == WIDENED else found


def work_bytes(shapes: Sequence[tuple[int, int]], steps: int) -> int:
    """Of memory that `Places` takes for the work on matrices of these shapes."""
    found, workers, groups = way(), _workers(shapes, steps), _groups(shapes)
    memory = max(sum(_bytes(shapes[number], found) for number in group) for group in groups)
    kinds = {(*shapes[number], _shared(group, workers)) for group in groups for number in group}
    scratch = max(
        scratch_bytes(*product, found, shared)
        for rows, columns, shared in kinds
        for small, large in [sorted((rows, columns))]
        for product in ((small, large, small), (small, small, small), (rows, small, columns))
    )
    return memory + workers * scratch + 64


def _workers(shapes: Sequence[Sequence[int]], steps: int) -> int:
    work = sum(6.0 * steps * min(each) * math.prod(each) for each in shapes)
    return num_workers("matmul", (), torch.float32, work=work)


def _shared(group: list[int], workers: int) -> int:
    """How many workers share a single product of a group: with many products each worker has some of its own."""
    return workers if len(group) < 4 * workers else 1


def _bytes(shape: Sequence[int], way: str) -> int:
    """Of work space for a matrix: Y, the square, and packed operands, each beginning at a line of the cache."""
    small, large = sorted(shape)
    packed = max(packed_bytes(small, large, small, way), packed_bytes(small, small, large, way), packed_bytes(large, small, small, way))
    return sum(-(-each // 64) * 64 + 64 for each in (4 * small * large, 4 * small * small, packed))


def _groups(shapes: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of the matrices of each group."""
    found = way()
    groups: list[list[int]] = []
    filled = 0
    for number, shape in enumerate(shapes):
        size = _bytes(shape, found)
        if not groups or filled + size > GROUP_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += size
    return groups


class Places:
    """Where contiguous matrices (R, C) lie that are updated together, and the launches that do it. It holds addresses only: whoever uses it again
    makes sure that the matrices are still there. coefficients: a, b and c of the polynomial. steps: of the iteration."""

    def __init__(
        self, params: list[Tensor], momenta: list[Tensor], weight_decays: list[float], momentum: float, coefficients: tuple[float, float, float],
        steps: int,
    ) -> None:  # fmt: skip
        self._way = way()
        self._weight_decays = np.array(weight_decays, np.float64)
        self._sizes = np.array([0.2 * math.sqrt(max(each.shape)) for each in params])
        self._coefficients, self._steps = coefficients, steps
        shapes = [tuple(each.shape) for each in params]
        self._workers, groups = _workers(shapes, steps), _groups(shapes)
        memory = torch.empty(max(sum(_bytes(shapes[number], self._way) for number in group) for group in groups), dtype=torch.uint8)
        self._kept: list[object] = [memory]
        ys, squares, rooms = self._laid_out(params, groups, memory)
        table = self._matrices = Table(params, ys, momenta, ys)
        self._floats: Any = np.zeros(len(F) + 2 * len(params) + table.num_blocks)
        self._factors = self._floats[len(F) : len(F) + 2 * len(params)].reshape(-1, 2)
        root = coefficients[2] ** 0.25
        self._floats[: len(F)] = _options(clip=1.0, momentum=momentum, root=root)
        self._sizes /= root
        table_arguments = np.array(
            _arguments(tensors=table.rows.ctypes.data, block_tensor=table.block_tensor.ctypes.data, squares=len(F) + 2 * len(params)), np.int64
        )
        self._kept += [table, table_arguments]
        products = Products(self._way, self._workers, spread=False)
        launches: list[Launch] = []
        for group in groups:
            first, end = (int(table.rows[i, TENSOR.first_block]) if i < len(params) else table.num_blocks for i in (group[0], group[-1] + 1))
            blocks = [
                each.launch(table_arguments.ctypes.data, self._floats.ctypes.data, end - first, first)
                for each in (_average_kernel, _normalise_kernel, _move_kernel)
            ]
            products.spread = _shared(group, self._workers) == self._workers
            launches += [*blocks[:2], *self._iteration(products, group, ys, squares, rooms), blocks[2]]
        scratch = torch.empty(self._workers * products.scratch_bytes + 64, dtype=torch.uint8)
        products.settle(scratch)
        self._kept += [products, scratch]
        self.bytes = memory.numel() + scratch.numel()
        """Of work space."""
        self._table, self._count = table_of(launches), len(launches)

    def _laid_out(self, params: list[Tensor], groups: list[list[int]], memory: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(Y, the square, room for packed operands) of each matrix; groups share their memory."""
        found: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
        for group in groups:
            at = 0
            for number in group:
                shape, small = params[number].shape, min(params[number].shape)
                size = _bytes(shape, self._way)
                part, at = memory[at : at + size], at + size
                offset = -part.data_ptr() % 64
                for matrix, where in ((shape, found[0]), ((small, small), found[1])):
                    taken = 4 * matrix[0] * matrix[1]
                    where.append(part[offset : offset + taken].view(torch.float32).view(tuple(matrix)))
                    offset += -(-taken // 64) * 64
                found[2].append(part[offset:])
        return found

    def _iteration(self, products: Products, group: list[int], ys: list[Tensor], squares: list[Tensor], rooms: list[Tensor]) -> list[Launch]:
        a, b, c = self._coefficients
        shifts = b / (2 * math.sqrt(c)), a - b * b / (4 * c)
        grams, second, last = [], [], []
        for number in group:
            y, square, room = ys[number], squares[number], rooms[number]
            tall = y.shape[0] > y.shape[1]
            grams.append(Product(y.T if tall else y, None, square, room))
            second.append(Product(square, None, square, room))
            last.append(Product(y, square, y, room) if tall else Product(square, y, y, room))
        diagonals = [self._diagonal([squares[number] for number in group], shift) for shift in shifts]
        once = [*products.launches(grams), diagonals[0], *products.launches(second), diagonals[1], *products.launches(last)]
        return once * self._steps

    def _diagonal(self, matrices: list[Tensor], value: float) -> Launch:
        floats = np.array([value])
        self._kept.append(floats)
        launches = []
        for each in matrices:
            arguments = np.array(_diagonal_arguments(matrix=each.data_ptr(), size=each.shape[0]), np.int64)
            self._kept.append(arguments)
            launches.append(_diagonal_kernel.launch(arguments.ctypes.data, floats.ctypes.data, 1))
        launch, joined = together(launches)
        self._kept.append(joined)
        return launch

    def update(self, grads: list[Tensor], learning_rate: float, clip: float) -> None:
        """From gradients, contiguous float32 or bfloat16, that are multiplied by `clip`."""
        self._matrices.take(grads)
        self._floats[int(F.clip)] = clip
        self._factors[:, 0] = 1.0 - learning_rate * self._weight_decays
        self._factors[:, 1] = learning_rate * self._sizes
        run(self._table.buffer_info()[0], self._count, self._workers)


def apply(grads: list[Tensor], places: Places, learning_rate: float, clip: float) -> None:
    """One update of the matrices that lie at `places`."""
    places.update(grads, learning_rate, clip)
