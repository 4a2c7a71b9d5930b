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
from cllm.kernels.numba.attention_tile import KEYS, SEGMENT, WORD, F, P
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.gemm import TILES as TILES_KERNEL
from cllm.kernels.numba.gemm import bf16_kernel
from cllm.kernels.numba.int8_rows import dequantize_rows
from cllm.kernels.numba.launch import Kernel, at_most, float32_at, hold, inline, int64_at, jit, num_workers, put_float32, scratch
from cllm.kernels.numba.micro import CONFIGURATION, HAS_TILES
from cllm.kernels.numba.simd import (
    W,
    vadd,
    vdiv,
    veq,
    vexp2_normal,
    vfma,
    vlanes_below,
    vload,
    vload_bf16,
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
from cllm.runtime.workers import recorder

ROWS = 64  # a tile has this many rows of queries: a multiple of at.MR and of amx.LANES


class _Own(NamedTuple):
    """What the forward kernels read behind the shared arguments."""

    tiles: int  # whether AMX multiplies
    configuration: int  # of the AMX tiles, an address
    pack_segments: int = 0  # a table of segments that counts blocks of keys in `tasks`, for the packing


class _State(NamedTuple):
    """Addresses of what a tile keeps for its rows while it walks over the keys, in float32."""

    largest: int  # the running maximum, in log2 units
    shift: int  # minus that maximum, or 0 where nothing was seen yet
    correction: int  # what the sums and outputs so far are multiplied with
    sums: int  # W partial sums of the exponentials


class _WorkSpace(NamedTuple):
    """Addresses in the work space of one worker."""

    q: int
    out: int
    scores: int
    state: int
    kept: int  # what dropout makes of a row of probabilities
    own_block: int  # a block of keys and values that this worker packed


OWN, own_arguments = fields(_Own, start=len(P))

ROWS_STEP = 16  # a tile is filled up to a multiple of this many rows, which vectors and AMX tiles can both read
_ONE, _INFINITY, _LOWEST = np.float32(1.0), np.float32(np.inf), np.float32(-np.inf)
_STATE_BYTES = (3 + W) * ROWS * WORD
_SPARE_BYTES = W * W * WORD


@inline
def _state(address):
    row = ROWS * WORD
    return _State(largest=address, shift=address + row, correction=address + 2 * row, sums=address + 3 * row)


@inline
def _work_space(p, worker):
    rows = ROWS * at.padded_dim(p[P.dim]) * WORD
    q = p[P.scratch] + worker * p[P.scratch_size]
    scores = q + 2 * rows
    state = scores + ROWS * KEYS * WORD
    kept = state + _STATE_BYTES
    return _WorkSpace(q=q, out=q + rows, scores=scores, state=state, kept=kept, own_block=kept + at.KEPT_BYTES)


def work_bytes(dim: int) -> int:
    """Bytes of `_work_space`: two tiles of rows, scores, the state, a row of dropout, and a block of keys and values with room for what `_pack_block`
    needs besides: one more W x W, and the rows of a block that was int8."""
    width = -(-dim // W) * W
    size = 2 * ROWS * width * WORD + ROWS * KEYS * WORD + _STATE_BYTES + at.KEPT_BYTES + 3 * KEYS * width * WORD + _SPARE_BYTES
    return -(-size // 4096) * 4096


@jit
def _limit(p, f, scores, rows, num_queries, t0, queries, num_keys, key, columns, masked):
    """Softcap and mask, in the place of the scores."""
    lowest, cap = vset(_LOWEST), vset(np.float32(f[F.softcap]))
    capped = f[F.softcap] != 0.0
    inner = vset(np.float32(abs(f[F.scale]) / f[F.softcap] if capped else 1.0))
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
def _maxima(scores, state_address, rows, columns, factor):
    """Updates the running maximum of every row, and with it the shift of its scores and the correction of its sums so far."""
    state = _state(state_address)
    lowest, scale = vset(_LOWEST), vset(factor)
    for r in range(0, rows, W):
        before = vload(state.largest, r)
        new = vmax(vmul(at.largest_of_rows(scores + r * (KEYS * WORD), KEYS * WORD, columns // W), scale), before)
        safe = vselect(veq(new, lowest), vzero(), new)  # nothing seen yet: exp2(-inf - 0) = 0
        vstore(state.correction, r, vexp2_normal(vsub(before, safe)))
        vstore(state.largest, r, new)
        vstore(state.shift, r, vneg(safe))


@inline
def _row_of_exponentials(row, columns, scale, minus, total, tiles):
    for c in range(0, columns, W):
        if HAS_TILES and tiles:
            e = vexp2_normal(vfma(vload(row, c), scale, minus))
            vstore_flushed(row, c, e)  # half as wide as the scores that were there
        else:
            e = vexp2_normal(vfma(vload(row, c), scale, minus))
            vstore(row, c, e)
        total = vadd(total, e)
    return total


@inline
def _exponentials(scores, state_address, out, width, rows, columns, factor, tiles, begins):
    """Replaces the scores by their exponentials and adds these to the sums, after correcting the sums and, unless it begins here, the output."""
    state = _state(state_address)
    scale = vset(factor)
    for r in range(rows):
        row, minus, by = scores + r * (KEYS * WORD), vset(float32_at(state.shift, r)), float32_at(state.correction, r)
        total = vmul(vload(state.sums, r * W), vset(by))
        if columns == KEYS:
            total = _row_of_exponentials(row, KEYS, scale, minus, total, tiles)
        else:
            total = _row_of_exponentials(row, columns, scale, minus, total, tiles)
        vstore(state.sums, r * W, total)
        if by != _ONE and not begins:
            for c in range(0, width, W):
                vstore(out + r * width * WORD, c, vmul(vload(out + r * width * WORD, c), vset(by)))


@jit
def _drop(p, segment, scores, space, rows, num_queries, t0, head, key, columns, tiles):
    """Zeroes the exponentials that dropout drops; the sums hold all of them, and `_finish` scales what is kept."""
    b, start = int64_at(segment, SEGMENT.batch), int64_at(segment, SEGMENT.start)
    element = at.first_element(p, start, key)
    for r in range(rows):
        row, token, h = scores + r * (KEYS * WORD), start + t0 + r % num_queries, head + r // num_queries
        kept = at.kept_row(p, space, _ONE, b, token, h, element, columns)
        for c in range(0, columns, W):
            if HAS_TILES and tiles:
                vstore_flushed(row, c, vmul(vload_bf16(row, c), vload(kept, c)))
            else:
                vstore(row, c, vmul(vload(row, c), vload(kept, c)))


@jit
def _finish(p, f, state_address, out, width, rows, num_queries, b, t0, head):
    """Divide rows by their sums and write them, with their log-sum-exps."""
    state = _state(state_address)
    inverse, lse = state.shift, state.correction  # which are no longer needed
    for r in range(0, rows, W):
        total = at.sums_of_rows(state.sums + r * (W * WORD))
        vstore(inverse, r, vdiv(vset(np.float32(f[F.kept])), total))
        vstore(lse, r, vfma(vload(state.largest, r), vset(np.float32(at.LN_2)), vlog(total)))
    size, dim = 2 if p[P.half] else 4, p[P.dim]
    for r in range(rows):
        t, h, by = t0 + r % num_queries, head + r // num_queries, float32_at(inverse, r)
        to = p[P.out] + ((b * p[P.tokens] + t) * p[P.heads] + h) * dim * size
        nothing, times = by == _INFINITY, vset(by)
        for c in range(0, dim, W):
            v = vzero() if nothing else vmul(vload(out + r * width * WORD, c), times)
            amx.store_row(to, p[P.half], p[OWN.tiles], c, v, dim - c)
        put_float32(p[P.lse], (b * p[P.heads] + h) * p[P.tokens] + t, float32_at(lse, r))


@inline
def _pair_strips(keys):
    """Strips of 16 keys that fill whole AMX steps of 32 keys."""
    return (keys + amx.STEP - 1) // amx.STEP * 2


@inline
def _as_numbers(p, source, source_row, scales, token, kv, rows, target):
    """(address, bytes from row to row) of a block's rows as `half` says: where they are, or at `target` if they are int8."""
    if scales == 0:
        return source, source_row
    dequantize_rows(source, source_row, scales + (token * p[P.kv_heads] + kv) * WORD, p[P.kv_heads] * WORD, rows, p[P.dim], p[P.half], target)
    return target, p[P.dim] * (2 if p[P.half] else WORD)


@jit
def _pack_block(p, b, token, kv, rows, target, width, spare, with_values):
    k = p[P.k] + b * p[P.k_batch] + token * p[P.k_token] + kv * p[P.k_head]
    v = p[P.v] + b * p[P.v_batch] + token * p[P.v_token] + kv * p[P.v_head]
    values, numbers = target + KEYS * width * WORD, spare + _SPARE_BYTES
    k, k_row = _as_numbers(p, k, p[P.k_token], p[P.k_scales], token, kv, rows, numbers)
    if HAS_TILES and p[OWN.tiles]:
        amx.fill_strips_of_rows(k, k_row, rows, p[P.dim], _pair_strips(rows), target, spare)
        v, v_row = _as_numbers(p, v, p[P.v_token], p[P.v_scales], token, kv, rows, numbers)
        amx.fill_strips_of_columns(v, v_row, rows, p[P.dim], KEYS // 2, values, spare)
        return
    at.fill_strips(k, p[P.half], k_row, rows, p[P.dim], target, spare)
    v, v_row = _as_numbers(p, v, p[P.v_token], p[P.v_scales], token, kv, rows, numbers)
    if with_values:
        at.fill_rows(v, p[P.half], v_row, rows, p[P.dim], values, _ONE, rows)


def _pack(p, f, task, worker):
    """One key block of one key-value head, for all the query tiles that will read it."""
    segment = at.find_segment(p[OWN.pack_segments], p[P.num_segments], task, SEGMENT.tasks)
    num_keys, width, first = int64_at(segment, SEGMENT.num_keys), at.padded_dim(p[P.dim]), int64_at(segment, SEGMENT.first_block)
    blocks = (num_keys + KEYS - 1) // KEYS - first
    local = task - int64_at(segment, SEGMENT.tasks)
    block, kv = first + local % blocks, local // blocks
    target = p[P.packed] + task * (2 * KEYS * width * WORD)
    spare = p[P.scratch] + worker * p[P.scratch_size]
    valid = min(KEYS, num_keys - block * KEYS)
    _pack_block(p, int64_at(segment, SEGMENT.batch), at.first_token(segment, block), kv, valid, target, width, spare, True)


@jit
def _block_of_keys(p, segment, kv, block, valid, own_block, with_values):
    """Where a block of keys lies packed: for all tiles, or now for this one, then on demand with its values."""
    width, num_keys = at.padded_dim(p[P.dim]), int64_at(segment, SEGMENT.num_keys)
    size = 2 * KEYS * width * WORD
    if p[P.packed] != 0 and int64_at(segment, SEGMENT.blocks) >= 0:
        first = int64_at(segment, SEGMENT.first_block)
        return p[P.packed] + (int64_at(segment, SEGMENT.blocks) + kv * ((num_keys + KEYS - 1) // KEYS - first) + block - first) * size
    _pack_block(p, int64_at(segment, SEGMENT.batch), at.first_token(segment, block), kv, valid, own_block, width, own_block + size, with_values)
    return own_block


@jit
def _walk(p, f, segment, kv, space, rows, num_queries, t0, head):
    """All blocks of keys that a tile of queries sees, one after the other."""
    q, out, scores, state, own_block = space.q, space.out, space.scores, space.state, space.own_block
    queries, num_keys, width = int64_at(segment, SEGMENT.queries), int64_at(segment, SEGMENT.num_keys), at.padded_dim(p[P.dim])
    factor, row, scores_row, tiles = np.float32(at.log2_factor(f)), width * WORD, KEYS * WORD, p[OWN.tiles]
    in_int8, of_all_tiles = p[P.v_scales] != 0, p[P.packed] != 0 and int64_at(segment, SEGMENT.blocks) >= 0
    values_in_place = not tiles and p[P.half] != 0 and rows <= at.MOST_FEW and width == p[P.dim] and not (in_int8 and of_all_tiles)
    last = t0 + num_queries - 1
    end = at.end_key(p, last, queries, num_keys)
    open_from, open_to = at.first_key(p, last, queries, num_keys), at.end_key(p, t0, queries, num_keys)
    first_block = at.first_key(p, t0, queries, num_keys) // KEYS
    for block in range(first_block, (end + KEYS - 1) // KEYS):
        key = block * KEYS
        valid, begins = min(KEYS, end - key), block == first_block
        packed = _block_of_keys(p, segment, kv, block, valid, own_block, not values_in_place)
        if HAS_TILES and tiles:
            columns = (valid + amx.STEP - 1) // amx.STEP * amx.STEP
            _tile_scores(p, q, packed, scores, rows, columns)
        else:
            columns = (valid + W - 1) // W * W
            at.multiply(q, row, packed, W * WORD, row * W, scores, scores_row, rows, p[P.dim], columns // W, True)
        masked = key < open_from or key + columns > open_to
        if masked or f[F.softcap] != 0.0:
            _limit(p, f, scores, rows, num_queries, t0, queries, num_keys, key, columns, masked)
        _maxima(scores, state, rows, columns, factor)
        if HAS_TILES and tiles:
            _exponentials(scores, state, out, width, rows, columns, factor, True, begins)
            if p[P.dropped] != 0:
                _drop(p, segment, scores, space.kept, rows, num_queries, t0, head, key, columns, True)
            _tile_outputs(p, scores, packed + KEYS * row, out, rows, columns, begins)
        else:
            _exponentials(scores, state, out, width, rows, columns, factor, False, begins)
            if p[P.dropped] != 0:
                _drop(p, segment, scores, space.kept, rows, num_queries, t0, head, key, columns, False)
            if values_in_place:
                token = at.first_token(segment, block) * p[P.v_token]
                values = p[P.v] + int64_at(segment, SEGMENT.batch) * p[P.v_batch] + token + kv * p[P.v_head]
                values_row = p[P.v_token]
                if in_int8:  # where `_pack_block` has left them
                    values, values_row = own_block + 2 * KEYS * row + _SPARE_BYTES, p[P.dim] * 2
                at.multiply_half(scores, scores_row, values, values_row, out, row, rows, valid, width // W, begins)
            else:
                at.multiply(scores, scores_row, packed + KEYS * row, row, W * WORD, out, row, rows, valid, width // W, begins)


@inline
def _tile_scores(p, q, packed, scores, rows, columns):
    half_row, row_strips = (p[P.dim] + amx.STEP - 1) // amx.STEP * amx.STEP_BYTES, (rows + amx.LANES - 1) // amx.LANES
    strip = half_row * amx.LANES
    amx.multiply(q, strip, half_row, amx.STEP_BYTES, packed, strip, scores, KEYS * WORD, row_strips, columns // amx.LANES,
                 half_row // amx.STEP_BYTES, True)  # fmt: skip


@inline
def _tile_outputs(p, scores, values, out, rows, columns, begins):
    row, row_strips, strips = KEYS * WORD, (rows + amx.LANES - 1) // amx.LANES, (p[P.dim] + amx.LANES - 1) // amx.LANES
    amx.multiply(scores, row * amx.LANES, row, amx.STEP_BYTES, values, KEYS // 2 * amx.STEP_BYTES, out, at.padded_dim(p[P.dim]) * WORD, row_strips,
                 strips, columns // amx.STEP, begins)  # fmt: skip


def _forward(p, f, task, worker):
    """One tile: rows are num_queries queries of each of num_heads heads that share a key-value head."""
    segment = at.find_segment(p[P.segments], p[P.num_segments], task, SEGMENT.tasks)
    b, start = int64_at(segment, SEGMENT.batch), int64_at(segment, SEGMENT.start)
    queries = int64_at(segment, SEGMENT.queries)
    local = task - int64_at(segment, SEGMENT.tasks)
    group = p[P.heads] // p[P.kv_heads]
    tile_queries = min(queries, ROWS)
    tile_heads = min(group, ROWS // tile_queries)
    tiles, parts = (queries + tile_queries - 1) // tile_queries, (group + tile_heads - 1) // tile_heads
    row, tile = at.dealt(local, tiles)
    kv, head, t0 = row // parts, row % parts * tile_heads, tile * tile_queries
    num_queries, num_heads = min(tile_queries, queries - t0), min(tile_heads, group - head)
    rows, head = num_queries * num_heads, head + kv * group

    width, space = at.padded_dim(p[P.dim]), _work_space(p, worker)
    sign = at.scale_sign(f)
    all_rows = (rows + ROWS_STEP - 1) // ROWS_STEP * ROWS_STEP
    half_row = (p[P.dim] + amx.STEP - 1) // amx.STEP * amx.STEP_BYTES
    for i in range(num_heads):
        source = p[P.q] + b * p[P.q_batch] + (start + t0) * p[P.q_token] + (head + i) * p[P.q_head]
        filled = num_queries if i < num_heads - 1 else all_rows - i * num_queries
        if HAS_TILES and p[OWN.tiles]:
            amx.fill_rows(source, p[P.q_token], num_queries, p[P.dim], space.q + i * num_queries * half_row, half_row, filled)
        else:
            target = space.q + i * num_queries * width * WORD
            at.fill_rows(source, p[P.half], p[P.q_token], num_queries, p[P.dim], target, sign, filled)
    if HAS_TILES and p[OWN.tiles]:
        amx.start(p[OWN.configuration])
    state = _state(space.state)
    for r in range(0, ROWS, W):
        vstore(state.largest, r, vset(_LOWEST))
    for r in range(ROWS):
        vstore(state.sums, r * W, vzero())

    _walk(p, f, segment, kv, space, rows, num_queries, t0, head)
    if HAS_TILES and p[OWN.tiles]:
        amx.stop()
    _finish(p, f, space.state, space.out, width, rows, num_queries, b, start + t0, head)


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See attention_backward.py, which is loaded and compiled when first needed."""
    from cllm.kernels.numba import attention_backward

    return attention_backward.backward(*args)


_pack_kernel, _forward_kernel = Kernel(_pack), Kernel(_forward, uneven=True)


class Grid(NamedTuple):
    """The tasks of one call."""

    table: np.ndarray  # segments; TASKS counts tiles of queries, BLOCKS is -1 where one tile reads a block of keys and packs it itself
    pack_table: np.ndarray  # the same; TASKS counts blocks of keys to be packed for all tiles
    counts: np.ndarray  # int64: how many tasks there are, and how many blocks of keys to be packed

    @property
    def tasks(self) -> int:
        return int(self.counts[0])

    @property
    def blocks(self) -> int:
        return int(self.counts[1])


def grid_of(table: np.ndarray, heads: int, kv_heads: int) -> Grid:
    """Fills TASKS and BLOCKS of a table of segments."""
    queries, num_keys, group = table[:, SEGMENT.queries], table[:, SEGMENT.num_keys], heads // kv_heads
    tile_queries = np.clip(queries, 1, ROWS)
    tiles = -(-group // np.minimum(group, ROWS // tile_queries)) * -(-queries // tile_queries)  # that read each block of keys
    num_blocks = kv_heads * (-(-num_keys // KEYS) - table[:, SEGMENT.first_block]) * (tiles > 1)
    pack_table = table.copy()
    blocks = at.count(pack_table, SEGMENT.tasks, num_blocks)
    at.count(table, SEGMENT.blocks, num_blocks)
    table[tiles <= 1, SEGMENT.blocks] = -1
    return Grid(table, pack_table, np.array((at.count(table, SEGMENT.tasks, kv_heads * tiles), blocks), np.int64))


def _most_blocks(num_tokens: int, heads: int, kv_heads: int) -> int:
    """The most blocks of keys that documents of so many tokens in all can have packed. These have more than ROWS / group tokens each, and so at
    most n / KEYS + n group / ROWS blocks."""
    return kv_heads * (num_tokens // KEYS + num_tokens * (heads // kv_heads) // ROWS + 1)


@lru_cache(maxsize=256)
def dense_grid(batch: int, queries: int, num_keys: int, heads: int, kv_heads: int) -> Grid:
    return grid_of(at.dense(batch, queries, num_keys), heads, kv_heads)


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers the forward pass uses."""
    (batch, queries, heads, dim), (_, num_keys, kv_heads, _) = shapes if len(shapes) == 2 else (*shapes, *shapes)
    return at_most(planned, dense_grid(batch, queries, num_keys, heads, kv_heads).tasks) if dim else 1


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None,
    dropout: at.Drawn = at.NO_DROPOUT,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (B, T, H, D), k and v (B, S, Hkv, D), any strides -> output (B, T, H, D) and log-sum-exp (B, H, T) float32."""
    shapes, dtype, kv_heads = (tuple(q.shape), tuple(k.shape)), q.dtype, k.shape[2]
    batch, tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=dtype)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32)
    if not out.numel():
        return out, lse
    q, k, v = at.strided(q), at.strided(k), at.strided(v)
    options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale, "softcap": softcap, "dropout": dropout}
    if cu_seqlens is None:
        grid = dense_grid(batch, tokens, k.shape[1], heads, kv_heads)
        launch(grid, num_workers("attention", shapes, dtype, causal=causal, window=window), q, k, v, out, lse, **options)
        return out, lse
    listening = recorder()
    if listening is None:
        grid = grid_of(at.documents(cu_seqlens), heads, kv_heads)
        planned = num_workers("attention", shapes, dtype, pairs=at.visible_pairs(grid.table, causal, window))
        launch(grid, planned, q, k, v, out, lse, **options)
    else:
        key = "attention", cu_seqlens.data_ptr(), heads, kv_heads
        grid = Grid(*listening.followed(key, lambda: grid_of(at.documents(cu_seqlens), heads, kv_heads)))
        planned = num_workers("attention", shapes, dtype, pairs=tokens * listening.longest)
        launch(grid, planned, q, k, v, out, lse, most_blocks=_most_blocks(tokens, heads, kv_heads), **options)
    return out, lse


def launch(
    grid: Grid, planned: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, window: int, scale: float,
    softcap: float = 0.0, dropout: at.Drawn = at.NO_DROPOUT, most_blocks: int | None = None, scales: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """The forward pass of a grid into `out` and `lse`, with at most the planned workers; q, k and v have unit stride in D. scales: of keys and values
    in int8.

    most_blocks: for a recording in which the grid's tables change, the most blocks of keys that they can ask to be packed.
    """
    hold(grid.table, grid.pack_table)
    fixed = most_blocks is None
    counts = 0 if fixed else grid.counts.ctypes.data
    most_blocks = grid.blocks if most_blocks is None else most_blocks
    dim, workers = q.shape[3], at_most(planned, grid.tasks) if fixed else planned
    block_size, size = KEYS * (-(-dim // W) * W) * WORD, work_bytes(dim)
    owner, address = scratch("attention", size * workers)
    tiles = int(q.dtype == torch.bfloat16 and scale > 0 and bf16_kernel() == TILES_KERNEL)
    packed = 0
    if most_blocks:
        packed_owner, packed = scratch("attention keys", 2 * block_size * most_blocks)
    shared = at.shared(
        q, k, v, out, lse, causal=causal, window=window, segments=grid.table, scratch=address, scratch_size=size, packed=packed, dropout=dropout,
        scales=scales,
    )  # fmt: skip
    arguments = (*shared, *own_arguments(tiles=tiles, configuration=CONFIGURATION, pack_segments=grid.pack_table.ctypes.data))
    if packed:
        _pack_kernel(grid.blocks, workers, arguments, counted=counts and counts + 8)
    _forward_kernel(grid.tasks, workers, arguments, at.options(scale=scale, softcap=softcap, kept=dropout.kept), counts)
    del owner
    if packed:
        del packed_owner
