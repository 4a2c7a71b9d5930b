"""AdamW over all tensors at once: one pass that measures the gradients, one that clips and updates."""

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import cllm.runtime as runtime
from cllm.kernels._operator import is_observed, operation
from cllm.kernels._register import backend
from cllm.runtime.errors import UserError


def adamw_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], *,
    learning_rate: float, betas: tuple[float, float], eps: float, weight_decays: Sequence[float], step: int,
    max_norm: float = 0.0, skip_nonfinite: bool = True,
) -> Tensor:  # fmt: skip
    """One AdamW update in place, with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101).

    Lists of equal length: float32 params and moments, gradients in float32 or bfloat16 of the same shapes, one weight decay per
    tensor; `step` counts from 1. `max_norm` > 0 scales all gradients so that their global norm is at most that. With
    `skip_nonfinite` nothing at all changes when any gradient is inf or NaN. Returns float32 (3,): the gradient norm before
    clipping, the largest |g| and the number of non-finite elements. Raises UserError for lists, shapes or options that do not fit.
    """
    num_tensors = len(params)
    if not num_tensors == len(grads) == len(exp_avgs) == len(exp_avg_sqs) == len(weight_decays):
        raise UserError(
            f"adamw_: {num_tensors} params, {len(grads)} grads, {len(exp_avgs)} exp_avgs, {len(exp_avg_sqs)} exp_avg_sqs and "
            f"{len(weight_decays)} weight_decays. Pass lists of one length."
        )
    for index, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        if not param.shape == grad.shape == exp_avg.shape == exp_avg_sq.shape:
            raise UserError(
                f"adamw_: tensor {index} has shapes {tuple(param.shape)} (param), {tuple(grad.shape)} (grad), "
                f"{tuple(exp_avg.shape)} and {tuple(exp_avg_sq.shape)} (moments). They must be the same."
            )
        if param.dtype != params[0].dtype or exp_avg.dtype != param.dtype or exp_avg_sq.dtype != param.dtype:
            raise UserError(
                f"adamw_: tensor {index} is {param.dtype} with moments {exp_avg.dtype} and {exp_avg_sq.dtype}. "
                f"Parameters and moments must all be {params[0].dtype}."
            )
        if grad.dtype not in (param.dtype, torch.bfloat16):
            raise UserError(f"adamw_: gradient {index} is {grad.dtype}, expected {param.dtype} or torch.bfloat16. Convert it first.")
    _check_numbers(learning_rate, betas, eps, step, max_norm)
    with torch.no_grad():
        return _adamw(
            list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), float(learning_rate), *betas, eps,
            list(weight_decays), step, float(max_norm), skip_nonfinite,
        )  # fmt: skip


def _check_numbers(learning_rate: float, betas: tuple[float, float], eps: float, step: int, max_norm: float) -> None:
    beta1, beta2 = betas
    if not (learning_rate >= 0 and eps >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1 and step >= 1 and max_norm >= 0):
        raise UserError(
            f"adamw_: expected learning_rate >= 0, eps >= 0, 0 <= betas < 1, step >= 1 and max_norm >= 0, "
            f"got {learning_rate}, {eps}, {betas}, {step} and {max_norm}."
        )


_dtype_of = attrgetter("dtype")


class AdamWAgain:
    """`adamw_` of tensors that were updated before and lie where they lay then, as the gradients of a replayed step do: what follows from the tensors
    alone is found out once. `call` returns None where they have moved, and where whoever watches has to see the operator."""

    def __init__(self) -> None:
        self._key: list[object] = []
        self._places: Any = None

    def call(
        self, params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], *,
        learning_rate: float, betas: tuple[float, float], eps: float, weight_decays: list[float], step: int, max_norm: float,
        clip: float | None = None,
    ) -> Tensor | None:  # fmt: skip
        """clip: what the gradients are multiplied with, where they have been measured already and are finite; nothing is measured then."""
        everything = list(chain(params, exp_avgs, exp_avg_sqs, grads))
        key = [*map(Tensor.data_ptr, everything), *map(_dtype_of, grads), runtime.settings(), *weight_decays]
        if key != self._key:
            self._key, self._places = key, None
            return None
        if params[0].device.type != "cpu" or not all(map(Tensor.is_contiguous, everything)) or is_observed():
            return None
        serving = backend("adamw", ((sum(param.numel() for param in params),),), params[0].dtype, "cpu")
        if not hasattr(serving, "Places"):
            return None
        if self._places is None:
            self._places = serving.Places(params, grads, exp_avgs, exp_avg_sqs, weight_decays)
        _check_numbers(learning_rate, betas, eps, step, max_norm)
        found: Tensor = serving.apply(params, self._places, learning_rate, *betas, eps, step, max_norm, True, clip)
        increment_version([*params, *exp_avgs, *exp_avg_sqs])
        return found


def gradient_statistics(grads: Sequence[Tensor]) -> Tensor:
    """What `adamw_` measures, without an update: float32 (3,) of the norm of all gradients together, the largest |g| and the number of
    non-finite elements. Gradients in float32 or bfloat16; squares are summed in float64, in an order that no number of threads changes.
    """
    with torch.no_grad():
        return _statistics([grad.detach() for grad in grads])


@operation("gradient_statistics", lambda grads: grads[0].new_empty(3, dtype=torch.float32) if grads else torch.empty(3))
def _statistics(grads: list[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(3)
    size = sum(grad.numel() for grad in grads)
    serving = backend("adamw", ((size,),), grads[0].dtype, grads[0].device.type)
    return serving.statistics(grads)


def _adamw_fake(params: list[Tensor], *_: object) -> Tensor:
    return params[0].new_empty(3, dtype=torch.float32) if params else torch.empty(3)


@operation("adamw_", _adamw_fake, mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def _adamw(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    learning_rate: float, beta1: float, beta2: float, eps: float, weight_decays: list[float], step: int,
    max_norm: float, skip_nonfinite: bool,
) -> Tensor:  # fmt: skip
    if not params:
        return torch.zeros(3)
    size = sum(param.numel() for param in params)
    serving = backend("adamw", ((size,),), params[0].dtype, params[0].device.type)
    return serving.step(params, grads, exp_avgs, exp_avg_sqs, learning_rate, beta1, beta2, eps, weight_decays, step, max_norm, skip_nonfinite)
