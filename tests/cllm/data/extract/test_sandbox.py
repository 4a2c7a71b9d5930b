"""A file is read in a child process: whatever its bytes are, the process that asks lives on and reads the next file."""

import os
import signal
import socket
from pathlib import Path

import pytest

from cllm.data.extract.document import Unreadable
from cllm.data.extract.options import Options
from cllm.data.extract.sandbox import Sandbox

ROOT = Path(__file__).parents[4]
READER = """
import os, signal, socket, subprocess, sys, time
from cllm.data.extract.document import Document, Unreadable

def read(data, name, options):
    what = data.decode()
    if what.startswith("kill"): os.kill(os.getpid(), int(what.split()[1]))
    if what == "loop":
        while True: pass
    if what == "sleep": time.sleep(1000)
    if what == "allocate": return [Document(str(len(bytearray(1 << 40))))]
    if what == "grow":
        held = []
        while True: held.append(bytearray(1 << 20))
    if what == "recurse": return deep()
    if what == "raise": raise KeyError("no such thing\\nsecond line")
    if what == "refuse": raise Unreadable("encrypted (give its password)")
    if what == "print":
        print("noise" * 100000); sys.stderr.write("noise" * 100000); os.write(1, b"noise" * 10000)
        return [Document("printed")]
    if what == "exit": os._exit(0)
    if what == "connect":
        try: socket.create_connection(("127.0.0.1", int(name)), timeout=2)
        except OSError as error: return [Document(f"no network: {type(error).__name__}")]
        return [Document("connected")]
    if what == "program":
        try: subprocess.run(["true"])
        except OSError as error: return [Document(f"no program: {type(error).__name__}")]
        return [Document("ran")]
    if what == "write":
        try:
            with open(name, "w") as file: file.write("x" * 100000)
        except OSError: return [Document("no file")]
        return [Document("written")]
    if what == "large": return [Document("x" * (options.text_bytes + 1))]
    if what == "half": return [Document("\\ud800 half")]
    if what == "pid": return [Document(str(os.getpid()))]
    return [Document(what, title="a title")]

def deep():
    return deep()
"""


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A sandbox whose reader of text does what the text says."""
    (tmp_path / "sitecustomize.py").write_text(
        "from cllm.data.extract import readers\nimport sys\nreaders._MODULES['rtf'] = 'fake'\n"
        f"import types\nmodule = types.ModuleType('fake')\nexec({READER!r}, module.__dict__)\n"
        "sys.modules['cllm.data.extract.fake'] = module\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    monkeypatch.setattr("cllm.data.extract.sandbox._WALL", 1000)  # other tests may take the machine for as long as they like
    with Sandbox(Options(seconds=2, memory_bytes=1 << 29)) as found:
        yield found


def outcome(sandbox, what, name="a.rtf"):
    try:
        return [document.text for document in sandbox.documents(what.encode(), name, "rtf")]
    except Unreadable as error:
        return str(error)


def test_documents_come_back_as_they_were(sandbox):
    (document,) = sandbox.documents("grüße\0\n".encode(), "a.rtf", "rtf")
    assert (document.text, document.title) == ("grüße\0\n", "a title")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (f"kill {signal.SIGKILL}", "out of memory"),
        (f"kill {signal.SIGSEGV}", "damaged (the parser crashed"),
        (f"kill {signal.SIGABRT}", "damaged (the parser crashed"),
        ("loop", "time limit (more than 2 seconds)"),
        ("allocate", "out of memory"),
        ("grow", "out of memory"),
        ("recurse", "damaged (nested too deeply)"),
        ("raise", "damaged ('no such thing"),
        ("refuse", "encrypted (give its password)"),
        ("exit", "damaged"),
        ("large", "too large (more than 67.1 MB of text)"),
    ],
)
def test_a_file_that_ends_its_reader_costs_one_document_and_says_why(sandbox, what, reason):
    assert outcome(sandbox, "before") == ["before"]
    assert outcome(sandbox, what).startswith(reason)
    assert outcome(sandbox, "after") == ["after"]


def test_a_reader_that_sleeps_is_ended_by_the_clock(sandbox, monkeypatch):
    monkeypatch.setattr("cllm.data.extract.sandbox._WALL", 1)
    assert outcome(sandbox, "sleep").startswith("time limit")
    assert outcome(sandbox, "after") == ["after"]


def test_what_libraries_print_is_no_part_of_an_answer(sandbox):
    assert outcome(sandbox, "print") == ["printed"]


def test_halves_of_surrogate_pairs_become_replacement_characters(sandbox):
    assert outcome(sandbox, "half") == ["\ufffd half"]


def test_one_child_reads_many_files_whatever_its_parent_holds(sandbox):
    held = b"x" * (1 << 29)  # more than the child may have
    assert len({outcome(sandbox, "pid")[0] for _ in range(20)}) == 1
    del held


def test_after_a_crash_another_child_reads_on(sandbox):
    first = outcome(sandbox, "pid")
    assert outcome(sandbox, "exit").startswith("damaged")
    assert outcome(sandbox, "pid") != first


def test_readers_have_no_network_no_programs_and_write_no_files(sandbox, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert outcome(sandbox, "connect", str(server.getsockname()[1]))[0].startswith("no network")
    assert outcome(sandbox, "program")[0].startswith("no program")
    place = tmp_path / "written"
    assert outcome(sandbox, "write", str(place)) == ["no file"]
    assert not place.exists() or place.stat().st_size == 0


def test_the_child_ends_with_its_parent(sandbox):
    (pid,) = outcome(sandbox, "pid")
    sandbox.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
