"""Matrix micro-kernels on packed strips: the innermost loop of gemm.py, kept in registers (or AMX tiles).

A strip holds W rows of A (or W columns of B) for one K block, as W x W blocks of 32-bit words, 0 beyond the edges.
A word is one float32, or two bfloat16 that follow each other along k. Addresses and strides are in bytes.

    fp32     [k][W]          MR x (NV strips) accumulators, A broadcast word by word     (any CPU)
    pairs    [k/2][W]        the same with vdpbf16ps                                     (AVX512_BF16)
    tiles    A [k/32][16 rows][32 k], B [k/32][16 pairs][16 columns][2]                  (AMX-BF16)
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from cllm.kernels.numba import llvm
from cllm.kernels.numba.llvm import F32, FEATURES, I8, I32, I64, VF, VI, BFloat, W, const, intrinsic, load, splat, store
from cllm.runtime.workers import lasting

_I = types.intp
WORD = 4
BLOCK_BYTES = W * W * WORD

# Accumulators must fit the registers: 32 with AVX-512 and NEON, 16 otherwise. Rows of a strip: MR at a time.
MR, NV = {16: (8, 3), 8: (4, 3), 4: (4, 6 if "neon" in FEATURES else 3)}[W]


def _offset(bld: Any, address: Any, *terms: tuple[Any, int]) -> Any:
    for value, times in terms:
        if times:
            address = bld.add(address, bld.mul(value, I64(times)) if times != 1 else value)
    return address


def _at(bld: Any, address: Any, byte_offset: int = 0) -> Any:
    base = bld.inttoptr(address, I8.as_pointer())
    return bld.gep(base, [I64(byte_offset)]) if byte_offset else base


L1, L2 = 3, 2  # LLVM's names for where a prefetched line goes


def _emit_prefetch(bld: Any, pointer: Any, level: int) -> None:
    llvm.call(bld, "llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(level), I32(1))


def make_micro(rows: int, strips: int, pairs: bool = False) -> Any:
    """micro(a, b, b_strip, old, old_row, out, out_row, words): out[rows, strips*W] = (old +) A strip x B strips.

    Every element is one fma chain from 0 over the words, added to old in one addition; old 0: there is none.
    """
    vb = ir.VectorType(BFloat(), 2 * W)

    @intrinsic
    def micro(tc, a, b, b_strip, old, old_row, out, out_row, words):
        def codegen(ctx, bld, sig, args):
            a, b, b_strip, old, old_row, out, out_row, words = args
            pre = bld.block
            loop, add, plain, end = (bld.append_basic_block(f"micro.{n}") for n in ("k", "add", "plain", "end"))
            bs = [_offset(bld, b, (b_strip, j)) for j in range(strips)]
            # These lines are written at the end. Not to L1: two dozen misses to memory would hold up the loads of A and B behind them.
            for i in range(rows):
                for j in range(strips):
                    _emit_prefetch(bld, _at(bld, _offset(bld, out, (out_row, i)), j * W * WORD), L2)
            bld.branch(loop)
            bld.position_at_end(loop)
            k = bld.phi(I64)
            k.add_incoming(I64(0), pre)
            acc = [[bld.phi(VF) for _ in range(strips)] for _ in range(rows)]
            shift = bld.mul(k, I64(W * WORD))
            b_now = [load(bld, _at(bld, bld.add(p, shift)), VF) for p in bs]
            a_now = bld.add(a, shift)
            new: list[list[Any]] = []
            for i in range(rows):
                ptr = _at(bld, a_now, i * WORD)
                if pairs:
                    x = bld.bitcast(splat(bld, load(bld, ptr, I32), VI), vb)
                    name = "llvm.x86.avx512bf16.dpbf16ps.512"
                    new.append([llvm.call(bld, name, VF, acc[i][j], x, bld.bitcast(b_now[j], vb))
                                for j in range(strips)])  # fmt: skip
                else:
                    x = splat(bld, load(bld, ptr, F32))
                    new.append([llvm.fma(bld, x, b_now[j], acc[i][j]) for j in range(strips)])
            k_next = bld.add(k, I64(1))
            k.add_incoming(k_next, loop)
            for i in range(rows):
                for j in range(strips):
                    acc[i][j].add_incoming(const(0.0), pre)
                    acc[i][j].add_incoming(new[i][j], loop)
            done = bld.append_basic_block("micro.done")
            bld.cbranch(bld.icmp_signed("<", k_next, words), loop, done)
            bld.position_at_end(done)
            bld.cbranch(bld.icmp_unsigned("!=", old, I64(0)), add, plain)
            for block, adding in ((add, True), (plain, False)):
                bld.position_at_end(block)
                for i in range(rows):
                    source, target = _offset(bld, old, (old_row, i)), _offset(bld, out, (out_row, i))
                    for j in range(strips):
                        value = new[i][j]
                        if adding:
                            value = bld.fadd(load(bld, _at(bld, source, j * W * WORD), VF), value)
                        store(bld, value, _at(bld, target, j * W * WORD))
                bld.branch(end)
            bld.position_at_end(end)
            return ctx.get_dummy_value()

        return types.void(_I, _I, _I, _I, _I, _I, _I, _I), codegen

    return micro


def _make_prefetch(level: int) -> Any:
    """prefetch(address): bring its cache line to L1 or L2; any address is harmless."""

    @intrinsic
    def prefetch(tc, address):
        def codegen(ctx, bld, sig, args):
            _emit_prefetch(bld, _at(bld, args[0]), level)
            return ctx.get_dummy_value()

        return types.void(_I), codegen

    return prefetch


prefetch, prefetch_l1 = _make_prefetch(L2), _make_prefetch(L1)


# ---- AMX -----------------------------------------------------------------------------------------------------------

_TILE_BYTES = 1024  # an AMX tile has 16 rows of 64 bytes
_ROWS_A_STEP = 4  # rows of C that a writing micro-kernel writes beside one step of k: 8 steps write them all


def _tile_op(bld: Any, name: str, *args: Any) -> None:
    llvm.call(bld, f"llvm.x86.{name}", ir.VoidType(), *args)


def make_tile_micro(row_strips: int, column_strips: int, stream_b: bool = False) -> Any:
    """micro(a, a_strip, a_row, a_step, b, b_strip, old, old_row, out, out_row, steps): tiles of 16 x 16, 32 k a step; the
    chain continues from old unless it is 0. A is packed (a_row 64, a_step 1024) or rows of bfloat16 in memory (a_step 64).
    stream_b: what is read of B does not push A out of the L1 cache.
    """

    @intrinsic
    def micro(tc, a, a_strip, a_row, a_step, b, b_strip, old, old_row, out, out_row, steps):
        def codegen(ctx, bld, sig, args):
            _emit_tiles(bld, row_strips, column_strips, stream_b, args)
            return ctx.get_dummy_value()

        return types.void(*[_I] * 11), codegen

    return micro


def make_writing_micro() -> Any:
    """micro(a .. steps as above, held, to, to_row, half, add, add_row, bias, next_to): 2 x 2 tiles, and between their steps the sums of the
    2 x 2 tiles before them, which `held` has in rows of 128 bytes, go to `to`: rows of float32 at `add` and `bias` added unless 0, rounded
    to bfloat16 if `half`. The lines at `next_to`, where these tiles will go, are fetched. held 0: there are none yet; steps 0: the sums of
    the last tiles are written.

    Lines of a large C come from beyond the caches; one pass for a whole tile of C waited for them, a third of the time of such products.
    """

    @intrinsic
    def micro(tc, a, a_strip, a_row, a_step, b, b_strip, old, old_row, out, out_row, steps, held, to, to_row, half, add, add_row, bias, next_to):
        def codegen(ctx, bld, sig, args):
            *product, held, to, to_row, half, add, add_row, bias, next_to = args
            adding, biased = (bld.icmp_unsigned("!=", each, I64(0)) for each in (add, bias))
            limit = bld.select(bld.icmp_unsigned("!=", held, I64(0)), I64(2 * W), I64(0))
            lines = bld.select(bld.icmp_unsigned("!=", half, I64(0)), I64(0), I64(64))  # a second line where they are float32

            def write(first):
                with bld.if_else(adding) as (with_rows, without):
                    with with_rows:
                        write_rows(first, True)
                    with without:
                        write_rows(first, False)

            def write_rows(first, with_rows):
                for i in range(_ROWS_A_STEP):
                    row = bld.add(first, I64(i))
                    source, target = bld.add(held, bld.mul(row, I64(2 * W * WORD))), bld.add(to, bld.mul(row, to_row))
                    v = [load(bld, _at(bld, source, j * W * WORD), VF) for j in range(2)]
                    if with_rows:
                        beside = bld.add(add, bld.mul(row, add_row))
                        v = [bld.fadd(load(bld, _at(bld, beside, j * W * WORD), VF), x) for j, x in enumerate(v)]
                    v = [bld.select(biased, bld.fadd(x, each), x) for x, each in zip(v, biases)]
                    with bld.if_else(bld.icmp_unsigned("!=", half, I64(0))) as (rounded, whole):
                        with rounded:
                            for j in range(2):
                                store(bld, llvm.round_bf16(bld, v[j]), _at(bld, target, j * W * 2), 2)
                        with whole:
                            for j in range(2):
                                store(bld, v[j], _at(bld, target, j * W * WORD))

            def meanwhile(k):
                first = bld.mul(k, I64(_ROWS_A_STEP))
                with bld.if_then(bld.icmp_signed("<", first, I64(2 * W))):
                    for i in range(_ROWS_A_STEP):
                        line = bld.add(next_to, bld.mul(bld.add(first, I64(i)), to_row))
                        _emit_prefetch(bld, _at(bld, line), L1)
                        _emit_prefetch(bld, _at(bld, bld.add(line, lines)), L1)
                with bld.if_then(bld.icmp_signed("<", first, limit)):
                    write(first)

            readable = bld.select(biased, bias, product[4])  # any address that can be read: b
            biases = [load(bld, _at(bld, readable, j * W * WORD), VF) for j in range(2)]
            with bld.if_then(bld.icmp_signed(">", product[-1], I64(0))):
                _emit_tiles(bld, 2, 2, True, product, meanwhile)
            # Where there were fewer steps than it takes.
            before = bld.block
            check, body, done = (bld.append_basic_block(f"write.{n}") for n in ("check", "body", "done"))
            bld.branch(check)
            bld.position_at_end(check)
            k = bld.phi(I64)
            k.add_incoming(product[-1], before)
            first = bld.mul(k, I64(_ROWS_A_STEP))
            bld.cbranch(bld.icmp_signed("<", first, limit), body, done)
            bld.position_at_end(body)
            write(first)
            k.add_incoming(bld.add(k, I64(1)), bld.block)
            bld.branch(check)
            bld.position_at_end(done)
            return ctx.get_dummy_value()

        return types.void(*[_I] * 19), codegen

    return micro


def _emit_tiles(
    bld: Any, row_strips: int, column_strips: int, stream_b: bool, product: Sequence[Any], meanwhile: Callable[[Any], None] = lambda k: None
) -> None:
    """The product of `make_tile_micro`. Columns are taken in turn to the right and to the left, so that no tile is loaded in the place of one
    that was just used; `meanwhile` adds instructions to step k."""
    a, a_strip, a_row, a_step, b, b_strip, old, old_row, out, out_row, steps = product
    grid = [(i, j, I8(2 * i + j)) for i in range(row_strips) for j in range(column_strips)]

    def place(base: Any, row: Any, i: int, j: int) -> Any:
        return _at(bld, _offset(bld, base, (row, 16 * i)), j * 64)

    def step(k: Any, turn: int) -> None:
        """Each operand is loaded where it is first needed."""
        there = set()
        for i in range(row_strips):
            at = _at(bld, bld.add(_offset(bld, a, (a_strip, i)), bld.mul(k, a_step)))
            _tile_op(bld, "tileloadd64", I8(4 + i), at, a_row)
            for j in reversed(range(column_strips)) if (i + turn) % 2 else range(column_strips):
                if j not in there:
                    at = _at(bld, bld.add(_offset(bld, b, (b_strip, j)), bld.mul(k, I64(_TILE_BYTES))))
                    _tile_op(bld, "tileloaddt164" if stream_b else "tileloadd64", I8(6 + j), at, I64(64))
                    there.add(j)
                _tile_op(bld, "tdpbf16ps", I8(2 * i + j), I8(4 + i), I8(6 + j))
        meanwhile(k)

    zero, resume, start, loop, rest, last, end = (
        bld.append_basic_block(f"tile.{n}") for n in ("zero", "resume", "start", "k", "rest", "last", "end")
    )
    bld.cbranch(bld.icmp_unsigned("!=", old, I64(0)), resume, zero)
    bld.position_at_end(zero)
    for _, _, tile in grid:
        _tile_op(bld, "tilezero", tile)
    bld.branch(start)
    bld.position_at_end(resume)
    for i, j, tile in grid:
        _tile_op(bld, "tileloadd64", tile, place(old, old_row, i, j), old_row)
    bld.branch(start)
    bld.position_at_end(start)
    pairs = bld.and_(steps, I64(-2))
    bld.cbranch(bld.icmp_signed(">", pairs, I64(0)), loop, rest)
    bld.position_at_end(loop)
    k = bld.phi(I64)
    k.add_incoming(I64(0), start)
    step(k, 0)
    step(bld.add(k, I64(1)), 1)
    k_next = bld.add(k, I64(2))
    k.add_incoming(k_next, bld.block)
    bld.cbranch(bld.icmp_signed("<", k_next, pairs), loop, rest)
    bld.position_at_end(rest)
    bld.cbranch(bld.icmp_signed("<", pairs, steps), last, end)
    bld.position_at_end(last)
    step(pairs, 0)
    bld.branch(end)
    bld.position_at_end(end)
    for i, j, tile in grid:
        _tile_op(bld, "tilestored64", tile, place(out, out_row, i, j), out_row)


@intrinsic
def tile_configure(tc, address):
    """Load the 64-byte tile configuration; each thread does it before its first tile and releases after its last."""

    def codegen(ctx, bld, sig, args):
        _tile_op(bld, "ldtilecfg", _at(bld, args[0]))
        return ctx.get_dummy_value()

    return types.void(_I), codegen


@intrinsic
def tile_release(tc):
    def codegen(ctx, bld, sig, args):
        _tile_op(bld, "tilerelease")
        return ctx.get_dummy_value()

    return types.void(), codegen


def tile_configuration() -> bytes:
    """Palette 1, eight tiles of 16 rows x 64 bytes."""
    config = bytearray(64)
    config[0] = 1
    for tile in range(8):
        config[16 + 2 * tile] = 64
        config[48 + tile] = 16
    return bytes(config)


def _request_tiles() -> bool:
    """Ask Linux for the AMX tile state (8 KB a thread, so the kernel wants to be asked once per process)."""
    if not {"amxbf16", "amxtile"} <= FEATURES or W != 16 or not sys.platform.startswith("linux"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    try:
        return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0
    except (OSError, AttributeError):
        return False


HAS_TILES = _request_tiles()


def _aligned_configuration() -> tuple[np.ndarray, int]:
    memory = np.zeros(128, np.uint8)
    start = -memory.ctypes.data % 64
    memory[start : start + 64] = np.frombuffer(tile_configuration(), np.uint8)
    return memory, lasting(memory.ctypes.data + start)


_configuration_memory, CONFIGURATION = _aligned_configuration()
"""CONFIGURATION: the address of `tile_configuration()`, aligned to a cache line; it lives as long as the process."""
