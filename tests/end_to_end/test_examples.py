"""Every example does what it says, as a user would run it."""

import os
import subprocess
import sys
import threading
import zlib
from contextlib import contextmanager
from pathlib import Path

from command import PATIENCE, Ran, cllm, python

EXAMPLES = Path(__file__).parents[2] / "examples"

# Hands a command over to the tests, and waits for what became of it.
ASK = """#!/bin/sh
place=$(mktemp -d "{asked}/XXXXXX")
mkfifo "$place/status"
if [ "$1" = chat ]; then cat >"$place/in"; else : >"$place/in"; fi
printf '%s\\0' "$PWD" "$@" >"$place/words"
mkdir "$place/ready"
read -r status <"$place/status"
cat "$place/out"
cat "$place/err" >&2
exit "$status"
"""


@contextmanager
def commands(folder: Path):
    """A folder for PATH: `cllm` there runs in a process forked from one with the libraries imported, as all commands of the tests do."""
    asked, found = folder / "asked", folder / "bin"
    for each in (asked, found):
        each.mkdir()
    for name, script in (("cllm", ASK.format(asked=asked)), ("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')):
        (found / name).write_text(script)
        (found / name).chmod(0o755)
    ends, done = threading.Event(), set()

    def answer() -> None:
        while not ends.wait(0.01):
            for place in asked.iterdir():
                if place in done or not (place / "ready").exists():
                    continue
                done.add(place)
                cwd, *words = (place / "words").read_text().split("\0")[:-1]
                try:
                    ran = cllm(*words, cwd=Path(cwd), stdin=(place / "in").read_text())
                except AssertionError as error:  # a traceback
                    ran = Ran(70, "", str(error))
                (place / "out").write_text(ran.out)
                (place / "err").write_text(ran.err)
                (place / "status").write_text(f"{ran.status}\n")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield found
    finally:
        ends.set()
        thread.join()


def run(*words: object, cwd: Path, path: Path | None = None, **more: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | more
    if path is not None:
        variables["PATH"] = f"{path}{os.pathsep}{variables['PATH']}"
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(name: str, *words: object, cwd: Path) -> str:
    done = python(EXAMPLES / name, *words, cwd=cwd)
    assert done.status == 0, done.err
    return done.out


def test_the_training_loop_learns_and_saves_a_model(text, tmp_path):
    printed = script("train_loop.py", text / "bisect.py", "--steps", 12, cwd=tmp_path)
    first, last = (float(line.split("loss")[1].split()[0]) for line in printed.splitlines() if line.startswith("step"))
    assert last < first and "validation: loss" in printed and (tmp_path / "model.cllm").exists()


def test_the_profile_names_backend_and_times_and_writes_a_trace(tmp_path):
    printed = script("profile_kernel.py", "--rows", 64, "--columns", 64, "--rounds", 3, cwd=tmp_path)
    assert "softmax on cpu: numba" in printed and "on backend numba" in printed and (tmp_path / "trace.json").stat().st_size > 100


def test_the_chats_are_taught_and_a_question_is_answered(text, tmp_path):
    with commands(tmp_path) as path:
        printed = run("sh", EXAMPLES / "chats" / "run.sh", text / "bisect.py", tmp_path / "out", 6, cwd=tmp_path, path=path)
    assert "cllm chat" in printed and (tmp_path / "out" / "chat" / "checkpoints" / "latest").exists()


def test_the_way_of_the_production_run_leads_from_files_to_a_measured_model_and_a_chat(text, tmp_path):
    small = "--steps 6 --embed-dim 32 --num-layers 1 --num-heads 2 --seq-len 256 --batch-size 4"
    with commands(tmp_path) as path:
        words = ("sh", EXAMPLES / "production" / "run.sh", text, tmp_path / "out", "code")
        printed = run(*words, cwd=tmp_path, path=path, TRAIN=small, SAMPLES="2", CHAT_STEPS="1", THREADS="2")
    for words in ("every 20th is held out", "| bits per byte |", "functions written behind their headers", "the next line in the middle"):
        assert words in printed, words
    out = tmp_path / "out"
    assert {each.name for each in out.iterdir()} >= {"held-out", "corpus", "run", "model.cllm", "model-hf", "chat"} and (
        out / "run/report.html"
    ).exists()
    held = {each.relative_to(out / "held-out") for each in (out / "held-out").rglob("*.py")}
    assert held and not any((out / "text" / each).exists() for each in held)


def test_what_a_megabyte_costs_is_measured_from_text_to_tokens(text, tmp_path):
    with commands(tmp_path) as path:
        printed = run(sys.executable, EXAMPLES / "production" / "sizes.py", text, tmp_path / "work", 0.2, cwd=tmp_path, path=path)
    head, _, row = printed.splitlines()
    assert head.count("|") == row.count("|") == 9 and 0.05 < float(row.split("|")[1]) < 0.5


def test_novels_come_out_of_the_data_of_an_r_package(tmp_path):
    lines = ["A NOVEL", "", "CHAPTER I", "", "It was _late_", "in autumn.", "", *(["Nothing", "happened.", ""] * 60), "Chapter 2", "", "The end."]
    texts = b"".join(b"\0\x04\0\x09" + len(each).to_bytes(4, "big") + each.encode() for each in lines)
    serialised = b"X\n" + bytes(12) + (5).to_bytes(4, "big") + b"UTF-8" + bytes(3) + b"\x10" + len(lines).to_bytes(4, "big") + texts
    (tmp_path / "data.rdb").write_bytes(2 * (len(serialised).to_bytes(4, "big") + zlib.compress(serialised)))
    script("production/novels.py", tmp_path / "data.rdb", tmp_path / "novels", cwd=tmp_path)
    chapters = [each.read_text() for each in sorted((tmp_path / "novels" / "a-novel").iterdir())]
    assert chapters == ["It was late in autumn." + 60 * "\n\nNothing happened." + "\n", "The end.\n"]


def test_the_kernel_of_ones_own_passes_its_tests(tmp_path):
    words = ("-q", "-p", "no:cacheprovider", EXAMPLES / "own_kernel" / "test_squared_relu.py")
    done = python("-c", "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))", *words, cwd=tmp_path)
    assert done.status == 0, done.out
