"""Attention over pages on the CPU: the forward pass of `attention.py`, whose blocks of keys are the pages of a table.

N newest tokens of R sequences together, H query heads, Hkv key-value heads, D head dim, P pages of the pool, M page numbers of a sequence.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba import attention
from cllm.kernels.numba import attention_tile as at
from cllm.kernels.numba.attention_tile import KEYS, SEGMENT
from cllm.kernels.numba.launch import at_most, num_workers
from cllm.kernels.operations import PAGE, Shapes, first_page

assert PAGE == KEYS, "a block of keys lies in one page"


def segments(pages: Tensor, lengths: Tensor, queries: Tensor, window: int) -> np.ndarray:
    """The segment table of R sequences, without TASKS and BLOCKS; it holds addresses of rows of `pages`, which the caller keeps alive."""
    table = np.zeros((len(lengths), len(SEGMENT)), np.int64)
    counts, num_keys = queries.numpy(), lengths.numpy()
    table[:, SEGMENT.queries], table[:, SEGMENT.num_keys] = counts, num_keys
    table[:, SEGMENT.start] = np.cumsum(counts) - counts
    table[:, SEGMENT.pages] = pages.data_ptr() + np.arange(len(lengths)) * (pages.stride(0) * pages.element_size())
    table[:, SEGMENT.first_block] = first_page(num_keys, counts, window)
    return table


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers a call uses in which every sequence has one query."""
    (num_queries, heads, _), (_, _, kv_heads, _) = shapes
    return at_most(planned, attention.dense_grid(num_queries, 1, 1, heads, kv_heads).tasks)


def forward(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor, queries: Tensor, window: int, scale: float,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """q (N, H, D), keys and values (P, PAGE, Hkv, D), pages (R, M) int32, lengths and queries (R,) int64 -> (N, H, D). scales: two (P, PAGE, Hkv)
    float32, where keys and values are int8."""
    out = torch.empty(q.shape, dtype=q.dtype)
    if not out.numel():
        return out
    heads, kv_heads = q.shape[1], keys.shape[2]
    lse = torch.empty((1, heads, q.shape[0]), dtype=torch.float32)
    pages = pages.contiguous()
    grid = attention.grid_of(segments(pages, lengths, queries, window), heads, kv_heads)
    planned = num_workers("paged_attention", (q.shape, keys.shape), q.dtype, pairs=at.visible_pairs(grid.table, True, window))
    q, (k, v) = at.strided(q[None]), (x.flatten(0, 1)[None] for x in (keys, values))  # a block of a page is addressed by its first token
    attention.launch(grid, planned, q, k, v, out[None], lse, causal=True, window=window, scale=scale, scales=scales)
    return out
