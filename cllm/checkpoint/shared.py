"""Checkpoints of several processes: the first one writes what all hold alike, or each writes its rows.

A checkpoint in parts is a folder as any other (manifest last, every byte under a SHA-256) in which these files take the place of model.safetensors
and optimizer.safetensors:

    model-00000.safetensors  optimizer-00000.safetensors      rows of process 0, and so on
    index.json      {"model": {NAME: {"shape": [...], "parts": [{"file": ..., "row": first row, "rows": number}]}}, "optimizer": {...}}

Rows are read by slices, so that any number of processes, one included, reads what any other number wrote. `cllm.load` reads both forms.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cllm.checkpoint.safetensors import CHECKPOINT, DTYPES, file_size, read_json, tensors_bytes, write_safetensors
from cllm.checkpoint.store import INDEX, OPTIMIZER, WEIGHTS, Checkpoint, CheckpointStore, complete, describe_tensor, read_state, verify
from cllm.files import new_folder, reason, reported
from cllm.runtime.errors import CheckpointError
from cllm.runtime.files import flush

if TYPE_CHECKING:
    from cllm.distributed.session import World

WHOLE = {"model": WEIGHTS, "optimizer": OPTIMIZER}
Layout = Mapping[str, tuple[tuple[int, ...], int]]


class SharedStore(CheckpointStore):
    """The run's checkpoints, written by the first process alone; all go on from the one that it finds good. The folder is on a disk that all see."""

    def __init__(self, folder: str | Path, keep: int, keep_every: int, world: World) -> None:
        super().__init__(folder, keep, keep_every)
        self.world = world
        self._inside = False

    def _by_first(self, do: Callable[[], Any]) -> Any:
        """The first process does it and all get the answer; what it calls on the way it does alone."""
        if self._inside:
            return do()
        self._inside = True
        try:
            return self.world.from_first(do)
        finally:
            self._inside = False

    def steps(self) -> list[int]:
        return self._by_first(super().steps)

    def clean(self) -> None:
        self._by_first(super().clean)

    def mark_best(self, step: int) -> None:
        mark = super().mark_best
        self._by_first(lambda: mark(step))

    def save(self, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Nobody goes on, or ends, before the checkpoint is whole."""
        write = super().save
        self._by_first(lambda: str(write(step, weights, optimizer, state)))
        return self.path(step)

    def newest_good(self, report: Callable[[str], None] | None = None, with_optimizer: bool = True) -> Checkpoint | None:
        look, found = super().newest_good, list[Checkpoint | None]()

        def find() -> int | None:
            found.append(look(report, with_optimizer))
            return None if found[0] is None else found[0].step

        step = self._by_first(find)
        return found[0] if found else None if step is None else self.read(step, with_optimizer)


class StoreOfParts(SharedStore):
    """The run's checkpoints in parts. `layout`: of each weight its whole shape and this process's first row. `writes`: whether this process
    writes its rows; False where another one holds the same."""

    def __init__(self, folder: str | Path, keep: int, keep_every: int, world: World, layout: Layout, writes: bool) -> None:
        super().__init__(folder, keep, keep_every, world)
        self.layout, self.writes = layout, writes

    def read(self, step: int, with_optimizer: bool = True) -> Checkpoint:
        """The state alone, every byte verified by the first process; `read_rows` then takes each process's rows from the files."""
        path = self.path(step)
        if self.world.leads:
            verify(path)
        return Checkpoint(path, step, {}, {}, read_state(path, step))

    def save(self, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        self.clean()
        num_bytes = tensors_bytes(weights) + tensors_bytes(optimizer)
        with ExitStack() as folder:  # the first process's: it makes the folder, and renames it or takes it away
            make = new_folder(self.path(step), CHECKPOINT, num_bytes)
            beside = self.folder / self._by_first(lambda: folder.enter_context(make).name)
            with reported(self.path(step), CHECKPOINT, num_bytes):
                everyone = self.world.gather(self._write(beside, weights, optimizer))
            self._by_first(lambda: self._gather(step, beside, everyone, state))
            self._by_first(folder.close)
        self._by_first(lambda: self._publish(step))
        return self.path(step)

    def _write(self, beside: Path, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> dict[str, Any]:
        """Writes this process's rows; what the index has to say of them."""
        written: dict[str, Any] = {"digests": {}, "tensors": {}, "model": {}, "optimizer": {}}
        for kind, tensors in (("model", weights), ("optimizer", optimizer)) if self.writes else ():
            file = f"{kind}-{self.world.rank:05d}.safetensors"
            mine = {}
            for name, tensor in tensors.items():
                shape, row = self.layout.get(name if kind == "model" else name.partition(".")[2], (tuple(tensor.shape), 0))
                if tensor.numel() and (tuple(tensor.shape) != shape or self.world.leads):  # what all hold alike is written once
                    mine[name] = tensor
                    rows = tensor.shape[0] if tensor.dim() else 1
                    written[kind][name] = {"shape": list(shape), "part": {"file": file, "row": row, "rows": rows}}
            written["tensors"][file] = {name: describe_tensor(each) for name, each in mine.items()}
            offsets = {name: entry["part"]["row"] for name, entry in written[kind].items()}
            written["digests"][file] = write_safetensors(beside / file, mine, {"format": "pt", "rows_from": json.dumps(offsets, sort_keys=True)})
            flush(beside / file)  # here: the first process may be another machine
        return written

    def _gather(self, step: int, beside: Path, everyone: list[dict[str, Any]], state: Mapping[str, Any]) -> None:
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
        (beside / INDEX).write_bytes(content)
        digests[INDEX] = hashlib.sha256(content).hexdigest()
        complete(beside, step, digests, tensors, state)


# -- reading ---------------------------------------------------------------------------------------------------------------


def _parts(path: Path, kind: str) -> dict[str, dict[str, Any]]:
    """name -> shape and parts, of a checkpoint in parts or in one piece."""
    if not (path / INDEX).exists():
        with _opened(path / WHOLE[kind]) as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {
            name: {"shape": shape, "parts": [{"file": WHOLE[kind], "row": 0, "rows": shape[0] if shape else 1}]} for name, shape in shapes.items()
        }
    try:
        entries = read_json(path / INDEX)[kind]
        for name, entry in entries.items():
            rows = sorted((int(part["row"]), int(part["rows"])) for part in entry["parts"])
            ends = [0, *(row + count for row, count in rows)]
            whole = entry["shape"][0] if entry["shape"] else 1
            if [row for row, _ in rows] != ends[:-1] or ends[-1] != whole or any(Path(part["file"]).name != part["file"] for part in entry["parts"]):
                raise ValueError(f"the parts of {name} do not make up its {whole} rows")
        return entries
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path / INDEX} is damaged ({reason(error)}).") from error


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    file_size(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({reason(error)}).") from error


def read_rows(path: Path, kind: str, into: Mapping[str, Tensor], layout: Layout) -> None:
    """Fills tensors with their rows of a checkpoint ("model" or "optimizer"); CheckpointError when names or shapes are not the same."""
    entries = _parts(path, kind)
    if entries.keys() != into.keys():
        odd = sorted(entries.keys() ^ into.keys())
        raise CheckpointError(f"the {kind} in {path} does not fit this run: {len(odd)} names differ, first {odd[0]}.")
    files: dict[str, Any] = {}
    for name, tensor in into.items():
        shape, first = layout[name]
        if tuple(entries[name]["shape"]) != tuple(shape):
            raise CheckpointError(f"{name} in {path} has shape {tuple(entries[name]['shape'])}, the model needs {tuple(shape)}.")
        last = first + (tensor.shape[0] if tensor.dim() else 1)
        for part in entries[name]["parts"]:
            low, high = max(first, part["row"]), min(last, part["row"] + part["rows"])
            if low >= high:
                continue
            if part["file"] not in files:
                files[part["file"]] = _opened(path / part["file"])
            file = files[part["file"]]
            if tensor.dim():
                tensor[low - first : high - first].copy_(file.get_slice(name)[low - part["row"] : high - part["row"]])
            else:
                tensor.copy_(file.get_tensor(name))


def read_whole(path: Path, kind: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint in parts."""
    from safetensors import SafetensorError

    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    entries, whole = _parts(path, kind), {}
    try:
        for name, entry in entries.items():
            with _opened(path / entry["parts"][0]["file"]) as file:
                whole[name] = torch.empty(entry["shape"], dtype=dtypes[file.get_slice(name).get_dtype()])
        read_rows(path, kind, whole, {name: (tuple(tensor.shape), 0) for name, tensor in whole.items()})
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path / INDEX} does not describe the files beside it ({reason(error)}).") from error
    return whole
