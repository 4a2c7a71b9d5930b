"""The code for a GPU on devices that are not there: nothing waits, mixes devices, races or touches another GPU, and the results are the CPU's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU the same code runs there, in tests/gpu", allow_module_level=True)

HERE = Path(__file__).parent
SCENARIOS = ["rules", "train_llama", "train_gpt2", "use_the_model", "harness", "rivals", "command_line"]


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


def run(library, scenario, folder):
    code = "import sys; from gpu_emulation import device; device.load(sys.argv[1]); from gpu_emulation import scenarios; from pathlib import Path; "
    code += "getattr(scenarios, sys.argv[2])(Path(sys.argv[3]))"
    paths = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    settings = {"TRITON_INTERPRET": "1", "CLLM_THREADS": "1", "OMP_NUM_THREADS": "1", "CLLM_CACHE_DIR": str(folder / "cache")}
    environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code, library, scenario, folder]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_on_a_gpu_that_is_not_there(scenario, library, tmp_path):
    if scenario == "harness":
        pytest.importorskip("lm_eval")
    done = run(library, scenario, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
