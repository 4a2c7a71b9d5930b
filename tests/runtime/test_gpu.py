"""What is known of a GPU without one: occupancy and grids by arithmetic, described devices, rates measured once."""

import ast
import dataclasses
import subprocess
import sys

import pytest
import torch

from cllm import runtime
from cllm.runtime import gpu, tuning


def test_a_described_gpu_holds_within_its_scope_alone():
    cpu = torch.device("cpu")
    assert gpu.gpu_of(cpu) is gpu.INTERPRETED
    with gpu.described(gpu.DESCRIBED["h200"]) as outer:
        assert gpu.gpu_of(cpu) is outer and outer.is_hopper
        with gpu.described(gpu.DESCRIBED["a100"]):
            assert not gpu.gpu_of(cpu).is_hopper
        assert gpu.gpu_of(cpu) is outer
    assert gpu.gpu_of(cpu) is gpu.INTERPRETED


def test_bf16_tiles_are_known_by_the_generation_of_the_gpu():
    place = torch.device("cuda")
    for old, multiplies in ((75, False), (80, True), (90, True)):
        with gpu.described(dataclasses.replace(gpu.DESCRIBED["a100"], arch=old)):
            assert gpu.multiplies_bf16(place) is multiplies
    with gpu.described(dataclasses.replace(gpu.DESCRIBED["a100"], arch=90, vendor="amd")):
        assert gpu.multiplies_bf16(place)


def test_a_grid_is_never_empty_and_never_larger_than_the_work():
    h200 = gpu.DESCRIBED["h200"]
    assert [h200.persistent_blocks(tiles, 2) for tiles in (0, 1, 263, 264, 10**6)] == [1, 1, 263, 264, 264]
    assert dataclasses.replace(h200, num_sms=1).persistent_blocks(10**6) == 1


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    kept = {"fp32": 50_000.0, "bf16": 700_000.0, "fp16": 690_000.0, "copy": 4_000.0}
    seen = []
    monkeypatch.setattr(tuning, "remembered", lambda key, measure, valid: seen.append((key, valid(kept), valid({"fp32": 1.0}))) or kept)
    assert gpu.measured_rates(torch.device("cuda", 0)) == kept
    ((key, good, partial),) = seen
    assert "a GPU" in key and torch.__version__ in key and good and not partial


SETTINGS = {
    "none": ("pass", False),
    "allow_tf32": ("matmul.allow_tf32 = True", True),
    "set_float32_matmul_precision": ("torch.set_float32_matmul_precision('high')", True),
    "highest": ("torch.set_float32_matmul_precision('highest')", False),
    "fp32_precision": ("matmul.fp32_precision = 'tf32'", True),
    "fp32_precision of everything": ("torch.backends.fp32_precision = 'tf32'", True),
    "ieee": ("matmul.fp32_precision = 'ieee'", False),
    "old, then new": ("matmul.allow_tf32 = True; matmul.fp32_precision = 'ieee'", False),
    "new, then old": ("matmul.fp32_precision = 'tf32'; matmul.allow_tf32 = False", False),
}
ASKED = """
import sys, torch
from cllm.kernels.triton.matmul import precision_of
from cllm.runtime import gpu
matmul, found = torch.backends.cuda.matmul, []
before = matmul.fp32_precision
for change in sys.argv[1:]:
    exec(change)
    found.append((gpu.allows_tf32(), *map(precision_of, (torch.float32, torch.bfloat16, torch.float16))))
    torch.backends.fp32_precision = matmul.fp32_precision = "none"
print(found)
"""


def test_tf32_is_allowed_by_any_of_torchs_settings_and_reading_them_never_raises():
    """In a process of its own: torch has no way back to where neither the older nor the newer settings were used."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", ASKED, *(change for change, _ in SETTINGS.values())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [(allowed, "tf32" if allowed else "ieee", "tf32", "tf32") for _, allowed in SETTINGS.values()]
    assert ast.literal_eval(done.stdout) == expected


def test_only_float32_asks_for_torchs_setting(monkeypatch):
    matmul = pytest.importorskip("cllm.kernels.triton.matmul")
    monkeypatch.setattr(matmul, "allows_tf32", lambda: pytest.fail("asked"))
    assert matmul.precision_of(torch.bfloat16) == matmul.precision_of(torch.float16) == "tf32"


def test_gluon_is_for_attention_on_hopper():
    from cllm.kernels._register import backend_serves

    shapes = ((1, 64, 4, 128), (1, 64, 4, 128))
    with gpu.described(gpu.DESCRIBED["h200"]):
        assert backend_serves("attention", "gluon", shapes, torch.bfloat16, "cuda")
        assert not backend_serves("attention", "gluon", shapes, torch.float32, "cuda")
        assert not backend_serves("attention", "gluon", ((1, 64, 4, 80),), torch.bfloat16, "cuda")
        assert not backend_serves("softmax", "gluon", shapes, torch.bfloat16, "cuda")
        plan = runtime.plan("attention", shapes, torch.bfloat16, "cuda")  # nothing was measured: the kernels that the interpreter could prove
        assert plan.backend == "triton" and "gluon" in dict(plan.rejected)
    with gpu.described(gpu.DESCRIBED["a100"]):
        assert not backend_serves("attention", "gluon", shapes, torch.bfloat16, "cuda")
