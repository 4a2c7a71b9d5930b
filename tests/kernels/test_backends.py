"""A backend is a folder that declares itself: one from outside of the package is offered, chosen and forced like those inside."""

import importlib
import subprocess
import sys
import textwrap

import pytest
import torch

from cllm import kernels, runtime
from cllm.kernels import _register
from cllm.kernels.operations import OPERATIONS

plan = importlib.import_module("cllm.runtime.plan")  # the name in the package is the function


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A package with softmax alone, in float32 alone, of at most 64 columns; it is forgotten after the test."""
    folder = tmp_path / "kernels_from_elsewhere"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        textwrap.dedent("""
        from cllm.kernels import Backend

        class Narrow(Backend):
            def can_serve(self, op, shapes, dtype, device):
                if shapes[0][-1] > 64:
                    return False, f"{shapes[0][-1]} columns are more than 64"
                return super().can_serve(op, shapes, dtype, device)

        BACKEND = Narrow(package=__name__, priority={"cpu": 1000}, reason="of this test", dtypes=("float32",))
        """)
    )
    (folder / "softmax.py").write_text("def forward(x):\n    return x.exp() / x.exp().sum(-1, keepdim=True)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(_register, "_backends", dict(_register._backends))
    monkeypatch.setattr(plan, "_entries", dict(plan._entries))
    import kernels_from_elsewhere

    kernels.add_backend(kernels_from_elsewhere.BACKEND)
    yield kernels_from_elsewhere
    del sys.modules["kernels_from_elsewhere"]
    monkeypatch.undo()
    _register._modules.clear()
    plan._plan.cache_clear()


def _backend_of(call) -> str:
    with runtime.profiler.record() as recording:
        call()
    return recording.kernels()[0].backend


def test_a_backend_from_outside_serves_what_it_can_and_leaves_the_rest(elsewhere):
    x = torch.randn(3, 40)
    assert _backend_of(lambda: kernels.softmax(x)) == "kernels_from_elsewhere"
    torch.testing.assert_close(kernels.softmax(x), x.softmax(-1))
    assert _backend_of(lambda: kernels.softmax(torch.randn(3, 65))) != "kernels_from_elsewhere"
    assert _backend_of(lambda: kernels.softmax(x.bfloat16())) != "kernels_from_elsewhere"
    assert _backend_of(lambda: kernels.rms_norm(x, torch.ones(40))) != "kernels_from_elsewhere"
    said = str(runtime.explain("softmax", (3, 65)))
    assert "not kernels_from_elsewhere: 65 columns are more than 64" in said
    assert runtime.explain("softmax", (3, 40)).reason.startswith("of this test")


def test_a_backend_from_outside_can_be_forced_and_says_why_it_cannot_serve(elsewhere):
    with runtime.use(backend="kernels_from_elsewhere"):
        assert _backend_of(lambda: kernels.softmax(torch.randn(3, 40))) == "kernels_from_elsewhere"
        for call, reason in (
            (lambda: kernels.softmax(torch.randn(3, 65)), "65 columns are more than 64"),
            (lambda: kernels.softmax(torch.randn(3, 40).double()), "its kernels compute float32, not float64"),
            (lambda: kernels.rms_norm(torch.randn(3, 40), torch.ones(40)), "it has no kernel for rms_norm"),
        ):
            with pytest.raises(runtime.BackendError, match=f"'kernels_from_elsewhere' cannot serve .*{reason}"):
                call()


def test_a_backend_whose_library_is_missing_serves_nothing_and_says_so(elsewhere):
    from dataclasses import replace

    kernels.add_backend(replace(elsewhere.BACKEND, requires="a_library_that_nobody_has"))
    assert "a_library_that_nobody_has is not installed" in str(runtime.explain("softmax", (3, 40)))


@pytest.mark.parametrize("name", _register.NAMES)
def test_every_backend_declares_itself(name):
    backend = _register._backends[name]
    assert backend.name == name and backend.priority and backend.reason
    assert any(backend.has(operation.file) for operation in OPERATIONS.values())
    for op in OPERATIONS:
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            serves, reason = backend.can_serve(op, ((1, 64, 4, 64), (1, 64, 4, 64)), dtype, next(iter(backend.priority)))
            assert reason and (serves or reason != backend.reason)


def test_declaring_the_backends_imports_none_of_their_libraries():
    code = "import sys, cllm.kernels; print([name for name in ('numba', 'llvmlite', 'triton') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
