"""Attention with dropout of its probabilities, for training."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from cllm.kernels._operator import operation
from cllm.kernels._register import backend
from cllm.kernels.attention import attention_fake, backward_fake, check_attention, check_bounds
from cllm.kernels.dropout import Dropout, check_key
from cllm.runtime.errors import UserError


@overload
def attention_dropout(
    q: Tensor, k: Tensor, v: Tensor, dropout: Dropout, place: int, *, causal: bool = False, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, cu_seqlens: Tensor | None = None, period: int = 0, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def attention_dropout(
    q: Tensor, k: Tensor, v: Tensor, dropout: Dropout, place: int, *, causal: bool = False, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, cu_seqlens: Tensor | None = None, period: int = 0, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_dropout(
    q: Tensor, k: Tensor, v: Tensor, dropout: Dropout, place: int, *, causal: bool = False, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, cu_seqlens: Tensor | None = None, period: int = 0, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`attention` whose probabilities, after the softmax, are zeroed or scaled by `dropout` (Vaswani et al. 2017, arXiv 1706.03762, section 5.4).

    The log-sum-exp is that of all scores. place: the number of head 0 among all that draw, the next heads have the next ones. Query t of batch entry
    b is token b * T + t of the draws, and key s is element s. With cu_seqlens and a `period`, the length of the rows that the documents were cut
    from, key s is element s % period (of a document that goes on past a row it is counted on), so that the draws of a row do not depend on the rows
    before it. The other arguments and the errors are those of `attention`.
    """
    check_attention(q, k, v, window, softcap, cu_seqlens)
    check_key("attention_dropout", dropout, q.device)
    if period < 0:
        raise UserError(f"attention_dropout: period must be >= 0, got {period}. Use 0 where rows were not laid end to end.")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    options = (causal, scale, window or 0, float(softcap or 0.0), cu_seqlens)
    out, lse = _attention_dropout(q, k, v, *options, dropout.key, dropout.rate, place, period)
    return (out, lse) if return_lse else out


def _serving(q: Tensor, k: Tensor) -> Any:
    return backend("attention_dropout", (q.shape, k.shape), q.dtype, q.device.type)


@operation("attention_dropout_backward", backward_fake)
def _attention_dropout_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float, window: int,
    softcap: float, cu_seqlens: Tensor | None, key: Tensor, rate: float, place: int, period: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if dlse is not None:
        dlse = dlse.contiguous()
    dout = dout.contiguous()
    found: tuple[Tensor, Tensor, Tensor] = _serving(q, k).backward(
        dout, dlse, q, k, v, out, lse, causal, scale, window, softcap, cu_seqlens, key, rate, place, period
    )
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options, cu_seqlens, key, rate, place, period = inputs
    ctx.dropout = rate, place, period
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, key)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens, key = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    gradients = _attention_dropout_backward(dout, dlse, q, k, v, out, lse, *ctx.options, cu_seqlens, key, *ctx.dropout)
    return *gradients, *(None,) * 9


@operation("attention_dropout", attention_fake, setup_context=_save, backward=_backward)
def _attention_dropout(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None, key: Tensor, rate: float,
    place: int, period: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_bounds(cu_seqlens, q.shape[1])
    found: tuple[Tensor, Tensor] = _serving(q, k).forward(q, k, v, causal, scale, window, softcap, cu_seqlens, key, rate, place, period)
    return found
