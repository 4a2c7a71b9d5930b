"""The sum of the gradients of all processes: a bucketed all-reduce for speed, or a fixed tree for the same bits with any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cllm.distributed.world import gathered
from cllm.runtime import tree

if TYPE_CHECKING:
    from cllm.distributed.share import Share
    from cllm.distributed.world import World

# The size of a bucket: large enough to use the full bandwidth, small enough to be sent while the backward still runs (Li et al. 2020, arXiv
# 2006.15704).
BUCKET_BYTES = 25 << 20
SLICE_ELEMENTS = 1 << 20  # float64 copies of a gradient are made for this many elements at a time, which bounds their memory


class BucketedSum:
    """Sums the gradients over all processes. Gradients are collected in buckets in the order in which the backward finishes them, and a bucket is
    sent as soon as it is full.

    PyTorch's DistributedDataParallel does the same around the `forward` of a module. Here the model is called as `model.loss`, gradients add up
    over microbatches of unequal weight, and a sum is needed, not a mean.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._buckets: list[list[torch.nn.Parameter]] = []
        size = BUCKET_BYTES
        for parameter in reversed(list(parameters)):
            if size >= BUCKET_BYTES:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.numel() * parameter.element_size()
        self._bucket_of = {parameter: number for number, bucket in enumerate(self._buckets) for parameter in bucket}
        self._open, self._sent = False, 0
        self._works: list[tuple[list[torch.nn.Parameter], Tensor, Any]] = []
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._ready) for parameter in self._bucket_of]

    def begin(self) -> None:
        """Before the last backward of an update: the gradients that it finishes are complete."""
        self._open, self._sent = True, 0
        self._works.clear()
        self._missing = [len(bucket) for bucket in self._buckets]

    def _ready(self, parameter: torch.nn.Parameter) -> None:
        if not self._open:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        # Buckets are sent in order even when a later one is full first: all processes must send the same bucket at the same time.
        while self._sent < len(self._buckets) and self._missing[self._sent] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[self._sent]
        flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in bucket])
        self._works.append((bucket, flat, torch.distributed.all_reduce(flat, async_op=True)))
        self._sent += 1

    def finish(self) -> None:
        """After the last backward: waits until every `.grad` is the sum over all processes."""
        while self._sent < len(self._buckets):  # buckets with parameters that took no part in the loss
            self._send()
        self._open = False
        for bucket, flat, work in self._works:
            work.wait()
            put_flat(bucket, flat)
        self._works.clear()


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def flat_gradient(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """A copy of all gradients laid end to end, (number of elements,); zeros where there is none."""
    return torch.cat([_gradient(parameter).reshape(-1) for parameter in parameters])


def put_flat(parameters: Sequence[torch.nn.Parameter], flat: Tensor) -> None:
    """Makes each `.grad` a view of its part of `flat`, which `flat_gradient` has laid out."""
    for parameter, part in zip(parameters, flat.split([parameter.numel() for parameter in parameters])):
        parameter.grad = part.view_as(parameter)


def add_in_place(left: Tensor, right: Tensor) -> Tensor:
    return left.add_(right)


def tree_sum(mine: tree.Binary, share: Share, world: World | None) -> Tensor:
    """The sum of all leaves of an update in the order of the tree, from the subtrees of flat gradients that each process holds.

    Each process sums one slice of the elements. It receives that slice of every subtree (all-to-all), and then all processes receive all sums
    (all-gather). Where the leaves divide evenly by powers of two, this sends as many bytes as an all-reduce.
    """
    if world is None or world.size == 1:
        return mine.total()
    nodes = [[(level, index) for level, index in tree.subtrees(*share.run_of(rank))] for rank in range(world.size)]
    values = [value for _, _, value in mine.nodes]
    assert [(level, index) for level, index, _ in mine.nodes] == nodes[world.rank]
    length = values[0].numel()
    width = -(-length // world.size)
    sent = values[0].new_zeros(world.size, len(values), width)
    for number, value in enumerate(values):
        padded = torch.nn.functional.pad(value, (0, width * world.size - length)).view(world.size, width)
        sent[:, number] = padded
    mine.nodes.clear()  # their memory is free for what is received
    del values, value
    counts = [len(each) * width for each in nodes]
    received = sent.new_empty(sum(counts))
    torch.distributed.all_to_all_single(received, sent.view(-1), counts, [sent[0].numel()] * world.size)
    slices = tree.Binary(add_in_place)
    for part, (level, index) in zip(received.split(width), [node for each in nodes for node in each]):
        slices.push(index, part, level)
    return gathered(slices.total(), world.size).view(-1)[:length]


def row_squares(gradient: Tensor) -> Tensor:
    """The sum of squares of each row along dimension 0, float64 (rows,) on the CPU. One half of a row is added to the other until one number is
    left, so that its bits depend on that row alone: not on its neighbours, the reductions of the device or the number of threads."""
    rows = gradient.detach().flatten(1) if gradient.dim() > 1 else gradient.detach()[:, None]
    width = 1 << max(0, rows.shape[1] - 1).bit_length()
    at_once = max(1, SLICE_ELEMENTS // width)
    found = []
    for start in range(0, rows.shape[0], at_once):
        part = torch.nn.functional.pad(rows[start : start + at_once].double().square(), (0, width - rows.shape[1]))
        while part.shape[1] > 1:
            half = part.shape[1] // 2
            part = part[:, :half] + part[:, half:]
        found.append(part[:, 0].cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def measured(gradients: Sequence[Tensor]) -> tuple[list[Tensor], float, int]:
    """(row_squares of each gradient, largest |g|, count of non-finite elements)."""
    largest = max((float(each.abs().amax()) for each in gradients if each.numel()), default=0.0)
    nonfinite = sum(int(each.numel() - torch.isfinite(each).sum()) for each in gradients)
    return [row_squares(each) for each in gradients], largest, nonfinite


def norm_of(rows: Sequence[Tensor], nonfinite: int) -> float:
    """The L2 norm of the whole gradient from the squares of all rows. The sum is exact, so that their order does not matter (Shewchuk 1997)."""
    if nonfinite:
        return math.nan
    return math.sqrt(math.fsum(value for each in rows for value in each.tolist()))


def clip_(gradients: Sequence[Tensor], norm: float, max_norm: float) -> None:
    """Scales gradients in place so that their norm is at most `max_norm` (0: no clipping), as torch.nn.utils.clip_grad_norm_ does."""
    if max_norm > 0 and max_norm < norm + 1e-6:
        for each in gradients:
            each.mul_(torch.tensor(max_norm / (norm + 1e-6), dtype=each.dtype).item())


def bytes_of(tensors: Iterable[Any]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
