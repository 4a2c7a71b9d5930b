"""The compiled side of the matrix product: packing of operands, and tiles of C from packed strips.

What a task does is said by the fields of `_Arguments`, which gemm.py fills in. A product has two stages: tasks that pack strips of A and of B, then
tasks that each make one tile of C.
"""

from typing import NamedTuple

import numpy as np

from cllm.kernels.numba import activation, pack
from cllm.kernels.numba.compiling import jit
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.gemm_block import LINE, block_tiles, block_vectors, prefetch_lines, tiles_off, tiles_on
from cllm.kernels.numba.launch import Kernel
from cllm.kernels.numba.matvec_words import fill_packed
from cllm.kernels.numba.micro import BLOCK_BYTES, HAS_TILES, WORD, make_writing_micro
from cllm.kernels.numba.pack import pack_lines, pack_strip
from cllm.kernels.numba.simd import W, vadd, vload, vload_masked, vstore, vstore_bf16, vstore_bf16_masked, vstore_masked
from cllm.kernels.strips import STRIP
from cllm.runtime.workers import run as launch
from cllm.runtime.workers import table_of

FINISH_ROWS = 8  # rows of C that are written while the lines of the next ones are on their way
CHUNK_WORDS = 32  # words that are packed at a time where a panel is contiguous in memory

BY_CHAINS, BY_PAIRS, BY_TILES = range(3)  # how strips are multiplied: float32 fma chains, pairs of bfloat16, AMX tiles


class _Arguments(NamedTuple):
    """What the tasks of a product read, int64: addresses (0 where there is no such operand), and strides in bytes unless said."""

    kernel: int  # BY_CHAINS, BY_PAIRS or BY_TILES
    rows: int
    columns: int
    depth: int
    block: int  # k of one block
    a: int
    a_strip: int  # from strip to strip of the packed copy
    a_row: int  # in elements, as a_k
    a_k: int
    a_mode: int  # what packing does to an element: see pack.py
    a_packed: int
    b: int
    b_strip: int
    b_column: int  # in elements, as b_k; of weights packed at load in bytes, from strip to strip
    b_k: int
    b_mode: int
    b_packed: int
    b_ready: int  # whether B is packed before the tiles are made; otherwise each tile packs its own part
    out: int
    out_row: int
    out_half: int  # whether C is bfloat16
    old: int  # float32, added to the product
    old_row: int
    bias: int  # float32
    direct: int  # whether whole micro-tiles go straight to C
    tile_rows: int
    tile_columns: int
    scratch: int  # work space of the first worker
    scratch_stride: int
    configuration: int  # of the AMX tiles
    group_a: int  # strips that one task packs
    group_b: int
    tasks_a: int  # tasks that pack A, then those that pack B
    tasks_b: int
    num_tiles: int
    a_in_place: int  # whether AMX reads A from where it lies
    dealt: int  # whether workers take tiles in turn, rather than each out of a piece of its own
    what: int  # of an activation at the end: NONE, ACTIVATE or DIFFERENTIATE, see activation.py
    finish: int  # the address of what does it: activation.finish
    hidden: int
    z: int
    up: int
    dz: int
    dup: int
    hidden_row: int  # of hidden, z, up, dz and dup


P, _ = fields(_Arguments)

if HAS_TILES:
    _tile_writing = make_writing_micro()


@jit
def _prefetch_rows(address, row, lines, rows):
    for _ in range(rows):
        prefetch_lines(address, 0, lines)
        address += row


@jit
def _prefetch_finish(p, r, c, rows, columns):
    """The lines that `_finish` will touch are on their way while the sums are made."""
    size = 2 if p[P.out_half] != 0 else 4
    lines = (columns * size + LINE - 1) // LINE
    if p[P.out] != 0:
        _prefetch_rows(p[P.out] + r * p[P.out_row] + c * size, p[P.out_row], lines, rows)
    if p[P.what] != activation.NONE:
        for field in range(P.hidden, P.dup + 1):
            if p[field] != 0:
                _prefetch_rows(p[field] + r * p[P.hidden_row] + c * size, p[P.hidden_row], lines, rows)


@jit
def _finish_activation(p, sums, sums_row, r, c, rows, columns):
    """The same where the product ends in an activation (activation.py)."""
    half, row = p[P.out_half] != 0, p[P.hidden_row]
    at = r * row + c * (2 if half else 4)
    activation.call_finish(
        p[P.finish], half, rows, columns, sums, sums_row,
        p[P.old] + r * p[P.old_row] + c * 4 if p[P.old] != 0 else 0,
        p[P.old_row],
        p[P.bias] + c * 4 if p[P.bias] != 0 else 0,
        row,
        p[P.z] + at if p[P.z] != 0 else 0,
        p[P.up] + at if p[P.up] != 0 else 0,
        p[P.out] + at if p[P.out] != 0 else 0,
        p[P.hidden] + at,
        p[P.dz] + at if p[P.dz] != 0 else 0,
        p[P.dup] + at if p[P.dup] != 0 else 0,
    )  # fmt: skip


@jit
def _finish_rows(p, sums, sums_row, r, c, rows, columns):
    """Sums (+ old C) (+ bias) -> C[r : r + rows, c : c + columns]."""
    half, out_row, old_row = p[P.out_half] != 0, p[P.out_row], p[P.old_row]
    out = p[P.out] + r * out_row + c * (2 if half else 4)
    old = p[P.old] + r * old_row + c * 4 if p[P.old] != 0 else 0
    bias = p[P.bias] + c * 4 if p[P.bias] != 0 else 0
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


@jit
def _finish(p, sums, sums_row, r, c, rows, columns):
    """The scratch tile's sums -> C[r : r + rows, c : c + columns], a few rows at a time while the lines of the next ones are on their way.

    The whole tile at once: a micro-tile's rows would touch a page for every line or two.
    """
    for first in range(0, rows, FINISH_ROWS):
        now = min(FINISH_ROWS, rows - first)
        if first + now < rows:
            _prefetch_finish(p, r + first + now, c, min(FINISH_ROWS, rows - first - now), columns)
        if p[P.what] != activation.NONE:
            _finish_activation(p, sums + first * sums_row, sums_row, r + first, c, now, columns)
        else:
            _finish_rows(p, sums + first * sums_row, sums_row, r + first, c, now, columns)


@jit
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


@jit
def _pack_a(p, group, spare):
    first = group * p[P.group_a]
    size = 2 if p[P.a_mode] in (pack.BF16_WIDENED, pack.BF16_PAIRS) else 4
    source = p[P.a] + first * W * p[P.a_row] * size
    lanes = min(p[P.group_a] * W, p[P.rows] - first * W)
    words = (p[P.a_strip] - LINE) // (W * WORD)
    target = p[P.a_packed] + first * p[P.a_strip]
    _pack_strips(p[P.a_mode], source, p[P.a_row], p[P.a_k], lanes, p[P.depth], words, target, p[P.a_strip], spare, p[P.kernel] == BY_TILES)


@jit
def _pack_b(p, column, lanes, k, num_k, words, target, strip_bytes, spare):
    if p[P.b_mode] >= pack.STRIPS_F32:
        for first in range(column, column + lanes, W):
            source = p[P.b] + first // STRIP * p[P.b_column] + first % STRIP * WORD
            fill_packed(p[P.b_mode], p[P.kernel] != BY_CHAINS, source, k, words, target + (first - column) // W * strip_bytes)
        return
    size = 2 if p[P.b_mode] in (pack.BF16_WIDENED, pack.BF16_PAIRS) else 4
    source = p[P.b] + (column * p[P.b_column] + k * p[P.b_k]) * size
    _pack_strips(p[P.b_mode], source, p[P.b_column], p[P.b_k], lanes, num_k, words, target, strip_bytes, spare, False)


def _last_tiles_py(p, a, a_strip, a_row, a_step, b, sums, sums_row, first, piece, words, r, c, columns):
    """The last block of K for two strips of rows, all whole: each 2 x 2 tiles are written to C while the next are computed."""
    half, row, old_row, width = p[P.out_half], p[P.out_row], p[P.old_row], 2 * W * WORD
    step = width // 2 if half else width
    to = p[P.out] + r * row + c // (2 * W) * step - step  # where the tiles before go
    old = p[P.old] + r * old_row + c * WORD - width if p[P.old] != 0 else 0
    bias = p[P.bias] + c * WORD - width if p[P.bias] != 0 else 0
    held, here = 0, piece
    for s in range(0, columns // W + 2, 2):
        steps = words // W if s < columns // W else 0
        at_old = 0 if first else sums + s * (W * WORD)
        _tile_writing(
            a, a_strip, a_row, a_step, b + s * p[P.b_strip], p[P.b_strip], at_old, sums_row, here, width, steps, held, to, row, half, old, old_row,
            bias, to + step,
        )  # fmt: skip
        held, here = here, piece + 4 * BLOCK_BYTES if here == piece else piece
        to += step
        old += width if old != 0 else 0
        bias += width if bias != 0 else 0


def _absent_last_tiles(p, a, a_strip, a_row, a_step, b, sums, sums_row, first, piece, words, r, c, columns):
    pass


_last_tiles = jit(_last_tiles_py if HAS_TILES else _absent_last_tiles)


def _multiply_tiles_py(p, r0, c0, rows, columns, sums, sums_row):
    """One tile of C on AMX, two strips of rows at a time: A's stay in the L1 cache while B's pass by it, and C is written from left to right."""
    tiles_on(p[P.configuration])
    piece = sums + (p[P.tile_rows] + 2 * W - 1) // (2 * W) * (2 * W) * sums_row
    for r in range(0, rows, 2 * W):
        now = min(2 * W, rows - r)
        plain = now == 2 * W and columns % (2 * W) == 0 and p[P.what] == activation.NONE
        for k in range(0, p[P.depth], p[P.block]):
            padded = ((min(p[P.block], p[P.depth] - k) + 1) // 2 + W - 1) // W * W
            offset = k // 2 * (W * WORD)
            a, a_strip, a_row, a_step = p[P.a_packed] + ((r0 + r) // W) * p[P.a_strip] + offset, p[P.a_strip], W * WORD, BLOCK_BYTES
            if p[P.a_in_place] != 0:
                a, a_strip, a_row, a_step = p[P.a] + (r0 + r) * p[P.a_row] * 2 + k * 2, W * p[P.a_row] * 2, p[P.a_row] * 2, W * WORD
            b = p[P.b_packed] + (c0 // W) * p[P.b_strip] + offset
            if plain and k + p[P.block] >= p[P.depth]:
                _last_tiles(p, a, a_strip, a_row, a_step, b, sums, sums_row, k == 0, piece, padded, r0 + r, c0, columns)
            else:
                block_tiles(a, a_strip, a_row, a_step, b, p[P.b_strip], sums, sums_row, k == 0, sums, sums_row, padded, now, columns)
        if not plain:
            _finish(p, sums, sums_row, r0 + r, c0, now, columns)
    tiles_off()


def _absent_multiply_tiles(p, r0, c0, rows, columns, sums, sums_row):
    pass


_multiply_tiles = jit(_multiply_tiles_py if HAS_TILES else _absent_multiply_tiles)


@jit
def _multiply(p, task, scratch):
    """One tile of C."""
    tiles_across = (p[P.columns] + p[P.tile_columns] - 1) // p[P.tile_columns]
    r0, c0 = (task // tiles_across) * p[P.tile_rows], (task % tiles_across) * p[P.tile_columns]
    rows, columns = min(p[P.tile_rows], p[P.rows] - r0), min(p[P.tile_columns], p[P.columns] - c0)
    # Whole micro-tiles go straight to C; a ragged edge, or what `_finish` has to change, goes through the scratch tile, which has room for padding.
    direct = p[P.direct] != 0 and columns % W == 0 and rows % W == 0
    packed_b = scratch + BLOCK_BYTES
    per_word = 1 if p[P.kernel] == BY_CHAINS else 2
    # Sums wait in the scratch tile, whose rows lie side by side: rows of C are often a power of two apart and would evict each other.
    sums, sums_row = packed_b + p[P.tile_columns] * (p[P.block] // per_word * WORD), p[P.tile_columns] * WORD
    if p[P.kernel] == BY_TILES and p[P.b_ready] != 0:
        _multiply_tiles(p, r0, c0, rows, columns, sums, sums_row)
        return
    if p[P.kernel] == BY_TILES:
        tiles_on(p[P.configuration])
    for k in range(0, p[P.depth], p[P.block]):
        num_k = min(p[P.block], p[P.depth] - k)
        words = (num_k + per_word - 1) // per_word
        padded = (words + W - 1) // W * W
        offset = (k // per_word) * (W * WORD)
        a = p[P.a_packed] + (r0 // W) * p[P.a_strip] + offset
        first, last = k == 0, k + num_k >= p[P.depth]
        next_b = 0
        if p[P.b_ready]:
            b, b_strip = p[P.b_packed] + (c0 // W) * p[P.b_strip] + offset, p[P.b_strip]
            if not last:
                next_b = b + padded * (W * WORD)
        else:
            b, b_strip = packed_b, padded * (W * WORD)
            _pack_b(p, c0, columns, k, num_k, padded, packed_b, b_strip, scratch)
        out, out_row = sums, sums_row
        if last and direct:
            out, out_row = p[P.out] + r0 * p[P.out_row] + c0 * 4, p[P.out_row]
        if p[P.kernel] != BY_TILES:
            pairs = p[P.kernel] == BY_PAIRS
            block_vectors(pairs, a, p[P.a_strip], b, b_strip, sums, sums_row, first, out, out_row, words, rows, columns, next_b)
        else:
            a_strip, a_row, a_step = p[P.a_strip], W * WORD, BLOCK_BYTES
            if p[P.a_in_place] != 0:
                a, a_strip, a_row, a_step = p[P.a] + r0 * p[P.a_row] * 2 + k * 2, W * p[P.a_row] * 2, p[P.a_row] * 2, W * WORD
            block_tiles(a, a_strip, a_row, a_step, b, b_strip, sums, sums_row, first, sums, sums_row, padded, rows, columns)
    if p[P.kernel] == BY_TILES:
        tiles_off()
    if not direct:
        _finish(p, sums, sums_row, r0, c0, rows, columns)


def _task(p, f, task, worker):
    """Tasks are numbered through both stages of a product: first those that pack A, then those that pack B, then those that multiply."""
    scratch = p[P.scratch] + worker * p[P.scratch_stride]
    group = task - p[P.tasks_a]
    if group >= p[P.tasks_b]:
        _multiply(p, group - p[P.tasks_b], scratch)
    elif group < 0:
        _pack_a(p, task, scratch)
    else:
        column = group * p[P.group_b] * W
        lanes = min(p[P.group_b] * W, p[P.columns] - column)
        target = p[P.b_packed] + group * p[P.group_b] * p[P.b_strip]
        _pack_b(p, column, lanes, 0, p[P.depth], (p[P.b_strip] - LINE) // (W * WORD), target, p[P.b_strip], scratch)


kernel = Kernel(_task)


def run(p: np.ndarray, workers: int) -> None:
    """Packs what is not packed yet and multiplies, on so many workers. Nothing is multiplied before everything is packed."""
    address, packing = p.ctypes.data, int(p[P.tasks_a] + p[P.tasks_b])
    multiplying = kernel.launch(address, 0, int(p[P.num_tiles]), packing)._replace(even=1 - int(p[P.dealt]))
    stages = table_of((kernel.launch(address, 0, packing)._replace(even=0), multiplying))
    launch(stages.buffer_info()[0], 2, workers, (p,))
