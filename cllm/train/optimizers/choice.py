"""The optimizer that a name stands for. A new one gets its file beside these, its name in `cllm.config.schema.OPTIMIZERS`, and a line here."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cllm.config.schema import OPTIMIZERS
from cllm.runtime.errors import UserError
from cllm.train.optimizers.adamw import AdamW
from cllm.train.optimizers.base import Optimizer
from cllm.train.optimizers.lion import Lion
from cllm.train.optimizers.muon import Muon
from cllm.train.optimizers.schedule_free import ScheduleFreeAdamW


def make_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    betas: tuple[float, float],
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
) -> Optimizer:
    """The optimizer called `name`, one of OPTIMIZERS; UserError for any other name.

    Each takes the settings that it has: `momentum` belongs to Muon alone, and Lion has no `eps`.
    """
    if name == "adamw":
        return AdamW(named_parameters, betas=betas, eps=eps, weight_decay=weight_decay)
    if name == "muon":
        return Muon(named_parameters, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum)
    if name == "lion":
        return Lion(named_parameters, betas=betas, weight_decay=weight_decay)
    if name == "schedule_free":
        return ScheduleFreeAdamW(named_parameters, betas=betas, eps=eps, weight_decay=weight_decay)
    raise UserError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}.")
