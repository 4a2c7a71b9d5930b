"""What the forward and the backward pass of attention share: segments, masks, packed blocks and matrix micro-kernels.

A segment is a batch entry or a packed document: T queries and S keys that see only each other. Keys come in blocks of KEYS,
counted from the first key of the segment, so that what happens to a query row depends on its own keys only: not on the rows
beside it, the batch, or how many queries came in one call. Every kind of mask is one interval [first, end) of keys per query.

Everything is computed in float32 on tiles in a worker's scratch; bfloat16 is widened while a tile is filled.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from torch import Tensor

from cllm.kernels import operations
from cllm.kernels.numba import llvm
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.launch import hold, inline, int32_at, int64_at, is_half, jit, load, store
from cllm.kernels.numba.llvm import F32, FEATURES, I8, I64, VF, VH, VI, const, intrinsic, splat
from cllm.kernels.numba.matvec_words import fill_chain
from cllm.kernels.numba.pack import BF16_WIDENED, F32_AS_IS, pack_strip
from cllm.kernels.numba.philox import kept_group
from cllm.kernels.numba.simd import W, vec, vmul, vset, vzero
from cllm.kernels.philox import GROUP, scale_of, threshold_of

KEYS = 128  # a block has this many keys
WORD = 4
MR, NV = (8, 2) if W == 16 or "neon" in FEATURES else (4, 2)  # accumulators that fit 32 or 16 registers


class _Shared(NamedTuple):
    """What every attention kernel reads first: addresses, and strides in bytes."""

    q: int
    q_batch: int
    q_token: int
    q_head: int
    k: int
    k_batch: int
    k_token: int
    k_head: int
    v: int
    v_batch: int
    v_token: int
    v_head: int
    out: int  # contiguous
    lse: int  # float32 (B, H, T)
    half: int  # whether q, k, v and the output are bfloat16
    heads: int
    kv_heads: int
    dim: int
    tokens: int  # queries of a batch entry
    causal: int
    window: int  # 0: none
    segments: int  # the table of segments
    num_segments: int
    scratch: int  # work space of the first worker
    scratch_size: int  # of each worker, in bytes
    packed: int = 0  # all blocks of keys and values, packed; 0: each tile packs those that it needs
    dropped: int = 0  # draws below it drop a probability; 0: no dropout, and nothing of what follows is read
    key: int = 0  # address of the key of the draws, int64: the seed, the step, and the number of the first query among the tokens that draw
    place: int = 0  # of the first head
    period: int = 0  # the length of the rows that packed documents were cut from; 0: there are none
    k_scales: int = 0  # float32 of each token and head of the pool, whose keys and values are then int8; 0: they are as `half` says
    v_scales: int = 0


class _Options(NamedTuple):
    scale: float
    softcap: float  # 0: none
    kept: float = 1.0  # what dropout multiplies by a probability that it keeps


class _Segment(NamedTuple):
    """A row of the table of segments, int64."""

    batch: int
    start: int  # its first query, and without pages its first key
    queries: int
    num_keys: int
    tasks: int  # how many tasks belong to the segments before
    blocks: int  # how many blocks of keys, or of queries, belong to the segments before
    pages: int = 0  # address of int32 numbers of the pages where its blocks of keys lie; 0: they lie one after the other
    first_block: int = 0  # the first block of keys that one of its queries sees


P, _shared = fields(_Shared)
F, options = fields(_Options)
SEGMENT, _ = fields(_Segment)
SEGMENT_BYTES = 8 * len(SEGMENT)

LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453


# ---- micro-kernels ---------------------------------------------------------------------------------------------------


def _make_micro(rows: int, strips: int, a_transposed: bool, half: bool = False):
    """C[rows, strips * W] = or += A B, B row by row, in bfloat16 with `half`. A is [row][k], or [k][row] when transposed.

    Every element is one fma chain from 0 over k, added to C in one addition unless `first`.
    """

    @intrinsic
    def micro(tc, a, a_stride, b, b_row, b_strip, c, c_row, num_k, first):
        def codegen(ctx, bld, sig, args):
            a, a_stride, b, b_row, b_strip, c, c_row, num_k, first = args

            def at(address, offset=0):
                pointer = bld.inttoptr(address, I8.as_pointer())
                return bld.gep(pointer, [I64(offset)]) if offset else pointer

            pre = bld.block
            loop, done, add, plain, end = (bld.append_basic_block(f"micro.{n}") for n in ("k", "done", "add", "plain", "end"))
            row_at = [I64(i * WORD) if a_transposed else bld.mul(a_stride, I64(i)) for i in range(rows)]
            strip_at = [bld.mul(b_strip, I64(j)) for j in range(strips)]
            a_step = a_stride if a_transposed else I64(WORD)
            bld.branch(loop)
            bld.position_at_end(loop)
            k, a_now, b_now = bld.phi(I64), bld.phi(I64), bld.phi(I64)
            acc = [[bld.phi(VF) for _ in range(strips)] for _ in range(rows)]
            places = [at(bld.add(b_now, offset)) for offset in strip_at]
            b_values = [llvm.widen_bf16(bld, llvm.load(bld, each, VH, 2)) if half else llvm.load(bld, each, VF) for each in places]
            new = []
            for i in range(rows):
                x = splat(bld, llvm.load(bld, at(bld.add(a_now, row_at[i])), F32))
                new.append([llvm.fma(bld, x, b_values[j], acc[i][j]) for j in range(strips)])
            k_next, a_next, b_next = bld.add(k, I64(1)), bld.add(a_now, a_step), bld.add(b_now, b_row)
            for phi, start, after in ((k, I64(0), k_next), (a_now, a, a_next), (b_now, b, b_next)):
                phi.add_incoming(start, pre)
                phi.add_incoming(after, loop)
            for i in range(rows):
                for j in range(strips):
                    acc[i][j].add_incoming(const(0.0), pre)
                    acc[i][j].add_incoming(new[i][j], loop)
            bld.cbranch(bld.icmp_signed("<", k_next, num_k), loop, done)
            bld.position_at_end(done)
            bld.cbranch(bld.icmp_unsigned("!=", first, first.type(0)), plain, add)
            for block, adding in ((add, True), (plain, False)):
                bld.position_at_end(block)
                for i in range(rows):
                    row = bld.add(c, bld.mul(c_row, I64(i)))
                    for j in range(strips):
                        ptr = at(row, j * W * WORD)
                        llvm.store(bld, bld.fadd(llvm.load(bld, ptr, VF), new[i][j]) if adding else new[i][j], ptr)
                bld.branch(end)
            bld.position_at_end(end)
            return ctx.get_dummy_value()

        return types.void(*[types.intp] * 8, types.boolean), codegen

    return micro


_rows_1, _rows_n = _make_micro(MR, 1, False), _make_micro(MR, NV, False)
_few_1, _few_n = _make_micro(4, 1, False), _make_micro(4, MR // 4 * NV, False)
_row_1, _row_n = _make_micro(1, 1, False), _make_micro(1, 2 * NV, False)
_three_1, _three_n = _make_micro(3, 1, False), _make_micro(3, 4, False)  # fewer sums would wait for themselves
_half_few_1, _half_few_n = _make_micro(4, 1, False, True), _make_micro(4, MR // 4 * NV, False, True)
_half_three_1, _half_three_n = _make_micro(3, 1, False, True), _make_micro(3, 4, False, True)
_half_row_1, _half_row_n = _make_micro(1, 1, False, True), _make_micro(1, 2 * NV, False, True)
_turned_1, _turned_n = _make_micro(MR, 1, True), _make_micro(MR, NV, True)


@jit
def multiply(a, a_row, b, b_row, b_strip, c, c_row, rows, num_k, strips, first):
    """C[rows, strips * W] = or += A[rows, num_k] B; whole groups of MR rows of C are written when more than 4 rows are left."""
    r = 0
    while rows - r > 4:
        for s in range(0, strips, NV):
            to = c + r * c_row + s * (W * WORD)
            if strips - s >= NV:
                _rows_n(a + r * a_row, a_row, b + s * b_strip, b_row, b_strip, to, c_row, num_k, first)
            else:
                _rows_1(a + r * a_row, a_row, b + s * b_strip, b_row, b_strip, to, c_row, num_k, first)
        r += MR
    if rows - r == 3:  # the heads that share a key, in the decoding of one token
        s = 0
        while strips - s >= 4:
            _three_n(a + r * a_row, a_row, b + s * b_strip, b_row, b_strip, c + r * c_row + s * (W * WORD), c_row, num_k, first)
            s += 4
        while s < strips:
            _three_1(a + r * a_row, a_row, b + s * b_strip, b_row, b_strip, c + r * c_row + s * (W * WORD), c_row, num_k, first)
            s += 1
        r += 3
    elif rows - r == 4:
        s = 0
        while strips - s >= MR // 4 * NV:
            _few_n(a + r * a_row, a_row, b + s * b_strip, b_row, b_strip, c + r * c_row + s * (W * WORD), c_row, num_k, first)
            s += MR // 4 * NV
        while s < strips:
            _few_1(a + r * a_row, a_row, b + s * b_strip, b_row, b_strip, c + r * c_row + s * (W * WORD), c_row, num_k, first)
            s += 1
        r += 4
    while r < rows:
        s = 0
        while strips - s >= 2 * NV:
            _row_n(a + r * a_row, a_row, b + s * b_strip, b_row, b_strip, c + r * c_row + s * (W * WORD), c_row, num_k, first)
            s += 2 * NV
        while s < strips:
            _row_1(a + r * a_row, a_row, b + s * b_strip, b_row, b_strip, c + r * c_row + s * (W * WORD), c_row, num_k, first)
            s += 1
        r += 1


MOST_FEW = 4


@jit
def multiply_half(a, a_row, b, b_row, c, c_row, rows, num_k, strips, first):
    """The same for B in bfloat16, where it lies: widening it on the way costs less than a copy for at most MOST_FEW rows."""
    r = 0
    while r < rows:
        from_a, to, s = a + r * a_row, c + r * c_row, 0
        if rows - r == 4:
            while strips - s >= MR // 4 * NV:
                _half_few_n(from_a, a_row, b + s * (W * 2), b_row, W * 2, to + s * (W * WORD), c_row, num_k, first)
                s += MR // 4 * NV
            while s < strips:
                _half_few_1(from_a, a_row, b + s * (W * 2), b_row, W * 2, to + s * (W * WORD), c_row, num_k, first)
                s += 1
            r += 4
        elif rows - r == 3:
            while strips - s >= 4:
                _half_three_n(from_a, a_row, b + s * (W * 2), b_row, W * 2, to + s * (W * WORD), c_row, num_k, first)
                s += 4
            while s < strips:
                _half_three_1(from_a, a_row, b + s * (W * 2), b_row, W * 2, to + s * (W * WORD), c_row, num_k, first)
                s += 1
            r += 3
        else:
            while strips - s >= 2 * NV:
                _half_row_n(from_a, a_row, b + s * (W * 2), b_row, W * 2, to + s * (W * WORD), c_row, num_k, first)
                s += 2 * NV
            while s < strips:
                _half_row_1(from_a, a_row, b + s * (W * 2), b_row, W * 2, to + s * (W * WORD), c_row, num_k, first)
                s += 1
            r += 1


@jit
def multiply_turned(a, a_k, b, b_row, c, c_row, rows, num_k, strips, first):
    """C[rows, strips * W] = or += A^T B with A [num_k][rows]; rows is rounded up to MR."""
    for r in range(0, rows, MR):
        for s in range(0, strips, NV):
            to = c + r * c_row + s * (W * WORD)
            if strips - s >= NV:
                _turned_n(a + r * WORD, a_k, b + s * (W * WORD), b_row, W * WORD, to, c_row, num_k, first)
            else:
                _turned_1(a + r * WORD, a_k, b + s * (W * WORD), b_row, W * WORD, to, c_row, num_k, first)


# ---- vectors ---------------------------------------------------------------------------------------------------------


def _fold_rows(bld: Any, rows: list[Any], combine: Any) -> Any:
    """W vectors -> one whose lane i is vector i reduced: lane j of what is left is combined with lane j + half of it, as `simd.vhsum` does."""
    size = W
    while size > 1:  # two vectors become one: their groups of lanes, halved, in turn
        half = size // 2
        lanes = [v * W + group + lane for group in range(0, W, size) for v in (0, 1) for lane in range(half)]
        first, second = (ir.Constant(VI, [lane + part for lane in lanes]) for part in (0, half))
        pairs = zip(rows[:half], rows[half:])
        rows = [combine(bld.shuffle_vector(a, b, first), bld.shuffle_vector(a, b, second)) for a, b in pairs]
        size = half
    return rows[0]


@intrinsic
def largest_of_rows(tc, address, row_bytes, vectors):
    """Lane i: the largest of vectors * W elements of row i, for W rows. NaN is dropped."""

    def codegen(ctx, bld, sig, args):
        address, row_bytes, vectors = args
        pre = bld.block
        loop, done = (bld.append_basic_block(f"largest.{n}") for n in ("loop", "done"))
        bld.branch(loop)
        bld.position_at_end(loop)
        n, tops = bld.phi(I64), [bld.phi(VF) for _ in range(W)]
        offset = bld.add(address, bld.mul(n, I64(W * WORD)))
        rows = [llvm.load(bld, bld.inttoptr(bld.add(offset, bld.mul(row_bytes, I64(i))), I8.as_pointer()), VF) for i in range(W)]
        new = [llvm.greater(bld, row, top) for row, top in zip(rows, tops)]
        after = bld.add(n, I64(1))
        n.add_incoming(I64(0), pre)
        n.add_incoming(after, loop)
        for top, value in zip(tops, new):
            top.add_incoming(const(float("-inf")), pre)
            top.add_incoming(value, loop)
        bld.cbranch(bld.icmp_signed("<", after, vectors), loop, done)
        bld.position_at_end(done)
        return _fold_rows(bld, new, lambda a, b: llvm.greater(bld, a, b))

    return vec(types.intp, types.intp, types.intp), codegen


@intrinsic
def sums_of_rows(tc, address):
    """Lane i: the sum of the W elements of row i, for W rows that follow each other."""

    def codegen(ctx, bld, sig, args):
        rows = [llvm.load(bld, bld.inttoptr(bld.add(args[0], I64(i * W * WORD)), I8.as_pointer()), VF) for i in range(W)]
        return _fold_rows(bld, rows, bld.fadd)

    return vec(types.intp), codegen


# ---- tiles -----------------------------------------------------------------------------------------------------------


@inline
def padded_dim(dim):
    return (dim + W - 1) // W * W


@jit
def find_segment(segments, num_segments, task, field):
    """Address of the row of a table of segments whose tasks, counted in `field`, include this one."""
    low, high = 0, num_segments - 1
    while low < high:
        middle = (low + high + 1) // 2
        if int64_at(segments, middle * len(SEGMENT) + field) <= task:
            low = middle
        else:
            high = middle - 1
    return segments + low * SEGMENT_BYTES


@inline
def first_token(segment, block):
    """Where a block of a segment's keys begins, counted in tokens of its batch entry, or of the pool of pages."""
    pages = int64_at(segment, SEGMENT.pages)
    return int32_at(pages, block) * KEYS if pages != 0 else int64_at(segment, SEGMENT.start) + block * KEYS


@inline
def dealt(local, blocks):
    """(row, block) of a task. Causal blocks grow along a row: every other row is dealt backwards, or one worker of two got all the longer ones."""
    row, block = local // blocks, local % blocks
    return row, blocks - 1 - block if row % 2 else block


@inline
def first_key(p, t, num_queries, num_keys):
    return max(0, t + num_keys - num_queries - p[P.window] + 1) if p[P.window] > 0 else 0


@inline
def end_key(p, t, num_queries, num_keys):
    return max(0, min(num_keys, t + num_keys - num_queries + 1)) if p[P.causal] else num_keys


@inline
def scale_sign(f):
    """The factor of the queries in a tile: what is left of the scale is positive, so that it keeps the order of scores."""
    return np.float32(1.0 if f[F.scale] > 0.0 else -1.0 if f[F.scale] < 0.0 else 0.0)


@inline
def log2_factor(f):
    """Brings a score (after softcap, where there is one) to log2 units; never 0, which would make NaN of a hidden key's -inf."""
    if f[F.softcap] != 0.0 or f[F.scale] == 0.0:
        return LOG2_E
    return abs(f[F.scale]) * LOG2_E


@jit
def fill_rows(source, half, row_bytes, rows, dim, target, scale, all_rows):
    """target[r] = source[r] * scale in float32, rows padded to whole vectors with 0; rows from `rows` on are 0."""
    width = padded_dim(dim)
    s = vset(scale)
    for r in range(rows):
        for c in range(0, width, W):
            store(target + r * (width * WORD), False, c, vmul(load(source + r * row_bytes, half, c, dim - c), s), W)
    for r in range(rows, all_rows):
        for c in range(0, width, W):
            store(target + r * (width * WORD), False, c, vzero(), W)


@jit
def fill_strips(source, half, row_bytes, rows, dim, target, spare):
    """Rows of a block, transposed: strips of W rows, [strip][dim][W], padded with 0."""
    mode, size = (BF16_WIDENED, 2) if half else (F32_AS_IS, 4)
    width = padded_dim(dim)
    for r in range(0, rows, W):
        strip = target + (r // W) * (width * W * WORD)
        if rows - r >= W and dim == width:
            fill_chain(mode, source + r * row_bytes, row_bytes, dim, strip)
        else:
            pack_strip(mode, source + r * row_bytes, row_bytes // size, 1, min(W, rows - r), dim, width, strip, spare, False)


# ---- dropout -----------------------------------------------------------------------------------------------------------

KEPT_BYTES = 2 * GROUP * WORD  # work space of `kept_row`: KEYS elements lie in two groups at most
assert KEYS <= GROUP


@inline
def first_element(p, start, key):
    """The number among the draws of a segment's key."""
    return (start % p[P.period] if p[P.period] > 0 else start) + key


@jit
def kept_row(p, space, kept, b, token, h, element, columns):
    """Address of float32 for `columns` keys from number `element` on, as one query of one head sees them: 0 where one is dropped, else `kept`."""
    first = element // GROUP
    seed, step, first_query = int64_at(p[P.key], 0), int64_at(p[P.key], 1), int64_at(p[P.key], 2)
    for group in range(first, (element + columns + GROUP - 1) // GROUP):
        kept_group(
            space + (group - first) * (GROUP * WORD), kept, p[P.dropped], group, first_query + b * p[P.tokens] + token, p[P.place] + h,
            step, seed, seed >> 32,
        )  # fmt: skip
    return space + (element - first * GROUP) * WORD


# ---- on the Python side -----------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """The dropout of one call, as the kernels take it."""

    dropped: int
    key: Tensor | None
    place: int
    period: int
    kept: float


NO_DROPOUT = Drawn(0, None, 0, 0, 1.0)


def drawn(key: Tensor, rate: float, place: int, period: int) -> Drawn:
    key = key.contiguous()
    hold(key)
    return Drawn(threshold_of(rate), key, place, period, scale_of(rate))


def strided(x: Tensor) -> Tensor:
    """(B, T, H, D) with unit stride in D; a copy only where it has none."""
    x = x.detach()
    return x if x.shape[3] <= 1 or x.stride(3) == 1 else x.contiguous()


def shared(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, window: int, segments: np.ndarray, scratch: int, scratch_size: int,
    packed: int = 0, dropout: Drawn = NO_DROPOUT, scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[int, ...]:  # fmt: skip
    """The shared arguments of a launch; q, k and v have unit stride in D. scales: of keys and values in int8, contiguous."""
    size, kv_size = q.element_size(), k.element_size()
    (_, tokens, heads, dim), kv_heads = q.shape, k.shape[2]
    q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    return _shared(
        q=q.data_ptr(),
        q_batch=q_strides[0] * size,
        q_token=q_strides[1] * size,
        q_head=q_strides[2] * size,
        k=k.data_ptr(),
        k_batch=k_strides[0] * kv_size,
        k_token=k_strides[1] * kv_size,
        k_head=k_strides[2] * kv_size,
        v=v.data_ptr(),
        v_batch=v_strides[0] * kv_size,
        v_token=v_strides[1] * kv_size,
        v_head=v_strides[2] * kv_size,
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        half=is_half(q),
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        tokens=tokens,
        causal=int(causal),
        window=window,
        segments=segments.ctypes.data,
        num_segments=len(segments),
        scratch=scratch,
        scratch_size=scratch_size,
        packed=packed,
        dropped=dropout.dropped,
        key=0 if dropout.key is None else dropout.key.data_ptr(),
        place=dropout.place,
        period=dropout.period,
        k_scales=0 if scales is None else scales[0].data_ptr(),
        v_scales=0 if scales is None else scales[1].data_ptr(),
    )


def dense(batch: int, queries: int, num_keys: int) -> np.ndarray:
    """The segment table of a batch, without TASKS and BLOCKS."""
    table = np.zeros((batch, len(SEGMENT)), np.int64)
    table[:, SEGMENT.batch] = np.arange(batch)
    table[:, SEGMENT.queries], table[:, SEGMENT.num_keys] = queries, num_keys
    return table


def documents(cu_seqlens: Tensor) -> np.ndarray:
    """The segment table of packed documents, without TASKS and BLOCKS."""
    bounds = cu_seqlens.detach().numpy().astype(np.int64)
    table = np.zeros((len(bounds) - 1, len(SEGMENT)), np.int64)
    table[:, SEGMENT.start] = bounds[:-1]
    table[:, SEGMENT.queries] = table[:, SEGMENT.num_keys] = np.diff(bounds)
    return table


def visible_pairs(table: np.ndarray, causal: bool, window: int) -> int:
    """Pairs of a query and a key that it sees, over all segments."""
    return int(operations.visible_pairs(table[:, SEGMENT.queries], table[:, SEGMENT.num_keys], causal, window).sum())


def count(table: np.ndarray, field: int, numbers: np.ndarray) -> int:
    """Write the running total of `numbers` into a field of the table; returns the total."""
    ends = np.cumsum(numbers)
    table[:, field] = ends - numbers
    return int(ends[-1]) if len(ends) else 0
