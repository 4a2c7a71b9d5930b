"""Cross entropy of given logits. N rows, V vocabulary."""

from typing import Any

import torch
from torch import Tensor

from cllm.kernels._checks import check_floating, check_integer_range
from cllm.kernels._operator import operation, stats_dtype
from cllm.kernels._register import backend
from cllm.kernels.torch import as_rows, fixed_order_sum
from cllm.runtime.errors import UserError

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """-log softmax(logits)[target] in nats, with label smoothing (Szegedy et al. 2015, arXiv 1512.00567) and z-loss (arXiv 2204.02311).

    logits (..., V), targets (...) int64 -> float32 scalar, or (...) with reduction "none". With z the logits, or
    softcap * tanh(logits / softcap): plain = logsumexp(z) - z[target]; loss = (1 - label_smoothing) * plain + label_smoothing *
    (logsumexp(z) - mean(z)) + z_loss * logsumexp(z)^2. Rows with target `ignore_index` give 0; "mean" divides by the number of the
    others, and is 0 where there are none. Raises UserError for shapes, dtypes, options or targets that do not fit.
    """
    check_floating("cross_entropy", logits=logits)
    check_loss("cross_entropy", logits.shape, logits.shape[-1], targets, label_smoothing, softcap, reduction)
    return _cross_entropy(logits, targets, ignore_index, label_smoothing, z_loss, float(softcap or 0.0), reduction)[0]


def check_loss(
    op: str, rows_shape: torch.Size, vocab_size: int, targets: Tensor, label_smoothing: float, softcap: float | None, reduction: str
) -> None:  # fmt: skip
    """Checks shared with `linear_cross_entropy`; `rows_shape` is that of the logits or the hidden states."""
    if targets.dtype != torch.int64 or targets.shape != rows_shape[:-1]:
        raise UserError(f"{op}: targets must be int64 of shape {tuple(rows_shape[:-1])}, got {targets.dtype} {tuple(targets.shape)}.")
    if vocab_size == 0:
        raise UserError(f"{op}: the vocabulary is empty. Expected at least one class.")
    if not 0.0 <= label_smoothing < 1.0:
        raise UserError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing}.")
    if softcap is not None and not softcap > 0:
        raise UserError(f"{op}: softcap must be > 0, got {softcap}. Use None for no softcap.")
    if reduction not in REDUCTIONS:
        raise UserError(f"{op}: unknown reduction {reduction!r}. Choose one of {', '.join(REDUCTIONS)}.")


def num_valid(targets: Tensor, ignore_index: int) -> Tensor:
    """How many rows count in a mean, at least 1: a batch with nothing to predict has loss 0, not NaN, and spoils no step."""
    return (targets != ignore_index).sum().clamp_(min=1)


def reduced(losses: Tensor, divisor: Tensor) -> Tensor:
    """Sum over divisor, in float64 and in an order that no thread count changes."""
    return (fixed_order_sum(losses.double()) / divisor.double()).to(losses.dtype)


def row_gradients(dloss: Tensor, divisor: Tensor, reduction: str, num_rows: int) -> Tensor:
    """Gradient of each row's loss, contiguous (N,)."""
    dlosses = dloss.reshape(-1) if reduction == "none" else (dloss / divisor).expand(num_rows)
    return dlosses.contiguous()


def _serving(logits: Tensor) -> Any:
    return backend("cross_entropy", (logits.shape,), logits.dtype, logits.device.type)


@operation("cross_entropy_backward", lambda dlosses, logits, *_: logits.new_empty(logits.shape))
def _cross_entropy_backward(
    dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Gradient of logits (..., V), given that of each row's loss (N,)."""
    rows = as_rows(logits)
    dlogits = _serving(rows).backward(dlosses, rows, targets.reshape(-1), lse, ignore_index, label_smoothing, z_loss, softcap)
    return dlogits.view(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, *ctx.options, ctx.reduction = inputs
    _, lse, divisor = output
    ctx.save_for_backward(logits, targets, lse, divisor)
    ctx.mark_non_differentiable(lse, divisor)


def _backward(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, targets, lse, divisor = ctx.saved_tensors
    dlosses = row_gradients(dloss, divisor, ctx.reduction, lse.shape[0])
    dlogits = _cross_entropy_backward(dlosses, logits, targets, lse, *ctx.options)
    return dlogits, None, None, None, None, None, None


def _cross_entropy_fake(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = stats_dtype(logits.dtype)
    loss = logits.new_empty(targets.shape if reduction == "none" else (), dtype=dtype)
    return loss, logits.new_empty(targets.numel(), dtype=dtype), logits.new_empty((), dtype=dtype)


@operation("cross_entropy", _cross_entropy_fake, setup_context=_save, backward=_backward)
def _cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, log-sum-exp of each row (N,), what the sum was divided by)."""
    check_integer_range("cross_entropy", "targets", targets, logits.shape[-1], ignore_index)
    rows, flat_targets = as_rows(logits), targets.reshape(-1)
    losses, _, _, lse = _serving(rows).forward(rows, flat_targets, ignore_index, label_smoothing, z_loss, softcap)
    if reduction == "none":
        return losses.view(targets.shape), lse, lse.new_ones(())
    divisor = num_valid(targets, ignore_index).to(lse.dtype) if reduction == "mean" else lse.new_ones(())
    return reduced(losses, divisor), lse, divisor
