"""One checkpoint folder: what it holds, how it is verified and read.

    step-00001000/  model.safetensors  optimizer.safetensors     or their parts (`parts.py`)
                    state.json       what a run needs beside its tensors to go on as if it had never stopped
                    manifest.json    format version, step, size and SHA-256 of each file, dtype, shape and SHA-256 of each tensor

The manifest carries a digest of itself and is written last, so a folder with a good manifest is a complete one. Format version 1 has no
descriptions of single tensors. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cllm.checkpoint.parts import INDEX, OPTIMIZER, WEIGHTS, read_whole
from cllm.checkpoint.place import MANIFEST
from cllm.checkpoint.safetensors import describe_tensor, file_size, read_json, read_safetensors, sha256_of
from cllm.files import reason
from cllm.runtime.errors import CheckpointError

FORMAT_VERSION = 2
STATE = "state.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")  # a name in the checkpoint's own folder, never a path


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds: the step (updates done), weights and optimizer state by name, and the content of state.json."""

    path: Path
    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]


# -- writing ---------------------------------------------------------------------------------------------------------------


def complete(folder: Path, step: int, digests: Mapping[str, str], tensors: Mapping[str, Mapping[str, Any]], state: Mapping[str, Any]) -> None:
    """Adds state.json and the manifest to a folder that holds its tensors, then reads every byte back and compares.

    digests: SHA-256 of each file. tensors: descriptions of the tensors of each file. Raises CheckpointError when a byte reads back differently.
    """
    content = json.dumps({**state, "step": step}, indent=1).encode()
    (folder / STATE).write_bytes(content)
    digests = {**digests, STATE: hashlib.sha256(content).hexdigest()}
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in digests.items()}
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "files": files, "tensors": tensors}
    manifest["sha256"] = _manifest_digest(manifest)
    (folder / MANIFEST).write_bytes(json.dumps(manifest, indent=1).encode())
    verify(folder)


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# -- verifying -------------------------------------------------------------------------------------------------------------


def verify(path: str | Path) -> None:
    """Reads every byte of a checkpoint folder. Raises CheckpointError with the first file that is missing or differs, and its damaged tensors."""
    path = Path(path)
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        try:
            _verify_file(path / name, entry)
        except CheckpointError as error:
            damaged = _damaged_tensors(path / name, manifest["tensors"].get(name, {}))
            raise CheckpointError(f"{error}{damaged}") from error


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
    """Whether a manifest names plain files of its own folder and describes them. Anybody can give a manifest a matching digest."""
    files, tensors = manifest.get("files"), manifest.get("tensors")
    return (
        type(manifest.get("step")) is int
        and isinstance(files, dict)
        and all(_FILE_NAME.fullmatch(name) and isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for name, entry in files.items())
        and isinstance(tensors, dict)
        and all(isinstance(each, dict) and all(isinstance(entry, dict) for entry in each.values()) for each in tensors.values())
    )


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
    """Which tensors of a damaged file are not what the manifest says, as a sentence; empty when the file cannot be read at all."""
    try:
        tensors, _ = read_safetensors(path)
    except CheckpointError:
        return ""
    wrong = [name for name in sorted(expected.keys() | tensors.keys()) if name not in tensors or describe_tensor(tensors[name]) != expected.get(name)]
    return f" Damaged: {', '.join(wrong[:5])}{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}." if wrong else ""


# -- reading ---------------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path, with_optimizer: bool = True) -> Checkpoint:
    """A checkpoint folder in one piece or in parts, every byte that is used verified. Raises CheckpointError when one differs."""
    path = Path(path)
    manifest = read_manifest(path)
    in_parts = INDEX in manifest["files"]
    for name in tuple(manifest["files"]) if in_parts else (WEIGHTS, STATE) + ((OPTIMIZER,) if with_optimizer else ()):
        if name not in manifest["files"]:
            raise CheckpointError(f"{path} holds no {name}.")
        _verify_file(path / name, manifest["files"][name])
    state = read_state(path, manifest["step"])
    if in_parts:
        return Checkpoint(path, manifest["step"], read_whole(path, "model"), read_whole(path, "optimizer") if with_optimizer else {}, state)
    weights, _ = read_safetensors(path / WEIGHTS)
    optimizer = read_safetensors(path / OPTIMIZER)[0] if with_optimizer else {}
    return Checkpoint(path, manifest["step"], weights, optimizer, state)


def read_state(path: Path, step: int) -> dict[str, Any]:
    """The content of state.json in the checkpoint folder of `step`. Raises CheckpointError when it is damaged or of another step."""
    state = read_json(path / STATE)
    if state.get("step") != step:
        raise CheckpointError(f"{path / STATE} is damaged: it is of step {state.get('step')!r:.40}, not {step}.")
    return state
