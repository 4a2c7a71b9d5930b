"""Dropout in training: which elements of the activations are zeroed (Srivastava et al. 2014, JMLR 15). It is part of the operations that it belongs
to, `attention_dropout` and `norm_dropout`, whose backward draws again what their forward drew."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.runtime.errors import UserError


@dataclass(frozen=True)
class Dropout:
    """The rate, and what all draws of a microbatch have in common. The mask of an element follows from these, its place in the network, its token and
    its number, and from nothing else (`philox.py`)."""

    rate: float
    """Within (0, 1): the share of elements that are zeroed. The others are multiplied by 1 / (1 - rate)."""
    key: Tensor
    """int64 (3,), where the activations are: the seed, the number of the step, and the number of the first token of the microbatch. A CUDA graph
    and a recorded program read it from there at every replay."""

    @classmethod
    def of(cls, rate: float, seed: int, device: torch.device | str = "cpu") -> "Dropout":
        """For step 0 and the tokens from 0 on. Raises UserError for a rate that is not within (0, 1)."""
        if not 0 < rate < 1:
            raise UserError(f"dropout must be within (0, 1), got {rate!r}. Use None for no dropout.")
        seed &= 2**64 - 1
        return cls(float(rate), torch.tensor([seed - 2**64 if seed >= 2**63 else seed, 0, 0], dtype=torch.int64, device=device))

    def go_to(self, step: int, token: int) -> None:
        """To a microbatch of a step; its first token is number `token` of the run. Nothing waits for the device."""
        self.key[1].fill_(step)
        self.key[2].fill_(token)


def check_key(op: str, dropout: Dropout, device: torch.device) -> None:
    if dropout.key.dtype != torch.int64 or dropout.key.shape != (3,) or dropout.key.device != device:
        raise UserError(
            f"{op}: the key of dropout must be int64 (3,) on {device}, got {dropout.key.dtype} {tuple(dropout.key.shape)} on {dropout.key.device}."
        )
