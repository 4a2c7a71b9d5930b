"""Decoded tokens through a whole transformer (`stack.py`), where a backend runs all of it in one call.

The operations are those of this package and give their bits; a decoder saves what stands between them when a token's work is a few
milliseconds: Python, the dispatcher, the packing of weights. B sequences, N tokens, E embed, D head dim, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cllm.kernels._register import backend_for
from cllm.kernels.operations import PAGE
from cllm.kernels.stack import Decoder, PagedDecoder, Stack


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


def make_paged_decoder(
    stack: Stack, keys: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype, most_tokens: int,
    scales: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> PagedDecoder | None:  # fmt: skip
    """decoder(tokens (N,), positions (N,), slots (N,), pages (N, M), ngram_rows) -> logits (N, V), for any N up to `decoder.most_tokens`; all are
    lists. ngram_rows: for each of `stack.ngram_embeddings` the row (N,) of each token.

    keys, values: one pool (P, 128, H_kv, D) of `dtype` for each layer, contiguous, or of int8 with `scales` (see `paged_attention`). Each token is a
    row of its own: its key and value are stored at place `slots[i]` of each pool, counted in tokens (page * 128 + place in it), all N of a layer
    before any of them looks; then it sees the keys up to its position through its own row of page numbers. Tokens of one sequence may come together.
    What is prepared for a number of tokens is kept. None where no backend offers it: call the operations one by one then. A backend may take fewer
    tokens at once than `most_tokens`.
    """
    heads = stack.layers[0].q.weight.shape[0] // stack.head_dim
    stored = dtype if scales is None else torch.int8
    for pool in (*keys, *values):
        assert pool.dtype == stored and pool.shape == keys[0].shape and pool.shape[1] == PAGE and pool.is_contiguous()
    chosen = backend_for("paged_attention", ((most_tokens, heads, stack.head_dim), tuple(keys[0].shape)), dtype, keys[0].device.type)
    tables = [stack.embedding, *([] if stack.position_embedding is None else [stack.position_embedding]), *stack.ngram_embeddings]
    if not chosen.has("paged_decoding") or any(each.dtype not in (torch.float32, torch.bfloat16) for each in tables):
        return None
    of_layers: Sequence[tuple[Tensor, Tensor] | None] = scales or [None] * len(keys)
    decoder: PagedDecoder = chosen.module("paged_decoding").PagedDecoder(stack, keys, values, dtype, most_tokens, of_layers)
    return decoder
