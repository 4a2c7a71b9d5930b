"""The backends, and which of them serves a call.

A backend declares itself in its folder (see `backend.py`); this file only collects the declarations and makes them known to the runtime, whose plan
then names the backend of a call. A new backend is a folder and its name in `NAMES`, or, from outside of this package, a call of `add_backend`.
"""

from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

import cllm.runtime as runtime
from cllm.kernels.backend import Backend
from cllm.kernels.operations import OPERATIONS, Shapes
from cllm.runtime import profiler

NAMES = ("numba", "triton", "gluon", "sdpa", "torch")
_MAX_CACHED_MODULES = 4096

_backends: dict[str, Backend] = {}
_modules: dict[tuple[Any, ...], ModuleType] = {}


def add_backend(backend: Backend) -> None:
    """Offers `backend` for every operation on the devices that it names; one of the same name is replaced."""
    _backends[backend.name] = backend
    _modules.clear()
    for op in OPERATIONS:
        for device_type, priority in backend.priority.items():
            runtime.register_backend(op, backend.name, device_type, priority, partial(backend.can_serve, op), partial(backend.workers, op))


def backend_serves(op: str, name: str, shapes: Shapes, dtype: torch.dtype, device: str) -> bool:
    """Whether backend `name` could serve, were it asked for."""
    return op in OPERATIONS and name in _backends and _backends[name].can_serve(op, shapes, str(dtype).removeprefix("torch."), device)[0]


def backend_for(op: str, shapes: Shapes, dtype: torch.dtype, device_type: str) -> Backend:
    """The backend that the plan chooses for `op` on these shapes."""
    return _backends[runtime.plan(op, shapes, dtype, device_type).backend]


def backend(op: str, shapes: Shapes, dtype: torch.dtype, device_type: str) -> Any:
    """The module that serves `op` on these shapes: the one place through which every call of a kernel goes."""
    key = (op, shapes, dtype, device_type, runtime.settings().backend)
    module = _modules.get(key)
    if module is None:
        module = backend_for(op, shapes, dtype, device_type).module(OPERATIONS[op].file)
        if len(_modules) >= _MAX_CACHED_MODULES:  # decoding meets a new number of keys at every step
            _modules.clear()
        _modules[key] = module
    recording = profiler.recording
    return module if recording is None else recording.watch(op, module)


for _name in NAMES:
    add_backend(import_module(f"cllm.kernels.{_name}").BACKEND)
