"""One training step: forward and backward of each microbatch, gradient clipping, update. The Trainer runs it, and so may any script.

step = TrainStep(model, precision="bf16", learning_rate=3e-4, grad_clip=1.0)
loss = step(tokens, targets)          # returns the loss before the update; step.last holds the rest

What goes with a step has a file of its own: `optimizers/` the update rules, `averages.py` averaged weights, `noise_scale.py` the gradient noise
scale, `step_state.py` the names of its state in a checkpoint, `step_graph.py` the step on a GPU as CUDA graphs, `step_program.py` that on a CPU as
recorded programs. `step_parallel.py` and `step_sharded.py` are its forms for several processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cllm.checkpoint.folder import Checkpoint
from cllm.checkpoint.weights import load_weights, weights_of
from cllm.data.tokens.batch import IGNORE, Batch, first_tokens
from cllm.kernels.dropout import Dropout
from cllm.monitor.records import StepResult
from cllm.runtime import profiler
from cllm.runtime.errors import UserError
from cllm.train.averages import Ema, swapped
from cllm.train.noise_scale import NoiseScale
from cllm.train.optimizers.base import GradientStatistics
from cllm.train.optimizers.choice import make_optimizer
from cllm.train.step_graph import graph_step
from cllm.train.step_program import BACKWARD, FORWARD, StepPrograms
from cllm.train.step_state import StepState

if TYPE_CHECKING:
    from cllm.model.model import Model

__all__ = ["IGNORED", "Microbatch", "StepResult", "TrainStep"]

IGNORED, Microbatch = IGNORE, Batch  # earlier names, which scripts use
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """Trains a model step by step. Its parameters are the float32 master weights, updated in place; a model of float64 parameters is a reference
    and computes in float64 whatever the precision. On a GPU the step runs as CUDA graphs, on a CPU as recorded programs where that pays.

    model: the model to train. Parameters that do not require a gradient stay as they are.
    precision: "fp32", "bf16" or "fp16", the dtype of the activations; sets `model.compute_dtype`. fp16 uses loss scaling and needs a GPU.
    learning_rate: > 0, for steps that are not given another one.
    grad_clip: the largest L2 norm of all gradients together; larger gradients are scaled down to it. 0: no clipping.
    weight_decay: >= 0, decoupled decay of the matrices per unit of learning rate.
    betas: within [0, 1), decay rates of the running averages of the gradient and of its square.
    eps: > 0, added to the root of the second average.
    label_smoothing: within [0, 1), the probability mass that a target gives to all tokens evenly.
    z_loss: >= 0, the weight of the squared log-partition function in the loss.
    optimizer: "adamw", "muon", "lion" or "schedule_free".
    momentum: within [0, 1), of Muon alone.
    ema: within [0, 1), the decay of an exponential moving average of the weights, which is evaluated and stored in their place. 0: none.
    noise_scale_every: updates between two measurements of the gradient noise scale. 0: none.
    dropout: within [0, 1), the share of the embedding, of attention's probabilities and of the branches' outputs that is zeroed in training.
    seed: of what dropout draws. The masks are a function of it, of the number of the update, and of the number of a row in the run.

    Raises UserError for a value out of its range, for a model without trainable parameters, and for what the device cannot do.

    A subclass may say which tensors the optimizer updates (`_trained`), how gradients come about (`accumulate`), how they are applied
    (`_update`), and what of the model a checkpoint holds (`weights`, `restore`, `whole_model`).
    """

    uses_graphs = True  # whether the step runs as CUDA graphs where the model lies on a GPU, and as recorded programs on a CPU

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
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        if precision not in PRECISIONS:
            raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
        for name, value, fits, expected in (
            ("learning_rate", learning_rate, learning_rate > 0, "> 0"),
            ("grad_clip", grad_clip, grad_clip >= 0, ">= 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, ">= 0"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "two numbers within [0, 1)"),
            ("eps", eps, eps > 0, "> 0"),
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "within [0, 1)"),
            ("z_loss", z_loss, z_loss >= 0, ">= 0"),
            ("momentum", momentum, 0 <= momentum < 1, "within [0, 1)"),
            ("ema", ema, 0 <= ema < 1, "within [0, 1)"),
            ("noise_scale_every", noise_scale_every, noise_scale_every >= 0, ">= 0"),
            ("dropout", dropout, 0 <= dropout < 1, "within [0, 1)"),
        ):
            if not fits:
                raise UserError(f"{name} must be {expected}, got {value!r}.")
        self.model, self.learning_rate, self.grad_clip = model, learning_rate, grad_clip
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.dropout = Dropout.of(dropout, seed, model.embedding_weight.device) if dropout else None
        if next(model.parameters()).dtype != torch.float64:
            model.compute_dtype = PRECISIONS[precision]
        self.optimizer = make_optimizer(optimizer, self._trained(), betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum)
        self.ema = Ema(self.optimizer.parameters, ema) if ema else None
        self.noise_scale = NoiseScale(list(self.optimizer.parameters.values()), noise_scale_every) if noise_scale_every else None
        self.last: StepResult | None = None  # what the last step did
        self.seconds: dict[str, float] = {}  # how long the parts of the last step took on a CPU; on a GPU they overlap, and this stays empty
        self._graphs = graph_step(
            model,
            self.optimizer,
            precision,
            self.ema,
            allowed=self.uses_graphs,
            grad_clip=grad_clip,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            dropout=self.dropout,
        )
        self._programs = StepPrograms(model, self.optimizer.parameters) if self.uses_graphs else None
        self._state = StepState(self.optimizer, self.ema, self.noise_scale, self._graphs)

    # -- the step -------------------------------------------------------------------------------------------------------------

    def __call__(self, tokens: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """One update from tokens and targets (B, T) int64, targets -100 where nothing is predicted; `cu_seqlens` as in `Batch`. Returns the
        loss before the update, a scalar float32 tensor on the CPU."""
        return torch.tensor(self.run([Batch(tokens, targets, cu_seqlens)]).loss)

    def run(
        self,
        microbatches: Sequence[Batch],
        learning_rate: float | None = None,
        beat: Callable[[], None] | None = None,
        ahead: Callable[[], Sequence[Batch]] | None = None,
        before_update: Callable[[], None] | None = None,
    ) -> StepResult:
        """One update from the gradients of all microbatches together, which may lie on any device.

        learning_rate: that of this update; None: the step's own. beat: called after each microbatch. ahead: makes the microbatches of the next
        update; called only on a GPU, while it computes this one. before_update: called when the gradients are complete, before any weight
        changes.

        A loss or a gradient that is not finite leaves the weights, the optimizer's state and its count of updates as they were, and so does an
        update without a single target.
        """
        rate, noise = self.learning_rate if learning_rate is None else learning_rate, self.noise_scale
        if noise is None or not noise.due(self.optimizer.num_updates, len(microbatches)):
            self.last = self._run(microbatches, rate, beat, ahead, before_update)
            return self.last
        measured: list[float | None] = [None]

        def complete() -> None:
            if before_update is not None:
                before_update()  # waits for a checkpoint that is being written, of which the state of the noise scale is a part
            measured[0] = noise.end()

        noise.begin(microbatches, self.loss_scale())
        result = self._run(microbatches, rate, noise.observing(beat), ahead, complete)
        self.last = replace(result, noise_scale=measured[0])
        return self.last

    def _run(
        self,
        microbatches: Sequence[Batch],
        rate: float,
        beat: Callable[[], None] | None,
        ahead: Callable[[], Sequence[Batch]] | None,
        before_update: Callable[[], None] | None,
    ) -> StepResult:
        """`run` without the noise scale: as CUDA graphs, or operation by operation."""
        if self._graphs is not None:
            return self._graphs.run(microbatches, rate, beat, ahead, before_update)
        with self.model.torch_aside():
            return self._run_operations(microbatches, rate, beat, before_update)

    def _run_operations(
        self, microbatches: Sequence[Batch], rate: float, beat: Callable[[], None] | None, before_update: Callable[[], None] | None
    ) -> StepResult:
        loss, num_targets = self._replayed(microbatches, beat) or self.accumulate(microbatches, beat)
        if before_update is not None:
            before_update()
        began = time.perf_counter()
        if not num_targets:
            found, updated = GradientStatistics(0.0, 0.0, 0), False
        elif not math.isfinite(loss):
            found, updated = GradientStatistics(math.nan, 0.0, 1), False
        else:
            updates = self.optimizer.num_updates
            with profiler.span("update"):
                found = self._update(rate)
            updated = self.optimizer.num_updates > updates
        if self.ema is not None and updated:
            self.ema.update(self.optimizer.num_updates)
        self.optimizer.zero_grad()
        self.seconds["optimizer"] = time.perf_counter() - began
        return StepResult(loss, found.norm, found.largest, found.num_nonfinite, num_targets, rate, updated)

    def _replayed(self, microbatches: Sequence[Batch], beat: Callable[[], None] | None) -> tuple[float, int] | None:
        """What `accumulate` does, by recorded programs; None, with nothing done, where they do not serve."""
        num_targets = sum(each.num_targets for each in microbatches)
        if self._programs is None or not num_targets or "accumulate" in vars(self) or not self.model.is_ours():
            return None
        seconds = {FORWARD: 0.0, BACKWARD: 0.0, "optimizer": 0.0}
        options = self.label_smoothing, self.z_loss, self.dropout and (self.dropout.rate, self.dropout.key.data_ptr())
        loss = self._programs.accumulate(
            microbatches, num_targets, options, self._go_to, lambda batch: self._loss_of(batch, num_targets), seconds, beat
        )
        if loss is None:
            return None
        self.seconds = seconds
        return loss, num_targets

    def accumulate(self, microbatches: Sequence[Batch], beat: Callable[[], None] | None = None) -> tuple[float, int]:
        """Leaves in each parameter's `.grad` the gradient of the mean loss over all targets of the microbatches; returns (loss, number of
        targets). `beat` is called after the backward of each.

        The summed loss of each microbatch is divided by the number of targets in all of them. Averaging the means of the microbatches instead
        would give a target in a short document more weight than one in a long document. Gradients add up in float32.
        """
        num_targets = sum(each.num_targets for each in microbatches)
        self.optimizer.zero_grad()
        total, self.seconds = 0.0, {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        for each, first in zip(microbatches, first_tokens(microbatches)) if num_targets else ():
            began = time.perf_counter()
            with profiler.span(FORWARD):
                loss = self._loss(each, num_targets, first)
            forward = time.perf_counter()
            with profiler.span(BACKWARD):
                loss.backward()
            total += loss.item()
            self.seconds["forward"] += forward - began
            self.seconds["backward"] += time.perf_counter() - forward
            if beat is not None:
                beat()
        return total, num_targets

    def _loss(self, batch: Batch, num_targets: int, first_token: int) -> torch.Tensor:
        """The summed loss of a batch, divided by `num_targets`. first_token: as in `first_tokens`."""
        self._go_to(first_token)
        return self._loss_of(batch, num_targets)

    def _go_to(self, first_token: int) -> None:
        """What dropout draws from now on belongs to this update and to the microbatch that begins with this token."""
        if self.dropout is not None:
            self.dropout.go_to(self.optimizer.num_updates, first_token)

    def _loss_of(self, batch: Batch, num_targets: int) -> torch.Tensor:
        here = batch.to(self.model.embedding_weight.device)
        return self.model.loss(
            here.tokens,
            here.targets,
            divisor=float(num_targets),
            cu_seqlens=here.cu_seqlens,
            positions=here.positions,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            dropout=self.dropout,
        )

    def _update(self, learning_rate: float) -> GradientStatistics:
        """Clips the gradients and updates the parameters; the statistics are those before clipping."""
        return self.optimizer.update(learning_rate, self.grad_clip)

    def _trained(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """The tensors that the optimizer updates, by name."""
        return self.model.named_parameters()

    @property
    def works_ahead(self) -> bool:
        """Whether `run` calls `ahead` while a GPU computes."""
        return self._graphs is not None

    def loss_scale(self) -> float:
        """The factor in the gradients until the update: other than 1 in fp16 alone. Waits for the GPU."""
        return 1.0 if self._graphs is None else self._graphs.loss_scale()

    # -- weights and state ----------------------------------------------------------------------------------------------------

    def whole_model(self) -> Model | None:
        """The model with all its weights; None in a process that holds only a part of them and is not the one that collects the rest."""
        return self.model

    def averages(self) -> dict[str, torch.Tensor] | None:
        """The weights to evaluate and to export by name, where they differ from those that training continues from; otherwise None."""
        return self.optimizer.averages() if self.ema is None else self.ema.weights

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """While entered, the model holds the weights to evaluate; afterwards its own again, with the same bits."""
        return swapped(self.optimizer.parameters, self.averages())

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that a checkpoint holds, by name: the averages, where there are any."""
        return weights_of(self.model) | (self.averages() or {})

    def state_dict(self, training_weights: bool = False) -> dict[str, torch.Tensor]:
        """What a checkpoint holds beside `weights` for an exact resume; the names are those of `StepState`. With `training_weights` it includes
        the weights that training continues from, which it does by itself where `weights` returns others."""
        return self._state.to_dict(training_weights)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continues from what `state_dict` returned, from a CPU on a GPU too and the other way round, though not with the same bits then.
        CheckpointError where the state is that of another model or of other settings."""
        self._state.load(state)

    def restore(self, found: Checkpoint) -> None:
        """Takes the weights and the state of a checkpoint. CheckpointError where they do not fit."""
        load_weights(self.model, found.weights, found.path)
        self.load_state_dict(found.optimizer)
