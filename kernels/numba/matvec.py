"""Products of a few rows with weights that are read once: the decoding of one token for each of up to MOST_ROWS sequences.

M rows of activations, K summed over, N outputs. Weights that were packed at load (strips.py, quantization.py) are read as they lie, from the first
byte to the last, and once for all rows. gemm.py packs other weights first, which pays when many rows use them; here a strip of W outputs goes through
a few kilobytes of the L1 cache, or straight into AMX tiles. An element has the bits that gemm.py gives it: the same K blocks, the same chain inside a
block, the same epilogue.

A job is one matrix; a launch has the tasks of several jobs (the projections of one layer). A job may have a partner, whose same outputs are
made first: gate before up.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba import activation, gemm, int8, integers, pack, stream
from cllm.kernels.numba.compiling import jit
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.gemm_block import tiles_off, tiles_on
from cllm.kernels.numba.gemm_kernel import BY_CHAINS, BY_PAIRS, BY_TILES
from cllm.kernels.numba.int8 import GROUP_ROWS, HAS_INTEGERS, INTEGER_ROWS, LINE, TILE_BYTES
from cllm.kernels.numba.launch import Kernel, copy_bytes, int64_at, is_half, load, scratch, store
from cllm.kernels.numba.matvec_words import fill_chain, fill_packed, fill_paired
from cllm.kernels.numba.micro import CONFIGURATION, HAS_TILES, WORD, make_tile_micro
from cllm.kernels.numba.pack import STRIPS_BF16, STRIPS_F32, STRIPS_INT4, STRIPS_INT8, pack_strip
from cllm.kernels.numba.simd import W, vadd, vload, vstore, vzero
from cllm.kernels.numba.stream import BFLOAT16, FLOAT32, STRIPS, WORKED
from cllm.kernels.quantization import SCALE_BLOCK, Quantized
from cllm.kernels.stack import Weight
from cllm.kernels.strips import STRIP, Strips

MOST_ROWS = 32  # the most rows of x that a job takes; of integers INTEGER_ROWS
MOST_TASK_COLUMNS = 1024


class _Job(NamedTuple):
    """One matrix, int64: addresses (0 where there is no such operand), and strides in bytes."""

    kernel: int  # BY_CHAINS, BY_PAIRS, BY_TILES, BY_WORDS or BY_INTEGERS
    rows: int
    columns: int
    depth: int
    x: int
    x_row: int
    x_half: int  # whether x is bfloat16
    x_packed_row: int  # from row to row in the work space, for AMX tiles from strip to strip
    b: int  # the weights
    b_column: int  # from output to output; of weights packed at load from strip to strip
    b_k: int
    b_mode: int  # see pack.py
    scales: int  # of int8 and int4 weights
    scales_strip: int
    bias: int
    out: int
    out_row: int
    out_half: int
    finish: int  # the address of the activation at the end (activation.finish); 0: there is none
    hidden: int  # the result of the activation
    z: int  # what the partner wrote
    partner: int  # the address of another job, whose same outputs are made first; 0: none
    task_columns: int
    first_task: int  # of this job among the tasks of the launch
    tile_configuration: int  # for int8 tiles


class _Launch(NamedTuple):
    """What the kernel reads, before the addresses of the jobs."""

    num_jobs: int
    scratch: int  # work space of the first worker
    scratch_stride: int
    configuration: int  # of the AMX tiles


JOB, _ = fields(_Job)
P, _launch_arguments = fields(_Launch)
BY_WORDS, BY_INTEGERS = BY_TILES + 1, BY_TILES + 2  # ways to multiply beside those of gemm_kernel.py: int8 or int4 with int16, int8 on AMX tiles

_PART = gemm.K_PART
_GROUP = STRIPS * STRIP  # outputs that go through K together where the weights were packed at load; elsewhere STRIPS * W
_STRIP_BYTES = gemm.BLOCK_WORDS * W * WORD
_SUMS_ROW = _GROUP * WORD
# Work space of a worker: strips of B, sums of a part and their total, tiles, a block to transpose in; then x.
_SUMS = STRIPS * (_STRIP_BYTES + LINE)
_TOTAL = _SUMS + MOST_ROWS * _SUMS_ROW
_TURNED = _TOTAL + INTEGER_ROWS * _SUMS_ROW
_TURNED_ROWS = STRIPS * W * W * WORD  # the tiles of W rows of x
_SPARE = _TURNED + -(-MOST_ROWS // W) * _TURNED_ROWS
_X = _SPARE + W * W * WORD

if HAS_TILES:
    _tiles_1, _tiles_2 = make_tile_micro(1, 1), make_tile_micro(2, 1)


# ---- a group of strips through K -------------------------------------------------------------------------------------


@jit
def _fill(job, c, lanes, k, num_k, words, target, spare):
    """One strip of the weights for one K block, as gemm.py packs it; rows first, as the A side, for AMX tiles."""
    mode, column, step, kernel = int64_at(job, JOB.b_mode), int64_at(job, JOB.b_column), int64_at(job, JOB.b_k), int64_at(job, JOB.kernel)
    if mode >= STRIPS_F32:
        source = int64_at(job, JOB.b) + c // STRIP * column
        scales = int64_at(job, JOB.scales) + c // STRIP * int64_at(job, JOB.scales_strip)
        if mode == STRIPS_INT8:
            int8.fill_words(source + c % STRIP * WORD, scales + c % STRIP * WORD, k, words, target)
        elif mode == STRIPS_INT4:
            int8.fill_words4(source + c % STRIP * WORD, scales + c % STRIP * 2, k, words, target)
        elif kernel == BY_TILES:
            for word in range(0, words, W):
                pack.transpose(source + (k // 2 + word) * (STRIP * WORD), STRIP * WORD, target + word * (W * WORD))
        else:
            fill_packed(mode, kernel != BY_CHAINS, source + c % STRIP * WORD, k, words, target)
        return
    size = 2 if mode == pack.BF16_WIDENED or mode == pack.BF16_PAIRS else 4
    source = int64_at(job, JOB.b) + c * column + k * step
    whole = lanes == W and step == size and num_k == words * (1 if kernel == BY_CHAINS else 2)
    if whole and kernel == BY_CHAINS and mode != pack.F32_ROUNDED_WIDENED:
        fill_chain(mode, source, column, words, target)
    elif whole and kernel != BY_CHAINS and (mode == pack.BF16_PAIRS) == (kernel == BY_PAIRS):
        fill_paired(kernel == BY_TILES, source, column, words, target)
    else:
        pack_strip(mode, source, column // size, step // size, lanes, num_k, words, target, spare, kernel == BY_TILES)


def _tiles_block_py(x, x_strip, rows, b, b_strip, b_row, b_step, turned, steps, strips, first):
    """The weights are the A side here: turned [W rows of x][strip][output][row of x] = or += b x."""
    for _ in range(0, rows, W):
        for s in range(0, strips, 2):
            at_b, to = b + s * b_strip, turned + s * (W * W * WORD)
            old = 0 if first else to
            if s + 1 < strips:
                _tiles_2(at_b, b_strip, b_row, b_step, x, 0, old, W * WORD, to, W * WORD, steps)
            else:
                _tiles_1(at_b, b_strip, b_row, b_step, x, 0, old, W * WORD, to, W * WORD, steps)
        x += x_strip
        turned += _TURNED_ROWS


def _absent_tiles(x, x_strip, rows, b, b_strip, b_row, b_step, turned, steps, strips, first):
    pass


# A CPU without the instructions must not see them: LLVM could not select them.
_tiles_block = jit(_tiles_block_py if HAS_TILES else _absent_tiles)


@jit
def _turn_back(turned, spare, rows, strips, sums):
    """turned -> sums [row][outputs]."""
    for m0 in range(0, rows, W):
        for s in range(strips):
            pack.transpose(turned + m0 // W * _TURNED_ROWS + s * (W * W * WORD), W * WORD, spare)
            for m in range(m0, min(m0 + W, rows)):
                vstore(sums + m * _SUMS_ROW, s * W, vload(spare, (m - m0) * W))


@jit
def _part(job, scratch, c, columns, k0, num_k, sums):
    """sums [row][columns] of one part of K."""
    kernel, rows, mode = int64_at(job, JOB.kernel), int64_at(job, JOB.rows), int64_at(job, JOB.b_mode)
    column, x_row = int64_at(job, JOB.b_column), int64_at(job, JOB.x_packed_row)
    per_word = 1 if kernel == BY_CHAINS else 2
    blocks = (num_k + gemm.BLOCK_WORDS * per_word - 1) // (gemm.BLOCK_WORDS * per_word)
    step = W * per_word
    block = ((num_k + blocks - 1) // blocks + step - 1) // step * step
    b, turned, spare = scratch, scratch + _TURNED, scratch + _SPARE
    size = int64_at(job, JOB.b_k)  # 1, 2 or 4 where the elements of one output lie side by side
    in_place = kernel == BY_TILES and mode == pack.BF16_PAIRS and size == 2 and columns % W == 0
    streamed = kernel != BY_TILES and mode in (STRIPS_F32, STRIPS_BF16)
    strips = (columns + STRIP - 1) // STRIP if streamed else (columns + W - 1) // W
    for k in range(0, num_k, block):
        n = min(block, num_k - k)
        words = (n + per_word - 1) // per_word
        padded = (words + W - 1) // W * W
        word = (k0 + k) // per_word
        x = scratch + _X + word * (W * WORD if kernel == BY_TILES else WORD)
        if streamed:
            at = int64_at(job, JOB.b) + c // STRIP * column + (word if per_word == 2 or mode == STRIPS_F32 else word // 2) * (STRIP * WORD)
            kind = FLOAT32 if mode == STRIPS_F32 else BFLOAT16
            stream.multiply(kind, per_word == 2, x, x_row, at, column, sums, _SUMS_ROW, rows, words, strips, k == 0)
            continue
        if in_place and n % step == 0:
            at = int64_at(job, JOB.b) + c * column + (k0 + k) * 2
            _tiles_block(x, x_row, rows, at, W * column, column, W * WORD, turned, padded // W, strips, k == 0)
            continue
        for s in range(strips):
            _fill(job, c + s * W, min(W, columns - s * W), k0 + k, n, padded, b + s * (_STRIP_BYTES + LINE), spare)
        if kernel == BY_TILES:
            _tiles_block(x, x_row, rows, b, _STRIP_BYTES + LINE, W * WORD, W * W * WORD, turned, padded // W, strips, k == 0)
        else:
            stream.multiply(WORKED, kernel == BY_PAIRS, x, x_row, b, _STRIP_BYTES + LINE, sums, _SUMS_ROW, rows, words, strips, k == 0)
    if kernel == BY_TILES:
        _turn_back(turned, spare, rows, strips, sums)


# ---- a launch --------------------------------------------------------------------------------------------------------


@jit
def _finish(job, total, c, columns):
    rows, half, row = int64_at(job, JOB.rows), int64_at(job, JOB.out_half), int64_at(job, JOB.out_row)
    size = 2 if half else 4
    bias = int64_at(job, JOB.bias)
    if bias != 0:
        bias += c * 4
    if int64_at(job, JOB.finish) != 0:
        z = int64_at(job, JOB.z)
        if z != 0:
            z += c * size
        hidden = int64_at(job, JOB.hidden) + c * size
        activation.call_finish(int64_at(job, JOB.finish), half, rows, columns, total, _SUMS_ROW, 0, 0, bias, row, z, 0, 0, hidden, 0, 0)
        return
    out = int64_at(job, JOB.out) + c * size
    for m in range(rows):
        for i in range(0, columns, W):
            v = vload(total + m * _SUMS_ROW, i)
            if bias != 0:
                v = vadd(v, load(bias, False, i, columns - i))
            store(out + m * row, half, i, v, columns - i)


@jit
def _pack_x(job, scratch):
    """x as the kernel reads it: rows of words, or for AMX tiles strips of W rows as gemm.py packs B; 0 beyond K."""
    kernel, rows, num_k = int64_at(job, JOB.kernel), int64_at(job, JOB.rows), int64_at(job, JOB.depth)
    source, row, half, to_row = int64_at(job, JOB.x), int64_at(job, JOB.x_row), int64_at(job, JOB.x_half), int64_at(job, JOB.x_packed_row)
    target = scratch + _X
    if kernel == BY_INTEGERS:
        int8.pack_digits(source, row, half, rows, num_k, target)
    elif kernel == BY_WORDS:
        integers.pack_words(source, row, half, rows, num_k, target)
    elif kernel == BY_TILES:
        words = (num_k + 1) // 2 + W - 1
        for m in range(0, rows, W):
            pack_strip(pack.BF16_PAIRS, source + m * row, row // 2, 1, min(W, rows - m), num_k, words // W * W, target, scratch + _SPARE, False)
            target += to_row
    else:
        for _ in range(rows):
            if kernel == BY_PAIRS:
                vstore(target + num_k // 2 * WORD, 0, vzero())
                copy_bytes(target, source, num_k * 2)
            else:
                for k in range(0, num_k, W):
                    vstore(target, k, load(source, half, k, num_k - k))
            source += row
            target += to_row


@jit
def _columns(job, scratch, begin, end):
    """Outputs [begin, end) of every row."""
    depth, rows, kernel, mode = int64_at(job, JOB.depth), int64_at(job, JOB.rows), int64_at(job, JOB.kernel), int64_at(job, JOB.b_mode)
    sums, total, x = scratch + _SUMS, scratch + _TOTAL, scratch + _X
    integral = kernel in (BY_WORDS, BY_INTEGERS)
    _pack_x(job, scratch)
    step = _GROUP if integral or mode in (STRIPS_F32, STRIPS_BF16) else STRIPS * W
    for c in range(begin, end, step):
        columns = min(step, end - c)
        if integral:
            row, scales_row, strips = int64_at(job, JOB.b_column), int64_at(job, JOB.scales_strip), (columns + STRIP - 1) // STRIP
            weights, scales = int64_at(job, JOB.b) + c // STRIP * row, int64_at(job, JOB.scales) + c // STRIP * scales_row
            if kernel == BY_WORDS:
                integers.multiply(4 if mode == STRIPS_INT4 else 8, x, rows, depth, weights, row, scales, scales_row, strips, total, _SUMS_ROW)
            else:
                int8.multiply(x, rows, depth, weights, row, scales, scales_row, strips, scratch, total, _SUMS_ROW)
            _finish(job, total, c, columns)
            continue
        for k0 in range(0, depth, _PART):
            _part(job, scratch, c, columns, k0, min(_PART, depth - k0), total if k0 == 0 else sums)
            if k0 > 0:
                for m in range(rows):
                    for i in range(0, columns, W):
                        at = m * (_SUMS_ROW // WORD) + i
                        vstore(total, at, vadd(vload(total, at), vload(sums, at)))
        _finish(job, total, c, columns)


def _launch(p, f, task, worker):
    number = 0
    while number + 1 < p[P.num_jobs] and int64_at(p[len(P) + number + 1], JOB.first_task) <= task:
        number += 1
    job = p[len(P) + number]
    width = int64_at(job, JOB.task_columns)
    begin = (task - int64_at(job, JOB.first_task)) * width
    end = min(begin + width, int64_at(job, JOB.columns))
    scratch = p[P.scratch] + worker * p[P.scratch_stride]
    kernel = int64_at(job, JOB.kernel)
    tiles = kernel in (BY_TILES, BY_INTEGERS)
    if tiles:
        tiles_on(p[P.configuration] if kernel == BY_TILES else int64_at(job, JOB.tile_configuration))
    if int64_at(job, JOB.partner) != 0:
        _columns(int64_at(job, JOB.partner), scratch, begin, end)
    _columns(job, scratch, begin, end)
    if tiles:
        tiles_off()


kernel = Kernel(_launch, uneven=True)


# ---- on the Python side ----------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """Where a job writes: address and bytes from row to row; with an activation that is its result, and z what `partner` wrote."""

    address: int
    row: int
    activation: str | None = None
    z: int = 0


def in_integers(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether these weights are multiplied as the integers that they are with activations of this dtype, up to INTEGER_ROWS rows at a time."""
    return not isinstance(weight, (Tensor, Strips)) and dtype == torch.bfloat16


def most_rows(weight: Weight, dtype: torch.dtype) -> int:
    """The most rows of x that one job takes."""
    return INTEGER_ROWS if in_integers(weight, dtype) else MOST_ROWS


def _kernel(weight: Weight, dtype: torch.dtype) -> int:
    if in_integers(weight, dtype):
        return BY_INTEGERS if HAS_INTEGERS and gemm.bf16_kernel() == gemm.TILES and isinstance(weight, Quantized) else BY_WORDS
    return gemm.CODES[gemm.kernel_for(dtype)]


def _packed_row(kernel: int, depth: int) -> int:
    """Bytes from row to row of x in the work space, for AMX tiles from strip to strip; not a multiple of 4096: rows would share sets of the cache."""
    if kernel == BY_TILES:
        return -(-depth // (2 * W)) * (W * W * WORD)
    words = depth if kernel == BY_CHAINS else -(-depth // 2)
    return (words + W) * WORD // LINE * LINE + LINE


def scratch_bytes(depth: int, rows: int = MOST_ROWS) -> int:
    """Work space of a worker for jobs of so many rows and no larger depth, of whatever weights."""
    blocks = -(-depth // SCALE_BLOCK)
    by_rows = rows * max(_packed_row(BY_CHAINS, depth), integers.row_bytes(depth))
    by_strips = -(-rows // W) * _packed_row(BY_TILES, depth)
    by_digits = blocks * (-(-rows // GROUP_ROWS) * TILE_BYTES + rows * WORD)
    return -(-(_X + max(by_rows, by_strips if HAS_TILES else 0, by_digits if HAS_INTEGERS else 0)) // 4096) * 4096 + LINE


def task_columns(columns: int, workers: int) -> int:
    """Equal shares, in whole groups of strips; no bit depends on it."""
    groups = -(-columns // _GROUP)
    return min(MOST_TASK_COLUMNS, -(-groups // workers) * _GROUP)


def job(x: Tensor, weight: Weight, bias: Tensor | None, out: Output, workers: int, first_task: int = 0, partner: int = 0) -> np.ndarray:
    """x (M, K), weight (N, K), a tensor of any strides -> the job x @ weight.T (+ bias float32). The caller keeps all memory alive."""
    (rows, depth), columns = x.shape, weight.shape[0]
    assert rows <= most_rows(weight, x.dtype) and weight.shape[1] == depth and x.stride(1) == 1
    p = np.zeros(len(JOB), np.int64)
    p[JOB.kernel], p[JOB.rows], p[JOB.columns], p[JOB.depth] = _kernel(weight, x.dtype), rows, columns, depth
    p[JOB.tile_configuration] = int8.configuration(rows)
    p[JOB.x], p[JOB.x_row], p[JOB.x_half] = x.data_ptr(), x.stride(0) * x.element_size(), is_half(x)
    p[JOB.x_packed_row] = _packed_row(int(p[JOB.kernel]), depth)
    if isinstance(weight, Tensor):
        size = weight.element_size()
        p[JOB.b], p[JOB.b_column], p[JOB.b_k], p[JOB.b_mode] = (
            weight.data_ptr(),
            weight.stride(0) * size,
            weight.stride(1) * size,
            gemm.pack_mode(gemm.kernel_for(x.dtype), weight.dtype),
        )
    else:
        values = weight.values
        p[JOB.b], p[JOB.b_column] = values.data_ptr(), values.stride(0) * values.element_size()
        if isinstance(weight, Strips):
            p[JOB.b_mode] = gemm.strips_mode(gemm.kernel_for(x.dtype), weight.dtype)
        else:
            scales = weight.scales
            p[JOB.b_mode] = STRIPS_INT8 if isinstance(weight, Quantized) else STRIPS_INT4
            p[JOB.scales], p[JOB.scales_strip] = scales.data_ptr(), scales.stride(0) * scales.element_size()
    p[JOB.bias] = 0 if bias is None else bias.data_ptr()
    p[JOB.out], p[JOB.out_row], p[JOB.out_half], p[JOB.finish] = out.address, out.row, is_half(x), 0
    if out.activation is not None:
        p[JOB.hidden], p[JOB.z], p[JOB.finish] = out.address, out.z, activation.finish(out.activation, activation.ACTIVATE)
    p[JOB.partner], p[JOB.task_columns], p[JOB.first_task] = partner, task_columns(columns, workers), first_task
    return p


def num_tasks(p: np.ndarray) -> int:
    return int(-(-p[JOB.columns] // p[JOB.task_columns]))


def launch_arguments(jobs: list[np.ndarray], scratch: int, scratch_stride: int) -> tuple[int, ...]:
    """What the kernel reads for these jobs; scratch_stride: bytes of each worker's work space."""
    launch = _launch_arguments(num_jobs=len(jobs), scratch=scratch, scratch_stride=scratch_stride, configuration=CONFIGURATION)
    return (*launch, *(each.ctypes.data for each in jobs))


def _prepared(jobs: list[np.ndarray], workers: int) -> tuple[tuple[int, ...], Tensor]:
    """What the kernel reads for these jobs, and the work space behind it."""
    size = max(scratch_bytes(int(p[JOB.depth]), int(p[JOB.rows])) for p in jobs)
    owner, address = scratch("matvec", size * workers)
    return launch_arguments(jobs, address, size), owner


def _place(out: Tensor) -> tuple[int, int]:
    return out.data_ptr(), out.stride(0) * out.element_size()


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32).contiguous()


def matvec(x: Tensor, weight: Weight, bias: Tensor | None = None, workers: int = 1, out: Tensor | None = None) -> Tensor:
    """x (M, K) @ weight (N, K).T + bias (N,) -> (M, N) in x's dtype, M <= `most_rows`."""
    if out is None:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    if out.numel():
        bias = _float32(bias)
        p = job(x, weight, bias, Output(*_place(out)), workers)
        arguments, owner = _prepared([p], workers)
        kernel(num_tasks(p), workers, arguments)
        del owner
    return out


def activated(x: Tensor, w_gate: Weight | None, w_up: Weight, b_up: Tensor | None, name: str, workers: int) -> Tensor:
    """activation(gate) * (up + bias), or activation(up + bias): the first half of a feed-forward layer, (M, F)."""
    hidden = torch.empty((x.shape[0], w_up.shape[0]), dtype=x.dtype)
    b_up, z, partner = _float32(b_up), torch.empty_like(hidden), None
    if w_gate is not None:
        partner = job(x, w_gate, None, Output(*_place(z)), workers)
    end = Output(*_place(hidden), name, 0 if partner is None else z.data_ptr())
    p = job(x, w_up, b_up, end, workers, partner=0 if partner is None else partner.ctypes.data)
    arguments, owner = _prepared([p], workers)
    kernel(num_tasks(p), workers, arguments)
    del owner, partner
    return hidden
