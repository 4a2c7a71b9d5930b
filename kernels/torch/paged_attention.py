"""Attention over pages in plain torch: each sequence's keys and values are gathered, then it is `attention`."""

import torch
from torch import Tensor

from cllm.kernels.operations import PAGE, first_page
from cllm.kernels.quantization import dequantize_rows
from cllm.kernels.torch import attention


def forward(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor, queries: Tensor, window: int, scale: float,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """q (N, H, D), keys and values (P, PAGE, Hkv, D), pages (R, M) int32, lengths and queries (R,) int64 -> (N, H, D). scales: two (P, PAGE, Hkv)
    float32, where keys and values are int8."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    begin = 0
    for row, length, count in zip(pages, lengths.tolist(), queries.tolist()):
        first = first_page(length, count, window)
        used = row[first : -(-length // PAGE)]
        k, v = (x.index_select(0, used) for x in (keys, values))
        if scales is not None:
            k, v = (dequantize_rows(x, of_x.index_select(0, used), q.dtype) for x, of_x in zip((k, v), scales))
        k, v = (x.flatten(0, 1)[None, : length - first * PAGE] for x in (k, v))
        rows = slice(begin, begin + count)
        out[rows] = attention.forward(q[None, rows], k, v, True, scale, window, 0.0, None)[0][0]
        begin += count
    return out
