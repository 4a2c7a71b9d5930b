"""One training step: forward and backward over the microbatches, clip, update. What the Trainer runs, for scripts and profilers as well.

step = TrainStep(model, precision="bf16", learning_rate=3e-4, grad_clip=1.0)
loss = step(tokens, targets)          # forward, backward, clip, update; returns the loss before the update
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from cllm.checkpoint.folder import Checkpoint
from cllm.checkpoint.weights import load_weights, weights_of
from cllm.data.tokens.batch import IGNORE, Batch, StepResult
from cllm.runtime.errors import CheckpointError, UserError
from cllm.train.averages import Ema, put, swapped
from cllm.train.noise_scale import NoiseScale
from cllm.train.optimizers.adamw import AdamW
from cllm.train.optimizers.choice import make_optimizer

if TYPE_CHECKING:
    from cllm.model.model import Model
    from cllm.train.step_graph import DeviceStep

__all__ = ["IGNORED", "Microbatch", "StepResult", "TrainStep"]

IGNORED, Microbatch = IGNORE, Batch  # names that scripts use

LOSS_SCALE, NOISE_SCALE = "loss_scale", "noise_scale"
EMA, TRAINING = "ema.", "training."  # beginnings of names in the state: averaged weights, and those that training goes on from
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """Forward, backward, clip and update of a model whose parameters are float32 masters; `precision` is that of the activations.

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
        optimizer: str = "adamw",
        momentum: float = 0.95,
        ema: float = 0.0,
        noise_scale_every: int = 0,
    ) -> None:
        if precision not in PRECISIONS:
            raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
        if not learning_rate > 0 or grad_clip < 0:
            raise UserError(f"learning_rate must be > 0 and grad_clip >= 0, got {learning_rate!r} and {grad_clip!r}.")
        self.model, self.learning_rate, self.grad_clip = model, learning_rate, grad_clip
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        if next(model.parameters()).dtype != torch.float64:  # a float64 model is a reference and computes in float64
            model.compute_dtype = PRECISIONS[precision]
        self.optimizer = make_optimizer(optimizer, self._trained(), betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum)
        self.ema = Ema(self.optimizer.parameters, ema) if ema else None
        self.noise_scale = NoiseScale(list(self.optimizer.parameters.values())) if noise_scale_every else None
        self.noise_scale_every = noise_scale_every
        self.last: StepResult | None = None
        self._observe: Callable[[], None] | None = None  # called after each microbatch's backward
        self.seconds: dict[str, float] = {}  # of the last step's parts, on a CPU; a GPU's parts overlap
        self._device_step: DeviceStep | None = None
        if self.uses_graphs and model.embedding_weight.device.type == "cuda":
            from cllm.train.step_graph import DeviceStep

            if not isinstance(self.optimizer, AdamW):
                raise UserError(f"optimizer {optimizer} runs on a CPU only. Use optimizer adamw on a GPU, or --device cpu.")
            if self.noise_scale is not None:
                raise UserError("the gradient noise scale is measured on a CPU only. Set log.noise_scale_every=0, or --device cpu.")
            self._device_step = DeviceStep(
                model, self.optimizer, grad_clip=grad_clip, label_smoothing=label_smoothing, z_loss=z_loss, loss_scaling=precision == "fp16"
            )
        elif precision == "fp16":
            where = "in one process, without deterministic" if model.embedding_weight.device.type == "cuda" else "on a GPU"
            raise UserError(f"precision fp16, with its loss scaling, works {where} only. Use bf16, which has the range of float32, or fp32.")

    def loss_scale(self) -> float:
        """What gradients are multiplied by until the update: not 1 in fp16 alone."""
        return 1.0 if self._device_step is None else self._device_step.loss_scale()

    def _trained(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """What the optimizer updates, by name."""
        return self.model.named_parameters()

    def whole_model(self) -> Model | None:
        """The model with all its weights; None in a process that is not asked for it."""
        return self.model

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that a checkpoint holds, by name: averages, where there are any."""
        return weights_of(self.model) | (self.averages() or {})

    def restore(self, found: Checkpoint) -> None:
        """Weights and optimizer as a checkpoint holds them. CheckpointError when they do not fit."""
        load_weights(self.model, found.weights, found.path)
        self.load_state_dict(found.optimizer)

    def averages(self) -> dict[str, torch.Tensor] | None:
        """The weights to evaluate and to export by name, where they are not those that training goes on from."""
        return self.optimizer.averages() if self.ema is None else self.ema.weights

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """While entered, the model holds the weights to evaluate; afterwards its own again, bit by bit."""
        return swapped(self.optimizer.parameters, self.averages())

    def state_dict(self, training_weights: bool = False) -> dict[str, torch.Tensor]:
        """What a step needs beside the weights to go on as if it had never stopped. The weights to train on are part of it where the
        checkpoint's weights are others: averages, or with `training_weights` whatever the caller stores there."""
        state = self.optimizer.state_dict()
        if self.ema is not None:
            state |= {EMA + name: tensor for name, tensor in self.ema.weights.items()}
        if training_weights or self.ema is not None or self.optimizer.averaging:
            state |= {TRAINING + name: parameter.detach() for name, parameter in self.optimizer.parameters.items()}
        if self.noise_scale is not None:
            state[NOISE_SCALE] = self.noise_scale.state
        return state if self._device_step is None else state | {LOSS_SCALE: self._device_step.state()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """The state of a run on the CPU goes on on a GPU and the other way round; the bits are then those of another device."""
        apart = {name for name in state if name in (LOSS_SCALE, NOISE_SCALE) or name.startswith((EMA, TRAINING))}
        self.optimizer.load_state_dict({name: tensor for name, tensor in state.items() if name not in apart})
        put(self.optimizer.parameters, _below(TRAINING, state))
        if self.ema is not None:
            averages = _below(EMA, state)
            if averages.keys() != self.ema.weights.keys():
                raise CheckpointError("the checkpoint holds no average of this model's weights. Resume with the settings of its run.")
            put(self.ema.weights, averages)
        if self.noise_scale is not None and NOISE_SCALE in state:
            put({NOISE_SCALE: self.noise_scale.state}, {NOISE_SCALE: state[NOISE_SCALE]})
        if self._device_step is not None:
            self._device_step.resume(self.optimizer.num_updates, state.get(LOSS_SCALE))

    def __call__(self, tokens: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """tokens, targets (B, T) -> the loss before the update, a scalar float32 tensor. More of it in `last`."""
        return torch.tensor(self.run([Batch(tokens, targets, cu_seqlens)]).loss)

    def run(
        self,
        microbatches: Sequence[Batch],
        learning_rate: float | None = None,
        beat: Callable[[], None] | None = None,
        ahead: Callable[[], Sequence[Batch]] | None = None,
        before_update: Callable[[], None] | None = None,
    ) -> StepResult:
        """One update from the gradients of all microbatches together. `beat` is called after each of them; `ahead` makes the microbatches
        of the next update, and is called while a GPU works on this one; `before_update` is called before any weight changes.

        A loss or gradient that is not finite leaves weights, moments and the count of updates as they were.
        """
        rate = self.learning_rate if learning_rate is None else learning_rate
        if self._device_step is not None:
            self.last = self._device_step.run(microbatches, rate, beat, ahead, before_update)
            if self.ema is not None and self.last.updated:
                self.ema.update(self.optimizer.num_updates)
            return self.last
        noise = self.noise_scale
        if noise is not None and (len(microbatches) < 2 or self.optimizer.num_updates % self.noise_scale_every):
            noise = None
        if noise is not None:
            noise.begin(microbatches)
        self._observe = None if noise is None else noise.observe
        loss, num_targets = self.accumulate(microbatches, beat)
        noise_scale = None if noise is None else noise.end()
        if before_update is not None:
            before_update()
        began = time.perf_counter()
        if math.isfinite(loss) and num_targets:
            updates = self.optimizer.num_updates
            norm, largest, nonfinite = self._update(rate)
            updated = self.optimizer.num_updates > updates
            if self.ema is not None and updated:
                self.ema.update(self.optimizer.num_updates)
        else:
            norm, largest, nonfinite, updated = math.nan if num_targets else 0.0, 0.0, int(num_targets > 0), False
        self.optimizer.zero_grad()
        self.seconds["optimizer"] = time.perf_counter() - began
        self.last = StepResult(loss, norm, largest, nonfinite, num_targets, rate, updated, noise_scale)
        return self.last

    def accumulate(self, microbatches: Sequence[Batch], beat: Callable[[], None] | None = None) -> tuple[float, int]:
        """Leaves in `.grad` the gradient of the loss over all microbatches and returns (loss, number of targets).

        Each microbatch's summed loss is divided by the targets of all of them, not averaged over microbatches: a short document
        in one of them weighs no more than its tokens. Gradients add up in the parameters' own float32.
        """
        num_targets = targets_of(microbatches)
        self.optimizer.zero_grad()
        total, self.seconds = 0.0, {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        for each in microbatches if num_targets else ():
            began = time.perf_counter()
            loss = self._loss(each, num_targets)
            forward = time.perf_counter()
            loss.backward()
            total += loss.item()
            self.seconds["forward"] += forward - began
            self.seconds["backward"] += time.perf_counter() - forward
            if self._observe is not None:
                self._observe()
            if beat is not None:
                beat()
        return total, num_targets

    def _loss(self, batch: Batch, num_targets: int) -> torch.Tensor:
        batch = batch.to(self.model.embedding_weight.device)
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


def targets_of(microbatches: Sequence[Batch]) -> int:
    return sum(each.num_targets for each in microbatches)


def _below(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
