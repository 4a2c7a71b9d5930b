"""Attention backward, the same bits every time: one kernel makes dK and dV by walking over the queries, another dQ by walking over the keys.

The probabilities are made again from the log-sum-exp, in both (seven products instead of five, and no sum that depends on the order in which
blocks end). The first computes scores transposed, keys by queries: dV and dK then take them as left operands, from registers. All query heads
that share a key head are added up inside its block.
"""

import triton
import triton.language as tl

from cllm.kernels.triton.attention_forward import LOG2_E, block_and_pair, kept_pairs, key_blocks, key_limits, row_offsets, scores_of


@triton.jit
def attention_delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, num_queries, num_heads, head_dim, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """delta (B, H, T) = sum over D of out * dout, less the gradient of the log-sum-exp. out and dout (B, T, H, D) contiguous."""
    block, pair = block_and_pair(tl.cdiv(num_queries, ROWS))
    batch = (pair // num_heads).to(tl.int64)
    head = (pair % num_heads).to(tl.int64)
    t = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = t < num_queries
    at = ((batch * num_queries + t) * num_heads + head)[:, None] * head_dim + d[None, :]
    here = inside[:, None] & (d < head_dim)[None, :]
    product = tl.load(out_ptr + at, mask=here, other=0.0).to(tl.float32) * tl.load(dout_ptr + at, mask=here, other=0.0).to(tl.float32)
    delta = tl.sum(product, 1)
    place = (batch * num_heads + head) * num_queries + t
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + place, mask=inside, other=0.0)
    tl.store(delta_ptr + place, delta, mask=inside)


@triton.jit
def probabilities_and_slope(s, lse_2, factor, softcap, SOFTCAP: tl.constexpr):
    """exp(score - lse), and what a gradient of the score is multiplied with on its way through the cap."""
    if SOFTCAP:
        share = s / softcap
        return tl.exp2(s * LOG2_E - lse_2), 1.0 - share * share
    return tl.exp2(s * (factor * LOG2_E) - lse_2), s


@triton.jit
def query_limits(s, num_queries, num_keys, window, first_ptr, end_ptr, CAUSAL: tl.constexpr, LOWER: tl.constexpr):
    """The queries lo <= t < hi that see keys s: `key_limits` from the other side. Compared by rows of keys, they take two registers of a thread;
    limits of every query of a block would take two for each of its columns."""
    position = s - (num_keys - num_queries)
    lo = tl.zeros_like(s)
    hi = tl.zeros_like(s) + num_queries
    if CAUSAL:
        lo = tl.maximum(lo, position)
    if LOWER:
        if window > 0:
            hi = tl.minimum(hi, position + window)
        if first_ptr is not None:  # as many queries as keys
            inside = s < num_keys
            lo = tl.maximum(lo, tl.load(first_ptr + s, mask=inside, other=0))
            hi = tl.minimum(hi, tl.load(end_ptr + s, mask=inside, other=0))
    return lo, hi


@triton.jit
def query_steps(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_stride, dout_stride, lo, hi, start, stop, num_queries, factor, softcap, d, own, head_dim,
    key_ptr, dropped, place, kept, period, first_ptr, first_token, first_key, MASK: tl.constexpr, UPPER: tl.constexpr, FLIP: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Queries start <= t < stop, a block at a time. With MASK a key is seen by the queries lo <= t, and with UPPER by those of them with t < hi
    alone. `own`: the columns of dk and dv, where they are not all."""
    m = tl.arange(0, BLOCK_M)
    q_tile = m[:, None] * q_stride + d[None, :]  # 32 bits within a tile; 64 only for where it begins
    dout_tile = m[:, None] * dout_stride + d[None, :]
    q_ptr += tl.cast(start, tl.int64) * q_stride  # pointers walk along: an offset in 64 bits would make every comparison of positions as wide
    dout_ptr += tl.cast(start, tl.int64) * dout_stride
    for first in range(start, stop, BLOCK_M):
        t = first + m
        inside = t < num_queries
        here = inside[:, None] & ((d < head_dim)[None, :] if PADDED else True)
        q = tl.load(q_ptr + q_tile, mask=here, other=0.0)
        scores = scores_of(k, tl.trans(q), factor, softcap, FLIP, SOFTCAP, PRECISION)
        lse = tl.load(lse_ptr + t, mask=inside, other=0.0) * LOG2_E
        p, slope = probabilities_and_slope(scores, lse[None, :], factor, softcap, SOFTCAP)
        if MASK:
            seen = t[None, :] >= lo[:, None]
            if UPPER:
                seen = seen & (t[None, :] < hi[:, None])
            p = tl.where(seen, p, 0.0)
        dout = tl.load(dout_ptr + dout_tile, mask=here, other=0.0)
        q_own, dout_own = q, dout
        if SPLIT > 1:
            here = inside[:, None] & ((own < head_dim)[None, :] if PADDED else True)
            q_own = tl.load(q_ptr + (m[:, None] * q_stride + own[None, :]), mask=here, other=0.0)
            dout_own = tl.load(dout_ptr + (m[:, None] * dout_stride + own[None, :]), mask=here, other=0.0)
        p_kept = p
        if key_ptr is not None:
            offset = row_offsets(t, inside, first_ptr, period)
            keep = tl.trans(kept_pairs(key_ptr, dropped, place, first_token + t, offset, first_key, ALIGNED, BLOCK_N))
            p_kept = tl.where(keep, p, 0.0)  # dv is scaled at its end
        dv = tl.dot(p_kept.to(dout.dtype), dout_own, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        if key_ptr is not None:
            dp = tl.where(keep, dp * kept, 0.0)
        ds = p * (dp - tl.load(delta_ptr + t, mask=inside, other=0.0)[None, :])
        if SOFTCAP:
            ds = ds * slope
            if MASK:  # a score without a bound, at a place that is not seen
                ds = tl.where(seen, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q_own, dk, input_precision=PRECISION)
        q_ptr += tl.cast(q_stride, tl.int64) * BLOCK_M
        dout_ptr += tl.cast(dout_stride, tl.int64) * BLOCK_M
    return dk, dv


@triton.jit(do_not_specialize=["dropped", "place", "period"])
def attention_keys_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, first_ptr, end_ptr, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head, num_queries, num_keys, num_kv_heads, group, window, factor, softcap, scale, head_dim, key_ptr, dropped, place, kept,
    period, CAUSAL: tl.constexpr, LOWER: tl.constexpr, FLIP: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """With SPLIT 2 a block makes half of the columns of dK and dV, from scores over all of them: accumulators that fit beside wgmma's tiles."""
    block, pair = block_and_pair(tl.cdiv(num_keys, BLOCK_N))
    batch = (pair // num_kv_heads).to(tl.int64)
    kv_head = (pair % num_kv_heads).to(tl.int64)
    low = block * BLOCK_N
    last = tl.minimum(low + BLOCK_N, num_keys) - 1
    s = low + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    own = d
    if SPLIT > 1:
        own = tl.program_id(1) * (BLOCK_D // SPLIT) + tl.arange(0, BLOCK_D // SPLIT)
    here = (s < num_keys)[:, None] & ((d < head_dim)[None, :] if PADDED else True)
    n = tl.arange(0, BLOCK_N)[:, None]
    low_64 = low.to(tl.int64)
    k = tl.load(k_ptr + batch * k_batch + kv_head * k_head + low_64 * k_token + (n * k_token + d[None, :]), mask=here, other=0.0)
    v = tl.load(v_ptr + batch * v_batch + kv_head * v_head + low_64 * v_token + (n * v_token + d[None, :]), mask=here, other=0.0)
    # Queries begin <= t < end see any of these keys; under a causal mask alone, those from full_begin on see all of them, and a second loop without
    # a mask computes them, unless the head is so wide, or a cap takes so much, that two loops are more than registers hold. Rows past the end need no
    # mask: a query of zeros with a gradient of zeros adds nothing, and keys past the end are not stored.
    MASK: tl.constexpr = CAUSAL or LOWER or SPLIT > 1
    ONE_LOOP: tl.constexpr = LOWER or SPLIT > 1 or (CAUSAL and (SOFTCAP or BLOCK_D > 64))
    behind = num_keys - num_queries
    begin = low * 0
    end = begin + num_queries
    full_begin = begin
    if CAUSAL:
        begin = tl.maximum(begin, low - behind)
        full_begin = (tl.maximum(low + BLOCK_N - 1 - behind, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if LOWER:
        if window > 0:
            end = tl.minimum(end, last + window - behind)
        if first_ptr is not None:  # as many queries as keys
            begin = tl.maximum(begin, tl.load(first_ptr + low))
            end = tl.minimum(end, tl.load(end_ptr + last))
    if ONE_LOOP:
        full_begin = end
    begin = begin // BLOCK_M * BLOCK_M
    full_begin = tl.minimum(full_begin, end)
    lo, hi = query_limits(s, num_queries, num_keys, window, first_ptr, end_ptr, CAUSAL, LOWER)
    dk = tl.zeros([BLOCK_N, BLOCK_D // SPLIT], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D // SPLIT], tl.float32)
    num_heads = num_kv_heads * group
    for member in range(group):
        head = kv_head * group + member
        q_here = q_ptr + batch * q_batch + head * q_head
        dout_here = dout_ptr + (batch * num_queries * num_heads + head) * head_dim
        rows = (batch * num_heads + head) * num_queries
        dout_stride = num_heads * head_dim
        if MASK:
            dk, dv = query_steps(
                dk, dv, k, v, q_here, dout_here, lse_ptr + rows, delta_ptr + rows, q_token, dout_stride, lo, hi, begin, full_begin,
                num_queries, factor, softcap, d, own, head_dim, key_ptr, dropped, place + head.to(tl.int32), kept, period, first_ptr,
                batch * num_queries, low, True, LOWER, FLIP, SOFTCAP, BLOCK_M, BLOCK_N, SPLIT, PADDED, PRECISION, ALIGNED,
            )  # fmt: skip
        if not ONE_LOOP:
            dk, dv = query_steps(
                dk, dv, k, v, q_here, dout_here, lse_ptr + rows, delta_ptr + rows, q_token, dout_stride, lo, hi, full_begin, end,
                num_queries, factor, softcap, d, own, head_dim, key_ptr, dropped, place + head.to(tl.int32), kept, period, first_ptr,
                batch * num_queries, low, False, False, FLIP, SOFTCAP, BLOCK_M, BLOCK_N, SPLIT, PADDED, PRECISION, ALIGNED,
            )  # fmt: skip
    if key_ptr is not None:
        dv = dv * kept
    at = ((batch * num_keys + low_64) * num_kv_heads + kv_head) * head_dim
    tile = n * (num_kv_heads * head_dim) + own[None, :]
    if SPLIT > 1:
        here = (s < num_keys)[:, None] & ((own < head_dim)[None, :] if PADDED else True)
    tl.store(dk_ptr + at + tile, dk * scale, mask=here)
    tl.store(dv_ptr + at + tile, dv, mask=here)


@triton.jit
def key_steps(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, lo, hi, start, stop, num_keys, factor, softcap, d, own, head_dim, key_ptr, dropped,
    place, kept, token, offset, MASK: tl.constexpr, FLIP: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, BLOCK_N):
        s = first + tl.arange(0, BLOCK_N)
        row = s.to(tl.int64)
        here = (s < num_keys)[:, None] & ((d < head_dim)[None, :] if PADDED else True)
        k = tl.load(k_ptr + row[:, None] * k_stride + d[None, :], mask=here, other=0.0)
        scores = scores_of(q, tl.trans(k), factor, softcap, FLIP, SOFTCAP, PRECISION)
        p, slope = probabilities_and_slope(scores, lse[:, None], factor, softcap, SOFTCAP)
        v = tl.load(v_ptr + row[:, None] * v_stride + d[None, :], mask=here, other=0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if key_ptr is not None:
            dp = tl.where(kept_pairs(key_ptr, dropped, place, token, offset, first, ALIGNED, BLOCK_N), dp * kept, 0.0)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * slope
        if MASK:
            ds = tl.where((s[None, :] >= lo[:, None]) & (s[None, :] < hi[:, None]), ds, 0.0)
        k_own = k
        if SPLIT > 1:
            here = (s < num_keys)[:, None] & ((own < head_dim)[None, :] if PADDED else True)
            k_own = tl.load(k_ptr + row[:, None] * k_stride + own[None, :], mask=here, other=0.0)
        dq = tl.dot(ds.to(k.dtype), k_own, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["dropped", "place", "period"])
def attention_queries_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, first_ptr, end_ptr, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch,
    v_token, v_head, num_queries, num_keys, num_heads, group, window, factor, softcap, scale, head_dim, key_ptr, dropped, place, kept, period,
    CAUSAL: tl.constexpr, LOWER: tl.constexpr, FLIP: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    block, pair = block_and_pair(num_blocks)
    block = num_blocks - 1 - block
    batch = (pair // num_heads).to(tl.int64)
    head = (pair % num_heads).to(tl.int64)
    t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    own = d
    if SPLIT > 1:
        own = tl.program_id(1) * (BLOCK_D // SPLIT) + tl.arange(0, BLOCK_D // SPLIT)
    inside = t < num_queries
    row = t.to(tl.int64)
    here = inside[:, None] & ((d < head_dim)[None, :] if PADDED else True)
    at = ((batch * num_queries + row) * num_heads + head)[:, None] * head_dim + d[None, :]
    q = tl.load(q_ptr + batch * q_batch + head * q_head + row[:, None] * q_token + d[None, :], mask=here, other=0.0)
    dout = tl.load(dout_ptr + at, mask=here, other=0.0)
    rows = (batch * num_heads + head) * num_queries + row
    lse = tl.load(lse_ptr + rows, mask=inside, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)
    k_ptr += batch * k_batch + head // group * k_head
    v_ptr += batch * v_batch + head // group * v_head
    lo, hi = key_limits(t, num_queries, num_keys, window, first_ptr, end_ptr, CAUSAL, LOWER)
    begin, full_end, end = key_blocks(lo, hi, inside, num_keys, BLOCK_N)
    dq = tl.zeros([BLOCK_M, BLOCK_D // SPLIT], tl.float32)
    token = row
    offset = t
    if key_ptr is not None:
        token = batch * num_queries + row
        offset = row_offsets(t, inside, first_ptr, period)
        place += head.to(tl.int32)
    if not LOWER:
        dq = key_steps(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_token, v_token, lo, hi, 0, full_end, num_keys, factor, softcap, d, own, head_dim, key_ptr,
            dropped, place, kept, token, offset, False, FLIP, SOFTCAP, BLOCK_N, SPLIT, PADDED, PRECISION, ALIGNED,
        )  # fmt: skip
        begin = full_end
    dq = key_steps(
        dq, q, dout, lse, delta, k_ptr, v_ptr, k_token, v_token, lo, hi, begin, end, num_keys, factor, softcap, d, own, head_dim, key_ptr,
        dropped, place, kept, token, offset, True, FLIP, SOFTCAP, BLOCK_N, SPLIT, PADDED, PRECISION, ALIGNED,
    )  # fmt: skip
    if SPLIT > 1:
        at = ((batch * num_queries + row) * num_heads + head)[:, None] * head_dim + own[None, :]
        here = inside[:, None] & ((own < head_dim)[None, :] if PADDED else True)
    tl.store(dq_ptr + at, dq * scale, mask=here)
