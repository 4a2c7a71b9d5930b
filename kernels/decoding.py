"""One decoded token through a whole transformer: what a layer is made of, and who can run all of them in one call.

The operations are those of this package and give their bits; a decoder saves what stands between them when a token's work is a few
milliseconds: Python, the dispatcher, the packing of weights. B sequences, E embed, D head dim, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cllm.kernels._register import backend_for
from cllm.kernels.quantized import Quantized


class Linear(NamedTuple):
    """x @ weight.T + bias. weight (N, K), any strides or int8; bias (N,) or None."""

    weight: Tensor | Quantized
    bias: Tensor | None = None

    def split(self, parts: int) -> "list[Linear]":
        """Equal parts of the outputs."""
        count = self.weight.shape[0] // parts
        cut = [(i * count, (i + 1) * count) for i in range(parts)]
        weights = (self.weight.rows(*each) if isinstance(self.weight, Quantized) else self.weight[slice(*each)] for each in cut)
        return [Linear(weight, None if self.bias is None else self.bias[slice(*each)]) for weight, each in zip(weights, cut)]


class Norm(NamedTuple):
    """LayerNorm with a bias, RMSNorm without."""

    weight: Tensor
    bias: Tensor | None = None


class Layer(NamedTuple):
    """A pre-norm block; gate None: the plain MLP; q_norm and k_norm act on each head."""

    attention_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    mlp_norm: Norm
    gate: Linear | None
    up: Linear
    down: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None


class Stack(NamedTuple):
    """All that a token passes after its embedding. rotary: cos and sin (P, D/2) float32, or None."""

    layers: Sequence[Layer]
    norm: Norm
    output: Linear
    head_dim: int
    activation: str
    eps: float
    rotary: tuple[Tensor, Tensor] | None
    window: int


Decoder = Callable[[Tensor, int], Tensor]


def make_decoder(stack: Stack, keys: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype) -> Decoder | None:
    """decoder(x (B, E), position) -> logits (B, V) of one token for each sequence, whose keys and values it stores at `position`.

    keys, values: one (B, S, H_kv, D) of `dtype` for each layer, holding the tokens before. None where no backend offers it (the batch is
    large, the device or dtype another): call the operations one by one then.
    """
    batch, num_keys = keys[0].shape[:2]
    heads = stack.layers[0].q.weight.shape[0] // stack.head_dim
    shapes = ((batch, 1, heads, stack.head_dim), (batch, num_keys, keys[0].shape[2], stack.head_dim))
    chosen = backend_for("attention", shapes, dtype, keys[0].device.type)
    if not chosen.has("decoding"):
        return None
    decoding = chosen.module("decoding")
    return decoding.Decoder(stack, keys, values, dtype) if batch <= decoding.MOST_ROWS else None
