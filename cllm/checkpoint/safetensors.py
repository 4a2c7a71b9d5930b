"""The safetensors format: written with a known SHA-256, read with every failure named, and what the files beside it (JSON) need for that."""

from __future__ import annotations

import hashlib
import json
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cllm.files import Wording, reason
from cllm.runtime.errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 16 << 20
_LARGEST_JSON = 64 << 20  # bytes: a manifest or state of more is no work of ours
CHECKPOINT = Wording(CheckpointError, "another folder with --out, then run the same command to go on", "Earlier checkpoints are untouched.")
NOT_A_CHECKPOINT = "Expected a run folder, a checkpoint folder, a .cllm file or a Hugging Face folder."


def tensors_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it already lies so on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Writes one safetensors file and returns its SHA-256. It is on the disk only once it is flushed, as `cllm.files` does.

    Ours, because the library's writer orders metadata by a random hash: the same weights must give the same file.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    # Widest numbers first keeps every tensor aligned to its own size, as the format asks.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in names:
        size = tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in _pieces(struct.pack("<Q", len(head)) + head, (raw_bytes(tensors[name]) for name in names)):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def _pieces(head: bytes, blobs: Iterator[memoryview]) -> Iterator[bytes | memoryview]:
    yield head
    for blob in blobs:
        for start in range(0, len(blob), _CHUNK):
            yield blob[start : start + _CHUNK]


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def file_size(path: Path) -> int:
    """The size of a regular file; CheckpointError for anything else: opening a pipe or a device might wait for ever."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}).") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file.")
    return found.st_size


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError for anything else, however large or deep."""
    size = file_size(path)
    if size > _LARGEST_JSON:
        raise CheckpointError(f"{path} is damaged: {size:,} bytes are too many for it.")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({reason(error)}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: an object was expected.")
    return content


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file; CheckpointError when it is not one."""
    from safetensors import SafetensorError, safe_open

    file_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            # Copied out of the mapping: a checkpoint may be replaced on disk while its weights are in use.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({reason(error)}). {NOT_A_CHECKPOINT}") from error


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors; CheckpointError when it is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({reason(error)}). {NOT_A_CHECKPOINT}") from error


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
