"""A model's matrices as int8 in a file, at 8.5 bits a number: half of what bfloat16 takes.

A matrix NAME (N, K) becomes NAME.int8, the integers q (N, K), and NAME.scales, a float32 s for every SCALE_BLOCK elements of a row: w = q * s. These
are the numbers that generation with int8 weights computes with (`cllm.kernels.quantization`). Everything else stays as it is.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from cllm.checkpoint.header import SCALES
from cllm.kernels.quantization import SCALE_BLOCK, quantize
from cllm.kernels.strips import by_rows
from cllm.runtime.errors import CheckpointError

_VALUES = ".int8"


def to_int8(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as they stand in a file. Raises UserError for matrices that are not finite."""
    stored: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if weight.dim() != 2:
            stored[name] = weight
            continue
        rows, depth = weight.shape
        packed = quantize(weight)
        stored[name + _VALUES] = by_rows(packed.values.permute(0, 3, 1, 2, 4))[:rows, :depth].contiguous()
        stored[name + SCALES] = by_rows(packed.scales.transpose(1, 2))[:rows].contiguous()
    return stored


def from_int8(stored: Mapping[str, torch.Tensor], where: Path | str) -> dict[str, torch.Tensor]:
    """The weights in float32. Raises CheckpointError where integers and scales do not belong together."""
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(_VALUES):
            matrix = name.removesuffix(_VALUES)
            scales = stored.get(matrix + SCALES)
            wanted = (tensor.shape[0], -(-tensor.shape[1] // SCALE_BLOCK)) if tensor.dim() == 2 else None
            if scales is None or tensor.dtype != torch.int8 or scales.dtype != torch.float32 or tuple(scales.shape) != wanted:
                raise CheckpointError(f"{where} is damaged: the int8 numbers of {matrix} have no scales that fit. Copy it again from its source.")
            weights[matrix] = tensor.float() * scales.repeat_interleave(SCALE_BLOCK, dim=1)[:, : tensor.shape[1]]
        elif name.removesuffix(SCALES) + _VALUES not in stored:
            weights[name] = tensor
    return weights
