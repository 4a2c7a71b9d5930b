"""The newest tokens of any sequences through a whole transformer on the CPU in one compiled call, over keys and values in pages.

What a call is given are lists, copied to where the kernels read them: a token takes a few milliseconds, of which a tensor for each list and the
operation that looks embeddings up would be a tenth. Every token is a row of its own with its position, its place in the pool and its row of page
numbers, so that tokens of one sequence (a piece of a prompt, drafts) and of many are the same to the kernels. The bits are those of the operations
called one by one.
N tokens, E embed, H heads, Hkv key-value heads, D head dim, P pages, M page numbers of a token, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba import attention, matvec, norm, rotary
from cllm.kernels.numba import attention_tile as at
from cllm.kernels.numba.attention_tile import KEYS, SEGMENT
from cllm.kernels.numba.compiling import called_by_python
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.gemm import TILES, bf16_kernel
from cllm.kernels.numba.launch import Kernel, copy_bytes, dense, inline, int32_at, int64_at, is_half, load, num_workers, put_int64, store
from cllm.kernels.numba.launches import Launches, aligned, rows_of
from cllm.kernels.numba.micro import CONFIGURATION
from cllm.kernels.numba.simd import W, vadd
from cllm.kernels.stack import Layer, Linear, Norm, Stack

MOST_TOKENS = matvec.MOST_ROWS


class _Storing(NamedTuple):
    """Addresses, and in bytes the distance from token to token."""

    q: int
    q_row: int
    heads: int
    k: int
    k_row: int
    kv_heads: int
    v: int
    v_row: int
    dim: int
    half: int  # whether all of them are bfloat16
    keys: int  # the pool
    values: int
    slots: int  # int64: the place of each token in the pool
    positions: int  # int64
    cos: int  # tables of D/2 float32 for each position; 0: no rotation
    sin: int
    q_norm: int  # the weight of an RMSNorm of each head before the rotation; 0: none
    q_norm_half: int
    k_norm: int
    k_norm_half: int


P, _storing = fields(_Storing)
_ZERO = np.float32(0.0)


@inline
def _finish_head(p, f, x, out, weight, weight_half, table):
    """A head of a query or a key, normalised and rotated; out may be x."""
    if weight != 0:
        rstd = norm.inverse_rms(x, p[P.half], p[P.dim], _ZERO, f[norm.F.eps])
        norm.normalise(x, out, p[P.half], p[P.dim], _ZERO, rstd, weight, weight_half, 0, 0)
        x = out
    if p[P.cos] != 0:
        rotary._turn(x, out, p[P.half], p[P.cos] + table, p[P.sin] + table, p[P.dim] // 2, 0)
    elif x != out:
        copy_bytes(out, x, p[P.dim] * (2 if p[P.half] else 4))


def _store(p, f, task, worker):
    """One token: its queries in place, its keys and values into the pool."""
    head = p[P.dim] * (2 if p[P.half] else 4)
    slot = int64_at(p[P.slots], task) * (p[P.kv_heads] * head)
    table = int64_at(p[P.positions], task) * (p[P.dim] // 2 * 4)
    for h in range(p[P.heads]):
        q = p[P.q] + task * p[P.q_row] + h * head
        _finish_head(p, f, q, q, p[P.q_norm], p[P.q_norm_half], table)
    for h in range(p[P.kv_heads]):
        _finish_head(p, f, p[P.k] + task * p[P.k_row] + h * head, p[P.keys] + slot + h * head, p[P.k_norm], p[P.k_norm_half], table)
    copy_bytes(p[P.values] + slot, p[P.v] + task * p[P.v_row], p[P.kv_heads] * head)


_store_kernel = Kernel(_store)


class _Embedding(NamedTuple):
    """Addresses, and in bytes the distance from row to row; of each table whether it is bfloat16."""

    tokens: int  # int64
    weight: int
    weight_row: int
    weight_half: int
    positions: int  # int64
    position_weight: int  # 0: none
    position_row: int
    position_half: int
    out: int
    spare: int  # of the shape of out
    row: int
    half: int
    columns: int


EMB, _embedding = fields(_Embedding)


def _embed(p, f, task, worker):
    """One token: its embedding, and that of its position, each rounded to the dtype of activations before they are added."""
    out, spare, half, columns = p[EMB.out] + task * p[EMB.row], p[EMB.spare] + task * p[EMB.row], p[EMB.half], p[EMB.columns]
    row = p[EMB.weight] + int64_at(p[EMB.tokens], task) * p[EMB.weight_row]
    for c in range(0, columns, W):
        store(out, half, c, load(row, p[EMB.weight_half], c, columns - c), columns - c)
    if p[EMB.position_weight] == 0:
        return
    row = p[EMB.position_weight] + int64_at(p[EMB.positions], task) * p[EMB.position_row]
    for c in range(0, columns, W):
        n = columns - c
        store(spare, half, c, load(row, p[EMB.position_half], c, n), n)
        store(out, half, c, vadd(load(out, half, c, n), load(spare, half, c, n)), n)


_embed_kernel = Kernel(_embed)


_WRONG = (
    "",
    "a position lies behind its pages or the rotary tables",
    "a slot lies outside of the pool",
    "a page lies outside of the pool",
    "a token lies outside of the vocabulary",
)


@called_by_python
def _place_tokens(tokens, positions, slots, pages, pages_row, count, columns, segments, window, num_embeddings, num_positions, num_pages):
    """Writes what the tokens of a call see; returns the number of what is wrong, in `_WRONG`, for memory is addressed by these numbers."""
    for i in range(count):
        position, slot, row = int64_at(positions, i), int64_at(slots, i), pages + i * pages_row
        if int64_at(tokens, i) < 0 or int64_at(tokens, i) >= num_embeddings:
            return 4
        if position < 0 or position >= min(columns * KEYS, num_positions):
            return 1
        if slot < 0 or slot >= num_pages * KEYS:
            return 2
        for column in range(max(0, position - window + 1) // KEYS if window > 0 else 0, position // KEYS + 1):
            page = int32_at(row, column)
            if page < 0 or page >= num_pages:
                return 3
        put_int64(segments, i * len(SEGMENT) + SEGMENT.num_keys, position + 1)
        put_int64(segments, i * len(SEGMENT) + SEGMENT.pages, row)
    return 0


class _Plan(NamedTuple):
    """The launches for one number of tokens, and what a call writes into them."""

    launches: Launches
    segments: int  # the address of their table: one for each token, shared by all layers
    output: np.ndarray  # the job that writes the logits


class PagedDecoder:
    """See `make_paged_decoder` of kernels/decoding.py."""

    def __init__(self, stack: Stack, keys: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype, most_tokens: int) -> None:
        self.stack, self.keys, self.values, self.dtype = stack, keys, values, dtype
        self.most_tokens = most_tokens = min(most_tokens, MOST_TOKENS)
        first, dim = stack.layers[0], stack.head_dim
        self.heads, self.kv_heads = first.q.weight.shape[0] // dim, first.k.weight.shape[0] // dim
        self.vocabulary, embed = stack.output.weight.shape
        matrices = [each.weight.shape for layer in stack.layers for each in (*layer, stack.output) if isinstance(each, Linear)]
        self._work, depth = sum(2.0 * math.prod(shape) for shape in matrices), max(shape[1] for shape in matrices)
        self._workers = self._planned_workers(most_tokens)
        self._scratch_bytes = matvec.scratch_bytes(depth, most_tokens)
        self._scratch = torch.empty(self._scratch_bytes * self._workers + 64, dtype=torch.uint8)
        self._attention_bytes = attention.work_bytes(dim)
        self._attention_scratch = torch.empty(self._attention_bytes * self._workers + 64, dtype=torch.uint8)
        # What the newest call was given.
        self._tokens, self._positions, self._slots = np.zeros((3, most_tokens), np.int64)
        self._addresses = self._tokens.ctypes.data, self._positions.ctypes.data, self._slots.ctypes.data
        self._pages, self._pages_at = np.zeros((most_tokens, 0), np.int32), (0, 0)
        self._num_pages, self._num_embeddings = len(keys[0]), len(stack.embedding)
        self._embedding, self._position_embedding = dense(stack.embedding), None
        if stack.position_embedding is not None:
            self._position_embedding = dense(stack.position_embedding)
        limits = (None if stack.rotary is None else stack.rotary[0], stack.position_embedding)
        self._num_positions = min((len(each) for each in limits if each is not None), default=1 << 62)
        self._tables = None if stack.rotary is None else [table.detach().float().contiguous() for table in stack.rotary]
        hidden, kv = first.up.weight.shape[0], self.kv_heads * dim
        sizes = {
            "x": embed,
            "branch": embed,
            "y": embed,
            "q": self.heads * dim,
            "k": kv,
            "v": kv,
            "mixed": self.heads * dim,
            "z": hidden,
            "h": hidden,
        }
        self._buffers = {name: torch.zeros(most_tokens, size, dtype=dtype) for name, size in sizes.items()}
        self._lse = torch.empty(most_tokens * self.heads, dtype=torch.float32)
        self._plans: dict[int, _Plan] = {}

    def __call__(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], pages: Sequence[Sequence[int]]) -> Tensor:
        count, columns = len(tokens), len(pages[0])
        assert count == len(positions) == len(slots) == len(pages)
        plan = self._plans.get(count)
        if plan is None:
            assert 1 <= count <= self.most_tokens
            plan = self._plans[count] = self._plan(count)
        if columns > self._pages.shape[1]:
            self._pages = np.zeros((self.most_tokens, 2 * columns), np.int32)
            self._pages_at = self._pages.ctypes.data, self._pages.strides[0]
        self._tokens[:count], self._positions[:count], self._slots[:count], self._pages[:count, :columns] = tokens, positions, slots, pages
        wrong = _place_tokens(
            *self._addresses, *self._pages_at, count, columns, plan.segments, self.stack.window, self._num_embeddings, self._num_positions,
            self._num_pages,
        )  # fmt: skip
        assert not wrong, _WRONG[wrong]
        logits = torch.empty((count, self.vocabulary), dtype=self.dtype)
        plan.output[matvec.JOB.out] = logits.data_ptr()
        plan.launches.run()
        return logits

    # ---- preparation -----------------------------------------------------------------------------------------------------

    def _planned_workers(self, tokens: int) -> int:
        vocabulary, embed = self.stack.output.weight.shape
        return num_workers("matmul", ((tokens, embed), (embed, vocabulary)), self.dtype, work=tokens * self._work)

    def _plan(self, tokens: int) -> _Plan:
        stack, dim = self.stack, self.stack.head_dim
        launches = Launches(min(self._workers, self._planned_workers(tokens)), aligned(self._scratch), self._scratch_bytes)
        x, branch, y, q, k, v, mixed, z, h = (buffer[:tokens] for buffer in self._buffers.values())
        table = np.zeros((tokens, len(SEGMENT)), np.int64)
        table[:, SEGMENT.start], table[:, SEGMENT.queries] = np.arange(tokens), 1
        grid = attention.grid_of(table, self.heads, self.kv_heads)
        launches.kept.append(grid)
        launches.add(_embed_kernel, tokens, self._looking_up(x, branch))
        added: Tensor | None = None  # the branch that is still to be added to the residual stream x
        for layer, keys, values in zip(stack.layers, self.keys, self.values):
            launches.norm(x, added, layer.attention_norm, y, stack.eps)
            launches.products([(y, layer.q, rows_of(q)), (y, layer.k, rows_of(k)), (y, layer.v, rows_of(v))])
            self._store(launches, layer, (q, k, v), keys, values)
            self._attend(launches, grid, q.view(1, tokens, self.heads, dim), keys, values, mixed)
            launches.products([(mixed, layer.out, rows_of(branch))])
            launches.norm(x, branch, layer.mlp_norm, y, stack.eps)
            launches.feed_forward(y, layer, z, h, branch, stack.activation)
            added = branch
        launches.norm(x, added, stack.norm, y, stack.eps)
        logits = matvec.Output(0, self.vocabulary * self._lse.new_empty(0, dtype=self.dtype).element_size())
        (output,) = launches.products([(y, stack.output, logits)])
        return _Plan(launches, grid.table.ctypes.data, output)

    def _looking_up(self, x: Tensor, spare: Tensor) -> Sequence[int]:
        weight, of_positions = self._embedding, self._position_embedding
        return _embedding(
            tokens=self._tokens.ctypes.data,
            weight=weight.data_ptr(),
            weight_row=weight.stride(0) * weight.element_size(),
            weight_half=is_half(weight),
            positions=self._positions.ctypes.data,
            position_weight=0 if of_positions is None else of_positions.data_ptr(),
            position_row=0 if of_positions is None else of_positions.stride(0) * of_positions.element_size(),
            position_half=0 if of_positions is None else is_half(of_positions),
            out=x.data_ptr(),
            spare=spare.data_ptr(),
            row=x.stride(0) * x.element_size(),
            half=is_half(x),
            columns=x.shape[1],
        )

    def _store(self, launches: Launches, layer: Layer, projected: tuple[Tensor, Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
        q, k, v = projected
        cos, sin = (0, 0) if self._tables is None else (table.data_ptr() for table in self._tables)

        def weight(each: Norm | None) -> tuple[int, int]:
            if each is None:
                return 0, 0
            assert each.bias is None, "a head has an RMSNorm"
            kept = each.weight.detach().contiguous()
            launches.kept.append(kept)
            return kept.data_ptr(), is_half(kept)

        (q_norm, q_norm_half), (k_norm, k_norm_half) = weight(layer.q_norm), weight(layer.k_norm)
        size = q.element_size()
        arguments = _storing(
            q=q.data_ptr(),
            q_row=q.stride(0) * size,
            heads=self.heads,
            k=k.data_ptr(),
            k_row=k.stride(0) * size,
            kv_heads=self.kv_heads,
            v=v.data_ptr(),
            v_row=v.stride(0) * size,
            dim=self.stack.head_dim,
            half=is_half(q),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            slots=self._slots.ctypes.data,
            positions=self._positions.ctypes.data,
            cos=cos,
            sin=sin,
            q_norm=q_norm,
            q_norm_half=q_norm_half,
            k_norm=k_norm,
            k_norm_half=k_norm_half,
        )
        launches.add(_store_kernel, len(q), arguments, norm.options(eps=self.stack.eps))

    def _attend(self, launches: Launches, grid: attention.Grid, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        k, v = (pool.flatten(0, 1)[None] for pool in (keys, values))
        tiles = int(self.dtype == torch.bfloat16 and bf16_kernel() == TILES)
        arguments = (
            *at.shared(
                q, k, v, out, self._lse, causal=True, window=self.stack.window, segments=grid.table, scratch=aligned(self._attention_scratch),
                scratch_size=self._attention_bytes,
            ),
            *attention.own_arguments(tiles=tiles, configuration=CONFIGURATION),
        )  # fmt: skip
        launches.add(attention._forward_kernel, grid.tasks, arguments, at.options(scale=self.stack.head_dim**-0.5, softcap=0.0))
