"""Cross entropy of `x @ weight.T` that never holds all logits. N rows, E embed, V vocabulary."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from cllm.kernels._checks import check_floating, check_integer_range, check_weight
from cllm.kernels._operator import operation, stats_dtype
from cllm.kernels._register import backend
from cllm.kernels.cross_entropy import check_loss, num_valid, reduced, row_gradients
from cllm.kernels.torch import as_rows
from cllm.runtime.errors import UserError


class LossStats(NamedTuple):
    """What else the pass over the logits knows of each of the N rows; no gradient flows through it."""

    losses: Tensor  # (N,) float32, plain cross entropy in nats, without smoothing and z-loss; 0 where ignored
    correct: Tensor  # (N,) bool: the largest logit, the first of equals, is the target; False where ignored
    lse: Tensor  # (N,) float32 log-sum-exp of the logits


@overload
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, reduction: str = "mean", divisor: float | None = None, return_stats: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, reduction: str = "mean", divisor: float | None = None, return_stats: Literal[True],
) -> tuple[Tensor, LossStats]: ...  # fmt: skip
@overload
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, reduction: str = "mean", divisor: float | None = None, return_stats: bool,
) -> Tensor | tuple[Tensor, LossStats]: ...  # fmt: skip
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, reduction: str = "mean", divisor: float | None = None, return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:  # fmt: skip
    """`cross_entropy(x @ weight.T, targets)` a block of logits at a time, with the gradients made in the same pass.

    x (..., E), weight (V, E) float32 or of x's dtype, targets (...) int64 -> float32 scalar, or (...) with reduction "none"; with
    `return_stats` also the LossStats of all rows. Loss and options are those of `cross_entropy`. `divisor` replaces the number of
    valid targets in "mean": the valid tokens of the whole global batch, when this is one part of it. The method is that of Cut
    Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009). Raises UserError for shapes, dtypes, options or targets that do not fit.
    """
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise UserError(f"linear_cross_entropy: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit. Expected (..., E) and (V, E).")
    check_floating("linear_cross_entropy", x=x)
    check_weight("linear_cross_entropy", x, weight=weight)
    check_loss("linear_cross_entropy", x.shape, weight.shape[0], targets, label_smoothing, softcap, reduction)
    if divisor is not None and (reduction != "mean" or not divisor > 0):
        raise UserError(f'linear_cross_entropy: divisor must be > 0 and goes with reduction "mean", got {divisor} with {reduction!r}.')
    # One pass makes loss and gradients while a block of logits is at hand; "none" cannot, its row weights come later.
    with_grads = reduction != "none" and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss, losses, correct, lse, *_ = _linear_cross_entropy(
        x, weight, targets, ignore_index, label_smoothing, z_loss, float(softcap or 0.0), reduction,
        None if divisor is None else float(divisor), with_grads,
    )  # fmt: skip
    return (loss, LossStats(losses, correct, lse)) if return_stats else loss


def _serving(x: Tensor, weight: Tensor) -> Any:
    return backend("linear_cross_entropy", (x.shape, weight.shape), x.dtype, x.device.type)


def _backward_fake(dlosses: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@operation("linear_cross_entropy_backward", _backward_fake)
def _linear_cross_entropy_backward(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x (..., E) and weight, given that of each row's loss (N,)."""
    rows = as_rows(x)
    dx, dweight = _serving(rows, weight).backward(dlosses, rows, weight, targets.reshape(-1), lse, ignore_index, label_smoothing, z_loss, softcap)
    return dx.view(x.shape), dweight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, targets, *ctx.options, ctx.reduction, _, ctx.with_grads = inputs
    _, *stats, dx, dweight = output
    _, _, lse, divisor = stats
    ctx.mark_non_differentiable(*stats, dx, dweight)
    ctx.set_materialize_grads(False)  # or autograd fills a vocabulary matrix with zeros for `dweight`, at every step
    if ctx.with_grads:
        ctx.save_for_backward(dx, dweight)
    else:
        ctx.save_for_backward(x, weight, targets, lse, divisor)


def _is_final_unit_gradient(dloss: Tensor) -> bool:
    """Whether the saved gradients can be handed out as they are, without a copy of a whole vocabulary matrix.

    That is `loss.backward()`: a factor of 1, and a graph that is not kept for a second time. A compiler's stand-in has no value to look at.
    """
    return (
        type(dloss) is Tensor
        and dloss.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and dloss.item() == 1.0
    )


def _backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 10
    if ctx.with_grads:
        dx, dweight = ctx.saved_tensors
        if not _is_final_unit_gradient(dloss):
            dx, dweight = dx * dloss, dweight * dloss
    else:
        x, weight, targets, lse, divisor = ctx.saved_tensors
        dlosses = row_gradients(dloss, divisor, ctx.reduction, lse.shape[0])
        dx, dweight = _linear_cross_entropy_backward(dlosses, x, weight, targets, lse, *ctx.options)
    return dx, dweight, *(None,) * 8


def _linear_cross_entropy_fake(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    reduction: str, divisor: float | None, with_grads: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = stats_dtype(x.dtype)
    row = (targets.numel(),)
    return (
        x.new_empty(targets.shape if reduction == "none" else (), dtype=dtype),
        x.new_empty(row, dtype=dtype),
        x.new_empty(row, dtype=torch.bool),
        x.new_empty(row, dtype=dtype),
        x.new_empty((), dtype=dtype),
        x.new_empty(x.shape if with_grads else 0),
        weight.new_empty(weight.shape if with_grads else 0),
    )


@operation("linear_cross_entropy", _linear_cross_entropy_fake, setup_context=_save, backward=_backward)
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    reduction: str, divisor: float | None, with_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, plain losses, correct, log-sum-exp, what the sum was divided by, dx, dweight); the last two empty unless asked for."""
    check_integer_range("linear_cross_entropy", "targets", targets, weight.shape[0], ignore_index)
    rows, flat_targets = as_rows(x), targets.reshape(-1)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    dtype = stats_dtype(x.dtype)
    if reduction != "mean":
        total = torch.ones((), dtype=dtype, device=x.device)
    elif divisor is None:
        total = num_valid(targets, ignore_index).to(dtype)
    else:
        total = torch.full((), divisor, dtype=dtype, device=x.device)
    if with_grads:
        # On a GPU the number of targets is not looked at: the host would wait for all that was launched before.
        scale = 1.0 if reduction != "mean" else 1.0 / divisor if divisor is not None else 1.0 / float(total) if x.device.type == "cpu" else None
        serving = _serving(rows, weight)
        losses, plain, correct, lse, dx, dweight = serving.forward_with_grads(rows, weight, flat_targets, *options, 1.0 if scale is None else scale)
        if scale is None:
            dx.div_(total)
            dweight.div_(total)
        dx = dx.view(x.shape)
    else:
        losses, plain, correct, lse = _serving(rows, weight).forward(rows, weight, flat_targets, *options)
        dx, dweight = x.new_empty(0), weight.new_empty(0)
    loss = losses.view(targets.shape) if reduction == "none" else reduced(losses, total)
    return loss, plain, correct, lse, total, dx, dweight
