"""Attention backward on the CPU: the probabilities are computed again, tile by tile, from the saved log-sum-exp.

Dao 2023, FlashAttention-2, arXiv 2307.08691. An element of dk and dv sums over query heads and blocks of ROWS queries in order, one of dq over
blocks of KEYS keys in order: the same bits whichever of two ways the work is cut.
    together   a task is a key-value head: 5 products for each pair of blocks; dq of its query heads gathers in the work space
    apart      a task is a block of keys (dk, dv), or a block of queries (dq): 7 products, but many more tasks
The products themselves are in attention_backward_vector.py and attention_backward_amx.py.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba import attention_amx as amx
from cllm.kernels.numba import attention_backward_amx as tiles
from cllm.kernels.numba import attention_backward_vector as vector
from cllm.kernels.numba import attention_tile as at
from cllm.kernels.numba.attention_backward_tile import OWN, ROWS, clear, own_arguments, write_keys, write_rows
from cllm.kernels.numba.attention_tile import KEYS, SEGMENT, WORD, F, P
from cllm.kernels.numba.gemm import TILES as TILES_KERNEL
from cllm.kernels.numba.gemm import bf16_kernel, l2_bytes
from cllm.kernels.numba.launch import Kernel, float32_at, hold, int64_at, jit, load, num_workers, put_float32, scratch
from cllm.kernels.numba.micro import CONFIGURATION, HAS_TILES
from cllm.kernels.numba.simd import W, vfma, vhsum, vzero
from cllm.runtime.workers import recorder

MAX_WAITING = 1.4  # together is chosen while waiting for the last heads costs at most this factor: apart makes 7 products instead of 5
MAX_GATHERED_BYTES = 64 << 20  # the most of dq (on AMX of dk and dv) that one worker may gather

_ZERO = np.float32(0.0)


def _prepare(p, f, task, worker):
    """delta = rowsum(dout * out) - dlse for ROWS tokens of a head; OUT is contiguous."""
    blocks = (p[P.tokens] + ROWS - 1) // ROWS
    size = 2 if p[P.half] else 4
    t0, b, h = (task % blocks) * ROWS, task // blocks // p[P.heads], task // blocks % p[P.heads]
    for t in range(t0, min(t0 + ROWS, p[P.tokens])):
        out = p[P.out] + ((b * p[P.tokens] + t) * p[P.heads] + h) * p[P.dim] * size
        dout = p[OWN.dout] + b * p[OWN.dout_batch] + t * p[OWN.dout_token] + h * p[OWN.dout_head]
        total = vzero()
        for c in range(0, p[P.dim], W):
            n = p[P.dim] - c
            total = vfma(load(out, p[P.half], c, n), load(dout, p[P.half], c, n), total)
        row = (b * p[P.heads] + h) * p[P.tokens] + t
        dlse = float32_at(p[OWN.dlse], row) if p[OWN.dlse] != 0 else _ZERO
        put_float32(p[OWN.delta], row, vhsum(total) - dlse)


@jit
def _key_block(p, f, worker, segment, kv, key):
    """dk and dv of one block of keys; adds to the gathered dq when TOGETHER."""
    if HAS_TILES and p[OWN.tiles]:
        dk, dv = tiles.key_block(p, f, worker, segment, kv, key)
    else:
        dk, dv = vector.key_block(p, f, worker, segment, kv, key, at.padded_dim(p[P.dim]))
    write_keys(p, f, segment, kv, key, dk, dv)


@jit
def _write_queries(p, f, dq, width, b, token, h, rows):
    head_bytes = p[P.dim] * (2 if p[P.half] else 4)
    to = p[OWN.dq] + ((b * p[P.tokens] + token) * p[P.heads] + h) * head_bytes
    write_rows(dq, width, to, p[P.half], 0, p[P.heads] * head_bytes, rows, p[P.dim], np.float32(f[F.scale]))


@jit
def _query_block(p, f, worker, segment, h, t0):
    """dq of one block of queries."""
    rows, b, token = min(ROWS, int64_at(segment, SEGMENT.queries) - t0), int64_at(segment, SEGMENT.batch), int64_at(segment, SEGMENT.start) + t0
    if HAS_TILES and p[OWN.tiles]:
        dq = tiles.query_block(p, f, worker, segment, h, t0)
        tiles.write_turned(p, f, dq, b, token, h, rows, tiles.work_space(p, worker).spare)
    else:
        width = at.padded_dim(p[P.dim])
        _write_queries(p, f, vector.query_block(p, f, worker, segment, h, t0, width), width, b, token, h, rows)


def _together(p, f, task, worker):
    segment, kv = p[P.segments] + (task // p[P.kv_heads]) * at.SEGMENT_BYTES, task % p[P.kv_heads]
    if HAS_TILES and p[OWN.tiles]:
        amx.start(p[OWN.configuration])
        tiles.together(p, f, worker, segment, kv)
        amx.stop()
        return
    queries, num_keys = int64_at(segment, SEGMENT.queries), int64_at(segment, SEGMENT.num_keys)
    group, width = p[P.heads] // p[P.kv_heads], at.padded_dim(p[P.dim])
    dq, padded = vector.work_space(p, worker, width).dq, (queries + ROWS - 1) // ROWS * ROWS
    clear(dq, group * padded * width)
    for key in range(0, num_keys, KEYS):
        _key_block(p, f, worker, segment, kv, key)
    for g in range(group):
        b, token, h = int64_at(segment, SEGMENT.batch), int64_at(segment, SEGMENT.start), kv * group + g
        _write_queries(p, f, dq + g * padded * width * WORD, width, b, token, h, queries)


def _apart(p, f, task, worker):
    """TASKS counts blocks of keys for the first tasks, BLOCKS those of queries after them."""
    if HAS_TILES and p[OWN.tiles]:
        amx.start(p[OWN.configuration])
    key_tasks = int64_at(p[OWN.counts], 1)
    if task < key_tasks:
        segment = at.find_segment(p[P.segments], p[P.num_segments], task, SEGMENT.tasks)
        local = task - int64_at(segment, SEGMENT.tasks)
        blocks = (int64_at(segment, SEGMENT.num_keys) + KEYS - 1) // KEYS
        kv, block = at.dealt(local, blocks)
        _key_block(p, f, worker, segment, kv, block * KEYS)
    else:
        segment = at.find_segment(p[P.segments], p[P.num_segments], task - key_tasks, SEGMENT.blocks)
        local = task - key_tasks - int64_at(segment, SEGMENT.blocks)
        blocks = (int64_at(segment, SEGMENT.queries) + ROWS - 1) // ROWS
        h, block = at.dealt(local, blocks)
        _query_block(p, f, worker, segment, h, block * ROWS)
    if HAS_TILES and p[OWN.tiles]:
        amx.stop()


_prepare_kernel, _together_kernel, _apart_kernel = Kernel(_prepare), Kernel(_together, uneven=True), Kernel(_apart, uneven=True)


class _Grid(NamedTuple):
    """The tasks of one call."""

    table: np.ndarray  # segments; TASKS counts blocks of keys, BLOCKS those of queries
    counts: np.ndarray  # int64: how many key-value heads of segments there are, how many blocks of keys, and how many of both


def _grid_of(table: np.ndarray, heads: int, kv_heads: int) -> _Grid:
    """Fills TASKS and BLOCKS of a table of segments."""
    queries, num_keys = table[:, SEGMENT.queries], table[:, SEGMENT.num_keys]
    key_tasks = at.count(table, SEGMENT.tasks, kv_heads * -(-num_keys // KEYS))
    query_tasks = at.count(table, SEGMENT.blocks, heads * -(-queries // ROWS))
    filled = 1 + int(np.flatnonzero(num_keys)[-1])  # segments behind are empty
    return _Grid(table, np.array((kv_heads * filled, key_tasks, key_tasks + query_tasks), np.int64))


def _resident_bytes() -> int:
    """How many bytes of query blocks stay in the cache: half of the L2."""
    return l2_bytes() // 2


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None, dropout: at.Drawn = at.NO_DROPOUT,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from those of the output and (or None) of the log-sum-exp. With dropout vectors multiply, also where AMX could: its
    probabilities have a row for each key, across the direction in which masks are drawn."""
    shapes, dtype = (tuple(q.shape), tuple(k.shape)), q.dtype
    (batch, tokens, heads, dim), (_, key_tokens, kv_heads, _) = shapes
    if not q.numel() or not k.numel():
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, dk, dv = (torch.empty(x.shape, dtype=dtype) for x in (q, k, v))
    q, k, v, dout = (at.strided(x) for x in (q, k, v, dout))
    out, lse = out.detach().contiguous(), lse.detach().contiguous()
    dlse = None if dlse is None else dlse.detach().float().contiguous()
    delta = torch.empty_like(lse)
    listening = None if cu_seqlens is None else recorder()
    if cu_seqlens is None or listening is None:
        grid = _grid_of(at.dense(batch, tokens, key_tokens) if cu_seqlens is None else at.documents(cu_seqlens), heads, kv_heads)
        pairs, most_queries, most_keys = (
            at.visible_pairs(grid.table, causal, window), int(grid.table[:, SEGMENT.queries].max()), int(grid.table[:, SEGMENT.num_keys].max()),
        )  # fmt: skip
    else:  # the tables change from replay to replay
        key = "attention backward", cu_seqlens.data_ptr(), heads, kv_heads
        grid = _Grid(*listening.followed(key, lambda: _grid_of(at.documents(cu_seqlens), heads, kv_heads)))
        pairs, most_queries, most_keys = tokens * listening.longest, listening.longest, listening.longest
    hold(grid.table, grid.counts)
    units, _, all_blocks = map(int, grid.counts)
    workers = num_workers("attention", shapes, dtype, pairs=pairs, backward=True)
    width = -(-dim // W) * W
    query_blocks, key_blocks = heads // kv_heads * -(-most_queries // ROWS), -(-most_keys // KEYS)
    on_tiles = dtype == torch.bfloat16 and scale > 0 and bf16_kernel() == TILES_KERNEL and not dropout.dropped
    gathered = 2 * key_blocks * KEYS * width * WORD if on_tiles else query_blocks * ROWS * width * WORD
    together = int(gathered <= MAX_GATHERED_BYTES and -(-units // workers) * workers <= MAX_WAITING * units)
    tasks = units if together else all_blocks
    if listening is None:
        workers = min(workers, tasks)
    if not together:
        query_blocks = key_blocks = 1
    resident = min(query_blocks, max(1, _resident_bytes() // tiles.query_block_bytes(dim, width)))
    if on_tiles:
        size = tiles.work_bytes(dim, width, resident, key_blocks)
    else:
        size = vector.work_bytes(width, query_blocks * ROWS * width * WORD)
    owner, address = scratch("attention", size * workers)
    element = dout.element_size()
    arguments = (
        *at.shared(q, k, v, out, lse, causal=causal, window=window, segments=grid.table, scratch=address, scratch_size=size, dropout=dropout),
        *own_arguments(
            dout=dout.data_ptr(),
            dout_batch=dout.stride(0) * element,
            dout_token=dout.stride(1) * element,
            dout_head=dout.stride(2) * element,
            dlse=0 if dlse is None else dlse.data_ptr(),
            delta=delta.data_ptr(),
            dq=dq.data_ptr(),
            dk=dk.data_ptr(),
            dv=dv.data_ptr(),
            together=together,
            counts=grid.counts.ctypes.data,
            key_tokens=key_tokens,
            tiles=int(on_tiles),
            resident=resident,
            configuration=CONFIGURATION,
        ),
    )
    _prepare_kernel(batch * heads * -(-tokens // ROWS), workers, arguments)
    counted = 0 if listening is None else grid.counts.ctypes.data + (0 if together else 16)
    (_together_kernel if together else _apart_kernel)(tasks, workers, arguments, at.options(scale=scale, softcap=softcap, kept=dropout.kept), counted)
    del owner
    return dq, dk, dv
