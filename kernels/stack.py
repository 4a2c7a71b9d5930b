"""What one decoded token passes through: the layers of a transformer as plain tensors, for a backend that runs all of them in one call.

B sequences, E embed, D head dim, N outputs, K inputs, P positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from cllm.kernels.quantization import Quantized, Quantized4
from cllm.kernels.strips import Strips

NGRAM_SHARE = 0.25
"""What is added of an embedding of n-grams: under Adam a row that is seen once moves as far as one that is seen often, and most n-grams are rare. A
power of two, so that nothing is rounded by it."""

Packed = Strips | Quantized | Quantized4  # a matrix (N, K) packed for inference
Weight = Tensor | Packed


class Linear(NamedTuple):
    """x @ weight.T + bias. weight (N, K), a tensor of any strides or packed; bias (N,) or None."""

    weight: Weight
    bias: Tensor | None = None

    def split(self, parts: int) -> "list[Linear]":
        """Equal parts of the outputs."""
        count = self.weight.shape[0] // parts
        cut = [(i * count, (i + 1) * count) for i in range(parts)]
        weights = (self.weight[slice(*each)] if isinstance(self.weight, Tensor) else self.weight.rows(*each) for each in cut)
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
    """All that a token passes. rotary: cos and sin (P, D/2) float32, or None. embedding: (V, E), and what is added to it: position_embedding (P, E)
    or None, then NGRAM_SHARE of ngram_embeddings, tables (R, E) whose rows the caller knows. A `Decoder` is given what comes after them."""

    layers: Sequence[Layer]
    norm: Norm
    output: Linear
    head_dim: int
    activation: str
    eps: float
    rotary: tuple[Tensor, Tensor] | None
    window: int
    embedding: Tensor
    position_embedding: Tensor | None
    ngram_embeddings: Sequence[Tensor] = ()


Decoder = Callable[[Tensor, int], Tensor]


class PagedDecoder(Protocol):
    """See `make_paged_decoder` of decoding.py."""

    most_tokens: int

    def __call__(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], pages: Sequence[Sequence[int]],
        ngram_rows: Sequence[Sequence[int]] = (),
    ) -> Tensor: ...  # fmt: skip
