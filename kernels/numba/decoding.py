"""One decoded token through a whole transformer on the CPU, as one compiled call over a list of launches prepared once.

Every launch is a kernel of this folder on buffers that stay where they are; what changes from token to token (where the new key and value go,
the row of the rotary tables, the number of keys) are a few integers. The bits are those of the operations called one by one.
B sequences, E embed, H heads, D head dim.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba import attention, matvec, norm, rotary
from cllm.kernels.numba import attention_tile as at
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.gemm import TILES, bf16_kernel
from cllm.kernels.numba.launch import Kernel, _call, is_half, num_workers
from cllm.kernels.numba.matvec import MOST_ROWS, Output
from cllm.kernels.numba.micro import CONFIGURATION
from cllm.kernels.stack import Linear, Norm, Stack
from cllm.runtime import threads

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


@numba.njit(cache=True, nogil=True)
def _run_alone(entries, ints, floats, tasks):
    for i in range(entries.size):
        for task in range(tasks[i]):
            _call(entries[i], ints[i], floats[i], task, 0)


@numba.njit(cache=True, nogil=True, parallel=True)
def _run_workers(entries, ints, floats, tasks, workers):
    for i in range(entries.size):
        entry, p, f, count = entries[i], ints[i], floats[i], tasks[i]
        if count == 1:
            _call(entry, p, f, 0, 0)
        else:
            for worker in numba.prange(workers):
                for task in range(worker, count, workers):
                    _call(entry, p, f, task, worker)


class Decoder:
    """See `make_decoder` of kernels/decoding.py: decoder(x (B, E), position) -> logits (B, V)."""

    def __init__(self, stack: Stack, keys: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.stack, self.keys, self.values, self.dtype = stack, keys, values, dtype
        self.batch = keys[0].shape[0]
        self.kept: list[object] = []  # whatever the launches hold addresses of
        self.launches: list[tuple[int, int, int, int]] = []  # entry, address of the integers, of the floats, number of tasks
        self.moving: list[tuple[np.ndarray, int, int, int]] = []  # integers, place in them, value at position 0, growth by position
        matrices = [each.weight.shape for layer in stack.layers for each in (*layer, stack.output) if isinstance(each, Linear)]
        work, depth = sum(2.0 * self.batch * math.prod(shape) for shape in matrices), max(shape[1] for shape in matrices)
        shapes = ((self.batch, stack.output.weight.shape[1]), tuple(reversed(stack.output.weight.shape)))
        self.workers = num_workers("matmul", shapes, dtype, work=work)
        self.attention_scratch = 0
        self.scratch_bytes = matvec.scratch_bytes(depth, self.batch)
        self.scratch = self._aligned(self.scratch_bytes * self.workers)
        self._build()
        table = np.array(self.launches, np.int64)
        self.entries, self.ints, self.floats, self.tasks = (np.ascontiguousarray(column) for column in table.T)

    # -- what changes with the position --------------------------------------------------------------------------------

    def __call__(self, x: Tensor, position: int) -> Tensor:
        self.x.copy_(x)
        for ints, place, start, growth in self.moving:
            ints[place] = start + growth * position
        if self.workers <= 1:
            _run_alone(self.entries, self.ints, self.floats, self.tasks)
        else:
            threads.numba_workers(self.workers)
            _run_workers(self.entries, self.ints, self.floats, self.tasks, self.workers)
        return self.logits.clone()

    # -- preparation ---------------------------------------------------------------------------------------------------

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        memory = torch.zeros(shape, dtype=dtype or self.dtype)
        self.kept.append(memory)
        return memory

    def _aligned(self, size: int) -> int:
        return (self._empty(size + 64, dtype=torch.uint8).data_ptr() + 63) & ~63

    def _launch(self, kernel: Kernel, tasks: int, ints: Sequence[int] | np.ndarray, floats: Sequence[float] = (0.0,)) -> np.ndarray:
        p, f = np.array(ints, np.int64), np.array(floats, np.float64)
        self.kept += [p, f]
        self.launches.append((kernel.entry(), p.ctypes.data, f.ctypes.data, tasks))
        return p

    def _build(self) -> None:
        stack, batch = self.stack, self.batch
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
            self._norm(added, layer.attention_norm, y, batch)
            to_keys = stack.rotary is None and layer.k_norm is None
            k_out = Output(keys.data_ptr(), row) if to_keys else self._rows(k)
            jobs = self._products([(y, layer.q, self._rows(q)), (y, layer.k, k_out), (y, layer.v, Output(values.data_ptr(), row))])
            self.moving.append((jobs[2], matvec.JOB.out, values.data_ptr(), token))
            if to_keys:
                self.moving.append((jobs[1], matvec.JOB.out, keys.data_ptr(), token))
            for heads_of, each in ((q, layer.q_norm), (k, layer.k_norm)):
                if each is not None:
                    on_heads = heads_of.view(-1, stack.head_dim)
                    self._norm_rows(on_heads, None, None, each, on_heads)
            if stack.rotary is not None:
                self._rotary(q, k, keys, heads, kv_heads, token, row)
            self._attention(q, keys, values, mixed, heads, kv_heads)
            self._products([(mixed, layer.out, self._rows(branch))])
            self._norm(branch, layer.mlp_norm, y, batch)
            gate = None if layer.gate is None else self._job(y, layer.gate, self._rows(z))
            address, hidden_row, *_ = self._rows(h)
            end = Output(address, hidden_row, stack.activation, 0 if gate is None else z.data_ptr())
            self._products([(y, layer.up, end)], 0 if gate is None else gate.ctypes.data)
            self._products([(h, layer.down, self._rows(branch))])
            added = branch
        self._norm(added, stack.norm, y, batch)
        self._products([(y, stack.output, self._rows(self.logits))])

    def _rows(self, out: Tensor) -> Output:
        return Output(out.data_ptr(), out.stride(0) * out.element_size())

    def _norm(self, added: Tensor | None, weights: Norm, y: Tensor, rows: int) -> None:
        """The residual stream (+ what is added to it, in place) -> y."""
        if added is None:
            self._norm_rows(self.x, None, None, weights, y)
        else:
            self._norm_rows(added, self.x, self.x, weights, y)

    def _norm_rows(self, x: Tensor, residual: Tensor | None, h: Tensor | None, weights: Norm, y: Tensor) -> None:
        rows, columns = x.shape
        row = columns * x.element_size()
        weight = weights.weight.detach().contiguous()
        bias = None if weights.bias is None else weights.bias.detach().contiguous()
        self.kept += [weight, bias]
        arguments = norm.forward_arguments(
            x=x.data_ptr(),
            x_row=row,
            residual=0 if residual is None else residual.data_ptr(),
            residual_row=row,
            h=0 if h is None else h.data_ptr(),
            h_row=row,
            y=y.data_ptr(),
            y_row=row,
            half=is_half(x),
            weight=weight.data_ptr(),
            weight_half=is_half(weight),
            bias=0 if bias is None else bias.data_ptr(),
            bias_half=0 if bias is None else is_half(bias),
            mean=0 if bias is None else self._empty(rows, dtype=torch.float32).data_ptr(),
            rstd=self._empty(rows, dtype=torch.float32).data_ptr(),
            rows=rows,
            columns=columns,
        )
        self._launch(norm._forward_kernel, -(-rows // norm.ROWS_PER_TASK), arguments, norm.options(eps=self.stack.eps))

    def _job(self, x: Tensor, linear: Linear, out: Output, first_task: int = 0, partner: int = 0) -> np.ndarray:
        weight, bias = linear.weight, linear.bias
        if isinstance(weight, Tensor):
            weight = weight.detach()
        if bias is not None:
            bias = bias.detach().to(torch.float32).contiguous()
        job = matvec.job(x, weight, bias, out, self.workers, first_task, partner)
        self.kept += [x, weight, bias, job]
        return job

    def _products(self, products: list[tuple[Tensor, Linear, Output]], partner: int = 0) -> list[np.ndarray]:
        """One launch for all; their jobs."""
        jobs: list[np.ndarray] = []
        tasks = 0
        for x, linear, out in products:
            jobs.append(self._job(x, linear, out, tasks, partner))
            tasks += matvec.num_tasks(jobs[-1])
        self._launch(matvec.kernel, tasks, matvec.launch_arguments(jobs, self.scratch, self.scratch_bytes))
        return jobs

    def _rotary(self, q: Tensor, k: Tensor, keys: Tensor, heads: int, kv_heads: int, token: int, row: int) -> None:
        assert self.stack.rotary is not None
        cos, sin = (table.detach().float().contiguous() for table in self.stack.rotary)
        self.kept += [cos, sin]
        p = self._launch(
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
            self.attention_scratch = self._aligned(size * self.workers)
            self.lse = self._empty(self.batch, heads, dtype=torch.float32)
        tiles = int(self.dtype == torch.bfloat16 and bf16_kernel() == TILES)
        arguments = (
            *at.shared(
                q4, keys, values, out, self.lse, causal=True, window=self.stack.window, segments=grid.table, scratch=self.attention_scratch,
                scratch_size=size,
            ),
            *attention.own_arguments(tiles=tiles, configuration=CONFIGURATION),
        )  # fmt: skip
        self.kept.append(grid)
        flat = grid.table.reshape(-1)
        for b in range(self.batch):
            self.moving.append((flat, b * len(at.SEGMENT) + at.SEGMENT.num_keys, 1, 1))
        self._launch(attention._forward_kernel, grid.tasks, arguments, at.options(scale=dim**-0.5, softcap=0.0))
