"""Attention backward with vectors, in float32: one block of queries against one block of keys, and the sums over such pairs."""

from typing import NamedTuple

import numpy as np

from cllm.kernels.numba import attention_tile as at
from cllm.kernels.numba.attention_backward_tile import OWN, ROWS, clear, visible
from cllm.kernels.numba.attention_tile import KEYS, SEGMENT, WORD, F, P
from cllm.kernels.numba.launch import float32_at, int64_at, jit
from cllm.kernels.numba.simd import W, vexp2_normal, vfma, vlanes_below, vload, vmul, vselect, vset, vstore, vsub, vtanh

_ZERO, _ONE, _LOWEST = np.float32(0.0), np.float32(1.0), np.float32(-np.inf)


class _WorkSpace(NamedTuple):
    """Addresses in the work space of one worker, in the order in which the parts lie there."""

    q_rows: int
    dout_rows: int
    scores: int  # then probabilities
    dscores: int  # gradients of the probabilities, then of the scaled scores
    k_turned: int
    v_turned: int
    k_rows: int
    dk: int
    dv: int
    kept: int  # what dropout makes of a row of probabilities
    spare: int  # room for one block of the packing
    dq: int


@jit
def work_space(p, worker, width):
    rows, block, scores = ROWS * width * WORD, KEYS * width * WORD, ROWS * KEYS * WORD
    q_rows = p[P.scratch] + worker * p[P.scratch_size]
    s = q_rows + 2 * rows
    keys = s + 2 * scores
    dk = keys + 3 * block
    return _WorkSpace(
        q_rows=q_rows,
        dout_rows=q_rows + rows,
        scores=s,
        dscores=s + scores,
        k_turned=keys,
        v_turned=keys + block,
        k_rows=keys + 2 * block,
        dk=dk,
        dv=dk + block,
        kept=dk + 2 * block,
        spare=dk + 2 * block + at.KEPT_BYTES,
        dq=dk + 3 * block + at.KEPT_BYTES,
    )


def work_bytes(width: int, gathered: int) -> int:
    """Bytes of `work_space`, with `gathered` of them for dQ."""
    fixed = 2 * ROWS * width * WORD + 2 * ROWS * KEYS * WORD + 5 * KEYS * width * WORD + at.KEPT_BYTES
    return -(-(fixed + max(KEYS * width * WORD, W * W * WORD) + gathered) // 4096) * 4096


@jit
def _fill_keys(p, space, b, token, kv, rows):
    """K and V of a block, transposed for the scores, and K again row by row for dQ."""
    k = p[P.k] + b * p[P.k_batch] + token * p[P.k_token] + kv * p[P.k_head]
    v = p[P.v] + b * p[P.v_batch] + token * p[P.v_token] + kv * p[P.v_head]
    at.fill_strips(k, p[P.half], p[P.k_token], rows, p[P.dim], space.k_turned, space.spare)
    at.fill_strips(v, p[P.half], p[P.v_token], rows, p[P.dim], space.v_turned, space.spare)
    at.fill_rows(k, p[P.half], p[P.k_token], rows, p[P.dim], space.k_rows, _ONE, rows)


@jit
def _fill_queries(p, f, space, b, token, h, rows):
    padded = (rows + at.MR - 1) // at.MR * at.MR
    q = p[P.q] + b * p[P.q_batch] + token * p[P.q_token] + h * p[P.q_head]
    dout = p[OWN.dout] + b * p[OWN.dout_batch] + token * p[OWN.dout_token] + h * p[OWN.dout_head]
    at.fill_rows(q, p[P.half], p[P.q_token], rows, p[P.dim], space.q_rows, at.scale_sign(f), padded)
    at.fill_rows(dout, p[P.half], p[OWN.dout_token], rows, p[P.dim], space.dout_rows, _ONE, padded)


@jit
def _probabilities(p, f, segment, space, h, rows, t0, key, columns, masked):
    """Replaces the scores by probabilities, as dropout leaves them, and the gradients of these by those of the scaled scores before the softcap."""
    b, start = int64_at(segment, SEGMENT.batch), int64_at(segment, SEGMENT.start)
    queries, num_keys = int64_at(segment, SEGMENT.queries), int64_at(segment, SEGMENT.num_keys)
    row_index, element = (b * p[P.heads] + h) * p[P.tokens] + start + t0, at.first_element(p, start, key)
    capped, dropping, kept = f[F.softcap] != 0.0, p[P.dropped] != 0, space.kept
    lowest, cap, one = vset(_LOWEST), vset(np.float32(f[F.softcap])), vset(_ONE)
    inner = vset(np.float32(abs(f[F.scale]) / f[F.softcap] if capped else 1.0))
    scale = vset(np.float32(at.log2_factor(f)))
    for r in range(rows):
        s_row, dp_row, t = space.scores + r * (KEYS * WORD), space.dscores + r * (KEYS * WORD), t0 + r
        first, end = at.first_key(p, t, queries, num_keys) - key, at.end_key(p, t, queries, num_keys) - key
        lse = float32_at(p[P.lse], row_index + r)
        shift = vset(_ZERO if lse == _LOWEST else np.float32(-np.float64(lse) * at.LOG2_E))
        delta = vset(float32_at(p[OWN.delta], row_index + r))
        if dropping:
            kept = at.kept_row(p, space.kept, np.float32(f[F.kept]), b, start + t, h, element, columns)
        for c in range(0, columns, W):
            s, slope = vload(s_row, c), one
            if capped:
                s = vtanh(vmul(s, inner))
                slope = vsub(one, vmul(s, s))
                s = vmul(s, cap)
            if masked:
                s = vselect(vlanes_below(end - c), vselect(vlanes_below(first - c), lowest, s), lowest)
            e, dp = vexp2_normal(vfma(s, scale, shift)), vload(dp_row, c)
            if dropping:
                dp = vmul(dp, vload(kept, c))
            ds = vmul(e, vsub(dp, delta))
            if dropping:
                e = vmul(e, vload(kept, c))
            if capped:
                ds = vmul(ds, slope)
            vstore(s_row, c, e)
            vstore(dp_row, c, ds)


@jit
def _pair(p, f, segment, space, h, rows, t0, key, valid):
    """Probabilities and score gradients of one block of queries of a head against one block of keys."""
    queries, num_keys = int64_at(segment, SEGMENT.queries), int64_at(segment, SEGMENT.num_keys)
    strips, width = (valid + W - 1) // W, at.padded_dim(p[P.dim])
    row, strip = width * WORD, width * W * WORD
    at.multiply(space.q_rows, row, space.k_turned, W * WORD, strip, space.scores, KEYS * WORD, rows, p[P.dim], strips, True)
    at.multiply(space.dout_rows, row, space.v_turned, W * WORD, strip, space.dscores, KEYS * WORD, rows, p[P.dim], strips, True)
    masked = key < at.first_key(p, t0 + rows - 1, queries, num_keys) or key + strips * W > at.end_key(p, t0, queries, num_keys)
    _probabilities(p, f, segment, space, h, rows, t0, key, strips * W, masked)


@jit
def key_block(p, f, worker, segment, kv, key, width):
    """(dk, dv) of one block of keys; adds to the gathered dq when the tasks are whole heads."""
    b, start = int64_at(segment, SEGMENT.batch), int64_at(segment, SEGMENT.start)
    queries, num_keys = int64_at(segment, SEGMENT.queries), int64_at(segment, SEGMENT.num_keys)
    group, row, strips = p[P.heads] // p[P.kv_heads], width * WORD, width // W
    space = work_space(p, worker, width)
    _fill_keys(p, space, b, start + key, kv, min(KEYS, num_keys - key))
    clear(space.dk, KEYS * width)
    clear(space.dv, KEYS * width)
    for g in range(group):
        h = kv * group + g
        for t0 in range(0, queries, ROWS):
            rows = min(ROWS, queries - t0)
            valid = visible(p, t0, rows, queries, num_keys, key)
            if valid <= 0:
                continue
            _fill_queries(p, f, space, b, start + t0, h, rows)
            _pair(p, f, segment, space, h, rows, t0, key, valid)
            at.multiply_turned(space.scores, KEYS * WORD, space.dout_rows, row, space.dv, row, valid, rows, strips, False)
            at.multiply_turned(space.dscores, KEYS * WORD, space.q_rows, row, space.dk, row, valid, rows, strips, False)
            if p[OWN.together]:
                target = space.dq + (g * ((queries + ROWS - 1) // ROWS * ROWS) + t0) * row
                at.multiply(space.dscores, KEYS * WORD, space.k_rows, row, W * WORD, target, row, rows, valid, strips, False)
    return space.dk, space.dv


@jit
def query_block(p, f, worker, segment, h, t0, width):
    """dq of one block of queries, before the scale."""
    b, start = int64_at(segment, SEGMENT.batch), int64_at(segment, SEGMENT.start)
    queries, num_keys = int64_at(segment, SEGMENT.queries), int64_at(segment, SEGMENT.num_keys)
    kv, rows, row = h // (p[P.heads] // p[P.kv_heads]), min(ROWS, queries - t0), width * WORD
    space = work_space(p, worker, width)
    _fill_queries(p, f, space, b, start + t0, h, rows)
    clear(space.dq, ROWS * width)
    for key in range(0, num_keys, KEYS):
        valid = visible(p, t0, rows, queries, num_keys, key)
        if valid > 0:
            _fill_keys(p, space, b, start + key, kv, valid)
            _pair(p, f, segment, space, h, rows, t0, key, valid)
            at.multiply(space.dscores, KEYS * WORD, space.k_rows, row, W * WORD, space.dq, row, rows, valid, width // W, False)
    return space.dq
