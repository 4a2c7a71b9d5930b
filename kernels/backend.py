"""What a backend is: a folder of kernels that declares, in its `__init__`, where it runs, what it computes and when it is preferred.

The folder has a module for each operation that it serves, under the file name that `operations.py` gives, with the functions of its twin in
`kernels/torch`. Its `__init__` holds one `Backend` under the name BACKEND and imports no kernel and no heavy library: a module is imported by the
first call that it serves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from cllm.kernels.operations import OPERATIONS, Shapes


@cache
def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


@dataclass(frozen=True)
class Backend:
    """The declaration of one backend. A subclass overrides `can_serve` where more than these fields decides."""

    package: str
    """The folder's package, `__name__` in its `__init__`. Its last part is the backend's name."""
    priority: Mapping[str, int]
    """For each type of device that it runs on ("cpu", "cuda", ...): of the backends that can serve a call, the highest number is chosen."""
    reason: str
    """What speaks for it, in a few words for `cllm explain`."""
    dtypes: tuple[str, ...] | None = None
    """Names of the dtypes that it computes; None for every one."""
    requires: str | None = None
    """The library that must be installed."""
    max_head_dim: int | None = None
    """The largest head size of attention; None for any."""

    @property
    def name(self) -> str:
        return self.package.rpartition(".")[2]

    def has(self, file: str) -> bool:
        """Whether the folder holds `file`, the name of a module."""
        return _exists(f"{self.package}.{file}")

    def module(self, file: str) -> ModuleType:
        return import_module(f"{self.package}.{file}")

    def can_serve(self, op: str, shapes: Shapes, dtype: str, device: str) -> tuple[bool, str]:
        """Whether the kernels can serve `op` on these shapes, and why or why not. No tensor exists yet, and nothing heavy is imported."""
        if self.dtypes is not None and dtype not in self.dtypes:
            return False, f"its kernels compute {', '.join(self.dtypes)}, not {dtype}"
        if (
            op in ("attention", "attention_dropout", "cached_attention", "paged_attention")
            and self.max_head_dim is not None
            and shapes
            and shapes[0][-1] > self.max_head_dim
        ):
            return False, f"head size {shapes[0][-1]} is larger than {self.max_head_dim}"
        if not self.has(OPERATIONS[op].file):
            return False, f"it has no kernel for {op}"
        if self.requires is not None and not _exists(self.requires):
            return False, f"{self.requires} is not installed"
        return True, self.reason

    def workers(self, op: str, shapes: Shapes, dtype: str, planned: int, options: Mapping[str, Any]) -> tuple[int, str]:
        """(workers that a forward pass of `op` on a CPU really puts to work, why they are others than `planned`), for `runtime.explain`."""
        return planned, ""
