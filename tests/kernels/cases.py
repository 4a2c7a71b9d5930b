"""The cases of every operation, each with the plain-torch computation that it is measured against (see `oracle.py`)."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cllm_kernel_oracle import Case, Inputs  # loaded by conftest.py under this name: test folders are no packages
from torch import Tensor

from cllm import kernels

# ---- attention ----------------------------------------------------------------------------------------------------------------------


def visible_keys(num_queries: int, num_keys: int, causal: bool, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    return _visible_keys(num_queries, num_keys, causal, window, None if cu_seqlens is None else tuple(cu_seqlens.tolist()))


@functools.cache
def _visible_keys(num_queries: int, num_keys: int, causal: bool, window: int | None, bounds: tuple[int, ...] | None) -> Tensor:
    """(T, S) bool, written as loops so that it shares nothing with the kernels."""
    document = [0] * num_keys
    for index, (start, end) in enumerate(itertools.pairwise(bounds or ())):
        document[start:end] = [index] * (end - start)
    seen = []
    for position in range(num_keys - num_queries, num_keys):
        for s in range(num_keys):
            seen.append(
                (not causal or s <= position) and (window is None or s > position - window) and (bounds is None or document[s] == document[position])
            )
    return torch.tensor(seen, dtype=torch.bool, device="cpu").view(num_queries, num_keys)


def plain_attention(q, k, v, *, causal=False, scale=None, window=None, softcap=None, cu_seqlens=None, sinks=None, return_lse=False):
    seen = visible_keys(q.shape[1], k.shape[1], causal, window, cu_seqlens).to(q.device)
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if softcap is None and sinks is None and not return_lse:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True).transpose(1, 2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    lse = torch.logsumexp(scores, -1)
    out = (torch.softmax(scores, -1)[..., : k.shape[-2]].to(q.dtype) @ v).transpose(1, 2)
    return (out, lse) if return_lse else out


def attention_case(name: str, make: Callable[[Inputs], dict[str, Any]], cu_seqlens: Tensor | None = None, **options: Any) -> Case:
    return Case(
        "attention",
        name,
        lambda i: make(i) | ({} if cu_seqlens is None else {"cu_seqlens": cu_seqlens.to(i.device)}),
        lambda **tensors: kernels.attention(**tensors, **options),
        lambda **tensors: plain_attention(**tensors, **options),
        lse_size=8.0,
    )


def qkv(batch: int, num_queries: int, num_keys: int, heads: int, kv_heads: int, head_dim: int) -> Callable[[Inputs], dict[str, Any]]:
    return lambda i: {
        "q": i.normal(batch, num_queries, heads, head_dim),
        "k": i.normal(batch, num_keys, kv_heads, head_dim),
        "v": i.normal(batch, num_keys, kv_heads, head_dim),
    }


def _slices_of_one_tensor(i: Inputs) -> dict[str, Any]:
    fused = i.normal(2, 19, 3, 2, 40)[..., 4:36]  # as a fused projection gives them, and cut once more
    return {"q": fused[:, :, 0], "k": fused[:, :, 1], "v": fused[:, :, 2]}


def _heads_first_layout(i: Inputs) -> dict[str, Any]:
    return {
        "q": i.normal(2, 4, 18, 32).transpose(1, 2),
        "k": i.normal(2, 2, 18, 32).transpose(1, 2),
        "v": i.normal(2, 2, 32, 18).permute(0, 3, 1, 2),
    }


def _expanded_keys(i: Inputs) -> dict[str, Any]:
    return {
        "q": i.normal(2, 9, 4, 16),
        "k": i.normal(1, 9, 1, 16).expand(2, 9, 4, 16),
        "v": i.normal(1, 9, 4, 16).expand(2, 9, 4, 16),
    }


_BOUNDS = torch.tensor([0, 5, 5, 18, 33], dtype=torch.int32)  # the second document is empty
ATTENTION = [
    attention_case("full", qkv(2, 21, 21, 2, 2, 32)),
    attention_case("causal_odd_head_size", qkv(1, 37, 37, 3, 3, 20), causal=True),
    attention_case("causal_many_blocks", qkv(1, 150, 150, 2, 1, 64), causal=True),
    attention_case("grouped_query", qkv(2, 17, 17, 6, 2, 32), causal=True, scale=0.3),
    attention_case("one_kv_head_large_head", qkv(1, 11, 11, 3, 1, 136), causal=True),
    attention_case("decode_one_query", qkv(2, 1, 45, 4, 2, 32), causal=True),
    attention_case("few_queries_many_keys", qkv(1, 7, 70, 2, 2, 32), causal=True),
    attention_case("cross_attention", qkv(1, 30, 7, 2, 2, 32)),
    attention_case("window", qkv(1, 75, 75, 2, 2, 32), causal=True, window=13),
    attention_case("window_without_causal", qkv(1, 33, 33, 2, 2, 32), window=9),
    attention_case("softcap", qkv(1, 23, 23, 2, 2, 32), causal=True, softcap=2.0),
    attention_case("packed_documents", qkv(1, 33, 33, 4, 2, 32), causal=True, cu_seqlens=_BOUNDS),
    attention_case("packed_window_softcap", qkv(1, 33, 33, 2, 2, 32), causal=True, window=4, softcap=3.0, cu_seqlens=_BOUNDS),
    attention_case("lse_gradient", qkv(1, 19, 26, 4, 2, 32), causal=True, return_lse=True),
    attention_case("lse_gradient_softcap", qkv(1, 19, 19, 2, 2, 32), causal=True, softcap=4.0, return_lse=True),
    attention_case("sinks", lambda i: {**qkv(2, 9, 12, 4, 2, 16)(i), "sinks": i.normal(4)}, causal=True, return_lse=True),
    attention_case("sinks_window_softcap", lambda i: {**qkv(1, 23, 23, 2, 2, 32)(i), "sinks": i.normal(2)}, causal=True, window=5, softcap=2.0),
    attention_case("slices_of_one_tensor", _slices_of_one_tensor, causal=True),
    attention_case("heads_first_layout", _heads_first_layout, causal=True),
    attention_case("expanded_keys", _expanded_keys),
    attention_case("no_batch", qkv(0, 4, 4, 2, 2, 32), causal=True),
    attention_case("no_queries", qkv(1, 0, 4, 2, 2, 32)),
]


# ---- dropout ------------------------------------------------------------------------------------------------------------------------

SEED, STEP, FIRST_TOKEN = 0x0123456789ABCDEF, 41, 2**32 - 9  # tokens are counted beyond a word


def drawn(seed: int, step: int, place: Any, token: Any, element: Any) -> np.ndarray:
    """The draws of 16 bits of whole numbers that broadcast, as the definition in `kernels/philox.py` says it: Philox4x32-10 of Salmon et al. 2011."""
    word = np.uint64(0xFFFFFFFF)
    place, token, element = (np.asarray(each, dtype=np.int64).astype(np.uint64) for each in (place, token, element))
    group, lane, slot = element // np.uint64(128), element % np.uint64(16), element // np.uint64(16) % np.uint64(8)
    x = [each & word for each in np.broadcast_arrays(group * np.uint64(16) + lane, token, place, np.uint64(step))]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        x = [(second >> np.uint64(32)) ^ x[1] ^ key[0], second & word, (first >> np.uint64(32)) ^ x[3] ^ key[1], first & word]
        key = [(each + np.uint64(step)) & word for each, step in zip(key, (0x9E3779B9, 0xBB67AE85))]
    words = np.stack(x, -1)
    chosen = np.take_along_axis(words, np.broadcast_to(slot // np.uint64(2), words.shape[:-1])[..., None].astype(np.int64), -1)[..., 0]
    return (chosen >> (slot % np.uint64(2) * np.uint64(16))) & np.uint64(0xFFFF)


def dropout_factors(rate: float, place: Any, token: Any, element: Any) -> Tensor:
    """float64: 0 where dropout drops, elsewhere 1 / (1 - rate), the rate being a multiple of 2**-16."""
    limit = round(rate * 65536)
    kept = drawn(SEED, STEP, place, np.asarray(token) + FIRST_TOKEN, element) >= limit
    return torch.from_numpy(np.where(kept, 65536 / (65536 - limit), 0.0))


def dropout_at(i: Inputs, rate: float) -> kernels.Dropout:
    dropout = kernels.Dropout.of(rate, SEED, i.device)
    dropout.go_to(STEP, FIRST_TOKEN)
    return dropout


def attention_factors(q: Tensor, k: Tensor, rate: float, place: int, cu_seqlens: Tensor | None, period: int) -> Tensor:
    """(B, H, T, S)."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    element = np.arange(keys)
    if cu_seqlens is not None and period:
        for start, end in itertools.pairwise(cu_seqlens.tolist()):
            element[start:end] -= start // period * period
    token = np.arange(batch * queries).reshape(batch, 1, queries, 1)
    return dropout_factors(rate, place + np.arange(heads).reshape(1, heads, 1, 1), token, element).to(q.device)


def plain_attention_dropout(q, k, v, dropout, place, *, causal=False, window=None, softcap=None, cu_seqlens=None, period=0, return_lse=False):
    seen, group = visible_keys(q.shape[1], k.shape[1], causal, window, cu_seqlens).to(q.device), q.shape[2] // k.shape[2]
    factors = attention_factors(q, k, dropout.rate, place, cu_seqlens, period)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(group, 1), v.transpose(1, 2).repeat_interleave(group, 1)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)).masked_fill(~seen, float("-inf"))
    out = ((torch.softmax(scores, -1) * factors.to(wide)).to(q.dtype) @ v).transpose(1, 2)
    return (out, torch.logsumexp(scores, -1)) if return_lse else out


def attention_dropout_case(
    name: str, make: Callable[[Inputs], dict[str, Any]], rate: float, place: int = 7, cu_seqlens: Tensor | None = None, **options: Any
) -> Case:
    def ours(key: Tensor, **tensors: Any) -> Any:
        return kernels.attention_dropout(dropout=kernels.Dropout(rate, key), place=place, **tensors, **options)

    def plain(key: Tensor, **tensors: Any) -> Any:
        return plain_attention_dropout(dropout=kernels.Dropout(rate, key), place=place, **tensors, **options)

    def tensors(i: Inputs) -> dict[str, Any]:
        packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens.to(i.device)}
        return make(i) | packed | {"key": dropout_at(i, rate).key}

    return Case("attention_dropout", name, tensors, ours, plain, lse_size=8.0)


def norm_dropout_case(name: str, make: Callable[[Inputs], dict[str, Any]], rate: float, place: int = 3, centre: bool = False) -> Case:
    def ours(key: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Any:
        dropout = kernels.Dropout(rate, key)
        if centre:
            return kernels.layer_norm_dropout(x, weight, bias, dropout, place, residual=residual)
        return kernels.rms_norm_dropout(x, weight, dropout, place, residual=residual)

    def plain(key: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Any:
        rows, columns = x.numel() // max(1, x.shape[-1]), x.shape[-1]
        factors = dropout_factors(rate, place, np.arange(rows)[:, None], np.arange(columns)).view(x.shape).to(x.device)
        h = x * factors.to(x.dtype)
        h = h if residual is None else h + residual
        if centre:
            return F.layer_norm(h, h.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), 1e-5), h
        return F.rms_norm(h, h.shape[-1:], weight.to(x.dtype), 1e-6), h

    return Case("norm_dropout", name, lambda i: make(i) | {"key": dropout_at(i, rate).key}, ours, plain)


_ROWS = torch.tensor([0, 5, 16, 16, 32, 40, 48], dtype=torch.int32)  # documents in three rows of 16
DROPOUT = [
    attention_dropout_case("causal_many_blocks", qkv(1, 150, 150, 2, 1, 32), 0.2, causal=True),
    attention_dropout_case("grouped_query_batches", qkv(2, 37, 37, 4, 2, 20), 0.5, causal=True),
    attention_dropout_case("packed_rows", qkv(1, 48, 48, 2, 2, 16), 0.2, cu_seqlens=_ROWS, causal=True, period=16),
    attention_dropout_case("packed_window_softcap_no_rows", qkv(1, 48, 48, 2, 1, 16), 0.1, cu_seqlens=_ROWS, causal=True, window=6, softcap=3.0),
    attention_dropout_case("lse_gradient_more_keys", qkv(1, 19, 40, 4, 2, 32), 0.3, causal=True, return_lse=True),
    attention_dropout_case("slices_of_one_tensor", _slices_of_one_tensor, 0.9, causal=True),
    attention_dropout_case("no_queries", qkv(1, 0, 4, 2, 2, 32), 0.2),
    norm_dropout_case("rms_odd_width", lambda i: {"x": i.normal(4, 19, 67), "weight": i.normal(67)}, 0.2),
    norm_dropout_case("rms_residual", lambda i: {"x": i.normal(37, 160), "weight": i.master(160), "residual": i.normal(37, 160)}, 0.1),
    norm_dropout_case("rms_strided", lambda i: {"x": i.normal(48, 30).T[::2], "weight": i.normal(48), "residual": i.normal(15, 96)[:, ::2]}, 0.5),
    norm_dropout_case("layer", lambda i: {"x": i.normal(33, 128), "weight": i.master(128), "bias": i.master(128)}, 0.2, centre=True),
    norm_dropout_case("layer_residual", lambda i: {"x": i.normal(9, 300), "weight": i.normal(300), "residual": i.normal(9, 300)}, 0.7, centre=True),
    norm_dropout_case("no_rows", lambda i: {"x": i.normal(0, 32), "weight": i.normal(32)}, 0.2),
]


# ---- feed-forward -------------------------------------------------------------------------------------------------------------------

_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu2": lambda z: F.relu(z).square(),
}


def plain_feed_forward(x, w_gate=None, w_up=None, w_down=None, b_up=None, b_down=None, activation="silu"):
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    act, up = _ACTIVATIONS[activation], linear(x, w_up, b_up)
    return linear(act(up) if w_gate is None else act(linear(x, w_gate)) * up, w_down, b_down)


def feed_forward_case(name: str, make: Callable[[Inputs], dict[str, Any]], activation: str) -> Case:
    def ours(x, w_up, w_down, w_gate=None, b_up=None, b_down=None):
        return kernels.feed_forward(x, w_gate, w_up, w_down, activation=activation, b_up=b_up, b_down=b_down)

    return Case("feed_forward", name, make, ours, lambda **t: plain_feed_forward(**t, activation=activation))


def gated(embed: int, hidden: int, *lead: int) -> Callable[[Inputs], dict[str, Any]]:
    return lambda i: {
        "x": i.normal(*lead, embed),
        "w_gate": i.normal(hidden, embed, scale=embed**-0.5),
        "w_up": i.normal(hidden, embed, scale=embed**-0.5),
        "w_down": i.normal(embed, hidden, scale=hidden**-0.5),
    }


def plain_mlp(embed: int, hidden: int, *lead: int) -> Callable[[Inputs], dict[str, Any]]:
    return lambda i: {
        "x": i.normal(*lead, embed),
        "w_up": i.master(embed, hidden, scale=embed**-0.5).T,  # Conv1D of GPT-2 keeps (in, out)
        "w_down": i.master(hidden, embed, scale=hidden**-0.5).T,
        "b_up": i.master(hidden, scale=0.1),
        "b_down": i.master(embed, scale=0.1),
    }


def _strided_mlp(i: Inputs) -> dict[str, Any]:
    return {
        "x": i.normal(5, 3, 2 * 24)[:, ::2, ::2],
        "w_gate": i.normal(50, 30)[:, 3:27],
        "w_up": i.normal(50, 1).expand(50, 24),
        "w_down": i.normal(24, 100)[:, ::2],
    }


FEED_FORWARD = [
    feed_forward_case("gated_silu", gated(48, 96, 3, 13), "silu"),
    feed_forward_case("gated_gelu_odd_sizes", gated(35, 77, 23), "gelu"),
    feed_forward_case("plain_gelu_transposed_float32_weights", plain_mlp(40, 88, 2, 9), "gelu"),
    feed_forward_case("plain_gelu_tanh", plain_mlp(33, 70, 17), "gelu_tanh"),
    feed_forward_case("plain_relu2", plain_mlp(33, 70, 17), "relu2"),
    feed_forward_case("gated_relu2_one_row", gated(48, 96, 1), "relu2"),
    feed_forward_case("strided", _strided_mlp, "silu"),
    feed_forward_case("no_rows", gated(16, 32, 0), "silu"),
]


# ---- norms, rotary, softmax, embedding ------------------------------------------------------------------------------------------------


def _rms_norm_plain(x, weight, residual=None):
    h = x if residual is None else x + residual
    y = F.rms_norm(h, h.shape[-1:], weight.to(x.dtype), 1e-6)
    return y if residual is None else (y, h)


def _layer_norm_plain(x, weight, bias=None, residual=None):
    h = x if residual is None else x + residual
    y = F.layer_norm(h, h.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), 1e-5)
    return y if residual is None else (y, h)


def rms_norm_case(name: str, make: Callable[[Inputs], dict[str, Any]]) -> Case:
    return Case("rms_norm", name, make, lambda **t: kernels.rms_norm(**t), _rms_norm_plain)


def layer_norm_case(name: str, make: Callable[[Inputs], dict[str, Any]]) -> Case:
    return Case("layer_norm", name, make, lambda **t: kernels.layer_norm(**t), _layer_norm_plain)


NORM = [
    rms_norm_case("odd_width", lambda i: {"x": i.normal(4, 19, 67), "weight": i.normal(67)}),
    rms_norm_case("float32_weight", lambda i: {"x": i.normal(33, 128), "weight": i.master(128)}),
    rms_norm_case("residual", lambda i: {"x": i.normal(37, 96), "weight": i.normal(96), "residual": i.normal(37, 96)}),
    rms_norm_case("heads_of_a_slice", lambda i: {"x": i.normal(2, 7, 6, 48)[:, :, 1:4, 8:40], "weight": i.normal(64)[::2]}),
    rms_norm_case("expanded", lambda i: {"x": i.normal(1, 40).expand(9, 40), "weight": i.normal(1).expand(40)}),
    rms_norm_case("no_rows", lambda i: {"x": i.normal(0, 32), "weight": i.normal(32)}),
    layer_norm_case("odd_width", lambda i: {"x": i.normal(4, 19, 67), "weight": i.normal(67), "bias": i.normal(67)}),
    layer_norm_case("no_bias", lambda i: {"x": i.normal(33, 128), "weight": i.master(128)}),
    layer_norm_case("residual", lambda i: {"x": i.normal(37, 96), "weight": i.master(96), "bias": i.master(96), "residual": i.normal(37, 96)}),
    layer_norm_case("strided", lambda i: {"x": i.normal(48, 30).T[::2], "weight": i.normal(48), "bias": i.normal(48)}),
    layer_norm_case("no_rows", lambda i: {"x": i.normal(3, 0, 32), "weight": i.normal(32), "bias": i.normal(32)}),
]


def _rotary_plain(x, cos, sin, positions=None, norm_weight=None):
    if norm_weight is not None:
        heads = zip(x.unbind(2), norm_weight.to(x.dtype), strict=True)
        x = torch.stack([F.rms_norm(head, head.shape[-1:], weight, 1e-6) for head, weight in heads], 2)
    index = torch.arange(x.shape[1], device=x.device) if positions is None else positions
    cos, sin = cos[index].unsqueeze(-2).to(x.dtype), sin[index].unsqueeze(-2).to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotary_case(
    name: str, shape: tuple[int, ...], view: Callable[[Tensor], Tensor] = lambda x: x, positions: str = "none",
    norm: Callable[[Inputs, int, int], Tensor] | None = None,
) -> Case:  # fmt: skip
    def make(i: Inputs) -> dict[str, Any]:
        x = view(i.normal(*shape))
        angles = torch.randn(64, x.shape[-1] // 2, generator=torch.Generator().manual_seed(3), device="cpu").to(i.device)
        tensors = {"x": x, "cos": angles.cos(), "sin": angles.sin()}
        if positions == "per_token":
            tensors["positions"] = i.integers(64, x.shape[1])
        elif positions == "per_batch":
            tensors["positions"] = i.integers(64, x.shape[0], x.shape[1])
        if norm is not None:
            tensors["norm_weight"] = norm(i, *x.shape[2:])
        return tensors

    return Case("rotary", name, make, lambda **t: kernels.rotary(**t), _rotary_plain, constants=("cos", "sin"))


def softmax_case(name: str, make: Callable[[Inputs], Tensor], dim: int = -1) -> Case:
    return Case(
        "softmax", name, lambda i: {"x": make(i)}, lambda x: kernels.softmax(x, dim), lambda x: torch.softmax(x, dim)
    )  # fmt: skip


def embedding_case(name: str, tokens: Callable[[Inputs], Tensor], weight: Callable[[Inputs], Tensor], narrow: bool = False) -> Case:
    def dtype_of(weight: Tensor) -> torch.dtype:
        return torch.bfloat16 if narrow and weight.dtype == torch.float32 else weight.dtype

    return Case(
        "embedding",
        name,
        lambda i: {"tokens": tokens(i), "weight": weight(i)},
        lambda tokens, weight: kernels.embedding(tokens, weight, dtype_of(weight)),
        lambda tokens, weight: F.embedding(tokens, weight).to(dtype_of(weight)),
    )


POINTWISE = [
    rotary_case("plain", (2, 13, 3, 32)),
    rotary_case("odd_half", (1, 9, 2, 10), positions="per_token"),
    rotary_case("positions_per_batch_strided", (3, 8, 7, 64), lambda x: x.transpose(1, 2)[..., 16:48], "per_batch"),
    rotary_case("no_tokens", (2, 0, 3, 8)),
    rotary_case("norm", (2, 13, 3, 32), norm=Inputs.normal),
    rotary_case("norm_odd_half_float32_weight", (1, 9, 2, 10), positions="per_token", norm=Inputs.master),
    rotary_case("norm_one_weight_for_all_heads", (2, 21, 5, 64), norm=lambda i, heads, dim: i.master(dim).expand(heads, dim)),
    rotary_case(
        "norm_strided", (3, 8, 7, 64), lambda x: x.transpose(1, 2)[..., 16:48], "per_batch", lambda i, heads, dim: i.normal(dim, 2 * heads).T[::2]
    ),
    rotary_case("norm_many_tokens", (2, 300, 2, 16), positions="per_token", norm=Inputs.master),
    rotary_case("norm_no_tokens", (2, 0, 3, 8), norm=Inputs.normal),
    softmax_case("odd_width", lambda i: i.normal(7, 33, scale=3)),
    softmax_case("wide", lambda i: i.normal(5, 1003, scale=3)),
    softmax_case("one_column", lambda i: i.normal(6, 1)),
    softmax_case("large_offset", lambda i: i.normal(9, 40, offset=1e4)),
    softmax_case("middle_dimension", lambda i: i.normal(3, 21, 5), dim=1),
    softmax_case("strided", lambda i: i.normal(40, 12).T[1::2, ::3]),
    softmax_case("no_rows", lambda i: i.normal(0, 12)),
    embedding_case("repeated_tokens", lambda i: i.integers(11, 5, 17), lambda i: i.normal(11, 37)),
    embedding_case("float32_table", lambda i: i.integers(50, 64), lambda i: i.master(50, 48)),
    embedding_case("narrowed", lambda i: i.integers(50, 64), lambda i: i.master(50, 48), narrow=True),
    embedding_case("strided", lambda i: i.integers(20, 6, 8)[:, ::2], lambda i: i.normal(24, 40).T[:20]),
    embedding_case("no_tokens", lambda i: i.integers(5, 0, 3), lambda i: i.normal(5, 8)),
]


# ---- losses -------------------------------------------------------------------------------------------------------------------------


def plain_cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean", divisor=None):
    vocab_size = logits.shape[-1]
    logits, flat_targets = logits.reshape(-1, vocab_size), targets.reshape(-1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, flat_targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    valid = flat_targets != ignore_index
    if z_loss:
        losses = losses + torch.where(valid, z_loss * torch.logsumexp(logits, -1).square(), 0.0)
    if reduction == "none":
        return losses.reshape(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (valid.sum().clamp(min=1) if divisor is None else divisor)


def with_ignored(targets: Tensor, ignore_index: int = -100) -> Tensor:
    targets.view(-1)[::3] = ignore_index
    return targets


def cross_entropy_case(name: str, make: Callable[[Inputs], dict[str, Any]], lse_size: float = 4.0, **options: Any) -> Case:
    return Case(
        "cross_entropy",
        name,
        make,
        lambda logits, targets: kernels.cross_entropy(logits, targets, **options),
        lambda logits, targets: plain_cross_entropy(logits, targets, **options),
        lse_size=lse_size,
    )


def linear_cross_entropy_case(name: str, make: Callable[[Inputs], dict[str, Any]], **options: Any) -> Case:
    def plain(x, weight, targets):
        logits = x @ weight.to(x.dtype).T
        return plain_cross_entropy(logits if x.dtype == torch.float64 else logits.float(), targets, **options)

    def ours(x, weight, targets):
        return kernels.linear_cross_entropy(x, weight, targets, **options)

    return Case("linear_cross_entropy", name, make, ours, plain, lse_size=4.0)


def _logits(vocab_size: int, *lead: int) -> Callable[[Inputs], dict[str, Any]]:
    return lambda i: {"logits": i.normal(*lead, vocab_size, scale=2), "targets": with_ignored(i.integers(vocab_size, *lead))}


def _hidden(embed: int, vocab_size: int, *lead: int) -> Callable[[Inputs], dict[str, Any]]:
    return lambda i: {
        "x": i.normal(*lead, embed),
        "weight": i.master(vocab_size, embed, scale=2 * embed**-0.5),
        "targets": with_ignored(i.integers(vocab_size, *lead)),
    }


def _hidden_strided(i: Inputs) -> dict[str, Any]:
    return {
        "x": i.normal(8, 44, 6).transpose(0, 2)[:, ::2],
        "weight": i.normal(8, 90).T[::2],
        "targets": with_ignored(i.integers(45, 6, 22)),
    }


LOSSES = [
    cross_entropy_case("mean_odd_vocabulary", _logits(67, 3, 15)),
    cross_entropy_case("sum_ignore_index_0", lambda i: {"logits": i.normal(30, 50), "targets": with_ignored(i.integers(50, 30), 0)},
                       ignore_index=0, reduction="sum"),
    cross_entropy_case("none", _logits(301, 21), reduction="none"),
    cross_entropy_case("smoothing_z_loss", _logits(67, 40), label_smoothing=0.1, z_loss=1e-2),
    cross_entropy_case("softcap", _logits(67, 40), softcap=3.0),
    cross_entropy_case("everything", _logits(67, 40), label_smoothing=0.1, z_loss=1e-2, softcap=5.0, reduction="none"),
    cross_entropy_case("large_offset", lambda i: {"logits": i.normal(20, 50, offset=1e3), "targets": i.integers(50, 20)}, lse_size=1e3),
    cross_entropy_case("strided", lambda i: {"logits": i.normal(60, 18).T[:, 1::2], "targets": i.integers(30, 18)}),
    linear_cross_entropy_case("mean_odd_sizes", _hidden(35, 131, 3, 15)),
    linear_cross_entropy_case("none", _hidden(48, 131, 40), reduction="none"),
    linear_cross_entropy_case("sum_smoothing_z_loss", _hidden(48, 67, 40), label_smoothing=0.1, z_loss=1e-2, reduction="sum"),
    linear_cross_entropy_case("softcap_divisor", _hidden(48, 67, 40), softcap=4.0, divisor=123.0),
    linear_cross_entropy_case("none_everything", _hidden(48, 67, 40), label_smoothing=0.2, z_loss=1e-2, softcap=4.0, reduction="none"),
    linear_cross_entropy_case("many_rows", _hidden(32, 700, 300)),
    linear_cross_entropy_case("strided", _hidden_strided),
]  # fmt: skip


# ---- matmul -------------------------------------------------------------------------------------------------------------------------


def matmul_case(name: str, make: Callable[[Inputs], dict[str, Any]]) -> Case:
    def plain(a, b, bias=None):
        return F.linear(a, b.to(a.dtype).T, None if bias is None else bias.to(a.dtype))

    return Case("matmul", name, make, lambda **t: kernels.matmul(**t), plain)


MATMUL = [
    matmul_case("linear_layer", lambda i: {"a": i.normal(2, 9, 48), "b": i.normal(80, 48).T, "bias": i.normal(80)}),
    matmul_case("odd_sizes", lambda i: {"a": i.normal(37, 53), "b": i.normal(53, 71)}),
    matmul_case("deep", lambda i: {"a": i.normal(13, 1100), "b": i.normal(1100, 20), "bias": i.normal(20)}),
    matmul_case("float32_weight", lambda i: {"a": i.normal(33, 64), "b": i.master(48, 64).T, "bias": i.master(48)}),
    matmul_case("one_row", lambda i: {"a": i.normal(1, 96), "b": i.normal(100, 96).T}),
    matmul_case("one_column", lambda i: {"a": i.normal(21, 33), "b": i.normal(33, 1), "bias": i.normal(1)}),
    matmul_case("strided", lambda i: {"a": i.normal(60, 22).T[::2, ::2], "b": i.normal(60, 50)[::2, 1::3]}),
    matmul_case("expanded", lambda i: {"a": i.normal(1, 24).expand(9, 24), "b": i.normal(24, 1).expand(24, 18)}),
    matmul_case("no_rows", lambda i: {"a": i.normal(0, 16), "b": i.normal(16, 8), "bias": i.normal(8)}),
    matmul_case("no_depth", lambda i: {"a": i.normal(5, 0), "b": i.normal(0, 8), "bias": i.normal(8)}),
]

CASES = [*ATTENTION, *DROPOUT, *FEED_FORWARD, *NORM, *POINTWISE, *LOSSES, *MATMUL]
