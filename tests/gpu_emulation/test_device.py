"""The code for a GPU on devices that are not there: nothing waits, mixes devices, races or touches another GPU, and the results are the CPU's."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import PATIENCE

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU the same code runs there, in tests/gpu", allow_module_level=True)

HERE = Path(__file__).parent
SCENARIOS = ["rules rivals", "train_llama train_muon", "train_gpt2", "use_the_model harness", "command_line"]  # a process for each, to save imports


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """`device.cpp`, for this PyTorch."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler, which builds the guard of the devices")
    built, torch_folder = tmp_path_factory.mktemp("device") / "device.so", Path(torch.__file__).parent
    places = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    flags = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    built_with = [compiler, *flags, "-o", built, HERE / "device.cpp", *places, "-lc10", "-ltorch_cpu"]
    done = subprocess.run(built_with, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


@pytest.mark.parametrize("names", SCENARIOS)
def test_on_a_gpu_that_is_not_there(names, library, tmp_path):
    scenarios = [each for each in names.split() if each != "harness" or importlib.util.find_spec("lm_eval")]
    code = "import sys; from gpu_emulation import device; device.load(sys.argv[1]); from gpu_emulation import scenarios; scenarios.run(*sys.argv[2:])"
    paths = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    settings = {"TRITON_INTERPRET": "1", "CLLM_THREADS": "1", "OMP_NUM_THREADS": "1", "CLLM_CACHE_DIR": str(tmp_path / "cache")}
    environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code, library, tmp_path, *scenarios]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split("\n")[-2] == f"ran {' '.join(scenarios)}"
