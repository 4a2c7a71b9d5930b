"""Rotary position embedding on the CPU. B batch, T tokens, H heads, D head dim, P table positions.

Su et al. 2021, arXiv 2104.09864; pairs are (x[d], x[d + D/2]).
"""

import torch
from torch import Tensor

from cllm.kernels.cpu.launch import Kernel, inline, int64_at, is_half, load, num_workers, store
from cllm.kernels.cpu.simd import W, vfma, vmul, vneg

TOKENS_PER_TASK = 16

(X, X_BATCH, X_TOKEN, X_HEAD, HALF, OUT, COS, SIN, POSITIONS, POSITIONS_BATCH, NUM_TOKENS, ALL_TOKENS, HEADS, PAIRS,
 INVERSE) = range(15)  # fmt: skip


@inline
def _turn(x, out, half, cos, sin, pairs, inverse):
    for c in range(0, pairs, W):
        n = pairs - c
        first, second = load(x, half, c, n), load(x, half, pairs + c, n)
        u, v = load(cos, False, c, n), load(sin, False, c, n)
        if inverse:
            v = vneg(v)
        store(out, half, c, vfma(first, u, vneg(vmul(second, v))), n)
        store(out, half, pairs + c, vfma(second, u, vmul(first, v)), n)


def _rotary(p, f, task, worker):
    size = 2 if p[HALF] else 4
    for token in range(task * TOKENS_PER_TASK, min((task + 1) * TOKENS_PER_TASK, p[ALL_TOKENS])):
        b, t = token // p[NUM_TOKENS], token % p[NUM_TOKENS]
        position = t if p[POSITIONS] == 0 else int64_at(p[POSITIONS], b * p[POSITIONS_BATCH] + t)
        at = position * p[PAIRS] * 4
        for h in range(p[HEADS]):
            x = p[X] + b * p[X_BATCH] + t * p[X_TOKEN] + h * p[X_HEAD]
            out = p[OUT] + (token * p[HEADS] + h) * 2 * p[PAIRS] * size
            _turn(x, out, p[HALF], p[COS] + at, p[SIN] + at, p[PAIRS], p[INVERSE])


_rotary_kernel = Kernel(_rotary)


def apply(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    """x (B, T, H, D), cos and sin (P, D/2) float32, positions int64 (T,), (B, T) or None for 0 .. T-1 -> (B, T, H, D)."""
    batch, num_tokens, heads, head_dim = x.shape
    x = x.detach() if head_dim <= 1 or x.stride(3) == 1 else x.detach().contiguous()
    cos, sin = cos.detach().float().contiguous(), sin.detach().float().contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    where, per_batch = 0, 0
    if positions is not None:
        positions = positions.contiguous()
        where, per_batch = positions.data_ptr(), num_tokens if positions.dim() == 2 else 0
    if out.numel():
        size = x.element_size()
        strides = (stride * size for stride in x.stride()[:3])
        _rotary_kernel(
            -(-batch * num_tokens // TOKENS_PER_TASK),
            num_workers("rotary", (tuple(x.shape),), x.dtype, 2.0 * x.numel() * size),
            (x.data_ptr(), *strides, is_half(x), out.data_ptr(), cos.data_ptr(), sin.data_ptr(), where, per_batch,
             num_tokens, batch * num_tokens, heads, head_dim // 2, int(inverse)),
        )  # fmt: skip
    return out
