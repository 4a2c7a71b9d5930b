"""Checkpoints that are whole or absent: folders written beside and renamed, one-file models, their tools."""

from typing import TYPE_CHECKING

from cllm._lazy import exports

__all__ = ["Checkpoint", "CheckpointStore", "CheckpointWriter", "load", "read_checkpoint", "save", "verify"]

if TYPE_CHECKING:
    from cllm.checkpoint.store import Checkpoint, CheckpointStore, load, read_checkpoint, save, verify
    from cllm.checkpoint.writer import CheckpointWriter

__getattr__, __dir__ = exports(
    __name__,
    {
        "load": "cllm.checkpoint.store",
        "save": "cllm.checkpoint.store",
        "Checkpoint": "cllm.checkpoint.store",
        "CheckpointStore": "cllm.checkpoint.store",
        "read_checkpoint": "cllm.checkpoint.store",
        "verify": "cllm.checkpoint.store",
        "CheckpointWriter": "cllm.checkpoint.writer",
    },
)
