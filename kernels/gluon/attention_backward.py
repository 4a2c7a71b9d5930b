"""Attention for Hopper in Gluon, the backward pass: `attention_forward.py` has the forward pass, the schedule's formulas and the method's source.

Two kernels without atomics, so that the same inputs give the same bits. One holds a tile of keys and values and walks over the queries of all
heads that share them; its scores are transposed, keys down the rows, so that probabilities and their gradients are operands of the next products
straight from registers. The other holds a tile of queries and walks over the keys. Both compute the scores again, seven matrix products in all
where one kernel with atomics needs five.
"""

# ruff: noqa: RUF059, B007 - tuples are unpacked whole, for in Gluon `_` is a variable like any other and may not change its type

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip

from cllm.kernels.gluon import attention_forward
from cllm.kernels.gluon.attention_forward import (
    HALVES,
    LN_2,
    LOG2_E,
    ROWS,
    cases,
    descriptor,
    document_bounds,
    first_cut_key_block,
    heads_in_l2,
    key_blocks_of,
    key_limits,
    matrix,
    place_of,
    positive_scale,
    query_limits,
    ring,
    score_numbers,
    span,
    tanh_of,
)  # fmt: skip
from cllm.kernels.triton.launch import Calls, launch
from cllm.runtime.gpu import GPU, gpu_of

HEAD_DIMS = (64, 128)
LINE = tl.constexpr(64)  # queries whose log-sum-exp, and then delta, lie together


@triton.jit
def attention_row_terms_kernel(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, terms_ptr, lse_factor, num_queries, num_heads, padded,
    HAS_DLSE: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Of every query the two numbers that its scores' gradients need: log-sum-exp in the unit of the scores, and sum(dout * out) - dlse.
    (B * H, padded / LINE, 2, LINE), so that a block's two lines are a constant apart. Rows past the end, and rows that see nothing, get
    +inf and 0: their probabilities are then 0 without a mask."""
    row = tl.program_id(0) % (padded // ROWS) * ROWS + tl.arange(0, ROWS)
    place = (tl.program_id(0) // (padded // ROWS)).to(tl.int64)
    inside = row < num_queries
    token = ((place // num_heads) * num_queries + row) * num_heads + place % num_heads
    offset = token[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    dout = tl.load(dout_ptr + offset, mask=inside[:, None], other=0.0).to(tl.float32)
    out = tl.load(out_ptr + offset, mask=inside[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    lse = tl.load(lse_ptr + place * num_queries + row, mask=inside, other=float("-inf"))
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + place * num_queries + row, mask=inside, other=0.0).to(tl.float32)
    hidden = lse == float("-inf")
    terms_ptr += place * padded * 2 + row + row // LINE * LINE
    tl.store(terms_ptr, tl.where(hidden, float("inf"), lse * lse_factor))
    tl.store(terms_ptr + LINE, tl.where(hidden, 0.0, delta))


@gluon.jit
def query_blocks_of(
    row, ROWS: gl.constexpr, shape, documents, QUERIES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr
):  # fmt: skip
    """Blocks begin <= j < end of queries that see any of ROWS keys."""
    first, of_first = query_limits(row, shape, documents, CAUSAL, WINDOW, DOCUMENTS)
    of_last, last = query_limits(row + (ROWS - 1), shape, documents, CAUSAL, WINDOW, DOCUMENTS)
    return span(first, last, QUERIES)


@gluon.jit
def first_whole_query_block(
    row, ROWS: gl.constexpr, begin, end, shape, documents,
    QUERIES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """From this block on no query comes too early for any of ROWS keys."""
    first, of_last = query_limits(row + (ROWS - 1), shape, documents, CAUSAL, WINDOW, DOCUMENTS)
    return gl.minimum(gl.maximum((first + QUERIES - 1) // QUERIES, begin), end)


@gluon.jit
def raw_scale(numbers, SOFTCAP: gl.constexpr):
    """The scale that the caller gave, out of what it was made into: one captured value fewer, for each holds a register throughout."""
    scale, limit = numbers
    if SOFTCAP:
        return scale * limit * (0.5 * LN_2)
    else:
        return scale * LN_2


@gluon.jit
def settled(accumulator):
    """Moves every value to a register of its own, here and now. A start value that is broadcast is otherwise copied right before the product,
    when another is in flight, and ptxas ends that one first."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [accumulator], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _start(lse, shape: gl.constexpr, LAYOUT: gl.constexpr, SOFTCAP: gl.constexpr):
    """What a product of scores starts at: -lse, which then needs no registers while the product runs. A cap comes first."""
    zeros = gl.zeros(shape, gl.float32, LAYOUT)
    if SOFTCAP:
        return settled(zeros)
    else:
        return settled(zeros - lse)


@gluon.jit
def _probabilities(
    scores, lse, position, first, last, numbers, MASK: gl.constexpr, LOWER: gl.constexpr, UPPER: gl.constexpr, SOFTCAP: gl.constexpr
):  # fmt: skip
    """p, and p times the derivative of the cap. `position` runs along the columns, where first <= position < last is seen."""
    scale, limit = numbers
    if SOFTCAP:
        bent = tanh_of(scores, numbers)
        p = gl.exp2((limit * bent - lse) * LOG2_E)
    else:
        p = gl.exp2(scores * scale)
    if MASK:
        if LOWER:
            p = gl.where(position[None, :] >= first[:, None], p, 0.0)
        if UPPER:
            p = gl.where(position[None, :] < last[:, None], p, 0.0)
    inner = p
    if SOFTCAP:
        inner = p * (1.0 - bent * bent)
    return p, inner


# ---- keys and values ----------------------------------------------------------------------------------------------------------------


@gluon.jit
def _feed_queries(
    descriptors, buffers, barriers, schedule, shape, documents,
    QUERIES: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc = descriptors
    queries, keys, values, douts = buffers
    kv_full, full, empty, done = barriers
    num_tiles_of_head, num_all_heads, num_kv_heads, group, section = schedule
    HALF_BYTES: gl.constexpr = keys.shape[3] * keys.shape[4] * 4  # keys and values
    BYTES: gl.constexpr = queries.shape[3] * queries.shape[4] * 4  # queries and output gradients
    ROWS: gl.constexpr = keys.shape[3]
    turned, place = place_of(gl.program_id(0), num_tiles_of_head, num_all_heads, section)
    index = num_tiles_of_head - 1 - turned  # where attention is causal, the first keys are seen by the most queries
    batch = place // num_kv_heads
    kv_head = place % num_kv_heads
    for half in gl.static_range(2):
        mbarrier.expect(kv_full.index(half), HALF_BYTES)
        tma.async_copy_global_to_shared(k_desc, [batch, kv_head, (2 * index + half) * ROWS, 0], kv_full.index(half), keys.index(half))
        tma.async_copy_global_to_shared(v_desc, [batch, kv_head, (2 * index + half) * ROWS, 0], kv_full.index(half), values.index(half))
    begin, end = query_blocks_of(index * (2 * ROWS), 2 * ROWS, shape, documents, QUERIES, CAUSAL, WINDOW, DOCUMENTS)
    use = 0
    for head in range(kv_head * group, kv_head * group + group):
        for block in range(begin, end):
            slot, phase = ring(use, STAGES)
            mbarrier.wait(empty.index(slot), phase ^ 1)
            mbarrier.expect(full.index(slot), BYTES)
            tma.async_copy_global_to_shared(q_desc, [batch, head, block * QUERIES, 0], full.index(slot), queries.index(slot))
            tma.async_copy_global_to_shared(dout_desc, [batch, head, block * QUERIES, 0], full.index(slot), douts.index(slot))
            use += 1
    # The gradients leave from here, because the place they go to would hold registers of the computing warps all along.
    for half in gl.static_range(2):
        mbarrier.wait(done.index(half), 0)
        tma.async_copy_shared_to_global(dk_desc, [batch, kv_head, (2 * index + half) * ROWS, 0], keys.index(half))
        tma.async_copy_shared_to_global(dv_desc, [batch, kv_head, (2 * index + half) * ROWS, 0], values.index(half))
    tma.store_wait(0)


@gluon.jit
def _terms_before(block, QUERIES: gl.constexpr):
    """How many numbers lie before the log-sum-exp of a block of queries: lines of LINE, of which every second is delta."""
    return block * QUERIES + block * QUERIES // LINE * LINE


@gluon.jit
def _query_steps(
    start, stop, state, k, v, buffers, barriers, use, terms_ptr, first, last, numbers,
    QUERIES: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, LOWER: gl.constexpr, UPPER: gl.constexpr, SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr, GRADS: gl.constexpr,
):  # fmt: skip
    """Blocks start <= block < stop of one head's queries; the first of them is the use-th that this program takes. `terms_ptr` walks along: found
    from the block, it would make the block's number, and with it every comparison of positions, 64 bits wide."""
    queries, keys, values, douts = buffers
    kv_full, full, empty, done = barriers
    DTYPE: gl.constexpr = keys.dtype
    ROWS: gl.constexpr = k.shape[0]
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, GRADS, 2)
    dk, dv = state
    for block in range(start, stop):
        slot, phase = ring(use, STAGES)
        column = gl.arange(0, QUERIES, layout=gl.SliceLayout(0, SCORES))
        lse = gl.load(terms_ptr + column)
        delta = gl.load(terms_ptr + LINE + column)
        terms_ptr += _terms_before(block + 1, QUERIES) - _terms_before(block, QUERIES)
        q = matrix(queries.index(slot))
        dout = matrix(douts.index(slot))
        scores = _start(lse[None, :], [ROWS, QUERIES], SCORES, SOFTCAP)
        dp = _start(delta[None, :], [ROWS, QUERIES], SCORES, False)
        mbarrier.wait(full.index(slot), phase)
        scores = warpgroup_mma(k, q.permute((1, 0)), scores, is_async=True)
        dp = warpgroup_mma(v, dout.permute((1, 0)), dp, is_async=True)
        scores = warpgroup_mma_wait(1, (scores,))
        p, inner = _probabilities(scores, lse[None, :], block * QUERIES + column, first, last, numbers, MASK, LOWER, UPPER, SOFTCAP)
        dv = warpgroup_mma(gl.convert_layout(p.to(DTYPE), OPERAND), dout, dv, is_async=True)
        dp = warpgroup_mma_wait(1, (dp,))
        ds = inner * dp
        dk = warpgroup_mma(gl.convert_layout(ds.to(DTYPE), OPERAND), q, dk, is_async=True)
        # Nothing is left in flight from one block to the next: ptxas would copy the accumulators, and serialise the products for it.
        dk, dv = warpgroup_mma_wait(0, (dk, dv))
        mbarrier.arrive(empty.index(slot), count=1)
        use += 1
    return (dk, dv), use, terms_ptr


@gluon.jit
def _compute_keys(
    terms_ptr, padded, buffers, barriers, schedule, shape, documents, numbers,
    HALF: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    queries, keys, values, douts = buffers
    kv_full, full, empty, done = barriers
    num_tiles_of_head, num_all_heads, num_kv_heads, group, section = schedule
    DTYPE: gl.constexpr = keys.dtype
    ROWS: gl.constexpr = keys.shape[3]
    HEAD_DIM: gl.constexpr = keys.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    LOWER: gl.constexpr = CAUSAL or DOCUMENTS
    UPPER: gl.constexpr = WINDOW or DOCUMENTS
    turned, place = place_of(gl.program_id(0), num_tiles_of_head, num_all_heads, section)
    index = num_tiles_of_head - 1 - turned
    row = (2 * index + HALF) * ROWS
    begin, end = query_blocks_of(index * (2 * ROWS), 2 * ROWS, shape, documents, QUERIES, CAUSAL, WINDOW, DOCUMENTS)
    low = first_whole_query_block(row, ROWS, begin, end, shape, documents, QUERIES, CAUSAL, WINDOW, DOCUMENTS)
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    first, last = query_limits(rows, shape, documents, CAUSAL, WINDOW, DOCUMENTS)
    terms_ptr += gl.cast(place * group, gl.int64) * (2 * padded) + _terms_before(begin, QUERIES)
    to_next_head = 2 * padded - _terms_before(end, QUERIES) + _terms_before(begin, QUERIES)

    k = matrix(keys.index(HALF))
    v = matrix(values.index(HALF))
    mbarrier.wait(kv_full.index(HALF), 0)
    zeros = gl.zeros([ROWS, HEAD_DIM], gl.float32, GRADS)
    state = (zeros, zeros)
    use = 0
    for head in range(group):
        if UPPER:
            state, use, terms_ptr = _query_steps(
                begin, end, state, k, v, buffers, barriers, use, terms_ptr, first, last, numbers,
                QUERIES, STAGES, True, LOWER, UPPER, SOFTCAP, SCORES, GRADS,
            )  # fmt: skip
        else:
            if LOWER:
                state, use, terms_ptr = _query_steps(
                    begin, low, state, k, v, buffers, barriers, use, terms_ptr, first, last, numbers,
                    QUERIES, STAGES, True, LOWER, UPPER, SOFTCAP, SCORES, GRADS,
                )  # fmt: skip
            state, use, terms_ptr = _query_steps(
                low, end, state, k, v, buffers, barriers, use, terms_ptr, first, last, numbers,
                QUERIES, STAGES, False, LOWER, UPPER, SOFTCAP, SCORES, GRADS,
            )  # fmt: skip
        terms_ptr += to_next_head
    dk, dv = state
    # This half alone read its keys and values: their memory takes the gradients.
    k.store((dk * raw_scale(numbers, SOFTCAP)).to(DTYPE))
    v.store(dv.to(DTYPE))
    fence_async_shared()
    mbarrier.arrive(done.index(HALF), count=1)


@gluon.jit
def attention_backward_keys_kernel(
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc, terms_ptr, doc_start, doc_end,
    num_queries, num_keys, window, padded, num_tiles_of_head, num_all_heads, num_kv_heads, group, section, scale, softcap,
    ROWS: gl.constexpr, QUERIES: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr, SOFTCAP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q_desc.dtype
    keys = gl.allocate_shared_memory(DTYPE, [2, 1, 1, ROWS, HEAD_DIM], k_desc.layout)
    values = gl.allocate_shared_memory(DTYPE, [2, 1, 1, ROWS, HEAD_DIM], v_desc.layout)
    queries = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, QUERIES, HEAD_DIM], q_desc.layout)
    douts = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, QUERIES, HEAD_DIM], dout_desc.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    done = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for half in gl.static_range(2):
        mbarrier.init(kv_full.index(half), count=1)
        mbarrier.init(done.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both halves read every block
    fence_async_shared()

    descriptors = (q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc)
    buffers = (queries, keys, values, douts)
    barriers = (kv_full, full, empty, done)
    schedule = (num_tiles_of_head, num_all_heads, num_kv_heads, group, section)
    shape = (num_queries, num_keys, window)
    documents = (doc_start, doc_end)
    numbers = (scale, softcap)
    gl.warp_specialize(
        [
            (_feed_queries, (descriptors, buffers, barriers, schedule, shape, documents, QUERIES, STAGES, CAUSAL, WINDOW, DOCUMENTS)),
            (_compute_keys, (
                terms_ptr, padded, buffers, barriers, schedule, shape, documents, numbers,
                0, QUERIES, STAGES, CAUSAL, WINDOW, DOCUMENTS, SOFTCAP,
            )),
            (_compute_keys, (
                terms_ptr, padded, buffers, barriers, schedule, shape, documents, numbers,
                1, QUERIES, STAGES, CAUSAL, WINDOW, DOCUMENTS, SOFTCAP,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


# ---- queries ------------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _feed_keys(
    descriptors, buffers, barriers, schedule, shape, documents,
    KEYS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc, dout_desc = descriptors
    queries, keys, values, douts = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    num_tiles_of_head, num_all_heads, num_heads, group, section = schedule
    HALF_BYTES: gl.constexpr = queries.shape[3] * queries.shape[4] * 4  # queries and output gradients
    BYTES: gl.constexpr = keys.shape[3] * keys.shape[4] * 2
    ROWS: gl.constexpr = queries.shape[3]
    index, place = place_of(gl.program_id(0), num_tiles_of_head, num_all_heads, section)
    batch = place // num_heads
    head = place % num_heads
    for half in gl.static_range(2):
        mbarrier.expect(q_full.index(half), HALF_BYTES)
        tma.async_copy_global_to_shared(q_desc, [batch, head, (2 * index + half) * ROWS, 0], q_full.index(half), queries.index(half))
        tma.async_copy_global_to_shared(dout_desc, [batch, head, (2 * index + half) * ROWS, 0], q_full.index(half), douts.index(half))
    begin, end = key_blocks_of(index * (2 * ROWS), 2 * ROWS, shape, documents, KEYS, CAUSAL, WINDOW, DOCUMENTS)
    for block in range(begin, end):
        slot, phase = ring(block - begin, STAGES)
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
        mbarrier.expect(k_full.index(slot), BYTES)
        tma.async_copy_global_to_shared(k_desc, [batch, head // group, block * KEYS, 0], k_full.index(slot), keys.index(slot))
        mbarrier.wait(v_empty.index(slot), phase ^ 1)
        mbarrier.expect(v_full.index(slot), BYTES)
        tma.async_copy_global_to_shared(v_desc, [batch, head // group, block * KEYS, 0], v_full.index(slot), values.index(slot))


@gluon.jit
def _key_steps(
    start, stop, dq, q, dout, buffers, barriers, begin, lse, delta, first, last, numbers,
    KEYS: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, LOWER: gl.constexpr, SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr, GRADS: gl.constexpr,
):  # fmt: skip
    """Blocks start <= block < stop of keys."""
    queries, keys, values, douts = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    DTYPE: gl.constexpr = keys.dtype
    ROWS: gl.constexpr = q.shape[0]
    for block in range(start, stop):
        slot, phase = ring(block - begin, STAGES)
        k = matrix(keys.index(slot))
        scores = _start(lse[:, None], [ROWS, KEYS], SCORES, SOFTCAP)
        dp = _start(delta[:, None], [ROWS, KEYS], SCORES, False)
        mbarrier.wait(k_full.index(slot), phase)
        scores = warpgroup_mma(q, k.permute((1, 0)), scores, is_async=True)
        mbarrier.wait(v_full.index(slot), phase)
        dp = warpgroup_mma(dout, matrix(values.index(slot)).permute((1, 0)), dp, is_async=True)
        scores = warpgroup_mma_wait(1, (scores,))
        key = block * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
        p, inner = _probabilities(scores, lse[:, None], key, first, last, numbers, MASK, LOWER, True, SOFTCAP)
        mbarrier.wait(v_full.index(slot), phase)  # returns at once; keeps the wait below behind the exponentials, as in the forward pass
        dp, inner = warpgroup_mma_wait(0, (dp, inner))
        mbarrier.arrive(v_empty.index(slot), count=1)
        ds = inner * dp
        dq = warpgroup_mma(gl.convert_layout(ds.to(DTYPE), gl.DotOperandLayout(0, GRADS, 2)), k, dq, is_async=True)
        dq = warpgroup_mma_wait(0, (dq,))
        mbarrier.arrive(k_empty.index(slot), count=1)
    return dq


@gluon.jit
def _compute_queries(
    dq_desc, terms_ptr, padded, buffers, barriers, schedule, shape, documents, numbers,
    HALF: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    queries, keys, values, douts = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    num_tiles_of_head, num_all_heads, num_heads, group, section = schedule
    DTYPE: gl.constexpr = keys.dtype
    ROWS: gl.constexpr = queries.shape[3]
    HEAD_DIM: gl.constexpr = queries.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    LOWER: gl.constexpr = WINDOW or DOCUMENTS
    index, place = place_of(gl.program_id(0), num_tiles_of_head, num_all_heads, section)
    row = (2 * index + HALF) * ROWS
    begin, end = key_blocks_of(index * (2 * ROWS), 2 * ROWS, shape, documents, KEYS, CAUSAL, WINDOW, DOCUMENTS)
    cut = first_cut_key_block(row, begin, end, shape, documents, KEYS, CAUSAL, WINDOW, DOCUMENTS)
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    first, last = key_limits(rows, shape, documents, CAUSAL, WINDOW, DOCUMENTS)
    terms = terms_ptr + gl.cast(place, gl.int64) * (2 * padded) + (row + rows)  # two lines to each 64 rows
    lse = gl.load(terms)
    delta = gl.load(terms + LINE)

    q = matrix(queries.index(HALF))
    dout = matrix(douts.index(HALF))
    mbarrier.wait(q_full.index(HALF), 0)
    dq = gl.zeros([ROWS, HEAD_DIM], gl.float32, GRADS)
    if LOWER:
        dq = _key_steps(
            begin, end, dq, q, dout, buffers, barriers, begin, lse, delta, first, last, numbers,
            KEYS, STAGES, True, LOWER, SOFTCAP, SCORES, GRADS,
        )  # fmt: skip
    else:
        dq = _key_steps(
            begin, cut, dq, q, dout, buffers, barriers, begin, lse, delta, first, last, numbers,
            KEYS, STAGES, False, LOWER, SOFTCAP, SCORES, GRADS,
        )  # fmt: skip
        dq = _key_steps(
            cut, end, dq, q, dout, buffers, barriers, begin, lse, delta, first, last, numbers,
            KEYS, STAGES, True, LOWER, SOFTCAP, SCORES, GRADS,
        )  # fmt: skip
    q.store((dq * raw_scale(numbers, SOFTCAP)).to(DTYPE))  # this half alone read its queries
    fence_async_shared()
    tma.async_copy_shared_to_global(dq_desc, [place // num_heads, place % num_heads, row, 0], queries.index(HALF))
    tma.store_wait(0)


@gluon.jit
def attention_backward_queries_kernel(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, terms_ptr, doc_start, doc_end,
    num_queries, num_keys, window, padded, num_tiles_of_head, num_all_heads, num_heads, group, section, scale, softcap,
    ROWS: gl.constexpr, KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr, SOFTCAP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q_desc.dtype
    queries = gl.allocate_shared_memory(DTYPE, [2, 1, 1, ROWS, HEAD_DIM], q_desc.layout)
    douts = gl.allocate_shared_memory(DTYPE, [2, 1, 1, ROWS, HEAD_DIM], dout_desc.layout)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, KEYS, HEAD_DIM], k_desc.layout)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, KEYS, HEAD_DIM], v_desc.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for half in gl.static_range(2):
        mbarrier.init(q_full.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()

    descriptors = (q_desc, k_desc, v_desc, dout_desc)
    buffers = (queries, keys, values, douts)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    schedule = (num_tiles_of_head, num_all_heads, num_heads, group, section)
    shape = (num_queries, num_keys, window)
    documents = (doc_start, doc_end)
    numbers = (scale, softcap)
    gl.warp_specialize(
        [
            (_feed_keys, (descriptors, buffers, barriers, schedule, shape, documents, KEYS, STAGES, CAUSAL, WINDOW, DOCUMENTS)),
            (_compute_queries, (
                dq_desc, terms_ptr, padded, buffers, barriers, schedule, shape, documents, numbers,
                0, KEYS, STAGES, CAUSAL, WINDOW, DOCUMENTS, SOFTCAP,
            )),
            (_compute_queries, (
                dq_desc, terms_ptr, padded, buffers, barriers, schedule, shape, documents, numbers,
                1, KEYS, STAGES, CAUSAL, WINDOW, DOCUMENTS, SOFTCAP,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


# ---- host --------------------------------------------------------------------------------------------------------------------------


def can_serve(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, softcap: float, cu_seqlens: Tensor | None, gpu: GPU) -> tuple[bool, str]:
    """Whether `backward` can compute this call on `gpu`, and if not, why."""
    if q.shape[-1] not in HEAD_DIMS:
        return False, f"head size {q.shape[-1]} is not one of {HEAD_DIMS}"
    if softcap and not causal and q.shape[-1] == 128:
        return False, "a full kernel with a softcap for head size 128 has more values than registers"
    return attention_forward.can_serve(q, k, v, causal, window, softcap, cu_seqlens, gpu)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous; dout, dlse, out and lse contiguous, as the forward pass leaves them."""
    if scale <= 0 and not softcap:  # the log-sum-exp is divided by the scale
        turned, scale_of_turned = positive_scale(q, scale)
        dq, dk, dv = backward(dout, dlse, turned, k, v, out, lse, causal, scale_of_turned, window, softcap, cu_seqlens)
        return dq * math.copysign(1.0, scale) if scale else torch.zeros_like(dq), dk, dv
    if dout.data_ptr() % 16:  # a slice may be contiguous and yet not aligned for the copy engine
        dout = dout.clone()
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    gpu = gpu_of(q.device)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    group = num_heads // num_kv_heads
    tiles, key_tiles = triton.cdiv(num_queries, 2 * ROWS), triton.cdiv(num_keys, 2 * ROWS)
    padded = tiles * 2 * ROWS
    terms = torch.empty((batch * num_heads, padded, 2), dtype=torch.float32, device=q.device)
    numbers = score_numbers(scale, softcap)
    launch(
        attention_row_terms_kernel, (padded // 32 * batch * num_heads,),
        dout, out, lse, dlse, terms, 1.0 if softcap else 1.0 / scale, num_queries, num_heads, padded,
        num_warps=4, HAS_DLSE=dlse is not None, ROWS=32, HEAD_DIM=head_dim,
    )  # fmt: skip
    window = window if 0 < window < num_keys else 0
    documents = document_bounds(cu_seqlens, num_queries)
    flags = {"CAUSAL": causal, "WINDOW": window > 0, "DOCUMENTS": cu_seqlens is not None, "SOFTCAP": softcap != 0}
    queries = 32 if head_dim == 128 and (softcap or (cu_seqlens is not None and not causal)) else 64  # what fits in registers
    heads = batch * num_kv_heads
    section = min(heads_in_l2(2 * group * num_queries * head_dim * q.element_size(), 1, gpu), heads)
    launch(
        attention_backward_keys_kernel, (key_tiles * heads,),
        descriptor(q, queries), descriptor(k, ROWS), descriptor(v, ROWS), descriptor(dout, queries), descriptor(dk, ROWS), descriptor(dv, ROWS),
        terms, *documents,
        num_queries, num_keys, window, padded, key_tiles, heads, num_kv_heads, group, section, *numbers,
        num_warps=4, ROWS=ROWS, QUERIES=queries, HEAD_DIM=head_dim, STAGES=2, **flags, REGISTERS=240,
    )  # fmt: skip
    keys = 128 if head_dim == 64 and not softcap else 64
    section = min(heads_in_l2(2 * num_keys * head_dim * k.element_size(), group, gpu), batch * num_heads)
    launch(
        attention_backward_queries_kernel, (tiles * batch * num_heads,),
        descriptor(q, ROWS), descriptor(k, keys), descriptor(v, keys), descriptor(dout, ROWS), descriptor(dq, ROWS), terms, *documents,
        num_queries, num_keys, window, padded, tiles, batch * num_heads, num_heads, group, section, *numbers,
        num_warps=4, ROWS=ROWS, KEYS=keys, HEAD_DIM=head_dim, STAGES=3, **flags, REGISTERS=240,
    )  # fmt: skip
    return dq, dk, dv


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    """As `attention_forward.launches`, of the backward pass."""
    if gpu.is_hopper and dtype in HALVES:
        for name, (q, k, v, causal, scale, window, softcap, cu_seqlens) in cases(dtype, HEAD_DIMS):
            if can_serve(q, k, v, causal, window, softcap, cu_seqlens, gpu)[0]:
                lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
                yield f"attention backward {name}", partial(backward, q, lse, q, k, v, q, lse, causal, scale, window, softcap, cu_seqlens)
