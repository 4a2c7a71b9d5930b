"""The tensors of a checkpoint folder, in one piece or in parts, read whole or row by row.

In one piece they are `model.safetensors` and `optimizer.safetensors`. Where the state is sharded over processes, each writes the rows that it
holds, and these files take their place:

    model-00000.safetensors  optimizer-00000.safetensors      the rows of process 0, and so on
    index.json      {"model": {NAME: {"shape": [...], "parts": [{"file": ..., "row": first row, "rows": number}]}}, "optimizer": {...}}

Rows are read by slices, so any number of processes, one included, reads what any other number wrote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cllm.checkpoint.safetensors import DTYPES, describe_tensor, open_safetensors, read_json, write_safetensors
from cllm.files import reason
from cllm.runtime.errors import CheckpointError
from cllm.runtime.files import flush

WEIGHTS, OPTIMIZER, INDEX = "model.safetensors", "optimizer.safetensors", "index.json"
_WHOLE = {"model": WEIGHTS, "optimizer": OPTIMIZER}

Layout = Mapping[str, tuple[tuple[int, ...], int]]
"""Of each tensor its whole shape, and the first row (of dimension 0) that a process holds."""


# -- writing ---------------------------------------------------------------------------------------------------------------


def write_rows(
    folder: Path, rank: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], layout: Layout, shared: bool
) -> dict[str, Any]:
    """Writes the rows of one process and returns what `write_index` needs to know of them, as plain values.

    layout: of the weights; the state of the optimizer, named KIND.WEIGHT, is cut like its weight. shared: whether this process writes the
    tensors that all processes hold alike, which one of them does.
    """
    written: dict[str, Any] = {"digests": {}, "tensors": {}, "model": {}, "optimizer": {}}
    for kind, tensors in (("model", weights), ("optimizer", optimizer)):
        file = f"{kind}-{rank:05d}.safetensors"
        mine = {}
        for name, tensor in tensors.items():
            shape, row = layout.get(name if kind == "model" else name.partition(".")[2], (tuple(tensor.shape), 0))
            if tensor.numel() and (tuple(tensor.shape) != shape or shared):
                mine[name] = tensor
                rows = tensor.shape[0] if tensor.dim() else 1
                written[kind][name] = {"shape": list(shape), "part": {"file": file, "row": row, "rows": rows}}
        written["tensors"][file] = {name: describe_tensor(each) for name, each in mine.items()}
        offsets = {name: entry["part"]["row"] for name, entry in written[kind].items()}
        written["digests"][file] = write_safetensors(folder / file, mine, {"format": "pt", "rows_from": json.dumps(offsets, sort_keys=True)})
        flush(folder / file)  # by the process that wrote it: the one that renames the folder may run on another machine
    return written


def write_index(folder: Path, everyone: Sequence[dict[str, Any]]) -> tuple[dict[str, str], dict[str, Any]]:
    """Writes index.json from what each process wrote. Returns file -> SHA-256 and file -> descriptions of its tensors, for the manifest."""
    digests: dict[str, str] = {}
    tensors: dict[str, Any] = {}
    index: dict[str, Any] = {"model": {}, "optimizer": {}}
    for written in everyone:
        digests |= written["digests"]
        tensors |= written["tensors"]
        for kind, entries in index.items():
            for name, entry in written[kind].items():
                entries.setdefault(name, {"shape": entry["shape"], "parts": []})["parts"].append(entry["part"])
    content = json.dumps(index, indent=1).encode()
    (folder / INDEX).write_bytes(content)
    return {**digests, INDEX: hashlib.sha256(content).hexdigest()}, tensors


# -- reading ---------------------------------------------------------------------------------------------------------------


def read_rows(folder: Path, kind: str, into: Mapping[str, Tensor], layout: Layout) -> None:
    """Fills tensors in place with their rows of a checkpoint's "model" or "optimizer", in one piece or in parts.

    layout: of every tensor in `into`. Raises CheckpointError when names or shapes are not those of the checkpoint.
    """
    entries = _parts(folder, kind)
    if entries.keys() != into.keys():
        odd = sorted(entries.keys() ^ into.keys())
        raise CheckpointError(f"the {kind} in {folder} does not fit this run: {len(odd)} names differ, first {odd[0]}.")
    files: dict[str, Any] = {}
    for name, tensor in into.items():
        shape, first = layout[name]
        if tuple(entries[name]["shape"]) != tuple(shape):
            raise CheckpointError(f"{name} in {folder} has shape {tuple(entries[name]['shape'])}, the model needs {tuple(shape)}.")
        last = first + (tensor.shape[0] if tensor.dim() else 1)
        for part in entries[name]["parts"]:
            low, high = max(first, part["row"]), min(last, part["row"] + part["rows"])
            if low >= high:
                continue
            if part["file"] not in files:
                files[part["file"]] = open_safetensors(folder / part["file"])
            file = files[part["file"]]
            if tensor.dim():
                tensor[low - first : high - first].copy_(file.get_slice(name)[low - part["row"] : high - part["row"]])
            else:
                tensor.copy_(file.get_tensor(name))


def read_whole(folder: Path, kind: str) -> dict[str, Tensor]:
    """All tensors of the "model" or "optimizer" of a checkpoint in parts. Raises CheckpointError when index and files do not fit."""
    from safetensors import SafetensorError

    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    entries, whole = _parts(folder, kind), {}
    try:
        for name, entry in entries.items():
            with open_safetensors(folder / entry["parts"][0]["file"]) as file:
                whole[name] = torch.empty(entry["shape"], dtype=dtypes[file.get_slice(name).get_dtype()])
        read_rows(folder, kind, whole, {name: (tuple(tensor.shape), 0) for name, tensor in whole.items()})
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{folder / INDEX} does not describe the files beside it ({reason(error)}).") from error
    return whole


def _parts(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    """name -> shape and parts, as in index.json; of a checkpoint in one piece, each tensor is one part."""
    if not (folder / INDEX).exists():
        with open_safetensors(folder / _WHOLE[kind]) as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {
            name: {"shape": shape, "parts": [{"file": _WHOLE[kind], "row": 0, "rows": shape[0] if shape else 1}]} for name, shape in shapes.items()
        }
    try:
        entries = read_json(folder / INDEX)[kind]
        for name, entry in entries.items():
            rows = sorted((int(part["row"]), int(part["rows"])) for part in entry["parts"])
            ends = [0, *(row + count for row, count in rows)]
            whole = entry["shape"][0] if entry["shape"] else 1
            if [row for row, _ in rows] != ends[:-1] or ends[-1] != whole or any(Path(part["file"]).name != part["file"] for part in entry["parts"]):
                raise ValueError(f"the parts of {name} do not make up its {whole} rows")
        return entries
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged ({reason(error)}).") from error
