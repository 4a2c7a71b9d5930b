"""Attention for Hopper in Gluon, the forward pass: one warpgroup feeds shared memory through the copy engine, two compute 64 query rows each.

The method is FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608): the softmax of one block of keys runs under the matrix products of the
next, and the two computing warpgroups take turns at the tensor cores. Blocks walk over tiles of query rows, the longest rows first.

B batch, T query tokens, S key tokens, H query heads, Hkv key-value heads, D head dim (64, 128 or 256). A tile is 128 query rows of one head, a
block is KEYS keys. Tests run the very bodies of these kernels on the CPU, under a model of the barriers and of the copy engine.
"""

# ruff: noqa: RUF059 - tuples are unpacked whole, for in Gluon `_` is a variable like any other and may not change its type

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)  # fmt: skip
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cllm.kernels.triton.launch import Calls, launch
from cllm.runtime.gpu import GPU, gpu_of

HEAD_DIMS = (64, 128, 256)
HALVES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
ROWS = 64  # of one warpgroup: what one wgmma computes
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)


# ---- formulas of the schedule: plain arithmetic on scalars or on columns ------------------------------------------------------------


@gluon.jit
def ring(use, STAGES: gl.constexpr):
    """Slot of the use-th tile that passes through STAGES slots, and the parity of the barrier's phase that this use completes."""
    return use % STAGES, (use // STAGES) & 1


@gluon.jit
def rounds_of(program, num_programs, num_tiles):
    """How many tiles one program computes."""
    full = num_tiles // num_programs
    rest = num_tiles % num_programs
    turn = program + (full & 1) * (num_programs - 1 - 2 * program)
    return full + (rest + num_programs - 1 - turn) // num_programs


@gluon.jit
def tile_of(turn, program, num_programs):
    """The turn-th tile of a program. Every other round runs backwards, so that who got the longest rows gets the shortest next."""
    return turn * num_programs + program + (turn & 1) * (num_programs - 1 - 2 * program)


@gluon.jit
def place_of(tile, num_tiles_of_head, num_heads, section):
    """A tile's index within its head, and its head (of all batches). `section` heads, whose keys and values fit in the L2 cache together,
    are computed side by side, from the last rows (the longest, where attention is causal) to the first."""
    part = tile // (section * num_tiles_of_head)
    inside = tile - part * section * num_tiles_of_head
    wide = gl.minimum(section, num_heads - part * section)
    return num_tiles_of_head - 1 - inside // wide, part * section + inside % wide


@gluon.jit
def key_limits(query, shape, documents, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr):
    """A query sees the keys first <= s < last; neither ever falls from one query to the next. Rows past the end see what the last one sees."""
    num_queries, num_keys, window = shape
    query = gl.minimum(query, num_queries - 1)
    position = query + (num_keys - num_queries)
    first = position * 0
    last = first + num_keys
    if CAUSAL:
        last = position + 1
    if WINDOW:
        first = gl.maximum(position - window + 1, 0)
    if DOCUMENTS:
        starts, ends = documents
        first = gl.maximum(first, gl.load(starts + query))
        if not CAUSAL:
            last = gl.load(ends + query)
    return first, last


@gluon.jit
def query_limits(key, shape, documents, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr):
    """A key is seen by the queries first <= t < last: `key_limits` from the other side."""
    num_queries, num_keys, window = shape
    key = gl.minimum(key, num_keys - 1)
    query = key - (num_keys - num_queries)
    first = query * 0
    last = first + num_queries
    if CAUSAL:
        first = gl.maximum(query, 0)
    if WINDOW:
        last = gl.minimum(query + window, num_queries)
    if DOCUMENTS:
        starts, ends = documents
        last = gl.minimum(last, gl.load(ends + key))
        if not CAUSAL:
            first = gl.load(starts + key)
    return first, last


@gluon.jit
def span(first, last, BLOCK: gl.constexpr):
    """Blocks begin <= j < end that cover the positions first <= s < last; at least one, which is then hidden throughout."""
    begin = first // BLOCK
    return begin, gl.maximum((last + BLOCK - 1) // BLOCK, begin + 1)


@gluon.jit
def key_blocks_of(row, ROWS: gl.constexpr, shape, documents, KEYS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr):
    """Blocks begin <= j < end of keys that any of ROWS queries sees."""
    first, of_first = key_limits(row, shape, documents, CAUSAL, WINDOW, DOCUMENTS)
    of_last, last = key_limits(row + (ROWS - 1), shape, documents, CAUSAL, WINDOW, DOCUMENTS)
    return span(first, last, KEYS)


@gluon.jit
def first_cut_key_block(
    row, begin, end, shape, documents, KEYS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr
):  # fmt: skip
    """Up to this block, every query from `row` on sees all keys; without a window or documents, which cut at the other end too."""
    first, last = key_limits(row, shape, documents, CAUSAL, WINDOW, DOCUMENTS)
    return gl.minimum(gl.maximum(last // KEYS, begin), end)


# ---- kernel ------------------------------------------------------------------------------------------------------------------------


@gluon.jit
def matrix(tile):
    """A tile as the copy engine holds it, (1, 1, rows, columns), as a matrix."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def unit_of(numbers, SOFTCAP: gl.constexpr):
    """What turns scores into powers of two: the scale and log2(e), or after a cap, which takes the scale in, log2(e) alone."""
    scale, limit = numbers
    if SOFTCAP:
        return LOG2_E
    else:
        return scale


@gluon.jit
def tanh_of(scores, numbers):
    """tanh(scale * s / c), by exponentials: tanh.approx is too coarse."""
    scale, limit = numbers
    return 1.0 - 2.0 / (1.0 + gl.exp2(scores * scale))


@gluon.jit
def opaque(positions):
    """The same positions. The compiler cannot see that they are sums of a row's number: it would keep every column less that number in a register."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [positions], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _feed(
    descriptors, buffers, barriers, schedule, shape, documents,
    KEYS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc = descriptors
    queries, keys, values, outs = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, take_turn = barriers
    num_tiles_of_head, num_all_heads, num_heads, group, section = schedule
    BYTES: gl.constexpr = queries.shape[3] * queries.shape[4] * 2
    BLOCK_BYTES: gl.constexpr = keys.shape[3] * keys.shape[4] * 2
    TILE: gl.constexpr = 2 * queries.shape[3]
    use = 0
    for turn in range(rounds_of(gl.program_id(0), gl.num_programs(0), num_tiles_of_head * num_all_heads)):
        index, place = place_of(tile_of(turn, gl.program_id(0), gl.num_programs(0)), num_tiles_of_head, num_all_heads, section)
        batch = place // num_heads
        head = place % num_heads
        begin, end = key_blocks_of(index * TILE, TILE, shape, documents, KEYS, CAUSAL, WINDOW, DOCUMENTS)
        # Consumers want the keys of block i before the values of block i - 1: k0 q k1 v0 k2 v1 ... v(n-1).
        for step in range(end - begin + 1):
            if step < end - begin:
                slot, phase = ring(use + step, STAGES)
                mbarrier.wait(k_empty.index(slot), phase ^ 1)
                mbarrier.expect(k_full.index(slot), BLOCK_BYTES)
                tma.async_copy_global_to_shared(k_desc, [batch, head // group, (end - 1 - step) * KEYS, 0], k_full.index(slot), keys.index(slot))
            if step == 0:
                for half in gl.static_range(2):
                    mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)
                    mbarrier.expect(q_full.index(half), BYTES)
                    tma.async_copy_global_to_shared(
                        q_desc, [batch, head, index * TILE + half * (TILE // 2), 0], q_full.index(half), queries.index(half)
                    )
            else:
                slot, phase = ring(use + step - 1, STAGES)
                mbarrier.wait(v_empty.index(slot), phase ^ 1)
                mbarrier.expect(v_full.index(slot), BLOCK_BYTES)
                tma.async_copy_global_to_shared(v_desc, [batch, head // group, (end - step) * KEYS, 0], v_full.index(slot), values.index(slot))
        use += end - begin


@gluon.jit
def _softmax(
    scores, largest, total, block, first, last, numbers,
    KEYS: gl.constexpr, LAYOUT: gl.constexpr, MASK: gl.constexpr, LOWER: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Probabilities of one block over the running maximum, the factor for what came before, and the new maximum and sum."""
    scale, limit = numbers
    unit = unit_of(numbers, SOFTCAP)
    if SOFTCAP:
        scores = limit * tanh_of(scores, numbers)
    if MASK:
        key = block * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
        scores = gl.where(key[None, :] < last[:, None], scores, float("-inf"))
        if LOWER:
            scores = gl.where(key[None, :] >= first[:, None], scores, float("-inf"))
    larger = gl.maximum(largest, gl.max(scores, 1))
    finite = gl.where(larger == float("-inf"), 0.0, larger)  # a row that saw only hidden keys adds nothing
    # The maximum is of the raw scores, so that scaling and subtracting are one multiply-add.
    p = gl.exp2(scores * unit - (finite * unit)[:, None])
    rescale = gl.exp2((largest - finite) * unit)
    return p, rescale, larger, total * rescale + gl.sum(p, 1)


@gluon.jit
def _steps(
    start, stop, state, q, buffers, barriers, use, turns, end, first, last, numbers,
    HALF: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, LOWER: gl.constexpr, SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Blocks start <= step < stop, counted from the last: scores of this one and output of the one before are computed side by side."""
    queries, keys, values, outs = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, take_turn = barriers
    DTYPE: gl.constexpr = keys.dtype
    ROWS: gl.constexpr = q.shape[0]
    acc, p, largest, total = state
    for step in range(start, stop):
        slot, phase = ring(use + step, STAGES)
        v_slot, v_phase = ring(use + step - 1, STAGES)
        mbarrier.wait(k_full.index(slot), phase)
        mbarrier.wait(take_turn.index(HALF), (turns + step - 1) & 1)
        zeros = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
        scores = warpgroup_mma(q, matrix(keys.index(slot)).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_slot), v_phase)
        acc = warpgroup_mma(p, matrix(values.index(v_slot)), acc, is_async=True)
        mbarrier.arrive(take_turn.index(1 - HALF), count=1)
        scores = warpgroup_mma_wait(1, (scores,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        block = end - 1 - step
        wide, rescale, largest, total = _softmax(scores, largest, total, block, first, last, numbers, KEYS, SCORES, MASK, LOWER, SOFTCAP)
        p = gl.convert_layout(wide.to(DTYPE), gl.DotOperandLayout(0, OUT, 2))
        # These values arrived long ago: the wait returns at once. It is there because ptxas moves the wait for the product up to where its basic
        # block begins, above the exponentials that are to run beside the product, and a loop over a barrier begins a new one.
        mbarrier.wait(v_full.index(v_slot), v_phase)
        done, p = warpgroup_mma_wait(0, (acc, p))
        mbarrier.arrive(v_empty.index(v_slot), count=1)
        acc = warpgroup_mma_init(done * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None])
    return acc, p, largest, total


@gluon.jit
def _compute(
    out_desc, lse_ptr, buffers, barriers, schedule, shape, documents, numbers,
    HALF: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr,
    SOFTCAP: gl.constexpr, OWN_OUT: gl.constexpr,
):  # fmt: skip
    queries, keys, values, outs = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, take_turn = barriers
    num_tiles_of_head, num_all_heads, num_heads, group, section = schedule
    num_queries, num_keys, window = shape
    DTYPE: gl.constexpr = keys.dtype
    ROWS: gl.constexpr = queries.shape[3]
    HEAD_DIM: gl.constexpr = queries.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(1, SCORES)
    LOWER: gl.constexpr = WINDOW or DOCUMENTS
    use = 0
    for turn in range(rounds_of(gl.program_id(0), gl.num_programs(0), num_tiles_of_head * num_all_heads)):
        index, place = place_of(tile_of(turn, gl.program_id(0), gl.num_programs(0)), num_tiles_of_head, num_all_heads, section)
        # Both halves walk over the blocks of the whole tile; each masks those that its own 64 rows do not see whole.
        begin, end = key_blocks_of(index * (2 * ROWS), 2 * ROWS, shape, documents, KEYS, CAUSAL, WINDOW, DOCUMENTS)
        row = index * (2 * ROWS) + HALF * ROWS
        cut = first_cut_key_block(row, begin, end, shape, documents, KEYS, CAUSAL, WINDOW, DOCUMENTS)
        rows = row + gl.arange(0, ROWS, layout=COLUMN)
        first, last = key_limits(rows, shape, documents, CAUSAL, WINDOW, DOCUMENTS)
        if WINDOW and not DOCUMENTS:
            first = opaque(first)
            last = opaque(last)

        q = matrix(queries.index(HALF))
        mbarrier.wait(q_full.index(HALF), turn & 1)
        slot, phase = ring(use, STAGES)
        mbarrier.wait(k_full.index(slot), phase)
        zeros = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
        scores = warpgroup_mma(q, matrix(keys.index(slot)).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, (scores,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        largest = gl.full([ROWS], float("-inf"), gl.float32, COLUMN)
        total = gl.zeros([ROWS], gl.float32, COLUMN)
        wide, rescale, largest, total = _softmax(scores, largest, total, end - 1, first, last, numbers, KEYS, SCORES, True, LOWER, SOFTCAP)
        p = gl.convert_layout(wide.to(DTYPE), gl.DotOperandLayout(0, OUT, 2))
        acc = warpgroup_mma_init(gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT))

        turns = use - turn  # every tile has one step fewer than blocks
        state = (acc, p, largest, total)
        steps = end - begin
        whole = gl.minimum(gl.maximum(end - cut, 1), steps)  # from this step on
        if LOWER:  # every block is masked: three loops would be more code and scalars than registers hold
            state = _steps(
                1, steps, state, q, buffers, barriers, use, turns, end, first, last, numbers,
                HALF, KEYS, STAGES, True, LOWER, SOFTCAP, SCORES, OUT,
            )  # fmt: skip
        else:
            if CAUSAL:
                state = _steps(
                    1, whole, state, q, buffers, barriers, use, turns, end, first, last, numbers,
                    HALF, KEYS, STAGES, True, LOWER, SOFTCAP, SCORES, OUT,
                )  # fmt: skip
            state = _steps(
                whole, steps, state, q, buffers, barriers, use, turns, end, first, last, numbers,
                HALF, KEYS, STAGES, False, LOWER, SOFTCAP, SCORES, OUT,
            )  # fmt: skip
        acc, p, largest, total = state

        if OWN_OUT:
            mbarrier.arrive(q_empty.index(HALF), count=1)  # the next tile's queries travel while this one ends
        use += steps
        slot, phase = ring(use - 1, STAGES)
        mbarrier.wait(v_full.index(slot), phase)
        acc = warpgroup_mma(p, matrix(values.index(slot)), acc, is_async=True)
        lse = gl.where(total == 0.0, float("-inf"), (largest * unit_of(numbers, SOFTCAP) + gl.log2(total)) * LN_2)
        # Two unsigned factors are one instruction; the sign of a signed one would be kept in a register from the start, which is one too many.
        row_of_head = gl.cast(gl.cast(place, gl.uint32), gl.uint64) * gl.cast(num_queries, gl.uint32)
        gl.store(lse_ptr + row_of_head + rows, lse, mask=rows < num_queries)
        inverse = 1.0 / gl.where(total == 0.0, 1.0, total)  # a row that sees nothing gets 0
        done = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(v_empty.index(slot), count=1)
        out = done * gl.convert_layout(inverse, gl.SliceLayout(1, OUT))[:, None]
        if OWN_OUT:
            tma.store_wait(0)  # the tile before has left the buffer
        matrix(outs.index(HALF)).store(out.to(DTYPE))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [place // num_heads, place % num_heads, row, 0], outs.index(HALF))
        if not OWN_OUT:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(HALF), count=1)
    tma.store_wait(0)


@gluon.jit
def attention_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, doc_start, doc_end,
    num_queries, num_keys, window, num_tiles_of_head, num_all_heads, num_heads, group, section, scale, softcap,
    ROWS: gl.constexpr, KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, DOCUMENTS: gl.constexpr, SOFTCAP: gl.constexpr, OWN_OUT: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q_desc.dtype
    queries = gl.allocate_shared_memory(DTYPE, [2, 1, 1, ROWS, HEAD_DIM], q_desc.layout)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, KEYS, HEAD_DIM], k_desc.layout)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, KEYS, HEAD_DIM], v_desc.layout)
    if OWN_OUT:
        outs = gl.allocate_shared_memory(DTYPE, [2, 1, 1, ROWS, HEAD_DIM], out_desc.layout)
    else:
        outs = queries
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    take_turn = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for half in gl.static_range(2):
        mbarrier.init(q_full.index(half), count=1)
        mbarrier.init(q_empty.index(half), count=1)
        mbarrier.init(take_turn.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)  # both halves read every block
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    mbarrier.arrive(take_turn.index(0), count=1)

    descriptors = (q_desc, k_desc, v_desc)
    buffers = (queries, keys, values, outs)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, take_turn)
    schedule = (num_tiles_of_head, num_all_heads, num_heads, group, section)
    shape = (num_queries, num_keys, window)
    documents = (doc_start, doc_end)
    numbers = (scale, softcap)
    gl.warp_specialize(
        [
            (_feed, (descriptors, buffers, barriers, schedule, shape, documents, KEYS, STAGES, CAUSAL, WINDOW, DOCUMENTS)),
            (_compute, (
                out_desc, lse_ptr, buffers, barriers, schedule, shape, documents, numbers,
                0, KEYS, STAGES, CAUSAL, WINDOW, DOCUMENTS, SOFTCAP, OWN_OUT,
            )),
            (_compute, (
                out_desc, lse_ptr, buffers, barriers, schedule, shape, documents, numbers,
                1, KEYS, STAGES, CAUSAL, WINDOW, DOCUMENTS, SOFTCAP, OWN_OUT,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


# ---- host --------------------------------------------------------------------------------------------------------------------------


def can_serve(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, softcap: float, cu_seqlens: Tensor | None, gpu: GPU) -> tuple[bool, str]:
    """Whether `forward` can compute this call on `gpu`, and if not, why."""
    if not gpu.is_hopper:
        return False, "these kernels need a Hopper GPU"
    if q.dtype not in HALVES:
        return False, f"these kernels compute bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in HEAD_DIMS:
        return False, f"head size {q.shape[-1]} is not one of {HEAD_DIMS}"
    if softcap and causal and q.shape[-1] == 256:
        return False, "a causal kernel with a softcap for head size 256 has more values than registers"
    if 0 in q.shape or 0 in k.shape:
        return False, "nothing to compute"
    if cu_seqlens is not None and (q.shape[0] != 1 or q.shape[1] != k.shape[1]):
        return False, "packed documents need B = 1 and as many queries as keys"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _copyable(x):
            return False, f"the copy engine reads 16-byte aligned rows; {name} has strides {x.stride()}"
    return True, "one warpgroup copies, two compute"


def _copyable(x: Tensor) -> bool:
    return (
        x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and all(size == 1 or (stride > 0 and stride * x.element_size() % 16 == 0) for size, stride in zip(x.shape[:3], x.stride()))
        and all(size < 2**31 and stride * x.element_size() < 2**40 for size, stride in zip(x.shape, x.stride()))
    )


@lru_cache
def _layout(rows: int, head_dim: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, head_dim], HALVES[dtype])


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """x (B, T, H, D) for the copy engine: tiles of `rows` tokens of one head at [b, h, t, 0]. Rows past T read as 0 and are not written."""
    batch, tokens, heads, head_dim = x.shape
    # The stride of a dimension of size 1 may be anything, and is never used.
    strides = [head_dim if x.shape[i] == 1 else x.stride(i) for i in (0, 2, 1)]
    return TensorDescriptor(x, [batch, heads, tokens, head_dim], [*strides, 1], [1, 1, rows, head_dim], _layout(rows, head_dim, x.dtype))


def document_bounds(cu_seqlens: Tensor | None, num_tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """Of every token, where its document starts and ends: int32 (T,) each. Tokens past the last bound are one document more."""
    if cu_seqlens is None:
        return None, None
    ends = torch.cat((cu_seqlens[1:], cu_seqlens.new_full((1,), num_tokens)))
    starts = torch.cat((cu_seqlens.new_zeros(1), cu_seqlens[1:]))
    document = torch.searchsorted(cu_seqlens[1:], torch.arange(num_tokens, device=cu_seqlens.device, dtype=torch.int32), right=True)
    return starts[document].int(), ends[document].int()


def score_numbers(scale: float, softcap: float) -> tuple[float, float]:
    """What kernels multiply scores with, into powers of two or, for tanh(x) = 1 - 2 / (1 + exp(2 x)), into those of twice x; and the cap."""
    return (2.0 * LOG2_E.value * scale / softcap if softcap else LOG2_E.value * scale), softcap


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a scale > 0 that give the same scores."""
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def heads_in_l2(head_bytes: int, group: int, gpu: GPU) -> int:
    """Query heads computed side by side: as many as have their keys and values in half of the L2 cache together."""
    return group * max(1, gpu.l2_bytes // 2 // head_bytes)


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, D), contiguous, and log-sum-exp of the scaled scores (B, H, T) in float32; a query that sees nothing gets 0 and -inf."""
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    gpu = gpu_of(q.device)
    if scale <= 0 and not softcap:  # the maximum is taken of unscaled scores
        q, scale = positive_scale(q, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, num_heads, num_queries), dtype=torch.float32, device=q.device)
    keys = 64 if head_dim == 256 else 128
    window = window if 0 < window < num_keys else 0
    tiles = triton.cdiv(num_queries, 2 * ROWS)
    group = num_heads // num_kv_heads
    section = min(heads_in_l2(2 * num_keys * head_dim * k.element_size(), group, gpu), batch * num_heads)
    registers = 240 if head_dim == 256 else 232  # of a computing thread; what is left are 24 or 40 for each that copies
    launch(
        attention_forward_kernel, (gpu.persistent_blocks(tiles * batch * num_heads),),
        descriptor(q, ROWS), descriptor(k, keys), descriptor(v, keys), descriptor(out, ROWS), lse, *document_bounds(cu_seqlens, num_queries),
        num_queries, num_keys, window, tiles, batch * num_heads, num_heads, group, section, *score_numbers(scale, softcap),
        num_warps=4, ROWS=ROWS, KEYS=keys, HEAD_DIM=head_dim, STAGES=4 if head_dim == 64 else 2,
        CAUSAL=causal, WINDOW=window > 0, DOCUMENTS=cu_seqlens is not None, SOFTCAP=softcap != 0, OWN_OUT=head_dim < 256, REGISTERS=registers,
    )  # fmt: skip
    return out, lse


def cases(dtype: torch.dtype, head_dims: tuple[int, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """One call of every kind that makes a kernel of its own, as (name, (q, k, v, causal, scale, window, softcap, cu_seqlens))."""
    bounds = torch.empty(5, dtype=torch.int32, device="meta")
    kinds = [*product((False, True), (0, 512), (0.0,), (None, bounds)), (True, 0, 30.0, None), (True, 512, 30.0, None), (False, 0, 30.0, None)]
    for head_dim, (causal, window, softcap, cu_seqlens) in product(head_dims, kinds):
        q = torch.empty((1, 4096, 16, head_dim), dtype=dtype, device="meta")
        k = torch.empty((1, 4096, 4, head_dim), dtype=dtype, device="meta")
        name = f"D={head_dim}{' causal' * causal}{' window' * bool(window)}{' softcap' * bool(softcap)}{' packed' * (cu_seqlens is not None)}"
        yield name, (q, k, k, causal, head_dim**-0.5, window, softcap, cu_seqlens)
    q = torch.empty((1, 1, 1, 128), dtype=dtype, device="meta")
    yield "one token", (q, q, q, True, 1.0, 0, 0.0, None)


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    if gpu.is_hopper and dtype in HALVES:
        for name, (q, k, v, causal, scale, window, softcap, cu_seqlens) in cases(dtype, HEAD_DIMS):
            if can_serve(q, k, v, causal, window, softcap, cu_seqlens, gpu)[0]:
                yield f"attention {name}", partial(forward, q, k, v, causal, scale, window, softcap, cu_seqlens)
