"""Attention backward on the CPU: the probabilities are computed again, tile by tile, from the saved log-sum-exp.

Dao 2023, FlashAttention-2, arXiv 2307.08691. An element of dk and dv sums over query heads and blocks of ROWS queries in
order, one of dq over blocks of KEYS keys in order: the same bits whichever of two ways the work is cut.
    together   a task is a key-value head: 5 products for each pair of blocks; dq of its query heads gathers in the scratch
    apart      a task is a block of keys (dk, dv), or a block of queries (dq): 7 products, but many more tasks
"""

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba import attention_amx as amx
from cllm.kernels.numba import attention_tile as at
from cllm.kernels.numba.attention_tile import KEYS, WORD
from cllm.kernels.numba.gemm import TILES as TILES_KERNEL
from cllm.kernels.numba.gemm import bf16_kernel, l2_bytes
from cllm.kernels.numba.launch import Kernel, float32_at, inline, int64_at, is_half, jit, load, num_workers, put_float32, scratch
from cllm.kernels.numba.micro import BLOCK_BYTES
from cllm.kernels.numba.pack import transpose
from cllm.kernels.numba.simd import (
    W,
    vexp2_coarse,
    vexp2_normal,
    vfma,
    vhsum,
    vlanes_below,
    vload,
    vmul,
    vselect,
    vset,
    vstore,
    vsub,
    vtanh,
    vzero,
)

ROWS = 64  # queries of a block: a multiple of at.MR
PART_ROW = 128  # bytes of a row of 32 x 32 scores
MOST_WAITING = 1.4  # times the work, where workers wait for the last heads: apart makes 7 products instead of 5
MAX_GATHERED_BYTES = 64 << 20  # of dq (of dk and dv on AMX) in the scratch of one worker

(DOUT, DOUT_BATCH, DOUT_TOKEN, DOUT_HEAD, DLSE, DELTA, DQ, DK, DV, TOGETHER, KEY_TASKS, KEY_TOKENS, TILES, RESIDENT, CONFIGURATION) = range(
    at.NUM_SHARED, at.NUM_SHARED + 15
)  # fmt: skip

_ZERO, _ONE, _LOWEST = np.float32(0.0), np.float32(1.0), np.float32(-np.inf)


def _prepare(p, f, task, worker):
    """delta = rowsum(dout * out) - dlse for ROWS tokens of a head; OUT is contiguous."""
    blocks = (p[at.TOKENS] + ROWS - 1) // ROWS
    size = 2 if p[at.HALF] else 4
    t0, b, h = (task % blocks) * ROWS, task // blocks // p[at.HEADS], task // blocks % p[at.HEADS]
    for t in range(t0, min(t0 + ROWS, p[at.TOKENS])):
        out = p[at.OUT] + ((b * p[at.TOKENS] + t) * p[at.HEADS] + h) * p[at.DIM] * size
        dout = p[DOUT] + b * p[DOUT_BATCH] + t * p[DOUT_TOKEN] + h * p[DOUT_HEAD]
        total = vzero()
        for c in range(0, p[at.DIM], W):
            n = p[at.DIM] - c
            total = vfma(load(out, p[at.HALF], c, n), load(dout, p[at.HALF], c, n), total)
        row = (b * p[at.HEADS] + h) * p[at.TOKENS] + t
        dlse = float32_at(p[DLSE], row) if p[DLSE] != 0 else _ZERO
        put_float32(p[DELTA], row, vhsum(total) - dlse)


@jit
def _scratch(p, worker, width):
    """Addresses of the parts of a worker's scratch, in the order of _scratch_bytes."""
    rows, block, scores = ROWS * width * WORD, KEYS * width * WORD, ROWS * KEYS * WORD
    q = p[at.SCRATCH] + worker * p[at.SCRATCH_SIZE]
    s = q + 2 * rows
    keys = s + 2 * scores
    dk = keys + 3 * block
    return q, q + rows, s, s + scores, keys, keys + block, keys + 2 * block, dk, dk + block, dk + 2 * block, dk + 3 * block


def _scratch_bytes(width: int, gathered: int) -> int:
    """Q, dO; S, dP; K and V transposed, K; dK, dV; room for one pack block; dQ."""
    fixed = 2 * ROWS * width * WORD + 2 * ROWS * KEYS * WORD + 5 * KEYS * width * WORD
    return -(-(fixed + max(KEYS * width * WORD, W * W * WORD) + gathered) // 4096) * 4096


@jit
def _fill_keys(p, b, token, kv, rows, k_turned, v_turned, k_rows, spare):
    k = p[at.K] + b * p[at.K_BATCH] + token * p[at.K_TOKEN] + kv * p[at.K_HEAD]
    v = p[at.V] + b * p[at.V_BATCH] + token * p[at.V_TOKEN] + kv * p[at.V_HEAD]
    at.fill_strips(k, p[at.HALF], p[at.K_TOKEN], rows, p[at.DIM], k_turned, spare)
    at.fill_strips(v, p[at.HALF], p[at.V_TOKEN], rows, p[at.DIM], v_turned, spare)
    at.fill_rows(k, p[at.HALF], p[at.K_TOKEN], rows, p[at.DIM], k_rows, _ONE, rows)


@jit
def _fill_queries(p, f, b, token, h, rows, q_rows, dout_rows):
    padded = (rows + at.MR - 1) // at.MR * at.MR
    q = p[at.Q] + b * p[at.Q_BATCH] + token * p[at.Q_TOKEN] + h * p[at.Q_HEAD]
    dout = p[DOUT] + b * p[DOUT_BATCH] + token * p[DOUT_TOKEN] + h * p[DOUT_HEAD]
    at.fill_rows(q, p[at.HALF], p[at.Q_TOKEN], rows, p[at.DIM], q_rows, at.scale_sign(f), padded)
    at.fill_rows(dout, p[at.HALF], p[DOUT_TOKEN], rows, p[at.DIM], dout_rows, _ONE, padded)


@jit
def _probabilities(p, f, s_tile, dp_tile, row_index, rows, t0, queries, num_keys, key, columns, masked):
    """Scores -> probabilities, and their gradients -> gradients of the scaled (uncapped) scores, both in place."""
    capped = f[at.SOFTCAP] != 0.0
    lowest, cap, one = vset(_LOWEST), vset(np.float32(f[at.SOFTCAP])), vset(_ONE)
    inner = vset(np.float32(abs(f[at.SCALE]) / f[at.SOFTCAP] if capped else 1.0))
    scale = vset(np.float32(at.log2_factor(f)))
    for r in range(rows):
        s_row, dp_row, t = s_tile + r * (KEYS * WORD), dp_tile + r * (KEYS * WORD), t0 + r
        first, end = at.first_key(p, t, queries, num_keys) - key, at.end_key(p, t, queries, num_keys) - key
        lse = float32_at(p[at.LSE], row_index + r)
        shift = vset(_ZERO if lse == _LOWEST else np.float32(-np.float64(lse) * at.LOG2_E))
        delta = vset(float32_at(p[DELTA], row_index + r))
        for c in range(0, columns, W):
            s, slope = vload(s_row, c), one
            if capped:
                s = vtanh(vmul(s, inner))
                slope = vsub(one, vmul(s, s))
                s = vmul(s, cap)
            if masked:
                s = vselect(vlanes_below(end - c), vselect(vlanes_below(first - c), lowest, s), lowest)
            e = vexp2_normal(vfma(s, scale, shift))
            ds = vmul(e, vsub(vload(dp_row, c), delta))
            if capped:
                ds = vmul(ds, slope)
            vstore(s_row, c, e)
            vstore(dp_row, c, ds)


@jit
def _pair(p, f, q_rows, dout_rows, k_turned, v_turned, s_tile, dp_tile, row_index, rows, t0, queries, num_keys, key, valid):
    """Probabilities and score gradients of one block of queries against one block of keys."""
    strips, width = (valid + W - 1) // W, at.padded_dim(p[at.DIM])
    row, strip = width * WORD, width * W * WORD
    at.multiply(q_rows, row, k_turned, W * WORD, strip, s_tile, KEYS * WORD, rows, p[at.DIM], strips, True)
    at.multiply(dout_rows, row, v_turned, W * WORD, strip, dp_tile, KEYS * WORD, rows, p[at.DIM], strips, True)
    masked = key < at.first_key(p, t0 + rows - 1, queries, num_keys) or key + strips * W > at.end_key(p, t0, queries, num_keys)
    _probabilities(p, f, s_tile, dp_tile, row_index, rows, t0, queries, num_keys, key, strips * W, masked)


@jit
def _visible(p, t0, rows, queries, num_keys, key):
    """How many keys of the block, from its first, a block of queries can see."""
    end = min(KEYS, at.end_key(p, t0 + rows - 1, queries, num_keys) - key)
    return end if key + KEYS > at.first_key(p, t0, queries, num_keys) else 0


@jit
def _write_rows(source, width, to, half, tiles, row_bytes, rows, dim, scale):
    s = vset(scale)
    for r in range(rows):
        for c in range(0, dim, W):
            amx.store_row(to + r * row_bytes, half, tiles, c, vmul(vload(source + r * width * WORD, c), s), dim - c)


@jit
def _clear(address, words):
    for c in range(0, words, W):
        vstore(address, c, vzero())


@jit
def _write_keys(p, f, segment, kv, key, dk, dv):
    b, start, width = int64_at(segment, at.BATCH), int64_at(segment, at.START), at.padded_dim(p[at.DIM])
    rows, head_bytes = min(KEYS, int64_at(segment, at.NUM_KEYS) - key), p[at.DIM] * (2 if p[at.HALF] else 4)
    back = np.float32(abs(f[at.SCALE]))  # the sign is in the queries
    to = ((b * p[KEY_TOKENS] + start + key) * p[at.KV_HEADS] + kv) * head_bytes
    _write_rows(dk, width, p[DK] + to, p[at.HALF], p[TILES], p[at.KV_HEADS] * head_bytes, rows, p[at.DIM], back)
    _write_rows(dv, width, p[DV] + to, p[at.HALF], p[TILES], p[at.KV_HEADS] * head_bytes, rows, p[at.DIM], _ONE)


# ---- the same on AMX tiles: bfloat16 operands, rounded from float32 probabilities and their gradients ----------------
#
# Scores are computed with a row for each key, so that probabilities and their gradients need not be transposed: row by row they are the left
# operands of dv and dk, and two rows interleaved are the right operand of dq, which gathers with a row for each element of the head.


@inline
def _half_row(p):
    """Bytes of a row of bfloat16 that fills whole AMX steps."""
    return (p[at.DIM] + amx.STEP - 1) // amx.STEP * amx.STEP_BYTES


@inline
def _whole_steps(k):
    return (k + amx.STEP - 1) // amx.STEP * amx.STEP


def _query_block_bytes_py(dim, width):
    """Q and dO as right operands over elements, then over queries; the shifts and deltas of the rows; dQ turned."""
    return ROWS * (4 * ((dim + amx.STEP - 1) // amx.STEP * amx.STEP_BYTES) + 2 * WORD + width * WORD)


_query_block_bytes = inline(_query_block_bytes_py)


@inline
def _tile_scratch(p, worker):
    """Addresses in a worker's scratch: K and V; K turned; a part of S and of dP; P, dS, dS in pairs; room for one pack block; query blocks, and
    after them dK and dV."""
    keys, part, tile = KEYS * _half_row(p), amx.STEP * PART_ROW, KEYS * ROWS * 2
    k_rows = p[at.SCRATCH] + worker * p[at.SCRATCH_SIZE]
    s_part = k_rows + 3 * keys
    p_rows = s_part + 2 * part
    spare = p_rows + 3 * tile
    blocks = spare + W * W * WORD
    sums = blocks + p[RESIDENT] * _query_block_bytes(p[at.DIM], at.padded_dim(p[at.DIM]))
    return (k_rows, k_rows + keys, k_rows + 2 * keys), (s_part, s_part + part, p_rows, p_rows + tile, p_rows + 2 * tile), spare, blocks, sums


@inline
def _block_of_queries(p, blocks, index):
    """Addresses of the parts of a query block."""
    rows = ROWS * _half_row(p)
    q = blocks + index * _query_block_bytes(p[at.DIM], at.padded_dim(p[at.DIM]))
    shift = q + 4 * rows
    return q, q + rows, q + 2 * rows, q + 3 * rows, shift, shift + ROWS * WORD, shift + 2 * ROWS * WORD


def _tile_scratch_bytes(dim: int, width: int, resident: int, key_blocks: int) -> int:
    half_row = -(-dim // amx.STEP) * amx.STEP_BYTES
    fixed = 3 * KEYS * half_row + 2 * amx.STEP * PART_ROW + 3 * KEYS * ROWS * 2 + W * W * WORD
    return -(-(fixed + resident * _query_block_bytes_py(dim, width) + 2 * key_blocks * KEYS * width * WORD) // 4096) * 4096


@jit
def _fill_tile_keys(p, b, token, kv, rows, operands, spare):
    k_rows, v_rows, k_turned = operands
    k = p[at.K] + b * p[at.K_BATCH] + token * p[at.K_TOKEN] + kv * p[at.K_HEAD]
    v = p[at.V] + b * p[at.V_BATCH] + token * p[at.V_TOKEN] + kv * p[at.V_HEAD]
    amx.fill_rows(k, p[at.K_TOKEN], rows, p[at.DIM], k_rows, _half_row(p), KEYS)
    amx.fill_rows(v, p[at.V_TOKEN], rows, p[at.DIM], v_rows, _half_row(p), KEYS)
    amx.fill_turned(k, p[at.K_TOKEN], rows, p[at.DIM], KEYS // 2, k_turned, spare)


@jit
def _fill_tile_queries(p, b, token, h, rows, block, spare):
    q = p[at.Q] + b * p[at.Q_BATCH] + token * p[at.Q_TOKEN] + h * p[at.Q_HEAD]
    dout = p[DOUT] + b * p[DOUT_BATCH] + token * p[DOUT_TOKEN] + h * p[DOUT_HEAD]
    q_strips, dout_strips, q_columns, dout_columns, shift, delta, dq = block
    amx.fill_strips_of_rows(q, p[at.Q_TOKEN], rows, p[at.DIM], ROWS // amx.LANES, q_strips, spare)
    amx.fill_strips_of_rows(dout, p[DOUT_TOKEN], rows, p[at.DIM], ROWS // amx.LANES, dout_strips, spare)
    amx.fill_strips_of_columns(q, p[at.Q_TOKEN], rows, p[at.DIM], ROWS // 2, q_columns, spare)
    amx.fill_strips_of_columns(dout, p[DOUT_TOKEN], rows, p[at.DIM], ROWS // 2, dout_columns, spare)
    first = (b * p[at.HEADS] + h) * p[at.TOKENS] + token
    for r in range(ROWS):
        lse = float32_at(p[at.LSE], first + r) if r < rows else -_LOWEST  # no probability where there is no query
        put_float32(shift, r, _ZERO if lse == _LOWEST else np.float32(-np.float64(lse) * at.LOG2_E))
        put_float32(delta, r, float32_at(p[DELTA], first + r) if r < rows else _ZERO)
    _clear(dq, ROWS * at.padded_dim(p[at.DIM]))


@inline
def _probability(p, f, s_row, dp_row, i, shift, delta, c, scale, seen_from, seen_to, masked):
    """W probabilities of one key for queries from c on, and the gradients of their scaled (uncapped) scores."""
    s, capped = vload(s_row, i), f[at.SOFTCAP] != 0.0
    slope = vset(_ONE)
    if capped:
        cap = np.float32(f[at.SOFTCAP])
        s = vtanh(vmul(s, vset(np.float32(abs(f[at.SCALE])) / cap)))
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
def _tile_probabilities(p, f, tiles, shift, delta, t0, queries, num_keys, key, valid, first, first_column, masked):
    """32 keys from `first` of the block and 32 queries: S and dP -> P, dS, and dS in pairs."""
    s_part, dp_part, p_rows, ds_rows, ds_pairs = tiles
    scale, c = vset(np.float32(at.log2_factor(f))), first_column
    for r in range(first, first + amx.STEP, 2):
        # A key is seen by the queries from itself on, as far as the window reaches.
        itself = key + r - (num_keys - queries) - t0
        from0, from1 = (itself, itself + 1) if p[at.CAUSAL] else (0, 0)
        to0, to1 = (itself + p[at.WINDOW], itself + p[at.WINDOW] + 1) if p[at.WINDOW] > 0 else (ROWS, ROWS)
        to0, to1 = to0 if r < valid else 0, to1 if r + 1 < valid else 0
        s0, dp0, out = s_part + (r - first) * PART_ROW, dp_part + (r - first) * PART_ROW, r * (ROWS * 2) + 2 * c
        s1, dp1 = s0 + PART_ROW, dp0 + PART_ROW
        e0, ds0 = _probability(p, f, s0, dp0, 0, shift, delta, c, scale, from0, to0, masked)
        e1, ds1 = _probability(p, f, s0, dp0, W, shift, delta, c + W, scale, from0, to0, masked)
        even = amx.halves(ds0, ds1)
        vstore(p_rows + out, 0, amx.halves(e0, e1))
        vstore(ds_rows + out, 0, even)
        e0, ds0 = _probability(p, f, s1, dp1, 0, shift, delta, c, scale, from1, to1, masked)
        e1, ds1 = _probability(p, f, s1, dp1, W, shift, delta, c + W, scale, from1, to1, masked)
        odd = amx.halves(ds0, ds1)
        vstore(p_rows + ROWS * 2 + out, 0, amx.halves(e0, e1))
        vstore(ds_rows + ROWS * 2 + out, 0, odd)
        strip = ds_pairs + c // W * (KEYS // 2 * amx.STEP_BYTES)
        vstore(strip, r // 2 * W, amx.interleave_low(even, odd))
        vstore(strip + KEYS // 2 * amx.STEP_BYTES, r // 2 * W, amx.interleave_high(even, odd))


@jit
def _no_probabilities(tiles, first, first_column):
    """Where no query sees a key."""
    _, _, p_rows, ds_rows, ds_pairs = tiles
    strip = ds_pairs + first_column // W * (KEYS // 2 * amx.STEP_BYTES)
    for r in range(first, first + amx.STEP):
        vstore(p_rows + r * (ROWS * 2) + 2 * first_column, 0, vzero())
        vstore(ds_rows + r * (ROWS * 2) + 2 * first_column, 0, vzero())
    for r in range(first // 2, (first + amx.STEP) // 2):
        vstore(strip, r * W, vzero())
        vstore(strip + KEYS // 2 * amx.STEP_BYTES, r * W, vzero())


@jit
def _tile_pair(p, f, operands, tiles, block, rows, t0, queries, num_keys, key, valid):
    """Probabilities and score gradients of one block of keys for one block of queries, 32 x 32 at a time: those stay in the L1 cache."""
    k_rows, v_rows, _ = operands
    q_strips, dout_strips, _, _, shift, delta, _ = block
    half_row = _half_row(p)
    steps, strip = half_row // amx.STEP_BYTES, half_row * amx.LANES
    for r in range(0, _whole_steps(valid), amx.STEP):
        for c in range(0, rows, amx.STEP):
            t, last, first_key, end_key = t0 + c, min(t0 + c + amx.STEP, t0 + rows) - 1, key + r, key + r + amx.STEP
            if first_key >= at.end_key(p, last, queries, num_keys) or end_key <= at.first_key(p, t, queries, num_keys):
                _no_probabilities(tiles, r, c)
                continue
            from_k, from_c = r * half_row, c // amx.LANES * strip
            amx.multiply(k_rows + from_k, strip, half_row, amx.STEP_BYTES, q_strips + from_c, strip, tiles[0], PART_ROW, 2, 2, steps, True)
            amx.multiply(v_rows + from_k, strip, half_row, amx.STEP_BYTES, dout_strips + from_c, strip, tiles[1], PART_ROW, 2, 2, steps, True)
            masked = end_key > at.end_key(p, t, queries, num_keys) or first_key < at.first_key(p, last, queries, num_keys)
            _tile_probabilities(p, f, tiles, shift, delta, t0, queries, num_keys, key, valid, r, c, masked)


@jit
def _tile_add_dq(p, k_turned, ds_pairs, dq, rows, valid):
    """dQ turned += K turned times dS"""
    strip = KEYS // 2 * amx.STEP_BYTES
    amx.multiply(k_turned, strip, amx.STEP_BYTES, BLOCK_BYTES, ds_pairs, strip, dq, ROWS * WORD, (p[at.DIM] + amx.LANES - 1) // amx.LANES,
                 _whole_steps(rows) // amx.LANES, _whole_steps(valid) // amx.STEP, False)  # fmt: skip


@jit
def _write_turned(p, f, dq, b, token, h, rows, spare):
    """A block of dQ, turned back; its columns lie in the order of `interleave_low` and `interleave_high`."""
    scale, row_bytes = vset(np.float32(f[at.SCALE])), p[at.HEADS] * p[at.DIM] * 2
    to = p[DQ] + (b * p[at.TOKENS] + token) * row_bytes + h * p[at.DIM] * 2
    for strip in range(0, ROWS // W):
        for d in range(0, p[at.DIM], W):
            transpose(dq + d * (ROWS * WORD) + strip * (W * WORD), ROWS * WORD, spare)
            for c in range(W):
                r = strip // 2 * (2 * W) + c // 4 * 8 + strip % 2 * 4 + c % 4
                if r < rows:
                    amx.store_row(to + r * row_bytes, True, True, d, vmul(vload(spare, c * W), scale), p[at.DIM] - d)


@jit
def _tile_add(p, f, operands, tiles, block, dk, dv, rows, t0, queries, num_keys, key, valid):
    """What a block of queries adds to dK and dV of a block of keys; P and dS are left in their tiles."""
    _tile_pair(p, f, operands, tiles, block, rows, t0, queries, num_keys, key, valid)
    _, _, p_rows, ds_rows, _ = tiles
    _, _, q_columns, dout_columns, _, _, _ = block
    half, row, strip, steps = ROWS * 2, at.padded_dim(p[at.DIM]) * WORD, ROWS // 2 * amx.STEP_BYTES, _whole_steps(rows) // amx.STEP
    row_strips, column_strips = (valid + amx.LANES - 1) // amx.LANES, (p[at.DIM] + amx.LANES - 1) // amx.LANES
    amx.multiply(p_rows, half * amx.LANES, half, amx.STEP_BYTES, dout_columns, strip, dv, row, row_strips, column_strips, steps, False)
    amx.multiply(ds_rows, half * amx.LANES, half, amx.STEP_BYTES, q_columns, strip, dk, row, row_strips, column_strips, steps, False)


@jit
def _tile_key_block(p, f, worker, segment, kv, key):
    b, start = int64_at(segment, at.BATCH), int64_at(segment, at.START)
    queries, num_keys = int64_at(segment, at.QUERIES), int64_at(segment, at.NUM_KEYS)
    group, size = p[at.HEADS] // p[at.KV_HEADS], KEYS * at.padded_dim(p[at.DIM])
    operands, tiles, spare, blocks, dk = _tile_scratch(p, worker)
    dv, block = dk + size * WORD, _block_of_queries(p, blocks, 0)
    _fill_tile_keys(p, b, start + key, kv, min(KEYS, num_keys - key), operands, spare)
    _clear(dk, 2 * size)
    for g in range(group):
        for t0 in range(0, queries, ROWS):
            rows = min(ROWS, queries - t0)
            valid = _visible(p, t0, rows, queries, num_keys, key)
            if valid > 0:
                _fill_tile_queries(p, b, start + t0, kv * group + g, rows, block, spare)
                _tile_add(p, f, operands, tiles, block, dk, dv, rows, t0, queries, num_keys, key, valid)
    return dk, dv


@jit
def _tile_query_block(p, f, worker, segment, h, t0):
    b, start = int64_at(segment, at.BATCH), int64_at(segment, at.START)
    queries, num_keys = int64_at(segment, at.QUERIES), int64_at(segment, at.NUM_KEYS)
    kv, rows = h // (p[at.HEADS] // p[at.KV_HEADS]), min(ROWS, queries - t0)
    operands, tiles, spare, blocks, _ = _tile_scratch(p, worker)
    block = _block_of_queries(p, blocks, 0)
    _fill_tile_queries(p, b, start + t0, h, rows, block, spare)
    for key in range(0, num_keys, KEYS):
        valid = _visible(p, t0, rows, queries, num_keys, key)
        if valid > 0:
            _fill_tile_keys(p, b, start + key, kv, valid, operands, spare)
            _tile_pair(p, f, operands, tiles, block, rows, t0, queries, num_keys, key, valid)
            _tile_add_dq(p, operands[2], tiles[4], block[6], rows, valid)
    return block[6]


@jit
def _tile_together(p, f, worker, segment, kv):
    """As many blocks of queries at a time as stay in the cache, against all blocks of keys, whose dK and dV are all kept."""
    b, start = int64_at(segment, at.BATCH), int64_at(segment, at.START)
    queries, num_keys = int64_at(segment, at.QUERIES), int64_at(segment, at.NUM_KEYS)
    group, size = p[at.HEADS] // p[at.KV_HEADS], KEYS * at.padded_dim(p[at.DIM])
    operands, tiles, spare, blocks, sums = _tile_scratch(p, worker)
    each = (queries + ROWS - 1) // ROWS
    _clear(sums, (num_keys + KEYS - 1) // KEYS * (2 * size))
    for first in range(0, group * each, p[RESIDENT]):
        end = min(group * each, first + p[RESIDENT])
        for i in range(first, end):
            t0 = i % each * ROWS
            _fill_tile_queries(p, b, start + t0, kv * group + i // each, min(ROWS, queries - t0), _block_of_queries(p, blocks, i - first), spare)
        for key in range(0, num_keys, KEYS):
            dk, filled = sums + key // KEYS * (2 * size * WORD), False
            for i in range(first, end):
                t0 = i % each * ROWS
                rows = min(ROWS, queries - t0)
                valid = _visible(p, t0, rows, queries, num_keys, key)
                if valid <= 0:
                    continue
                if not filled:
                    _fill_tile_keys(p, b, start + key, kv, min(KEYS, num_keys - key), operands, spare)
                    filled = True
                block = _block_of_queries(p, blocks, i - first)
                _tile_add(p, f, operands, tiles, block, dk, dk + size * WORD, rows, t0, queries, num_keys, key, valid)
                _tile_add_dq(p, operands[2], tiles[4], block[6], rows, valid)
        for i in range(first, end):
            t0 = i % each * ROWS
            _write_turned(p, f, _block_of_queries(p, blocks, i - first)[6], b, start + t0, kv * group + i // each, min(ROWS, queries - t0), spare)
    for key in range(0, num_keys, KEYS):
        dk = sums + key // KEYS * (2 * size * WORD)
        _write_keys(p, f, segment, kv, key, dk, dk + size * WORD)


# ---- blocks, either way ------------------------------------------------------------------------------------------------


@jit
def _vector_key_block(p, f, worker, segment, kv, key, width):
    b, start = int64_at(segment, at.BATCH), int64_at(segment, at.START)
    queries, num_keys = int64_at(segment, at.QUERIES), int64_at(segment, at.NUM_KEYS)
    group, row, strips = p[at.HEADS] // p[at.KV_HEADS], width * WORD, width // W
    q_rows, dout_rows, s_tile, dp_tile, k_turned, v_turned, k_rows, dk, dv, spare, dq = _scratch(p, worker, width)
    _fill_keys(p, b, start + key, kv, min(KEYS, num_keys - key), k_turned, v_turned, k_rows, spare)
    _clear(dk, KEYS * width)
    _clear(dv, KEYS * width)
    for g in range(group):
        h = kv * group + g
        for t0 in range(0, queries, ROWS):
            rows = min(ROWS, queries - t0)
            valid = _visible(p, t0, rows, queries, num_keys, key)
            if valid <= 0:
                continue
            _fill_queries(p, f, b, start + t0, h, rows, q_rows, dout_rows)
            row_index = (b * p[at.HEADS] + h) * p[at.TOKENS] + start + t0
            _pair(p, f, q_rows, dout_rows, k_turned, v_turned, s_tile, dp_tile, row_index, rows, t0, queries, num_keys, key, valid)
            at.multiply_turned(s_tile, KEYS * WORD, dout_rows, row, dv, row, valid, rows, strips, False)
            at.multiply_turned(dp_tile, KEYS * WORD, q_rows, row, dk, row, valid, rows, strips, False)
            if p[TOGETHER]:
                target = dq + (g * ((queries + ROWS - 1) // ROWS * ROWS) + t0) * row
                at.multiply(dp_tile, KEYS * WORD, k_rows, row, W * WORD, target, row, rows, valid, strips, False)
    return dk, dv


@jit
def _key_block(p, f, worker, segment, kv, key):
    """dk and dv of one block of keys; adds to the gathered dq when TOGETHER."""
    if p[TILES]:
        dk, dv = _tile_key_block(p, f, worker, segment, kv, key)
    else:
        dk, dv = _vector_key_block(p, f, worker, segment, kv, key, at.padded_dim(p[at.DIM]))
    _write_keys(p, f, segment, kv, key, dk, dv)


@jit
def _write_queries(p, f, dq, width, b, token, h, rows):
    head_bytes = p[at.DIM] * (2 if p[at.HALF] else 4)
    to = p[DQ] + ((b * p[at.TOKENS] + token) * p[at.HEADS] + h) * head_bytes
    _write_rows(dq, width, to, p[at.HALF], 0, p[at.HEADS] * head_bytes, rows, p[at.DIM], np.float32(f[at.SCALE]))


@jit
def _vector_query_block(p, f, worker, segment, h, t0, width):
    b, start = int64_at(segment, at.BATCH), int64_at(segment, at.START)
    queries, num_keys = int64_at(segment, at.QUERIES), int64_at(segment, at.NUM_KEYS)
    kv, rows, row = h // (p[at.HEADS] // p[at.KV_HEADS]), min(ROWS, queries - t0), width * WORD
    q_rows, dout_rows, s_tile, dp_tile, k_turned, v_turned, k_rows, _, _, spare, dq = _scratch(p, worker, width)
    _fill_queries(p, f, b, start + t0, h, rows, q_rows, dout_rows)
    _clear(dq, ROWS * width)
    row_index = (b * p[at.HEADS] + h) * p[at.TOKENS] + start + t0
    for key in range(0, num_keys, KEYS):
        valid = _visible(p, t0, rows, queries, num_keys, key)
        if valid > 0:
            _fill_keys(p, b, start + key, kv, valid, k_turned, v_turned, k_rows, spare)
            _pair(p, f, q_rows, dout_rows, k_turned, v_turned, s_tile, dp_tile, row_index, rows, t0, queries, num_keys, key, valid)
            at.multiply(dp_tile, KEYS * WORD, k_rows, row, W * WORD, dq, row, rows, valid, width // W, False)
    return dq


@jit
def _query_block(p, f, worker, segment, h, t0):
    """dq of one block of queries."""
    rows, b, token = min(ROWS, int64_at(segment, at.QUERIES) - t0), int64_at(segment, at.BATCH), int64_at(segment, at.START) + t0
    if p[TILES]:
        dq = _tile_query_block(p, f, worker, segment, h, t0)
        _write_turned(p, f, dq, b, token, h, rows, _tile_scratch(p, worker)[2])
    else:
        width = at.padded_dim(p[at.DIM])
        _write_queries(p, f, _vector_query_block(p, f, worker, segment, h, t0, width), width, b, token, h, rows)


def _together(p, f, task, worker):
    segment, kv = p[at.SEGMENTS] + (task // p[at.KV_HEADS]) * (at.SEGMENT_FIELDS * 8), task % p[at.KV_HEADS]
    if p[TILES]:
        amx.start(p[CONFIGURATION])
        _tile_together(p, f, worker, segment, kv)
        amx.stop()
        return
    queries, num_keys = int64_at(segment, at.QUERIES), int64_at(segment, at.NUM_KEYS)
    group, width = p[at.HEADS] // p[at.KV_HEADS], at.padded_dim(p[at.DIM])
    dq, padded = _scratch(p, worker, width)[10], (queries + ROWS - 1) // ROWS * ROWS
    _clear(dq, group * padded * width)
    for key in range(0, num_keys, KEYS):
        _key_block(p, f, worker, segment, kv, key)
    for g in range(group):
        b, token, h = int64_at(segment, at.BATCH), int64_at(segment, at.START), kv * group + g
        _write_queries(p, f, dq + g * padded * width * WORD, width, b, token, h, queries)


def _apart(p, f, task, worker):
    """TASKS counts blocks of keys for the first KEY_TASKS tasks, BLOCKS those of queries after them."""
    if p[TILES]:
        amx.start(p[CONFIGURATION])
    if task < p[KEY_TASKS]:
        segment = at.find_segment(p, task, at.TASKS)
        local = task - int64_at(segment, at.TASKS)
        blocks = (int64_at(segment, at.NUM_KEYS) + KEYS - 1) // KEYS
        kv, block = at.dealt(local, blocks)
        _key_block(p, f, worker, segment, kv, block * KEYS)
    else:
        segment = at.find_segment(p, task - p[KEY_TASKS], at.BLOCKS)
        local = task - p[KEY_TASKS] - int64_at(segment, at.BLOCKS)
        blocks = (int64_at(segment, at.QUERIES) + ROWS - 1) // ROWS
        h, block = at.dealt(local, blocks)
        _query_block(p, f, worker, segment, h, block * ROWS)
    if p[TILES]:
        amx.stop()


_prepare_kernel, _together_kernel, _apart_kernel = Kernel(_prepare), Kernel(_together, dealt=True), Kernel(_apart, dealt=True)


def _resident_bytes() -> int:
    """Of query blocks: half of what lies nearest behind the L1 cache."""
    return l2_bytes() // 2


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from those of the output and (or None) of the log-sum-exp."""
    shapes, dtype = (tuple(q.shape), tuple(k.shape)), q.dtype
    (batch, tokens, heads, dim), (_, key_tokens, kv_heads, _) = shapes
    if not q.numel() or not k.numel():
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, dk, dv = (torch.empty(x.shape, dtype=dtype) for x in (q, k, v))
    q, k, v, dout = (at.strided(x) for x in (q, k, v, dout))
    out, lse = out.detach().contiguous(), lse.detach().contiguous()
    dlse = None if dlse is None else dlse.detach().float().contiguous()
    delta = torch.empty_like(lse)
    table = at.dense(batch, tokens, key_tokens) if cu_seqlens is None else at.documents(cu_seqlens)
    queries, num_keys = table[:, at.QUERIES], table[:, at.NUM_KEYS]
    key_tasks = at.count(table, at.TASKS, kv_heads * -(-num_keys // KEYS))
    query_tasks = at.count(table, at.BLOCKS, heads * -(-queries // ROWS))

    workers = num_workers("attention", shapes, dtype, pairs=at.visible_pairs(table, causal, window), backward=True)
    width = -(-dim // W) * W
    query_blocks, key_blocks = heads // kv_heads * -(-int(queries.max()) // ROWS), -(-int(num_keys.max()) // KEYS)
    tiles = int(dtype == torch.bfloat16 and scale > 0 and bf16_kernel() == TILES_KERNEL)
    units = len(table) * kv_heads
    gathered = 2 * key_blocks * KEYS * width * WORD if tiles else query_blocks * ROWS * width * WORD
    together = int(gathered <= MAX_GATHERED_BYTES and -(-units // workers) * workers <= MOST_WAITING * units)
    tasks = units if together else key_tasks + query_tasks
    workers = min(workers, tasks)
    if not together:
        query_blocks = key_blocks = 1
    resident = min(query_blocks, max(1, _resident_bytes() // _query_block_bytes_py(dim, width)))
    size = _tile_scratch_bytes(dim, width, resident, key_blocks) if tiles else _scratch_bytes(width, query_blocks * ROWS * width * WORD)
    owner, address = scratch("attention", size * workers)
    ints = [*at.describe(q), *at.describe(k), *at.describe(v), out.data_ptr(), lse.data_ptr(), is_half(q), heads, kv_heads, dim,
            tokens, int(causal), window, table.ctypes.data, len(table), address, size, 0,
            *at.describe(dout), 0 if dlse is None else dlse.data_ptr(), delta.data_ptr(), dq.data_ptr(), dk.data_ptr(),
            dv.data_ptr(), together, key_tasks, key_tokens, tiles, resident, amx.CONFIGURATION]  # fmt: skip
    _prepare_kernel(batch * heads * -(-tokens // ROWS), workers, ints)
    (_together_kernel if together else _apart_kernel)(tasks, workers, ints, (scale, softcap))
    del owner
    return dq, dk, dv
