"""Attention of the newest tokens of several sequences, whose keys and values lie in pages of a pool that all of them share.

N newest tokens of R sequences together, H query heads, Hkv key-value heads, D head dim, P pages of the pool, M page numbers of a sequence.
"""

import numpy as np
import torch
from torch import Tensor

from cllm.kernels._checks import check_floating, check_heads
from cllm.kernels._operator import operation
from cllm.kernels._register import backend
from cllm.kernels.operations import PAGE, first_page
from cllm.runtime.errors import UserError

__all__ = ["PAGE", "paged_attention"]


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor, queries: Tensor, *, window: int | None = None,
    scale: float | None = None, scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of q (N, H, D), the newest tokens of R sequences one sequence after the other -> (N, H, D); no gradients.

    keys, values (P, 128, Hkv, D), contiguous: the pool. pages (R, M) int32: the token at position p of sequence r lies in page
    `pages[r, p // 128]`, at place p % 128; sequences may share pages. lengths (R,) int64: keys of each sequence, those of its own newest tokens
    included. queries (R,) int64, at least 1 each, N together: query i of n stands at position length - n + i and sees the keys up to its own, and
    with `window` only the last so many of them. `scale` defaults to D ** -0.5.

    scales: two (P, 128, Hkv) float32 of keys and values that are int8 (`quantize_rows` of kernels/quantization.py). The result is that for
    the pool that `dequantize_rows` makes of them in q's dtype, on a CPU bit for bit.

    Each row has the bits that it has without the others; on a CPU those of `attention` of its sequence alone. What lies in the pool behind a
    sequence's length, and page numbers that none of its queries needs, may be anything. lengths, queries and pages lie on q's device; on a CPU
    their values are checked. Raises UserError for shapes, dtypes or values that do not fit (vLLM's PagedAttention: Kwon et al. 2023,
    arXiv 2309.06180).
    """
    if q.dim() != 3 or keys.dim() != 4 or keys.shape != values.shape or keys.shape[1] != PAGE or q.shape[2] != keys.shape[3]:
        raise UserError(
            f"paged_attention: q {tuple(q.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit together. "
            f"Expected q (N, H, D), keys and values (pages, {PAGE}, Hkv, D)."
        )
    check_heads("paged_attention", q.shape[1], keys.shape[2], q.shape[2])
    if scales is None:
        check_floating("paged_attention", q=q, keys=keys, values=values)
    else:
        _check_int8(q, keys, values, *scales)
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise UserError("paged_attention: keys and values must be contiguous: a copy of the pool at every call would cost more than the attention.")
    _check_table(q, pages, lengths, queries)
    if window is not None and window < 1:
        raise UserError(f"paged_attention: window must be >= 1, got {window}. Use None for no window.")
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    return _paged_attention(q.detach(), keys.detach(), values.detach(), pages, lengths, queries, window or 0, scale, *(scales or (None, None)))


def _check_int8(q: Tensor, keys: Tensor, values: Tensor, key_scales: Tensor, value_scales: Tensor) -> None:
    check_floating("paged_attention", q=q)
    if keys.dtype != torch.int8 or values.dtype != torch.int8:
        raise UserError(f"paged_attention: scales belong to keys and values of int8, got {keys.dtype} and {values.dtype}. Leave them out.")
    for each in (key_scales, value_scales):
        if each.dtype != torch.float32 or each.shape != keys.shape[:3] or not each.is_contiguous():
            raise UserError(f"paged_attention: scales must be float32 {tuple(keys.shape[:3])}, contiguous, got {each.dtype} {tuple(each.shape)}.")
    if not q.device == keys.device == values.device == key_scales.device == value_scales.device:
        raise UserError(f"paged_attention: q is on {q.device}, keys, values or scales on another device. Move one.")


def _check_table(q: Tensor, pages: Tensor, lengths: Tensor, queries: Tensor) -> None:
    if pages.dtype != torch.int32 or pages.dim() != 2:
        raise UserError(f"paged_attention: pages must be int32 (sequences, pages of each), got {pages.dtype} {tuple(pages.shape)}.")
    for name, tensor in (("lengths", lengths), ("queries", queries)):
        if tensor.dtype != torch.int64 or tensor.shape != pages.shape[:1]:
            raise UserError(f"paged_attention: {name} must be int64 ({pages.shape[0]},), got {tensor.dtype} {tuple(tensor.shape)}.")
    for name, tensor in (("pages", pages), ("lengths", lengths), ("queries", queries)):
        if tensor.device != q.device:
            raise UserError(f"paged_attention: {name} is on {tensor.device} and q on {q.device}. Move one.")


def _check_values(q: Tensor, keys: Tensor, pages: Tensor, lengths: Tensor, queries: Tensor, window: int) -> None:
    """Memory is addressed by these numbers, so they are looked at wherever that does not stall a device."""
    if q.device.type != "cpu":
        return
    numbers, keys_of, queries_of = pages.numpy(), lengths.numpy(), queries.numpy()  # a comparison of NumPy's takes a microsecond, one of torch's five
    if queries_of.sum() != q.shape[0] or (queries_of < 1).any():
        raise UserError(f"paged_attention: queries must be >= 1 and {q.shape[0]} together, as q has rows, got {queries_of.tolist()[:8]}.")
    if (keys_of < queries_of).any():
        raise UserError(
            f"paged_attention: lengths count a sequence's newest tokens too, so they must be >= queries, got {keys_of.tolist()[:8]} "
            f"and {queries_of.tolist()[:8]}."
        )
    end = -(-keys_of // PAGE)
    if (end > pages.shape[1]).any():
        raise UserError(f"paged_attention: {keys_of.max()} keys need {end.max()} pages of {PAGE}, and pages has {pages.shape[1]} columns.")
    wrong = (numbers < 0) | (numbers >= keys.shape[0])
    if wrong.any():  # as page numbers that no query needs may be
        column = np.arange(pages.shape[1])
        wrong &= (column < end[:, None]) & (column >= first_page(keys_of, queries_of, window)[:, None])
        if wrong.any():
            raise UserError(f"paged_attention: pages holds {numbers[wrong][0]}, expected 0 <= page < {keys.shape[0]}, the pages of the pool.")


@operation("paged_attention", lambda q, *_: q.new_empty(q.shape))
def _paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor, queries: Tensor, window: int, scale: float,
    key_scales: Tensor | None = None, value_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check_values(q, keys, pages, lengths, queries, window)
    serving = backend("paged_attention", (q.shape, keys.shape), q.dtype, q.device.type)
    scales = None if key_scales is None or value_scales is None else (key_scales, value_scales)
    return serving.forward(q, keys, values, pages, lengths, queries, window, scale, scales)
