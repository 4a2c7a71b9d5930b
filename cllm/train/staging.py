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


def for_device(batch: Batch, model: Model, device: torch.device) -> Batch:
    """The batch as it goes to a device: packed documents with the position of each token, and with bounds that empty documents fill up to B * T + 1,
    so that every batch of a shape has the same number of them; for a GPU in pinned memory. May be called in any thread. UserError where the bounds
    do not fit the tokens or the model's context."""
    tokens, targets, bounds, documents, positions, first_row = batch.to("cpu")
    if bounds is not None and positions is None:
        positions = model.document_positions(bounds, tokens.numel())
        bounds = torch.cat((bounds, bounds.new_full((tokens.numel() + 1 - bounds.numel(),), tokens.numel())))
    ready = Batch(tokens, targets, bounds, documents, positions, first_row)
    if device.type != "cuda":
        return ready
    with torch.cuda.device(device):  # pinned memory belongs to a context, which only this GPU is to have
        return ready.map(torch.Tensor.pin_memory)


class DeviceBatch:
    """The tensors of a microbatch at fixed addresses of the device.

    `device` holds tokens and targets, (B, T) int64. With packed documents also their bounds, (B * T + 1,) int32, and the position of each token in
    its document, (B * T,) int64.
    """

    def __init__(self, kind: Kind, device: torch.device) -> None:
        self.kind = kind
        shape, packed = kind
        self.device = [torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2)]
        if packed:
            self.device.append(torch.empty(shape.numel() + 1, dtype=torch.int32, device=device))
            self.device.append(torch.empty(shape.numel(), dtype=torch.int64, device=device))

    def fill(self, batch: Batch) -> None:
        """Copies what `for_device` made to the device, without waiting for the copies to end."""
        parts = batch.tokens, batch.targets, batch.cu_seqlens, batch.positions
        for there, here in zip(self.device, (each for each in parts if each is not None), strict=True):
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
                there.fill(for_device(each, self._model, self._device))
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
