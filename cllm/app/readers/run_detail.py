"""One run in all detail: its settings, machine, checkpoints, data and ancestry; its samples, faults, rounds, and how its work is spread."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from cllm.app.readers.inside import check_files, problem, read_object, tree_bytes
from cllm.app.readers.rows import RunRows
from cllm.app.readers.threads import busy
from cllm.checkpoint.place import CHECKPOINTS, MANIFEST, named_step, step_folder, steps_in
from cllm.monitor.guards import trained_by
from cllm.monitor.records import FaultRow, MachineRow, TrainRow
from cllm.monitor.rounds import MODEL, ROWS, read_rounds
from cllm.report.reading import RunData, read_run
from cllm.runtime import tree
from cllm.runtime.errors import CLLMError

_FILES = ("metrics.jsonl", "config.toml", "environment.jsonl", "samples.txt", "follow.json", ROWS)
_MOST_CHECKPOINTS = 1_000
_MOST_SAMPLES, _MOST_EVENTS = 200, 500
_LEAST_LEAVES = 1


def check_run(run: Path, root: Path) -> None:
    """Raises Refused (400) where one of the files that are read of a run leads out of the workspace, or is none."""
    check_files(run, root, *_FILES)
    folder = run / CHECKPOINTS
    if os.path.lexists(folder):
        names = [f"{CHECKPOINTS}/{each}" for each in ("latest", "best")]
        states = [f"{CHECKPOINTS}/{step_folder(folder, step).name}/{name}" for step in steps_in(folder) for name in ("state.json", MANIFEST)]
        check_files(run, root, *names, *states)


def detail(run: Path, root: Path, rows: RunRows) -> dict[str, Any]:
    """What a page shows of a run beside its curves. rows: of its metrics.jsonl. Raises UserError where there is no run."""
    if _is_in_rounds(run):
        return _of_rounds(run, root)
    data = read_run(run, with_metrics=False)
    stored = data.state.get("data")
    sources = {each.key: each.source for each in data.settings if each.source}
    environment = data.environments[-1].to_dict() if data.environments else {}
    environment.pop("sources", None)
    start = data.setting("finetune.start_from")
    return {
        "settings": _sections(data),
        "sources": sources,
        "environment": environment,
        "starts": len(data.environments),
        "checkpoints": checkpoints(run, root, rows),
        "data": {"path": _shown(data.setting("data.path"), root), **_tokens(stored)},
        "parent": _shown(start, root) if isinstance(start, str) and start else None,
        "lora": isinstance(data.state.get("lora"), dict),
        "model": data.state.get("model") if isinstance(data.state.get("model"), dict) else None,
        "final": rows.final.to_dict() if rows.final else None,
        "problems": [*data.problems, *rows.problems],
    }


def _is_in_rounds(run: Path) -> bool:
    return (run / ROWS).exists() or (run / "follow.json").exists()


def _of_rounds(run: Path, root: Path) -> dict[str, Any]:
    """A training in rounds has the settings of its newest round, and no checkpoints of its own."""
    about = read_object(run / "follow.json", root) if (run / "follow.json").exists() else {}
    model = Path(os.path.realpath(run / MODEL))
    return {
        "settings": {}, "sources": {}, "environment": {}, "starts": 0, "checkpoints": [],
        "data": {"path": _shown(about.get("data"), root)}, "parent": None, "lora": False, "model": None, "final": None,
        "newest": model.relative_to(root).as_posix() if model.is_relative_to(root) and model.is_dir() else None,
        "problems": [],
    }  # fmt: skip


def checkpoints(run: Path, root: Path, rows: RunRows) -> list[dict[str, Any]]:
    """The checkpoints of a run, the newest first. `kept`: whether it stays when newer ones come."""
    folder = run / CHECKPOINTS
    losses = {row.step: row.loss for row in rows.evaluations}
    best, latest = named_step(folder, "best"), named_step(folder, "latest")
    every = _part(_part(_state(folder, root), "config"), "train").get("keep_every")
    found = []
    for step in reversed(steps_in(folder)[-_MOST_CHECKPOINTS:]):
        place = step_folder(folder, step)
        words = problem(place / MANIFEST, root)
        found.append(
            {
                "path": place.relative_to(root).as_posix(),
                "step": step,
                "val_loss": losses.get(step),
                "bytes": tree_bytes(place),
                "best": step == best,
                "latest": step == latest,
                "kept": step == best or bool(type(every) is int and every > 0 and step % every == 0),
                "written": _changed(place / MANIFEST),
                "damaged": f"{MANIFEST} {words}" if words else None if (place / MANIFEST).is_file() else "it was never finished",
            }
        )
    return found


def faults(run: Path, rows: RunRows) -> list[dict[str, Any]]:
    """What went wrong and what the machine did, the newest first, in the words of `cllm report`."""
    data = RunData(run, run.name)
    data.metrics = {kind: [each for each in rows.events if isinstance(each, kind)] for kind in (FaultRow, MachineRow, TrainRow)}
    documents = {(row.step, row.event): list(row.documents) for row in data.rows(FaultRow)}
    found = [
        {
            "step": each.step,
            "event": each.what,
            "action": each.action,
            "text": each.details,
            "documents": documents.get((each.step, each.what), []),
        }
        for each in data.events()
    ]
    return found[::-1][:_MOST_EVENTS]


def samples(run: Path) -> list[dict[str, Any]]:
    """What the model wrote during the run, the newest first. Raises UserError where there is no run."""
    if _is_in_rounds(run):
        return []
    found = read_run(run, with_metrics=False).samples
    return [each.to_dict() for each in found[::-1][:_MOST_SAMPLES]]


def rounds(run: Path) -> list[dict[str, Any]]:
    """The rounds of a training that follows text, the newest first; none of a run of its own. Raises CheckpointError for a damaged file."""
    return [each.to_dict() for each in reversed(read_rounds(run))]


# -- how the work is spread ------------------------------------------------------------------------------------------------


def work_tree(run: Path, root: Path, rows: RunRows) -> dict[str, Any]:
    """Who computes a step, and the fixed tree in which its partial sums are added up: one root, up to twelve children each (`runtime.tree`).

    `levels` are those of the gradient's norm, from the root down: the gradient of each tensor is cut into blocks, each of which a worker sums up.
    `parts` are seconds of the newest step, `threads` what those of its process do now. Levels are empty before the first checkpoint, which tells the
    shapes.
    """
    if _is_in_rounds(run):
        empty: dict[str, Any] = {"workers": None, "device": "", "devices": [], "levels": [], "parts": {}, "text": None}
        return {**empty, "fanout": tree.FANOUT, "threads": _busy_threads(run)}
    data = read_run(run, with_metrics=False)
    threads = data.setting("train.threads")
    devices = data.environments[-1].devices if data.environments else ()
    workers = threads if type(threads) is int else devices[0].workers if devices else None
    leaves = _blocks(run / CHECKPOINTS, root)
    counts = list(reversed(tree.levels(leaves))) if leaves else []
    names = ["root", *[f"level {depth}" for depth in range(1, len(counts))]]
    return {
        "workers": workers,
        "device": str(data.setting("train.device") or ""),
        "devices": [each.to_dict() for each in devices],
        "fanout": tree.FANOUT,
        "levels": [{"name": name, "nodes": count} for name, count in zip(names, counts)],
        "parts": _newest_parts(rows),
        "threads": _busy_threads(run),
        "text": f"{leaves:,} blocks: {tree.describe(leaves)}" if leaves else None,
    }


def _blocks(folder: Path, root: Path) -> int:
    """Blocks that the gradient is cut into, by the shapes in the newest manifest; 0 where there is none."""
    steps = steps_in(folder)
    place = step_folder(folder, steps[-1]) / MANIFEST if steps else folder / MANIFEST
    if not place.exists():
        return 0
    try:
        tensors: Any = read_object(place, root).get("tensors")
        shapes = [entry["shape"] for name, part in tensors.items() if name.startswith("model") for entry in part.values()]
        sizes = [math.prod(int(each) for each in shape) for shape in shapes]
    except (CLLMError, KeyError, TypeError, ValueError, AttributeError):
        return 0
    from cllm.kernels.numba.adamw import BLOCK_ELEMENTS

    return sum(-(-max(_LEAST_LEAVES, size) // BLOCK_ELEMENTS) for size in sizes if size < 2**40)


def _busy_threads(run: Path) -> list[dict[str, Any]]:
    _, _, process = (trained_by(run) or "").partition("process ")
    return busy(int(process)) if process.isdigit() else []


def _newest_parts(rows: RunRows) -> dict[str, float]:
    found = {}
    for name in ("data", "forward", "backward", "optimizer"):
        values = rows.column(f"{name}_seconds")
        if len(values) and np.isfinite(values[-1]):
            found[name] = float(values[-1])
    return found


# -- small parts -----------------------------------------------------------------------------------------------------------


def _sections(data: RunData) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for each in data.settings:
        section, _, key = each.key.partition(".")
        found.setdefault(section, {})[key] = each.value if isinstance(each.value, int | float | str | bool) else str(each.value)
    return found


def _state(folder: Path, root: Path) -> dict[str, Any]:
    steps = steps_in(folder)
    try:
        return read_object(step_folder(folder, steps[-1]) / "state.json", root) if steps else {}
    except CLLMError:
        return {}


def _tokens(stored: Any) -> dict[str, Any]:
    """Tokens of the splits, as a checkpoint's state has them."""
    return {f"{name}_tokens": _part(stored, name).get("tokens") for name in ("train", "val")}


def _shown(path: Any, root: Path) -> str | None:
    """A place that a run recorded, below the workspace where it lies there."""
    if not isinstance(path, str) or not path:
        return None
    return path.removeprefix(f"{root}/")


def _part(values: Any, name: str) -> dict[str, Any]:
    found = values.get(name) if isinstance(values, dict) else None
    return found if isinstance(found, dict) else {}


def _changed(place: Path) -> float | None:
    try:
        return place.stat().st_mtime
    except OSError:
        return None
