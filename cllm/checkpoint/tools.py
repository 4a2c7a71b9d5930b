"""What `cllm checkpoint` does: inspect checkpoints, verify, compare and average them. Nothing here changes a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cllm.checkpoint.folder import STATE, Checkpoint, read_checkpoint, read_manifest, verify
from cllm.checkpoint.model_file import load
from cllm.checkpoint.parts import OPTIMIZER, WEIGHTS
from cllm.checkpoint.place import MANIFEST
from cllm.checkpoint.safetensors import describe_tensor
from cllm.checkpoint.store import CheckpointStore
from cllm.checkpoint.weights import weights_of
from cllm.runtime.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model


def checkpoints_in(path: Path) -> list[Path]:
    """The checkpoint folders that a path stands for, oldest first: all those of a run, or the one that it is. None for anything else."""
    if (path / "checkpoints").is_dir():
        store = CheckpointStore(path / "checkpoints")
        return [store.path(step) for step in store.steps()]
    return [path] if (path / MANIFEST).exists() else []


# -- inspect ---------------------------------------------------------------------------------------------------------------


def inspect(path: str | Path, report: Callable[[str], None] | None = None) -> dict[str, Any]:
    """What a run, checkpoint, .cllm file or Hugging Face folder holds, as plain values. `tensors` has dtype, shape and SHA-256 of each tensor.

    A run is represented by its newest good checkpoint. Raises CheckpointError for anything that is damaged or no model.
    """
    path = Path(path)
    folders = checkpoints_in(path)
    if not folders:
        model, tokenizer = load(path, report)
        tensors = {WEIGHTS: {name: describe_tensor(each) for name, each in weights_of(model).items()}}
        return {
            "path": str(path),
            "format_version": None,
            "step": None,
            "model": model.config.to_dict(),
            "parameters": model.config.num_parameters(),
            "tokenizer_hash": None if tokenizer is None else tokenizer.hash,
            "tensors": tensors,
        }
    found = _newest_good(path, folders, report)
    manifest, state = read_manifest(found.path), found.state
    best = state.get("best") or {}
    if not isinstance(state.get("model"), dict) or not isinstance(best, dict) or not isinstance(state.get("tokenizer_hash"), str | None):
        raise CheckpointError(f"{found.path / STATE} does not describe a checkpoint.")
    parts = {WEIGHTS: found.weights, OPTIMIZER: found.optimizer}
    return {
        "path": str(found.path), "format_version": manifest["format_version"], "step": found.step, "model": state["model"],
        "parameters": sum(each.numel() for each in found.weights.values()), "tokenizer_hash": state.get("tokenizer_hash"),
        "tokens": state.get("tokens"), "seconds": state.get("seconds"), "best": best, "saved": state.get("saved"),
        "files": {name: entry["bytes"] for name, entry in manifest["files"].items()},
        "tensors": {file: {name: describe_tensor(each) for name, each in part.items()} for file, part in parts.items()},
    }  # fmt: skip


def _newest_good(path: Path, folders: list[Path], report: Callable[[str], None] | None) -> Checkpoint:
    if folders == [path]:
        return read_checkpoint(path)
    found = CheckpointStore(folders[0].parent).newest_good(report)
    assert found is not None
    return found


# -- verify ----------------------------------------------------------------------------------------------------------------


def verify_all(path: str | Path) -> list[tuple[Path, str | None]]:
    """(checkpoint, what is wrong with it or None) for each checkpoint in `path`, oldest first. Raises CheckpointError when there is nothing."""
    path = Path(path)
    folders = checkpoints_in(path)
    results: list[tuple[Path, str | None]] = []
    for each in folders or [path]:
        try:
            if folders:
                verify(each)
            else:
                load(each)  # a single file or a Hugging Face folder: loading reads and checks every byte
        except CheckpointError as error:
            if not folders and not path.exists():
                raise
            results.append((each, str(error)))
        else:
            results.append((each, None))
    return results


# -- diff ------------------------------------------------------------------------------------------------------------------


@dataclass
class Difference:
    """How the weights and configuration of two models differ."""

    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Settings of the model that differ, with both values."""
    only_first: list[str] = field(default_factory=list)
    """Names of tensors that only the first model has."""
    only_second: list[str] = field(default_factory=list)
    """Names of tensors that only the second model has."""
    shapes: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    """Tensors of different shapes, with both shapes."""
    changed: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    """Tensors that differ, with the largest |a - b| and with ||a - b|| / ||a||, which is None where a is zero."""
    same: int = 0
    """How many tensors are equal bit by bit."""
    tokenizer: bool = False
    """Whether the tokenizers differ."""

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return not (self.config or self.only_first or self.only_second or self.shapes or self.changed or self.tokenizer)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {**self.__dict__, "identical": self.identical}


def diff(first: str | Path, second: str | Path, report: Callable[[str], None] | None = None) -> Difference:
    """Compares two models bit by bit. Raises CheckpointError when one of them cannot be read."""
    (model_a, tokenizer_a), (model_b, tokenizer_b) = load(first, report), load(second, report)
    config_a, config_b = model_a.config.to_dict(), model_b.config.to_dict()
    result = Difference(config={key: (value, config_b[key]) for key, value in config_a.items() if value != config_b[key]})
    result.tokenizer = None not in (tokenizer_a, tokenizer_b) and tokenizer_a != tokenizer_b
    a, b = weights_of(model_a), weights_of(model_b)
    result.only_first, result.only_second = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    for name in (name for name in a if name in b):
        if a[name].shape != b[name].shape:
            result.shapes[name] = list(a[name].shape), list(b[name].shape)
        elif describe_tensor(a[name]) == describe_tensor(b[name]):
            result.same += 1
        else:
            delta, norm = a[name].double() - b[name].double(), float(a[name].double().norm())
            result.changed[name] = float(delta.abs().max()), float(delta.norm()) / norm if norm else None
    return result


# -- average ---------------------------------------------------------------------------------------------------------------


def average(
    paths: Sequence[str | Path], last: int | None = None, report: Callable[[str], None] | None = None
) -> tuple[Model, Tokenizer | None, list[str]]:
    """The mean of the weights of several models (Izmailov et al. 2018, arXiv 1803.05407), summed in float64.

    paths: the models, or one run whose checkpoints are averaged, of which `last` takes only the newest ones. Returns (model, tokenizer, paths of
    what was averaged). Raises UserError for fewer than two models or for models with different configurations or tokenizers.
    """
    folders = [Path(each) for each in paths]
    if len(folders) == 1:
        folders = checkpoints_in(folders[0])[-last if last else 0 :]
    if len(folders) < 2:
        raise UserError(
            f"an average needs at least two checkpoints, got {len(folders)}. A run keeps more of them when it is trained with cllm train --keep 10."
        )
    model, tokenizer = load(folders[0], report)
    sums = {name: tensor.double() for name, tensor in weights_of(model).items()}
    for each in folders[1:]:
        other, its_tokenizer = load(each, report)
        if other.config != model.config or (None not in (tokenizer, its_tokenizer) and its_tokenizer != tokenizer):
            raise UserError(f"{each} is another model than {folders[0]}: only checkpoints of one configuration and tokenizer have an average.")
        tokenizer = tokenizer or its_tokenizer
        for name, tensor in weights_of(other).items():
            sums[name] += tensor.double()
    with torch.no_grad():
        for name, tensor in weights_of(model).items():
            tensor.copy_(sums[name] / len(folders))
    return model, tokenizer, [str(each) for each in folders]
