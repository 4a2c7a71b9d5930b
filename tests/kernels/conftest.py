"""Fixtures of the kernel tests: the rule of `oracle.py`, the cases of `cases.py`, the backends, and allocations poisoned with NaN."""

import dataclasses
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cllm import runtime

BACKENDS = ("torch", "numba", *(("triton",) if importlib.util.find_spec("triton") else ()))
_FILE_OF = {"rms_norm": "norm", "layer_norm": "norm"}


def _load(file_name: str, name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file_name))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


_RULE = _load("oracle.py", "cllm_kernel_oracle")
_CASES = _load("cases.py", "cllm_kernel_cases")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `case` runs on every case, one that asks for `backend_name` on every backend."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", _CASES.CASES, ids=str)
    if "backend_name" in metafunc.fixturenames:
        metafunc.parametrize("backend_name", BACKENDS)


@pytest.fixture(scope="session")
def oracle() -> SimpleNamespace:
    """Everything in `oracle.py` and `cases.py`."""
    return SimpleNamespace(**{**vars(_RULE), **vars(_CASES)})


@pytest.fixture
def serve():
    """serve(backend, op, threads=None): everything in the test runs on that backend; skips, with the reason, where it is missing.

    With a backend that serves GPUs too, a tensor that names no device is made nowhere ("meta"): on a GPU it would be on the wrong device, in the
    test and in the kernels alike, and here that would go unseen.
    """
    scopes = []

    def enter(backend: str, op: str, threads: int | None = None) -> None:
        if importlib.util.find_spec(f"cllm.kernels.{backend}.{_FILE_OF.get(op, op)}") is None:
            pytest.skip(f"there is no {backend} kernel for {op}")
        for scope in (runtime.use(backend=backend, threads=threads), *(() if backend == "numba" else (torch.device("meta"),))):
            scope.__enter__()
            scopes.append(scope)

    yield enter
    for scope in reversed(scopes):
        scope.__exit__(None, None, None)


with torch.device("meta"):  # the first such block looks up, once for all, what makes tensors: before any of it is replaced below
    torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote reads as NaN, so that an output left unwritten shows."""

    def poison(function: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            tensor = function(*args, **kwargs)
            if type(tensor) is torch.Tensor and tensor.is_floating_point() and tensor.device.type != "meta":
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return allocate

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(scope="session", autouse=True)
def interpreted_kernels() -> Iterator[None]:
    """Triton's interpreter computes with NumPy, which warns of each infinity and NaN; the hardware goes on without a word, and tests ask for both.
    Only while a kernel is interpreted are these warnings off. A whole number that overflows, as an offset could, is an error."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    interpret = GridExecutor.__call__

    def quietly(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)  # of a maximum, which errstate does not reach
            return interpret(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", quietly)
        patch.setattr(interpreter_builder, "options", dataclasses.replace(interpreter_builder.options, debug=True))
        yield
