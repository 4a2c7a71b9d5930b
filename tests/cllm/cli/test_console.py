"""What a command prints reaches any terminal, file or pipe, or fails in one clear line."""

import json
import os
import subprocess
import sys

import pytest

BEGIN = "from cllm.cli.console import *; from cllm.runtime.errors import UserError; from cllm.cli.app import main; import sys; prepare_streams(); "
TEXTS = ("caf\u00e9", "\u4e2d\u6587 \u20ac \U0001f600", "half an emoji \ud83d", "name\udcff.txt")
ENCODINGS = (
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "cp1252:strict"},
    {"PYTHONIOENCODING": "utf-8"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "POSIX"},
)


def python(script, environment=None, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run([sys.executable, "-c", BEGIN + script], env={**os.environ, **(environment or {})}, timeout=300, **options)


@pytest.mark.parametrize("environment", ENCODINGS, ids=lambda each: " ".join(f"{key}={value}" for key, value in each.items()))
def test_no_text_is_too_much_for_an_encoding(environment):
    script = "\n".join(f"out.print({text!a}); out.write({text!a}); sys.stderr.write({text!a})" for text in TEXTS)
    for as_json in (False, True):
        ran = python(f"out = open_console({as_json})\n{script}\nout.result({{'texts': {TEXTS!a}}}); out.error(UserError({TEXTS[1]!a}))", environment)
        assert ran.returncode == 0, ran.stderr
        if as_json:
            assert json.loads(ran.stdout.decode("ascii"))["texts"] == list(TEXTS)
        else:
            assert b"caf\\xe9" in ran.stdout or "caf\u00e9".encode(environment.get("PYTHONIOENCODING", "utf-8").partition(":")[0]) in ran.stdout


@pytest.mark.parametrize("errors", ["ascii", "utf-8"])
def test_the_progress_lines_of_rich_and_others_survive_too(errors):
    script = "from rich.console import Console; Console(file=sys.stderr, force_terminal=True).print('\u4e2d \u2501 \\udcff')"
    script += "; import logging; logging.error('\u4e2d')"
    assert python(script, {"PYTHONIOENCODING": errors}).returncode == 0


def test_a_result_holds_no_number_that_json_does_not_know():
    ran = python("open_console(True).result({'loss': float('nan'), 'rows': [(1.5, float('inf'))], 'place': __import__('pathlib').Path('a')})")
    assert json.loads(ran.stdout) == {"loss": "nan", "rows": [[1.5, "inf"]], "place": "a"}


def test_escape_codes_reach_a_file_but_no_terminal():
    text = "a\x1b[31mb\x07"
    script = f"out = open_console(False); out.print({text!r}); out.write({text!r})"
    assert python(script).stdout == b"a\\x1b[31mb\\x07\n" + text.encode()
    inside, outside = os.openpty()
    ran = python(script, stdout=outside)
    os.close(outside)
    assert ran.returncode == 0 and os.read(inside, 100) == b"a\\x1b[31mb\\x07\r\na\\x1b[31mb\\x07"
    os.close(inside)


FAILS = "from cllm.cli import app\ndef run(*a, **k):\n    out = open_console({}, {}); out.print('one'); out.print('two'); out.result({{'a': 1}})\n"
FAILS += "app.typer.main.get_command = lambda each: run\nmain([])"


@pytest.mark.parametrize(
    ("as_json", "needs_reader", "status", "words"),
    [(False, True, 1, "no space left"), (True, True, 1, "no space left"), (False, False, 0, "goes on without it"), (True, False, 1, "no space left")],
)
def test_a_full_disk_under_stdout_is_one_line(as_json, needs_reader, status, words):
    with open("/dev/full", "w") as full:
        ran = python(FAILS.format(as_json, needs_reader), stdout=full)
    assert ran.returncode == status and words in ran.stderr.decode() and ran.stderr.lower().count(b"standard output") == 1
    assert b"Traceback" not in ran.stderr and b"Exception ignored" not in ran.stderr


@pytest.mark.parametrize(("needs_reader", "status", "words"), [(True, 141, ""), (False, 0, "broken pipe")])
def test_a_reader_that_went_away_ends_a_command_quietly_but_not_a_training(needs_reader, status, words):
    reading, writing = os.pipe()
    os.close(reading)
    ran = python(FAILS.format(False, needs_reader), stdout=writing)
    os.close(writing)
    assert ran.returncode == status and words in ran.stderr.decode() and (words or not ran.stderr), ran.stderr


def test_messages_that_nobody_can_read_stop_nothing():
    script = (
        "sys.stderr.write('x' * 100_000 + '\\n'); from cllm.runtime import progress\nwith progress.track(range(3), 3, 'a') as _: pass"
        if False
        else ""
    )
    script = "from cllm.runtime import progress\nfor _ in range(3): progress.say('x' * 50_000)\nlist(progress.track(range(3), 3, 'a')); print('done')"
    with open("/dev/full", "w") as full:
        assert python(script, stderr=full).stdout == b"done\n"
    reading, writing = os.pipe()
    os.close(reading)
    assert python(script, stderr=writing).stdout == b"done\n"
    os.close(writing)


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_streams_that_were_closed_are_no_error_and_no_file_takes_their_place(closed, tmp_path):
    script = f"out = open_console(False); f = open({str(tmp_path / 'file')!r}, 'w'); out.print('x'); sys.stderr.write('y'); "
    script += "list(standard_input()); out.error(UserError('z'))"
    command = f'exec "$0" -c "$1" {closed}'
    ran = subprocess.run(["sh", "-c", command, sys.executable, BEGIN + script], stdin=subprocess.DEVNULL, timeout=300)
    assert ran.returncode == 0 and (tmp_path / "file").read_text() == ""


def test_input_that_is_no_text_is_named():
    script = "from cllm.cli import app\ndef run(*a, **k): print(list(standard_input()))\napp.typer.main.get_command = lambda each: run\nmain([])"
    for environment in ({}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}):
        ran = subprocess.run(
            [sys.executable, "-c", BEGIN + script], env={**os.environ, **environment}, input=b"ab\xff\n", capture_output=True, timeout=300
        )
        assert ran.returncode == 1 and b" standard input holds the byte 0xff, which is no " in ran.stderr and ran.stderr.count(b"\n") == 1


@pytest.mark.parametrize("error", ["MemoryError()", "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried to allocate 9 bytes')"])
def test_too_little_memory_is_one_line(error):
    ran = python(f"from cllm.cli import app\ndef run(*a, **k): raise {error}\napp.typer.main.get_command = lambda each: run\nmain([])")
    assert ran.returncode == 1 and ran.stderr.startswith(b"error: out of memory. Use a smaller model") and ran.stderr.count(b"\n") == 1
