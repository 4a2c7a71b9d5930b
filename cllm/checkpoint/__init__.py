"""Checkpoints that are whole or absent: safetensors and JSON, every byte under a SHA-256, nothing ever unpickled.

safetensors.py   the file format, and the reading of files that anybody may have written
parts.py         the tensors of a checkpoint, in one piece or in the rows of several processes
folder.py        one checkpoint folder: manifest, verifying, reading
store.py         the checkpoints of one run; shared.py: those of a run of several processes
writer.py        writes into a store while training goes on
weights.py       a model's weights by name, checked and copied
model_file.py    `save` and `load`: one .cllm file, or whatever holds a model
tools.py         inspect, verify, compare, average
"""

from typing import TYPE_CHECKING

from cllm._lazy import exports

__all__ = ["Checkpoint", "CheckpointStore", "CheckpointWriter", "load", "read_checkpoint", "save", "verify"]

if TYPE_CHECKING:
    from cllm.checkpoint.folder import Checkpoint, read_checkpoint, verify
    from cllm.checkpoint.model_file import load, save
    from cllm.checkpoint.store import CheckpointStore
    from cllm.checkpoint.writer import CheckpointWriter

__getattr__, __dir__ = exports(
    __name__,
    {
        "load": "cllm.checkpoint.model_file",
        "save": "cllm.checkpoint.model_file",
        "Checkpoint": "cllm.checkpoint.folder",
        "read_checkpoint": "cllm.checkpoint.folder",
        "verify": "cllm.checkpoint.folder",
        "CheckpointStore": "cllm.checkpoint.store",
        "CheckpointWriter": "cllm.checkpoint.writer",
    },
)
