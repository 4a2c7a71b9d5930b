"""Attention backward on AMX tiles: bfloat16 operands, rounded from the float32 probabilities and their gradients.

Scores are computed with a row for each key, so that probabilities and their gradients need not be transposed: row by row they are the left operands
of dv and dk, and two rows interleaved are the right operand of dq, which gathers with a row for each element of the head.
"""

from typing import NamedTuple

import numpy as np

from cllm.kernels.numba import attention_amx as amx
from cllm.kernels.numba import attention_tile as at
from cllm.kernels.numba.attention_backward_tile import OWN, ROWS, clear, visible, write_keys
from cllm.kernels.numba.attention_tile import KEYS, SEGMENT, WORD, F, P
from cllm.kernels.numba.launch import float32_at, inline, int64_at, jit, put_float32
from cllm.kernels.numba.micro import BLOCK_BYTES
from cllm.kernels.numba.pack import transpose
from cllm.kernels.numba.simd import W, vexp2_coarse, vfma, vlanes_below, vload, vmul, vselect, vset, vstore, vsub, vtanh, vzero

PART_ROW = 128  # bytes of a row of 32 x 32 scores

_ZERO, _ONE, _LOWEST = np.float32(0.0), np.float32(1.0), np.float32(-np.inf)


class _Operands(NamedTuple):
    """Addresses of a block of keys and values in bfloat16."""

    k_rows: int
    v_rows: int
    k_turned: int


class _Tiles(NamedTuple):
    """Addresses of scores and of what follows from them."""

    s_part: int  # 32 x 32 scores
    dp_part: int  # and gradients of their probabilities
    p_rows: int  # probabilities, a row for each key
    ds_rows: int  # gradients of the scaled scores, a row for each key
    ds_pairs: int  # the same, two rows interleaved


class _QueryBlock(NamedTuple):
    """Addresses of the parts of a block of queries."""

    q_strips: int  # Q and dO as right operands whose k runs over the elements of the head
    dout_strips: int
    q_columns: int  # and over the queries
    dout_columns: int
    shift: int  # minus the log-sum-exp of each query, in log2 units
    delta: int
    dq: int  # with a row for each element of the head


class _WorkSpace(NamedTuple):
    """Addresses in the work space of one worker."""

    operands: _Operands
    tiles: _Tiles
    spare: int  # room for one block of the packing
    blocks: int  # the query blocks
    sums: int  # dK and dV of each block of keys


@inline
def _half_row(p):
    """Bytes of a row of bfloat16 that fills whole AMX steps."""
    return (p[P.dim] + amx.STEP - 1) // amx.STEP * amx.STEP_BYTES


@inline
def _whole_steps(k):
    return (k + amx.STEP - 1) // amx.STEP * amx.STEP


def query_block_bytes(dim, width):
    """Bytes of a `_QueryBlock`."""
    return ROWS * (4 * ((dim + amx.STEP - 1) // amx.STEP * amx.STEP_BYTES) + 2 * WORD + width * WORD)


_query_block_bytes = inline(query_block_bytes)


@inline
def work_space(p, worker):
    keys, part, tile = KEYS * _half_row(p), amx.STEP * PART_ROW, KEYS * ROWS * 2
    k_rows = p[P.scratch] + worker * p[P.scratch_size]
    s_part = k_rows + 3 * keys
    p_rows = s_part + 2 * part
    spare = p_rows + 3 * tile
    blocks = spare + W * W * WORD
    return _WorkSpace(
        operands=_Operands(k_rows=k_rows, v_rows=k_rows + keys, k_turned=k_rows + 2 * keys),
        tiles=_Tiles(s_part=s_part, dp_part=s_part + part, p_rows=p_rows, ds_rows=p_rows + tile, ds_pairs=p_rows + 2 * tile),
        spare=spare,
        blocks=blocks,
        sums=blocks + p[OWN.resident] * _query_block_bytes(p[P.dim], at.padded_dim(p[P.dim])),
    )


@inline
def _block_of_queries(p, blocks, index):
    """The parts of one of the query blocks."""
    rows = ROWS * _half_row(p)
    q = blocks + index * _query_block_bytes(p[P.dim], at.padded_dim(p[P.dim]))
    shift = q + 4 * rows
    return _QueryBlock(
        q_strips=q,
        dout_strips=q + rows,
        q_columns=q + 2 * rows,
        dout_columns=q + 3 * rows,
        shift=shift,
        delta=shift + ROWS * WORD,
        dq=shift + 2 * ROWS * WORD,
    )


def work_bytes(dim: int, width: int, resident: int, key_blocks: int) -> int:
    """Bytes of `work_space`."""
    half_row = -(-dim // amx.STEP) * amx.STEP_BYTES
    fixed = 3 * KEYS * half_row + 2 * amx.STEP * PART_ROW + 3 * KEYS * ROWS * 2 + W * W * WORD
    return -(-(fixed + resident * query_block_bytes(dim, width) + 2 * key_blocks * KEYS * width * WORD) // 4096) * 4096


@jit
def _fill_keys(p, b, token, kv, rows, operands, spare):
    k = p[P.k] + b * p[P.k_batch] + token * p[P.k_token] + kv * p[P.k_head]
    v = p[P.v] + b * p[P.v_batch] + token * p[P.v_token] + kv * p[P.v_head]
    amx.fill_rows(k, p[P.k_token], rows, p[P.dim], operands.k_rows, _half_row(p), KEYS)
    amx.fill_rows(v, p[P.v_token], rows, p[P.dim], operands.v_rows, _half_row(p), KEYS)
    amx.fill_turned(k, p[P.k_token], rows, p[P.dim], KEYS // 2, operands.k_turned, spare)


@jit
def _fill_queries(p, b, token, h, rows, block, spare):
    q = p[P.q] + b * p[P.q_batch] + token * p[P.q_token] + h * p[P.q_head]
    dout = p[OWN.dout] + b * p[OWN.dout_batch] + token * p[OWN.dout_token] + h * p[OWN.dout_head]
    amx.fill_strips_of_rows(q, p[P.q_token], rows, p[P.dim], ROWS // amx.LANES, block.q_strips, spare)
    amx.fill_strips_of_rows(dout, p[OWN.dout_token], rows, p[P.dim], ROWS // amx.LANES, block.dout_strips, spare)
    amx.fill_strips_of_columns(q, p[P.q_token], rows, p[P.dim], ROWS // 2, block.q_columns, spare)
    amx.fill_strips_of_columns(dout, p[OWN.dout_token], rows, p[P.dim], ROWS // 2, block.dout_columns, spare)
    first = (b * p[P.heads] + h) * p[P.tokens] + token
    for r in range(ROWS):
        lse = float32_at(p[P.lse], first + r) if r < rows else -_LOWEST  # no probability where there is no query
        put_float32(block.shift, r, _ZERO if lse == _LOWEST else np.float32(-np.float64(lse) * at.LOG2_E))
        put_float32(block.delta, r, float32_at(p[OWN.delta], first + r) if r < rows else _ZERO)
    clear(block.dq, ROWS * at.padded_dim(p[P.dim]))


@inline
def _probability(p, f, s_row, dp_row, i, shift, delta, c, scale, seen_from, seen_to, masked):
    """W probabilities of one key for queries from c on, and the gradients of their scaled (uncapped) scores."""
    s, capped = vload(s_row, i), f[F.softcap] != 0.0
    slope = vset(_ONE)
    if capped:
        cap = np.float32(f[F.softcap])
        s = vtanh(vmul(s, vset(np.float32(abs(f[F.scale])) / cap)))
        slope = vsub(slope, vmul(s, s))
        s = vmul(s, vset(cap))
    if masked:
        lowest = vset(_LOWEST)
        s = vselect(vlanes_below(seen_to - c), vselect(vlanes_below(seen_from - c), lowest, s), lowest)
    e = vexp2_coarse(vfma(s, scale, vload(shift, c)))
    ds = vmul(e, vsub(vload(dp_row, i), vload(delta, c)))
    if capped:
        ds = vmul(ds, slope)
    return e, ds


@jit
def _probabilities(p, f, tiles, shift, delta, t0, queries, num_keys, key, valid, first, first_column, masked):
    """For 32 keys from `first` of the block on and 32 queries: P, dS, and dS in pairs, from the parts of S and dP."""
    scale, c = vset(np.float32(at.log2_factor(f))), first_column
    for r in range(first, first + amx.STEP, 2):
        # A key is seen by the queries from itself on, as far as the window reaches.
        itself = key + r - (num_keys - queries) - t0
        from0, from1 = (itself, itself + 1) if p[P.causal] else (0, 0)
        to0, to1 = (itself + p[P.window], itself + p[P.window] + 1) if p[P.window] > 0 else (ROWS, ROWS)
        to0, to1 = to0 if r < valid else 0, to1 if r + 1 < valid else 0
        s0, dp0, out = tiles.s_part + (r - first) * PART_ROW, tiles.dp_part + (r - first) * PART_ROW, r * (ROWS * 2) + 2 * c
        s1, dp1 = s0 + PART_ROW, dp0 + PART_ROW
        e0, ds0 = _probability(p, f, s0, dp0, 0, shift, delta, c, scale, from0, to0, masked)
        e1, ds1 = _probability(p, f, s0, dp0, W, shift, delta, c + W, scale, from0, to0, masked)
        even = amx.halves(ds0, ds1)
        vstore(tiles.p_rows + out, 0, amx.halves(e0, e1))
        vstore(tiles.ds_rows + out, 0, even)
        e0, ds0 = _probability(p, f, s1, dp1, 0, shift, delta, c, scale, from1, to1, masked)
        e1, ds1 = _probability(p, f, s1, dp1, W, shift, delta, c + W, scale, from1, to1, masked)
        odd = amx.halves(ds0, ds1)
        vstore(tiles.p_rows + ROWS * 2 + out, 0, amx.halves(e0, e1))
        vstore(tiles.ds_rows + ROWS * 2 + out, 0, odd)
        strip = tiles.ds_pairs + c // W * (KEYS // 2 * amx.STEP_BYTES)
        vstore(strip, r // 2 * W, amx.interleave_low(even, odd))
        vstore(strip + KEYS // 2 * amx.STEP_BYTES, r // 2 * W, amx.interleave_high(even, odd))


@jit
def _no_probabilities(tiles, first, first_column):
    """The same where no query sees a key."""
    strip = tiles.ds_pairs + first_column // W * (KEYS // 2 * amx.STEP_BYTES)
    for r in range(first, first + amx.STEP):
        vstore(tiles.p_rows + r * (ROWS * 2) + 2 * first_column, 0, vzero())
        vstore(tiles.ds_rows + r * (ROWS * 2) + 2 * first_column, 0, vzero())
    for r in range(first // 2, (first + amx.STEP) // 2):
        vstore(strip, r * W, vzero())
        vstore(strip + KEYS // 2 * amx.STEP_BYTES, r * W, vzero())


@jit
def _pair(p, f, operands, tiles, block, rows, t0, queries, num_keys, key, valid):
    """Probabilities and score gradients of one block of keys for one block of queries, 32 x 32 at a time: those stay in the L1 cache."""
    half_row = _half_row(p)
    steps, strip = half_row // amx.STEP_BYTES, half_row * amx.LANES
    for r in range(0, _whole_steps(valid), amx.STEP):
        for c in range(0, rows, amx.STEP):
            t, last, first_key, end_key = t0 + c, min(t0 + c + amx.STEP, t0 + rows) - 1, key + r, key + r + amx.STEP
            if first_key >= at.end_key(p, last, queries, num_keys) or end_key <= at.first_key(p, t, queries, num_keys):
                _no_probabilities(tiles, r, c)
                continue
            from_k, from_c = r * half_row, c // amx.LANES * strip
            k, q = operands.k_rows + from_k, block.q_strips + from_c
            v, dout = operands.v_rows + from_k, block.dout_strips + from_c
            amx.multiply(k, strip, half_row, amx.STEP_BYTES, q, strip, tiles.s_part, PART_ROW, 2, 2, steps, True)
            amx.multiply(v, strip, half_row, amx.STEP_BYTES, dout, strip, tiles.dp_part, PART_ROW, 2, 2, steps, True)
            masked = end_key > at.end_key(p, t, queries, num_keys) or first_key < at.first_key(p, last, queries, num_keys)
            _probabilities(p, f, tiles, block.shift, block.delta, t0, queries, num_keys, key, valid, r, c, masked)


@jit
def _add_to_dq(p, k_turned, ds_pairs, dq, rows, valid):
    """dQ turned += K turned times dS"""
    strip = KEYS // 2 * amx.STEP_BYTES
    amx.multiply(k_turned, strip, amx.STEP_BYTES, BLOCK_BYTES, ds_pairs, strip, dq, ROWS * WORD, (p[P.dim] + amx.LANES - 1) // amx.LANES,
                 _whole_steps(rows) // amx.LANES, _whole_steps(valid) // amx.STEP, False)  # fmt: skip


@jit
def write_turned(p, f, dq, b, token, h, rows, spare):
    """A block of dQ, turned back; its columns lie in the order of `interleave_low` and `interleave_high`."""
    scale, row_bytes = vset(np.float32(f[F.scale])), p[P.heads] * p[P.dim] * 2
    to = p[OWN.dq] + (b * p[P.tokens] + token) * row_bytes + h * p[P.dim] * 2
    for strip in range(0, ROWS // W):
        for d in range(0, p[P.dim], W):
            transpose(dq + d * (ROWS * WORD) + strip * (W * WORD), ROWS * WORD, spare)
            for c in range(W):
                r = strip // 2 * (2 * W) + c // 4 * 8 + strip % 2 * 4 + c % 4
                if r < rows:
                    amx.store_row(to + r * row_bytes, True, True, d, vmul(vload(spare, c * W), scale), p[P.dim] - d)


@jit
def _add_to_dk_dv(p, f, operands, tiles, block, dk, dv, rows, t0, queries, num_keys, key, valid):
    """What a block of queries adds to dK and dV of a block of keys; P and dS are left in their tiles."""
    _pair(p, f, operands, tiles, block, rows, t0, queries, num_keys, key, valid)
    half, row, strip, steps = ROWS * 2, at.padded_dim(p[P.dim]) * WORD, ROWS // 2 * amx.STEP_BYTES, _whole_steps(rows) // amx.STEP
    row_strips, column_strips = (valid + amx.LANES - 1) // amx.LANES, (p[P.dim] + amx.LANES - 1) // amx.LANES
    amx.multiply(tiles.p_rows, half * amx.LANES, half, amx.STEP_BYTES, block.dout_columns, strip, dv, row, row_strips, column_strips, steps, False)
    amx.multiply(tiles.ds_rows, half * amx.LANES, half, amx.STEP_BYTES, block.q_columns, strip, dk, row, row_strips, column_strips, steps, False)


@jit
def key_block(p, f, worker, segment, kv, key):
    """(dk, dv) of one block of keys."""
    b, start = int64_at(segment, SEGMENT.batch), int64_at(segment, SEGMENT.start)
    queries, num_keys = int64_at(segment, SEGMENT.queries), int64_at(segment, SEGMENT.num_keys)
    group, size = p[P.heads] // p[P.kv_heads], KEYS * at.padded_dim(p[P.dim])
    space = work_space(p, worker)
    dk, dv, block = space.sums, space.sums + size * WORD, _block_of_queries(p, space.blocks, 0)
    _fill_keys(p, b, start + key, kv, min(KEYS, num_keys - key), space.operands, space.spare)
    clear(dk, 2 * size)
    for g in range(group):
        for t0 in range(0, queries, ROWS):
            rows = min(ROWS, queries - t0)
            valid = visible(p, t0, rows, queries, num_keys, key)
            if valid > 0:
                _fill_queries(p, b, start + t0, kv * group + g, rows, block, space.spare)
                _add_to_dk_dv(p, f, space.operands, space.tiles, block, dk, dv, rows, t0, queries, num_keys, key, valid)
    return dk, dv


@jit
def query_block(p, f, worker, segment, h, t0):
    """dq of one block of queries, turned."""
    b, start = int64_at(segment, SEGMENT.batch), int64_at(segment, SEGMENT.start)
    queries, num_keys = int64_at(segment, SEGMENT.queries), int64_at(segment, SEGMENT.num_keys)
    kv, rows = h // (p[P.heads] // p[P.kv_heads]), min(ROWS, queries - t0)
    space = work_space(p, worker)
    block = _block_of_queries(p, space.blocks, 0)
    _fill_queries(p, b, start + t0, h, rows, block, space.spare)
    for key in range(0, num_keys, KEYS):
        valid = visible(p, t0, rows, queries, num_keys, key)
        if valid > 0:
            _fill_keys(p, b, start + key, kv, valid, space.operands, space.spare)
            _pair(p, f, space.operands, space.tiles, block, rows, t0, queries, num_keys, key, valid)
            _add_to_dq(p, space.operands.k_turned, space.tiles.ds_pairs, block.dq, rows, valid)
    return block.dq


@jit
def together(p, f, worker, segment, kv):
    """As many blocks of queries at a time as stay in the cache, against all blocks of keys, whose dK and dV are all kept."""
    b, start = int64_at(segment, SEGMENT.batch), int64_at(segment, SEGMENT.start)
    queries, num_keys = int64_at(segment, SEGMENT.queries), int64_at(segment, SEGMENT.num_keys)
    group, size = p[P.heads] // p[P.kv_heads], KEYS * at.padded_dim(p[P.dim])
    space = work_space(p, worker)
    each = (queries + ROWS - 1) // ROWS
    clear(space.sums, (num_keys + KEYS - 1) // KEYS * (2 * size))
    for first in range(0, group * each, p[OWN.resident]):
        end = min(group * each, first + p[OWN.resident])
        for i in range(first, end):
            t0, h, block = i % each * ROWS, kv * group + i // each, _block_of_queries(p, space.blocks, i - first)
            _fill_queries(p, b, start + t0, h, min(ROWS, queries - t0), block, space.spare)
        for key in range(0, num_keys, KEYS):
            dk, filled = space.sums + key // KEYS * (2 * size * WORD), False
            for i in range(first, end):
                t0 = i % each * ROWS
                rows = min(ROWS, queries - t0)
                valid = visible(p, t0, rows, queries, num_keys, key)
                if valid <= 0:
                    continue
                if not filled:
                    _fill_keys(p, b, start + key, kv, min(KEYS, num_keys - key), space.operands, space.spare)
                    filled = True
                block = _block_of_queries(p, space.blocks, i - first)
                _add_to_dk_dv(p, f, space.operands, space.tiles, block, dk, dk + size * WORD, rows, t0, queries, num_keys, key, valid)
                _add_to_dq(p, space.operands.k_turned, space.tiles.ds_pairs, block.dq, rows, valid)
        for i in range(first, end):
            t0, h, block = i % each * ROWS, kv * group + i // each, _block_of_queries(p, space.blocks, i - first)
            write_turned(p, f, block.dq, b, start + t0, h, min(ROWS, queries - t0), space.spare)
    for key in range(0, num_keys, KEYS):
        dk = space.sums + key // KEYS * (2 * size * WORD)
        write_keys(p, f, segment, kv, key, dk, dk + size * WORD)
