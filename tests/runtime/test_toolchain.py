"""Without a C compiler or Python's headers no kernel runs on a GPU: said by name, and chosen around."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from command import TINY, python

from cllm import runtime
from cllm.runtime import device, toolchain

GPU = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_properties = lambda index: type("Properties", (), {
    "name": "a GPU", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 1 << 37})()
from cllm.cli import main
main()
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """An empty PATH; programs(name, script) puts a program there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    toolchain._obstacle.cache_clear()

    def add(name: str, script: str) -> Path:
        (folder / name).write_text(f"#!{sys.executable}\n{script}\n")
        (folder / name).chmod(0o755)
        return folder / name

    return add


HERE = shutil.which("cc") or "cc"
COMPILES = f"import os, sys; os.environ['PATH'] = {os.environ['PATH']!r}; os.execv({HERE!r}, [{HERE!r}, *sys.argv[1:]])"
NO_STDLIB = "import sys; sys.stderr.write('launcher.c:2:10: fatal error: stdlib.h: No such file or directory\\n'); sys.exit(1)"


def test_a_machine_without_a_compiler_says_what_to_install(programs):
    assert toolchain.compiler() is None
    assert "no C compiler (gcc or clang) is installed" in toolchain.obstacle() and "apt install gcc python3-dev" in toolchain.obstacle()


@pytest.mark.parametrize("named", ["", "gcc -m64", "/nowhere/gcc", "a-compiler-that-nobody-has"])
def test_a_compiler_that_cc_names_and_that_is_not_there_is_told(programs, monkeypatch, named):
    """Triton runs CC as one program, without looking for another."""
    programs("gcc", COMPILES)
    monkeypatch.setenv("CC", named)
    assert f"CC names {named!r}" in toolchain.obstacle()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (NO_STDLIB, "stdlib.h: No such file or directory"),
        ("import sys; sys.exit(3)", "status 3"),
        ("import sys; sys.stderr.buffer.write(b'error: \\xff\\n'); sys.exit(1)", "error:"),
    ],
)
@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_a_compiler_that_does_not_work_is_told_with_its_error(programs, name, script, said):
    programs(name, script)
    assert f"{name}, with which Triton" in toolchain.obstacle() and said in toolchain.obstacle()


def test_a_compiler_that_is_no_program_is_told(programs):
    programs("gcc", "").write_bytes(b"\x7fELF is not here")
    assert "cannot be run" in toolchain.obstacle() or "does not work" in toolchain.obstacle()


def test_without_python_h_its_folder_is_named(programs, monkeypatch, tmp_path):
    programs("gcc", COMPILES)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "include")})
    assert f"Python.h is not in {tmp_path / 'include'}" in toolchain.obstacle()


@pytest.mark.skipif(not (shutil.which("cc") and (toolchain.headers() / "Python.h").is_file()), reason="no compiler or no Python.h is here")
def test_where_both_are_there_nothing_is_in_the_way(programs, monkeypatch):
    compiler = programs("my-compiler", COMPILES)
    for name in ("my-compiler", str(compiler)):
        monkeypatch.setenv("CC", name)
        assert toolchain.obstacle() == ""


def test_a_gpu_that_cannot_be_used_is_chosen_around_and_told_once(programs, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device._warn_of_unused_gpu.cache_clear()
    for _ in range(2):
        assert device.resolve("auto")[0] == torch.device("cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the GPU is not used and everything runs on the CPU: no C compiler")
    with pytest.raises(runtime.UserError, match=r"--device cuda: no C compiler .*--device cpu"):
        device.resolve("cuda")


def test_the_commands_name_what_is_missing_and_go_on_without_it(programs, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    what = (tmp_path / "text.txt", "--out", tmp_path / "run", *TINY, "--steps", 1)
    asked = python("-c", GPU, "train", *what, "--device", "cuda", PATH=str(tmp_path / "bin"))
    assert asked.status == 2 and asked.err.count("\n") == 1 and "--device cuda: no C compiler" in asked.err
    chosen = python("-c", GPU, "train", *what, PATH=str(tmp_path / "bin"))
    assert chosen.status == 0 and chosen.err.count("warning: the GPU is not used and everything runs on the CPU: no C compiler") == 1
    doctor = python("-c", GPU, "doctor", PATH=str(tmp_path / "bin"))
    assert doctor.status == 0 and "missing: what a GPU's kernels need; everything runs on the CPU: no C compiler" in doctor.out
