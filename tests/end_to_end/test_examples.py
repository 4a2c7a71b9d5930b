"""Every example does what it says, as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path

from command import PATIENCE

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*words: object, cwd: Path, path: Path | None = None) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if path is not None:
        variables["PATH"] = f"{path}{os.pathsep}{variables['PATH']}"
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_training_loop_learns_and_saves_a_model(text, tmp_path):
    printed = run(sys.executable, EXAMPLES / "train_loop.py", text / "bisect.py", "--steps", 12, cwd=tmp_path)
    first, last = (float(line.split("loss")[1].split()[0]) for line in printed.splitlines() if line.startswith("step"))
    assert last < first and "validation: loss" in printed and (tmp_path / "model.cllm").exists()


def test_the_profile_names_backend_and_times_and_writes_a_trace(tmp_path):
    printed = run(sys.executable, EXAMPLES / "profile_kernel.py", "--rows", 64, "--columns", 64, "--rounds", 3, cwd=tmp_path)
    assert "softmax on cpu: numba" in printed and "on backend numba" in printed and (tmp_path / "trace.json").stat().st_size > 100


def test_the_chats_are_taught_and_a_question_is_answered(text, tmp_path):
    command = tmp_path / "bin" / "cllm"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cllm "$@"\n')
    command.chmod(0o755)
    printed = run("sh", EXAMPLES / "chats" / "run.sh", text / "bisect.py", tmp_path / "out", 6, cwd=tmp_path, path=command.parent)
    assert "cllm chat" in printed and (tmp_path / "out" / "chat" / "checkpoints" / "latest").exists()


def test_the_kernel_of_ones_own_passes_its_tests(tmp_path):
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLES / "own_kernel" / "test_squared_relu.py", cwd=tmp_path)
