"""The training step on a GPU: forward and backward of a microbatch, and the optimizer's update, each captured once as a CUDA graph and replayed.

All that changes from step to step lies in tensors that keep their addresses: the microbatch, the learning rate, the number of targets, the loss
scale, the count of updates, the key of dropout. Nothing is read back before the end of a step, and while the GPU works the host makes the next
step's batches and copies them ahead (`staging.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from cllm.data.tokens.batch import Batch, first_tokens
from cllm.kernels.dropout import Dropout
from cllm.monitor.records import StepResult
from cllm.runtime import progress, settings
from cllm.runtime.cuda_graphs import Body, CudaGraphs, Graphs
from cllm.runtime.errors import CheckpointError, UserError
from cllm.train.optimizers.base import Optimizer
from cllm.train.staging import DeviceBatch, Staging

if TYPE_CHECKING:
    from cllm.model.model import Model
    from cllm.train.averages import Ema

FIRST_LOSS_SCALE = 65536.0  # fp16: halved when a gradient overflows, doubled after GROWTH_INTERVAL good steps (Micikevicius et al. 2018)
GROWTH_INTERVAL = 2000.0
SMALLEST_USEFUL_SCALE = 1.0  # gradients that overflow without being multiplied are the model's own fault


def check_device(device_type: str, precision: str, *, graphs: bool) -> None:
    """UserError for a precision that the kind of device cannot serve. graphs: whether a step on a GPU may run as CUDA graphs."""
    on_gpu = device_type == "cuda"
    if precision == "fp16" and not (on_gpu and graphs):
        where = "in one process, without deterministic" if on_gpu else "on a GPU"
        raise UserError(f"precision fp16, with its loss scaling, works {where} only. Use bf16, which has the range of float32, or fp32.")


def graph_step(
    model: Model, optimizer: Optimizer, precision: str, ema: Ema | None, *, allowed: bool, grad_clip: float, label_smoothing: float, z_loss: float,
    dropout: Dropout | None,
) -> DeviceStep | None:  # fmt: skip
    """The step as CUDA graphs, where the model lies on a GPU and the kind of step allows it; otherwise None. UserError as in `check_device`."""
    device_type = model.embedding_weight.device.type
    check_device(device_type, precision, graphs=allowed)
    if device_type != "cuda" or not allowed:
        return None
    scaled = precision == "fp16"
    return DeviceStep(
        model, optimizer, ema, grad_clip=grad_clip, label_smoothing=label_smoothing, z_loss=z_loss, loss_scaling=scaled, dropout=dropout
    )


class _Accumulation(NamedTuple):
    """The forward and backward of one kind of microbatch, which read it from `batch`."""

    batch: DeviceBatch
    run: Body


class DeviceStep:
    """What `TrainStep.run` does on a GPU, with the update of any optimizer and the average of the weights.

    graphs: records the parts of the step. With None the same operations run one by one, on any device that has the Triton kernels.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        ema: Ema | None = None,
        *,
        grad_clip: float,
        label_smoothing: float,
        z_loss: float,
        loss_scaling: bool,
        dropout: Dropout | None = None,
        graphs: Callable[[torch.device], Graphs] | None = CudaGraphs,
    ) -> None:
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.grad_clip, self.label_smoothing, self.z_loss, self.dropout = grad_clip, label_smoothing, z_loss, dropout
        self.device = model.embedding_weight.device
        self._parameters = list(optimizer.parameters.values())
        self._gradients = [torch.zeros_like(each) for each in self._parameters]  # float32 main gradients, which microbatches add to
        with self._current():
            self._fused = optimizer.fused()
        # As `Fused` keeps it. float64, as the learning rate and betas: float32 would round them.
        self._state = torch.zeros(4, dtype=torch.float64, device=self.device)
        self._state[0].fill_(optimizer.num_updates)
        self._state[1].fill_(FIRST_LOSS_SCALE if loss_scaling else 1.0)
        self._scales = loss_scaling
        growth = GROWTH_INTERVAL if loss_scaling else 0.0
        self._hyper_host = torch.tensor([0.0, *optimizer.betas, optimizer.eps, grad_clip, 1.0, 1.0, growth, 0.0], dtype=torch.float64)
        if self.device.type == "cuda":
            with self._current():
                self._hyper_host = self._hyper_host.pin_memory()
        # learning rate, betas, eps, clip, inverse scale, skip, growth as `Fused` reads them, and 1 / the number of targets
        self._hyper = self._hyper_host.to(self.device)
        self._loss = torch.zeros((), device=self.device)
        self._one, self._nan = torch.ones_like(self._hyper[:1]), torch.full_like(self._hyper[:1], math.nan)
        self._stats = torch.zeros(3, device=self.device)
        self._staging = Staging(model, self.device)
        self._graphs = None if graphs is None else graphs(self.device)
        self._accumulations: dict[tuple[object, ...], _Accumulation] = {}  # one for each kind of microbatch that has come
        self._apply: Body | None = None  # the update, once it is captured

    def run(
        self,
        microbatches: Sequence[Batch],
        learning_rate: float,
        beat: Callable[[], None] | None = None,
        ahead: Callable[[], Sequence[Batch]] | None = None,
        before_update: Callable[[], None] | None = None,
    ) -> StepResult:
        """One update. `ahead` makes the microbatches of the next one while the GPU works on this one; `before_update` returns when weights
        may change. Microbatches may differ in shape: each new one takes a moment to capture."""
        num_targets = sum(each.num_targets for each in microbatches)
        if not num_targets:
            return StepResult(0.0, 0.0, 0.0, 0, 0, learning_rate, False)
        with self._current():
            batches = self._staging.arrived(microbatches)
            self._hyper_host[0], self._hyper_host[8] = learning_rate, 1.0 / num_targets
            self._hyper.copy_(self._hyper_host, non_blocking=True)
            for parameter, gradient in zip(self._parameters, self._gradients):
                parameter.grad = gradient  # also after zero_grad(): the graphs write into these very tensors
            accumulations = [self._accumulation(each) for each in batches]
            self._loss.zero_()
            torch._foreach_zero_(self._gradients)
            for accumulation, batch, first in zip(accumulations, batches, first_tokens(microbatches)):
                if self.dropout is not None:
                    self.dropout.go_to(self.optimizer.num_updates, first)
                accumulation.batch.take(batch)
                accumulation.run()
                if beat is not None:
                    beat()
            if before_update is not None:
                before_update()
            return self._finish(num_targets, learning_rate, ahead)

    def _finish(self, num_targets: int, learning_rate: float, ahead: Callable[[], Sequence[Batch]] | None) -> StepResult:
        """The update; the host waits for nothing but the result."""
        (self._apply or self._update)()
        result = torch.cat((self._loss.reshape(1), self._stats, self._state[:2]))
        if ahead is not None:
            self._staging.start(ahead())
        loss, norm, largest, nonfinite, updates, scale = self._read(result)
        updated = int(updates) > self.optimizer.num_updates
        self.optimizer.num_updates = int(updates)
        if not math.isfinite(loss):
            nonfinite = max(1.0, nonfinite)
        rescaled = self._scales and not updated and math.isfinite(loss) and scale >= SMALLEST_USEFUL_SCALE
        return StepResult(loss, norm, largest, int(nonfinite), num_targets, learning_rate, updated, rescaled=rescaled)

    def _current(self) -> AbstractContextManager[object]:
        """Makes the model's GPU the current one, which streams, pinned memory and captures go by."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _read(self, numbers: torch.Tensor) -> list[float]:
        """Waits for what was computed so far: the only time in a step that the host does."""
        values: list[float] = numbers.tolist()
        return values

    def loss_scale(self) -> float:
        """Waits for the GPU."""
        return float(self._state[1])

    def state(self) -> torch.Tensor:
        """float64 (4,), on the CPU: updates made, loss scale, good steps since it changed, updates left out."""
        return self._state.to("cpu", copy=True)

    def resume(self, num_updates: int, state: torch.Tensor | None) -> None:
        """Goes on after `num_updates`, with the loss scale of `state` (from `state()`), or the one it has."""
        if state is not None:
            if state.shape != self._state.shape:
                raise CheckpointError(f"the state of a GPU step has {self._state.numel()} numbers, got {tuple(state.shape)}.")
            self._state.copy_(state)
        self._state[0].fill_(num_updates)

    # -- what the graphs hold -----------------------------------------------------------------------------------------------

    def _accumulate(self, batch: DeviceBatch) -> None:
        """Adds the loss of a microbatch, and its gradients."""
        tokens, targets, *documents = batch.device
        cu_seqlens, positions = documents or (None, None)
        loss = self.model.loss(
            tokens, targets, divisor=1.0, cu_seqlens=cu_seqlens, positions=positions, label_smoothing=self.label_smoothing, z_loss=self.z_loss,
            dropout=self.dropout,
        )  # fmt: skip
        loss.backward(gradient=(self._state[1] * self._hyper[8]).to(loss.dtype))
        self._loss += (loss.detach() * self._hyper[8]).to(self._loss.dtype)

    def _update(self) -> None:
        """Makes the optimizer's update from the gradients, and takes the new weights into their average."""
        before = self._state[0].clone()  # updates made so far
        # A loss that is not finite becomes a factor of NaN for the gradients, and the update is left out.
        self._hyper[5:6].copy_(torch.where(torch.isfinite(self._loss), self._one, self._nan))
        self._fused.measure(self._gradients, self._hyper[:8], self._state, self._stats)
        self.optimizer.step_fused(self._fused, self._gradients)
        if self.ema is not None:
            self.ema.update_where(self._state[0] > before, self._state[0])

    def _accumulation(self, like: DeviceBatch) -> _Accumulation:
        """What computes microbatches of the kind of `like`, captured when the first one comes. The graph holds also for nothing but the dtype,
        the recomputation and the backends that it was captured with."""
        key = (like.kind, self.model.compute_dtype, self.model.recompute, settings())
        if key not in self._accumulations:
            batch = like.empty_copy()
            body: Body = partial(self._accumulate, batch)
            if self._graphs is not None:
                batch.take(like)
                with progress.stage("Capturing the step as CUDA graphs"):
                    body = self._captured(body)
            self._accumulations[key] = _Accumulation(batch, body)
        return self._accumulations[key]

    def _captured(self, accumulate: Body) -> Body:
        """The graph of `accumulate`, and with the first one that of the update. Their bodies run for it: no weight, moment or counter may change
        by that, also where memory ends in between, while gradients and loss are anything afterwards."""
        assert self._graphs is not None
        state = self._state.clone()
        try:
            graph = self._graphs.capture(accumulate)
            if self._apply is None:
                self._loss.fill_(math.nan)  # the update of a loss that is not finite is left out, and changes nothing but its own counters
                self._apply = self._graphs.capture(self._update)
        finally:
            self._state.copy_(state)
        return graph
