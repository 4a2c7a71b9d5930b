"""Scaled dot-product attention: causal, grouped-query, windowed, soft-capped, over packed documents, with log-sum-exp.

B batch, T query tokens, S key tokens, H query heads, Hkv key-value heads, D head dim.
"""

from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

import cllm.runtime as runtime
from cllm.kernels._checks import check_floating, check_heads
from cllm.kernels._operator import operation, stats_dtype
from cllm.kernels._register import backend
from cllm.runtime.errors import UserError


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, cu_seqlens: Tensor | None = None, sinks: Tensor | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, cu_seqlens: Tensor | None = None, sinks: Tensor | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, cu_seqlens: Tensor | None = None, sinks: Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale * q k^T) v without ever holding all the scores (Dao 2023, arXiv 2307.08691).

    q (B, T, H, D), k and v (B, S, Hkv, D) of one dtype, any strides -> (B, T, H, D), and with `return_lse` the log-sum-exp of the
    scaled scores (B, H, T) in float32, through which gradients flow. Queries are the last T positions of the S keys: with `causal`
    query t sees the keys s <= t + S - T; with `window` W only those with s > t + S - T - W. `scale` defaults to D ** -0.5;
    `softcap` c turns a score x into c * tanh(x / c). `cu_seqlens` int32 (n + 1,) holds the bounds of packed documents, with B = 1 and
    T = S: a query sees its own document only. A query that sees nothing gets 0 and a log-sum-exp of -inf. `sinks` (H,) adds to each
    softmax a score that no value belongs to, learnt per head (Xiao et al. 2023, arXiv 2309.17453; as in gpt-oss).
    Raises UserError for shapes, dtypes or options that do not fit together.
    """
    check_attention(q, k, v, window, softcap, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not return_lse and sinks is None:
        library = _library(q, k, v, causal, window, softcap, cu_seqlens)
        if library is not None:
            return library.direct(q, k, v, causal, scale)
    out, lse = _attention(q, k, v, causal, scale, window or 0, float(softcap or 0.0), cu_seqlens)
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def _library(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, softcap: float | None, cu_seqlens: Tensor | None
) -> Any:  # fmt: skip
    """torch's own attention, where the plan chooses it and it can do what is asked; else None."""
    if torch.compiler.is_compiling():  # a compiler sees our operator
        return None
    settings = runtime.settings()
    if q.device.type == "cpu" and settings.backend != "sdpa":
        return None
    serving = backend("attention", (q.shape, k.shape), q.dtype, q.device.type)
    can_serve = getattr(serving, "can_serve", None)
    if getattr(serving, "direct", None) is None or can_serve is None:
        return None
    return serving if can_serve(q, k, v, causal, window or 0, softcap or 0.0, cu_seqlens, settings.deterministic)[0] else None


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """One more score s in the softmax only scales what is there, by exp(lse) / (exp(lse) + exp(s)): no kernel need know of it."""
    if sinks.shape != lse.shape[1:2] or not sinks.is_floating_point() or sinks.device != lse.device:
        raise UserError(f"attention: sinks must be floating point ({lse.shape[1]},) on {lse.device}, got {sinks.dtype} {tuple(sinks.shape)}.")
    score = sinks.to(lse.dtype).unsqueeze(-1)
    share = torch.sigmoid(lse - score)  # (B, H, T)
    return (out * share.transpose(1, 2).unsqueeze(-1)).to(out.dtype), torch.logaddexp(lse, score)


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None, cu_seqlens: Tensor | None
) -> None:  # fmt: skip
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UserError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together. "
            "Expected q (B, T, H, D), k and v (B, S, Hkv, D)."
        )
    check_heads("attention", q.shape[2], k.shape[2], q.shape[3])
    check_floating("attention", q=q, k=k, v=v)
    if window is not None and window < 1:
        raise UserError(f"attention: window must be >= 1, got {window}. Use None for no window.")
    if softcap is not None and not softcap > 0:
        raise UserError(f"attention: softcap must be > 0, got {softcap}. Use None for no softcap.")
    if cu_seqlens is not None:
        if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
            raise UserError(
                f"attention: cu_seqlens needs B = 1 and as many queries as keys, got q {tuple(q.shape)} and k {tuple(k.shape)}. "
                "Flatten the batch into one row of packed documents."
            )
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise UserError(f"attention: cu_seqlens must be int32 of shape (documents + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}.")


def check_bounds(cu_seqlens: Tensor | None, num_tokens: int) -> None:
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != num_tokens or any(end < start for start, end in pairwise(bounds)):
            raise UserError(f"attention: cu_seqlens must rise from 0 to the number of tokens, {num_tokens}, got {bounds[:4]}...{bounds[-1]}.")


def attention_fake(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, num_tokens, num_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, num_heads, num_tokens), dtype=stats_dtype(q.dtype))


def backward_fake(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@operation("attention_backward", backward_fake)
def _attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    serving = backend("attention", (q.shape, k.shape), q.dtype, q.device.type)
    if dlse is not None:
        dlse = dlse.contiguous()
    return serving.backward(dout.contiguous(), dlse, q, k, v, out, lse, causal, scale, window, softcap, cu_seqlens)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv = _attention_backward(dout, dlse, q, k, v, out, lse, *ctx.options, cu_seqlens)
    return dq, dk, dv, None, None, None, None, None


@operation("attention", attention_fake, setup_context=_save, backward=_backward)
def _attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_bounds(cu_seqlens, q.shape[1])
    serving = backend("attention", (q.shape, k.shape), q.dtype, q.device.type)
    return serving.forward(q, k, v, causal, scale, window, softcap, cu_seqlens)
