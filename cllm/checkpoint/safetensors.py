"""The safetensors format: written with a known SHA-256, and read with a clear error for every way in which a file can be wrong.

A file is the length of its header in eight bytes, the header as JSON (dtype, shape and place of each tensor, and a table of strings), and the
bytes of the tensors. The checks of a file's size and kind, and the reading of the JSON files beside it, stand here too.
"""

from __future__ import annotations

import hashlib
import json
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cllm.checkpoint.place import unreadable
from cllm.files import reason
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
_CHUNK_BYTES = 16 << 20
_LARGEST_JSON_BYTES = 64 << 20  # no manifest or state of a checkpoint comes near it


# -- tensors as bytes ------------------------------------------------------------------------------------------------------


def tensors_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """The number of bytes that the tensors take together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order. They are not copied where they already lie that way on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """What a manifest says of a tensor: dtype, shape and SHA-256."""
    return {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "sha256": tensor_digest(tensor)}


# -- writing ---------------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Writes a file and returns its SHA-256. The caller flushes it to the disk, as `cllm.files` does.

    The library's own writer orders the metadata by a random hash, and the same weights must give the same file.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    # The widest numbers come first, so that every tensor is aligned to its own element size, as the format asks.
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
        for start in range(0, len(blob), _CHUNK_BYTES):
            yield blob[start : start + _CHUNK_BYTES]


# -- reading ---------------------------------------------------------------------------------------------------------------


def open_safetensors(path: Path) -> Any:
    """The file as the library's handle, a context manager from which tensors are read one by one or by slices.

    Raises CheckpointError when it is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    file_size(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, reason(error)) from error


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of a file. Raises CheckpointError when it is not a safetensors file."""
    from safetensors import SafetensorError

    try:
        with open_safetensors(path) as file:
            # Copied out of the mapped file, which may be replaced on disk while its weights are in use.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, reason(error)) from error


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file, without its tensors. Raises CheckpointError when it is not a safetensors file."""
    with open_safetensors(path) as file:
        return dict(file.metadata() or {})


def file_size(path: Path) -> int:
    """The size of a regular file in bytes. Raises CheckpointError for anything else: opening a pipe or a device might wait for ever."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}).") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file.")
    return found.st_size


def sha256_of(path: Path) -> str:
    """SHA-256 of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError for anything else, however large or deep it is."""
    size = file_size(path)
    if size > _LARGEST_JSON_BYTES:
        raise CheckpointError(f"{path} is damaged: {size:,} bytes are too many for it.")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({reason(error)}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: an object was expected.")
    return content
