"""One decoded token through a whole transformer (`stack.py`), where a backend runs all of it in one call.

The operations are those of this package and give their bits; a decoder saves what stands between them when a token's work is a few
milliseconds: Python, the dispatcher, the packing of weights. B sequences, E embed, D head dim, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cllm.kernels._register import backend_for
from cllm.kernels.stack import Decoder, Stack


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
