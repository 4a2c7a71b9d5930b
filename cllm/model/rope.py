"""Rotary positions (Su et al. 2021, arXiv 2104.09864): the angle of every pair of a head at every place, and how they stretch to longer contexts.

  linear   every frequency divided by rope_factor (Chen et al. 2023, arXiv 2306.15595)
  llama3   frequencies that turn fewer than rope_slow times within rope_original_len are divided, those above rope_fast stay, the ones between
           go over smoothly (Llama 3.1, Grattafiori et al. 2024, arXiv 2407.21783)
  yarn     the same idea with the ramp over the pairs' numbers, and attention sharpened by rope_attention_factor (Peng et al. 2023, arXiv 2309.00071)

Frequencies and angles are rounded to float32 where Hugging Face's models round them, because they were trained with those.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from cllm.config.model import ModelConfig


def rotary_tables(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, (max_seq_len, D/2) float32, in numpy, whose result does not depend on how work is split over threads; the factor that
    yarn gives to attention is in them, half of it in the queries and half in the keys."""
    angles = (np.arange(config.max_seq_len, dtype=np.float32)[:, None] * frequencies(config)).astype(np.float64)
    factor = config.rope_attention_factor or 1.0
    cos, sin = (torch.from_numpy((f(angles) * factor).astype(np.float32)).to(device) for f in (np.cos, np.sin))
    return cos, sin


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per token of each pair, (D/2,) float32."""
    plain = plain_frequencies(config)
    factor = np.float32(config.rope_factor or 1.0)
    if config.rope_scaling is None:
        return plain
    if config.rope_scaling == "linear":
        return plain / factor
    stays = _llama3_share(config, plain) if config.rope_scaling == "llama3" else _yarn_share(config)
    return plain / factor * (np.float32(1) - stays) + plain * stays


def plain_frequencies(config: ModelConfig) -> np.ndarray:
    """The same before any scaling: theta^(-2i/D)."""
    exponents = np.arange(0, config.head_size, 2, dtype=np.float32) / np.float32(config.head_size)
    return np.float32(1.0) / np.power(config.rope_theta, exponents.astype(np.float64)).astype(np.float32)


def _llama3_share(config: ModelConfig, plain: np.ndarray) -> np.ndarray:
    """How much of each frequency stays as it is, 0 to 1: by its turns within the original context."""
    assert config.rope_original_len is not None and config.rope_slow is not None and config.rope_fast is not None
    turns = np.float32(config.rope_original_len) * plain / np.float32(2 * math.pi)
    return np.clip((turns - np.float32(config.rope_slow)) / np.float32(config.rope_fast - config.rope_slow), 0, 1)


def _yarn_share(config: ModelConfig) -> np.ndarray:
    """The same for yarn: a ramp between the whole pair numbers around which a pair turns rope_fast and rope_slow times."""
    assert config.rope_original_len is not None and config.rope_slow is not None and config.rope_fast is not None
    dim, length = config.head_size, config.rope_original_len

    def pair_that_turns(times: float) -> float:
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(config.rope_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.rope_slow)), dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / np.float32(high - low if high != low else 0.001)
    return np.float32(1) - np.clip(ramp, 0, 1)
