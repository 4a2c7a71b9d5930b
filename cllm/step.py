"""One training step: forward and backward over the microbatches, clip, update. What the Trainer runs, for scripts and profilers as well.

    step = TrainStep(model, precision="bf16", learning_rate=3e-4, grad_clip=1.0)
    loss = step(tokens, targets)          # forward, backward, clip, update; returns the loss before the update
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from cllm.checkpoint import Checkpoint, load_weights, weights_of
from cllm.microbatch import IGNORED, Microbatch, StepResult
from cllm.optim import AdamW
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.device_step import DeviceStep
    from cllm.model import Model

__all__ = ["IGNORED", "Microbatch", "StepResult", "TrainStep"]

LOSS_SCALE = "loss_scale"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """Forward, backward, clip and AdamW update of a model whose parameters are float32 masters; `precision` is that of the activations.

    Where the model lies on a GPU, the step runs there as two CUDA graphs (`device_step.py`); fp16, with its loss scaling, is for GPUs only.
    """

    uses_graphs = True  # on a GPU

    def __init__(
        self,
        model: Model,
        precision: str = "fp32",
        learning_rate: float = 3e-4,
        grad_clip: float = 1.0,
        *,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        if precision not in PRECISIONS:
            raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
        if not learning_rate > 0 or grad_clip < 0:
            raise UserError(f"learning_rate must be > 0 and grad_clip >= 0, got {learning_rate!r} and {grad_clip!r}.")
        self.model, self.learning_rate, self.grad_clip = model, learning_rate, grad_clip
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        if next(model.parameters()).dtype != torch.float64:  # a float64 model is a reference and computes in float64
            model.compute_dtype = PRECISIONS[precision]
        self.optimizer = AdamW(self._trained(), betas=betas, eps=eps, weight_decay=weight_decay)
        self.last: StepResult | None = None
        self._device_step: DeviceStep | None = None
        if self.uses_graphs and model.embedding_weight.device.type == "cuda":
            from cllm.device_step import DeviceStep

            self._device_step = DeviceStep(
                model, self.optimizer, grad_clip=grad_clip, label_smoothing=label_smoothing, z_loss=z_loss, loss_scaling=precision == "fp16"
            )
        elif precision == "fp16":
            where = "in one process, without deterministic" if model.embedding_weight.device.type == "cuda" else "on a GPU"
            raise UserError(f"precision fp16, with its loss scaling, works {where} only. Use bf16, which has the range of float32, or fp32.")

    def _trained(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """What the optimizer updates, by name."""
        return self.model.named_parameters()

    def whole_model(self) -> Model | None:
        """The model with all its weights; None in a process that is not asked for it."""
        return self.model

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that a checkpoint holds, by name."""
        return weights_of(self.model)

    def restore(self, found: Checkpoint) -> None:
        """Weights and optimizer as a checkpoint holds them. CheckpointError when they do not fit."""
        load_weights(self.model, found.weights, found.path)
        self.load_state_dict(found.optimizer)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a step needs beside the weights to go on as if it had never stopped."""
        state = self.optimizer.state_dict()
        return state if self._device_step is None else state | {LOSS_SCALE: self._device_step.state()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """The state of a run on the CPU goes on on a GPU and the other way round; the bits are then those of another device."""
        self.optimizer.load_state_dict({name: tensor for name, tensor in state.items() if name != LOSS_SCALE})
        if self._device_step is not None:
            self._device_step.resume(self.optimizer.num_updates, state.get(LOSS_SCALE))

    def __call__(self, tokens: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """tokens, targets (B, T) -> the loss before the update, a scalar float32 tensor. More of it in `last`."""
        return torch.tensor(self.run([Microbatch(tokens, targets, cu_seqlens)]).loss)

    def run(
        self,
        microbatches: Sequence[Microbatch],
        learning_rate: float | None = None,
        beat: Callable[[], None] | None = None,
        ahead: Callable[[], Sequence[Microbatch]] | None = None,
    ) -> StepResult:
        """One update from the gradients of all microbatches together. `beat` is called after each of them; `ahead` makes the microbatches
        of the next update, and is called while a GPU works on this one.

        A loss or gradient that is not finite leaves weights, moments and the count of updates as they were.
        """
        rate = self.learning_rate if learning_rate is None else learning_rate
        if self._device_step is not None:
            self.last = self._device_step.run(microbatches, rate, beat, ahead)
            return self.last
        loss, num_targets = self.accumulate(microbatches, beat)
        if math.isfinite(loss) and num_targets:
            updates = self.optimizer.num_updates
            norm, largest, nonfinite = self._update(rate)
            updated = self.optimizer.num_updates > updates
        else:
            norm, largest, nonfinite, updated = math.nan if num_targets else 0.0, 0.0, int(num_targets > 0), False
        self.optimizer.zero_grad()
        self.last = StepResult(loss, norm, largest, nonfinite, num_targets, rate, updated)
        return self.last

    def accumulate(self, microbatches: Sequence[Microbatch], beat: Callable[[], None] | None = None) -> tuple[float, int]:
        """Leaves in `.grad` the gradient of the loss over all microbatches and returns (loss, number of targets).

        Each microbatch's summed loss is divided by the targets of all of them, not averaged over microbatches: a short document
        in one of them weighs no more than its tokens. Gradients add up in the parameters' own float32.
        """
        num_targets = targets_of(microbatches)
        self.optimizer.zero_grad()
        total = 0.0
        for each in microbatches if num_targets else ():
            loss = self._loss(each, num_targets)
            loss.backward()
            total += loss.item()
            if beat is not None:
                beat()
        return total, num_targets

    def _loss(self, batch: Microbatch, num_targets: int) -> torch.Tensor:
        return self.model.loss(
            batch.tokens,
            batch.targets,
            divisor=float(num_targets),
            cu_seqlens=batch.cu_seqlens,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )

    def _update(self, learning_rate: float) -> tuple[float, float, int]:
        """Clips and updates; (gradient norm, largest |g|, non-finite count)."""
        return self.optimizer.update(learning_rate, self.grad_clip)


def targets_of(microbatches: Sequence[Microbatch]) -> int:
    return sum(int((each.targets != IGNORED).sum()) for each in microbatches)
