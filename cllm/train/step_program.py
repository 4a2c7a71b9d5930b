"""The training step on a CPU as recorded programs: forward and backward of a microbatch with no Python between their kernels.

The twin of `step_graph.py`. Which microbatches are replayed, and when a program is believed, says `cllm/model/programs.py`. The optimizer works as
ever, on gradients that keep their addresses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cllm.data.tokens.batch import Batch, first_tokens
from cllm.model.programs import Kind, Programs, Results, Seconds
from cllm.runtime import profiler

if TYPE_CHECKING:
    from cllm.model.model import Model
    from cllm.runtime.workers.program import Recorder

FORWARD, BACKWARD = "forward", "backward"

LossOf = Callable[[Batch], Tensor]


class StepPrograms(Programs):
    """The programs of one model's step. parameters: those that are trained, by name."""

    def __init__(self, model: Model, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        super().__init__(model, "training steps", (FORWARD, BACKWARD), differentiated=True)
        self._trained = list(parameters.values())
        self._sums = [torch.empty(0)] * len(self._trained)  # of the gradients of several microbatches

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
        with self.taken() as taken:
            if not taken:
                return None
            kinds = [self.kind_of(each, options) if num_targets > 1 else None for each in microbatches]
            if not any(kind is not None and kind.seen and kind.reason is None for kind in kinds):
                for kind in kinds:
                    if kind is not None:
                        kind.seen += 1
                return None
            total = 0.0
            sums: list[Tensor | None] = [None] * len(self._trained)
            for batch, kind, first in zip(microbatches, kinds, first_tokens(microbatches)):
                begin(first)
                loss, gradients = self._one(batch, kind, num_targets, loss_of, seconds)
                total += loss
                sums = gradients if len(microbatches) == 1 else self._added(sums, gradients)
                self._put(sums)
                if beat is not None:
                    beat()
            return total

    def _one(self, batch: Batch, kind: Kind | None, num_targets: int, loss_of: LossOf, seconds: Seconds) -> tuple[float, list[Tensor | None]]:
        """The loss of a microbatch and the gradient of each parameter, None where it takes no part in the loss."""
        numbers = {"targets": float(num_targets), "share": 1.0 / num_targets}
        loss, *gradients = self.computed(batch, kind, numbers, lambda batch, recorder: self._run(batch, loss_of, seconds, recorder), seconds)
        assert loss is not None
        return loss.item(), gradients

    def _run(self, batch: Batch, loss_of: LossOf, seconds: Seconds, recorder: Recorder | None) -> Results:
        self._put([None] * len(self._trained))
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
        gradients = [each.grad for each in self._trained]
        self._put([None] * len(self._trained))
        return [loss.detach(), *gradients]

    def _put(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._trained, gradients):
            parameter.grad = gradient

    def _added(self, before: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The sums of the gradients so far, as autograd makes them, in tensors that the next microbatch does not write to."""
        copied: list[tuple[Tensor, Tensor]] = []
        added: list[tuple[Tensor, Tensor]] = []
        for place, (parameter, old, new) in enumerate(zip(self._trained, before, gradients)):
            if new is not None:
                if self._sums[place].shape != parameter.shape:
                    self._sums[place] = torch.empty_like(parameter, requires_grad=False)
                (copied if old is None else added).append((self._sums[place], new))
        for pairs, put in ((copied, torch._foreach_copy_), (added, torch._foreach_add_)):
            if pairs:
                put([total for total, _ in pairs], [new for _, new in pairs])
        return [old if new is None else total for old, new, total in zip(before, gradients, self._sums)]
