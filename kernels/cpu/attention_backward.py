"""Attention backward on the CPU: the probabilities are computed again, tile by tile, from the saved log-sum-exp.

Dao 2023, FlashAttention-2, arXiv 2307.08691. An element of dk and dv sums over query heads and blocks of ROWS queries in
order, one of dq over blocks of KEYS keys in order: the same bits whichever of two ways the work is cut.
    together   a task is a key-value head: 5 products for each pair of blocks; dq of its query heads gathers in the scratch
    apart      a task is a block of keys (dk, dv), or a block of queries (dq): 7 products, but many more tasks
"""

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.cpu import attention_amx as amx
from cllm.kernels.cpu import attention_tile as at
from cllm.kernels.cpu.attention_tile import KEYS, WORD
from cllm.kernels.cpu.gemm import TILES as TILES_KERNEL
from cllm.kernels.cpu.gemm import bf16_kernel, block_tiles
from cllm.kernels.cpu.launch import Kernel, float32_at, int64_at, is_half, jit, load, num_workers, put_float32, scratch, store
from cllm.kernels.cpu.micro import BLOCK_BYTES
from cllm.kernels.cpu.pack import F32_ROUNDED_PAIRS, pack_strip
from cllm.kernels.cpu.simd import (
    W,
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
MAX_GATHERED_BYTES = 64 << 20  # of dq in the scratch of one worker

(DOUT, DOUT_BATCH, DOUT_TOKEN, DOUT_HEAD, DLSE, DELTA, DQ, DK, DV, TOGETHER, KEY_TASKS, KEY_TOKENS, TILES, CONFIGURATION) = range(
    at.NUM_SHARED, at.NUM_SHARED + 14
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
            e = at.exp2_of_difference(vfma(s, scale, shift))
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
def _write_rows(source, width, to, half, row_bytes, rows, dim, scale):
    s = vset(scale)
    for r in range(rows):
        for c in range(0, dim, W):
            store(to + r * row_bytes, half, c, vmul(vload(source + r * width * WORD, c), s), dim - c)


@jit
def _clear(address, words):
    for c in range(0, words, W):
        vstore(address, c, vzero())


# ---- the same on AMX tiles: bfloat16 operands, rounded from float32 probabilities and their gradients -----------------


@jit
def _half_row(p):
    """Bytes of a row of bfloat16 that fills whole AMX steps."""
    return (p[at.DIM] + amx.STEP - 1) // amx.STEP * amx.STEP_BYTES


@jit
def _words(k):
    """Words of a strip that holds k rows or columns."""
    return (k + amx.STEP - 1) // amx.STEP * amx.LANES


@jit
def _tile_scratch(p, worker, width):
    """Addresses in a worker's scratch, in the order of _tile_scratch_bytes."""
    rows, tile, half_tile = ROWS * _half_row(p), ROWS * KEYS * WORD, ROWS * KEYS * 2
    q = p[at.SCRATCH] + worker * p[at.SCRATCH_SIZE]
    s = q + 4 * rows
    turned = s + 2 * tile
    keys = turned + 3 * half_tile
    dk = keys + 3 * (KEYS * _half_row(p))
    dv = dk + KEYS * width * WORD
    spare = dv + KEYS * width * WORD
    return (q, q + rows, q + 2 * rows, q + 3 * rows, s, s + tile, turned, turned + half_tile, turned + 2 * half_tile,
            keys, keys + KEYS * _half_row(p), keys + 2 * KEYS * _half_row(p), dk, dv, spare, spare + W * W * WORD)  # fmt: skip


def _tile_scratch_bytes(dim: int, width: int, gathered: int) -> int:
    """Q and dO as rows and as columns; S, dP; P^T, dS^T, dS; K and V as columns of S, K as rows of dQ; dK, dV; a pack block; dQ."""
    half_row = -(-dim // amx.STEP) * amx.STEP_BYTES
    fixed = 4 * ROWS * half_row + 2 * ROWS * KEYS * WORD + 3 * ROWS * KEYS * 2 + 3 * KEYS * half_row + 2 * KEYS * width * WORD
    return -(-(fixed + W * W * WORD + gathered) // 4096) * 4096


@jit
def _tile_keys(p, b, token, kv, rows, k_turned, v_turned, k_rows, spare):
    k = p[at.K] + b * p[at.K_BATCH] + token * p[at.K_TOKEN] + kv * p[at.K_HEAD]
    v = p[at.V] + b * p[at.V_BATCH] + token * p[at.V_TOKEN] + kv * p[at.V_HEAD]
    strips = (rows + amx.LANES - 1) // amx.LANES
    amx.fill_strips_of_rows(k, p[at.K_TOKEN], rows, p[at.DIM], strips, k_turned, spare)
    amx.fill_strips_of_rows(v, p[at.V_TOKEN], rows, p[at.DIM], strips, v_turned, spare)
    amx.fill_strips_of_columns(k, p[at.K_TOKEN], rows, p[at.DIM], KEYS // 2, k_rows, spare)


@jit
def _tile_queries(p, b, token, h, rows, q_rows, q_columns, dout_rows, dout_columns, spare):
    q = p[at.Q] + b * p[at.Q_BATCH] + token * p[at.Q_TOKEN] + h * p[at.Q_HEAD]
    dout = p[DOUT] + b * p[DOUT_BATCH] + token * p[DOUT_TOKEN] + h * p[DOUT_HEAD]
    padded = (rows + amx.LANES - 1) // amx.LANES * amx.LANES
    amx.fill_rows(q, p[at.Q_TOKEN], rows, p[at.DIM], q_rows, _half_row(p), padded)
    amx.fill_rows(dout, p[DOUT_TOKEN], rows, p[at.DIM], dout_rows, _half_row(p), padded)
    amx.fill_strips_of_columns(q, p[at.Q_TOKEN], rows, p[at.DIM], _words(rows), q_columns, spare)
    amx.fill_strips_of_columns(dout, p[DOUT_TOKEN], rows, p[at.DIM], _words(rows), dout_columns, spare)


@jit
def _tile_pair(p, f, q_rows, dout_rows, k_turned, v_turned, s_tile, dp_tile, row_index, rows, t0, queries, num_keys, key, valid):
    half_row = _half_row(p)
    row_strips, strips, steps = (rows + amx.LANES - 1) // amx.LANES, (valid + W - 1) // W, half_row // amx.STEP_BYTES
    amx.multiply(q_rows, half_row, k_turned, half_row * amx.LANES, s_tile, KEYS * WORD, row_strips, strips, steps, True)
    amx.multiply(dout_rows, half_row, v_turned, half_row * amx.LANES, dp_tile, KEYS * WORD, row_strips, strips, steps, True)
    masked = key < at.first_key(p, t0 + rows - 1, queries, num_keys) or key + strips * W > at.end_key(p, t0, queries, num_keys)
    _probabilities(p, f, s_tile, dp_tile, row_index, rows, t0, queries, num_keys, key, strips * W, masked)


@jit
def _tile_turned(tile, rows, valid, target, spare):
    """A tile of float32 [rows][KEYS] -> A operand with a row for each key and k along the queries."""
    words = _words(rows)
    for s in range(0, valid, amx.LANES):
        to = target + s // amx.LANES * words * amx.STEP_BYTES
        pack_strip(F32_ROUNDED_PAIRS, tile + s * WORD, 1, KEYS, min(amx.LANES, valid - s), rows, words, to, spare, True)


@jit
def _tile_add(a, b, b_strip, c, c_row, rows, k, columns):
    """C[rows, columns] += A B with A as _tile_turned leaves it, k of the inner dimension."""
    block_tiles(a, _words(k) * amx.STEP_BYTES, amx.STEP_BYTES, BLOCK_BYTES, b, b_strip, c, c_row, False, c, c_row, _words(k), rows, columns)


@jit
def _tile_add_dq(p, dp_tile, ds, k_rows, dq, row, rows, valid, spare):
    words = _words(valid)
    for r in range(0, rows, amx.LANES):
        to = ds + r // amx.LANES * words * amx.STEP_BYTES
        pack_strip(F32_ROUNDED_PAIRS, dp_tile + r * (KEYS * WORD), KEYS, 1, min(amx.LANES, rows - r), valid, words, to, spare, True)
    _tile_add(ds, k_rows, KEYS // 2 * amx.STEP_BYTES, dq, row, rows, valid, p[at.DIM])


@jit
def _tile_key_block(p, f, worker, segment, kv, key, width):
    b, start = int64_at(segment, at.BATCH), int64_at(segment, at.START)
    queries, num_keys = int64_at(segment, at.QUERIES), int64_at(segment, at.NUM_KEYS)
    group, row = p[at.HEADS] // p[at.KV_HEADS], width * WORD
    (q_rows, q_columns, dout_rows, dout_columns, s_tile, dp_tile, p_turned, ds_turned, ds, k_turned, v_turned, k_rows, dk, dv, spare,
     dq) = _tile_scratch(p, worker, width)  # fmt: skip
    _tile_keys(p, b, start + key, kv, min(KEYS, num_keys - key), k_turned, v_turned, k_rows, spare)
    _clear(dk, KEYS * width)
    _clear(dv, KEYS * width)
    for g in range(group):
        h = kv * group + g
        for t0 in range(0, queries, ROWS):
            rows = min(ROWS, queries - t0)
            valid = _visible(p, t0, rows, queries, num_keys, key)
            if valid <= 0:
                continue
            _tile_queries(p, b, start + t0, h, rows, q_rows, q_columns, dout_rows, dout_columns, spare)
            row_index = (b * p[at.HEADS] + h) * p[at.TOKENS] + start + t0
            _tile_pair(p, f, q_rows, dout_rows, k_turned, v_turned, s_tile, dp_tile, row_index, rows, t0, queries, num_keys, key, valid)
            _tile_turned(s_tile, rows, valid, p_turned, spare)
            _tile_turned(dp_tile, rows, valid, ds_turned, spare)
            strip = _words(rows) * amx.STEP_BYTES
            _tile_add(p_turned, dout_columns, strip, dv, row, valid, rows, p[at.DIM])
            _tile_add(ds_turned, q_columns, strip, dk, row, valid, rows, p[at.DIM])
            if p[TOGETHER]:
                target = dq + (g * ((queries + ROWS - 1) // ROWS * ROWS) + t0) * row
                _tile_add_dq(p, dp_tile, ds, k_rows, target, row, rows, valid, spare)
    return dk, dv


@jit
def _tile_query_block(p, f, worker, segment, h, t0, width):
    b, start = int64_at(segment, at.BATCH), int64_at(segment, at.START)
    queries, num_keys = int64_at(segment, at.QUERIES), int64_at(segment, at.NUM_KEYS)
    kv, rows = h // (p[at.HEADS] // p[at.KV_HEADS]), min(ROWS, queries - t0)
    (q_rows, q_columns, dout_rows, dout_columns, s_tile, dp_tile, _, _, ds, k_turned, v_turned, k_rows, _, _, spare,
     dq) = _tile_scratch(p, worker, width)  # fmt: skip
    _tile_queries(p, b, start + t0, h, rows, q_rows, q_columns, dout_rows, dout_columns, spare)
    _clear(dq, ROWS * width)
    row_index = (b * p[at.HEADS] + h) * p[at.TOKENS] + start + t0
    for key in range(0, num_keys, KEYS):
        valid = _visible(p, t0, rows, queries, num_keys, key)
        if valid > 0:
            _tile_keys(p, b, start + key, kv, valid, k_turned, v_turned, k_rows, spare)
            _tile_pair(p, f, q_rows, dout_rows, k_turned, v_turned, s_tile, dp_tile, row_index, rows, t0, queries, num_keys, key, valid)
            _tile_add_dq(p, dp_tile, ds, k_rows, dq, width * WORD, rows, valid, spare)
    return dq


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
    b, start, width = int64_at(segment, at.BATCH), int64_at(segment, at.START), at.padded_dim(p[at.DIM])
    rows = min(KEYS, int64_at(segment, at.NUM_KEYS) - key)
    if p[TILES]:
        dk, dv = _tile_key_block(p, f, worker, segment, kv, key, width)
    else:
        dk, dv = _vector_key_block(p, f, worker, segment, kv, key, width)
    back = np.float32(abs(f[at.SCALE]))  # the sign is in the queries
    head_bytes = p[at.DIM] * (2 if p[at.HALF] else 4)
    to = ((b * p[KEY_TOKENS] + start + key) * p[at.KV_HEADS] + kv) * head_bytes
    _write_rows(dk, width, p[DK] + to, p[at.HALF], p[at.KV_HEADS] * head_bytes, rows, p[at.DIM], back)
    _write_rows(dv, width, p[DV] + to, p[at.HALF], p[at.KV_HEADS] * head_bytes, rows, p[at.DIM], _ONE)


@jit
def _write_queries(p, f, dq, width, b, token, h, rows):
    head_bytes = p[at.DIM] * (2 if p[at.HALF] else 4)
    to = p[DQ] + ((b * p[at.TOKENS] + token) * p[at.HEADS] + h) * head_bytes
    _write_rows(dq, width, to, p[at.HALF], p[at.HEADS] * head_bytes, rows, p[at.DIM], np.float32(f[at.SCALE]))


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
    width, rows = at.padded_dim(p[at.DIM]), min(ROWS, int64_at(segment, at.QUERIES) - t0)
    if p[TILES]:
        dq = _tile_query_block(p, f, worker, segment, h, t0, width)
    else:
        dq = _vector_query_block(p, f, worker, segment, h, t0, width)
    _write_queries(p, f, dq, width, int64_at(segment, at.BATCH), int64_at(segment, at.START) + t0, h, rows)


def _together(p, f, task, worker):
    segment, kv = p[at.SEGMENTS] + (task // p[at.KV_HEADS]) * (at.SEGMENT_FIELDS * 8), task % p[at.KV_HEADS]
    queries, num_keys = int64_at(segment, at.QUERIES), int64_at(segment, at.NUM_KEYS)
    group, width = p[at.HEADS] // p[at.KV_HEADS], at.padded_dim(p[at.DIM])
    dq = _tile_scratch(p, worker, width)[15] if p[TILES] else _scratch(p, worker, width)[10]
    if p[TILES]:
        amx.start(p[CONFIGURATION])
    padded = (queries + ROWS - 1) // ROWS * ROWS
    _clear(dq, group * padded * width)
    for key in range(0, num_keys, KEYS):
        _key_block(p, f, worker, segment, kv, key)
    for g in range(group):
        token, h = int64_at(segment, at.START), kv * group + g
        _write_queries(p, f, dq + g * padded * width * WORD, width, int64_at(segment, at.BATCH), token, h, queries)
    if p[TILES]:
        amx.stop()


def _apart(p, f, task, worker):
    """TASKS counts blocks of keys for the first KEY_TASKS tasks, BLOCKS those of queries after them."""
    if p[TILES]:
        amx.start(p[CONFIGURATION])
    if task < p[KEY_TASKS]:
        segment = at.find_segment(p, task, at.TASKS)
        local = task - int64_at(segment, at.TASKS)
        blocks = (int64_at(segment, at.NUM_KEYS) + KEYS - 1) // KEYS
        _key_block(p, f, worker, segment, local // blocks, (local % blocks) * KEYS)
    else:
        segment = at.find_segment(p, task - p[KEY_TASKS], at.BLOCKS)
        local = task - p[KEY_TASKS] - int64_at(segment, at.BLOCKS)
        blocks = (int64_at(segment, at.QUERIES) + ROWS - 1) // ROWS
        _query_block(p, f, worker, segment, local // blocks, (local % blocks) * ROWS)
    if p[TILES]:
        amx.stop()


_prepare_kernel, _together_kernel, _apart_kernel = Kernel(_prepare), Kernel(_together), Kernel(_apart)


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

    work = (5.0 if causal else 10.0) * heads * dim * float((queries * num_keys).sum())
    workers = num_workers("attention", shapes, dtype, work)
    width = -(-dim // W) * W
    gathered = heads // kv_heads * -(-int(queries.max()) // ROWS) * ROWS * width * WORD
    units = len(table) * kv_heads
    together = int(gathered <= MAX_GATHERED_BYTES and (units >= 4 * workers or units % workers == 0))
    tasks = units if together else key_tasks + query_tasks
    workers = min(workers, tasks)
    tiles = int(dtype == torch.bfloat16 and scale > 0 and bf16_kernel() == TILES_KERNEL)
    if not together:
        gathered = ROWS * width * WORD
    size = _tile_scratch_bytes(dim, width, gathered) if tiles else _scratch_bytes(width, gathered)
    owner, address = scratch("attention", size * workers)
    ints = [*at.describe(q), *at.describe(k), *at.describe(v), out.data_ptr(), lse.data_ptr(), is_half(q), heads, kv_heads, dim,
            tokens, int(causal), window, table.ctypes.data, len(table), address, size, 0,
            *at.describe(dout), 0 if dlse is None else dlse.data_ptr(), delta.data_ptr(), dq.data_ptr(), dk.data_ptr(),
            dv.data_ptr(), together, key_tasks, key_tokens, tiles, amx.CONFIGURATION]  # fmt: skip
    _prepare_kernel(batch * heads * -(-tokens // ROWS), workers, ints)
    (_together_kernel if together else _apart_kernel)(tasks, workers, ints, (scale, softcap))
    del owner
    return dq, dk, dv
