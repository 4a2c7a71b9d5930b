"""What goes into a training step and what comes out, for the CPU's and the GPU's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

IGNORED = -100


@dataclass(frozen=True)
class Microbatch:
    """tokens, targets (B, T) int64, targets -100 where there is none; cu_seqlens int32 over the B * T tokens, or None."""

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """What one step did. `loss`: nats per target before the update, smoothing and z-loss included. `updated`: False when it was skipped.

    `rescaled`: fp16 alone: gradients overflowed under a loss scale that has been halved since, which is no fault of the data or the model.
    """

    loss: float
    gradient_norm: float
    largest_gradient: float
    num_nonfinite: int
    num_targets: int
    learning_rate: float
    updated: bool
    noise_scale: float | None = None  # tokens; where it was measured
    rescaled: bool = False

    @property
    def finite(self) -> bool:
        return self.num_nonfinite == 0 and math.isfinite(self.loss) and math.isfinite(self.gradient_norm)
