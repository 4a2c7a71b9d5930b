"""Attention by torch's scaled_dot_product_attention (cuDNN or flash attention, as torch chooses) where it computes the same thing.

`direct` goes past our operator, so that torch's own backward serves as well. What torch cannot do (windows, caps, packed documents, the log-sum-exp,
a backward that adds in a fixed order) comes here through the operator, and is done by the fastest of the other backends.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from cllm.kernels import gluon, triton
from cllm.runtime import choice

OURS = {backend.name: backend for backend in (triton.BACKEND, gluon.BACKEND)}  # the preferred one first


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (B, T, H, D) and the log-sum-exp of the scaled scores (B, H, T) float32."""
    found: tuple[Tensor, Tensor] = _instead(q, k).forward(q, k, v, causal, scale, window, softcap, cu_seqlens)
    return found


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    found: tuple[Tensor, Tensor, Tensor] = _instead(q, k).backward(dout, dlse, q, k, v, out, lse, causal, scale, window, softcap, cu_seqlens)
    return found


def _instead(q: Tensor, k: Tensor) -> ModuleType:
    """Of the kernels of ours for this device the ones that were measured to be fastest, else the Triton ones."""
    shapes, dtype, device = (tuple(q.shape), tuple(k.shape)), str(q.dtype).removeprefix("torch."), q.device.type
    serving = tuple(name for name, backend in OURS.items() if backend.can_serve("attention", shapes, dtype, device)[0])
    measured = choice.best("attention", device, dtype, shapes, serving)
    return OURS["triton" if measured is None else measured[0]].module("attention")


def can_serve(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, softcap: float, cu_seqlens: Tensor | None, deterministic: bool
) -> tuple[bool, str]:
    """Whether `direct` may be called for these tensors, and why or why not."""
    if window or softcap or cu_seqlens is not None:
        return False, "torch's kernels have no window, cap or packed documents"
    if causal and q.shape[1] != k.shape[1]:
        return False, "torch puts the diagonal of unequal lengths elsewhere"
    if q.numel() == 0 or k.numel() == 0:
        return False, "nothing to attend to"
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if needs_gradients and deterministic and not torch.are_deterministic_algorithms_enabled():
        return False, "the backward of torch's kernels adds in no fixed order (runtime.use(deterministic=False) allows it)"
    return True, "torch's own kernels"


def direct(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """q (B, T, H, D), k and v (B, S, Hkv, D) -> (B, T, H, D)."""
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    shared = q.shape[2] != k.shape[2]
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=causal, scale=scale, enable_gqa=shared).transpose(1, 2)
