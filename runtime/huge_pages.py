"""Memory for what is read again and again from its first byte to its last, such as the weights of a model that generates: in pages of 2 MB.

The processor finds a page of 4 KB through tables that a stream of weights pushes out of its caches, in a virtual machine through two sets of tables.
Measured on a 2-core AMD EPYC, one row times a packed matrix: 6 % faster for bfloat16, 13 % for int8. Where Linux has no such pages to give, these
are ordinary ones.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 2 << 20  # bytes
PIECE = 16 * PAGE  # bytes that are asked for at a time; what nobody writes to takes no memory
LINE = 64


class HugePages:
    """Gives out memory that lives as long as a tensor in it."""

    def __init__(self) -> None:
        self._memory, self._used = mmap.mmap(-1, PAGE), PAGE

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor on the CPU, which begins with a line of the cache."""
        import torch

        size = tensor.numel() * tensor.element_size()
        if not size:
            return tensor.clone()
        if len(self._memory) - self._used < size:
            self._memory, self._used = mmap.mmap(-1, max(PIECE, -(-size // PAGE) * PAGE)), 0
            if hasattr(mmap, "MADV_HUGEPAGE"):
                try:
                    self._memory.madvise(mmap.MADV_HUGEPAGE)
                except OSError:  # a Linux that was built without them
                    pass
        copied = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=self._used).view(tensor.shape)
        self._used += -(-size // LINE) * LINE
        return copied.copy_(tensor)
