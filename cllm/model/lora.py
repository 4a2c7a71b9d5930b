"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen matrix W trains as W + alpha / rank * B A, with B and A of a small rank.

    add_lora(model, LoraConfig(rank=8))       # only the adapters train and are saved from here on
    merge_lora(model)                         # an ordinary model again

B starts at zero, so that training starts from the model as it was. The sum is made anew in each forward pass, so that every kernel sees one
plain matrix: what is saved is the optimizer's state and the size of checkpoints, not the arithmetic of the backward pass.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cllm import kernels
from cllm.config.lora import LoraConfig
from cllm.model.layers import Conv1D, Weights
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.model.model import Model

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "attn.c_attn", "attn.c_proj")


class Adapter(nn.Module):
    """What is added to one matrix: lora_A (rank, in), lora_B (out, rank)."""

    def __init__(self, name: str, module: Weights, config: LoraConfig, seed: int) -> None:
        super().__init__()
        outputs, inputs = module.outputs_first().shape
        if config.rank > min(outputs, inputs):
            raise UserError(f"lora_rank must be at most {min(outputs, inputs)}, the smaller side of {name}, got {config.rank}.")
        self.scale, self.transposed = config.scale, isinstance(module, Conv1D)
        digest = hashlib.sha256(f"{seed}:{name}.lora_A".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        bound = 1 / math.sqrt(inputs)  # Kaiming's with a = sqrt(5), as in the paper's own code
        drawn = torch.empty(config.rank, inputs).uniform_(-bound, bound, generator=generator)
        place = module.weight.device
        self.lora_A = nn.Parameter(drawn.to(place))
        self.lora_B = nn.Parameter(torch.zeros(outputs, config.rank, device=place))

    def forward(self, weight: Tensor) -> Tensor:
        change = self.scale * kernels.matmul(self.lora_B, self.lora_A)
        return weight + (change.T if self.transposed else change)


def add_lora(model: Model, config: LoraConfig, seed: int = 0) -> Model:
    """Freezes the model and gives its matrices adapters, which alone train and alone are what `checkpoint.weights_of` finds."""
    if lora_of(model) is not None:
        raise UserError("this model has LoRA adapters already. Merge them first.")
    model.requires_grad_(False)
    for name, module in list(model.backbone.named_modules()):
        if isinstance(module, Weights) and module.weight.dim() == 2 and (".layers." in f".{name}" or ".h." in f".{name}"):
            if config.targets == "all" or name.endswith(_ATTENTION):
                parametrize.register_parametrization(module, "weight", Adapter(name, module, config, seed))
    model.lora = config
    return model


def lora_of(model: nn.Module) -> LoraConfig | None:
    """The configuration of a model's adapters; None where it has none."""
    found = getattr(model, "lora", None)
    return found if isinstance(found, LoraConfig) else None


def lora_state(model: nn.Module) -> dict[str, Any] | None:
    """The same as plain values, for a checkpoint's state."""
    config = lora_of(model)
    return None if config is None else config.to_dict()


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The adapters named as in Hugging Face's PEFT without its prefix: `layers.0.self_attn.q_proj.lora_A.weight` after the backbone's name."""
    return {
        f"{name}.{part}.weight": getattr(adapter, part).detach() for name, _, adapter in _adapted(model) for part in ("lora_A", "lora_B")
    }  # fmt: skip


def merge_lora(model: Model) -> Model:
    """Adds the adapters to the matrices, in place; the model is an ordinary one after that. Without adapters nothing happens."""
    for _, module, _ in list(_adapted(model)):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    model.lora = None
    model.requires_grad_(True)
    return model


def _adapted(model: nn.Module) -> Iterator[tuple[str, Weights, Adapter]]:
    for name, module in model.named_modules():
        if isinstance(module, Weights) and parametrize.is_parametrized(module, "weight"):
            adapter = module.get_submodule("parametrizations.weight.0")
            assert isinstance(adapter, Adapter)
            yield name, module, adapter
