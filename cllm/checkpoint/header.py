"""The header of a safetensors file, read without any library and without its tensors: what a file holds is known at once, also of a large one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.files import reason
from cllm.runtime.errors import CheckpointError

PLAIN, INT8 = "1", "2"  # versions of a .cllm file: the weights as they are, and the matrices as int8
SCALES = ".scales"  # ends the name of an int8 matrix's scales
_MOST_BYTES = 100_000_000  # of a header, as in the library
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Described:
    """A tensor in a file: its dtype in the format's words, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Header:
    """tensors: by name. metadata: the table of strings. Whether the bytes of the tensors are those that were written only reading them can tell."""

    tensors: dict[str, Described]
    metadata: dict[str, str]

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(each.shape) for each in self.tensors.values())


def read_header(path: Path) -> Header:
    """Raises CheckpointError for a file that is no safetensors file, or shorter or longer than its header says."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MOST_BYTES, size - 8):
                raise ValueError("it has no header")
            values = json.loads(file.read(length))
        metadata = values.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(each, str) for each in metadata.values()):
            raise ValueError("its table of strings is none")
        tensors = {name: _described(entry) for name, entry in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({reason(error)}).") from error
    ends = sum(each.num_bytes for each in tensors.values()) + 8 + length
    if ends != size:
        raise CheckpointError(f"{path} is damaged: it has {size:,} bytes, its header describes {ends:,}. Copy it again from its source.")
    return Header(tensors, metadata)


def _described(entry: dict[str, Any]) -> Described:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(each) is int and each >= 0 for each in (*shape, begin, end)) or begin > end:
        raise ValueError("it describes a tensor that cannot be")
    width = _WIDTHS.get(entry["dtype"])
    if width is not None and math.prod(shape) * width != end - begin:
        raise ValueError("a tensor's shape and bytes do not fit")
    return Described(str(entry["dtype"]), shape, end - begin)
