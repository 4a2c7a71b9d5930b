"""The feed-forward layer in one operation: two or three matrix products and an activation.

E embed, F hidden.
"""

from typing import Any

import torch
from torch import Tensor

from cllm.kernels._checks import check_floating, check_weight
from cllm.kernels._operator import like_weight, operation, tensor_or_empty
from cllm.kernels._register import backend
from cllm.runtime.errors import UserError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")


def feed_forward(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, *, activation: str = "silu",
    b_up: Tensor | None = None, b_down: Tensor | None = None, recompute: bool = False,
) -> Tensor:  # fmt: skip
    """w_down (activation(w_gate x) * (w_up x + b_up)) + b_down; without w_gate, w_down activation(w_up x + b_up) + b_down.

    x (..., E), w_gate and w_up (F, E), w_down (E_out, F), b_up (F,), b_down (E_out,) -> (..., E_out) in x's dtype. Weights may be
    float32 or of x's dtype, and any strided view. For the backward x and the activation's input are saved, in x's dtype: one (..., F), two when
    gated; with `recompute` x alone, and the backward computes them again, with the same bits and a sixth more work.
    `activation`: "silu", "gelu" (exact), "gelu_tanh" or "relu2" (So et al. 2021, arXiv 2109.08668). Gated: Shazeer 2020, arXiv 2002.05202.
    Raises UserError for shapes, dtypes or an activation that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise UserError(f"feed_forward: unknown activation {activation!r}. Choose one of {', '.join(ACTIVATIONS)}.")
    if (
        x.dim() < 1
        or w_up.dim() != 2
        or w_down.dim() != 2
        or w_up.shape[1] != x.shape[-1]
        or w_down.shape[1] != w_up.shape[0]
        or (w_gate is not None and w_gate.shape != w_up.shape)
        or (b_up is not None and b_up.shape != w_up.shape[:1])
        or (b_down is not None and b_down.shape != w_down.shape[:1])
    ):
        shapes = {"x": x, "w_gate": w_gate, "w_up": w_up, "w_down": w_down, "b_up": b_up, "b_down": b_down}
        found = ", ".join(f"{name} {tuple(t.shape)}" for name, t in shapes.items() if t is not None)
        raise UserError(
            f"feed_forward: shapes do not fit together: {found}. "
            "Expected x (..., E), w_gate and w_up (F, E), w_down (E_out, F), b_up (F,), b_down (E_out,)."
        )
    check_floating("feed_forward", x=x)
    check_weight("feed_forward", x, w_gate=w_gate, w_up=w_up, w_down=w_down, b_up=b_up, b_down=b_down)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w_gate, w_up, w_down, b_up, b_down))
    return _feed_forward(x, w_gate, w_up, w_down, activation, b_up, b_down, needs_grad and not recompute)[0]


def _serving(x: Tensor, w_up: Tensor) -> Any:
    return backend("feed_forward", (x.shape, w_up.shape), x.dtype, x.device.type)


def _feed_forward_fake(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str, b_up: Tensor | None, b_down: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept = (x.numel() // x.shape[-1], w_up.shape[0])
    z, up = x.new_empty(kept if keep else 0), x.new_empty(kept if keep and w_gate is not None else 0)
    return x.new_empty((*x.shape[:-1], w_down.shape[0])), z, up


def _backward_fake(
    dy: Tensor, x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str,
    b_up: Tensor | None, b_down: Tensor | None, kept_z: Tensor | None, kept_up: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    activations = x.new_empty(x.shape)
    return activations, *(x.new_empty(0) if t is None else torch.empty_like(t) for t in (w_gate, w_up, w_down, b_up, b_down))


@operation("feed_forward_backward", _backward_fake)
def _feed_forward_backward(
    dy: Tensor, x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str,
    b_up: Tensor | None, b_down: Tensor | None, kept_z: Tensor | None, kept_up: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dw_gate, dw_up, dw_down, db_up, db_down), gradients in the layout of their weights; what has no input is empty."""
    grads = _serving(x, w_up).backward(dy.contiguous(), x, w_gate, w_up, w_down, activation, b_up, b_down, kept_z, kept_up)
    dx, dw_gate, dw_up, dw_down, db_up, db_down = (tensor_or_empty(grad, x) for grad in grads)
    return dx, like_weight(dw_gate, w_gate), like_weight(dw_up, w_up), like_weight(dw_down, w_down), db_up, db_down


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w_gate, w_up, w_down, ctx.activation, b_up, b_down, ctx.kept = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_gate, w_up, w_down, b_up, b_down, *(output[1:] if ctx.kept else (None, None)))


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w_gate, w_up, w_down, b_up, b_down, kept_z, kept_up = ctx.saved_tensors
    if dy is None:
        return (None,) * 8
    if w_gate is None:
        kept_up = None
    dx, dw_gate, dw_up, dw_down, db_up, db_down = _feed_forward_backward(dy, x, w_gate, w_up, w_down, ctx.activation, b_up, b_down, kept_z, kept_up)
    return (
        dx,
        None if w_gate is None else dw_gate,
        dw_up,
        dw_down,
        None,
        None if b_up is None else db_up,
        None if b_down is None else db_down,
        None,
    )


@operation("feed_forward", _feed_forward_fake, setup_context=_save, backward=_backward)
def _feed_forward(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str, b_up: Tensor | None, b_down: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, z, up): z and up, the activation's inputs, are empty unless `keep` (and up unless gated)."""
    y, z, up = _serving(x, w_up).forward(x, w_gate, w_up, w_down, activation, b_up, b_down, keep)
    return y, tensor_or_empty(z, x), tensor_or_empty(up, x)
