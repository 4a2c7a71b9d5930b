"""Keys and values of the tokens seen so far, so that decoding computes each token once."""

from typing import Any

import torch
from torch import Tensor

from cllm.runtime.errors import UserError


class KVCache:
    """Preallocated keys and values of every layer for `batch` sequences of equal length. `length` counts the tokens
    held.

    Keys are stored rotated, at absolute positions from 0; a full cache cannot slide, start a new one.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        max_len: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch, max_len, kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
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
        self.decoder = None
        self.batch = len(rows)
