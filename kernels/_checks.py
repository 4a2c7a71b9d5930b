"""Checks of arguments that several operations share. Each raises UserError with what was found, what was expected and what to do."""

import torch
from torch import Tensor

from cllm.runtime.errors import UserError


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Activations of one call: floating point, and all of the first one's dtype and device."""
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            if not tensor.is_floating_point():
                raise UserError(f"{op}: {name} must be floating point, got {tensor.dtype}. Convert it first.")
            first, first_name = tensor, name
        elif tensor.dtype != first.dtype or tensor.device != first.device:
            raise UserError(
                f"{op}: {name} is {tensor.dtype} on {tensor.device} and {first_name} is {first.dtype} on {first.device}. "
                "They must agree: convert one of them."
            )


def check_heads(op: str, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Query heads of attention come in groups of one size, each with a key-value head."""
    if num_kv_heads == 0 or num_heads % num_kv_heads or head_dim == 0:
        raise UserError(
            f"{op}: {num_heads} query heads of size {head_dim} cannot share {num_kv_heads} key-value heads. "
            "The number of query heads must be a multiple of the number of key-value heads."
        )


def check_weight(op: str, activation: Tensor, **weights: Tensor | None) -> None:
    """Weights may be the float32 master copy or have the activation's dtype."""
    for name, weight in weights.items():
        if weight is None:
            continue
        if weight.dtype != activation.dtype and weight.dtype != torch.float32:
            raise UserError(f"{op}: {name} is {weight.dtype}, expected torch.float32 or the activations' {activation.dtype}. Convert it first.")
        if weight.device != activation.device:
            raise UserError(f"{op}: {name} is on {weight.device} and the activations on {activation.device}. Move one.")


def check_integer_range(op: str, name: str, values: Tensor, end: int, ignored: int | None = None) -> None:
    """Indices within [0, end): read on the CPU only, because elsewhere the answer would stall the device."""
    if values.device.type != "cpu" or values.numel() == 0:
        return
    found = values.detach().numpy()  # a few microseconds for a batch of tokens; torch's aminmax and its comparisons take 40
    if found.min() >= 0 and found.max() < end:
        return
    wrong = (found < 0) | (found >= end)
    if ignored is not None:
        wrong &= found != ignored
    if wrong.any():
        raise UserError(
            f"{op}: {name} holds {int(found[wrong][0])}, expected 0 <= {name} < {end}"
            + (f" or {ignored} where there is nothing to predict" if ignored is not None else "")
            + ". Check that tokenizer and vocabulary size belong together."
        )
