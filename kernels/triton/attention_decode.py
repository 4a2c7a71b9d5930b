"""Attention of few queries over many keys, as in decoding: the keys are split into sections of a fixed length, each for a block of its own, and a
second kernel joins the sections in order (Flash-Decoding, Dao et al. 2023). All queries of the heads that share keys form one tile."""

import triton
import triton.language as tl

from cllm.kernels.triton.attention_forward import LN_2, LOG2_E, block_and_pair, forward_steps, key_blocks, key_limits


@triton.jit
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, first_ptr, end_ptr, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    num_queries, num_keys, num_kv_heads, group, window, factor, softcap, head_dim, section, CAUSAL: tl.constexpr, LOWER: tl.constexpr,
    FLIP: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One section of the keys -> part (sections, B, Hkv, rows, D) float32 and part_lse (sections, B, Hkv, rows), rows = G x T."""
    rows = group * num_queries
    num_sections = tl.cdiv(num_keys, section)
    num_tiles = tl.cdiv(rows, BLOCK_M)
    block, pair = block_and_pair(num_sections * num_tiles)
    index = block % num_sections
    batch = (pair // num_kv_heads).to(tl.int64)
    head = (pair % num_kv_heads).to(tl.int64)
    row = block // num_sections * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    t = tl.where(inside, row % num_queries, num_queries)
    of_group = (row // num_queries).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    here = inside[:, None] & ((d < head_dim)[None, :] if PADDED else True)
    at = batch * q_batch + (head * group + of_group) * q_head + t.to(tl.int64) * q_token
    q = tl.load(q_ptr + at[:, None] + d[None, :], mask=here, other=0.0)
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    lo, hi = key_limits(t, num_queries, num_keys, window, first_ptr, end_ptr, CAUSAL, LOWER)
    start = index * section
    lo = tl.maximum(lo, start)
    hi = tl.minimum(hi, start + section)
    begin, _, end = key_blocks(lo, hi, inside, num_keys, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, largest, total = forward_steps(  # bound by memory: a mask costs nothing
        acc, largest, total, q, k_ptr, v_ptr, k_token, v_token, lo, hi, begin, end, num_keys, factor, softcap, d, head_dim, True,
        FLIP, SOFTCAP, BLOCK_N, BLOCK_D, PADDED, PRECISION,
    )  # fmt: skip
    in_base_2 = LOG2_E if SOFTCAP else factor * LOG2_E
    nothing = total == 0.0
    lse = tl.where(nothing, float("-inf"), largest * in_base_2 + tl.log2(tl.where(nothing, 1.0, total)))
    num_pairs = tl.num_programs(0) // (num_sections * num_tiles)
    place = (index.to(tl.int64) * num_pairs + pair) * rows + row
    tl.store(part_ptr + place[:, None] * head_dim + d[None, :], acc / tl.where(nothing, 1.0, total)[:, None], mask=here)
    tl.store(part_lse_ptr + place, lse, mask=inside)


@triton.jit
def attention_join_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, num_sections, num_queries, num_kv_heads, group, head_dim, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One row of all sections, in order, into out (B, T, H, D) and lse (B, H, T)."""
    rows = group * num_queries
    row, pair = block_and_pair(rows)
    num_pairs = (tl.num_programs(0) // rows).to(tl.int64)
    pair = pair.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for section in range(num_sections):
        place = (section * num_pairs + pair) * rows + row
        lse = tl.load(part_lse_ptr + place + tl.zeros([1], tl.int64))
        larger = tl.maximum(largest, lse)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        weight = tl.exp2(lse - shift)
        rescale = tl.exp2(largest - shift)
        acc = acc * rescale + weight * tl.load(part_ptr + place * head_dim + d, mask=d < head_dim, other=0.0)
        total = total * rescale + weight
        largest = larger
    nothing = total == 0.0
    batch = pair // num_kv_heads
    head = pair % num_kv_heads * group + row // num_queries
    t = row % num_queries
    num_heads = num_kv_heads * group
    tl.store(out_ptr + ((batch * num_queries + t) * num_heads + head) * head_dim + d, acc / tl.where(nothing, 1.0, total), mask=d < head_dim)
    lse = tl.where(nothing, float("-inf"), (largest + tl.log2(tl.where(nothing, 1.0, total))) * LN_2)
    tl.store(lse_ptr + (batch * num_heads + head) * num_queries + t + tl.zeros([1], tl.int64), lse)
