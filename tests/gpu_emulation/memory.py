"""Memory that ends: one allocation fails, wherever that is."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What is going on, by the function of this package or of cllm that an allocation comes from, innermost first.
PLACES = {"operator": "capture", "capture": "warm-up", "_evaluate": "evaluation", "_run": "step"}


class Memory(TorchDispatchMode):
    """While entered, there is no room for the tensor that an operator makes as number `number` of a place, from 1: "warm-up", "capture",
    "evaluation" or "step"."""

    def __init__(self, place: str, number: int) -> None:
        super().__init__()
        self.place, self.left = place, number

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        new = any(each.alias_info is None for each in function._schema.returns)
        if new and any(isinstance(each, torch.Tensor) for each in tree_leaves(results)) and _place() == self.place:
            self.left -= 1
            if not self.left:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 15.77 GiB.")
        return results


def _place() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in PLACES:
            return PLACES[frame.f_code.co_name]
        frame = frame.f_back
    return "elsewhere"
