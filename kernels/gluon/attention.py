"""Attention by the Gluon kernels where they can serve the tensors at hand, else by the Triton ones. What decides here is only known per call:
strides, alignment, combinations of mask and cap."""

from torch import Tensor

from cllm.kernels.gluon import attention_backward, attention_forward
from cllm.kernels.triton import attention as triton_attention
from cllm.runtime.gpu import gpu_of


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (B, T, H, D) and the log-sum-exp of the scaled scores (B, H, T) float32."""
    serves, _ = attention_forward.can_serve(q, k, v, causal, window, softcap, cu_seqlens, gpu_of(q.device))
    return (attention_forward if serves else triton_attention).forward(q, k, v, causal, scale, window, softcap, cu_seqlens)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    serves, _ = attention_backward.can_serve(q, k, v, causal, window, softcap, cu_seqlens, gpu_of(q.device))
    module = attention_backward if serves else triton_attention
    return module.backward(dout, dlse, q, k, v, out, lse, causal, scale, window, softcap, cu_seqlens)
