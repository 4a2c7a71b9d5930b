"""Memory whose addresses stay what they are, in which a recorded piece of work has all that it makes.

While the work is recorded its tensors are handed out and taken back as an allocator does, so that those whose lifetimes do not overlap share their
memory. What is replayed later uses the same addresses in the same order.
"""

import ctypes
import weakref
from bisect import insort
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LINE = 64  # bytes: where tensors begin, and vectors end


class Arena:
    """At most so many bytes; what is never touched takes none of the machine's memory."""

    def __init__(self, most_bytes: int) -> None:
        self._memory = np.empty(most_bytes + LINE, np.uint8)
        self._shift = -self._memory.ctypes.data % LINE
        self._whole = torch.from_numpy(self._memory).untyped_storage()
        self.begin, self.end = self._memory.ctypes.data + self._shift, self._memory.ctypes.data + self._shift + most_bytes
        self._free: list[tuple[int, int]] = [(0, most_bytes)]  # (offset, bytes) of what is free, in this order, with something between any two
        self.peak = 0
        """The most bytes that were in use, from the beginning on."""

    def holds(self, tensor: Tensor) -> bool:
        return self.begin <= tensor.data_ptr() < self.end

    def tensor(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """A new tensor of at least one element with arbitrary contents, whose memory is taken back with the last reference to its storage; None where
        there is no room."""
        elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride))
        size = -(-elements * dtype.itemsize // LINE) * LINE
        offset = self._take(size)
        if offset is None:
            return None
        # Storage that torch takes from a Python object lets go of it where it is freed, whoever has held it: autograd, another tensor, a variable.
        block = (ctypes.c_ubyte * size).from_buffer(self._memory.data, self._shift + offset)
        weakref.finalize(block, self._give_back, offset, size).atexit = False
        storage = torch.frombuffer(block, dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), tuple(stride))

    def twin(self, tensor: Tensor) -> Tensor:
        """A tensor at the same place, which does not keep that place from being given to others."""
        offset = (tensor.data_ptr() - self._memory.ctypes.data) // tensor.element_size()
        return torch.empty(0, dtype=tensor.dtype).set_(self._whole, offset, tensor.shape, tensor.stride())

    def _take(self, size: int) -> int | None:
        """The first place that is large enough: what was given back last at low addresses is still in the caches."""
        for number, (offset, room) in enumerate(self._free):
            if room >= size:
                if room == size:
                    del self._free[number]
                else:
                    self._free[number] = (offset + size, room - size)
                self.peak = max(self.peak, offset + size)
                return offset
        return None

    def _give_back(self, offset: int, size: int) -> None:
        insort(self._free, (offset, size))
        number = self._free.index((offset, size))
        if number + 1 < len(self._free) and offset + size == self._free[number + 1][0]:
            size += self._free.pop(number + 1)[1]
            self._free[number] = (offset, size)
        if number and sum(self._free[number - 1]) == offset:
            before, room = self._free[number - 1]
            self._free[number - 1 : number + 1] = [(before, room + size)]
