"""Microbatches on their way to the GPU: copied on a stream of their own, so that those of the next step arrive while this one is computed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING

import torch

from cllm.data.tokens.batch import Batch

if TYPE_CHECKING:
    from cllm.model.model import Model

Kind = tuple[torch.Size, bool]  # the shape of a microbatch, and whether its documents are packed


def kind_of(batch: Batch) -> Kind:
    return batch.tokens.shape, batch.cu_seqlens is not None


class DeviceBatch:
    """The tensors of a microbatch at fixed addresses of the device, behind buffers of the host's pinned memory.

    `device` holds tokens and targets, (B, T) int64. With packed documents also their bounds, (B * T + 1,) int32, filled up by empty documents so
    that every batch has the same shape, and the position of each token in its document, (B * T,) int64.
    """

    def __init__(self, kind: Kind, device: torch.device) -> None:
        self.kind = kind
        shape, packed = kind
        self.host = [torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64)]
        if packed:
            self.host += [torch.empty(shape.numel() + 1, dtype=torch.int32), torch.empty(shape.numel(), dtype=torch.int64)]
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

    def empty_copy(self) -> DeviceBatch:
        """Room for another microbatch of this kind on the same device."""
        return DeviceBatch(self.kind, self.device[0].device)

    def take(self, other: DeviceBatch) -> None:
        """Copies another microbatch of the same kind from one place of the device to another."""
        for mine, theirs in zip(self.device, other.device):
            mine.copy_(theirs, non_blocking=True)


class Staging:
    """Two stores of microbatches in turn: a step reads one while the other is filled for the next step."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self._model, self._device = model, device
        self._stores: list[list[DeviceBatch]] = [[], []]
        self._turn = 0
        self.ahead: tuple[Sequence[Batch], list[DeviceBatch]] | None = None  # what is on its way, and where it arrives
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, microbatches: Sequence[Batch]) -> None:
        """Starts the copies of a step's microbatches. The store that they take was read by the step before the last, which has ended."""
        store = self._stores[self._turn]
        self._turn = 1 - self._turn
        if [each.kind for each in store] != [kind_of(each) for each in microbatches]:
            store[:] = [DeviceBatch(kind_of(each), self._device) for each in microbatches]
            if self._stream is not None:
                # The allocator hands out memory in the order of the computing stream: kernels there may still use what is new here, and the
                # next that get it must wait for copies that this stream has begun.
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
                for tensor in chain.from_iterable(there.device for there in store):
                    tensor.record_stream(self._stream)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for there, each in zip(store, microbatches):
                there.fill(each, self._model)
        self.ahead = (microbatches, store)

    def arrived(self, microbatches: Sequence[Batch]) -> list[DeviceBatch]:
        """Where these microbatches are on the device. What the computing stream does from now on comes after their copies."""
        if self.ahead is None or self.ahead[0] is not microbatches:
            self.start(microbatches)
        assert self.ahead is not None
        store, self.ahead = self.ahead[1], None
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return store
