"""Files that are named on the command line: read where they can be read to an end, and refused by name where they might never end."""

import os
import threading
from pathlib import Path

import pytest
from command import cllm

from cllm.files import read_named

ENDLESS = ["pipe", "/dev/zero", "/dev/null"]


@pytest.fixture
def place(request, tmp_path, monkeypatch):
    """The endless thing of this name, seen from a folder that holds some text as well."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some words to learn from, " * 30)
    os.mkfifo("pipe")
    return request.param


@pytest.mark.parametrize("place", ENDLESS, indirect=True)
def test_what_might_never_end_is_refused(place):
    with pytest.raises(OSError, match=r"it is a (pipe that nothing is written to|device or a socket, not a file)"):
        read_named(place)


@pytest.mark.parametrize("content", [b"", b"short", bytes(300_000)])
def test_a_file_is_read_whole_and_so_is_a_pipe_with_a_writer(content, tmp_path):
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_bytes(content)
    assert read_named(file) == content
    reading, writing = os.pipe()  # as a shell's <(command) is one

    def write():
        with open(writing, "wb") as stream:
            stream.write(content)

    writer = threading.Thread(target=write)
    try:
        if content:
            writer.start()
            assert read_named(f"/dev/fd/{reading}") == content
    finally:
        os.close(reading)
        writer.join() if content else os.close(writing)
    for wrong in (pipe, tmp_path):
        with pytest.raises(OSError):  # the system's own words
            read_named(wrong)


def test_no_command_waits_for_a_pipe_without_a_writer(tmp_path):
    (tmp_path / "text.txt").write_text("some words to learn from, " * 30)
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "model" / "config.json")
    for arguments in [
        ("train", "pipe"),
        ("train", "text.txt", "--config", "pipe"),
        ("train", "text.txt", "--tokenizer", "pipe"),
        ("generate", "text.txt", "--prompt-file", "pipe"),
        ("tokenizer", "encode", "pipe", "words"),
        ("import", "model", "--out", "x.cllm"),
    ]:
        ran = cllm(*arguments, cwd=tmp_path)
        assert ran.status in (1, 2) and ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
        assert "pipe" in ran.err or "config.json" in ran.err


def test_what_needs_no_import_or_cannot_be_imported_is_named(tmp_path):
    (tmp_path / "m.cllm").write_bytes(b"weights")
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "my run" / "checkpoints").mkdir(parents=True)
    for given, said in [
        ("m.cllm", "m.cllm is a .cllm file already. Every command takes it as it is."),
        ("m.gguf", "m.gguf is a GGUF file, which CLLM writes and does not read."),
        ("my run", "my run is a run of CLLM. Write it as one file with: "),
        ("nothing", "nothing is not a folder. Expected a Hugging Face model folder"),
    ]:
        ran = cllm("import", given, "--out", "x.cllm", cwd=tmp_path)
        assert ran.status == 1 and ran.err.startswith(f"error: {said}") and ran.err.count("\n") == 1, ran.err
