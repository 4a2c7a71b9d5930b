"""What both ways of multiplying share in the backward pass of attention: arguments, blocks of queries, masks, and how gradients are written."""

from typing import NamedTuple

import numpy as np

from cllm.kernels.numba import attention_amx as amx
from cllm.kernels.numba import attention_tile as at
from cllm.kernels.numba.attention_tile import KEYS, SEGMENT, WORD, F, P
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.launch import int64_at, jit
from cllm.kernels.numba.simd import W, vload, vmul, vset, vstore, vzero

ROWS = 64  # a block has this many queries: a multiple of at.MR


class _Own(NamedTuple):
    """What the backward kernels read behind the shared arguments: addresses, and strides in bytes."""

    dout: int
    dout_batch: int
    dout_token: int
    dout_head: int
    dlse: int  # float32 (B, H, T); 0: no gradient comes in by the log-sum-exp
    delta: int  # float32 (B, H, T): rowsum(dout * out) - dlse
    dq: int  # contiguous, as dk and dv
    dk: int
    dv: int
    together: int  # whether a task is a key-value head
    counts: int  # int64; the second, apart: so many tasks are blocks of keys, the others blocks of queries
    key_tokens: int  # keys of a batch entry
    tiles: int  # whether AMX multiplies
    resident: int  # blocks of queries that stay in the cache, on AMX
    configuration: int  # of the AMX tiles


OWN, own_arguments = fields(_Own, start=len(P))

_ONE = np.float32(1.0)


@jit
def visible(p, t0, rows, queries, num_keys, key):
    """How many keys of the block, from its first, a block of queries can see."""
    end = min(KEYS, at.end_key(p, t0 + rows - 1, queries, num_keys) - key)
    return end if key + KEYS > at.first_key(p, t0, queries, num_keys) else 0


@jit
def write_rows(source, width, to, half, tiles, row_bytes, rows, dim, scale):
    s = vset(scale)
    for r in range(rows):
        for c in range(0, dim, W):
            amx.store_row(to + r * row_bytes, half, tiles, c, vmul(vload(source + r * width * WORD, c), s), dim - c)


@jit
def clear(address, words):
    for c in range(0, words, W):
        vstore(address, c, vzero())


@jit
def write_keys(p, f, segment, kv, key, dk, dv):
    b, start, width = int64_at(segment, SEGMENT.batch), int64_at(segment, SEGMENT.start), at.padded_dim(p[P.dim])
    rows, head_bytes = min(KEYS, int64_at(segment, SEGMENT.num_keys) - key), p[P.dim] * (2 if p[P.half] else 4)
    back = np.float32(abs(f[F.scale]))  # the sign is in the queries
    to = ((b * p[OWN.key_tokens] + start + key) * p[P.kv_heads] + kv) * head_bytes
    write_rows(dk, width, p[OWN.dk] + to, p[P.half], p[OWN.tiles], p[P.kv_heads] * head_bytes, rows, p[P.dim], back)
    write_rows(dv, width, p[OWN.dv] + to, p[P.half], p[OWN.tiles], p[P.kv_heads] * head_bytes, rows, p[P.dim], _ONE)
