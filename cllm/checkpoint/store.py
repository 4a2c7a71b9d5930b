"""Checkpoints that are whole or absent: safetensors and JSON, every byte under a SHA-256, nothing ever unpickled.

A checkpoint is a folder `step-00001000` of model.safetensors, optimizer.safetensors, state.json and manifest.json. It is written beside its
place, flushed to the disk, read back and compared, then renamed; the manifest is written last and is the commit mark. The manifest has the
size and SHA-256 of each file, and since format version 2 dtype, shape and SHA-256 of each tensor.
`save` and `load` handle the one-file form `.cllm`: a safetensors file whose metadata carries the configuration and the tokenizer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cllm.checkpoint.safetensors import (
    CHECKPOINT,
    DTYPES,
    NOT_A_CHECKPOINT,
    file_size,
    raw_bytes,
    read_json,
    read_safetensors,
    read_safetensors_metadata,
    sha256_of,
    tensor_digest,
    tensors_bytes,
    write_safetensors,
)
from cllm.files import MODEL, new_file, new_folder, reason, write_file
from cllm.runtime.errors import CheckpointError, CLLMError, UserError
from cllm.runtime.files import clean, remove_folder

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model

FORMAT_VERSION = 2  # of checkpoint folders. 1: no sums of single tensors
FILE_VERSION = 1  # of .cllm files
WEIGHTS, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")  # of its own folder: no path
INDEX = "index.json"  # of a checkpoint in parts (`distributed/checkpoint.py`)


# -- weights of a model ----------------------------------------------------------------------------------------------------


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model by name; of tied weights only the first name, as Hugging Face stores them; under LoRA the adapters alone."""
    from cllm.model.lora import adapter_weights, lora_of

    if lora_of(model) is not None:
        return adapter_weights(model)
    seen: set[int] = set()
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # the parameters themselves: tied ones are one object
        if id(tensor) not in seen:
            weights[name] = tensor.detach()
        seen.add(id(tensor))
    return weights


def check_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], where: Path | str) -> dict[str, torch.Tensor]:
    """The model's own weights by name; CheckpointError when names or shapes of `weights` are not the model's."""
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
    """Copies weights into the model in place; CheckpointError when names or shapes are not the model's."""
    with torch.no_grad():
        for name, tensor in check_weights(model, weights, where).items():
            tensor.copy_(weights[name])


# -- checkpoint folders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    path: Path
    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, checked against its own digest, in the present format whichever version it was written in."""
    if not (path / MANIFEST).exists():
        raise CheckpointError(f"{path} has no {MANIFEST}: it is not a checkpoint, or one that was never finished.")
    manifest = read_json(path / MANIFEST)
    version = manifest.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version!r:.40}, this CLLM reads 1 to {FORMAT_VERSION}. Use the CLLM that wrote it.")
    if manifest.get("sha256") != _manifest_digest(manifest):
        raise CheckpointError(f"{path / MANIFEST} is damaged: its own SHA-256 does not match.")
    if version == 1:
        manifest["tensors"] = {}
    if not _well_formed(manifest):
        raise CheckpointError(f"{path / MANIFEST} does not describe a checkpoint.")
    return manifest


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest, which anybody can give a matching digest, names plain files of its own folder and describes them."""
    files, tensors = manifest.get("files"), manifest.get("tensors")
    return (
        type(manifest.get("step")) is int
        and isinstance(files, dict)
        and all(_FILE_NAME.fullmatch(name) and isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for name, entry in files.items())
        and isinstance(tensors, dict)
        and all(isinstance(each, dict) and all(isinstance(entry, dict) for entry in each.values()) for each in tensors.values())
    )


def verify(path: str | Path) -> None:
    """Reads every byte of a checkpoint folder; CheckpointError naming the first file that is missing or differs, and its damaged tensors."""
    path = Path(path)
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        try:
            _verify_file(path / name, entry)
        except CheckpointError as error:
            damaged = _damaged_tensors(path / name, manifest["tensors"].get(name, {}))
            raise CheckpointError(f"{error}{damaged}") from error


def _verify_file(path: Path, entry: Mapping[str, Any]) -> None:
    size = file_size(path)
    if size != entry["bytes"]:
        raise CheckpointError(f"{path} is damaged: {size} bytes, the manifest says {entry['bytes']}.")
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}).") from error
    if digest != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's.")


def _damaged_tensors(path: Path, expected: Mapping[str, Mapping[str, Any]]) -> str:
    """Which tensors of a damaged file are not what the manifest says, as a sentence; nothing where the file cannot be read at all."""
    try:
        tensors, _ = read_safetensors(path)
    except CheckpointError:
        return ""
    wrong = [name for name in sorted(expected.keys() | tensors.keys()) if name not in tensors or describe_tensor(tensors[name]) != expected.get(name)]
    return f" Damaged: {', '.join(wrong[:5])}{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}." if wrong else ""


def describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """What the manifest says of a tensor."""
    return {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "sha256": tensor_digest(tensor)}


def read_checkpoint(path: str | Path, with_optimizer: bool = True) -> Checkpoint:
    """A checkpoint folder, verified; CheckpointError when any byte differs."""
    path = Path(path)
    manifest = read_manifest(path)
    in_parts = INDEX in manifest["files"]
    for name in tuple(manifest["files"]) if in_parts else (WEIGHTS, STATE) + ((OPTIMIZER,) if with_optimizer else ()):
        if name not in manifest["files"]:
            raise CheckpointError(f"{path} holds no {name}.")
        _verify_file(path / name, manifest["files"][name])
    state = read_state(path, manifest["step"])
    if in_parts:
        from cllm.checkpoint.shared import read_whole

        return Checkpoint(path, manifest["step"], read_whole(path, "model"), read_whole(path, "optimizer") if with_optimizer else {}, state)
    weights, _ = read_safetensors(path / WEIGHTS)
    optimizer = read_safetensors(path / OPTIMIZER)[0] if with_optimizer else {}
    return Checkpoint(path, manifest["step"], weights, optimizer, state)


def complete(folder: Path, step: int, digests: Mapping[str, str], tensors: Mapping[str, Mapping[str, Any]], state: Mapping[str, Any]) -> None:
    """Adds state.json and the manifest to the files of a new checkpoint folder (name -> SHA-256, and name -> its tensors) and verifies it all."""
    content = json.dumps({**state, "step": step}, indent=1).encode()
    (folder / STATE).write_bytes(content)
    digests = {**digests, STATE: hashlib.sha256(content).hexdigest()}
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in digests.items()}
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "files": files, "tensors": tensors}
    manifest["sha256"] = _manifest_digest(manifest)
    (folder / MANIFEST).write_bytes(json.dumps(manifest, indent=1).encode())
    verify(folder)


def read_state(path: Path, step: int) -> dict[str, Any]:
    """The state.json of the checkpoint folder of `step`."""
    state = read_json(path / STATE)
    if state.get("step") != step:
        raise CheckpointError(f"{path / STATE} is damaged: it is of step {state.get('step')!r:.40}, not {step}.")
    return state


class CheckpointStore:
    """The checkpoints of one run: `folder/step-00001000`, `folder/latest`, `folder/best`.

    Kept are the `keep` newest, the best, and with `keep_every` those of every so many steps.
    """

    def __init__(self, folder: str | Path, keep: int = 2, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = Path(folder), keep, keep_every

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, rising; whether they are whole shows only when they are read."""
        if not self.folder.is_dir():
            return []
        names = (entry.name for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())

    def save(self, step: int, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Path:
        """Writes, verifies and commits a checkpoint, then drops the oldest; CheckpointError leaves everything as it was."""
        self.clean()
        with new_folder(self.path(step), CHECKPOINT, tensors_bytes(weights) + tensors_bytes(optimizer)) as beside:
            digests = {
                WEIGHTS: write_safetensors(beside / WEIGHTS, weights, {"format": "pt"}),
                OPTIMIZER: write_safetensors(beside / OPTIMIZER, optimizer, {"format": "pt"}),
            }
            parts = {WEIGHTS: weights, OPTIMIZER: optimizer}
            tensors = {file: {name: describe_tensor(each) for name, each in part.items()} for file, part in parts.items()}
            complete(beside, step, digests, tensors, state)
        self._publish(step)
        return self.path(step)

    def _publish(self, step: int) -> None:
        """Makes the checkpoint of `step` the latest and drops those that need not be kept."""
        self._point("latest", step)
        self._prune()

    def clean(self) -> None:
        """Removes what an interrupted write left beside the checkpoints. The run's lock makes sure that nobody is still writing there."""
        clean(self.folder, alone=True)

    def mark_best(self, step: int) -> None:
        self._point("best", step)
        self._prune()

    def best(self) -> int | None:
        return self._pointed("best")

    def latest(self) -> int | None:
        return self._pointed("latest")

    def newest_good(self, report: Callable[[str], None] | None = None, with_optimizer: bool = True) -> Checkpoint | None:
        """The newest checkpoint whose every byte verifies; each damaged one passed over is reported. None when there is none at all.

        Raises CheckpointError when there are checkpoints and all are damaged: starting afresh would be a silent loss.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                return self.read(step, with_optimizer)
            except CheckpointError as error:
                problems.append(str(error))
                if report is not None:
                    report(f"{error} Falling back to the checkpoint before it.")
        if problems:
            raise CheckpointError(f"no good checkpoint in {self.folder}: {' '.join(problems)} Move the folder away to start anew.")
        return None

    def read(self, step: int, with_optimizer: bool = True) -> Checkpoint:
        return read_checkpoint(self.path(step), with_optimizer)

    def _point(self, name: str, step: int) -> None:
        write_file(self.folder / name, f"{self.path(step).name}\n".encode(), CHECKPOINT)

    def _pointed(self, name: str) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / name).read_text().strip().removeprefix("step-"))
        return None

    def _prune(self) -> None:
        steps = self.steps()
        kept = {*steps[-self.keep :], self.best(), self.latest()}
        for step in steps:
            if step not in kept and not (self.keep_every and step % self.keep_every == 0):
                with contextlib.suppress(OSError):
                    remove_folder(self.path(step))


# -- public: one file, any form --------------------------------------------------------------------------------------------


def save(model: Model, path: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes the model, its configuration and optionally its tokenizer as one .cllm file, atomically.

    Raises UserError for another suffix, CheckpointError when the disk does not take it.
    """
    path = Path(path)
    if path.suffix != ".cllm":
        raise UserError(f"save writes a .cllm file, got {str(path)!r}. For a Hugging Face folder use cllm.interop.hf.save_hf or `cllm export`.")
    weights = weights_of(model)
    metadata = {"format": "pt", "cllm_format": str(FILE_VERSION), "config": json.dumps(model.config.to_dict(), sort_keys=True)}
    if tokenizer is not None:
        metadata |= {"tokenizer": tokenizer.to_json(), "tokenizer_hash": tokenizer.hash}
        if tokenizer.settings:
            metadata["tokenizer_config"] = json.dumps(tokenizer.settings, sort_keys=True)
    metadata["sha256"] = _content_digest(weights, metadata)
    with new_file(path, MODEL, tensors_bytes(weights)) as beside:
        digest = write_safetensors(beside, weights, metadata)
        if sha256_of(beside) != digest:
            raise CheckpointError(f"{path} did not read back as it was written: the disk is failing.")


def _content_digest(weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {"sha256"}):
        digest.update(json.dumps([key, metadata[key]]).encode())
    for name in sorted(weights):
        digest.update(json.dumps([name, DTYPES[weights[name].dtype], list(weights[name].shape)]).encode())
        digest.update(raw_bytes(weights[name]))
    return digest.hexdigest()


WEIGHTS_FORMATS = ("fp32", "bf16", "int8")


def load(path: str | Path, report: Callable[[str], None] | None = None, weights: str | None = None) -> tuple[Model, Tokenizer | None]:
    """The model and tokenizer in a run folder (its newest good checkpoint), a checkpoint folder, a .cllm file or a Hugging Face folder.

    `weights`: as they are (None), or for generation "fp32", "bf16" (weights and activations), "int8" (weights; see `Model.quantize_`).
    `report` hears of damaged checkpoints that were passed over. Raises CheckpointError for anything else; nothing is ever unpickled.
    """
    if weights not in (None, *WEIGHTS_FORMATS):
        raise UserError(f"weights must be one of {', '.join(WEIGHTS_FORMATS)}, got {weights!r}.")
    model, tokenizer = _load(Path(path), report)
    if weights is not None:
        model = model.to(torch.float32 if weights == "fp32" else torch.bfloat16)
    return model.quantize_() if weights == "int8" else model, tokenizer


def _load(path: Path, report: Callable[[str], None] | None) -> tuple[Model, Tokenizer | None]:
    try:
        if path.is_file():
            return _load_file(path)
        if (path / MANIFEST).is_file():
            return _model_of(read_checkpoint(path, with_optimizer=False))
        if (path / "checkpoints").is_dir():
            checkpoint = CheckpointStore(path / "checkpoints").newest_good(report, with_optimizer=False)
            if checkpoint is None:
                raise CheckpointError(f"{path} has no checkpoint yet. Train it first: cllm train DATA --out {path}")
            return _model_of(checkpoint)
        if (path / "config.json").is_file():
            from cllm.interop.hf import load_hf

            return load_hf(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}.") from error
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. {NOT_A_CHECKPOINT}")
    raise CheckpointError(f"{path} is not a checkpoint. {NOT_A_CHECKPOINT}")


def _load_file(path: Path) -> tuple[Model, Tokenizer | None]:
    weights, metadata = read_safetensors(path)
    if "cllm_format" not in metadata or "config" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file without a CLLM configuration. {NOT_A_CHECKPOINT}")
    if metadata["cllm_format"] != str(FILE_VERSION):
        raise CheckpointError(f"{path} has format version {metadata['cllm_format']:.40}, this CLLM reads {FILE_VERSION}. Use the CLLM that wrote it.")
    if metadata.get("sha256") != _content_digest(weights, metadata):
        raise CheckpointError(f"{path} is damaged: its SHA-256 does not match. Copy it again from its source.")
    try:
        config = json.loads(metadata["config"])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds a model configuration that is not JSON ({reason(error)}).") from error
    model = _build(config, weights, path)
    return model, _tokenizer(metadata, path) if "tokenizer" in metadata else None


def _build(config: dict[str, Any], weights: Mapping[str, torch.Tensor], where: Path) -> Model:
    from cllm.config.model import ModelConfig
    from cllm.model.model import Model

    try:
        settings = ModelConfig.from_dict(config)
        if settings.num_layers > len(weights):  # before so many blocks are built
            raise CheckpointError(f"its {settings.num_layers:,} layers cannot be in {len(weights):,} tensors")
        with torch.device("meta"):  # no memory and no random numbers for weights that are read anyway
            model = Model(settings)
    except (CLLMError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{where} holds a model configuration that this CLLM cannot build: {reason(error)}") from error
    check_weights(model, weights, where)
    model.to_empty(device="cpu")
    load_weights(model, weights, where)
    return model


def _model_of(checkpoint: Checkpoint) -> tuple[Model, Tokenizer | None]:
    if checkpoint.state.get("lora"):
        return _merged(checkpoint)
    model = _build(checkpoint.state["model"], checkpoint.weights, checkpoint.path)
    # runs/NAME/checkpoints/step-N: the tokenizer belongs to the run. A checkpoint that was copied elsewhere has none.
    stored = checkpoint.path.resolve().parent.parent / "tokenizer.json"
    wanted = checkpoint.state.get("tokenizer_hash")
    if wanted is None or not stored.is_file():
        return model, None
    from cllm.data.tokens.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(stored)
    check_tokenizer(tokenizer.hash, wanted, stored)
    return model, tokenizer


def _merged(checkpoint: Checkpoint) -> tuple[Model, Tokenizer | None]:
    """The run's base with the adapters of this checkpoint added."""
    from cllm.model.lora import LoraConfig, add_lora, merge_lora

    base, lora = checkpoint.path.resolve().parent.parent / "base.cllm", LoraConfig.from_dict(checkpoint.state["lora"])
    if not base.is_file():
        raise CheckpointError(
            f"{checkpoint.path} holds LoRA adapters alone, and the weights that they belong to are missing: {base}. Keep both in one run."
        )
    if read_safetensors_metadata(base).get("sha256") != lora.base:
        raise CheckpointError(f"{base} is not the file that the adapters in {checkpoint.path} were trained on (its SHA-256 differs).")
    model, tokenizer = _load_file(base)
    load_weights(add_lora(model, lora), checkpoint.weights, checkpoint.path)
    return merge_lora(model), tokenizer


def _tokenizer(metadata: Mapping[str, str], where: Path) -> Tokenizer:
    from cllm.data.tokens.tokenizer import Tokenizer

    settings = json.loads(metadata["tokenizer_config"]) if "tokenizer_config" in metadata else None
    tokenizer = Tokenizer.from_json(metadata["tokenizer"], settings=settings)
    check_tokenizer(tokenizer.hash, metadata.get("tokenizer_hash"), where)
    return tokenizer


def check_tokenizer(found: str | None, wanted: str | None, where: Path | str) -> None:
    """Refuses weights or tokens that were made with another tokenizer: the same numbers would mean other text."""
    if wanted is not None and found != wanted:
        raise CheckpointError(
            f"{where}: this tokenizer (hash {str(found)[:12]}) is not the one that the model was trained with ({str(wanted)[:12]}). "
            "Use the tokenizer.json of the run, or train a new run."
        )
