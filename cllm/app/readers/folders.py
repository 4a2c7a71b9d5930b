"""A Hugging Face folder that a browser sends in one request: a line of JSON with the names and sizes of its files, and behind it the files.

    [{"name": "config.json", "bytes": 612}, {"name": "model.safetensors", "bytes": 4_000_000}]

Only what describes a model and its tokenizer is taken, and weights without code.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import BinaryIO

from cllm.app.readers.inside import read_object
from cllm.app.readers.uploads import check_room
from cllm.checkpoint.header import read_header
from cllm.interop.hf_config import config_from_hf
from cllm.runtime.errors import CheckpointError, DataError
from cllm.serve.errors import Refused

WEIGHTS = ".safetensors"
SUFFIXES = (WEIGHTS, ".json", ".txt", ".jinja", ".md")  # as the page knows them (models/bring.js)
_MOST_LINE = 1 << 20  # bytes of the line of JSON
_MOST_FILES = 1_000


def unpack(sent: Path, folder: Path) -> None:
    """Makes the folder of what was sent, and checks that it is a model. Raises Refused, CheckpointError; OSError where it cannot be written."""
    with open(sent, "rb") as file:
        files = _files(file)
        left = sent.stat().st_size - file.tell()
        if sum(files.values()) != left:
            raise Refused(400, "the folder did not arrive whole. Send it again.", code="invalid_value")
        check_room(folder.parent, left)
        folder.mkdir()
        for name, size in files.items():
            with open(folder / name, "xb") as target:
                _copy(file, target, size)
    _check(folder)


def _files(file: BinaryIO) -> dict[str, int]:
    """The names and sizes of the first line."""
    wrong = Refused(400, "this is no folder: its first line must be a list of names and sizes.", code="invalid_value")
    try:
        listed = json.loads(file.readline(_MOST_LINE))
        files = {each["name"]: each["bytes"] for each in listed}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise wrong from None
    if len(files) != len(listed) or len(files) > _MOST_FILES or not all(type(size) is int and size >= 0 for size in files.values()):
        raise wrong
    for name in files:
        if not is_taken(name):
            words = f"{str(name)[:100]!r} is not taken. Of a model, files are that end with {', '.join(SUFFIXES)}."
            raise Refused(400, words, param="name", code="unsupported_type")
    return files


def is_taken(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w. +-]{0,199}", name, re.ASCII) is not None and name.endswith(SUFFIXES)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        block = source.read(min(size, 1 << 20))
        if not block:
            raise OSError("the file has become shorter")
        target.write(block)
        size -= len(block)


def _check(folder: Path) -> None:
    try:
        config_from_hf(read_object(folder / "config.json", folder))
    except DataError as error:
        raise CheckpointError(f"this folder is no model: {error} Choose the one in which config.json lies.") from error
    weights = sorted(folder.glob(f"*{WEIGHTS}"))
    if not weights:
        raise CheckpointError(f"the folder holds no {WEIGHTS} weights. Weights in pickles (pytorch_model.bin) are not read: they can hold programs.")
    for each in weights:
        try:
            read_header(each)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(f"{folder}/", "")) from None


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
