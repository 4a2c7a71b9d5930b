"""The feed-forward layer in one operation: two or three matrix products and an activation, hidden values never kept.

E embed, F hidden.
"""

from typing import Any

from torch import Tensor

from cllm.kernels._register import backend, check_floating, check_weight, operation, tensor_or_empty
from cllm.runtime.errors import UserError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")


def feed_forward(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, *, activation: str = "silu",
    b_up: Tensor | None = None, b_down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """w_down (activation(w_gate x) * (w_up x + b_up)) + b_down; without w_gate, w_down activation(w_up x + b_up) + b_down.

    x (..., E), w_gate and w_up (F, E), w_down (E_out, F), b_up (F,), b_down (E_out,) -> (..., E_out) in x's dtype. Weights may be
    float32 or of x's dtype, and any strided view. Only x is saved: the backward computes the hidden values again.
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
    return _feed_forward(x, w_gate, w_up, w_down, activation, b_up, b_down)


def _serving(x: Tensor, w_gate: Tensor | None, w_up: Tensor, flops_factor: float) -> Any:
    work = flops_factor * (2.0 if w_gate is None else 3.0) * x.numel() * w_up.shape[0]
    return backend("feed_forward", (x.shape, w_up.shape), x.dtype, x.device.type, work)


def _feed_forward_fake(x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_down.shape[0]))


def _backward_fake(
    dy: Tensor, x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str,
    b_up: Tensor | None, b_down: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, w_gate, w_up, w_down, b_up, b_down))


@operation("feed_forward_backward", _backward_fake)
def _feed_forward_backward(
    dy: Tensor, x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str,
    b_up: Tensor | None, b_down: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dw_gate, dw_up, dw_down, db_up, db_down); what has no input is empty."""
    grads = _serving(x, w_gate, w_up, 6.0).backward(dy.contiguous(), x, w_gate, w_up, w_down, activation, b_up, b_down)
    dx, dw_gate, dw_up, dw_down, db_up, db_down = (tensor_or_empty(grad, x) for grad in grads)
    return dx, dw_gate, dw_up, dw_down, db_up, db_down


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w_gate, w_up, w_down, ctx.activation, b_up, b_down = inputs
    ctx.save_for_backward(x, w_gate, w_up, w_down, b_up, b_down)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w_gate, w_up, w_down, b_up, b_down = ctx.saved_tensors
    dx, dw_gate, dw_up, dw_down, db_up, db_down = _feed_forward_backward(
        dy, x, w_gate, w_up, w_down, ctx.activation, b_up, b_down
    )
    return (
        dx,
        None if w_gate is None else dw_gate,
        dw_up,
        dw_down,
        None,
        None if b_up is None else db_up,
        None if b_down is None else db_down,
    )


@operation("feed_forward", _feed_forward_fake, setup_context=_save, backward=_backward)
def _feed_forward(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str, b_up: Tensor | None, b_down: Tensor | None
) -> Tensor:  # fmt: skip
    return _serving(x, w_gate, w_up, 2.0).forward(x, w_gate, w_up, w_down, activation, b_up, b_down)
