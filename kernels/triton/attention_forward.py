"""Attention forward (Dao 2023, arXiv 2307.08691): a block of queries walks over the keys it sees, with a running maximum and sum.

B batch, T query tokens, S key tokens, H query heads, G query heads to each key-value head, D head dim (padded to a power of two in registers).
What query t sees is one interval lo[t] <= s < hi[t], from the causal mask, the window and the bounds of its document. Without a lower bound the
blocks of keys that all queries of a block see whole come first, and need no mask; with one there is a single loop, with a mask.
"""

import triton
import triton.language as tl

from cllm.kernels.triton.dropout import kept_elements, kept_tile

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def block_and_pair(num_blocks):
    """The block of this program, and its pair of batch and head: all blocks of one pair come before those of the next.

    Both are counted along the first dimension of the grid, because no other may be longer than 65,535.
    """
    return tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)


@triton.jit
def key_limits(t, num_queries, num_keys, window, first_ptr, end_ptr, CAUSAL: tl.constexpr, LOWER: tl.constexpr):
    """lo, hi of queries t; a row past the end sees nothing: lo = num_keys, hi = 0. window 0: none."""
    inside = t < num_queries
    position = t + (num_keys - num_queries)
    lo = tl.zeros_like(t)
    hi = tl.zeros_like(t) + num_keys
    if CAUSAL:
        hi = tl.minimum(hi, position + 1)
    if LOWER:
        if window > 0:
            lo = tl.maximum(lo, position - window + 1)
        if first_ptr is not None:
            lo = tl.maximum(lo, tl.load(first_ptr + t, mask=inside, other=0))
            hi = tl.minimum(hi, tl.load(end_ptr + t, mask=inside, other=0))
    return tl.where(inside, lo, num_keys), tl.where(inside, hi, 0)


@triton.jit
def key_blocks(lo, hi, inside, num_keys, BLOCK_N: tl.constexpr):
    """begin, full_end, end: keys that any query sees, and where the blocks end that all see whole, should all see the first."""
    full_end = tl.min(tl.where(inside, hi, num_keys), 0) // BLOCK_N * BLOCK_N
    return tl.min(lo, 0) // BLOCK_N * BLOCK_N, full_end, tl.max(hi, 0)


@triton.jit
def scores_of(q, k_t, factor, softcap, FLIP: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores, still to be multiplied with `factor`: raw products, negated where the scale is negative, or capped ones."""
    s = tl.dot(q, k_t, input_precision=PRECISION)
    if FLIP:
        s = -s
    if SOFTCAP:
        s = tanh(s * factor / softcap) * softcap
    return s


@triton.jit
def row_offsets(t, inside, first_ptr, period):
    """Where the row begins that the document of each query was cut from: its keys are counted from there as elements of dropout."""
    offset = tl.zeros_like(t)
    if first_ptr is not None:
        offset = tl.load(first_ptr + t, mask=inside, other=0) // period * period
    return offset


@triton.jit
def kept_pairs(key_ptr, dropped, place, token, offset, first, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr):
    """(M, BLOCK_N): which of the pairs of queries and the keys from `first` on dropout keeps. ALIGNED: offsets are multiples of 128."""
    if ALIGNED:
        keep = kept_tile(key_ptr, place, dropped, token, first - offset, BLOCK_N)
    else:
        keep = kept_elements(key_ptr, place, dropped, token[:, None], first + tl.arange(0, BLOCK_N)[None, :] - offset[:, None])
    return keep


@triton.jit
def numbers_of(rows, scales, seen, dtype: tl.constexpr):
    """Rows of int8 and the addresses of their scales -> what they stand for, as `dequantize_rows` of kernels/quantization.py."""
    return (rows.to(tl.float32) * tl.load(scales, mask=seen, other=0.0)[:, None]).to(dtype)


@triton.jit
def forward_steps(
    acc, largest, total, q, k_ptr, v_ptr, k_stride, v_stride, lo, hi, start, stop, num_keys, factor, softcap, d, head_dim, MASK: tl.constexpr,
    FLIP: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr = False, key_ptr=None, dropped=0, place=0, token=None, offset=None, ALIGNED: tl.constexpr = True, k_scales=None,
    v_scales=None, scale_stride=0,
):  # fmt: skip
    """Keys start <= s < stop, a block at a time. Exponentials are of base 2: exp(x) = exp2(x log2 e), which one multiply-add prepares.

    EXACT: a block of which a query sees nothing leaves no trace in its row. Elsewhere the multiply-add, which rounds once, need not give 0 for the
    maximum that stayed what it was, because the shift was rounded before.

    k_scales, v_scales: of the rows of keys and values in int8, scale_stride from key to key; only with MASK.
    """
    in_base_2 = LOG2_E if SOFTCAP else factor * LOG2_E
    for first in range(start, stop, BLOCK_N):
        s = first + tl.arange(0, BLOCK_N)
        row = s.to(tl.int64)
        if MASK:
            seen = (s < num_keys)[:, None] & ((d < head_dim)[None, :] if PADDED else True)
            k = tl.load(k_ptr + row[:, None] * k_stride + d[None, :], mask=seen, other=0.0)
        elif PADDED:
            k = tl.load(k_ptr + row[:, None] * k_stride + d[None, :], mask=(d < head_dim)[None, :], other=0.0)
        else:
            k = tl.load(k_ptr + row[:, None] * k_stride + d[None, :])
        if k_scales is not None:
            k = numbers_of(k, k_scales + row * scale_stride, s < num_keys, q.dtype)
        scores = scores_of(q, tl.trans(k), factor, softcap, FLIP, SOFTCAP, PRECISION)
        if MASK:
            scores = tl.where((s[None, :] >= lo[:, None]) & (s[None, :] < hi[:, None]), scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger) * in_base_2  # a query that has seen nothing yet
        p = tl.exp2(scores * in_base_2 - shift[:, None])
        rescale = tl.exp2(largest * in_base_2 - shift)
        if EXACT:
            rescale = tl.where(larger == largest, 1.0, rescale)
        total = total * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        largest = larger
        if key_ptr is not None:
            p = tl.where(kept_pairs(key_ptr, dropped, place, token, offset, first, ALIGNED, BLOCK_N), p, 0.0)
        if MASK:
            v = tl.load(v_ptr + row[:, None] * v_stride + d[None, :], mask=seen, other=0.0)
        elif PADDED:
            v = tl.load(v_ptr + row[:, None] * v_stride + d[None, :], mask=(d < head_dim)[None, :], other=0.0)
        else:
            v = tl.load(v_ptr + row[:, None] * v_stride + d[None, :])
        if v_scales is not None:
            v = numbers_of(v, v_scales + row * scale_stride, s < num_keys, q.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, largest, total


@triton.jit(do_not_specialize=["dropped", "place", "period"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, first_ptr, end_ptr, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    num_queries, num_keys, num_heads, group, window, factor, softcap, head_dim, key_ptr, dropped, place, kept, period, CAUSAL: tl.constexpr,
    LOWER: tl.constexpr, FLIP: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """key_ptr: the key of dropout, or None; `dropped` and what follows belongs to it."""
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    block, pair = block_and_pair(num_blocks)
    block = num_blocks - 1 - block  # under a causal mask the last queries see most keys: they begin first
    batch = (pair // num_heads).to(tl.int64)
    head = (pair % num_heads).to(tl.int64)
    t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = t < num_queries
    row = t.to(tl.int64)
    here = inside[:, None] & ((d < head_dim)[None, :] if PADDED else True)
    q = tl.load(q_ptr + batch * q_batch + head * q_head + row[:, None] * q_token + d[None, :], mask=here, other=0.0)
    k_ptr += batch * k_batch + head // group * k_head
    v_ptr += batch * v_batch + head // group * v_head
    lo, hi = key_limits(t, num_queries, num_keys, window, first_ptr, end_ptr, CAUSAL, LOWER)
    begin, full_end, end = key_blocks(lo, hi, inside, num_keys, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    token = row
    offset = t
    if key_ptr is not None:
        token = batch * num_queries + row
        offset = row_offsets(t, inside, first_ptr, period)
        place += head.to(tl.int32)
    if not LOWER:
        acc, largest, total = forward_steps(
            acc, largest, total, q, k_ptr, v_ptr, k_token, v_token, lo, hi, 0, full_end, num_keys, factor, softcap, d, head_dim, False,
            FLIP, SOFTCAP, BLOCK_N, BLOCK_D, PADDED, PRECISION, False, key_ptr, dropped, place, token, offset, ALIGNED,
        )  # fmt: skip
        begin = full_end
    acc, largest, total = forward_steps(
        acc, largest, total, q, k_ptr, v_ptr, k_token, v_token, lo, hi, begin, end, num_keys, factor, softcap, d, head_dim, True,
        FLIP, SOFTCAP, BLOCK_N, BLOCK_D, PADDED, PRECISION, False, key_ptr, dropped, place, token, offset, ALIGNED,
    )  # fmt: skip
    if key_ptr is not None:
        acc = acc * kept
    in_base_2 = LOG2_E if SOFTCAP else factor * LOG2_E
    nothing = total == 0.0
    out = acc / tl.where(nothing, 1.0, total)[:, None]
    lse = tl.where(nothing, float("-inf"), (largest * in_base_2 + tl.log2(tl.where(nothing, 1.0, total))) * LN_2)
    at = (batch * num_queries + row) * num_heads + head
    tl.store(out_ptr + at[:, None] * head_dim + d[None, :], out, mask=here)
    tl.store(lse_ptr + (batch * num_heads + head) * num_queries + row, lse, mask=inside)
