"""A context longer than a model was trained with, when it is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cllm.config.sampling import STRETCHES
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.config.model import ModelConfig
    from cllm.model.model import Model


def stretched(config: ModelConfig, max_seq_len: int, kind: str) -> ModelConfig:
    """`config` with rotary frequencies for a context of `max_seq_len` tokens, longer than its own.

    "yarn": slow pairs turn slower, fast ones as they were (Peng et al. 2023, arXiv 2309.00071). "dynamic": a larger base, as if the text had always
    been that long (bloc97 2023, NTK-aware; what Hugging Face's "dynamic" reaches at its last token; the angles are those of the whole length from
    the first token on, so that keys that are stored stay right). Raises UserError for a shorter context, learned positions, or a config that is
    stretched already.
    """
    if kind not in STRETCHES:
        raise UserError(f"stretch must be one of {', '.join(STRETCHES)}, got {kind!r}.")
    if max_seq_len <= config.max_seq_len:
        raise UserError(f"a stretched context must be longer than the {config.max_seq_len} tokens of the model, got {max_seq_len}.")
    if config.position != "rotary":
        raise UserError("this model has learned positions, which end with its context. Only rotary positions can be stretched.")
    if config.rope_scaling is not None:
        raise UserError(f"this model's positions are stretched already ({config.rope_scaling}), and cannot be stretched further.")
    factor = max_seq_len / config.max_seq_len
    if kind == "yarn":
        return replace(config, max_seq_len=max_seq_len, rope_scaling="yarn", rope_factor=factor, rope_original_len=config.max_seq_len)
    dim = config.head_size
    return replace(config, max_seq_len=max_seq_len, rope_theta=config.rope_theta * factor ** (dim / max(1, dim - 2)))


def stretch_(model: Model, max_seq_len: int, kind: str) -> None:
    """The model's own context becomes `max_seq_len` tokens (see `stretched`), for generation: its weights were not trained for it."""
    model.config = stretched(model.config, max_seq_len, kind)
    model.forget_positions()
