"""Decoding on a GPU: from the newest token to the next one without the host, recorded as one CUDA graph.

A step of a small model is a few hundred kernels of microseconds each, which take the host longer to launch than the GPU to run. All that the host
does is to send one random number for each sample and to read its token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cllm.config.sampling import Sampling
from cllm.generate.continuation import Continuation
from cllm.generate.sampling import NOT_FINITE, dense_bias, sample_rows
from cllm.model.cache import DeviceCache
from cllm.runtime.cuda_graphs import Body, CudaGraphs
from cllm.runtime.errors import CLLMError

if TYPE_CHECKING:
    from cllm.model.model import Model

WORTH_A_GRAPH = 16  # steps: recording costs about as much time as a few of them


class DeviceDecoding:
    """What the model sees of each sample (equally many tokens), and the cache of it, on a GPU.

    Samples that end keep their row, whose further tokens nobody reads: all shapes stay, and so does the graph.
    """

    def __init__(self, model: Model, prompt: list[int], samples: int, max_tokens: int, sampling: Sampling, vocab_size: int) -> None:
        self._model, self._sampling, self._vocab_size = model, sampling, vocab_size
        self._windows = [list(prompt) for _ in range(samples)]
        self._rows = list(range(samples))  # of the unfinished samples
        self._max_tokens = max_tokens
        self._device = device = model.embedding_weight.device
        self._tokens = torch.zeros(samples, dtype=torch.int64, device=device)
        self._uniforms = torch.zeros(samples, dtype=torch.float64, device=device)
        self._drawn = torch.zeros(samples, dtype=torch.float64)
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros((samples, vocab_size), dtype=torch.bool, device=device)
            self._seen[:, torch.tensor(sorted(set(prompt)), device=device)] = True
        self._counts: Tensor | None = None  # how often each token was generated
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = torch.zeros((samples, vocab_size), dtype=torch.int32, device=device)
            self._ones = torch.ones((samples, 1), dtype=torch.int32, device=device)
        bias = dense_bias(sampling, vocab_size)
        self._bias = None if bias is None else bias.to(device)
        # All rows are the prompt: it is computed once.
        self._cache = model.make_cache(1, min(model.config.max_seq_len, len(prompt) + max_tokens))
        self._prefilled: Tensor | None = self._prefill(self._windows[:1]).expand(samples, -1)  # logits that the next tokens are chosen from
        self._cache.select([0] * samples)
        self._cached = DeviceCache(self._cache)
        self._step: Body | None = None

    def next_tokens(self, active: Sequence[Continuation]) -> list[int]:
        """One token for each unfinished sample. Raises CLLMError where the logits of one are not finite."""
        if self._sampling.temperature != 0:
            for row, continuation in zip(self._rows, active, strict=True):
                self._drawn[row] = torch.rand((), dtype=torch.float64, generator=continuation.generator)
            self._uniforms.copy_(self._drawn, non_blocking=True)
        if len(self._windows[0]) > self._model.config.max_seq_len:
            self._go_on_with_half_of_the_context()
        if self._prefilled is None:
            if self._step is None:
                self._step = self._recorded() if self._max_tokens > WORTH_A_GRAPH else self._decode
            self._step()
        else:
            with torch.no_grad():
                self._choose(self._prefilled)
            self._prefilled = None
        chosen = self._tokens.tolist()
        tokens: list[int] = [chosen[row] for row in self._rows]
        if min(tokens) < 0:
            raise CLLMError(NOT_FINITE)
        for window, token in zip(self._windows, chosen, strict=True):
            window.append(max(token, 0))
        return tokens

    def select(self, rows: list[int]) -> None:
        """Goes on with these of the unfinished samples."""
        self._rows = [self._rows[row] for row in rows]

    def _prefill(self, windows: list[list[int]]) -> Tensor:
        """The last tokens that each row sees, all at once into the empty cache -> logits (rows, V) of the next."""
        with torch.no_grad():
            return self._model(torch.tensor(windows, device=self._device), cache=self._cache, last_only=True)[:, 0]

    def _go_on_with_half_of_the_context(self) -> None:
        half = max(1, self._model.config.max_seq_len // 2)
        self._windows = [window[-half:] for window in self._windows]
        self._cache.length = 0
        self._prefilled = self._prefill(self._windows)
        self._cached.lengths.fill_(self._cache.length)

    @torch.no_grad()
    def _decode(self) -> None:
        self._choose(self._model.decode(self._tokens.clamp(min=0), self._cached))

    def _choose(self, logits: Tensor) -> None:
        known = logits[:, : self._vocab_size].float()
        self._tokens.copy_(sample_rows(known, self._sampling, self._uniforms, self._seen, self._counts, self._bias))
        if self._seen is not None:
            self._seen.scatter_(1, self._tokens.clamp(min=0).unsqueeze(1), True)
        if self._counts is not None:
            self._counts.scatter_add_(1, self._tokens.clamp(min=0).unsqueeze(1), self._ones)

    def _recorded(self) -> Body:
        """`_decode` as a graph. What runs before the recording changes the state, which is put back; the keys that it stores lie behind all rows'
        lengths, where they are written again before they are seen."""
        changing = [self._tokens, self._cached.lengths, *(each for each in (self._seen, self._counts) if each is not None)]
        before = [each.clone() for each in changing]
        step = CudaGraphs(self._device).capture(self._decode)
        for each, value in zip(changing, before):
            each.copy_(value)
        return step
