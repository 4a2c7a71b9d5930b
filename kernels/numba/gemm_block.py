"""One K block of a tile of C, from packed strips of A and B: the loops around the micro-kernels of micro.py.

out = (the sums of the blocks before +) A strips x B strips; out is the work space of the tile, or in the last block C itself.
"""

from cllm.kernels.numba import micro
from cllm.kernels.numba.compiling import jit
from cllm.kernels.numba.llvm import HAS_PAIRS, W
from cllm.kernels.numba.micro import HAS_TILES, MR, NV, WORD, make_micro, make_tile_micro, prefetch

LINE = 64  # bytes of a cache line

_micro_1, _micro_2, micro_n = make_micro(MR, 1), make_micro(MR, min(2, NV)), make_micro(MR, NV)
# A CPU without the instructions must not see them: LLVM could not select them.
_pairs_1, _pairs_2, _pairs_n = (make_micro(MR, each, True) for each in (1, 2, NV)) if HAS_PAIRS else (_micro_1, _micro_2, micro_n)
if HAS_TILES:
    _tile_11, _tile_12 = make_tile_micro(1, 1, stream_b=True), make_tile_micro(1, 2, stream_b=True)
    _tile_21, tile_22 = make_tile_micro(2, 1, stream_b=True), make_tile_micro(2, 2, stream_b=True)


@jit
def prefetch_lines(address, begin, end):
    for line in range(begin, end):
        prefetch(address + line * LINE)


@jit
def _one(pairs, a, b, b_strip, old, old_row, out, out_row, words):
    if pairs:
        _pairs_1(a, b, b_strip, old, old_row, out, out_row, words)
    else:
        _micro_1(a, b, b_strip, old, old_row, out, out_row, words)


@jit
def _two(pairs, a, b, b_strip, old, old_row, out, out_row, words):
    if pairs:
        _pairs_2(a, b, b_strip, old, old_row, out, out_row, words)
    else:
        _micro_2(a, b, b_strip, old, old_row, out, out_row, words)


@jit
def _whole(pairs, a, b, b_strip, old, old_row, out, out_row, words):
    if pairs:
        _pairs_n(a, b, b_strip, old, old_row, out, out_row, words)
    else:
        micro_n(a, b, b_strip, old, old_row, out, out_row, words)


@jit
def block_vectors(pairs, a, a_strip, b, b_strip, sums, sums_row, first, out, out_row, words, rows, columns, next_b):
    """pairs: words are two bfloat16, else one float32. next_b: where the strips of the next block lie, 0 where there is none."""
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
                    prefetch_lines(coming + j * b_strip, lines * i // calls, lines * (i + 1) // calls)
            at_a = a + (r // W) * a_strip + (r % W) * WORD
            at_b = b + s * b_strip
            at_old = 0 if first else sums + r * sums_row + s * (W * WORD)
            at_out = out + r * out_row + s * (W * WORD)
            if s == 0:
                prefetch_lines(at_a + a_strip, (r % W) // MR * lines * MR // W, ((r % W) // MR + 1) * lines * MR // W)
            if count == NV:
                _whole(pairs, at_a, at_b, b_strip, at_old, sums_row, at_out, out_row, words)
            else:
                done = 0
                if count >= 2:
                    _two(pairs, at_a, at_b, b_strip, at_old, sums_row, at_out, out_row, words)
                    done = 2
                for j in range(done, count):
                    beside = j * (W * WORD)
                    at_old_j = at_old + beside if at_old != 0 else 0
                    _one(pairs, at_a, at_b + j * b_strip, b_strip, at_old_j, sums_row, at_out + beside, out_row, words)


def _tile_py(a, a_strip, a_row, a_step, b, b_strip, old, old_row, out, out_row, steps, two_rows, two_columns):
    if two_rows:
        if two_columns:
            tile_22(a, a_strip, a_row, a_step, b, b_strip, old, old_row, out, out_row, steps)
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


def _absent_tiles(a, a_strip, a_row, a_step, b, b_strip, sums, sums_row, first, out, out_row, words, rows, columns):
    pass


def _absent_on(address):
    pass


def _absent_off():
    pass


if HAS_TILES:
    _tile = jit(_tile_py)
block_tiles = jit(_block_tiles_py if HAS_TILES else _absent_tiles)
tiles_on = jit(_tiles_on_py if HAS_TILES else _absent_on)
tiles_off = jit(_tiles_off_py if HAS_TILES else _absent_off)
