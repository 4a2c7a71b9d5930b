"""`save` writes a model as one .cllm file; `load` reads a model from whatever holds one.

A .cllm file is a safetensors file whose metadata carries the model's configuration, its tokenizer, and a SHA-256 of all that it holds. Version 1 has
the weights as they are, version 2 the matrices as int8 (`cllm.checkpoint.int8`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cllm.checkpoint.folder import Checkpoint, read_checkpoint
from cllm.checkpoint.header import INT8, PLAIN
from cllm.checkpoint.int8 import from_int8, to_int8
from cllm.checkpoint.place import CHECKPOINTS, NOT_A_CHECKPOINT, kind_of, place_of
from cllm.checkpoint.safetensors import (
    DTYPES,
    raw_bytes,
    read_safetensors,
    read_safetensors_metadata,
    sha256_of,
    tensors_bytes,
    write_safetensors,
)
from cllm.checkpoint.store import CheckpointStore
from cllm.checkpoint.weights import check_tokenizer, check_weights, load_weights, weights_of
from cllm.files import MODEL, new_file, reason
from cllm.runtime.errors import CheckpointError, CLLMError, UserError
from cllm.shell import command

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model

BASE = "base.cllm"  # in a run of LoRA adapters, the frozen weights that they belong to
WEIGHTS_FORMATS = ("fp32", "bf16", "int8", "int4")


def save(model: Model, path: str | Path, tokenizer: Tokenizer | None = None, *, int8: bool = False) -> None:
    """Writes the model, its configuration and, where given, its tokenizer as one .cllm file, whole or not at all.

    int8: the matrices as int8 with scales, which is not exact, instead of the weights as they are. Raises UserError for another suffix,
    CheckpointError when the disk does not take it.
    """
    path = Path(path)
    if path.suffix != ".cllm":
        raise UserError(f"save writes a .cllm file, got {str(path)!r}. For a Hugging Face folder use cllm.interop.hf.save_hf or `cllm export`.")
    weights = to_int8(weights_of(model)) if int8 else weights_of(model)
    metadata = {"format": "pt", "cllm_format": INT8 if int8 else PLAIN, "config": json.dumps(model.config.to_dict(), sort_keys=True)}
    if tokenizer is not None:
        metadata |= {"tokenizer": tokenizer.to_json(), "tokenizer_hash": tokenizer.hash}
        if tokenizer.settings:
            metadata["tokenizer_config"] = json.dumps(tokenizer.settings, sort_keys=True)
    metadata["sha256"] = _content_digest(weights, metadata)
    with new_file(path, MODEL, tensors_bytes(weights)) as beside:
        digest = write_safetensors(beside, weights, metadata)
        if sha256_of(beside) != digest:
            raise CheckpointError(f"{path} did not read back as it was written: the disk is failing.")


def load(path: str | Path, report: Callable[[str], None] | None = None, weights: str | None = None) -> tuple[Model, Tokenizer | None]:
    """The model and tokenizer in a run folder (its newest good checkpoint), a checkpoint folder, a .cllm file or a Hugging Face folder, or of
    "sample", the small model that comes with CLLM.

    weights: None for the weights as they are; for generation "fp32", "bf16" (weights and activations), "int8" or "int4" (weights; see
    `Model.quantize_`). report: told of damaged checkpoints that are passed over. Raises CheckpointError for anything else. Nothing is ever
    unpickled.
    """
    if weights not in (None, *WEIGHTS_FORMATS):
        raise UserError(f"weights must be one of {', '.join(WEIGHTS_FORMATS)}, got {weights!r}.")
    model, tokenizer = _load(place_of(path), report)
    if weights is not None:
        model = model.to(torch.float32 if weights == "fp32" else torch.bfloat16)
    return model.quantize_(int(weights[3:])) if weights in ("int8", "int4") else model, tokenizer


def load_on(path: str | Path, device: str, weights: str | None = None, report: Callable[[str], None] | None = None) -> tuple[Model, Tokenizer | None]:
    """The same on a device: "auto" (a GPU where there is one), "cpu" or "cuda". Of weights that may be as they are, a GPU gets bfloat16 where it
    multiplies that in hardware. Raises UserError for a GPU that cannot be used."""
    from cllm.runtime.device import resolve
    from cllm.runtime.gpu import multiplies_bf16

    place, _ = resolve(device)
    model, tokenizer = load(path, report, weights)
    if weights is None and place.type == "cuda" and model.compute_dtype == torch.float32 and multiplies_bf16(place):
        model.to(torch.bfloat16)  # a GPU multiplies float32 numbers one by one, without its matrix units
    model.to(place)
    return model, tokenizer


def _load(path: Path, report: Callable[[str], None] | None) -> tuple[Model, Tokenizer | None]:
    kind = kind_of(path)
    try:
        if kind == "file":
            return _load_file(path)
        if kind == "checkpoint":
            return _load_checkpoint(read_checkpoint(path, with_optimizer=False))
        if kind == "run":
            checkpoint = CheckpointStore(path / CHECKPOINTS).newest_good(report, with_optimizer=False)
            if checkpoint is None:
                raise CheckpointError(f"{path} has no checkpoint yet. Train it first: {command('train', 'DATA', '--out', path)}")
            return _load_checkpoint(checkpoint)
        from cllm.interop.hf import load_hf

        return load_hf(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}.") from error


# -- one file --------------------------------------------------------------------------------------------------------------


def _load_file(path: Path) -> tuple[Model, Tokenizer | None]:
    weights, metadata = read_safetensors(path)
    if "cllm_format" not in metadata or "config" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file without a CLLM configuration. {NOT_A_CHECKPOINT}")
    if metadata["cllm_format"] not in (PLAIN, INT8):
        version = metadata["cllm_format"]
        raise CheckpointError(f"{path} has format version {version:.40}, this CLLM reads {PLAIN} and {INT8}. Use the CLLM that wrote it.")
    if metadata.get("sha256") != _content_digest(weights, metadata):
        raise CheckpointError(f"{path} is damaged: its SHA-256 does not match. Copy it again from its source.")
    try:
        config = json.loads(metadata["config"])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds a model configuration that is not JSON ({reason(error)}).") from error
    model = _build(config, from_int8(weights, path) if metadata["cllm_format"] == INT8 else weights, path)
    return model, _tokenizer(metadata, path) if "tokenizer" in metadata else None


def _content_digest(weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {"sha256"}):
        digest.update(json.dumps([key, metadata[key]]).encode())
    for name in sorted(weights):
        digest.update(json.dumps([name, DTYPES[weights[name].dtype], list(weights[name].shape)]).encode())
        digest.update(raw_bytes(weights[name]))
    return digest.hexdigest()


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a .cllm file, without its weights. Raises CheckpointError where there is none."""
    metadata = read_safetensors_metadata(path)
    if "tokenizer" not in metadata:
        raise CheckpointError(f"{path} holds no tokenizer.")
    return _tokenizer(metadata, path)


def _tokenizer(metadata: Mapping[str, str], where: Path) -> Tokenizer:
    from cllm.data.tokens.tokenizer import Tokenizer

    settings = json.loads(metadata["tokenizer_config"]) if "tokenizer_config" in metadata else None
    tokenizer = Tokenizer.from_json(metadata["tokenizer"], settings=settings)
    check_tokenizer(tokenizer.hash, metadata.get("tokenizer_hash"), where)
    return tokenizer


# -- a checkpoint of a run -------------------------------------------------------------------------------------------------


def _load_checkpoint(checkpoint: Checkpoint) -> tuple[Model, Tokenizer | None]:
    run = checkpoint.path.resolve().parent.parent  # RUN/checkpoints/step-00001000
    if checkpoint.state.get("lora"):
        return _merged(checkpoint, run)
    model = _build(checkpoint.state["model"], checkpoint.weights, checkpoint.path)
    # The tokenizer belongs to the run. A checkpoint that was copied elsewhere has none.
    stored, wanted = run / "tokenizer.json", checkpoint.state.get("tokenizer_hash")
    if wanted is None or not stored.is_file():
        return model, None
    from cllm.data.tokens.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(stored)
    check_tokenizer(tokenizer.hash, wanted, stored)
    return model, tokenizer


def _merged(checkpoint: Checkpoint, run: Path) -> tuple[Model, Tokenizer | None]:
    """The frozen base model of a LoRA run with the adapters of a checkpoint added to its weights."""
    from cllm.config.lora import LoraConfig
    from cllm.model.lora import add_lora, merge_lora

    base, lora = run / BASE, LoraConfig.from_dict(checkpoint.state["lora"])
    if not base.is_file():
        raise CheckpointError(
            f"{checkpoint.path} holds LoRA adapters alone, and the weights that they belong to are missing: {base}. Keep both in one run."
        )
    if read_safetensors_metadata(base).get("sha256") != lora.base:
        raise CheckpointError(f"{base} is not the file that the adapters in {checkpoint.path} were trained on (its SHA-256 differs).")
    model, tokenizer = _load_file(base)
    load_weights(add_lora(model, lora), checkpoint.weights, checkpoint.path)
    return merge_lora(model), tokenizer


def _build(config: dict[str, Any], weights: Mapping[str, torch.Tensor], where: Path) -> Model:
    """A model of this configuration with these weights. Raises CheckpointError when the one cannot be built or the others do not fit."""
    from cllm.config.model import ModelConfig
    from cllm.model.model import Model

    try:
        settings = ModelConfig.from_dict(config)
        if settings.num_layers > len(weights):  # refused before so many blocks are built
            raise CheckpointError(f"its {settings.num_layers:,} layers cannot be in {len(weights):,} tensors")
        with torch.device("meta"):  # takes no memory and draws no random numbers for weights that are read anyway
            model = Model(settings)
    except (CLLMError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{where} holds a model configuration that this CLLM cannot build: {reason(error)}") from error
    check_weights(model, weights, where)
    # Not `to_empty`: there PyTorch computes in Python what is like a tensor without a place, and imports a computer algebra system for it.
    places = {name: torch.empty(each.shape, dtype=each.dtype) for name, each in model.state_dict().items()}
    model.load_state_dict(places, assign=True)
    load_weights(model, weights, where)
    return model
