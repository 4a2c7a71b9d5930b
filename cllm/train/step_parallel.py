"""Training steps with the whole model in each process: the gradients are summed over the processes, and all of them make the same update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cllm.data.tokens.batch import Batch, first_tokens
from cllm.distributed.reduce import BucketedSum, add_in_place, clip_, flat_gradient, measured, norm_of, put_flat, tree_sum
from cllm.distributed.share import Share
from cllm.runtime import tree
from cllm.train.optimizers.base import GradientStatistics
from cllm.train.step import TrainStep

if TYPE_CHECKING:
    from cllm.distributed.world import World
    from cllm.model.model import Model


class DataParallelStep(TrainStep):
    """Each process runs its share of the microbatches; gradients, losses and numbers of targets are summed over all processes."""

    uses_graphs = False  # the gradients are summed between the backward and the update

    def __init__(self, model: Model, *args: Any, world: World, **options: Any) -> None:
        super().__init__(model, *args, **options)
        self.world = world
        self._sum = BucketedSum(self.optimizer.parameters.values())

    def accumulate(self, microbatches: Sequence[Batch], beat: Callable[[], None] | None = None) -> tuple[float, int]:
        num_targets = int(self.world.sums([sum(each.num_targets for each in microbatches)])[0])
        self.optimizer.zero_grad()
        if not num_targets:
            return 0.0, 0
        total = 0.0
        for number, (each, first) in enumerate(zip(microbatches, first_tokens(microbatches)), 1):
            loss = self._loss(each, num_targets, first)
            if number == len(microbatches):
                self._sum.begin()
            loss.backward()
            total += loss.item()
            if beat is not None:
                beat()
        self._sum.finish()
        return self.world.sums([total])[0], num_targets


class DeterministicStep(TrainStep):
    """Computes the gradient of each leaf (`unit` sequences) by itself and adds the leaves up in a fixed binary tree. The bits of an update then
    depend on its sequences and on `unit`, neither on the number of processes, which may be one, nor on the cut into microbatches.

    share: this process's part of an update. world: the processes, None for one that trains alone. The gradient norm is computed from the rows of
    each matrix (`row_squares`), so that it is the same where the rows are sharded.
    """

    uses_graphs = False

    def __init__(self, model: Model, *args: Any, share: Share, world: World | None, **options: Any) -> None:
        super().__init__(model, *args, **options)
        self.share, self.world = share, world

    def accumulate(self, microbatches: Sequence[Batch], beat: Callable[[], None] | None = None) -> tuple[float, int]:
        num_targets = sum(each.num_targets for each in microbatches)
        if self.world is not None:
            num_targets = int(self.world.sums([num_targets])[0])
        self.optimizer.zero_grad()
        if not num_targets:
            return 0.0, 0
        parameters = list(self.optimizer.parameters.values())
        sums, losses = tree.Binary(add_in_place), []
        for leaf, (each, first) in enumerate(zip(microbatches, first_tokens(microbatches)), self.share.run_of(self.share.rank)[0]):
            loss = self._loss(each, num_targets, first)
            loss.backward()
            losses.append(loss.item())
            sums.push(leaf, flat_gradient(parameters))
            self.optimizer.zero_grad()
            if beat is not None:
                beat()
        put_flat(parameters, tree_sum(sums, self.share, self.world))
        return sum_of_losses(losses, self.world), num_targets

    def _update(self, learning_rate: float) -> GradientStatistics:
        gradients = [each.grad for each in self.optimizer.parameters.values() if each.grad is not None]
        rows, largest, nonfinite = measured(gradients)
        norm = norm_of(rows, nonfinite)
        if not nonfinite:
            clip_(gradients, norm, self.grad_clip)
            self.optimizer.update(learning_rate, 0.0)
        return GradientStatistics(norm, largest, nonfinite)


def sum_of_losses(losses: Sequence[float], world: World | None) -> float:
    """The sum of the losses of all leaves of all processes; exact, so that their order does not matter, and NaN where one is not finite."""
    everyone = [losses] if world is None else world.gather(list(map(float.hex, losses)))
    values = [float.fromhex(each) if isinstance(each, str) else each for part in everyone for each in part]
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan
