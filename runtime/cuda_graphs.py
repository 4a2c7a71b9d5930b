"""CUDA graphs: what a function does on the GPU, recorded once and replayed without the host's work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

WARM_UPS = 3  # runs of a body before it is recorded: kernels compile, and libraries allocate what they keep

Body = Callable[[], None]


class Graphs(Protocol):
    """Records the bodies of one training step."""

    def capture(self, body: Body) -> Body:
        """Runs `body` WARM_UPS times, then records it. Returns what replays the record: it reads and writes the tensors that `body` did."""


class CudaGraphs:
    """All graphs of one instance share their memory: what one of them makes for itself is gone when another one runs. They may therefore be
    replayed in any order, but not at once, and only tensors that were there before a capture hold results."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, body: Body) -> Body:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    body()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: a thread that copies a checkpoint meanwhile may go on; in the usual mode what it does would break the capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                body()
        return graph.replay
