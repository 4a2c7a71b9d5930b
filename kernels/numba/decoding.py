"""One decoded token of each sequence through a whole transformer on the CPU, in one compiled call; a cache of one length for all.

What changes from token to token are where the new key and value go, the row of the rotary tables, the number of keys. The bits are those of the
operations called one by one.
B sequences, E embed, H heads, D head dim.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba import attention, matvec, rotary
from cllm.kernels.numba import attention_tile as at
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.gemm import TILES, bf16_kernel
from cllm.kernels.numba.launch import Kernel, is_half, num_workers
from cllm.kernels.numba.launches import Launches, aligned, rows_of
from cllm.kernels.numba.matvec import MOST_ROWS, Output
from cllm.kernels.numba.micro import CONFIGURATION
from cllm.kernels.stack import Linear, Stack

__all__ = ["MOST_ROWS", "Decoder"]


class _Rotation(NamedTuple):
    """Addresses, and in bytes the distance from sequence to sequence."""

    q: int
    q_row: int
    heads: int
    k: int
    k_row: int
    kv_heads: int
    k_out: int  # in the cache, at the position of the token
    k_out_row: int
    cos: int  # the row of the token's position
    sin: int
    pairs: int  # half of the head size
    half: int  # whether q and k are bfloat16


P, _rotation = fields(_Rotation)


def _rotate(p, f, task, worker):
    """Queries in place, keys into the cache. One task for each sequence."""
    head = 2 * p[P.pairs] * (2 if p[P.half] else 4)
    for h in range(p[P.heads]):
        q = p[P.q] + task * p[P.q_row] + h * head
        rotary._turn(q, q, p[P.half], p[P.cos], p[P.sin], p[P.pairs], 0)
    for h in range(p[P.kv_heads]):
        rotary._turn(
            p[P.k] + task * p[P.k_row] + h * head, p[P.k_out] + task * p[P.k_out_row] + h * head, p[P.half], p[P.cos], p[P.sin], p[P.pairs], 0
        )


_rotate_kernel = Kernel(_rotate)


class Decoder:
    """See `make_decoder` of kernels/decoding.py: decoder(x (B, E), position) -> logits (B, V)."""

    def __init__(self, stack: Stack, keys: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.stack, self.keys, self.values, self.dtype = stack, keys, values, dtype
        self.batch = keys[0].shape[0]
        self.moving: list[tuple[np.ndarray, int, int, int]] = []  # integers, place in them, value at position 0, growth by position
        matrices = [each.weight.shape for layer in stack.layers for each in (*layer, stack.output) if isinstance(each, Linear)]
        work, depth = sum(2.0 * self.batch * math.prod(shape) for shape in matrices), max(shape[1] for shape in matrices)
        shapes = ((self.batch, stack.output.weight.shape[1]), tuple(reversed(stack.output.weight.shape)))
        workers, scratch_bytes = num_workers("matmul", shapes, dtype, work=work), matvec.scratch_bytes(depth, self.batch)
        scratch = torch.empty(scratch_bytes * workers + 64, dtype=torch.uint8)
        self.launches = Launches(workers, aligned(scratch), scratch_bytes)
        self.launches.kept.append(scratch)
        self.attention_scratch = 0
        self._build()

    # -- what changes with the position --------------------------------------------------------------------------------

    def __call__(self, x: Tensor, position: int) -> Tensor:
        self.x.copy_(x)
        for ints, place, start, growth in self.moving:
            ints[place] = start + growth * position
        self.launches.run()
        return self.logits.clone()

    # -- preparation ---------------------------------------------------------------------------------------------------

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        memory = torch.zeros(shape, dtype=dtype or self.dtype)
        self.launches.kept.append(memory)
        return memory

    def _build(self) -> None:
        stack, batch, launches = self.stack, self.batch, self.launches
        heads, kv_heads = (each.weight.shape[0] // stack.head_dim for each in stack.layers[0][1:3])
        embed, hidden = stack.output.weight.shape[1], stack.layers[0].up.weight.shape[0]
        self.x, branch, y = (self._empty(batch, embed) for _ in range(3))
        q, mixed = self._empty(batch, heads * stack.head_dim), self._empty(batch, heads * stack.head_dim)
        k = self._empty(batch, kv_heads * stack.head_dim)
        z, h = self._empty(batch, hidden), self._empty(batch, hidden)
        self.logits = self._empty(batch, stack.output.weight.shape[0])
        size = self.x.element_size()
        added: Tensor | None = None  # the branch that is still to be added to the residual stream x
        for number, layer in enumerate(stack.layers):
            keys, values = self.keys[number], self.values[number]
            token, row = keys.stride(1) * size, keys.stride(0) * size
            launches.norm(self.x, added, layer.attention_norm, y, stack.eps)
            to_keys = stack.rotary is None and layer.k_norm is None
            k_out = Output(keys.data_ptr(), row) if to_keys else rows_of(k)
            jobs = launches.products([(y, layer.q, rows_of(q)), (y, layer.k, k_out), (y, layer.v, Output(values.data_ptr(), row))])
            self.moving.append((jobs[2], matvec.JOB.out, values.data_ptr(), token))
            if to_keys:
                self.moving.append((jobs[1], matvec.JOB.out, keys.data_ptr(), token))
            for heads_of, each in ((q, layer.q_norm), (k, layer.k_norm)):
                if each is not None:
                    on_heads = heads_of.view(-1, stack.head_dim)
                    launches.norm(on_heads, None, each, on_heads, stack.eps)
            if stack.rotary is not None:
                self._rotary(q, k, keys, heads, kv_heads, token, row)
            self._attention(q, keys, values, mixed, heads, kv_heads)
            launches.products([(mixed, layer.out, rows_of(branch))])
            launches.norm(self.x, branch, layer.mlp_norm, y, stack.eps)
            launches.feed_forward(y, layer, z, h, branch, stack.activation)
            added = branch
        launches.norm(self.x, added, stack.norm, y, stack.eps)
        launches.products([(y, stack.output, rows_of(self.logits))])

    def _rotary(self, q: Tensor, k: Tensor, keys: Tensor, heads: int, kv_heads: int, token: int, row: int) -> None:
        assert self.stack.rotary is not None
        cos, sin = (table.detach().float().contiguous() for table in self.stack.rotary)
        self.launches.kept += [cos, sin]
        p = self.launches.add(
            _rotate_kernel,
            self.batch,
            _rotation(
                q=q.data_ptr(),
                q_row=q.stride(0) * q.element_size(),
                heads=heads,
                k=k.data_ptr(),
                k_row=k.stride(0) * k.element_size(),
                kv_heads=kv_heads,
                k_out=keys.data_ptr(),
                k_out_row=row,
                cos=cos.data_ptr(),
                sin=sin.data_ptr(),
                pairs=self.stack.head_dim // 2,
                half=is_half(q),
            ),
        )
        pairs = self.stack.head_dim // 2 * 4
        self.moving += [(p, P.k_out, keys.data_ptr(), token), (p, P.cos, cos.data_ptr(), pairs), (p, P.sin, sin.data_ptr(), pairs)]

    def _attention(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, heads: int, kv_heads: int) -> None:
        dim = self.stack.head_dim
        q4 = q.view(self.batch, 1, heads, dim)
        grid = attention.grid_of(at.dense(self.batch, 1, 1), heads, kv_heads)
        size = attention.work_bytes(dim)
        if not self.attention_scratch:
            self.attention_scratch = aligned(self._empty(size * self.launches.workers + 64, dtype=torch.uint8))
            self.lse = self._empty(self.batch, heads, dtype=torch.float32)
        tiles = int(self.dtype == torch.bfloat16 and bf16_kernel() == TILES)
        arguments = (
            *at.shared(
                q4, keys, values, out, self.lse, causal=True, window=self.stack.window, segments=grid.table, scratch=self.attention_scratch,
                scratch_size=size,
            ),
            *attention.own_arguments(tiles=tiles, configuration=CONFIGURATION),
        )  # fmt: skip
        self.launches.kept.append(grid)
        flat = grid.table.reshape(-1)
        for b in range(self.batch):
            self.moving.append((flat, b * len(at.SEGMENT) + at.SEGMENT.num_keys, 1, 1))
        self.launches.add(attention._forward_kernel, grid.tasks, arguments, at.options(scale=dim**-0.5, softcap=0.0))
