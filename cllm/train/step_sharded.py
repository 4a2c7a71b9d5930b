"""The training step with weights, gradients and optimizer state sharded over the processes by PyTorch's FSDP2 (Zhao et al. 2023, arXiv
2304.11277): each process holds some rows of each matrix. In hybrid mode the processes of one node share a copy, and each node has one.

In deterministic mode, leaf k of an update is computed by process k mod n. After each backward a process receives its rows of the gradients of n
neighbouring leaves, as many bytes as in FSDP's reduce-scatter, and adds them to the binary tree in the order of the leaves. Nothing is added on the
way, and therefore any number of processes gives the bits of `DeterministicStep`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cllm.checkpoint.folder import Checkpoint
from cllm.data.tokens.batch import IGNORE, Batch, first_tokens
from cllm.distributed.reduce import add_in_place, clip_, measured, norm_of
from cllm.distributed.sharding import Sharding
from cllm.distributed.share import Share
from cllm.distributed.world import gathered
from cllm.runtime import tree
from cllm.runtime.errors import UserError
from cllm.train.optimizers.base import GradientStatistics
from cllm.train.step import TrainStep
from cllm.train.step_parallel import sum_of_losses

if TYPE_CHECKING:
    from cllm.distributed.world import World
    from cllm.model.model import Model


def shard(model: Model, mesh: Any) -> None:
    """Shards the model in place, in units whose weights are gathered together: each block, and the embedding, output matrix and final norm.

    Raises UserError where PyTorch cannot sum gradients instead of averaging them."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # A block returns views; nothing here changes them in place, which is what the warning is about.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for block in model.backbone.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    for unit in units_of(model):
        if not hasattr(unit, "set_gradient_divide_factor") or not hasattr(unit, "set_force_sum_reduction_for_comms"):
            raise UserError(f"sharding needs a newer PyTorch than {torch.__version__}. Use train.parallel=ddp, or PyTorch 2.13.")
        unit.set_gradient_divide_factor(1.0)  # a sum: the losses are divided by the number of targets of all processes already
        unit.set_force_sum_reduction_for_comms(True)  # the only reduction that gloo has


def units_of(model: Model) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class LeafExchange:
    """Replaces FSDP's reduce-scatter for one unit: exchanges the rows of single leaves and sums them in the order of the tree.

    Until the last leaves of an update are exchanged the output is zero; then it is the sum. In hybrid mode FSDP adds up the outputs of the
    copies afterwards: the first copy gives the sum, and the others give -0.0, which changes no number.
    """

    def __init__(self, world_size: int, replicate: Any) -> None:
        self._size, self._replicate = world_size, replicate
        self._leaves = tree.Binary(add_in_place)
        self._first = self._count = 0

    def begin(self, first: int, count: int, last: int) -> None:
        """Before a backward: its leaves are `count` leaves from number `first` on, of `last` leaves in the update."""
        if first == 0:
            self._leaves = tree.Binary(add_in_place)
        self._first, self._count, self._is_last = first, count, first + count == last

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        import torch.distributed as dist

        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        if self._replicate is not None:  # the ranks of a copy follow each other, so the leaves of copy after copy are in order
            received = gathered(received, self._replicate.size(), self._replicate)
        for number, rows in enumerate(received.view(self._size, -1)[: self._count]):
            self._leaves.push(self._first + number, rows.clone())
        if not self._is_last:
            output_tensor.zero_()
        elif self._replicate is not None and dist.get_rank(self._replicate):
            output_tensor.fill_(-0.0)
        else:
            output_tensor.copy_(self._leaves.total())
        if self._is_last:
            self._leaves = tree.Binary(add_in_place)


class ShardedStep(TrainStep):
    """Shards the weights of `model` as `sharding` says and trains it; the optimizer works on the rows of this process."""

    uses_graphs = False

    def __init__(self, model: Model, *args: Any, share: Share, world: World, sharding: Sharding, deterministic: bool, **options: Any) -> None:
        mesh = sharding.mesh(world.device.type)
        shard(model, mesh)
        self._sharded: dict[str, Any] = dict(
            model.named_parameters()
        )  # the sharded weights; while a unit is gathered the model shows whole weights under these names
        self._rows = {name: torch.nn.Parameter(parameter.to_local().detach()) for name, parameter in self._sharded.items()}
        super().__init__(model, *args, **options)
        self.share, self.world, self.sharding = share, world, sharding
        self._exchanges: list[LeafExchange] = []
        if deterministic:
            replicate = mesh["replicate"].get_group() if sharding.copies > 1 else None
            for unit in units_of(model):
                self._exchanges.append(LeafExchange(world.size, replicate))
                unit.set_custom_reduce_scatter(self._exchanges[-1])

    def _trained(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return self._rows.items()

    def accumulate(self, microbatches: Sequence[Batch], beat: Callable[[], None] | None = None) -> tuple[float, int]:
        """As `TrainStep.accumulate`. All processes take part in each exchange, so that each runs as many microbatches as the one that has the most;
        those that it lacks are copies without targets."""
        num_targets = int(self.world.sums([sum(each.num_targets for each in microbatches)])[0])
        self._zero_grad()
        if not num_targets:
            return 0.0, 0
        filler = Batch(microbatches[0].tokens, torch.full_like(microbatches[0].targets, IGNORE), microbatches[0].cu_seqlens)
        losses, firsts = [], first_tokens(microbatches)
        for turn in range(self.share.rounds):
            first = turn * self.share.size
            for each in self._exchanges:
                each.begin(first, min(self.share.size, self.share.num_pieces - first), self.share.num_pieces)
            if self._exchanges:
                self._zero_grad()
            real = turn < len(microbatches)
            loss = self._loss(microbatches[turn] if real else filler, num_targets, firsts[turn] if real else 0)
            loss.backward()
            if real:
                losses.append(loss.item())
            if beat is not None:
                beat()
        for name, parameter in self._sharded.items():
            if parameter.grad is not None and self._rows[name].numel():
                self._rows[name].grad = parameter.grad.to_local()
        return sum_of_losses(losses, self.world), num_targets

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad()
        for parameter in self._sharded.values():
            parameter.grad = None

    def _update(self, learning_rate: float) -> GradientStatistics:
        gradients = [each.grad for each in self._rows.values() if each.grad is not None]
        rows, largest, nonfinite = measured(gradients)
        if self.sharding.copy:
            rows, nonfinite = [], 0  # the copies hold the same: the first one counts for all
        nonfinite = int(self.world.sums([nonfinite])[0])
        norm = norm_of(self._everyones(rows), nonfinite)
        largest = self.world.largest(largest)
        if not nonfinite:
            clip_(gradients, norm, self.grad_clip)
            self.optimizer.update(learning_rate, 0.0)
        self._zero_grad()
        return GradientStatistics(norm, largest, nonfinite)

    def _everyones(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """The squares of the rows of all processes, in any order: they are summed exactly."""
        mine = torch.cat([*rows, torch.zeros(0, dtype=torch.float64)])
        counts = [int(count) for count in self.world.sums([mine.numel() if rank == self.world.rank else 0 for rank in range(self.world.size)])]
        padded = torch.nn.functional.pad(mine, (0, max(counts) - mine.numel()))
        return [part[:count] for part, count in zip(gathered(padded, self.world.size), counts)]

    # -- state ----------------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """This process's rows."""
        return {name: rows.detach() for name, rows in self._rows.items()}

    def restore(self, found: Checkpoint) -> None:
        """Reads this process's rows from a checkpoint, which may be whole or in the parts of any number of processes."""
        from cllm.checkpoint.parts import read_rows

        layout = self.sharding.layout(self._sharded)
        with torch.no_grad():
            read_rows(found.path, "model", self.weights(), layout)
            state = self.optimizer.state_dict()
            rows = {name: layout.get(name.partition(".")[2], (tuple(each.shape), 0)) for name, each in state.items()}
            read_rows(found.path, "optimizer", state, rows)
            self.load_state_dict(state)

    def whole_model(self) -> Model | None:
        """A copy with all weights on the CPU in the first process, None in the others; all of them take part."""
        from cllm.model.model import Model

        whole = Model(self.model.config) if self.world.leads else None
        own = {} if whole is None else dict(whole.named_parameters())
        for name, parameter in self._sharded.items():
            full = parameter.full_tensor()
            if whole is not None:
                own[name].data.copy_(full)
        if whole is not None:
            whole.compute_dtype = self.model.compute_dtype
        return whole
