"""Matrix product C = A B (+ C) (+ bias) on strided float32 or bfloat16 views, with float32 accumulation.

An element's bits depend on its row of A, its column of B and K, on nothing else: not on M, N, the tile grid, the number
of workers or whether B was packed before. K is cut into parts of K_PART and those into equal blocks; each block is one
fma chain from 0, blocks are added in order within a part, then parts in order. (AMX tiles continue one chain through a
part.) So a decoded token gets the bits of the same token in a long prefill.

Method: K. Goto, R. van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008 (BLIS): packed strips of A and
B, a micro-kernel in registers, tiles of C that stay in the L2 cache.
"""

import functools
import os
import threading
from typing import NamedTuple

import numba
import numpy as np
import torch

from cllm.kernels.numba import activation, micro, pack
from cllm.kernels.numba.launch import num_workers, share
from cllm.kernels.numba.micro import BLOCK_BYTES, HAS_TILES, MR, NV, WORD, make_micro, make_tile_micro, make_writing_micro, prefetch
from cllm.kernels.numba.pack import pack_lines, pack_strip
from cllm.kernels.numba.simd import HAS_PAIRS, W, vadd, vload, vload_masked, vstore, vstore_bf16, vstore_bf16_masked, vstore_masked
from cllm.runtime import threads
from cllm.runtime.device import cpu
from cllm.runtime.errors import BackendError

FP32, PAIRS, TILES, WIDENED = "fp32", "vdpbf16ps", "amx", "widened"  # micro-kernels; the last three compute bfloat16

BLOCK_WORDS = 128  # words of a strip in one K block: a panel of three strips takes 24 KB, half of an L1 cache of 48
TILE_BLOCK_WORDS = 256  # the same for AMX, where A passes the L1 cache by and a panel of two strips may take 32 KB
LINE = 64  # bytes of a cache line
FINISH_ROWS = 8
K_PART = 4096  # bounds the packed copies; float32 accumulation restarts here
TILE_ROWS, TILE_COLUMNS = 128, 192  # columns: 4 panels of 48
AMX_ROWS, AMX_COLUMNS = 512, 768  # at most: its part of B takes half of the L2 cache
ONE_SLAB_ROWS = 64  # up to here each tile packs its own part of B, once
MOST_GROUP, CHUNK_WORDS = 12, 32  # strips that one task packs; words at a time where the panel is contiguous
PACK_BYTES = 32 << 20  # packed copies of A and of B are kept below this, each

# Fields of the parameter block that the kernels read (int64; addresses and strides in bytes unless said).
(KERNEL, ROWS, COLUMNS, DEPTH, BLOCK, A, A_STRIP, A_ROW, A_K, A_MODE, A_PACKED, B, B_STRIP, B_COLUMN, B_K, B_MODE,
 B_PACKED, B_READY, OUT, OUT_ROW, OUT_HALF, OLD, OLD_ROW, BIAS, DIRECT, TILE_R, TILE_C, SCRATCH,
 SCRATCH_STRIDE, CONFIG, GROUP_A, GROUP_B, TASKS_A, TASKS_B, NUM_TILES, A_IN_PLACE, DEALT,
 WHAT, ACTIVATION, HIDDEN, Z, UP, DZ, DUP, HIDDEN_ROW, NUM_FIELDS) = range(46)  # fmt: skip
_CODE = {FP32: 0, WIDENED: 0, PAIRS: 1, TILES: 2}

_micro_1, _micro_2, _micro_n = make_micro(MR, 1), make_micro(MR, min(2, NV)), make_micro(MR, NV)
if HAS_PAIRS:
    _pairs_1, _pairs_2, _pairs_n = make_micro(MR, 1, True), make_micro(MR, 2, True), make_micro(MR, NV, True)
if HAS_TILES:
    _tile_11, _tile_12 = make_tile_micro(1, 1, stream_b=True), make_tile_micro(1, 2, stream_b=True)
    _tile_21, _tile_22 = make_tile_micro(2, 1, stream_b=True), make_tile_micro(2, 2, stream_b=True)
    _tile_writing = make_writing_micro()


# ---- one block of K: packed strips -> C tile -----------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _prefetch(address, begin, end):
    for line in range(begin, end):
        prefetch(address + line * LINE)


@numba.njit(cache=True, nogil=True)
def _prefetch_rows(address, row, lines, rows):
    for _ in range(rows):
        _prefetch(address, 0, lines)
        address += row


@numba.njit(cache=True, nogil=True)
def _prefetch_finish(p, r, c, rows, columns):
    """The lines that `_finish` will touch are on their way while the sums are made."""
    size = 2 if p[OUT_HALF] != 0 else 4
    lines = (columns * size + LINE - 1) // LINE
    if p[OUT] != 0:
        _prefetch_rows(p[OUT] + r * p[OUT_ROW] + c * size, p[OUT_ROW], lines, rows)
    if p[WHAT] != activation.NONE:
        for field in range(HIDDEN, DUP + 1):
            if p[field] != 0:
                _prefetch_rows(p[field] + r * p[HIDDEN_ROW] + c * size, p[HIDDEN_ROW], lines, rows)


@numba.njit(cache=True, nogil=True)
def _finish_activation(p, sums, sums_row, r, c, rows, columns):
    """The same where the product ends in an activation (activation.py)."""
    half, row = p[OUT_HALF] != 0, p[HIDDEN_ROW]
    at = r * row + c * (2 if half else 4)
    activation.finish_piece(
        p[ACTIVATION], p[WHAT], half, rows, columns, sums, sums_row,
        p[OLD] + r * p[OLD_ROW] + c * 4 if p[OLD] != 0 else 0,
        p[OLD_ROW],
        p[BIAS] + c * 4 if p[BIAS] != 0 else 0,
        row,
        p[Z] + at if p[Z] != 0 else 0,
        p[UP] + at if p[UP] != 0 else 0,
        p[OUT] + at if p[OUT] != 0 else 0,
        p[HIDDEN] + at,
        p[DZ] + at if p[DZ] != 0 else 0,
        p[DUP] + at if p[DUP] != 0 else 0,
    )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _finish_rows(p, sums, sums_row, r, c, rows, columns):
    """Sums (+ old C) (+ bias) -> C[r : r + rows, c : c + columns]."""
    half, out_row, old_row = p[OUT_HALF] != 0, p[OUT_ROW], p[OLD_ROW]
    out = p[OUT] + r * out_row + c * (2 if half else 4)
    old = p[OLD] + r * old_row + c * 4 if p[OLD] != 0 else 0
    bias = p[BIAS] + c * 4 if p[BIAS] != 0 else 0
    whole = columns - columns % W
    for _ in range(rows):
        for i in range(0, whole, W):
            v = vload(sums, i)
            if old != 0:
                v = vadd(vload(old, i), v)
            if bias != 0:
                v = vadd(v, vload(bias, i))
            if half:
                vstore_bf16(out, i, v)
            else:
                vstore(out, i, v)
        if whole < columns:
            n = columns - whole
            v = vload_masked(sums, whole, n)
            if old != 0:
                v = vadd(vload_masked(old, whole, n), v)
            if bias != 0:
                v = vadd(v, vload_masked(bias, whole, n))
            if half:
                vstore_bf16_masked(out, whole, v, n)
            else:
                vstore_masked(out, whole, v, n)
        sums += sums_row
        out += out_row
        if old != 0:
            old += old_row


@numba.njit(cache=True, nogil=True)
def _finish(p, sums, sums_row, r, c, rows, columns):
    """The scratch tile's sums -> C[r : r + rows, c : c + columns], a few rows at a time while the lines of the next ones are on their way.

    The whole tile at once: a micro-tile's rows would touch a page for every line or two.
    """
    for first in range(0, rows, FINISH_ROWS):
        now = min(FINISH_ROWS, rows - first)
        if first + now < rows:
            _prefetch_finish(p, r + first + now, c, min(FINISH_ROWS, rows - first - now), columns)
        if p[WHAT] != activation.NONE:
            _finish_activation(p, sums + first * sums_row, sums_row, r + first, c, now, columns)
        else:
            _finish_rows(p, sums + first * sums_row, sums_row, r + first, c, now, columns)


# One block of K for one tile of C: out = (the sums of the blocks before +) A strips x B strips; out is the scratch tile or, at the end, C itself.


@numba.njit(cache=True, nogil=True)
def _block_fp32(a, a_strip, b, b_strip, sums, sums_row, first, out, out_row, words, rows, columns, next_b):
    calls = (rows + MR - 1) // MR
    lines = words * W * WORD // LINE
    strips = (columns + W - 1) // W
    for s in range(0, strips, NV):
        count = min(NV, strips - s)
        # The next panel of B (at the end, that of the next block) travels to L2 while this one is used.
        coming = b + (s + NV) * b_strip if s + NV < strips else next_b
        for r in range(0, rows, MR):
            if coming != 0:
                i = r // MR
                for j in range(NV):
                    _prefetch(coming + j * b_strip, lines * i // calls, lines * (i + 1) // calls)
            at_a = a + (r // W) * a_strip + (r % W) * WORD
            at_b = b + s * b_strip
            at_old = 0 if first else sums + r * sums_row + s * (W * WORD)
            at_out = out + r * out_row + s * (W * WORD)
            if s == 0:
                _prefetch(at_a + a_strip, (r % W) // MR * lines * MR // W, ((r % W) // MR + 1) * lines * MR // W)
            if count == NV:
                _micro_n(at_a, at_b, b_strip, at_old, sums_row, at_out, out_row, words)
            else:
                done = 0
                if count - done >= 2:
                    _micro_2(at_a, at_b, b_strip, at_old, sums_row, at_out, out_row, words)
                    done = 2
                for j in range(done, count):
                    beside = j * (W * WORD)
                    at_old_j = at_old + beside if at_old != 0 else 0
                    _micro_1(at_a, at_b + j * b_strip, b_strip, at_old_j, sums_row, at_out + beside, out_row, words)


def _block_pairs_py(a, a_strip, b, b_strip, sums, sums_row, first, out, out_row, words, rows, columns):
    strips = (columns + W - 1) // W
    for s in range(0, strips, NV):
        count = min(NV, strips - s)
        for r in range(0, rows, MR):
            at_a = a + (r // W) * a_strip + (r % W) * WORD
            at_b = b + s * b_strip
            at_old = 0 if first else sums + r * sums_row + s * (W * WORD)
            at_out = out + r * out_row + s * (W * WORD)
            if count == NV:
                _pairs_n(at_a, at_b, b_strip, at_old, sums_row, at_out, out_row, words)
            elif count == 2:
                _pairs_2(at_a, at_b, b_strip, at_old, sums_row, at_out, out_row, words)
            else:
                _pairs_1(at_a, at_b, b_strip, at_old, sums_row, at_out, out_row, words)


def _tile_py(a, a_strip, a_row, a_step, b, b_strip, old, old_row, out, out_row, steps, two_rows, two_columns):
    if two_rows:
        if two_columns:
            _tile_22(a, a_strip, a_row, a_step, b, b_strip, old, old_row, out, out_row, steps)
        else:
            _tile_21(a, a_strip, a_row, a_step, b, b_strip, old, old_row, out, out_row, steps)
    elif two_columns:
        _tile_12(a, a_strip, a_row, a_step, b, b_strip, old, old_row, out, out_row, steps)
    else:
        _tile_11(a, a_strip, a_row, a_step, b, b_strip, old, old_row, out, out_row, steps)


def _block_tiles_py(a, a_strip, a_row, a_step, b, b_strip, sums, sums_row, first, out, out_row, words, rows, columns):
    strips, row_strips = (columns + W - 1) // W, (rows + W - 1) // W
    for s in range(0, strips, 2):
        for r in range(0, row_strips, 2):
            at_old = 0 if first else sums + r * W * sums_row + s * (W * WORD)
            at_out = out + r * W * out_row + s * (W * WORD)
            _tile(
                a + r * a_strip, a_strip, a_row, a_step, b + s * b_strip, b_strip, at_old, sums_row, at_out, out_row, words // W,
                r + 1 < row_strips, s + 1 < strips,
            )  # fmt: skip


def _tiles_on_py(address):
    micro.tile_configure(address)


def _tiles_off_py():
    micro.tile_release()


def _absent_pairs(a, a_strip, b, b_strip, sums, sums_row, first, out, out_row, words, rows, columns):
    pass


def _absent_tiles(a, a_strip, a_row, a_step, b, b_strip, sums, sums_row, first, out, out_row, words, rows, columns):
    pass


def _absent_on(address):
    pass


def _absent_off():
    pass


# A CPU without the instructions must not see them: LLVM could not select them.
_jit = numba.njit(cache=True, nogil=True)
_block_pairs = _jit(_block_pairs_py if HAS_PAIRS else _absent_pairs)
if HAS_TILES:
    _tile = _jit(_tile_py)
block_tiles = _jit(_block_tiles_py if HAS_TILES else _absent_tiles)
tiles_on = _jit(_tiles_on_py if HAS_TILES else _absent_on)
tiles_off = _jit(_tiles_off_py if HAS_TILES else _absent_off)


@numba.njit(cache=True, nogil=True)
def _pack_strips(mode, source, panel_stride, k_stride, lanes, num_k, words, target, strip_bytes, spare, rows_first):
    """Strips side by side. Where the panel is contiguous in memory, a few k at a time, so that its lines serve them all."""
    size = 2 if mode in (pack.BF16_WIDENED, pack.BF16_PAIRS) else 4
    per_word = 2 if mode >= pack.BF16_PAIRS else 1
    if panel_stride == 1 and k_stride != 1 and not rows_first:
        pack_lines(mode, source, k_stride, lanes, num_k, words, target, strip_bytes)
        return
    step = words if k_stride == 1 else CHUNK_WORDS
    for word in range(0, words, step):
        k = word * per_word
        for first in range(0, lanes, W):
            pack_strip(
                mode,
                source + (first * panel_stride + k * k_stride) * size,
                panel_stride,
                k_stride,
                min(W, lanes - first),
                num_k - k,
                min(step, words - word),
                target + (first // W) * strip_bytes + word * (W * WORD),
                spare,
                rows_first,
            )


@numba.njit(cache=True, nogil=True)
def _pack_a(p, group, spare):
    first = group * p[GROUP_A]
    size = 2 if p[A_MODE] in (pack.BF16_WIDENED, pack.BF16_PAIRS) else 4
    source = p[A] + first * W * p[A_ROW] * size
    lanes = min(p[GROUP_A] * W, p[ROWS] - first * W)
    words = (p[A_STRIP] - LINE) // (W * WORD)
    target = p[A_PACKED] + first * p[A_STRIP]
    _pack_strips(p[A_MODE], source, p[A_ROW], p[A_K], lanes, p[DEPTH], words, target, p[A_STRIP], spare, p[KERNEL] == 2)


@numba.njit(cache=True, nogil=True)
def _pack_b(p, column, lanes, k, num_k, words, target, strip_bytes, spare):
    size = 2 if p[B_MODE] in (pack.BF16_WIDENED, pack.BF16_PAIRS) else 4
    source = p[B] + (column * p[B_COLUMN] + k * p[B_K]) * size
    _pack_strips(p[B_MODE], source, p[B_COLUMN], p[B_K], lanes, num_k, words, target, strip_bytes, spare, False)


def _last_tiles_py(p, a, a_strip, a_row, a_step, b, sums, sums_row, first, piece, words, r, c, columns):
    """The last block of K for two strips of rows, all whole: each 2 x 2 tiles are written to C while the next are computed."""
    half, row, old_row, width = p[OUT_HALF], p[OUT_ROW], p[OLD_ROW], 2 * W * WORD
    step = width // 2 if half else width
    to = p[OUT] + r * row + c // (2 * W) * step - step  # where the tiles before go
    old = p[OLD] + r * old_row + c * WORD - width if p[OLD] != 0 else 0
    bias = p[BIAS] + c * WORD - width if p[BIAS] != 0 else 0
    held, here = 0, piece
    for s in range(0, columns // W + 2, 2):
        steps = words // W if s < columns // W else 0
        at_old = 0 if first else sums + s * (W * WORD)
        _tile_writing(
            a, a_strip, a_row, a_step, b + s * p[B_STRIP], p[B_STRIP], at_old, sums_row, here, width, steps, held, to, row, half, old, old_row,
            bias, to + step,
        )  # fmt: skip
        held, here = here, piece + 4 * BLOCK_BYTES if here == piece else piece
        to += step
        old += width if old != 0 else 0
        bias += width if bias != 0 else 0


def _absent_last_tiles(p, a, a_strip, a_row, a_step, b, sums, sums_row, first, piece, words, r, c, columns):
    pass


_last_tiles = _jit(_last_tiles_py if HAS_TILES else _absent_last_tiles)


@numba.njit(cache=True, nogil=True)
def _multiply_tiles(p, r0, c0, rows, columns, sums, sums_row):
    """One tile of C on AMX, two strips of rows at a time: A's stay in the L1 cache while B's pass by it, and C is written from left to right."""
    tiles_on(p[CONFIG])
    piece = sums + (p[TILE_R] + 2 * W - 1) // (2 * W) * (2 * W) * sums_row
    for r in range(0, rows, 2 * W):
        now = min(2 * W, rows - r)
        plain = now == 2 * W and columns % (2 * W) == 0 and p[WHAT] == activation.NONE
        for k in range(0, p[DEPTH], p[BLOCK]):
            padded = ((min(p[BLOCK], p[DEPTH] - k) + 1) // 2 + W - 1) // W * W
            offset = k // 2 * (W * WORD)
            a, a_strip, a_row, a_step = p[A_PACKED] + ((r0 + r) // W) * p[A_STRIP] + offset, p[A_STRIP], W * WORD, BLOCK_BYTES
            if p[A_IN_PLACE] != 0:
                a, a_strip, a_row, a_step = p[A] + (r0 + r) * p[A_ROW] * 2 + k * 2, W * p[A_ROW] * 2, p[A_ROW] * 2, W * WORD
            b = p[B_PACKED] + (c0 // W) * p[B_STRIP] + offset
            if plain and k + p[BLOCK] >= p[DEPTH]:
                _last_tiles(p, a, a_strip, a_row, a_step, b, sums, sums_row, k == 0, piece, padded, r0 + r, c0, columns)
            else:
                block_tiles(a, a_strip, a_row, a_step, b, p[B_STRIP], sums, sums_row, k == 0, sums, sums_row, padded, now, columns)
        if not plain:
            _finish(p, sums, sums_row, r0 + r, c0, now, columns)
    tiles_off()


@numba.njit(cache=True, nogil=True)
def _multiply(p, task, scratch):
    """One tile of C."""
    tiles_across = (p[COLUMNS] + p[TILE_C] - 1) // p[TILE_C]
    r0, c0 = (task // tiles_across) * p[TILE_R], (task % tiles_across) * p[TILE_C]
    rows, columns = min(p[TILE_R], p[ROWS] - r0), min(p[TILE_C], p[COLUMNS] - c0)
    # Whole micro-tiles go straight to C; a ragged edge, or what `_finish` has to change, goes through the scratch tile, which has room for padding.
    direct = p[DIRECT] != 0 and columns % W == 0 and rows % W == 0
    packed_b = scratch + BLOCK_BYTES
    per_word = 1 if p[KERNEL] == 0 else 2
    # Sums wait in the scratch tile, whose rows lie side by side: rows of C are often a power of two apart and would evict each other.
    sums, sums_row = packed_b + p[TILE_C] * (p[BLOCK] // per_word * WORD), p[TILE_C] * WORD
    if p[KERNEL] == 2 and p[B_READY] != 0:
        _multiply_tiles(p, r0, c0, rows, columns, sums, sums_row)
        return
    if p[KERNEL] == 2:
        tiles_on(p[CONFIG])
    for k in range(0, p[DEPTH], p[BLOCK]):
        num_k = min(p[BLOCK], p[DEPTH] - k)
        words = (num_k + per_word - 1) // per_word
        padded = (words + W - 1) // W * W
        offset = (k // per_word) * (W * WORD)
        a = p[A_PACKED] + (r0 // W) * p[A_STRIP] + offset
        first, last = k == 0, k + num_k >= p[DEPTH]
        next_b = 0
        if p[B_READY]:
            b, b_strip = p[B_PACKED] + (c0 // W) * p[B_STRIP] + offset, p[B_STRIP]
            if not last:
                next_b = b + padded * (W * WORD)
        else:
            b, b_strip = packed_b, padded * (W * WORD)
            _pack_b(p, c0, columns, k, num_k, padded, packed_b, b_strip, scratch)
        out, out_row = sums, sums_row
        if last and direct:
            out, out_row = p[OUT] + r0 * p[OUT_ROW] + c0 * 4, p[OUT_ROW]
        if p[KERNEL] == 0:
            _block_fp32(a, p[A_STRIP], b, b_strip, sums, sums_row, first, out, out_row, words, rows, columns, next_b)
        elif p[KERNEL] == 1:
            _block_pairs(a, p[A_STRIP], b, b_strip, sums, sums_row, first, out, out_row, words, rows, columns)
        else:
            a_strip, a_row, a_step = p[A_STRIP], W * WORD, BLOCK_BYTES
            if p[A_IN_PLACE] != 0:
                a, a_strip, a_row, a_step = p[A] + r0 * p[A_ROW] * 2 + k * 2, W * p[A_ROW] * 2, p[A_ROW] * 2, W * WORD
            block_tiles(a, a_strip, a_row, a_step, b, b_strip, sums, sums_row, first, sums, sums_row, padded, rows, columns)
    if p[KERNEL] == 2:
        tiles_off()
    if not direct:
        _finish(p, sums, sums_row, r0, c0, rows, columns)


PACK, MULTIPLY = range(2)


@numba.njit(cache=True, nogil=True)
def _task(stage, p, task, worker):
    scratch = p[SCRATCH] + worker * p[SCRATCH_STRIDE]
    if stage == MULTIPLY:
        _multiply(p, task, scratch)
    elif task < p[TASKS_A]:
        _pack_a(p, task, scratch)
    else:
        group = task - p[TASKS_A]
        column = group * p[GROUP_B] * W
        lanes = min(p[GROUP_B] * W, p[COLUMNS] - column)
        target = p[B_PACKED] + group * p[GROUP_B] * p[B_STRIP]
        _pack_b(p, column, lanes, 0, p[DEPTH], (p[B_STRIP] - LINE) // (W * WORD), target, p[B_STRIP], scratch)


@numba.njit(cache=True, nogil=True)
def _tasks(stage, p):
    return p[TASKS_A] + p[TASKS_B] if stage == PACK else p[NUM_TILES]


@numba.njit(cache=True, nogil=True)
def _run_alone(p):
    for stage in range(2):
        for task in range(_tasks(stage, p)):
            _task(stage, p, task, 0)


@numba.njit(cache=True, nogil=True, parallel=True)
def _run_workers(p, workers):
    for stage in range(2):  # one loop for both, so that what it calls is compiled once
        tasks = _tasks(stage, p)
        dealt = stage == PACK or p[DEALT] != 0
        for worker in numba.prange(workers):
            first, end, step = share(tasks, worker, workers, dealt)
            for task in range(first, end, step):
                _task(stage, p, task, worker)


def _run(p: np.ndarray, workers: int) -> None:
    if workers <= 1:
        _run_alone(p)
    else:
        threads.numba_workers(workers)
        _run_workers(p, workers)


# ---- planning on the Python side -----------------------------------------------------------------------------------


class _Buffers(threading.local):
    """Work space of one Python thread, grown and kept: fresh memory costs page faults at every call."""

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}
        self.config = np.zeros(192, np.uint8)
        start = -self.config.ctypes.data % 64
        self.config_address = self.config.ctypes.data + start
        self.config[start : start + 64] = np.frombuffer(micro.tile_configuration(), np.uint8)

    def take(self, name: str, size: int) -> torch.Tensor:
        held = self.held.get(name)
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=torch.uint8)
            if size <= 2 * PACK_BYTES:
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


def _mode(kernel: str, dtype: torch.dtype) -> int:
    half = dtype == torch.bfloat16
    if kernel == FP32:
        return pack.BF16_WIDENED if half else pack.F32_AS_IS
    if kernel == WIDENED:
        return pack.BF16_WIDENED if half else pack.F32_ROUNDED_WIDENED
    return pack.BF16_PAIRS if half else pack.F32_ROUNDED_PAIRS


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _parts(depth: int) -> list[tuple[int, int]]:
    return [(k, min(K_PART, depth - k)) for k in range(0, depth, K_PART)]


def _strip_bytes(kernel: str, num_k: int) -> int:
    """One line more than its words need: strips a multiple of 4096 bytes apart would share the same few sets of the L1 cache."""
    words = num_k if _CODE[kernel] == 0 else (num_k + 1) // 2
    return _round_up(words, W) * W * WORD + LINE


def _block(kernel: str, num_k: int) -> int:
    per_word = 1 if _CODE[kernel] == 0 else 2
    blocks = -(-num_k // ((TILE_BLOCK_WORDS if kernel == TILES else BLOCK_WORDS) * per_word))
    return _round_up(-(-num_k // blocks), W * per_word)


def _group(lanes: int, workers: int) -> int:
    """Strips packed by one task."""
    return max(1, min(MOST_GROUP, lanes // (2 * W * workers)))


def _aligned(t: torch.Tensor) -> int:
    return (t.data_ptr() + 63) & ~63


class Packed:
    """B packed once for many products (weights used by several row blocks)."""

    def __init__(self, b: torch.Tensor, compute: torch.dtype, workers: int):
        self.kernel = kernel_for(compute)
        self.shape = (depth, columns) = tuple(b.shape)
        strips = -(-columns // W)
        self.offsets, size = [], 0
        for _, num_k in _parts(depth):
            self.offsets.append(size)
            size += strips * _strip_bytes(self.kernel, num_k)
        self.memory = torch.empty(size + 64, dtype=torch.uint8)
        for (k0, num_k), offset in zip(_parts(depth), self.offsets):
            _pack_columns(b[k0 : k0 + num_k], self.kernel, _aligned(self.memory) + offset, workers)

    def address(self, part: int) -> int:
        return _aligned(self.memory) + self.offsets[part]


def _pack_columns(b: torch.Tensor, kernel: str, target: int, workers: int) -> None:
    p = np.zeros(NUM_FIELDS, np.int64)
    depth, columns = b.shape
    p[DEPTH], p[COLUMNS], p[B_K], p[B_COLUMN] = depth, columns, *b.stride()
    p[B_MODE], p[B_STRIP] = _mode(kernel, b.dtype), _strip_bytes(kernel, depth)
    p[B], p[B_PACKED] = b.data_ptr(), target
    p[GROUP_B] = group = _group(columns, workers)
    p[TASKS_B] = tasks = -(-columns // (group * W))
    workers = min(workers, tasks)
    spare = _buffers.take("spare", workers * BLOCK_BYTES + 64)
    p[SCRATCH], p[SCRATCH_STRIDE] = _aligned(spare), BLOCK_BYTES
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
    b: "torch.Tensor | Packed",
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    compute: torch.dtype | None = None,
    workers: int | None = None,
) -> torch.Tensor:
    """(add (M, N) +) a (M, K) @ b (K, N) (+ bias (N,)) -> (M, N).

    a, b: float32 or bfloat16, any strides; b may be Packed. compute: float32 or bfloat16, by default a's dtype; operands
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
    a: torch.Tensor, b: "torch.Tensor | Packed", end: activation.Epilogue, *, workers: int, keep: torch.Tensor | None = None,
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
    a: torch.Tensor, b: "torch.Tensor | Packed", out: torch.Tensor | None, add: torch.Tensor | None, bias: torch.Tensor | None,
    kernel: str, workers: int, end: activation.Epilogue | None,
) -> None:  # fmt: skip
    kernel = b.kernel if isinstance(b, Packed) else kernel
    parts = _parts(a.shape[1])
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
            b.address(index) if isinstance(b, Packed) else b if whole else b[k0 : k0 + num_k],
            b.shape[1],
            out if last else total,
            total if index > 0 else add,
            bias if last else None,
            kernel,
            workers,
            end if last else None,
        )


@functools.lru_cache(maxsize=4096)
def _cut(rows: int, columns: int, depth: int, kernel: str, ready: bool) -> tuple[int, int]:
    """Rows of A and columns of B whose packed copies are made at a time."""
    strip = _strip_bytes(kernel, depth)
    tile_rows, tile_columns = _largest_tile(kernel, depth)
    row_part = min(rows, max(tile_rows, PACK_BYTES // strip * W // tile_rows * tile_rows))
    if ready or rows <= ONE_SLAB_ROWS:
        return row_part, columns
    return row_part, min(columns, max(tile_columns, PACK_BYTES // strip * W // tile_columns * tile_columns))


class _BlockPlan(NamedTuple):
    """All of the parameter block but its addresses, and the sizes of the work space: the same for every call of one kind."""

    fields: np.ndarray
    workers: int
    scratch_bytes: int
    a_bytes: int
    b_bytes: int


@functools.lru_cache(maxsize=4096)
def _block_plan(
    rows: int, columns: int, depth: int, kernel: str, workers: int,
    a_stride: tuple[int, int], a_dtype: torch.dtype, b_stride: tuple[int, int] | None, b_dtype: torch.dtype | None,
    out_dtype: torch.dtype, direct: bool, pack_a: bool,
) -> _BlockPlan:  # fmt: skip
    """b_stride None: B was packed before."""
    strip = _strip_bytes(kernel, depth)
    one_slab = rows <= ONE_SLAB_ROWS
    tile_rows, tile_columns = _tile_shape(rows, columns, depth, kernel, workers)
    tiles = -(-rows // tile_rows) * -(-columns // tile_columns)
    p = np.zeros(NUM_FIELDS, np.int64)
    p[KERNEL], p[BLOCK] = _CODE[kernel], _block(kernel, depth)
    p[ROWS], p[COLUMNS], p[DEPTH] = rows, columns, depth
    p[A_ROW], p[A_K], p[A_MODE], p[A_STRIP] = *a_stride, _mode(kernel, a_dtype), strip
    p[B_STRIP], p[B_READY] = strip, 1
    p[OUT_HALF], p[DIRECT] = out_dtype == torch.bfloat16, direct
    p[TILE_R], p[TILE_C], p[NUM_TILES] = tile_rows, tile_columns, tiles
    # Whole tiles of bfloat16 rows are loaded from where they lie.
    p[A_IN_PLACE] = kernel == TILES and a_dtype == torch.bfloat16 and a_stride[1] == 1 and rows % W == 0 and depth % (2 * W) == 0
    # Tiles in one piece, so that a worker's rows of A stay in its caches; in turn where A is read as it lies, and where B is large: both measured.
    p[DEALT] = p[A_IN_PLACE] or -(-columns // W) * strip > PACK_BYTES
    if pack_a and not p[A_IN_PLACE]:
        p[GROUP_A] = group = _group(rows, workers)
        p[TASKS_A] = -(-rows // (group * W))
    b_bytes = 0
    if b_stride is not None:
        assert b_dtype is not None
        p[B_K], p[B_COLUMN], p[B_MODE] = *b_stride, _mode(kernel, b_dtype)
        p[B_READY] = not one_slab
        if not one_slab:
            p[GROUP_B] = group = _group(columns, workers)
            p[TASKS_B] = -(-columns // (group * W))
            b_bytes = -(-columns // W) * strip + 64
    block_bytes = int(p[BLOCK]) // (1 if _CODE[kernel] == 0 else 2) * WORD
    tile_bytes = BLOCK_BYTES + tile_columns * block_bytes + _round_up(tile_rows, 2 * W) * tile_columns * WORD + 8 * BLOCK_BYTES
    stride = _round_up(tile_bytes, 4096) + 64  # not a multiple of 4096: the workers' tiles spread over sets
    p[SCRATCH_STRIDE] = stride
    workers = max(1, min(workers, max(tiles, int(p[TASKS_A] + p[TASKS_B]))))
    return _BlockPlan(p, workers, stride * workers + 64, _round_up(rows, 2 * W) // W * strip + 64, b_bytes)


def launched_workers(planned: int, rows: int, depth: int, columns: int, dtype: torch.dtype, packed: bool = False) -> int:
    """How many of the planned workers a product of operands that lie row by row uses; packed: B was packed before."""
    if not rows * depth * columns:
        return 1
    kernel, most = kernel_for(dtype), 1
    for _, num_k in _parts(depth):
        row_part, column_part = _cut(rows, columns, num_k, kernel, packed)
        for r0 in range(0, rows, row_part):
            for c0 in range(0, columns, column_part):
                plan = _block_plan(
                    min(row_part, rows - r0), min(column_part, columns - c0), num_k, kernel, planned, (depth, 1), dtype,
                    None if packed else (1, depth), None if packed else dtype, dtype, False, c0 == 0,
                )  # fmt: skip
                most = max(most, plan.workers)
    return most


def _part(
    a: torch.Tensor,
    b: torch.Tensor | int,
    columns: int,
    out: torch.Tensor | None,
    old: torch.Tensor | None,
    bias: torch.Tensor | None,
    kernel: str,
    workers: int,
    end: activation.Epilogue | None,
) -> None:
    """One part of K: out = (old +) a b (+ bias). b: a tensor, or the address of its packed copy."""
    rows, depth = a.shape
    out_dtype = out.dtype if end is None and out is not None else a.dtype
    ready = isinstance(b, int)
    row_part, column_part = _cut(rows, columns, depth, kernel, ready)
    # AMX would store its tiles faster than lines of C that are not in the caches arrive.
    direct = kernel != TILES and old is None and bias is None and end is None and out_dtype == torch.float32
    for r0 in range(0, rows, row_part):
        for c0 in range(0, columns, column_part):
            plan = _block_plan(
                min(row_part, rows - r0), min(column_part, columns - c0), depth, kernel, workers, a.stride(), a.dtype,
                None if isinstance(b, int) else b.stride(), None if isinstance(b, int) else b.dtype, out_dtype, direct, c0 == 0,
            )  # fmt: skip
            p = plan.fields.copy()
            # Held until the workers are done: the largest are not kept beyond this call.
            held = [_buffers.take("scratch", plan.scratch_bytes), _buffers.take("a", plan.a_bytes)]
            p[SCRATCH], p[A_PACKED] = map(_aligned, held)
            p[CONFIG] = _buffers.config_address
            p[A] = a.data_ptr() + r0 * a.stride(0) * a.element_size()
            if isinstance(b, int):
                p[B_PACKED] = b
            else:
                p[B] = b.data_ptr() + c0 * b.stride(1) * b.element_size()
                if plan.b_bytes:
                    held.append(_buffers.take("b", plan.b_bytes))
                    p[B_PACKED] = _aligned(held[-1])
            if out is not None:
                _place(p, OUT, OUT_ROW, out, r0, c0)
            if end is not None:
                p[WHAT], p[ACTIVATION] = end.what, activation.CODES[end.activation]
                for field, tensor in ((HIDDEN, end.hidden), (Z, end.z), (UP, end.up), (DZ, end.dz), (DUP, end.dup)):
                    if tensor is not None:
                        _place(p, field, HIDDEN_ROW, tensor, r0, c0)
            if old is not None:
                _place(p, OLD, OLD_ROW, old, r0, c0)
            if bias is not None:
                p[BIAS] = bias.data_ptr() + c0 * 4
            _run(p, plan.workers)
            del held


def _place(p: np.ndarray, address: int, row: int, t: torch.Tensor, r0: int, c0: int) -> None:
    size, stride = t.element_size(), t.stride(0)
    p[address] = t.data_ptr() + (r0 * stride + c0) * size
    p[row] = stride * size
