"""Steps over pages on a GPU as CUDA graphs: a few tokens of any sequences through the whole model without the host's launches between its kernels.

Each number of tokens and of pages, rounded up to a power of two, has a graph of its own, recorded when it first comes. Tokens that are missing are
copies of the last one: they store what it stores, and nobody reads their logits.

N tokens, M pages of the longest sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from cllm.model.pages import DeviceTokens, PageBatch, PagedLayer
from cllm.runtime.cuda_graphs import Body, CudaGraphs


class DeviceSteps:
    """What `Model.step` does with a few tokens over the pages of a pool.

    compute: takes tokens (1, N), positions (N,) and what they attend through to logits (N, V). layers: those of the pool. logits: (the most tokens
    at once, V), where these are kept until the next step.
    """

    def __init__(self, compute: Callable[[Tensor, Tensor, DeviceTokens], Tensor], layers: Sequence[PagedLayer], logits: Tensor) -> None:
        self.most_tokens = len(logits)
        self._compute, self._layers, self._logits = compute, layers, logits
        self._graphs = CudaGraphs(logits.device)
        self._recorded: dict[tuple[int, int], tuple[DeviceTokens, Body]] = {}

    def __call__(self, batch: PageBatch) -> Tensor:
        """Logits (N, V) of all tokens of a batch."""
        pages, numbers = batch.numbers()
        kind = _power_of_2(batch.num_tokens), _power_of_2(len(pages[0]))
        if kind not in self._recorded:
            self._record(kind, pages, numbers)
        tokens, replay = self._recorded[kind]
        tokens.take(pages, numbers)
        replay()
        return self._logits[: batch.num_tokens].clone()  # the next step writes there

    def _record(self, kind: tuple[int, int], pages: list[list[int]], numbers: list[list[int]]) -> None:
        tokens = DeviceTokens(self._layers, *kind, len(numbers))
        tokens.take(pages, numbers)  # recording stores keys and values, where the step stores them again
        logits = self._logits[: kind[0]]

        def run() -> None:
            logits.copy_(self._compute(tokens.numbers[:1], tokens.positions(), tokens))

        self._recorded[kind] = tokens, self._graphs.capture(run)


def _power_of_2(number: int) -> int:
    """The least one that is not below it."""
    return 1 << (number - 1).bit_length()
