"""Attention on the CPU. The forward pass is here: tiles of query rows walk over blocks of keys with an online softmax.

Dao 2023, FlashAttention-2, arXiv 2307.08691. B batch, T queries, S keys, H heads, D head dim. A row of the output has the same
bits in a long prefill and in the decoding of one token, for any batch and any number of workers (see attention_tile.py).
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba import attention_amx as amx
from cllm.kernels.numba import attention_tile as at
from cllm.kernels.numba.attention_tile import KEYS, WORD
from cllm.kernels.numba.gemm import TILES as TILES_KERNEL
from cllm.kernels.numba.gemm import bf16_kernel
from cllm.kernels.numba.launch import Kernel, at_most, float32_at, inline, int64_at, is_half, jit, num_workers, put_float32, scratch
from cllm.kernels.numba.simd import (
    W,
    vadd,
    vdiv,
    veq,
    vexp2_normal,
    vfma,
    vlanes_below,
    vload,
    vlog,
    vmax,
    vmul,
    vneg,
    vselect,
    vset,
    vstore,
    vstore_flushed,
    vsub,
    vtanh,
    vzero,
)
from cllm.kernels.operations import Shapes

ROWS = 64  # query rows of a tile: a multiple of at.MR and of amx.LANES

TILES, CONFIGURATION = range(at.NUM_SHARED, at.NUM_SHARED + 2)  # whether AMX multiplies

ROWS_STEP = 16  # rows are filled in groups that both ways of multiplying can read
_ONE, _INFINITY, _LOWEST = np.float32(1.0), np.float32(np.inf), np.float32(-np.inf)
_FORWARD_ROW = 3 * WORD + W * WORD  # running maximum, its new value, correction; W partial sums of the exponentials


@inline
def _row_sizes(width):
    """Bytes of Q (or O) rows, and of scores."""
    return ROWS * width * WORD, ROWS * KEYS * WORD


@jit
def _limit(p, f, scores, rows, num_queries, t0, queries, num_keys, key, columns, masked):
    """Softcap and mask, in the place of the scores."""
    lowest, cap = vset(_LOWEST), vset(np.float32(f[at.SOFTCAP]))
    capped = f[at.SOFTCAP] != 0.0
    inner = vset(np.float32(abs(f[at.SCALE]) / f[at.SOFTCAP] if capped else 1.0))
    for r in range(rows):
        row = scores + r * (KEYS * WORD)
        if capped:
            for c in range(0, columns, W):
                vstore(row, c, vmul(vtanh(vmul(vload(row, c), inner)), cap))
        if masked:
            t = t0 + r % num_queries
            seen_from, seen_to = at.first_key(p, t, queries, num_keys) - key, at.end_key(p, t, queries, num_keys) - key
            for c in range(0, columns, W):
                vstore(row, c, vselect(vlanes_below(seen_to - c), vselect(vlanes_below(seen_from - c), lowest, vload(row, c)), lowest))


@jit
def _maxima(scores, state, rows, columns, factor):
    """Brings the running maximum of every row up to date, in log2 units, and finds what the sums so far are to be multiplied by."""
    largest, shift, correction = state, state + ROWS * WORD, state + 2 * ROWS * WORD
    lowest, scale = vset(_LOWEST), vset(factor)
    for r in range(0, rows, W):
        before = vload(largest, r)
        new = vmax(vmul(at.largest_of_rows(scores + r * (KEYS * WORD), KEYS * WORD, columns // W), scale), before)
        safe = vselect(veq(new, lowest), vzero(), new)  # nothing seen yet: exp2(-inf - 0) = 0
        vstore(correction, r, vexp2_normal(vsub(before, safe)))
        vstore(largest, r, new)
        vstore(shift, r, vneg(safe))


@inline
def _row_of_exponentials(row, columns, scale, minus, total, tiles):
    for c in range(0, columns, W):
        if tiles:
            e = vexp2_normal(vfma(vload(row, c), scale, minus))
            vstore_flushed(row, c, e)  # half as wide as the scores that were there
        else:
            e = vexp2_normal(vfma(vload(row, c), scale, minus))
            vstore(row, c, e)
        total = vadd(total, e)
    return total


@inline
def _exponentials(scores, state, out, width, rows, columns, factor, tiles, begins):
    """Scores -> exponentials in their place, which their sums grow by; corrects the sums, and the output unless it begins."""
    shift, correction, sums = state + ROWS * WORD, state + 2 * ROWS * WORD, state + 3 * ROWS * WORD
    scale = vset(factor)
    for r in range(rows):
        row, minus, by = scores + r * (KEYS * WORD), vset(float32_at(shift, r)), float32_at(correction, r)
        total = vmul(vload(sums, r * W), vset(by))
        if columns == KEYS:
            total = _row_of_exponentials(row, KEYS, scale, minus, total, tiles)
        else:
            total = _row_of_exponentials(row, columns, scale, minus, total, tiles)
        vstore(sums, r * W, total)
        if by != _ONE and not begins:
            for c in range(0, width, W):
                vstore(out + r * width * WORD, c, vmul(vload(out + r * width * WORD, c), vset(by)))


@jit
def _finish(p, state, out, width, rows, num_queries, b, t0, head):
    """Divide rows by their sums and write them, with their log-sum-exps."""
    largest, inverse, lse, sums = state, state + ROWS * WORD, state + 2 * ROWS * WORD, state + 3 * ROWS * WORD
    for r in range(0, rows, W):
        total = at.sums_of_rows(sums + r * (W * WORD))
        vstore(inverse, r, vdiv(vset(_ONE), total))
        vstore(lse, r, vfma(vload(largest, r), vset(np.float32(at.LN_2)), vlog(total)))
    size, dim = 2 if p[at.HALF] else 4, p[at.DIM]
    for r in range(rows):
        t, h, by = t0 + r % num_queries, head + r // num_queries, float32_at(inverse, r)
        to = p[at.OUT] + ((b * p[at.TOKENS] + t) * p[at.HEADS] + h) * dim * size
        nothing, times = by == _INFINITY, vset(by)
        for c in range(0, dim, W):
            v = vzero() if nothing else vmul(vload(out + r * width * WORD, c), times)
            amx.store_row(to, p[at.HALF], p[TILES], c, v, dim - c)
        put_float32(p[at.LSE], (b * p[at.HEADS] + h) * p[at.TOKENS] + t, float32_at(lse, r))


@inline
def _pair_strips(keys):
    """Strips of 16 keys that fill whole AMX steps of 32 keys."""
    return (keys + amx.STEP - 1) // amx.STEP * 2


@jit
def _pack_block(p, b, token, kv, rows, target, width, spare):
    k = p[at.K] + b * p[at.K_BATCH] + token * p[at.K_TOKEN] + kv * p[at.K_HEAD]
    v = p[at.V] + b * p[at.V_BATCH] + token * p[at.V_TOKEN] + kv * p[at.V_HEAD]
    if p[TILES]:
        amx.fill_strips_of_rows(k, p[at.K_TOKEN], rows, p[at.DIM], _pair_strips(rows), target, spare)
        amx.fill_strips_of_columns(v, p[at.V_TOKEN], rows, p[at.DIM], KEYS // 2, target + KEYS * width * WORD, spare)
        return
    at.fill_strips(k, p[at.HALF], p[at.K_TOKEN], rows, p[at.DIM], target, spare)
    at.fill_rows(v, p[at.HALF], p[at.V_TOKEN], rows, p[at.DIM], target + KEYS * width * WORD, _ONE, rows)


def _pack(p, f, task, worker):
    """One key block of one key-value head, for all the query tiles that will read it."""
    segment = at.find_segment(p, task, at.TASKS)
    num_keys, width = int64_at(segment, at.NUM_KEYS), at.padded_dim(p[at.DIM])
    blocks = (num_keys + KEYS - 1) // KEYS
    local = task - int64_at(segment, at.TASKS)
    key, kv = (local % blocks) * KEYS, local // blocks
    target = p[at.PACKED] + task * (2 * KEYS * width * WORD)
    spare = p[at.SCRATCH] + worker * p[at.SCRATCH_SIZE]
    token = int64_at(segment, at.START) + key
    _pack_block(p, int64_at(segment, at.BATCH), token, kv, min(KEYS, num_keys - key), target, width, spare)


@jit
def _block_of_keys(p, segment, kv, block, valid, own_block):
    """Where a block of keys lies packed: for all tiles, or now for this one."""
    width, num_keys = at.padded_dim(p[at.DIM]), int64_at(segment, at.NUM_KEYS)
    size = 2 * KEYS * width * WORD
    if p[at.PACKED] != 0:
        return p[at.PACKED] + (int64_at(segment, at.BLOCKS) + kv * ((num_keys + KEYS - 1) // KEYS) + block) * size
    token = int64_at(segment, at.START) + block * KEYS
    _pack_block(p, int64_at(segment, at.BATCH), token, kv, valid, own_block, width, own_block + size)
    return own_block


@jit
def _walk(p, f, segment, kv, q, out, scores, state, own_block, rows, num_queries, t0):
    """All blocks of keys that a tile of queries sees, one after the other."""
    queries, num_keys, width = int64_at(segment, at.QUERIES), int64_at(segment, at.NUM_KEYS), at.padded_dim(p[at.DIM])
    factor, row, scores_row, tiles = np.float32(at.log2_factor(f)), width * WORD, KEYS * WORD, p[TILES]
    last = t0 + num_queries - 1
    end = at.end_key(p, last, queries, num_keys)
    open_from, open_to = at.first_key(p, last, queries, num_keys), at.end_key(p, t0, queries, num_keys)
    first_block = at.first_key(p, t0, queries, num_keys) // KEYS
    for block in range(first_block, (end + KEYS - 1) // KEYS):
        key = block * KEYS
        valid, begins = min(KEYS, end - key), block == first_block
        packed = _block_of_keys(p, segment, kv, block, valid, own_block)
        if tiles:
            columns = (valid + amx.STEP - 1) // amx.STEP * amx.STEP
            _tile_scores(p, q, packed, scores, rows, columns)
        else:
            columns = (valid + W - 1) // W * W
            at.multiply(q, row, packed, W * WORD, row * W, scores, scores_row, rows, p[at.DIM], columns // W, True)
        masked = key < open_from or key + columns > open_to
        if masked or f[at.SOFTCAP] != 0.0:
            _limit(p, f, scores, rows, num_queries, t0, queries, num_keys, key, columns, masked)
        _maxima(scores, state, rows, columns, factor)
        if tiles:
            _exponentials(scores, state, out, width, rows, columns, factor, True, begins)
            _tile_outputs(p, scores, packed + KEYS * row, out, rows, columns, begins)
        else:
            _exponentials(scores, state, out, width, rows, columns, factor, False, begins)
            at.multiply(scores, scores_row, packed + KEYS * row, row, W * WORD, out, row, rows, valid, width // W, begins)


@inline
def _tile_scores(p, q, packed, scores, rows, columns):
    half_row, row_strips = (p[at.DIM] + amx.STEP - 1) // amx.STEP * amx.STEP_BYTES, (rows + amx.LANES - 1) // amx.LANES
    strip = half_row * amx.LANES
    amx.multiply(q, strip, half_row, amx.STEP_BYTES, packed, strip, scores, KEYS * WORD, row_strips, columns // amx.LANES,
                 half_row // amx.STEP_BYTES, True)  # fmt: skip


@inline
def _tile_outputs(p, scores, values, out, rows, columns, begins):
    row, row_strips, strips = KEYS * WORD, (rows + amx.LANES - 1) // amx.LANES, (p[at.DIM] + amx.LANES - 1) // amx.LANES
    amx.multiply(scores, row * amx.LANES, row, amx.STEP_BYTES, values, KEYS // 2 * amx.STEP_BYTES, out, at.padded_dim(p[at.DIM]) * WORD, row_strips,
                 strips, columns // amx.STEP, begins)  # fmt: skip


def _forward(p, f, task, worker):
    """One tile: rows are num_queries queries of each of num_heads heads that share a key-value head."""
    segment = at.find_segment(p, task, at.TASKS)
    b, start = int64_at(segment, at.BATCH), int64_at(segment, at.START)
    queries = int64_at(segment, at.QUERIES)
    local = task - int64_at(segment, at.TASKS)
    group = p[at.HEADS] // p[at.KV_HEADS]
    tile_queries = min(queries, ROWS)
    tile_heads = min(group, ROWS // tile_queries)
    tiles, parts = (queries + tile_queries - 1) // tile_queries, (group + tile_heads - 1) // tile_heads
    row, tile = at.dealt(local, tiles)
    kv, head, t0 = row // parts, row % parts * tile_heads, tile * tile_queries
    num_queries, num_heads = min(tile_queries, queries - t0), min(tile_heads, group - head)
    rows, head = num_queries * num_heads, head + kv * group

    width = at.padded_dim(p[at.DIM])
    q_size, scores_size = _row_sizes(width)
    q = p[at.SCRATCH] + worker * p[at.SCRATCH_SIZE]
    out, scores = q + q_size, q + 2 * q_size
    state = scores + scores_size
    own_block = state + ROWS * _FORWARD_ROW
    sign = at.scale_sign(f)
    all_rows = (rows + ROWS_STEP - 1) // ROWS_STEP * ROWS_STEP
    half_row = (p[at.DIM] + amx.STEP - 1) // amx.STEP * amx.STEP_BYTES
    for i in range(num_heads):
        source = p[at.Q] + b * p[at.Q_BATCH] + (start + t0) * p[at.Q_TOKEN] + (head + i) * p[at.Q_HEAD]
        filled = num_queries if i < num_heads - 1 else all_rows - i * num_queries
        if p[TILES]:
            amx.fill_rows(source, p[at.Q_TOKEN], num_queries, p[at.DIM], q + i * num_queries * half_row, half_row, filled)
        else:
            target = q + i * num_queries * width * WORD
            at.fill_rows(source, p[at.HALF], p[at.Q_TOKEN], num_queries, p[at.DIM], target, sign, filled)
    if p[TILES]:
        amx.start(p[CONFIGURATION])
    for r in range(0, ROWS, W):
        vstore(state, r, vset(_LOWEST))
    for r in range(ROWS):
        vstore(state + 3 * ROWS * WORD, r * W, vzero())

    _walk(p, f, segment, kv, q, out, scores, state, own_block, rows, num_queries, t0)
    if p[TILES]:
        amx.stop()
    _finish(p, state, out, width, rows, num_queries, b, start + t0, head)


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See attention_backward.py, which is loaded and compiled when first needed."""
    from cllm.kernels.numba import attention_backward

    return attention_backward.backward(*args)


_pack_kernel, _forward_kernel = Kernel(_pack), Kernel(_forward, dealt=True)


class _Grid(NamedTuple):
    """The tasks of one call."""

    table: np.ndarray  # segments; TASKS counts tiles of queries
    pack_table: np.ndarray  # the same; TASKS counts blocks of keys
    tasks: int
    blocks: int


def _grid(table: np.ndarray, heads: int, kv_heads: int) -> _Grid:
    queries, num_keys, group = table[:, at.QUERIES], table[:, at.NUM_KEYS], heads // kv_heads
    pack_table, num_blocks = table.copy(), kv_heads * -(-num_keys // KEYS)
    blocks = at.count(pack_table, at.TASKS, num_blocks)
    at.count(table, at.BLOCKS, num_blocks)
    tile_queries = np.clip(queries, 1, ROWS)
    parts = -(-group // np.minimum(group, ROWS // tile_queries))
    tasks = at.count(table, at.TASKS, kv_heads * parts * -(-queries // tile_queries))
    return _Grid(table, pack_table, tasks, blocks)


@lru_cache(maxsize=256)
def _dense_grid(batch: int, queries: int, num_keys: int, heads: int, kv_heads: int) -> _Grid:
    return _grid(at.dense(batch, queries, num_keys), heads, kv_heads)


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers the forward pass uses."""
    (batch, queries, heads, dim), (_, num_keys, kv_heads, _) = shapes if len(shapes) == 2 else (*shapes, *shapes)
    return at_most(planned, _dense_grid(batch, queries, num_keys, heads, kv_heads).tasks) if dim else 1


def work_bytes(dim: int) -> int:
    """Work space of one worker of the forward pass."""
    width = -(-dim // W) * W
    size = 2 * ROWS * width * WORD + ROWS * (KEYS * WORD + _FORWARD_ROW) + 2 * KEYS * width * WORD + W * W * WORD
    return -(-size // 4096) * 4096


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, S, Hkv, D), any strides -> output (B, T, H, D) and log-sum-exp (B, H, T) float32."""
    shapes, dtype = (tuple(q.shape), tuple(k.shape)), q.dtype
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    out = torch.empty(q.shape, dtype=dtype)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32)
    if not out.numel():
        return out, lse
    q, k, v = at.strided(q), at.strided(k), at.strided(v)
    if cu_seqlens is None:
        grid = _dense_grid(batch, tokens, k.shape[1], heads, kv_heads)
        planned = num_workers("attention", shapes, dtype, causal=causal, window=window)
    else:
        grid = _grid(at.documents(cu_seqlens), heads, kv_heads)
        planned = num_workers("attention", shapes, dtype, pairs=at.visible_pairs(grid.table, causal, window))
    workers = at_most(planned, grid.tasks)
    block_size, size = KEYS * (-(-dim // W) * W) * WORD, work_bytes(dim)
    owner, address = scratch("attention", size * workers)
    tiles = int(dtype == torch.bfloat16 and scale > 0 and bf16_kernel() == TILES_KERNEL)
    packed = 0
    if grid.tasks > kv_heads * len(grid.table):  # several tiles read each block
        packed_owner, packed = scratch("attention keys", 2 * block_size * grid.blocks)
    ints = [*at.describe(q), *at.describe(k), *at.describe(v), out.data_ptr(), lse.data_ptr(), is_half(q), heads, kv_heads, dim,
            tokens, int(causal), window, grid.pack_table.ctypes.data, len(grid.table), address, size, packed, tiles, amx.CONFIGURATION]  # fmt: skip
    if packed:
        _pack_kernel(grid.blocks, workers, ints)
    ints[at.SEGMENTS] = grid.table.ctypes.data
    _forward_kernel(grid.tasks, workers, ints, (scale, softcap))
    del owner
    if packed:
        del packed_owner
    return out, lse
