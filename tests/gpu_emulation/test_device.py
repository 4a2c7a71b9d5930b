"""The code for a GPU on devices that are not there: nothing waits, mixes devices, races or touches another GPU, and the results are the CPU's."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import PATIENCE

from cllm.runtime import tuning

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU the same code runs there, in tests/gpu", allow_module_level=True)

HERE = Path(__file__).parent
HARNESS = " harness" if importlib.util.find_spec("lm_eval") else ""
SCENARIOS = ["rules rivals", "train_llama train_muon", "train_gpt2", f"use_the_model{HARNESS}", "command_line"]


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


# The device has to be there before torch is imported, which takes seconds: one process imports, and forks for each group of scenarios.
PROGRAM = """
import json, os, sys
from gpu_emulation import device
device.load(sys.argv[1])
from gpu_emulation import scenarios
statuses = {}
for names in sys.argv[3:]:
    if os.fork() == 0:
        print(f"-- {names}", file=sys.stderr, flush=True)
        scenarios.run(sys.argv[2], *names.split())
        sys.stdout.flush()
        os._exit(0)
    statuses[names] = os.wait()[1]
print(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def ran(library, tmp_path_factory):
    """(the status of each group of scenarios, what was printed, errors)."""
    folder = tmp_path_factory.mktemp("scenarios")
    (folder / "cache").mkdir()
    for kernels in tuning.cache_dir().glob("numba-*"):  # not what is measured, which is of another GPU here
        (folder / "cache" / kernels.name).symlink_to(kernels)
    paths = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    settings = {"TRITON_INTERPRET": "1", "CLLM_THREADS": "1", "OMP_NUM_THREADS": "1", "CLLM_CACHE_DIR": str(folder / "cache")}
    environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", PROGRAM, library, folder, *SCENARIOS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout, done.stderr


@pytest.mark.parametrize("names", SCENARIOS)
def test_on_a_gpu_that_is_not_there(names, ran):
    statuses, printed, said = ran
    assert statuses[names] == 0, said.partition(f"-- {names}\n")[2].partition("\n-- ")[0][-4000:]
    assert f"ran {names}\n" in printed
