"""Attention over pages on a GPU: pieces of prompts and single tokens of many sequences in one launch that depends on no value of the host's.

A tile holds the queries of one sequence and the heads that share a key-value head, as many as it has rows. Its sections of the keys, of a fixed
length, are blocks of their own, and a second kernel joins them in order (Flash-Decoding, Dao et al. 2023). The tiles of prompts are those of
decoding, and a block of keys of which a query sees nothing leaves no trace: so a row has the same bits in any company. Which sequence a tile belongs
to is counted from `queries` by each block; those behind the last tile have nothing to do.

N tokens of R sequences, H query heads, G of them to each of Hkv key-value heads, D head dim, P pages, M page numbers of a sequence.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.operations import PAGE
from cllm.kernels.triton.attention import decode_tiles
from cllm.kernels.triton.attention_decode import attention_join_kernel
from cllm.kernels.triton.attention_forward import LOG2_E, block_and_pair, forward_steps
from cllm.kernels.triton.launch import Calls, launch, next_power_of_2
from cllm.kernels.triton.matmul import precision_of
from cllm.runtime.gpu import GPU, gpu_of

SECTION = 512  # keys of one block: whole pages
PARTS_BYTES = 256 << 20  # of what the sections leave to be joined; the tokens of longer calls come in several launches
_PAGE = tl.constexpr(PAGE)


@triton.jit
def tile_of(index, queries_ptr, num_sequences, tile_queries, BLOCK_R: tl.constexpr):
    """The sequence of a tile, its number of queries, its first token of all, and the first of its queries in the tile."""
    r = tl.arange(0, BLOCK_R)
    counts = tl.load(queries_ptr + r, mask=r < num_sequences, other=0).to(tl.int32)
    tiles = (counts + tile_queries - 1) // tile_queries
    tile_ends = tl.cumsum(tiles, 0)
    sequence = tl.sum((tile_ends <= index).to(tl.int32), 0)
    of_sequence = r == sequence
    count = tl.sum(tl.where(of_sequence, counts, 0), 0)
    token = tl.sum(tl.where(of_sequence, tl.cumsum(counts, 0) - counts, 0), 0)
    first = (index - tl.sum(tl.where(of_sequence, tile_ends - tiles, 0), 0)) * tile_queries
    return sequence, count, token, first


@triton.jit
def paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, pages_ptr, lengths_ptr, queries_ptr, part_ptr, part_lse_ptr, q_token, q_head, pages_row,
    first_token, num_tokens, num_sequences, num_pages, num_kv_heads, group, window, factor, head_dim, section, FLIP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile and one section of its keys -> part (sections, tokens, Hkv, G, D) float32 and part_lse (sections, tokens, Hkv, G).

    num_pages: page numbers of a sequence. Of all tokens those from first_token on are written, num_tokens of them. k_scales_ptr, v_scales_ptr: of a
    pool of int8, or None.
    """
    num_places = num_pages * _PAGE
    num_sections = tl.cdiv(num_places, section)
    tile_heads = tl.minimum(group, BLOCK_M)
    block, pair = block_and_pair(num_sections * tl.cdiv(group, BLOCK_M))
    index = block % num_sections
    head = pair % num_kv_heads
    sequence, count, token, first = tile_of(pair // num_kv_heads, queries_ptr, num_sequences, BLOCK_M // tile_heads, BLOCK_R)
    exists = sequence < num_sequences
    length = tl.minimum(tl.load(lengths_ptr + sequence, mask=exists, other=0), num_places).to(tl.int32)
    row = tl.arange(0, BLOCK_M)
    query = first + row // tile_heads
    of_group = block // num_sections * BLOCK_M + row % tile_heads
    token += query - first_token
    inside = exists & (row < BLOCK_M // tile_heads * tile_heads) & (query < count) & (of_group < group) & (token >= 0) & (token < num_tokens)
    d = tl.arange(0, BLOCK_D)
    here = inside[:, None] & ((d < head_dim)[None, :] if PADDED else True)
    at = (token + first_token).to(tl.int64) * q_token + (head * group + of_group).to(tl.int64) * q_head
    q = tl.load(q_ptr + at[:, None] + d[None, :], mask=here, other=0.0)
    position = length - count + query
    lo = tl.zeros_like(position) + index * section
    if window > 0:
        lo = tl.maximum(lo, position - window + 1)
    lo = tl.where(inside, lo, num_places)
    hi = tl.where(inside, tl.minimum(position + 1, index * section + section), 0)
    begin = tl.min(lo, 0) // BLOCK_N * BLOCK_N
    end = tl.max(hi, 0)
    stride = (num_kv_heads * head_dim).to(tl.int64)
    k_ptr += head * head_dim
    v_ptr += head * head_dim
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for number in range(begin // _PAGE, tl.cdiv(end, _PAGE)):
        page = tl.load(pages_ptr + sequence.to(tl.int64) * pages_row + number)
        moved = (page - number).to(tl.int64) * _PAGE * stride  # from where these keys would lie without pages
        k_scales = k_scales_ptr
        v_scales = v_scales_ptr
        if k_scales_ptr is not None:
            moved_scales = (page - number).to(tl.int64) * _PAGE * num_kv_heads + head
            k_scales += moved_scales
            v_scales += moved_scales
        acc, largest, total = forward_steps(  # `end` in place of the number of keys: nothing behind it is read
            acc, largest, total, q, k_ptr + moved, v_ptr + moved, stride, stride, lo, hi, tl.maximum(begin, number * _PAGE),
            tl.minimum(end, number * _PAGE + _PAGE), end, factor, 0.0, d, head_dim, True, FLIP, False, BLOCK_N, BLOCK_D, PADDED, PRECISION, True,
            k_scales=k_scales, v_scales=v_scales, scale_stride=num_kv_heads,
        )  # fmt: skip
    nothing = total == 0.0
    lse = tl.where(nothing, float("-inf"), largest * (factor * LOG2_E) + tl.log2(tl.where(nothing, 1.0, total)))
    place = ((index.to(tl.int64) * num_tokens + token) * num_kv_heads + head) * group + of_group
    tl.store(part_ptr + place[:, None] * head_dim + d[None, :], acc / tl.where(nothing, 1.0, total)[:, None], mask=here)
    tl.store(part_lse_ptr + place, lse, mask=inside)


def forward(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor, queries: Tensor, window: int, scale: float,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """q (N, H, D), keys and values (P, PAGE, Hkv, D), pages (R, M) int32, lengths and queries (R,) int64 -> (N, H, D). scales: two (P, PAGE, Hkv)
    float32, where keys and values are int8."""
    num_tokens, num_heads, head_dim = q.shape
    num_sequences, num_pages = pages.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q = q if q.stride(-1) == 1 or head_dim == 1 else q.contiguous()
    pages, lengths, queries = pages if pages.stride(-1) == 1 else pages.contiguous(), lengths.contiguous(), queries.contiguous()
    num_kv_heads = keys.shape[2]
    group, sections = num_heads // num_kv_heads, -(-num_pages * PAGE // SECTION)
    width = max(16, next_power_of_2(head_dim))
    tiles = decode_tiles(width, q.dtype, gpu_of(q.device))
    if width == 256:  # four warps have no registers for the addresses of pages as well
        tiles["num_warps"] = 8
    if scales is not None:  # nor for as many keys in float32
        tiles |= {"BLOCK_N": max(16, tiles["BLOCK_N"] // 2), "num_stages": 2}
    rows = tiles["BLOCK_M"]
    most_tiles = num_sequences + (num_tokens - num_sequences) // (rows // min(group, rows))
    step = max(1, min(num_tokens, PARTS_BYTES // (sections * num_heads * head_dim * 4)))
    for first in range(0, num_tokens, step):
        count = min(step, num_tokens - first)
        part = torch.empty((sections, count, num_kv_heads, group, head_dim), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((sections, count, num_kv_heads, group), dtype=torch.float32, device=q.device)
        launch(
            paged_attention_kernel, (sections * -(-group // rows) * most_tiles * num_kv_heads,), q, keys, values, *(scales or (None, None)), pages,
            lengths, queries, part, part_lse, q.stride(0), q.stride(1), pages.stride(0), first, count, num_sequences, num_pages, num_kv_heads, group,
            window, max(abs(scale), 1e-30), head_dim, SECTION, FLIP=scale < 0, BLOCK_R=max(16, next_power_of_2(num_sequences)), BLOCK_M=rows,
            BLOCK_N=tiles["BLOCK_N"], BLOCK_D=width, PADDED=width != head_dim, PRECISION=precision_of(q.dtype), num_warps=tiles["num_warps"],
            num_stages=tiles["num_stages"],
        )  # fmt: skip
        lse = torch.empty((count, num_heads), dtype=torch.float32, device=q.device)
        launch(
            attention_join_kernel, (count * num_heads,), part, part_lse, out[first:], lse, sections, 1, num_kv_heads, group, head_dim, BLOCK_D=width,
            num_warps=1,
        )  # fmt: skip
    return out


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    for head_dim in (64, 128, 256, 80):
        pool, numbers = empty(128, PAGE, 2, head_dim), empty(16, of=torch.int64)
        for name, window, scale in (("", 0, 1.0), (" window", 256, 1.0), (" negative scale", 0, -1.0)):
            arguments = (empty(80, 8, head_dim), pool, pool, empty(16, 32, of=torch.int32), numbers, numbers, window, scale)
            yield f"paged attention D{head_dim}{name}", partial(forward, *arguments)
    for head_dim in (64, 128, 256, 80):
        pool, scales, numbers = empty(128, PAGE, 2, head_dim, of=torch.int8), empty(128, PAGE, 2, of=torch.float32), empty(16, of=torch.int64)
        of_int8 = (empty(80, 8, head_dim), pool, pool, empty(16, 32, of=torch.int32), numbers, numbers, 0, 1.0, (scales, scales))
        yield f"paged attention D{head_dim} int8", partial(forward, *of_int8)
