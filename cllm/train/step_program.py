"""The training step on a CPU as recorded programs: forward and backward of a microbatch with no Python between their kernels.

The twin of `step_graph.py`. A kind of microbatch that comes for the second time is recorded while it is computed (`runtime/workers/program.py`). For
the third time it is computed both ways, and the program is believed only if it gives the bits of the single operations, in the loss and in every
gradient. From then on it is replayed. The optimizer works as ever, on gradients that keep their addresses. What a program does not hold for runs
operation by operation: another shape, a document longer than a row, other settings, other weights in the place of those that it was recorded with,
and whatever somebody watches. `CLLM_STEP_PROGRAM=0` lets every step run so.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cllm import runtime
from cllm.data.tokens.batch import IGNORE, Batch, first_tokens
from cllm.model.memory import MOST_PROGRAM_BYTES, predict
from cllm.runtime import profiler, progress

if TYPE_CHECKING:
    from cllm.model.model import Model
    from cllm.runtime.workers.program import Program, Recorder

MOST_KINDS = 64  # of microbatches that are remembered
FORWARD, BACKWARD = "forward", "backward"
TOO_MUCH = "it needs too much memory"  # which is no surprise: Python's share of a large step is small

LossOf = Callable[[Batch], Tensor]
Seconds = dict[str, float]  # how long the parts of a step took


class Computed(NamedTuple):
    """The loss of a microbatch and the gradient of each parameter, None where it takes no part in the loss."""

    loss: float
    gradients: list[Tensor | None]


class StepPrograms:
    """The programs of one model's step. parameters: those that are trained, by name."""

    def __init__(self, model: Model, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._model, self._parameters = model, list(parameters.values())
        self._kinds: OrderedDict[tuple[object, ...], _Kind] = OrderedDict()
        self._watch = _Watch(model)
        self._sums = [torch.empty(0)] * len(self._parameters)  # of the gradients of several microbatches
        self._busy = threading.Lock()
        self._told = {TOO_MUCH}

    @property
    def programs(self) -> list[Program]:
        """Those that are recorded."""
        return [kind.program for kind in self._kinds.values() if kind.program is not None]

    @property
    def bytes(self) -> int:
        """What all of them have of memory to themselves."""
        return sum(each.bytes for each in self.programs)

    @property
    def num_replayed(self) -> int:
        """How many microbatches were computed by a program alone."""
        return sum(kind.num_replayed for kind in self._kinds.values())

    @property
    def reasons(self) -> list[str]:
        """Why some kinds of microbatches are not replayed."""
        return [kind.reason for kind in self._kinds.values() if kind.reason is not None]

    def accumulate(
        self,
        microbatches: Sequence[Batch],
        num_targets: int,
        options: tuple[object, ...],
        begin: Callable[[int], None],
        loss_of: LossOf,
        seconds: Seconds,
        beat: Callable[[], None] | None,
    ) -> float | None:
        """The loss of an update, and the gradients in each parameter's `.grad`, as `TrainStep.accumulate` leaves them; None, with nothing done, where
        all of it is to run operation by operation. options: what else the loss depends on. begin: called before each microbatch with the number
        of its first token, to set what the program reads at another place than in the batch."""
        if not self._watch.is_quiet() or not self._busy.acquire(blocking=False):
            return None
        try:
            kinds = [self._kind_of(each, options) if num_targets > 1 else None for each in microbatches]
            if not any(kind is not None and kind.seen and kind.reason is None for kind in kinds):
                for kind in kinds:
                    if kind is not None:
                        kind.seen += 1
                return None
            total = 0.0
            sums: list[Tensor | None] = [None] * len(self._parameters)
            for batch, kind, first in zip(microbatches, kinds, first_tokens(microbatches)):
                begin(first)
                loss, gradients = self._computed(batch, kind, num_targets, loss_of, seconds)
                total += loss
                sums = gradients if len(microbatches) == 1 else self._added(sums, gradients)
                self._put(sums)
                if beat is not None:
                    beat()
            return total
        finally:
            self._busy.release()

    def _computed(self, batch: Batch, kind: _Kind | None, num_targets: int, loss_of: LossOf, seconds: Seconds) -> Computed:
        """One microbatch, by operations or by its program."""
        if kind is None or not kind.take(batch):
            return self._by_operations(batch, loss_of, seconds)
        numbers = {"targets": float(num_targets), "share": 1.0 / num_targets}
        if kind.proven:
            return kind.replay(numbers, seconds)
        if kind.program is not None:
            expected = self._by_operations(batch, loss_of, seconds)
            kind.prove(numbers, expected)
            self._tell(kind)
            return expected
        if profiler.recording is not None:
            return self._by_operations(batch, loss_of, seconds)
        from cllm.kernels.numba import copies  # noqa: F401 - what torch does between kernels, as launches
        from cllm.runtime.workers.program import record

        with ExitStack() as recording:
            try:
                recorder = recording.enter_context(record(max(0, MOST_PROGRAM_BYTES - self.bytes), numbers, longest=batch.tokens.shape[1]))
            except MemoryError:  # of addresses, of which a limit may leave few
                kind.reason = TOO_MUCH
                return self._by_operations(batch, loss_of, seconds)
            loss, gradients = self._run(kind.batch, loss_of, seconds, recorder)
        kind.keep(recorder, loss, gradients)
        self._tell(kind)
        return Computed(loss.item(), gradients)

    def _tell(self, kind: _Kind) -> None:
        """Says once why something is not replayed that could have been."""
        if kind.reason is not None and kind.reason not in self._told:
            self._told.add(kind.reason)
            progress.say(f"training steps run operation by operation instead of as a recorded program: {kind.reason}.")

    def _by_operations(self, batch: Batch, loss_of: LossOf, seconds: Seconds) -> Computed:
        loss, gradients = self._run(batch, loss_of, seconds)
        return Computed(loss.item(), gradients)

    def _run(self, batch: Batch, loss_of: LossOf, seconds: Seconds, recorder: Recorder | None = None) -> tuple[Tensor, list[Tensor | None]]:
        self._put([None] * len(self._parameters))
        began = time.perf_counter()
        with profiler.span(FORWARD):
            loss = loss_of(batch)
        forward = time.perf_counter()
        if recorder is not None:
            recorder.part(BACKWARD)
        with profiler.span(BACKWARD):
            loss.backward()
        seconds[FORWARD] += forward - began
        seconds[BACKWARD] += time.perf_counter() - forward
        gradients = [each.grad for each in self._parameters]
        self._put([None] * len(self._parameters))
        return loss.detach(), gradients

    def _put(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients):
            parameter.grad = gradient

    def _added(self, before: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The sums of the gradients so far, as autograd makes them, in tensors that the next microbatch does not write to."""
        copied: list[tuple[Tensor, Tensor]] = []
        added: list[tuple[Tensor, Tensor]] = []
        for place, (parameter, old, new) in enumerate(zip(self._parameters, before, gradients)):
            if new is not None:
                if self._sums[place].shape != parameter.shape:
                    self._sums[place] = torch.empty_like(parameter, requires_grad=False)
                (copied if old is None else added).append((self._sums[place], new))
        for pairs, put in ((copied, torch._foreach_copy_), (added, torch._foreach_add_)):
            if pairs:
                put([total for total, _ in pairs], [new for _, new in pairs])
        return [old if new is None else total for old, new, total in zip(before, gradients, self._sums)]

    def _kind_of(self, batch: Batch, options: tuple[object, ...]) -> _Kind | None:
        """The kind of a microbatch: all that a program is recorded for."""
        model, (tokens, targets, bounds, *_) = self._model, batch
        tensors = (tokens, targets) if bounds is None else (tokens, targets, bounds)
        if any(each.device.type != "cpu" for each in tensors) or tokens.dim() != 2 or targets.shape != tokens.shape:
            return None
        addresses = self._watch.addresses()
        if tokens.dtype != torch.int64 or targets.dtype != torch.int64 or addresses is None:
            return None
        settings = model.compute_dtype, model.recompute, model.training, model.config, runtime.settings()
        key = tokens.shape, bounds is None, options, settings, addresses
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(model)
            if len(self._kinds) > MOST_KINDS:  # batches may differ in shape for ever
                self._kinds.pop(next((each for each, found in self._kinds.items() if found.program is None), key))
        return kind


class _Kind:
    """One kind of microbatch, and its program once it is recorded."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.seen = 0
        self.num_replayed = 0
        self.reason: str | None = None
        """Why it is not replayed."""
        self.program: Program | None = None
        self.proven = False
        self._loss = torch.empty(0)
        self._gradients: list[Tensor | None] = []
        self.batch = Batch(self._loss, self._loss)

    def take(self, batch: Batch) -> bool:
        """Puts a microbatch where the program reads it; whether there is, or may be, a program for it."""
        self.seen += 1
        if self.seen == 1 or self.reason is not None:
            return False
        if self.batch.tokens.dim() != 2 and not self._make_room(batch):
            return False
        # What is wrong is told by the operations; the kernels alone would read beyond the end of a table.
        most = self._model.embedding_weight.shape[0]
        tokens, targets = batch.tokens.numpy(), batch.targets.numpy()
        predicted = targets if targets.min() >= 0 else targets[targets != IGNORE]
        if tokens.min() < 0 or tokens.max() >= most or (predicted.size and (predicted.min() < 0 or predicted.max() >= most)):
            return False
        self.batch.tokens.numpy()[...] = tokens
        self.batch.targets.numpy()[...] = targets
        return batch.cu_seqlens is None or self._take_documents(batch.cu_seqlens.numpy())

    def _take_documents(self, bounds: np.ndarray) -> bool:
        """Puts the bounds of documents in their place, filled up with empty documents, and the position of each token in its document."""
        assert self.batch.cu_seqlens is not None and self.batch.positions is not None
        (num_tokens,), (_, longest) = self.batch.positions.shape, self.batch.tokens.shape
        if bounds.dtype != np.int32 or not 2 <= bounds.size <= num_tokens + 1:
            return False
        lengths = np.diff(bounds)
        if bounds[0] != 0 or bounds[-1] != num_tokens or lengths.min() < 0 or lengths.max() > min(longest, self._model.config.max_seq_len):
            return False
        there = self.batch.cu_seqlens.numpy()
        there[: bounds.size], there[bounds.size :] = bounds, num_tokens
        self.batch.positions.numpy()[...] = np.arange(num_tokens) - np.repeat(bounds[:-1], lengths)
        return True

    def _make_room(self, batch: Batch) -> bool:
        model, tokens = self._model, batch.tokens
        precision = "fp32" if model.compute_dtype == torch.float32 else "bf16"
        if not predict(model.config, tokens.shape[0], tokens.shape[1], precision, model.recompute).program:
            self.reason = TOO_MUCH
            return False
        documents = batch.cu_seqlens is not None
        bounds = torch.empty(tokens.numel() + 1, dtype=torch.int32) if documents else None
        self.batch = Batch(
            torch.empty(tokens.shape, dtype=torch.int64),
            torch.empty(tokens.shape, dtype=torch.int64),
            bounds,
            (),
            torch.empty(tokens.numel(), dtype=torch.int64) if documents else None,
        )
        return True

    def keep(self, recorder: Recorder, loss: Tensor, gradients: list[Tensor | None]) -> None:
        """Takes what was recorded, and with which results."""
        results = [loss, *(each for each in gradients if each is not None)]
        self.program = recorder.program() if all(map(recorder.arena.holds, results)) else None
        if self.program is None:
            self._give_up(recorder.reason or "its results lie elsewhere")
        self._loss, self._gradients = loss, gradients

    def replay(self, numbers: Mapping[str, float], seconds: Seconds) -> Computed:
        """numbers: what depends on the number of targets of the whole update."""
        assert self.program is not None
        self.num_replayed += 1
        self.program.numbers.update(numbers)
        for part in (FORWARD, BACKWARD):
            began = time.perf_counter()
            with profiler.span(part):
                self.program.run(part)
            seconds[part] += time.perf_counter() - began
        return Computed(self._loss.item(), self._gradients)

    def prove(self, numbers: Mapping[str, float], expected: Computed) -> None:
        """Compares a replay with what the operations found for the same microbatch."""
        found = self.replay(numbers, {FORWARD: 0.0, BACKWARD: 0.0})
        self.num_replayed -= 1
        same = [_bits(torch.tensor(each.loss)) for each in (found, expected)]
        alike = torch.equal(*same) and all(map(_have_the_same_bits, found.gradients, expected.gradients))
        self.proven = alike and self.program is not None and self.program.holds()
        if not self.proven:
            self._give_up("it gives other bits than its operations one by one")

    def _give_up(self, reason: str) -> None:
        self.program, self.reason = None, reason


def _have_the_same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


class _Watch:
    """Notices what a program would pass over: hooks and modes that want to see operations, modules and parameters that have changed."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._parameters = [each._parameters for each in self._modules if each._parameters]
        self._children = [(each._modules, tuple(each._modules.values())) for each in self._modules]
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks = [getattr(each, kind) for each in self._modules for kind in kinds]

    def is_quiet(self) -> bool:
        """Whether nobody wants to see the operations and modules that a program leaves out."""
        return (
            os.environ.get("CLLM_STEP_PROGRAM") != "0"
            and torch.is_grad_enabled()
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._len_torch_function_stack()
            and not torch.autograd._profiler_enabled()
            and not torch.is_anomaly_enabled()
            and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
            and "loss" not in vars(self._model)
            and not any(self._hooks)
            and all(tuple(now.values()) == then for now, then in self._children)
        )

    def addresses(self) -> tuple[int, ...] | None:
        """Where each parameter lies and whether it is trained; None where somebody wants to see a gradient as it is made."""
        found = []
        for parameters in self._parameters:
            for each in parameters.values():
                if each is not None:
                    if each._backward_hooks or each._post_accumulate_grad_hooks:
                        return None
                    found.append(each.data_ptr() | each.requires_grad)
        return tuple(found)
