"""A model's weights by name: taken out of it, compared with those of a checkpoint, and copied into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from cllm.model.lora import adapter_weights, lora_of
from cllm.runtime.errors import CheckpointError


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model by name, sharing its memory.

    Tied weights appear once, under their first name, as Hugging Face stores them. Of a model with LoRA adapters these are the adapters alone.
    """
    if lora_of(model) is not None:
        return adapter_weights(model)
    seen: set[int] = set()
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # with keep_vars tied weights are one object
        if id(tensor) not in seen:
            weights[name] = tensor.detach()
        seen.add(id(tensor))
    return weights


def check_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], where: Path | str) -> dict[str, torch.Tensor]:
    """The model's own weights by name. Raises CheckpointError when the names or shapes of `weights`, read from `where`, are not the model's."""
    own = weights_of(model)
    missing, foreign = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or foreign:
        raise CheckpointError(
            f"the weights in {where} do not fit this model: {len(missing)} missing ({', '.join(missing[:3]) or '-'}), "
            f"{len(foreign)} unknown ({', '.join(foreign[:3]) or '-'})."
        )
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise CheckpointError(f"{name} in {where} has shape {tuple(weights[name].shape)}, the model needs {tuple(tensor.shape)}.")
    return own


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], where: Path | str) -> None:
    """Copies weights into the model in place. Raises CheckpointError when their names or shapes are not the model's."""
    with torch.no_grad():
        for name, tensor in check_weights(model, weights, where).items():
            tensor.copy_(weights[name])


def check_tokenizer(found: str | None, wanted: str | None, where: Path | str) -> None:
    """Refuses weights or tokens made with another tokenizer than the model's, by their hashes: the same numbers would mean other text."""
    if wanted is not None and found != wanted:
        raise CheckpointError(
            f"{where}: this tokenizer (hash {str(found)[:12]}) is not the one that the model was trained with ({str(wanted)[:12]}). "
            "Use the tokenizer.json of the run, or train a new run."
        )
