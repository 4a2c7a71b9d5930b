"""Attention on a GPU: which kernel with which tiles, and what packed documents look like to it.

B batch, T query tokens, S key tokens, H query heads, Hkv key-value heads, G = H / Hkv, D head dim.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cllm.kernels.philox import GROUP
from cllm.kernels.triton.attention_backward import attention_delta_kernel, attention_keys_kernel, attention_queries_kernel
from cllm.kernels.triton.attention_decode import attention_decode_kernel, attention_join_kernel
from cllm.kernels.triton.attention_forward import attention_forward_kernel
from cllm.kernels.triton.dropout import NO_DROPOUT
from cllm.kernels.triton.launch import Calls, launch, next_power_of_2
from cllm.kernels.triton.matmul import precision_of
from cllm.runtime.gpu import GPU, gpu_of

FEW_QUERIES = 16  # up to here the keys are split among blocks: queries alone are too few to fill a GPU
NO_PERIOD = 1 << 30
SECTION = 512  # keys of one block then; from the shape alone, so that the bits do not depend on the GPU


# BLOCK_M, BLOCK_N, warps, stages by kernel, then padded head size (64 stands for all below): the largest of those tried that compile without spills
# for every mask and cap with Triton 3.6 and with 3.7. Hopper's and Blackwell's matrix units take operands from shared memory, others' from registers.
_HALF: dict[str, dict[str, dict[int, tuple[int, int, int, int]]]] = {
    "hopper": {
        "forward": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 64, 8, 1)},
        "keys": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 128, 8, 1)},
        "queries": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 4, 1)},
        "decode": {64: (16, 64, 4, 3), 128: (16, 32, 4, 2), 256: (16, 32, 4, 2)},
    },
    "blackwell": {
        "forward": {64: (128, 64, 4, 2), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
        "keys": {64: (64, 128, 8, 1), 128: (32, 128, 8, 1), 256: (32, 32, 8, 1)},
        "queries": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (32, 32, 8, 1)},
        "decode": {64: (16, 64, 4, 3), 128: (16, 32, 4, 2), 256: (16, 32, 4, 2)},
    },
    "other": {
        "forward": {64: (128, 64, 8, 3), 128: (64, 64, 8, 2), 256: (64, 64, 8, 1)},
        "keys": {64: (32, 128, 8, 1), 128: (32, 32, 8, 2), 256: (32, 32, 8, 1)},
        "queries": {64: (128, 64, 8, 2), 128: (64, 32, 4, 2), 256: (16, 32, 4, 1)},
        "decode": {64: (16, 64, 4, 3), 128: (16, 32, 4, 2), 256: (16, 32, 4, 2)},
    },
}
_FLOAT32: dict[str, dict[int, tuple[int, int, int, int]]] = {  # multiplied one by one, unless tf32 is allowed
    "forward": {64: (32, 32, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 4, 1)},
    "keys": {64: (32, 32, 8, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
    "queries": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    "decode": {64: (16, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
}

# The same with dropout, where the mask of a tile leaves no registers for the sizes above: heads of up to 128.
_HALF_DROPOUT: dict[str, dict[str, dict[int, tuple[int, int, int, int]]]] = {
    "hopper": {"keys": {64: (32, 128, 8, 2)}, "queries": {128: (128, 32, 8, 2)}},
    "blackwell": {"keys": {64: (32, 128, 8, 1)}},
    "other": {"keys": {64: (32, 64, 8, 1)}, "queries": {128: (32, 32, 4, 2)}},
}


def _tiles(kind: str, width: int, dtype: torch.dtype, gpu: GPU, dropout: bool = False) -> dict[str, int]:
    family = "hopper" if gpu.is_hopper else "blackwell" if gpu.vendor == "nvidia" and gpu.arch // 10 == 10 else "other"
    table = _FLOAT32 if dtype == torch.float32 else _HALF[family]
    sizes = table[kind][max(64, width)]
    if dropout and dtype != torch.float32:
        sizes = _HALF_DROPOUT[family].get(kind, {}).get(max(64, width), sizes)
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), sizes))


def decode_tiles(width: int, dtype: torch.dtype, gpu: GPU) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps and num_stages for few queries over many keys; width: the padded head size."""
    return _tiles("decode", width, dtype, gpu)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _documents(cu_seqlens: Tensor | None, num_tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """int32 (T,) each: the first key of every token's document, and the first beyond it."""
    if cu_seqlens is None:
        return None, None
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].to(torch.int64), tokens, right=True)
    return cu_seqlens[document], cu_seqlens[document + 1]


def _options(q: Tensor, causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None) -> tuple[list[Any], dict[str, Any]]:
    """(window, |scale|, softcap), and the constants: a negative scale turns the scores round before their maximum is taken."""
    width = max(16, next_power_of_2(q.shape[3]))
    constants = {
        "CAUSAL": causal, "LOWER": window > 0 or cu_seqlens is not None, "FLIP": scale < 0, "SOFTCAP": softcap > 0,
        "BLOCK_D": width, "PADDED": width != q.shape[3], "PRECISION": precision_of(q.dtype),
    }  # fmt: skip
    # 0 would make every exponent 0 * inf at a masked place; the smallest number leaves all scores alike as well.
    return [window, max(abs(scale), 1e-30), softcap], constants


def _ordered(constants: dict[str, Any], tiles: dict[str, int], split: int = 0) -> dict[str, Any]:
    """The constants in the order of the kernels' signatures; the backward's have SPLIT as well."""
    flags, sizes = ("CAUSAL", "LOWER", "FLIP", "SOFTCAP"), ("BLOCK_M", "BLOCK_N", "BLOCK_D", "SPLIT")
    names = (*flags, *sizes, "PADDED", "PRECISION", "ALIGNED", "num_warps", "num_stages")
    both = {**constants, **tiles, **({"SPLIT": split} if split else {})}
    return {name: both[name] for name in names if name in both}


def _split(width: int, dtype: torch.dtype, gpu: GPU, dropout: bool) -> int:
    """Parts of the head that the backward's blocks share: Hopper's wgmma on heads of 256, with dropout of 128, leaves no registers for accumulators
    as wide."""
    return 2 if width >= (128 if dropout else 256) and gpu.is_hopper and dtype != torch.float32 else 1


def _with_dropout(dropout: tuple[Any, ...], period: int, cu_seqlens: Tensor | None) -> tuple[tuple[Any, ...], dict[str, bool]]:
    """(key, threshold, place, scale, period), and whether rows begin at multiples of a group of draws. Without rows the period is beyond any key."""
    return (*dropout, period or NO_PERIOD), {"ALIGNED": cu_seqlens is None or period % GROUP == 0}


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None,
    dropout: tuple[Any, ...] = NO_DROPOUT, period: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, T, H, D) and the log-sum-exp of the scaled scores (B, H, T) float32."""
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1], k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, num_heads, num_queries), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    if num_keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q, k, v = map(_last_contiguous, (q, k, v))
    first, end = _documents(cu_seqlens, num_queries)
    numbers, constants = _options(q, causal, scale, window, softcap, cu_seqlens)
    tiles = _tiles("forward", constants["BLOCK_D"], q.dtype, gpu_of(q.device), dropout is not NO_DROPOUT)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    group = num_heads // num_kv_heads
    if num_queries <= FEW_QUERIES and num_keys > SECTION and dropout is NO_DROPOUT:
        tiles = decode_tiles(constants["BLOCK_D"], q.dtype, gpu_of(q.device))
        sections, rows = -(-num_keys // SECTION), group * num_queries
        part = torch.empty((sections, batch, num_kv_heads, rows, head_dim), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((sections, batch, num_kv_heads, rows), dtype=torch.float32, device=q.device)
        launch(
            attention_decode_kernel, (sections * -(-rows // tiles["BLOCK_M"]) * batch * num_kv_heads,), q, k, v, part, part_lse, first, end,
            *strides, num_queries, num_keys, num_kv_heads, group, *numbers, head_dim, SECTION, **_ordered(constants, tiles),
        )  # fmt: skip
        launch(
            attention_join_kernel, (batch * num_kv_heads * rows,), part, part_lse, out, lse, sections, num_queries, num_kv_heads, group, head_dim,
            BLOCK_D=constants["BLOCK_D"], num_warps=1,
        )  # fmt: skip
        return out, lse
    draws, aligned = _with_dropout(dropout, period, cu_seqlens)
    launch(
        attention_forward_kernel, (-(-num_queries // tiles["BLOCK_M"]) * batch * num_heads,), q, k, v, out, lse, first, end, *strides, num_queries,
        num_keys, num_heads, group, *numbers, head_dim, *draws, **_ordered({**constants, **aligned}, tiles),
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None, dropout: tuple[Any, ...] = NO_DROPOUT, period: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous. dout, out and lse contiguous."""
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1], k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v = map(_last_contiguous, (q, k, v))
    first, end = _documents(cu_seqlens, num_queries)
    numbers, constants = _options(q, causal, scale, window, softcap, cu_seqlens)
    draws, aligned = _with_dropout(dropout, period, cu_seqlens)
    constants |= aligned
    gpu, width, group = gpu_of(q.device), constants["BLOCK_D"], num_heads // num_kv_heads
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    launch(
        attention_delta_kernel, (-(-num_queries // 32) * batch * num_heads,), out, dout, dlse, delta, num_queries, num_heads, head_dim,
        ROWS=32, BLOCK_D=width,
    )  # fmt: skip
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    split = _split(width, q.dtype, gpu, dropout is not NO_DROPOUT)
    tiles = _tiles("keys", width, q.dtype, gpu, dropout is not NO_DROPOUT)
    launch(
        attention_keys_kernel, (-(-num_keys // tiles["BLOCK_N"]) * batch * num_kv_heads, split), q, k, v, dout, lse, delta, dk, dv, first, end,
        *strides, num_queries, num_keys, num_kv_heads, group, *numbers, float(scale), head_dim, *draws, **_ordered(constants, tiles, split),
    )  # fmt: skip
    tiles = _tiles("queries", width, q.dtype, gpu, dropout is not NO_DROPOUT)
    launch(
        attention_queries_kernel, (-(-num_queries // tiles["BLOCK_M"]) * batch * num_heads, split), q, k, v, dout, lse, delta, dq, first, end,
        *strides, num_queries, num_keys, num_heads, group, *numbers, float(scale), head_dim, *draws, **_ordered(constants, tiles, split),
    )  # fmt: skip
    return dq, dk, dv


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    bounds = empty(9, of=torch.int32)
    kinds: dict[str, dict[str, Any]] = {
        "causal": {"causal": True}, "full": {}, "packed": {"causal": True, "cu_seqlens": bounds}, "window": {"causal": True, "window": 256},
        "packed softcap": {"causal": True, "cu_seqlens": bounds, "softcap": 30.0}, "softcap": {"softcap": 30.0},
    }  # fmt: skip
    for head_dim in (64, 128, 256, 80):
        q, k = empty(1, 2048, 8, head_dim), empty(1, 2048, 2, head_dim)
        one, lse = empty(2, 4, 8, head_dim), empty(1, 8, 2048, of=torch.float32)
        for name, given in kinds.items():
            if head_dim == 80 and name not in ("causal", "packed softcap"):
                continue
            options = (given.get("causal", False), head_dim**-0.5, given.get("window", 0), given.get("softcap", 0.0), given.get("cu_seqlens"))
            yield f"attention forward D{head_dim} {name}", partial(forward, q, k, k, *options)
            yield f"attention backward D{head_dim} {name}", partial(backward, q, lse, q, k, k, q, lse, *options)
            if options[4] is None:
                cached = empty(2, 2048, 2, head_dim)
                yield f"attention decode D{head_dim} {name}", partial(forward, one, cached, cached, *options)
