"""Keys and values of the tokens seen so far, so that decoding computes each token once."""

from typing import Any

import torch
from torch import Tensor

from cllm import kernels
from cllm.config.model import ModelConfig
from cllm.model.ngrams import MULTIPLIERS, NONE
from cllm.runtime.errors import UserError

_REACH = len(MULTIPLIERS) - 1  # places before a token that an n-gram sees


class KVCache:
    """Preallocated keys and values of every layer for `batch` sequences of equal length, and their tokens where the model looks n-grams up.
    `length` counts the tokens held.

    Keys are stored rotated, at absolute positions from 0; a full cache cannot slide, start a new one.
    """

    def __init__(self, config: ModelConfig, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch, max_len, config.kv_heads, config.head_size)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        # Behind as many places for tokens that are not there as an n-gram reaches back.
        self.tokens = torch.full((batch, _REACH + max_len), NONE, dtype=torch.int64, device=device) if config.ngram_tables else None
        self.decoder: Any = None  # what the model prepared to decode into these tensors, and for which settings
        self.batch = batch
        self.max_len = max_len
        self.length = 0

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.keys + self.values)

    def check_room(self, batch: int, num_tokens: int) -> None:
        """Raises before any layer has been written, so that a refused call leaves the cache as it was."""
        if batch != self.batch:
            raise UserError(f"the cache was made for {self.batch} sequences, got {batch}. Make one with model.make_cache({batch}, max_len).")
        if self.length + num_tokens > self.max_len:
            raise UserError(
                f"the cache holds {self.length} of {self.max_len} tokens, {num_tokens} more do not fit. "
                "Make a longer one, or start anew with the last tokens."
            )

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, T, H_kv, D) of the newest tokens; returns all of that layer's, (B, S, H_kv, D). `advance`
        counts them afterwards."""
        end = self.length + k.shape[1]
        self.keys[layer][:, self.length : end].copy_(k)
        self.values[layer][:, self.length : end].copy_(v)
        return self.keys[layer][:, :end], self.values[layer][:, :end]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q (B, T, H, D), k and v (B, T, H_kv, D) of the newest tokens -> (B, T, H, D) over all tokens so far, the newest stored."""
        return kernels.attention(q, *self.extend(layer, k, v), causal=True, window=window)

    def before(self, tokens: Tensor, distance: int) -> Tensor:
        """Of each of the newest tokens (B, T), which are stored, the one so many places before it."""
        assert self.tokens is not None
        begin, end = _REACH + self.length, _REACH + self.length + tokens.shape[1]
        self.tokens[:, begin:end].copy_(tokens)
        return self.tokens[:, begin - distance : end - distance]

    def advance(self, num_tokens: int) -> None:
        self.length += num_tokens

    def select(self, rows: list[int]) -> None:
        """Keeps these sequences, in this order; a row may repeat (one prompt, many samples) or be dropped
        (finished)."""
        if rows == list(range(self.batch)):
            return
        index = torch.tensor(rows, device=self.keys[0].device)
        self.keys = [tensor.index_select(0, index) for tensor in self.keys]
        self.values = [tensor.index_select(0, index) for tensor in self.values]
        self.tokens = None if self.tokens is None else self.tokens.index_select(0, index)
        self.decoder = None
        self.batch = len(rows)


class DeviceCache:
    """The keys, values and tokens of a `KVCache`, the same memory, with the number of tokens held in a tensor of the device, (B,) int64.

    Nothing of a decoding step then depends on a number that the host knows, and one CUDA graph serves all steps. A full row stays at its last place.
    """

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values, self.tokens, self.max_len = cache.keys, cache.values, cache.tokens, cache.max_len
        device = cache.keys[0].device
        self._rows = torch.arange(cache.batch, device=device)
        self.lengths = torch.full((cache.batch,), cache.length, dtype=torch.int64, device=device)

    def positions(self) -> Tensor:
        """Of the newest token of each row, (B, 1) int64. Asked once a step: `attend` stores every layer's keys there."""
        self._place = self.lengths.clamp(max=self.max_len - 1)
        self._seen = self._place + 1
        return self._place.unsqueeze(1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q (B, 1, H, D), k and v (B, 1, H_kv, D) of one new token a row -> (B, 1, H, D) over all tokens so far, the new one stored."""
        self.keys[layer].index_put_((self._rows, self._place), k[:, 0])
        self.values[layer].index_put_((self._rows, self._place), v[:, 0])
        return kernels.cached_attention(q, self.keys[layer], self.values[layer], self._seen, window=window)

    def before(self, tokens: Tensor, distance: int) -> Tensor:
        """Of the newest token of each row, (B, 1), which is stored, the one so many places before it. After `positions`."""
        assert self.tokens is not None
        self.tokens.index_put_((self._rows, self._place + _REACH), tokens[:, 0])
        return self.tokens[self._rows, self._place + (_REACH - distance)].unsqueeze(1)

    def advance(self) -> None:
        self.lengths += 1
