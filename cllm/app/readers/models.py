"""The models of the workspace: runs with a checkpoint, .cllm files, Hugging Face folders and GGUF files. Their weights are not read.

Whatever is wrong with one of them stands in its field `damaged`; it never keeps the others from being listed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cllm.app.readers.inside import problem, read_bytes, read_object, tree_bytes
from cllm.app.readers.inventory import GGUF, HUGGING_FACE, MODEL_FILE, RUN, Found, Inventory
from cllm.app.readers.runs import num_parameters
from cllm.checkpoint.header import INT8, PLAIN, SCALES, Header, read_header
from cllm.checkpoint.place import CHECKPOINTS, step_folder, steps_in
from cllm.files import reason
from cllm.runtime.errors import CheckpointError, CLLMError

KINDS = (MODEL_FILE, HUGGING_FACE, GGUF)
_MOST_LINEAGE = 20
_MOST_TRIED = 8  # checkpoints of a run, the newest first
_MOST_TENSORS = 20_000


class Models:
    """The models below `root`, which is resolved. For one thread at a time."""

    def __init__(self, root: Path, inventory: Inventory) -> None:
        self._root, self._inventory = root, inventory
        self._known: dict[str, tuple[Any, dict[str, Any]]] = {}

    def list(self, runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """All models by path. runs: as `cllm.app.readers.runs` lists them."""
        by_path = {each["run"]: each for each in runs}
        found = self._inventory.look(RUN, *KINDS)
        entries = []
        for each in found:
            if each.kind != RUN:
                entries.append(self._remembered(each))
            elif each.path in by_path and steps_in(each.place / CHECKPOINTS):
                entries.append(self._of_run(each, by_path[each.path]))
        self._known = {entry["path"]: self._known[entry["path"]] for entry in entries if entry["path"] in self._known}
        return entries

    def entry(self, path: str, place: Path, run: Mapping[str, Any] | None) -> dict[str, Any]:
        """One model, as `list` shows it. run: where it is one. Raises CheckpointError where there is none."""
        if run is not None:
            if not steps_in(place / CHECKPOINTS):
                raise CheckpointError(f"{path} has no checkpoint yet. It becomes a model with its first one.")
            return self._of_run(Found(path, RUN, place), run)
        kind = (
            {".cllm": MODEL_FILE, ".gguf": GGUF}.get(place.suffix) if place.is_file() else HUGGING_FACE if (place / "config.json").is_file() else None
        )
        if kind is None:
            raise CheckpointError(f"{path} is no model. Give a run, a .cllm file, a Hugging Face folder or a GGUF file.")
        return self._remembered(Found(path, kind, place))

    def _remembered(self, found: Found) -> dict[str, Any]:
        try:
            stat = found.place.stat()
            mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns, found.kind)
        except OSError:
            return _blank(found) | {"damaged": "it is gone, or cannot be read"}
        known = self._known.get(found.path)
        if known is None or known[0] != mark:
            entry = _blank(found) | {"updated": stat.st_mtime, "size_bytes": stat.st_size}
            read = {MODEL_FILE: _of_file, HUGGING_FACE: _of_folder, GGUF: _of_gguf}[found.kind]
            known = self._known[found.path] = (mark, entry | self._safely(read, found.place))
        return known[1]

    def _of_run(self, found: Found, run: Mapping[str, Any]) -> dict[str, Any]:
        entry = _blank(found) | {name: run[name] for name in ("parameters", "tokens", "bits_per_byte", "size_bytes", "updated", "damaged", "state")}
        entry |= {"name": run["name"], "val_loss": run["val_loss"] if run["val_loss"] is not None else run["best_val_loss"]}
        steps = steps_in(found.place / CHECKPOINTS)
        mark = (steps, run["updated"])
        known = self._known.get(found.path)
        if known is None or known[0] != mark:
            known = self._known[found.path] = (mark, self._safely(lambda place, root: _of_newest(place, root, steps), found.place))
        return entry | known[1] | ({"damaged": entry["damaged"]} if entry["damaged"] else {})

    def _safely(self, read: Callable[[Path, Path], dict[str, Any]], place: Path) -> dict[str, Any]:
        words = problem(place, self._root) if place.is_file() else None
        if words:
            return {"damaged": words, "loadable": False}
        try:
            return read(place, self._root)
        except CLLMError as error:
            return {"damaged": str(error).replace(f"{self._root}/", ""), "loadable": False}


def _blank(found: Found) -> dict[str, Any]:
    names = (
        "parameters",
        "tokens",
        "val_loss",
        "bits_per_byte",
        "size_bytes",
        "updated",
        "tokenizer",
        "context",
        "parent",
        "damaged",
        "state",
        "dtype",
    )
    return {"path": found.path, "name": found.name, "kind": found.kind, **dict.fromkeys(names), "has_chat": False, "loadable": False}


def _of_newest(run: Path, root: Path, steps: list[int]) -> dict[str, Any]:
    """Of the newest checkpoint that looks whole, which is the one that would be loaded. Raises CLLMError where none of the last few does."""
    fault: CLLMError | None = None
    for step in reversed(steps[-_MOST_TRIED:]):
        try:
            found = _of_checkpoint(run, root, step)
            for each in _weights(step_folder(run / CHECKPOINTS, step), root):
                read_header(each)
        except CLLMError as error:
            fault = fault or error
            continue
        if fault is not None:
            found["damaged"] = f"the checkpoint of step {steps[-1]:,} is, so that of step {step:,} is used. {fault}"
        return found
    assert fault is not None
    raise fault


def _weights(folder: Path, root: Path) -> list[Path]:
    """The files with a checkpoint's weights. Raises CheckpointError where there are none that may be read."""
    found = [each for each in sorted(folder.glob("model*.safetensors")) if problem(each, root) is None]
    if not found:
        raise CheckpointError(f"{folder} has no weights.")
    return found


def _of_checkpoint(run: Path, root: Path, step: int) -> dict[str, Any]:
    state = read_object(step_folder(run / CHECKPOINTS, step) / "state.json", root)
    model, config = state.get("model"), state.get("config")
    start = config.get("finetune", {}).get("start_from") if isinstance(config, dict) and isinstance(config.get("finetune"), dict) else None
    tokenizer = tokenizer_of(run, root)
    return {
        "context": _whole(model, "max_seq_len"),
        "parent": start.removeprefix(f"{root}/") if isinstance(start, str) and start else None,
        "tokenizer": tokenizer,
        "has_chat": bool(tokenizer and tokenizer["has_chat"]),
        "loadable": tokenizer is not None and num_parameters(model) is not None,
        "dtype": "F32",
    }


def _of_file(place: Path, root: Path) -> dict[str, Any]:
    header = read_header(place)
    config = _json(header.metadata.get("config", ""))
    if "cllm_format" not in header.metadata or not isinstance(config, dict):
        return {"damaged": "it is a safetensors file without a CLLM configuration", "parameters": header.num_parameters}
    settings = _json(header.metadata.get("tokenizer_config", "{}"))
    tokenizer = described_tokenizer(_json(header.metadata.get("tokenizer", "")), settings)
    damaged = _fault(header, config, tokenizer)
    return {
        "parameters": num_parameters(config) or header.num_parameters,  # the scales of int8 weights are no parameters
        "context": _whole(config, "max_seq_len"),
        "tokenizer": tokenizer,
        "has_chat": has_template(settings),
        "loadable": tokenizer is not None and damaged is None,
        "damaged": damaged,
        "dtype": _dtype(header),
    }


def _fault(header: Header, config: dict[str, Any], tokenizer: dict[str, Any] | None) -> str | None:
    """Why a .cllm file with this header cannot be loaded, as far as that shows without its weights; None where nothing speaks against it."""
    from cllm.config.model import ModelConfig

    version = header.metadata["cllm_format"]
    if version not in (PLAIN, INT8):
        return f"it has format version {version:.40}, this CLLM reads {PLAIN} and {INT8}. Use the CLLM that wrote it."
    try:
        needed = ModelConfig.from_dict(config).num_parameters()
    except (CLLMError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return f"its model configuration cannot be built: {reason(error)}"
    numbers = sum(math.prod(each.shape) for name, each in header.tensors.items() if version == PLAIN or not name.endswith(SCALES))
    if needed != numbers:
        return f"its tensors hold {numbers:,} numbers, and its configuration needs {needed:,}."
    if "tokenizer" in header.metadata and tokenizer is None:
        return "its tokenizer cannot be read."
    if tokenizer is not None and tokenizer["vocab_size"] > config["vocab_size"]:
        return f"its tokenizer has {tokenizer['vocab_size']:,} tokens, and its model knows {config['vocab_size']:,}."
    return None


def _of_folder(place: Path, root: Path) -> dict[str, Any]:
    from cllm.interop.hf_config import config_from_hf

    values = read_object(place / "config.json", root)
    files = sorted(each for each in place.glob("*.safetensors") if problem(each, root) is None)
    found: dict[str, Any] = {"size_bytes": tree_bytes(place), "tokenizer": tokenizer_of(place, root)}
    found["has_chat"] = bool(found["tokenizer"] and found["tokenizer"]["has_chat"])
    headers = [read_header(each) for each in files]
    found |= {"parameters": sum(each.num_parameters for each in headers) or None, "dtype": _dtype(headers[0]) if headers else None}
    config = config_from_hf(values)
    return found | {"context": config.max_seq_len, "loadable": bool(files) and found["tokenizer"] is not None}


def _of_gguf(place: Path, root: Path) -> dict[str, Any]:
    with open(place, "rb") as file:
        return {} if file.read(4) == b"GGUF" else {"damaged": "it is no GGUF file"}


# -- tokenizers ------------------------------------------------------------------------------------------------------------


def tokenizer_of(folder: Path, root: Path) -> dict[str, Any] | None:
    """What the tokenizer.json of a run or a Hugging Face folder is; None where there is none, or none that can be read."""
    if not (folder / "tokenizer.json").exists():
        return None
    try:
        content = _json(read_bytes(folder / "tokenizer.json", root).decode("utf-8", "replace"))
        settings = _json(read_bytes(folder / "tokenizer_config.json", root).decode("utf-8", "replace"))
    except CLLMError:
        settings = None
        try:
            content = _json(read_bytes(folder / "tokenizer.json", root).decode("utf-8", "replace"))
        except CLLMError:
            return None
    found = described_tokenizer(content, settings)
    if found is not None and (folder / "chat_template.jinja").is_file():
        found["has_chat"] = True
    return found


def described_tokenizer(content: Any, settings: Any) -> dict[str, Any] | None:
    """Kind and size of a tokenizer.json's vocabulary, and whether it has a template for chats; None for what is none."""
    model = content.get("model") if isinstance(content, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocab, dict | list):
        return None
    added = content.get("added_tokens")
    names = {each.get("content") for each in added if isinstance(each, dict)} if isinstance(added, list) else set()
    size = len(vocab) + (len(names - vocab.keys()) if isinstance(vocab, dict) else 0)
    return {"kind": str(model.get("type") or "BPE"), "vocab_size": size, "has_chat": has_template(settings)}


def has_template(settings: Any) -> bool:
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


# -- one model ------------------------------------------------------------------------------------------------------------


def inspect(entry: Mapping[str, Any], place: Path, root: Path) -> dict[str, Any]:
    """An entry of the list with all that is known without reading weights: configuration, tensors, files and ancestry.

    Raises CheckpointError or DataError where it is damaged.
    """
    found: dict[str, Any] = {**entry, "model": None, "tensors": [], "files": [], "lineage": lineage(str(entry["path"]), root), "step": None}
    if entry["kind"] == MODEL_FILE:
        header = read_header(place)
        found |= {"model": _json(header.metadata.get("config", "")), "tensors": _tensors(header)}
        found["files"] = [{"name": place.name, "bytes": place.stat().st_size}]
    elif entry["kind"] == HUGGING_FACE:
        found["model"] = read_object(place / "config.json", root)
        for file in sorted(place.glob("*.safetensors")):
            if problem(file, root) is None:
                found["tensors"] += _tensors(read_header(file))
        found["files"] = _files(place)
    elif entry["kind"] == RUN:
        step = steps_in(place / CHECKPOINTS)[-1]
        folder = step_folder(place / CHECKPOINTS, step)
        state = read_object(folder / "state.json", root)
        data = {name: state.get(name) for name in ("model", "tokens", "seconds", "best", "saved", "data", "tokenizer_hash")}
        found |= data | {"step": step, "files": _files(folder)}
        for file in sorted(folder.glob("model*.safetensors")):
            if problem(file, root) is None:
                found["tensors"] += _tensors(read_header(file))
    found["tensors"] = found["tensors"][:_MOST_TENSORS]
    return found


def lineage(path: str, root: Path) -> list[dict[str, Any]]:
    """What a model was trained from, and that from, as {path, exists}; the nearest first."""
    found: list[dict[str, Any]] = []
    seen = {path}
    while len(found) < _MOST_LINEAGE:
        place = root / path
        folder = place / CHECKPOINTS
        steps = steps_in(folder)
        try:
            parent = _of_checkpoint(place, root, steps[-1])["parent"] if steps else None
        except CLLMError:
            parent = None
        if parent is None or parent in seen:
            break
        inside = not parent.startswith("/") and ".." not in parent.split("/")
        found.append({"path": parent, "exists": inside and (root / parent).exists()})
        if not found[-1]["exists"]:
            break
        seen.add(parent)
        path = parent
    return found


def _tensors(header: Header) -> list[dict[str, Any]]:
    return [{"name": name, "dtype": each.dtype, "shape": list(each.shape), "bytes": each.num_bytes} for name, each in header.tensors.items()]


def _files(folder: Path) -> list[dict[str, Any]]:
    return [{"name": each.name, "bytes": each.stat().st_size} for each in sorted(folder.iterdir()) if each.is_file()][:1_000]


def _dtype(header: Header) -> str | None:
    """The number format that holds most of the bytes."""
    sizes: dict[str, int] = {}
    for each in header.tensors.values():
        sizes[each.dtype] = sizes.get(each.dtype, 0) + each.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def _whole(values: Any, name: str) -> int | None:
    found = values.get(name) if isinstance(values, dict) else None
    return found if type(found) is int and 0 <= found < 2**63 else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
