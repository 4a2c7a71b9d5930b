"""A command that is shown can be copied into a shell, whatever its words hold."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.runtime.printable import printable
from cllm.shell import command, quoted

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
