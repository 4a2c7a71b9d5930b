"""On a machine with a GPU the kernel tests run there: with PyTorch made to believe in one, they are collected and their inputs are looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import PATIENCE

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
# A plugin of pytest, loaded before anything of the tests. "meta", where tensors have no values, then stands for the GPU that is not there.
PRETENDS = """
import json, sys
import torch

torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_properties = lambda index: type("Properties", (), {
    "name": "a GPU", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 1 << 37, "max_threads_per_multi_processor": 2048})()

skipped = []

def pytest_collectreport(report):
    if report.skipped:
        skipped.append(f"{report.nodeid}: {report.longrepr[-1]}")

def pytest_collection_finish(session):
    oracle, cases = sys.modules["cllm_kernel_oracle"], sys.modules["cllm_kernel_cases"]
    for item in session.items:
        skipped.extend(item.nodeid for mark in item.iter_markers("skipif") if mark.args[0])
    files = sorted({item.nodeid.partition("::")[0] for item in session.items})
    found = {"files": files, "skipped": skipped, "cases": len(cases.CASES), "device": oracle.DEVICE, "wrong": []}
    oracle.DEVICE = "meta"
    for case in cases.CASES:
        for backend in ("triton", "torch", "numba"):
            with oracle.runtime.use(backend=backend):
                tensors = case.make(oracle.Inputs(torch.bfloat16, torch.bfloat16))
            expected = "cpu" if backend == "numba" else oracle.DEVICE
            found["wrong"] += [f"{case} for {backend}: {name} is on {tensor.device}" for name, tensor in tensors.items()
                               if isinstance(tensor, torch.Tensor) and tensor.device.type != expected]
    open(FOUND, "w").write(json.dumps(found))
"""


def test_with_a_gpu_no_file_of_tests_is_left_out_and_every_case_is_made_on_it(tmp_path):
    (tmp_path / "a_gpu.py").write_text(f"FOUND = {str(tmp_path / 'found.json')!r}\n{PRETENDS}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    words = ["-p", "a_gpu", "-p", "no:cacheprovider", "--assert=plain", "--collect-only", "tests/kernels", "tests/gpu"]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["skipped"]
    files = [str(path.relative_to(ROOT)) for folder in ("kernels", "gpu") for path in sorted((ROOT / "tests" / folder).rglob("test_*.py"))]
    assert found["files"] == sorted(files)
    assert found["device"] == "cuda" and found["cases"] > 80 and not found["wrong"], found["wrong"][:20]
