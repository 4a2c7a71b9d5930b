"""Attention of one token a row over a key-value cache whose lengths the GPU reads (Flash-Decoding, Dao et al. 2023).

The places of the cache come in sections of a fixed length, each for a block of its own; a second kernel joins the sections in order. The grid covers
the whole cache, whatever it holds: a block whose section no query sees reads nothing and leaves a sum of nothing, which adds exactly 0. So neither
the places behind a row's length nor their number change a bit.

B rows, S places, H query heads, G of them to each of Hkv key-value heads, D head dim.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.triton.attention import decode_tiles
from cllm.kernels.triton.attention_decode import attention_join_kernel
from cllm.kernels.triton.attention_forward import LOG2_E, block_and_pair, forward_steps
from cllm.kernels.triton.launch import Calls, launch, next_power_of_2
from cllm.kernels.triton.matmul import precision_of
from cllm.runtime.gpu import GPU, gpu_of

SECTION = 256  # places of one block: from 1,024 tokens on, a model of 12 heads gives 48 blocks for a single row


@triton.jit
def cached_attention_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, part_ptr, part_lse_ptr, q_batch, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, num_places,
    num_kv_heads, group, window, factor, head_dim, section, FLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One section of a row's keys, all query heads that share them -> part (sections, B, Hkv, G, D) float32 and part_lse (sections, B, Hkv, G)."""
    num_sections = tl.cdiv(num_places, section)
    num_tiles = tl.cdiv(group, BLOCK_M)
    block, pair = block_and_pair(num_sections * num_tiles)
    index = block % num_sections
    batch = (pair // num_kv_heads).to(tl.int64)
    head = (pair % num_kv_heads).to(tl.int64)
    row = block // num_sections * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < group
    d = tl.arange(0, BLOCK_D)
    here = inside[:, None] & ((d < head_dim)[None, :] if PADDED else True)
    at = batch * q_batch + (head * group + row.to(tl.int64)) * q_head
    q = tl.load(q_ptr + at[:, None] + d[None, :], mask=here, other=0.0)
    length = tl.minimum(tl.load(lengths_ptr + batch), num_places).to(tl.int32)
    begin = index * section
    end = tl.minimum(length, begin + section)
    if window > 0:
        begin = tl.maximum(begin, length - window)
    lo = tl.where(inside, begin, num_places)
    hi = tl.where(inside, end, 0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, largest, total = forward_steps(  # `end` in place of the number of keys: nothing behind it is read
        acc, largest, total, q, k_ptr + batch * k_batch + head * k_head, v_ptr + batch * v_batch + head * v_head, k_token, v_token, lo, hi,
        begin // BLOCK_N * BLOCK_N, end, end, factor, 0.0, d, head_dim, True, FLIP, False, BLOCK_N, BLOCK_D, PADDED, PRECISION,
    )  # fmt: skip
    nothing = total == 0.0
    lse = tl.where(nothing, float("-inf"), largest * (factor * LOG2_E) + tl.log2(tl.where(nothing, 1.0, total)))
    num_pairs = tl.num_programs(0) // (num_sections * num_tiles)
    place = (index.to(tl.int64) * num_pairs + pair) * group + row
    tl.store(part_ptr + place[:, None] * head_dim + d[None, :], acc / tl.where(nothing, 1.0, total)[:, None], mask=here)
    tl.store(part_lse_ptr + place, lse, mask=inside)


def forward(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int, scale: float) -> Tensor:
    """q (B, 1, H, D), keys and values (B, S, Hkv, D), lengths (B,) int64 -> (B, 1, H, D)."""
    batch, _, num_heads, head_dim = q.shape
    num_places, num_kv_heads = keys.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if num_places == 0:
        return out.zero_()
    q, keys, values = (x if x.stride(-1) == 1 or head_dim == 1 else x.contiguous() for x in (q, keys, values))
    group, sections = num_heads // num_kv_heads, -(-num_places // SECTION)
    width = max(16, next_power_of_2(head_dim))
    tiles = decode_tiles(width, q.dtype, gpu_of(q.device))
    part = torch.empty((sections, batch, num_kv_heads, group, head_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((sections, batch, num_kv_heads, group), dtype=torch.float32, device=q.device)
    launch(
        cached_attention_kernel, (sections * -(-group // tiles["BLOCK_M"]) * batch * num_kv_heads,), q, keys, values, lengths, part, part_lse,
        q.stride(0), q.stride(2), *keys.stride()[:3], *values.stride()[:3], num_places, num_kv_heads, group, window, max(abs(scale), 1e-30), head_dim,
        SECTION, FLIP=scale < 0, BLOCK_M=tiles["BLOCK_M"], BLOCK_N=tiles["BLOCK_N"], BLOCK_D=width, PADDED=width != head_dim,
        PRECISION=precision_of(q.dtype), num_warps=tiles["num_warps"], num_stages=tiles["num_stages"],
    )  # fmt: skip
    lse = torch.empty((batch, num_heads), dtype=torch.float32, device=q.device)
    launch(
        attention_join_kernel, (batch * num_heads,), part, part_lse, out, lse, sections, 1, num_kv_heads, group, head_dim, BLOCK_D=width, num_warps=1
    )
    return out


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    for head_dim in (64, 128, 256, 80):
        cache = empty(2, 2048, 2, head_dim)
        for name, window, scale in (("", 0, 1.0), (" window", 256, 1.0), (" negative scale", 0, -1.0)):
            arguments = (empty(2, 1, 8, head_dim), cache, cache, empty(2, of=torch.int64), window, scale)
            yield f"cached attention D{head_dim}{name}", partial(forward, *arguments)
