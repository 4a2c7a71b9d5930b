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
from cllm.kernels.numba.attention_tile import KEYS, SEGMENT, WORD
from cllm.kernels.numba.compiling import called_by_python
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.gemm import TILES, bf16_kernel
from cllm.kernels.numba.int8_rows import quantize_row
from cllm.kernels.numba.launch import Kernel, copy_bytes, dense, inline, int32_at, int64_at, is_half, load, num_workers, put_int64, store
from cllm.kernels.numba.launches import Launches, aligned, rows_of
from cllm.kernels.numba.micro import CONFIGURATION
from cllm.kernels.numba.simd import W, vfma, vset
from cllm.kernels.stack import NGRAM_SHARE, Layer, Linear, Norm, Stack

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
    key_scales: int  # of a pool of int8; 0: it is of the dtype of q
    value_scales: int
    slots: int  # int64: the place of each token in the pool
    positions: int  # int64
    cos: int  # tables of D/2 float32 for each position; 0: no rotation
    sin: int
    q_norm: int  # the weight of an RMSNorm of each head before the rotation; 0: none
    q_norm_half: int
    k_norm: int
    k_norm_half: int


P, _storing = fields(_Storing)
_ZERO, _ONE, _NGRAM_SHARE = np.float32(0.0), np.float32(1.0), np.float32(NGRAM_SHARE)


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
    k, v = p[P.k] + task * p[P.k_row], p[P.v] + task * p[P.v_row]
    if p[P.key_scales] == 0:
        for h in range(p[P.kv_heads]):
            _finish_head(p, f, k + h * head, p[P.keys] + slot + h * head, p[P.k_norm], p[P.k_norm_half], table)
        copy_bytes(p[P.values] + slot, v, p[P.kv_heads] * head)
    else:
        for h in range(p[P.kv_heads]):
            _finish_head(p, f, k + h * head, k + h * head, p[P.k_norm], p[P.k_norm_half], table)
            row = int64_at(p[P.slots], task) * p[P.kv_heads] + h
            quantize_row(k + h * head, p[P.half], p[P.dim], p[P.keys] + row * p[P.dim], p[P.key_scales] + row * WORD)
            quantize_row(v + h * head, p[P.half], p[P.dim], p[P.values] + row * p[P.dim], p[P.value_scales] + row * WORD)


_store_kernel = Kernel(_store)


class _Table(NamedTuple):
    """A table of embeddings: addresses, in bytes the distance from row to row, and whether it is bfloat16."""

    numbers: int  # int64: the row of each token
    weight: int
    row: int
    half: int
    num_rows: int


class _Embedding(NamedTuple):
    """Addresses, and in bytes the distance from token to token."""

    tables: int  # of int64 numbers, `TABLE` of each table
    num_tables: int
    num_whole: int  # of how many tables, the first ones, all is added; of the others NGRAM_SHARE
    out: int
    spare: int  # of the shape of out
    row: int
    half: int
    columns: int


TABLE, _table = fields(_Table)
EMB, _embedding = fields(_Embedding)


def _embed(p, f, task, worker):
    """One token: its rows of all tables, each rounded to the dtype of activations before it, or NGRAM_SHARE of it, is added."""
    out, spare, half, columns = p[EMB.out] + task * p[EMB.row], p[EMB.spare] + task * p[EMB.row], p[EMB.half], p[EMB.columns]
    for number in range(p[EMB.num_tables]):
        at = number * len(TABLE)
        place = int64_at(int64_at(p[EMB.tables], at + TABLE.numbers), task)
        row = int64_at(p[EMB.tables], at + TABLE.weight) + place * int64_at(p[EMB.tables], at + TABLE.row)
        of_half = int64_at(p[EMB.tables], at + TABLE.half)
        share = _ONE if number < p[EMB.num_whole] else _NGRAM_SHARE
        for c in range(0, columns, W):
            n = columns - c
            if number == 0:
                store(out, half, c, load(row, of_half, c, n), n)
            else:
                store(spare, half, c, load(row, of_half, c, n), n)
                store(out, half, c, vfma(vset(share), load(spare, half, c, n), load(out, half, c, n)), n)


_embed_kernel = Kernel(_embed)


_WRONG = (
    "",
    "a position lies behind its pages or the rotary tables",
    "a slot lies outside of the pool",
    "a page lies outside of the pool",
    "a token lies outside of the vocabulary, or an n-gram outside of its table",
)


@called_by_python
def _place_tokens(tables, num_tables, positions, slots, pages, pages_row, count, columns, segments, window, num_positions, num_pages):
    """Writes what the tokens of a call see; returns the number of what is wrong, in `_WRONG`, for memory is addressed by these numbers."""
    for i in range(count):
        position, slot, row = int64_at(positions, i), int64_at(slots, i), pages + i * pages_row
        for number in range(num_tables):
            place = int64_at(int64_at(tables, number * len(TABLE) + TABLE.numbers), i)
            if place < 0 or place >= int64_at(tables, number * len(TABLE) + TABLE.num_rows):
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

    def __init__(
        self, stack: Stack, keys: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype, most_tokens: int,
        scales: Sequence[tuple[Tensor, Tensor] | None],
    ) -> None:  # fmt: skip
        self.stack, self.keys, self.values, self.scales, self.dtype = stack, keys, values, scales, dtype
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
        self._ngram_rows = np.zeros((len(stack.ngram_embeddings), most_tokens), np.int64)
        self._embeddings = self._tables_of(stack)
        self._addresses = self._embeddings.ctypes.data, len(self._embeddings), self._positions.ctypes.data, self._slots.ctypes.data
        self._pages, self._pages_at = np.zeros((most_tokens, 0), np.int32), (0, 0)
        self._num_pages = len(keys[0])
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

    def __call__(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], pages: Sequence[Sequence[int]],
        ngram_rows: Sequence[Sequence[int]] = (),
    ) -> Tensor:  # fmt: skip
        count, columns = len(tokens), len(pages[0])
        assert count == len(positions) == len(slots) == len(pages) and len(ngram_rows) == len(self._ngram_rows)
        plan = self._plans.get(count)
        if plan is None:
            assert 1 <= count <= self.most_tokens
            plan = self._plans[count] = self._plan(count)
        if columns > self._pages.shape[1]:
            self._pages = np.zeros((self.most_tokens, 2 * columns), np.int32)
            self._pages_at = self._pages.ctypes.data, self._pages.strides[0]
        self._tokens[:count], self._positions[:count], self._slots[:count], self._pages[:count, :columns] = tokens, positions, slots, pages
        for there, rows in zip(self._ngram_rows, ngram_rows):
            there[:count] = rows
        wrong = _place_tokens(
            *self._addresses, *self._pages_at, count, columns, plan.segments, self.stack.window, self._num_positions, self._num_pages
        )
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
        for layer, keys, values, scales in zip(stack.layers, self.keys, self.values, self.scales, strict=True):
            launches.norm(x, added, layer.attention_norm, y, stack.eps)
            launches.products([(y, layer.q, rows_of(q)), (y, layer.k, rows_of(k)), (y, layer.v, rows_of(v))])
            self._store(launches, layer, (q, k, v), keys, values, scales)
            self._attend(launches, grid, q.view(1, tokens, self.heads, dim), keys, values, scales, mixed)
            launches.products([(mixed, layer.out, rows_of(branch))])
            launches.norm(x, branch, layer.mlp_norm, y, stack.eps)
            launches.feed_forward(y, layer, z, h, branch, stack.activation)
            added = branch
        launches.norm(x, added, stack.norm, y, stack.eps)
        logits = matvec.Output(0, self.vocabulary * self._lse.new_empty(0, dtype=self.dtype).element_size())
        (output,) = launches.products([(y, stack.output, logits)])
        return _Plan(launches, grid.table.ctypes.data, output)

    def _tables_of(self, stack: Stack) -> np.ndarray:
        """`_Table` of each table of embeddings, (tables, 5) int64: of tokens first."""
        looked_up = [(self._tokens, stack.embedding), *zip(self._ngram_rows, stack.ngram_embeddings)]
        if stack.position_embedding is not None:
            looked_up.insert(1, (self._positions, stack.position_embedding))
        self._kept = [dense(weight) for _, weight in looked_up]
        return np.array(
            [
                _table(
                    numbers=numbers.ctypes.data,
                    weight=weight.data_ptr(),
                    row=weight.stride(0) * weight.element_size(),
                    half=is_half(weight),
                    num_rows=len(weight),
                )
                for (numbers, _), weight in zip(looked_up, self._kept)
            ],
            np.int64,
        )

    def _looking_up(self, x: Tensor, spare: Tensor) -> Sequence[int]:
        return _embedding(
            tables=self._embeddings.ctypes.data,
            num_tables=len(self._embeddings),
            num_whole=len(self._embeddings) - len(self._ngram_rows),
            out=x.data_ptr(),
            spare=spare.data_ptr(),
            row=x.stride(0) * x.element_size(),
            half=is_half(x),
            columns=x.shape[1],
        )

    def _store(
        self, launches: Launches, layer: Layer, projected: tuple[Tensor, Tensor, Tensor], keys: Tensor, values: Tensor,
        scales: tuple[Tensor, Tensor] | None,
    ) -> None:  # fmt: skip
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
            key_scales=0 if scales is None else scales[0].data_ptr(),
            value_scales=0 if scales is None else scales[1].data_ptr(),
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

    def _attend(
        self, launches: Launches, grid: attention.Grid, q: Tensor, keys: Tensor, values: Tensor, scales: tuple[Tensor, Tensor] | None, out: Tensor
    ) -> None:
        k, v = (pool.flatten(0, 1)[None] for pool in (keys, values))
        tiles = int(self.dtype == torch.bfloat16 and bf16_kernel() == TILES)
        arguments = (
            *at.shared(
                q, k, v, out, self._lse, causal=True, window=self.stack.window, segments=grid.table, scratch=aligned(self._attention_scratch),
                scratch_size=self._attention_bytes, scales=scales,
            ),
            *attention.own_arguments(tiles=tiles, configuration=CONFIGURATION),
        )  # fmt: skip
        launches.add(attention._forward_kernel, grid.tasks, arguments, at.options(scale=self.stack.head_dim**-0.5, softcap=0.0))
