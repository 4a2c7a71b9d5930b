"""Matrix product C = A B (+ C) (+ bias) on strided float32 or bfloat16 views, with float32 accumulation: how it is cut, and its launches.

An element's bits depend on its row of A, its column of B and K, on nothing else: not on M, N, the tile grid, the number of workers or whether B
was packed before. K is cut into parts of K_PART and those into equal blocks; each block is one fma chain from 0, blocks are added in order within a
part, then parts in order. (AMX tiles continue one chain through a part.) So a decoded token gets the bits of the same token in a long prefill.

Method: K. Goto, R. van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008 (BLIS): packed strips of A and B, a micro-kernel in
registers, tiles of C that stay in the L2 cache. The tasks are in gemm_kernel.py.
"""

import functools
import os
import threading
from typing import NamedTuple

import numpy as np
import torch

from cllm.kernels.numba import activation, pack
from cllm.kernels.numba.gemm_block import LINE
from cllm.kernels.numba.gemm_kernel import BY_CHAINS, BY_PAIRS, BY_TILES, P
from cllm.kernels.numba.gemm_kernel import run as _run
from cllm.kernels.numba.launch import num_workers
from cllm.kernels.numba.llvm import HAS_PAIRS, W
from cllm.kernels.numba.micro import BLOCK_BYTES, CONFIGURATION, HAS_TILES, NV, WORD
from cllm.kernels.strips import STRIP, Columns
from cllm.runtime.device import cpu
from cllm.runtime.errors import BackendError
from cllm.runtime.workers import recorder

FP32, PAIRS, TILES, WIDENED = "fp32", "vdpbf16ps", "amx", "widened"  # ways to multiply; the last three compute bfloat16
CODES = {FP32: BY_CHAINS, WIDENED: BY_CHAINS, PAIRS: BY_PAIRS, TILES: BY_TILES}

BLOCK_WORDS = 128  # words of a strip in one K block: a panel of three strips takes 24 KB, half of an L1 cache of 48 KB
TILE_BLOCK_WORDS = 256  # the same for AMX: A passes the L1 cache by, and a panel of two strips may take 32 KB
K_PART = 4096  # k after which float32 accumulation begins anew; it bounds the packed copies
TILE_ROWS, TILE_COLUMNS = 128, 192  # the largest tile of C; its columns are four panels of 48
AMX_ROWS, AMX_COLUMNS = 512, 768  # the largest tile on AMX; its part of B takes half of the L2 cache
ONE_SLAB_ROWS = 64  # with no more rows than this, each tile packs its own part of B, which is used once
MAX_GROUP = 12  # the most strips that one task packs
PACK_BYTES = 32 << 20  # the packed copy of A, and that of B, are kept below this


class _Buffers(threading.local):
    """Work space of one Python thread, grown and kept: fresh memory costs page faults at every call."""

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}

    def take(self, name: str, size: int) -> torch.Tensor:
        recorded = recorder() is not None  # what is replayed later has work space of its own
        held = None if recorded else self.held.get(name)
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=torch.uint8)
            if size <= 2 * PACK_BYTES and not recorded:
                self.held[name] = held
        return held


_buffers = _Buffers()


def bf16_kernel() -> str:
    """The micro-kernel for bfloat16 on this CPU; CLLM_BF16_KERNEL forces one of amx, vdpbf16ps, widened."""
    forced = os.environ.get("CLLM_BF16_KERNEL")
    if forced:
        served = {TILES: HAS_TILES, PAIRS: HAS_PAIRS, WIDENED: True}
        if not served.get(forced, False):
            names = ", ".join(name for name, present in served.items() if present)
            raise BackendError(f"CLLM_BF16_KERNEL={forced} is not served by this CPU. Use one of: {names}.")
        return forced
    return TILES if HAS_TILES else PAIRS if HAS_PAIRS else WIDENED


def kernel_for(compute: torch.dtype) -> str:
    return FP32 if compute == torch.float32 else bf16_kernel()


def pack_mode(kernel: str, dtype: torch.dtype) -> int:
    half = dtype == torch.bfloat16
    if kernel == FP32:
        return pack.BF16_WIDENED if half else pack.F32_AS_IS
    if kernel == WIDENED:
        return pack.BF16_WIDENED if half else pack.F32_ROUNDED_WIDENED
    return pack.BF16_PAIRS if half else pack.F32_ROUNDED_PAIRS


def strips_mode(kernel: str, dtype: torch.dtype) -> int:
    """What packing does to an element of `Strips`. Strips of float32 hold what a product of bfloat16 would round: they serve float32 alone."""
    assert dtype == torch.bfloat16 or kernel == FP32, "gemm: strips of float32 serve activations of float32"
    return pack.STRIPS_BF16 if dtype == torch.bfloat16 else pack.STRIPS_F32


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def k_parts(depth: int) -> list[tuple[int, int]]:
    return [(k, min(K_PART, depth - k)) for k in range(0, depth, K_PART)]


def strip_bytes(kernel: str, num_k: int) -> int:
    """One line more than its words need: strips a multiple of 4096 bytes apart would share the same few sets of the L1 cache."""
    words = num_k if CODES[kernel] == BY_CHAINS else (num_k + 1) // 2
    return _round_up(words, W) * W * WORD + LINE


def _block(kernel: str, num_k: int) -> int:
    per_word = 1 if CODES[kernel] == BY_CHAINS else 2
    blocks = -(-num_k // ((TILE_BLOCK_WORDS if kernel == TILES else BLOCK_WORDS) * per_word))
    return _round_up(-(-num_k // blocks), W * per_word)


def pack_group(lanes: int, workers: int) -> int:
    """Strips packed by one task."""
    return max(1, min(MAX_GROUP, lanes // (2 * W * workers)))


def aligned(t: torch.Tensor) -> int:
    return (t.data_ptr() + 63) & ~63


class Packed:
    """B packed once for many products (weights used by several row blocks)."""

    def __init__(self, b: torch.Tensor, compute: torch.dtype, workers: int):
        self.kernel = kernel_for(compute)
        self.shape = (depth, columns) = tuple(b.shape)
        strips = -(-columns // W)
        self.offsets, size = [], 0
        for _, num_k in k_parts(depth):
            self.offsets.append(size)
            size += strips * strip_bytes(self.kernel, num_k)
        self.memory = torch.empty(size + 64, dtype=torch.uint8)
        for (k0, num_k), offset in zip(k_parts(depth), self.offsets):
            _pack_columns(b[k0 : k0 + num_k], self.kernel, aligned(self.memory) + offset, workers)

    def address(self, part: int) -> int:
        return aligned(self.memory) + self.offsets[part]


def _pack_columns(b: torch.Tensor, kernel: str, target: int, workers: int) -> None:
    p = np.zeros(len(P), np.int64)
    depth, columns = b.shape
    p[P.depth], p[P.columns], p[P.b_k], p[P.b_column] = depth, columns, *b.stride()
    p[P.b_mode], p[P.b_strip] = pack_mode(kernel, b.dtype), strip_bytes(kernel, depth)
    p[P.b], p[P.b_packed] = b.data_ptr(), target
    p[P.group_b] = group = pack_group(columns, workers)
    p[P.tasks_b] = tasks = -(-columns // (group * W))
    workers = min(workers, tasks)
    spare = _buffers.take("spare", workers * BLOCK_BYTES + 64)
    p[P.scratch], p[P.scratch_stride] = aligned(spare), BLOCK_BYTES
    _run(p, workers)


def _even(length: int, largest: int, step: int) -> int:
    """The largest tile for equal tiles of at most `largest`, in whole steps."""
    tiles = -(-length // largest)
    return min(largest, _round_up(-(-length // tiles), step))


@functools.cache
def l2_bytes() -> int:
    return dict(cpu().cache_bytes).get("L2", 1 << 20)


def _largest_tile(kernel: str, depth: int) -> tuple[int, int]:
    """(rows, columns)."""
    if kernel != TILES:
        return TILE_ROWS, TILE_COLUMNS
    return AMX_ROWS, max(4 * W, min(AMX_COLUMNS, l2_bytes() // (4 * depth) // (2 * W) * (2 * W)))


def _tile_shape(rows: int, columns: int, depth: int, kernel: str, workers: int) -> tuple[int, int]:
    """Equal tiles, smaller ones when there are too few for the workers to share evenly; no bit depends on it."""
    one_slab = rows <= ONE_SLAB_ROWS
    panel = 2 * W if kernel == TILES else NV * W
    most_rows, most_columns = _largest_tile(kernel, depth)
    tile_rows = _round_up(rows, W) if one_slab else _even(rows, most_rows, 2 * W)
    tile_columns = _even(columns, most_columns, panel)
    while workers > 1:
        tiles = -(-rows // tile_rows) * -(-columns // tile_columns)
        if tiles >= 4 * workers or (tiles >= workers and tiles % workers == 0):
            break
        if tile_columns > 2 * TILE_COLUMNS:
            tile_columns = _round_up(tile_columns // 2, panel)
        elif tile_rows > 4 * W and not one_slab:
            tile_rows = _round_up(tile_rows // 2, 2 * W)
        elif tile_columns > panel:
            tile_columns = _round_up(tile_columns // 2, panel)
        else:
            break
    return tile_rows, tile_columns


def gemm(
    a: torch.Tensor,
    b: "torch.Tensor | Packed | Columns",
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    compute: torch.dtype | None = None,
    workers: int | None = None,
) -> torch.Tensor:
    """(add (M, N) +) a (M, K) @ b (K, N) (+ bias (N,)) -> (M, N).

    a, b: float32 or bfloat16, any strides; b may be Packed, or weights packed at load. compute: float32 or bfloat16, by default a's dtype; operands
    of the other type are converted while packing. out: float32 or bfloat16, rows or columns contiguous. add: float32, strides as out,
    `out` itself to accumulate.
    """
    compute = compute or a.dtype
    (rows, depth), columns = a.shape, b.shape[1]
    if out is None:
        out = torch.empty((rows, columns), dtype=out_dtype or a.dtype)
    assert out.shape == (rows, columns) and b.shape[0] == depth, "gemm: shapes do not fit"
    assert add is None or (add.dtype == torch.float32 and add.shape == out.shape), "gemm: add must be float32, of out's shape"
    if rows == 0 or columns == 0:
        return out
    if depth == 0:
        out.copy_(add) if add is not None else out.zero_()
        return out.add_(bias) if bias is not None else out
    assert add is None or columns == 1 or add.stride() == out.stride(), "gemm: add and out must have the same strides"
    if columns > 1 and out.stride(1) != 1:
        assert out.stride(0) == 1 and bias is None and isinstance(b, torch.Tensor), "gemm: output strides not served"
        gemm(b.t(), a.t(), out=out.t(), add=None if add is None else add.t(), compute=compute, workers=workers)
        return out
    if workers is None:
        workers = num_workers("matmul", ((rows, depth), (depth, columns)), compute)
    _sum_parts(a, b, out, add, bias, kernel_for(compute), workers, None)
    return out


def gemm_activated(
    a: torch.Tensor, b: "torch.Tensor | Packed | Columns", end: activation.Epilogue, *, workers: int, keep: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """a (M, K) @ b (K, N) (+ bias (N,)) -> the tensors of `end`; computed in a's dtype, the sums themselves rounded into `keep`."""
    (rows, depth), columns = a.shape, b.shape[1]
    assert end.hidden.shape == (rows, columns), "gemm: shapes do not fit"
    if rows == 0 or columns == 0:
        return
    if depth == 0:
        a, b = a.new_zeros((rows, 1)), a.new_zeros((1, columns))
    _sum_parts(a, b, keep, None, bias, kernel_for(a.dtype), workers, end)


def _sum_parts(
    a: torch.Tensor, b: "torch.Tensor | Packed | Columns", out: torch.Tensor | None, add: torch.Tensor | None, bias: torch.Tensor | None,
    kernel: str, workers: int, end: activation.Epilogue | None,
) -> None:  # fmt: skip
    kernel = b.kernel if isinstance(b, Packed) else kernel
    parts = k_parts(a.shape[1])
    total = out  # float32 home of the sum over parts
    if len(parts) > 1 and (out is None or end is not None or out.dtype != torch.float32):
        total = torch.empty((a.shape[0], b.shape[1]), dtype=torch.float32)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    for index, (k0, num_k) in enumerate(parts):
        last = index == len(parts) - 1
        whole = len(parts) == 1  # a view costs microseconds
        _part(
            a if whole else a[:, k0 : k0 + num_k],
            b.address(index) if isinstance(b, Packed) else b if whole or isinstance(b, Columns) else b[k0 : k0 + num_k],
            b.shape[1],
            out if last else total,
            total if index > 0 else add,
            bias if last else None,
            kernel,
            workers,
            end if last else None,
            k0,
        )


@functools.lru_cache(maxsize=4096)
def _cut(rows: int, columns: int, depth: int, kernel: str, ready: bool) -> tuple[int, int]:
    """Rows of A and columns of B whose packed copies are made at a time."""
    strip = strip_bytes(kernel, depth)
    tile_rows, tile_columns = _largest_tile(kernel, depth)
    row_part = min(rows, max(tile_rows, PACK_BYTES // strip * W // tile_rows * tile_rows))
    if ready or rows <= ONE_SLAB_ROWS:
        return row_part, columns
    return row_part, min(columns, max(tile_columns, PACK_BYTES // strip * W // tile_columns * tile_columns))


class BlockPlan(NamedTuple):
    """All of the parameter block but its addresses, and the sizes of the work space: the same for every call of one kind."""

    fields: np.ndarray
    workers: int
    scratch_bytes: int
    a_bytes: int
    b_bytes: int


@functools.lru_cache(maxsize=4096)
def block_plan(
    rows: int, columns: int, depth: int, kernel: str, workers: int,
    a_stride: tuple[int, int], a_dtype: torch.dtype, b_stride: tuple[int, int] | None, b_dtype: torch.dtype | None,
    out_dtype: torch.dtype, direct: bool, pack_a: bool, strips: bool = False,
) -> BlockPlan:  # fmt: skip
    """b_stride None: B was packed before. strips: B is weights packed at load, and its stride bytes from strip to strip."""
    strip = strip_bytes(kernel, depth)
    one_slab = rows <= ONE_SLAB_ROWS
    tile_rows, tile_columns = _tile_shape(rows, columns, depth, kernel, workers)
    tiles = -(-rows // tile_rows) * -(-columns // tile_columns)
    p = np.zeros(len(P), np.int64)
    p[P.kernel], p[P.block] = CODES[kernel], _block(kernel, depth)
    p[P.rows], p[P.columns], p[P.depth] = rows, columns, depth
    p[P.a_row], p[P.a_k], p[P.a_mode], p[P.a_strip] = *a_stride, pack_mode(kernel, a_dtype), strip
    p[P.b_strip], p[P.b_ready] = strip, 1
    p[P.out_half], p[P.direct] = out_dtype == torch.bfloat16, direct
    p[P.tile_rows], p[P.tile_columns], p[P.num_tiles] = tile_rows, tile_columns, tiles
    # Whole tiles of bfloat16 rows are loaded from where they lie.
    p[P.a_in_place] = kernel == TILES and a_dtype == torch.bfloat16 and a_stride[1] == 1 and rows % W == 0 and depth % (2 * W) == 0
    # Tiles in one piece, so that a worker's rows of A stay in its caches; in turn where A is read as it lies, and where B is large: both measured.
    p[P.dealt] = p[P.a_in_place] or -(-columns // W) * strip > PACK_BYTES
    if pack_a and not p[P.a_in_place]:
        p[P.group_a] = group = pack_group(rows, workers)
        p[P.tasks_a] = -(-rows // (group * W))
    b_bytes = 0
    if b_stride is not None:
        assert b_dtype is not None
        p[P.b_k], p[P.b_column], p[P.b_mode] = *b_stride, (strips_mode if strips else pack_mode)(kernel, b_dtype)
        in_place = strips and W == STRIP and CODES[kernel] == (BY_PAIRS if b_dtype == torch.bfloat16 else BY_CHAINS)
        p[P.b_ready] = in_place or not one_slab
        if in_place:
            p[P.b_strip] = b_stride[1]
        elif not one_slab:
            p[P.group_b] = group = pack_group(columns, workers)
            p[P.tasks_b] = -(-columns // (group * W))
            b_bytes = -(-columns // W) * strip + 64
    block_bytes = int(p[P.block]) // (1 if CODES[kernel] == BY_CHAINS else 2) * WORD
    tile_bytes = BLOCK_BYTES + tile_columns * block_bytes + _round_up(tile_rows, 2 * W) * tile_columns * WORD + 8 * BLOCK_BYTES
    stride = _round_up(tile_bytes, 4096) + 64  # not a multiple of 4096: the workers' tiles spread over sets
    p[P.scratch_stride] = stride
    workers = max(1, min(workers, max(tiles, int(p[P.tasks_a] + p[P.tasks_b]))))
    return BlockPlan(p, workers, stride * workers + 64, _round_up(rows, 2 * W) // W * strip + 64, b_bytes)


def launched_workers(planned: int, rows: int, depth: int, columns: int, dtype: torch.dtype, packed: bool = False) -> int:
    """How many of the planned workers a product of operands that lie row by row uses; packed: B was packed before."""
    if not rows * depth * columns:
        return 1
    kernel, most = kernel_for(dtype), 1
    for _, num_k in k_parts(depth):
        row_part, column_part = _cut(rows, columns, num_k, kernel, packed)
        for r0 in range(0, rows, row_part):
            for c0 in range(0, columns, column_part):
                plan = block_plan(
                    min(row_part, rows - r0), min(column_part, columns - c0), num_k, kernel, planned, (depth, 1), dtype,
                    None if packed else (1, depth), None if packed else dtype, dtype, False, c0 == 0,
                )  # fmt: skip
                most = max(most, plan.workers)
    return most


def _part(
    a: torch.Tensor,
    b: torch.Tensor | int | Columns,
    columns: int,
    out: torch.Tensor | None,
    old: torch.Tensor | None,
    bias: torch.Tensor | None,
    kernel: str,
    workers: int,
    end: activation.Epilogue | None,
    k0: int,
) -> None:
    """One part of K: out = (old +) a b (+ bias). b: a tensor, the address of its packed copy, or all of K in strips, read from k0 on."""
    rows, depth = a.shape
    strips = b.strips.values if isinstance(b, Columns) else None
    b_stride: tuple[int, int] | None = None
    if strips is not None:
        b_stride, b_dtype = (0, strips.stride(0) * strips.element_size()), strips.dtype
    elif isinstance(b, torch.Tensor):
        b_stride, b_dtype = (b.stride(0), b.stride(1)), b.dtype
    else:
        b_dtype = None
    out_dtype = out.dtype if end is None and out is not None else a.dtype
    ready = isinstance(b, int)
    row_part, column_part = _cut(rows, columns, depth, kernel, ready)
    # AMX would store its tiles faster than lines of C that are not in the caches arrive.
    direct = kernel != TILES and old is None and bias is None and end is None and out_dtype == torch.float32
    for r0 in range(0, rows, row_part):
        for c0 in range(0, columns, column_part):
            plan = block_plan(
                min(row_part, rows - r0), min(column_part, columns - c0), depth, kernel, workers, a.stride(), a.dtype,
                b_stride, b_dtype, out_dtype, direct, c0 == 0, strips is not None,
            )  # fmt: skip
            p = plan.fields.copy()
            # Held until the workers are done: the largest are not kept beyond this call.
            held = [_buffers.take("scratch", plan.scratch_bytes), _buffers.take("a", plan.a_bytes)]
            p[P.scratch], p[P.a_packed] = map(aligned, held)
            p[P.configuration] = CONFIGURATION
            p[P.a] = a.data_ptr() + r0 * a.stride(0) * a.element_size()
            if isinstance(b, int):
                p[P.b_packed] = b
            else:
                if strips is not None:  # c0 is that of a tile: a multiple of STRIP
                    p[P.b_packed] = p[P.b] = strips[c0 // STRIP, k0 // (2 if strips.dtype == torch.bfloat16 else 1)].data_ptr()
                elif isinstance(b, torch.Tensor):
                    p[P.b] = b.data_ptr() + c0 * b.stride(1) * b.element_size()
                if plan.b_bytes:
                    held.append(_buffers.take("b", plan.b_bytes))
                    p[P.b_packed] = aligned(held[-1])
            if out is not None:
                _place(p, P.out, P.out_row, out, r0, c0)
            if end is not None:
                p[P.what], p[P.finish] = end.what, activation.finish(end.activation, end.what)
                for field, tensor in ((P.hidden, end.hidden), (P.z, end.z), (P.up, end.up), (P.dz, end.dz), (P.dup, end.dup)):
                    if tensor is not None:
                        _place(p, field, P.hidden_row, tensor, r0, c0)
            if old is not None:
                _place(p, P.old, P.old_row, old, r0, c0)
            if bias is not None:
                p[P.bias] = bias.data_ptr() + c0 * 4
            _run(p, plan.workers)
            del held


def _place(p: np.ndarray, address: int, row: int, t: torch.Tensor, r0: int, c0: int) -> None:
    size, stride = t.element_size(), t.stride(0)
    p[address] = t.data_ptr() + (r0 * stride + c0) * size
    p[row] = stride * size
