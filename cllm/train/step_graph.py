"""The training step on a GPU: forward and backward of a microbatch, and the update, each captured once as a CUDA graph and replayed.

All that changes from step to step lies in tensors that keep their addresses: the microbatch, the learning rate, the number of targets, the loss
scale, the count of updates. Nothing is read back before the end of a step, and while the GPU works the host makes the next step's batches and
copies them ahead on a stream of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from cllm.data.tokens.batch import Batch
from cllm.monitor.records import StepResult
from cllm.runtime import progress
from cllm.runtime.errors import CheckpointError, UserError
from cllm.train.optimizers.adamw import AdamW
from cllm.train.optimizers.base import Optimizer

if TYPE_CHECKING:
    from cllm.model.model import Model

WARM_UPS = 3  # runs of a graph's body before it is captured: kernels compile and libraries allocate what they keep
FIRST_LOSS_SCALE = 65536.0  # fp16: halved when a gradient overflows, doubled after GROWTH_INTERVAL good steps (Micikevicius et al. 2018)
GROWTH_INTERVAL = 2000.0
SMALLEST_USEFUL_SCALE = 1.0  # gradients that overflow without being multiplied are the model's own fault


class _Slot:
    """Device copies of the tensors of one microbatch, with bounds of documents filled up to a fixed length by empty documents."""

    def __init__(self, like: Batch, device: torch.device) -> None:
        size, self.kind = like.tokens.numel(), _kind(like)
        self.host = [torch.empty(like.tokens.shape, dtype=torch.int64), torch.empty(like.tokens.shape, dtype=torch.int64)]
        if like.cu_seqlens is not None:
            self.host += [torch.empty(size + 1, dtype=torch.int32), torch.empty(size, dtype=torch.int64)]
        if device.type == "cuda":
            self.host = [each.pin_memory() for each in self.host]
        self.device = [torch.empty_like(each, device=device) for each in self.host]

    def fill(self, batch: Batch, model: Model) -> None:
        """Copies a microbatch to the device without waiting for the copies to end."""
        self.host[0].copy_(batch.tokens)
        self.host[1].copy_(batch.targets)
        if batch.cu_seqlens is not None:
            bounds, count = batch.cu_seqlens, batch.cu_seqlens.numel()
            self.host[2][:count].copy_(bounds)
            self.host[2][count:].fill_(batch.tokens.numel())
            self.host[3].copy_(model.document_positions(bounds, batch.tokens.numel()))
        for there, here in zip(self.device, self.host):
            there.copy_(here, non_blocking=True)

    def take(self, other: _Slot) -> None:
        for mine, theirs in zip(self.device, other.device):
            mine.copy_(theirs, non_blocking=True)


def _kind(batch: Batch) -> tuple[torch.Size, bool]:
    return batch.tokens.shape, batch.cu_seqlens is not None


def graph_step(
    model: Model,
    optimizer: Optimizer,
    precision: str,
    *,
    allowed: bool,
    grad_clip: float,
    label_smoothing: float,
    z_loss: float,
    measures_noise: bool,
) -> DeviceStep | None:
    """The step as CUDA graphs, where the model lies on a GPU and the kind of step allows it; otherwise None. UserError for what only the one or
    the other can do."""
    on_gpu = model.embedding_weight.device.type == "cuda"
    if not (on_gpu and allowed):
        if precision == "fp16":
            where = "in one process, without deterministic" if on_gpu else "on a GPU"
            raise UserError(f"precision fp16, with its loss scaling, works {where} only. Use bf16, which has the range of float32, or fp32.")
        return None
    if not isinstance(optimizer, AdamW):
        raise UserError(f"optimizer {optimizer.name} runs on a CPU only. Use optimizer adamw on a GPU, or --device cpu.")
    if measures_noise:
        raise UserError("the gradient noise scale is measured on a CPU only. Set log.noise_scale_every=0, or --device cpu.")
    return DeviceStep(model, optimizer, grad_clip=grad_clip, label_smoothing=label_smoothing, z_loss=z_loss, loss_scaling=precision == "fp16")


class DeviceStep:
    """What `TrainStep.run` does on a GPU. `capture=False` runs the same operations one by one, on any device that has the Triton kernels."""

    def __init__(
        self, model: Model, optimizer: AdamW, *, grad_clip: float, label_smoothing: float, z_loss: float, loss_scaling: bool, capture: bool = True
    ) -> None:
        from cllm.kernels.triton.adamw import Fused

        self.model, self.optimizer, self.capture = model, optimizer, capture
        self.grad_clip, self.label_smoothing, self.z_loss = grad_clip, label_smoothing, z_loss
        self.device = model.embedding_weight.device
        parameters = list(optimizer.parameters.values())
        for parameter in parameters:  # float32 main gradients, which microbatches add to
            parameter.grad = torch.zeros_like(parameter)
        self._parameters = parameters
        self._fused = Fused(
            [each.detach() for each in parameters], list(optimizer.exp_avg.values()), list(optimizer.exp_avg_sq.values()),
            list(optimizer.decays.values()),
        )  # fmt: skip
        self._state = self._fused.state.double()  # float64, as the learning rate and betas: float32 would round them
        self._state[0].fill_(optimizer.num_updates)
        self._state[1].fill_(FIRST_LOSS_SCALE if loss_scaling else 1.0)
        self._scales = loss_scaling
        growth = GROWTH_INTERVAL if loss_scaling else 0.0
        self._hyper_host = torch.tensor([0.0, *optimizer.betas, optimizer.eps, grad_clip, 1.0, 1.0, growth, 0.0], dtype=torch.float64)
        if self.device.type == "cuda":
            self._hyper_host = self._hyper_host.pin_memory()
        # learning rate, betas, eps, clip, inverse scale, skip, growth as AdamW reads them, and 1 / the number of targets
        self._hyper = self._hyper_host.to(self.device)
        self._loss = torch.zeros((), device=self.device)
        self._one, self._nan = torch.ones_like(self._hyper[:1]), torch.full_like(self._hyper[:1], math.nan)
        self._stats = torch.zeros(3, device=self.device)
        self._slot: _Slot | None = None
        self._like: tuple[torch.Size, bool] | None = None
        self._graphs: dict[Callable[[], None], torch.cuda.CUDAGraph] = {}
        self._ahead: tuple[Sequence[Batch], list[_Slot]] | None = None
        self._stores: list[list[_Slot]] = [[], []]  # two, in turn: one is read while the other is filled
        self._turn = 0
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def run(
        self,
        microbatches: Sequence[Batch],
        learning_rate: float,
        beat: Callable[[], None] | None = None,
        ahead: Callable[[], Sequence[Batch]] | None = None,
        before_update: Callable[[], None] | None = None,
    ) -> StepResult:
        """One update. `ahead` makes the microbatches of the next one while the GPU works on this one; `before_update` returns when weights
        may change."""
        num_targets = sum(each.num_targets for each in microbatches)
        if not num_targets:
            return StepResult(0.0, 0.0, 0.0, 0, 0, learning_rate, False)
        slots = self._staged(microbatches)
        self._hyper_host[0], self._hyper_host[8] = learning_rate, 1.0 / num_targets
        self._hyper.copy_(self._hyper_host, non_blocking=True)
        if self._like != _kind(microbatches[0]):
            self._prepare(microbatches[0])
        assert self._slot is not None and all(_kind(each) == self._like for each in microbatches), "microbatches of one step have one shape"
        self._loss.zero_()
        for slot in slots:
            self._slot.take(slot)
            self._play(self._accumulate)
            if beat is not None:
                beat()
        if before_update is not None:
            before_update()
        self._play(self._update)
        result = torch.cat((self._loss.reshape(1), self._stats, self._state[:2]))
        if ahead is not None:
            self._stage(ahead())
        loss, norm, largest, nonfinite, updates, scale = result.tolist()  # waits for the step
        updated = int(updates) > self.optimizer.num_updates
        self.optimizer.num_updates = int(updates)
        if not math.isfinite(loss):
            nonfinite = max(1.0, nonfinite)
        rescaled = self._scales and not updated and math.isfinite(loss) and scale >= SMALLEST_USEFUL_SCALE
        return StepResult(loss, norm, largest, int(nonfinite), num_targets, learning_rate, updated, rescaled=rescaled)

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

    def _accumulate(self) -> None:
        assert self._slot is not None
        tokens, targets, *documents = self._slot.device
        cu_seqlens, positions = documents or (None, None)
        loss = self.model.loss(
            tokens, targets, divisor=1.0, cu_seqlens=cu_seqlens, positions=positions, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )
        loss.backward(gradient=(self._state[1] * self._hyper[8]).to(loss.dtype))
        self._loss += (loss.detach() * self._hyper[8]).to(self._loss.dtype)

    def _update(self) -> None:
        # A loss that is not finite becomes a factor of NaN for the gradients, and AdamW skips the update.
        self._hyper[5:6].copy_(torch.where(torch.isfinite(self._loss), self._one, self._nan))
        grads = [gradient for each in self._parameters if (gradient := each.grad) is not None]
        self._fused.run(grads, self._hyper[:8], self._state, self._stats)
        torch._foreach_zero_(grads)

    def _prepare(self, batch: Batch) -> None:
        """The fixed input of the graphs for microbatches like `batch`, and the graphs themselves. Gradients are 0 before and after."""
        self._slot, self._like = _Slot(batch, self.device), _kind(batch)
        self._graphs.clear()
        if self.capture and self.device.type == "cuda":
            with progress.stage("Capturing the step as CUDA graphs"):
                self._slot.fill(batch, self.model)
                self._capture()

    def _capture(self) -> None:
        """Both graphs, from the batch in the slot. Their bodies run for it, so no weight, moment or counter may change by that."""
        state = self._state.clone()
        self._graphs[self._accumulate] = self._captured(self._accumulate)
        torch._foreach_zero_([each.grad for each in self._parameters if each.grad is not None])
        self._loss.fill_(math.nan)  # AdamW skips the update of a loss that is not finite, and changes nothing but its own counters
        self._graphs[self._update] = self._captured(self._update)
        self._state.copy_(state)

    def _captured(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Runs `body` a few times, then records it."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                body()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()
        return graph

    def _play(self, body: Callable[[], None]) -> None:
        graph = self._graphs.get(body)
        if graph is None:
            body()
        else:
            graph.replay()

    # -- data ---------------------------------------------------------------------------------------------------------------

    def _staged(self, microbatches: Sequence[Batch]) -> list[_Slot]:
        if self._ahead is None or self._ahead[0] is not microbatches:
            self._stage(microbatches)
        assert self._ahead is not None
        slots, self._ahead = self._ahead[1], None
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
        return slots

    def _stage(self, microbatches: Sequence[Batch]) -> None:
        """Starts the copies of a step's microbatches to the device. The store it takes was read by the step before the last, which has ended."""
        store = self._stores[self._turn]
        self._turn = 1 - self._turn
        if [slot.kind for slot in store] != [_kind(each) for each in microbatches]:
            store[:] = [_Slot(each, self.device) for each in microbatches]
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            for slot, each in zip(store, microbatches):
                slot.fill(each, self.model)
        self._ahead = (microbatches, store)
