"""Attention by torch's scaled_dot_product_attention (cuDNN or flash attention, as torch chooses) where it computes the same thing.

`direct` goes past our operator, so that torch's own backward serves as well. What torch cannot do (windows, caps, packed documents, the log-sum-exp)
comes here through the operator and is done by the Triton kernels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cllm.kernels.triton.attention import backward, forward

__all__ = ["backward", "can_serve", "direct", "forward"]


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
