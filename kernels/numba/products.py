"""Products of several matrices, none of which needs what another gives, as launches over all of them: see gemm.py for how one is computed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba.gemm import TILES, aligned, block_plan, k_parts, pack_group, strip_bytes
from cllm.kernels.numba.gemm_kernel import P, kernel
from cllm.kernels.numba.micro import CONFIGURATION
from cllm.kernels.numba.simd import W
from cllm.kernels.numba.together import together
from cllm.runtime.workers import Launch


class Product(NamedTuple):
    """a (M, K) @ b (K, N) -> out (M, N), contiguous; all float32, a and b of any strides. b None: a @ a.T, packed once for both sides.

    room: bytes for the packed operands, as many as `packed_bytes` says. Of an a or b that is `out` itself all of K must lie in one part.
    """

    a: Tensor
    b: Tensor | None
    out: Tensor
    room: Tensor


def _strips(lanes: int) -> int:
    return -(-lanes // (2 * W)) * 2


def packed_bytes(rows: int, depth: int, columns: int, way: str) -> int:
    """Of the copies of both operands of a product. way: how it is multiplied, FP32 or PAIRS or ..."""
    return (_strips(rows) + _strips(columns)) * strip_bytes(way, min(depth, k_parts(depth)[0][1])) + 128


def scratch_bytes(rows: int, depth: int, columns: int, way: str, workers: int) -> int:
    """Of work space that each worker needs for a product. workers: among how many a single product is shared out."""
    return max(
        int(
            block_plan(
                rows, columns, num_k, way, workers, (num_k, 1), torch.float32, (1, num_k), torch.float32, torch.float32, False, True,
            ).fields[P.scratch_stride]
        )
        for _, num_k in k_parts(depth)
    )  # fmt: skip


class Products:
    """workers: how many share the work; spread: whether there are fewer products than these keep busy, so that each is cut more finely."""

    def __init__(self, way: str, workers: int, spread: bool) -> None:
        self.way, self.workers, self.spread = way, workers, spread
        self.scratch_bytes = 0
        """What each worker needs of work space for the products so far."""
        self._jobs: list[np.ndarray] = []
        self._kept: list[object] = []

    def launches(self, products: Sequence[Product]) -> list[Launch]:
        """These products' launches, in the order in which they are to run. Work space is said afterwards, to `settle`."""
        found: list[Launch] = []
        for part in range(max(len(k_parts(each.a.shape[1])) for each in products)):
            packing, multiplying = [], []
            for each in products:
                parts = k_parts(each.a.shape[1])
                if part < len(parts):
                    p = self._job(each, *parts[part])
                    tasks = int(p[P.tasks_a] + p[P.tasks_b])
                    packing.append(kernel.launch(p.ctypes.data, 0, tasks))
                    multiplying.append(kernel.launch(p.ctypes.data, 0, int(p[P.num_tiles]), tasks))
            for launches in (packing, multiplying):
                launch, arguments = together(launches)
                self._kept.append(arguments)
                found.append(launch)
        return found

    def settle(self, scratch: Tensor) -> None:
        """Gives all products their work space: `workers` times `scratch_bytes`, and 64 bytes."""
        for p in self._jobs:
            p[P.scratch], p[P.scratch_stride] = aligned(scratch), self.scratch_bytes

    def _job(self, product: Product, k0: int, num_k: int) -> np.ndarray:
        a, out = product.a[:, k0 : k0 + num_k], product.out
        b = a.T if product.b is None else product.b[k0 : k0 + num_k]
        (rows, columns), strip = out.shape, strip_bytes(self.way, num_k)
        direct = self.way != TILES and k0 == 0
        plan = block_plan(
            rows, columns, num_k, self.way, self.workers if self.spread else 1, a.stride(), a.dtype, b.stride(), b.dtype, out.dtype, direct, True,
        )  # fmt: skip
        p = plan.fields.copy()
        p[P.configuration] = CONFIGURATION
        p[P.a], p[P.b] = a.data_ptr(), b.data_ptr()
        p[P.a_packed] = p[P.b_packed] = aligned(product.room)
        p[P.b_ready] = 1
        if product.b is None and self.way != TILES:  # whose strips of A are others than those of B
            p[P.tasks_b] = 0
        else:
            p[P.group_b] = group = pack_group(columns, self.workers if self.spread else 1)
            p[P.tasks_b] = -(-columns // (group * W))
            p[P.b_packed] += _strips(rows) * strip
        p[P.out], p[P.out_row] = out.data_ptr(), out.stride(0) * out.element_size()
        if k0:
            p[P.old], p[P.old_row] = p[P.out], p[P.out_row]
        self.scratch_bytes = max(self.scratch_bytes, int(p[P.scratch_stride]))
        self._jobs.append(p)
        return p
