"""Products of a few rows with weights that are read once, from where they lie: the decoding of one token.

M rows of activations, K summed over, N outputs. gemm.py packs the weights first, which pays when many rows use them; here a strip of W
outputs goes through a few kilobytes of the L1 cache, or straight into AMX tiles, so that the weights cross the memory bus once and
nothing else does. An element has the bits that gemm.py gives it: the same K blocks, the same chain inside a block, the same epilogue.

A job is one matrix; a launch has the tasks of several jobs (the projections of one layer). A job may have a partner, whose same outputs are
made first: gate before up. Weights are float32, bfloat16, or int8 with a scale for every SCALE_BLOCK of K (quantized.py).
"""

from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba import activation, gemm, int8, pack
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.gemm_block import tiles_off, tiles_on
from cllm.kernels.numba.gemm_kernel import BY_CHAINS, BY_PAIRS, BY_TILES
from cllm.kernels.numba.int8 import GROUP_ROWS, HAS_INTEGERS, INTEGER_ROWS, LINE, STRIPS, TILE_BYTES
from cllm.kernels.numba.launch import Kernel, int64_at, is_half, load, scratch, store
from cllm.kernels.numba.llvm import HAS_PAIRS
from cllm.kernels.numba.matvec_words import fill_chain, fill_paired
from cllm.kernels.numba.micro import CONFIGURATION, HAS_TILES, WORD, make_micro, make_tile_micro
from cllm.kernels.numba.pack import pack_strip
from cllm.kernels.numba.simd import W, vadd, vload, vstore
from cllm.kernels.quantization import SCALE_BLOCK, STRIP, Quantized

MOST_ROWS = W  # the most rows of x that a job takes: those of one strip
MOST_TASK_COLUMNS = 1024


class _Job(NamedTuple):
    """One matrix, int64: addresses (0 where there is no such operand), and strides in bytes."""

    kernel: int  # BY_CHAINS, BY_PAIRS, BY_TILES or BY_INTEGERS
    rows: int
    columns: int
    depth: int
    x: int
    x_row: int
    x_half: int  # whether x is bfloat16
    b: int  # the weights
    b_column: int  # from output to output; of int8 weights from strip to strip
    b_k: int
    b_mode: int  # see pack.py; INT8 beside those
    scales: int  # of int8 weights
    scales_strip: int
    bias: int
    out: int
    out_row: int
    out_half: int
    activation: int  # -1: none
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
INT8 = len(pack.MODES)  # a mode beside those of pack.py
BY_INTEGERS = BY_TILES + 1  # a way to multiply beside those of gemm_kernel.py

_PART = gemm.K_PART
_STRIP_BYTES = gemm.BLOCK_WORDS * W * WORD
_SUMS_ROW = STRIPS * W * WORD
# Work space of a worker: strips of B, sums of a part and their total, tiles, a block to transpose in; then x, packed as gemm packs B.
_SUMS = STRIPS * (_STRIP_BYTES + LINE)
_TOTAL = _SUMS + MOST_ROWS * _SUMS_ROW
_TURNED = _TOTAL + INTEGER_ROWS * _SUMS_ROW
_SPARE = _TURNED + STRIPS * W * W * WORD
_X = _SPARE + W * W * WORD

_chain_1, _chain_n = make_micro(1, 1), make_micro(1, STRIPS)
if HAS_PAIRS:
    _pairs_1, _pairs_n = make_micro(1, 1, True), make_micro(1, STRIPS, True)
if HAS_TILES:
    _tiles_1, _tiles_2 = make_tile_micro(1, 1), make_tile_micro(2, 1)


# ---- a group of strips through K -------------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _fill(job, c, lanes, k, num_k, words, target, spare):
    """One strip of the weights for one K block, as gemm.py packs it; rows first, as the A side, for AMX tiles."""
    mode, column, step, kernel = int64_at(job, JOB.b_mode), int64_at(job, JOB.b_column), int64_at(job, JOB.b_k), int64_at(job, JOB.kernel)
    size = 2 if mode == pack.BF16_WIDENED or mode == pack.BF16_PAIRS else 4
    if mode == INT8:  # B_COLUMN and SCALES_STRIP take from strip to strip
        source = int64_at(job, JOB.b) + c // STRIP * column + c % STRIP * 4
        scales = int64_at(job, JOB.scales) + c // STRIP * int64_at(job, JOB.scales_strip) + c % STRIP * 4
        int8.fill_words(int64_at(job, JOB.x_half), kernel != BY_CHAINS, source, scales, k, words, target)
        return
    source = int64_at(job, JOB.b) + c * column + k * step
    whole = lanes == W and step == size and num_k == words * (1 if kernel == BY_CHAINS else 2)
    if whole and kernel == BY_CHAINS and mode != pack.F32_ROUNDED_WIDENED:
        fill_chain(mode, source, column, words, target)
    elif whole and kernel != BY_CHAINS and (mode == pack.BF16_PAIRS) == (kernel == BY_PAIRS):
        fill_paired(kernel == BY_TILES, source, column, words, target)
    else:
        pack_strip(mode, source, column // size, step // size, lanes, num_k, words, target, spare, kernel == BY_TILES)


@numba.njit(cache=True, nogil=True)
def _chain_block(x, b, sums, rows, words, strips, first):
    """One K block of every row: sums = or += x b."""
    for m in range(rows):
        to = sums + m * _SUMS_ROW
        old = 0 if first else to
        if strips == STRIPS:
            _chain_n(x + m * WORD, b, _STRIP_BYTES + LINE, old, 0, to, 0, words)
        else:
            for s in range(strips):
                beside = s * (W * WORD)
                _chain_1(x + m * WORD, b + s * (_STRIP_BYTES + LINE), 0, 0 if first else to + beside, 0, to + beside, 0, words)


def _pairs_block_py(x, b, sums, rows, words, strips, first):
    for m in range(rows):
        to = sums + m * _SUMS_ROW
        old = 0 if first else to
        if strips == STRIPS:
            _pairs_n(x + m * WORD, b, _STRIP_BYTES + LINE, old, 0, to, 0, words)
        else:
            for s in range(strips):
                beside = s * (W * WORD)
                _pairs_1(x + m * WORD, b + s * (_STRIP_BYTES + LINE), 0, 0 if first else to + beside, 0, to + beside, 0, words)


def _tiles_block_py(x, b, b_strip, b_row, b_step, turned, steps, strips, first):
    """The weights are the A side here: turned [strip][output][row of x] = or += b x."""
    for s in range(0, strips, 2):
        at_b, to = b + s * b_strip, turned + s * (W * W * WORD)
        old = 0 if first else to
        if s + 1 < strips:
            _tiles_2(at_b, b_strip, b_row, b_step, x, 0, old, W * WORD, to, W * WORD, steps)
        else:
            _tiles_1(at_b, b_strip, b_row, b_step, x, 0, old, W * WORD, to, W * WORD, steps)


def _absent_block(x, b, sums, rows, words, strips, first):
    pass


def _absent_tiles(x, b, b_strip, b_row, b_step, turned, steps, strips, first):
    pass


# A CPU without the instructions must not see them: LLVM could not select them.
_jit = numba.njit(cache=True, nogil=True)
_pairs_block = _jit(_pairs_block_py if HAS_PAIRS else _absent_block)
_tiles_block = _jit(_tiles_block_py if HAS_TILES else _absent_tiles)


@numba.njit(cache=True, nogil=True)
def _part(job, scratch, c, columns, k0, num_k, sums):
    """sums [row][columns] of one part of K."""
    kernel, rows, column = int64_at(job, JOB.kernel), int64_at(job, JOB.rows), int64_at(job, JOB.b_column)
    per_word = 1 if kernel == BY_CHAINS else 2
    blocks = (num_k + gemm.BLOCK_WORDS * per_word - 1) // (gemm.BLOCK_WORDS * per_word)
    step = W * per_word
    block = ((num_k + blocks - 1) // blocks + step - 1) // step * step
    strips = (columns + W - 1) // W
    b, turned, spare = scratch, scratch + _TURNED, scratch + _SPARE
    size = int64_at(job, JOB.b_k)  # 1, 2 or 4 where the elements of one output lie side by side
    in_place = kernel == BY_TILES and int64_at(job, JOB.b_mode) == pack.BF16_PAIRS and size == 2 and columns % W == 0
    for k in range(0, num_k, block):
        n = min(block, num_k - k)
        words = (n + per_word - 1) // per_word
        padded = (words + W - 1) // W * W
        x = scratch + _X + (k0 + k) // per_word * (W * WORD)
        if in_place and n % step == 0:
            at = int64_at(job, JOB.b) + c * column + (k0 + k) * 2
            _tiles_block(x, at, W * column, column, W * WORD, turned, padded // W, strips, k == 0)
            continue
        for s in range(strips):
            _fill(job, c + s * W, min(W, columns - s * W), k0 + k, n, padded, b + s * (_STRIP_BYTES + LINE), spare)
        if kernel == BY_TILES:
            _tiles_block(x, b, _STRIP_BYTES + LINE, W * WORD, W * W * WORD, turned, padded // W, strips, k == 0)
        elif kernel == BY_PAIRS:
            _pairs_block(x, b, sums, rows, words, strips, k == 0)
        else:
            _chain_block(x, b, sums, rows, words, strips, k == 0)
    if kernel == BY_TILES:
        for s in range(strips):
            pack.transpose(turned + s * (W * W * WORD), W * WORD, spare)
            for m in range(rows):
                vstore(sums + m * _SUMS_ROW, s * W, vload(spare, m * W))


# ---- a launch --------------------------------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _finish(job, total, c, columns):
    rows, half, row = int64_at(job, JOB.rows), int64_at(job, JOB.out_half), int64_at(job, JOB.out_row)
    size = 2 if half else 4
    bias = int64_at(job, JOB.bias)
    if bias != 0:
        bias += c * 4
    if int64_at(job, JOB.activation) >= 0:
        z = int64_at(job, JOB.z)
        if z != 0:
            z += c * size
        hidden = int64_at(job, JOB.hidden) + c * size
        activation.finish_piece(int64_at(job, JOB.activation), activation.ACTIVATE, half != 0, rows, columns, total, _SUMS_ROW, 0, 0, bias, row,
                                z, 0, 0, hidden, 0, 0)  # fmt: skip
        return
    out = int64_at(job, JOB.out) + c * size
    for m in range(rows):
        for i in range(0, columns, W):
            v = vload(total + m * _SUMS_ROW, i)
            if bias != 0:
                v = vadd(v, load(bias, False, i, columns - i))
            store(out + m * row, half, i, v, columns - i)


@numba.njit(cache=True, nogil=True)
def _pack_x(job, scratch):
    num_k, half = int64_at(job, JOB.depth), int64_at(job, JOB.x_half)
    size = 2 if half else 4
    paired = int64_at(job, JOB.kernel) != BY_CHAINS
    mode = (pack.BF16_PAIRS if paired else pack.BF16_WIDENED) if half else pack.F32_AS_IS
    words = ((num_k + 1) // 2 if paired else num_k) + W - 1
    pack_strip(mode, int64_at(job, JOB.x), int64_at(job, JOB.x_row) // size, 1, int64_at(job, JOB.rows), num_k, words // W * W, scratch + _X,
               scratch + _SPARE, False)  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _columns(job, scratch, begin, end):
    """Outputs [begin, end) of every row."""
    depth, rows = int64_at(job, JOB.depth), int64_at(job, JOB.rows)
    sums, total = scratch + _SUMS, scratch + _TOTAL
    integers = int64_at(job, JOB.kernel) == BY_INTEGERS
    if integers:
        int8.pack_digits(int64_at(job, JOB.x), int64_at(job, JOB.x_row), int64_at(job, JOB.x_half), rows, depth, scratch + _X)
    else:
        _pack_x(job, scratch)
    for c in range(begin, end, STRIPS * W):
        columns = min(STRIPS * W, end - c)
        if integers:
            row, scales_row = int64_at(job, JOB.b_column), int64_at(job, JOB.scales_strip)
            weights, scales = int64_at(job, JOB.b) + c // STRIP * row, int64_at(job, JOB.scales) + c // STRIP * scales_row
            int8.multiply(scratch + _X, rows, depth, weights, row, scales, scales_row, (columns + W - 1) // W, scratch, total, _SUMS_ROW)
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


kernel = Kernel(_launch, dealt=True)


# ---- on the Python side ----------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """Where a job writes: address and bytes from row to row; with an activation that is its result, and z what `partner` wrote."""

    address: int
    row: int
    activation: str | None = None
    z: int = 0


def in_integers(dtype: torch.dtype) -> bool:
    """Whether int8 weights are multiplied by int8 tiles with activations of this dtype."""
    return HAS_INTEGERS and dtype == torch.bfloat16 and gemm.bf16_kernel() == gemm.TILES


def scratch_bytes(depth: int, rows: int = MOST_ROWS) -> int:
    packed = (depth + SCALE_BLOCK) * max(W * WORD, -(-rows // GROUP_ROWS) * (TILE_BYTES // SCALE_BLOCK) + rows)
    return -(-(_X + packed) // 4096) * 4096 + LINE


def task_columns(columns: int, workers: int) -> int:
    """Equal shares, in whole groups of strips; no bit depends on it."""
    step = STRIPS * W
    groups = -(-columns // step)
    return min(MOST_TASK_COLUMNS, -(-groups // workers) * step)


def job(x: Tensor, weight: "Tensor | Quantized", bias: Tensor | None, out: Output, workers: int, first_task: int = 0, partner: int = 0) -> np.ndarray:
    """x (M, K), weight (N, K) of any strides -> the job x @ weight.T (+ bias float32). The caller keeps all memory alive."""
    (rows, depth), columns = x.shape, weight.shape[0]
    integers = isinstance(weight, Quantized) and in_integers(x.dtype)
    assert rows <= (INTEGER_ROWS if integers else MOST_ROWS) and weight.shape[1] == depth and x.stride(1) == 1
    kernel = gemm.kernel_for(x.dtype)
    p = np.zeros(len(JOB), np.int64)
    p[JOB.kernel], p[JOB.rows], p[JOB.columns], p[JOB.depth] = BY_INTEGERS if integers else gemm.CODES[kernel], rows, columns, depth
    p[JOB.tile_configuration] = int8.configuration(rows)
    p[JOB.x], p[JOB.x_row], p[JOB.x_half] = x.data_ptr(), x.stride(0) * x.element_size(), is_half(x)
    if isinstance(weight, Quantized):
        p[JOB.b], p[JOB.b_column], p[JOB.b_mode] = weight.values.data_ptr(), weight.values.stride(0), INT8
        p[JOB.scales], p[JOB.scales_strip] = weight.scales.data_ptr(), weight.scales.stride(0) * 4
    else:
        size = weight.element_size()
        p[JOB.b], p[JOB.b_column], p[JOB.b_k], p[JOB.b_mode] = (
            weight.data_ptr(),
            weight.stride(0) * size,
            weight.stride(1) * size,
            gemm.pack_mode(kernel, weight.dtype),
        )
    p[JOB.bias] = 0 if bias is None else bias.data_ptr()
    p[JOB.out], p[JOB.out_row], p[JOB.out_half], p[JOB.activation] = out.address, out.row, is_half(x), -1
    if out.activation is not None:
        p[JOB.hidden], p[JOB.z], p[JOB.activation] = out.address, out.z, activation.CODES[out.activation]
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


def matvec(x: Tensor, weight: "Tensor | Quantized", bias: Tensor | None = None, workers: int = 1, out: Tensor | None = None) -> Tensor:
    """x (M, K) @ weight (N, K).T + bias (N,) -> (M, N) in x's dtype, M <= MOST_ROWS or, of int8 tiles, INTEGER_ROWS."""
    if out is None:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    if out.numel():
        bias = _float32(bias)
        p = job(x, weight, bias, Output(*_place(out)), workers)
        arguments, owner = _prepared([p], workers)
        kernel(num_tasks(p), workers, arguments)
        del owner
    return out


def activated(x: Tensor, w_gate: "Tensor | Quantized | None", w_up: "Tensor | Quantized", b_up: Tensor | None, name: str, workers: int) -> Tensor:
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
