"""What is installed: a light import, a wheel that holds every module, one package with three layers side by side."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_importing_cllm_and_loading_a_model_import_little_compile_nothing_and_open_no_socket(tmp_path):
    code = """
import socket, sys, time, json
def refuse(*args, **kwargs): raise AssertionError("a socket was opened")
socket.socket.connect = refuse
import cllm, cllm.runtime, cllm.kernels
print(json.dumps(sorted(m for m in ("numba", "llvmlite", "transformers", "tokenizers", "triton", "cupy", "tensorboardX") if m in sys.modules)))
from cllm import Model, ModelConfig, load, save
save(Model(ModelConfig(vocab_size=20, embed_dim=8, num_layers=1, num_heads=1, max_seq_len=8)), sys.argv[1])
model, _ = load(sys.argv[1])
assert "sympy" not in sys.modules, "loading a model must not import what only PyTorch's compiler needs: it takes as long as all of CLLM"
assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model.cllm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution of this checkout, and the wheel that is built from it alone: (sdist, wheel)."""
    folder = tmp_path_factory.mktemp("built")
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "results", "tests")
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=left_out)
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder], cwd=folder / "checkout", check=True, capture_output=True)
    (sdist,) = folder.glob("cllm-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, sdist]
    subprocess.run(pip, check=True, capture_output=True, cwd=folder)
    (wheel,) = folder.glob("cllm-*.whl")
    return sdist, wheel


def test_the_version_stands_in_one_place_and_the_wheel_carries_it(built):
    import cllm

    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert [each.name.split("-")[1].removesuffix(".tar.gz") for each in built] == [cllm.__version__] * 2


def modules() -> list[str]:
    """Every module of the checkout by its name in the package."""
    found = []
    for top in ("runtime", "kernels", "cllm"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] not in (("cllm", "kernels"), ("cllm", "runtime")) and parts != ("cllm", "__main__"):
                name = ".".join(parts if top == "cllm" else ("cllm", *parts)).removesuffix(".__init__")
                found.append(name)
    return found


def test_what_is_built_installs_in_a_fresh_environment_and_every_module_imports_and_the_command_runs(built, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, system_site_packages=False)
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "--quiet", "--no-deps", "--no-index", built[1]]
    subprocess.run(pip, check=True, capture_output=True)
    # The dependencies come from the environment that runs the tests, where cllm itself is a link that a search path does not follow.
    dependencies = next(path for path in sys.path if path.endswith("site-packages") and Path(path, "torch").exists())
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": dependencies}
    (tmp_path / "elsewhere").mkdir()
    code = f"""
import importlib
for name in {modules()!r}:
    importlib.import_module(name)
import cllm
assert cllm.__file__.startswith({str(environment)!r}), cllm.__file__
model, tokenizer = cllm.load("sample")
assert model.config.vocab_size >= tokenizer.vocab_size > 256
from cllm.cli.app import main
main(["explain", "softmax", "64x64", "--json"])
"""
    explained, version = (
        subprocess.run([environment / "bin" / name, *words], capture_output=True, text=True, cwd=tmp_path / "elsewhere", env=variables)
        for name, words in (("python", ("-c", code)), ("cllm", ("--version",)))
    )
    assert explained.returncode == 0, explained.stderr
    assert json.loads(explained.stdout)["op"] == "softmax"
    assert version.stdout.startswith("cllm "), version.stderr


def test_the_source_distribution_holds_what_its_readme_speaks_of(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "examples/demo.toml", "cllm/kernels/softmax.py"} <= names
    assert {"cllm/checkpoint/sample.cllm", "examples/production/sample.md"} <= names
