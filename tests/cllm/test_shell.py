"""A command that is shown can be copied into a shell, whatever its words hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.runtime.printable import printable
from cllm.shell import command, program, quoted

WORDS = (
    "plain", "a b", "it's", 'say "x"', "$HOME", "`id`", "a;b", "a\nb", "a\tb", "~", "~root", "*", "#x", "!1", "\\", "a\\", "", "caf\u00e9", "\u4e2d",
    "\x1b[31m", "\u202e", "name\udcff.txt", "--help", "{a,b}", "a&&b", "x=y", "'", "''", "\r", "\\x41", "'\x07'",
)  # fmt: skip


def read_by_bash(line: str) -> list[bytes]:
    """The words that a shell makes of a line."""
    script = "printf '%s\\0' " + line
    return subprocess.run(["bash", "-c", os.fsencode(script)], capture_output=True, check=True).stdout.split(b"\0")[:-1]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_shell_reads_the_words_that_were_meant(encoding, monkeypatch):
    monkeypatch.setattr("cllm.shell.sys.stderr", type("Stream", (), {"encoding": encoding}))
    line = command(*WORDS)
    assert read_by_bash(line) == [b"cllm", *map(os.fsencode, WORDS)]
    assert printable(line) == line and "\n" not in line and (encoding == "utf-8" or line.isascii())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=50, max_size=100))
def test_a_shell_reads_any_text(words):
    assert read_by_bash(command(*words)) == [b"cllm", *map(os.fsencode, words)]


def test_a_path_is_never_an_option_and_simple_words_stay_readable():
    assert [quoted(Path(each)) for each in ("-run", "--out", "a/-b", ".", "/x")] == ["./-run", "./--out", "a/-b", ".", "/x"]
    assert (
        quoted("--out") == "--out"
        and command("generate", Path("runs/caf\u00e9"), "--prompt", "The ") == "cllm generate 'runs/caf\u00e9' --prompt 'The '"
    )


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Two environments that have a `cllm`, in folders that a shell has to quote; PATH leads to neither."""
    for name in ("my env", "other"):
        (tmp_path / name / "bin").mkdir(parents=True)
        for each in ("cllm", "python"):
            (tmp_path / name / "bin" / each).write_text("#!/bin/sh\n")
            (tmp_path / name / "bin" / each).chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_program_is_named_as_it_can_be_started_again(environment, monkeypatch):
    mine, other = environment / "my env" / "bin", environment / "other" / "bin"

    def shown(path, argv, orig):
        monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")
        monkeypatch.setattr(sys, "argv", [str(argv)])
        monkeypatch.setattr(sys, "orig_argv", [str(orig)])
        return program()

    monkeypatch.setattr(sys, "executable", str(mine / "python"))
    module = environment / "cllm" / "__main__.py"
    assert shown(mine, mine / "cllm", mine / "python") == "cllm"
    assert shown(mine, "my env/bin/cllm", mine / "python") == "cllm"
    assert shown("", "my env/bin/cllm", mine / "python") == "'my env/bin/cllm'"
    assert shown(other, "my env/bin/cllm", mine / "python") == "'my env/bin/cllm'"  # another one would answer
    assert shown(mine, module, "python") == "cllm"
    assert shown("", module, "my env/bin/python") == "'my env/bin/python' -m cllm"
    assert shown(other, module, "python3") == "python3 -m cllm"
    assert shown("", "train.py", "python") == shown("", "", "python") == shown(mine, "-c", "python") == "cllm"  # a program of somebody's own
