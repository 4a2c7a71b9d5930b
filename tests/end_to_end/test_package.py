"""What is installed: a light import, a wheel that holds every module, one package with three layers side by side."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_importing_cllm_compiles_nothing_and_opens_no_socket():
    code = """
import socket, sys, time, json
def refuse(*args, **kwargs): raise AssertionError("a socket was opened")
socket.socket.connect = refuse
import cllm, cllm.runtime, cllm.kernels
print(json.dumps(sorted(m for m in ("numba", "llvmlite", "transformers", "tokenizers", "triton", "cupy", "tensorboardX") if m in sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == []


def test_public_names_of_the_package_resolve():
    import cllm
    import cllm.kernels

    for name in ("Model", "ModelConfig", "Tokenizer", "Trainer", "TrainConfig", "TrainStep", "load", "save"):
        assert getattr(cllm, name) is not None
    for name in (
        "attention",
        "feed_forward",
        "rms_norm",
        "layer_norm",
        "rotary",
        "linear_cross_entropy",
        "cross_entropy",
        "softmax",
        "embedding",
        "matmul",
        "adamw_",
    ):
        assert callable(getattr(cllm.kernels, name))
    with pytest.raises(AttributeError, match="nothing_like_this"):
        cllm.nothing_like_this  # noqa: B018


def test_every_module_imports_from_the_built_wheel(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("cllm-*.whl")
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, system_site_packages=False)
    site = next(environment.glob("lib/python*/site-packages"))
    # The dependencies come from the environment that runs the tests; only cllm itself must come from the wheel.
    here = next(Path(p) for p in sys.path if p.endswith("site-packages") and Path(p, "torch").exists())
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    modules = sorted(
        "cllm." + str(path.relative_to(ROOT)).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if path.parts[len(ROOT.parts)] != "cllm"
        else str(path.relative_to(ROOT)).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for top in ("runtime", "kernels", "cllm")
        for path in (ROOT / top).rglob("*.py")
        if not (top == "cllm" and path.relative_to(ROOT / "cllm").parts[0] in ("kernels", "runtime"))
    )
    modules = [m for m in modules if m != "cllm.__main__"]
    code = f"""
import sys, importlib
sys.path.append({str(here)!r})
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
for name in {modules!r}:
    importlib.import_module(name)
import cllm
assert {str(site)!r} in cllm.__file__, cllm.__file__
"""
    result = subprocess.run([str(environment / "bin/python"), "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
