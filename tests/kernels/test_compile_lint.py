"""Every kernel that can be launched compiles for every kind of GPU, without spills and with the right matrix instructions; no GPU is needed."""

import dataclasses
import json
from pathlib import Path

import pytest
from command import python

pytest.importorskip("triton")

from cllm.kernels import inspection
from cllm.kernels.inspection import Build, complaints
from cllm.runtime.gpu import DESCRIBED

SCRIPT = Path(__file__).resolve().parents[2] / "profiling" / "compile_lint.py"
GOOD = Build(
    "a_kernel", "sm_90", "a call", "BLOCK=64 w4 s2", registers=128, shared_bytes=64 << 10, num_warps=4, occupancy=3, wgmma=8, narrowest_wgmma=64
)


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("gpus", "dtypes", "extent"),
    [
        pytest.param(["h200"], ["bfloat16"], ["--few"], id="sm_90"),
        pytest.param(["a100"], ["float32"], ["--largest"], id="sm_80"),
        pytest.param(list(DESCRIBED), ["bfloat16", "float16", "float32"], [], id="all", marks=pytest.mark.slow),
    ],
)
def test_every_launch_compiles_without_complaints(gpus, dtypes, extent):
    """Each kernel for two kinds of GPU, in one dtype each; fp16 compiles like bf16. Every combination: --slow, or profiling/compile_lint.py"""
    chosen = (word for option, names in (("--gpu", gpus), ("--dtype", dtypes)) for name in names for word in (option, name))
    done = python(SCRIPT, *extent, *chosen, "--json")
    assert done.status == 0, done.err[-6000:] or done.out[-2000:]
    builds = json.loads(done.out.splitlines()[-1])
    for module in inspection.MODULES:
        for gpu in (DESCRIBED[name] for name in gpus):
            if module.startswith("gluon.") and not gpu.is_hopper:
                continue
            targets = {build["target"] for build in builds if build["call"].startswith(f"{module}:")}
            assert f"sm_{gpu.arch}" in targets, f"{module} launches nothing on {gpu.name}"
    print(f"{len(builds)} builds without a complaint")


def test_few_launches_still_show_each_kernel_every_value_that_any_launch_has():
    found = list(inspection.find_launches(DESCRIBED["h200"], ("attention", "norm", "gluon.attention_forward")))
    few = inspection.covering(found)

    def met(launches):
        seen = set()
        for _, launch in launches:
            options = [("warps", launch.num_warps), ("stages", launch.num_stages)]
            seen |= {(launch.kernel, str(each)) for each in (*launch.constants, *launch.signature, *options)}
        return seen

    assert met(few) == met(found) and len(few) < len(found) / 3


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"spill_bytes": 8}, "8 bytes of registers spilled"),
        ({"shared_bytes": 240 << 10}, "a block has 232448"),
        ({"occupancy": 0}, "not one block fits"),
        ({"mma": 4, "wgmma": 0}, "not wgmma"),
        ({"warnings": ("C7515: serialised",)}, "C7515"),
        ({"narrowest_wgmma": 16}, "a wgmma of 16 columns"),
        ({"exponentials": (66, 1)}, "1 exponentials wait for products"),
        ({"kernel": "attention_forward_kernel", "options": "KEYS=128, SOFTCAP=False w4 s2", "exponentials": (264, 133)}, "133 exponentials wait"),
        ({"kernel": "attention_forward_kernel", "options": "KEYS=64, SOFTCAP=True w4 s2", "exponentials": (264, 133)}, "133 exponentials wait"),
        ({"findings": ("R240 behind USETMAXREG 0xe8",)}, "R240 behind"),
        ({"error": "CompilationError: line 3"}, "does not compile: CompilationError"),
    ],
)
def test_what_is_wrong_with_a_build_is_said(changes, complaint):
    assert complaints(GOOD, DESCRIBED["h200"]) == []
    assert any(complaint in each for each in complaints(dataclasses.replace(GOOD, **changes), DESCRIBED["h200"]))


def test_the_first_softmax_of_a_tile_has_nothing_to_run_beside():
    forward = dataclasses.replace(GOOD, kernel="attention_forward_kernel", options="KEYS=128, SOFTCAP=False w4 s2", exponentials=(264, 132))
    assert complaints(forward, DESCRIBED["h200"]) == []
    capped = dataclasses.replace(forward, options="KEYS=64, SOFTCAP=True w4 s2")
    assert complaints(capped, DESCRIBED["h200"]) == []


def test_occupancy_is_the_tightest_of_the_limits():
    h200 = DESCRIBED["h200"]
    assert h200.occupancy(32, 0, 4) == 16  # 2048 threads
    assert h200.occupancy(128, 0, 4) == 4  # 65536 registers
    assert h200.occupancy(32, 100 << 10, 4) == 2  # 228 KiB of shared memory
    assert h200.occupancy(255, 0, 16) == 0  # a block that has too many registers
    assert h200.persistent_blocks(1000, 2) == 264 and h200.persistent_blocks(7) == 7
