"""The GPU's tools without a GPU: the suite runs through on the interpreter, the compile check prints its table, the documentation's commands work."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from command import python

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]


def test_the_suite_runs_through_on_the_interpreter_and_claims_nothing(tmp_path):
    done = python("profiling/gpu_suite.py", "--tiny", "--out", tmp_path, cwd=ROOT)
    assert done.status == 0, done.err[-4000:]
    state = json.loads((tmp_path / "gpu-tiny.json").read_text())
    order = ["about", "versions", "captured", "optimizer", "accuracy", "hopper", "instrumented", "determinism", "training", "gpu"]
    assert list(state) == [*order, "ceilings", "operations", "steps"]
    assert not [name for name, found in state.items() if "failed" in found]
    for name in ("optimizer", "accuracy"):
        ended = "after all tests had passed" in state[name].get("note", "")  # a library aborted at the very end
        assert (state[name]["status"] == 0 or ended) and state[name]["tests"] > state[name]["skipped"]
    assert state["determinism"]["bitwise"] is True and state["training"]["largest difference"] < 1e-3
    rows = state["operations"]["rows"]
    assert len(rows) >= 14 and all(row["ms"] is None and row["ratio"] is None and row["met"] is None for row in rows)
    for word in ("attention", "feed-forward", "linear cross entropy", "rms_norm", "layer_norm", "softmax", "rotary", "cross entropy", "AdamW"):
        assert any(word in row["name"] for row in rows), word
    table = (tmp_path / "gpu-tiny.md").read_text()
    assert table in done.out and "not measured" in table and not re.search(r"\| yes \||\| no \|", table)


def test_without_a_gpu_it_says_what_to_do():
    import torch

    if not torch.cuda.is_available():
        done = python("profiling/gpu_suite.py", cwd=ROOT)
        assert done.status == 2 and "there is no GPU here. python profiling/gpu_suite.py --tiny" in done.err


def test_the_compile_check_prints_what_the_compiler_made_of_each_kernel():
    done = python("profiling/compile_lint.py", "--gpu", "h200", "--few", "softmax", "--json", cwd=ROOT)
    assert done.status == 0, done.err[-4000:]
    builds = json.loads(done.out.splitlines()[-1])
    assert builds and all(build["registers"] > 0 and build["occupancy"] > 0 and not build["complaints"] for build in builds)
    assert "softmax_forward_kernel" in done.out and "0 with complaints" in done.out


def test_the_gpu_commands_of_the_documentation_are_these():
    page = (ROOT / "docs" / "guides" / "profiling.md").read_text().partition("## GPU kernels without a GPU")[2]
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert [words for words in lines if "profiling/" in " ".join(words)] == [
        ["python", "profiling/compile_lint.py", "--gpu", "h200", "--few", "softmax"],
        ["python", "profiling/gpu_suite.py", "--tiny"],
    ]  # both are run above


def test_one_kernel_is_profiled_in_the_five_lines_of_the_readme_of_profiling():
    examples = re.findall(r"```py\n(.*?)```", (ROOT / "profiling/README.md").read_text(), re.DOTALL)
    (example,) = [text for text in examples if "kernels.attention" in text]
    done = python("-c", example, cwd=ROOT)
    assert done.status == 0 and "cllm::attention" in done.out and "attention on " in done.out, done.err
