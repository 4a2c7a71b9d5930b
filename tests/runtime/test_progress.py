"""Nothing is silent: lines, heartbeats, the watchdog."""

import io
import re
import subprocess
import sys
import time

import pytest
from command import PATIENCE

from cllm.runtime import progress


def wait_for(happened):
    until = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65, "1:05"), (7384, "2:03:04"), (3 * 86400 + 4 * 3600, "3d 4h")])
def test_durations_read_well(seconds, text):
    assert progress.duration(seconds) == text


def test_a_log_gets_lines_with_figures_share_and_eta():
    stream = io.StringIO()
    with progress.Progress(100, "working", log_seconds=0.0, stream=stream) as line:
        line.update(25, "loss 1.5")
        line.update(100, "loss 1.0")
    lines = stream.getvalue().splitlines()
    assert re.fullmatch(r"working  25%  loss 1.5  ETA \d+:\d\d", lines[0])
    assert re.fullmatch(r"working 100%  loss 1.0  in \d+:\d\d", lines[-1])


@pytest.mark.parametrize("terminal", [False, True])
def test_names_with_escape_codes_act_on_no_terminal(terminal, monkeypatch, capsys):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setenv("TERM", "xterm")
    with progress.Progress(3, "a\x07b", log_seconds=0.0, stream=stream) as line:
        line.update(2, "[red]c\x1b]0;d\x07[/nothing]")
        progress.say("e\x1b[31mf\udcff")
        time.sleep(0.3)
    progress.say("e\x1b[31mf\udcff")
    shown = stream.getvalue() + capsys.readouterr().err
    assert "\x07" not in shown and "\x1b]0" not in shown and "\x1b[31m" not in shown and "\udcff" not in shown
    assert r"a\x07b" in shown and "[/nothing]" in shown and shown.count(r"e\x1b[31mf\udcff") == 2


def test_a_resumed_progress_counts_only_what_it_did_itself():
    line = progress.Progress(100, "working", initial=90, stream=io.StringIO())
    line._started = time.monotonic() - 10
    line._done = 95.0
    assert line.eta_seconds() == pytest.approx(10, abs=0.5)


def test_the_line_beats_while_the_caller_is_busy():
    stream = io.StringIO()
    with progress.Progress(10, "busy", log_seconds=0.05, stream=stream) as line:
        line.update(1)
        wait_for(lambda: stream.getvalue().count("busy") >= 3)


def test_a_stage_tells_that_it_still_runs_and_says_nothing_when_it_is_short(capsys):
    said = ""

    def heard():
        nonlocal said
        said += capsys.readouterr().err
        return "thinking ... " in said

    with progress.Stage("thinking", after=0.05):
        wait_for(heard)
    with progress.Stage("blinking"):
        pass
    assert capsys.readouterr().err == ""


def test_a_stage_that_can_tell_shows_its_share_and_the_time_left(capsys, monkeypatch):
    with progress.Stage("evaluating") as stage:
        stage._started -= 30
        stage.update(1500, 2000, "tokens")
        stage._beat()
        stage.update(2000, 2000, "tokens")
        stage._beat()
    assert capsys.readouterr().err == "evaluating  75%  1,500 of 2,000 tokens  ETA 0:10\nevaluating 100%  2,000 of 2,000 tokens  ETA 0:00\n"


def test_on_a_terminal_a_stage_stands_in_the_progress_line_instead_of_filling_the_screen(capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with progress.Progress(10, "training", stream=stream) as line, progress.Stage("evaluating") as stage:
        stage.update(1, 4, "tokens")
        stage._beat()
        assert line._note.startswith("evaluating  25%")
    assert line._note == "" and capsys.readouterr().err == ""


def test_said_lines_stand_above_the_progress_line():
    stream = io.StringIO()
    with progress.Progress(2, "outer", stream=stream):
        progress.say("a word")
    assert "a word\n" in stream.getvalue()


def test_the_watchdog_dumps_all_stacks_when_nothing_moves_and_is_quiet_while_it_does(tmp_path, capsys):
    stalls = []
    with open(tmp_path / "stacks", "w+") as stream:
        with progress.Watchdog(60, stalls.append) as quiet:
            quiet.beat()
            quiet._look()
        assert stalls == []
        with progress.Watchdog(0.4, stalls.append, stream):
            wait_for(lambda: stalls)
        stream.seek(0)
        stacks = stream.read()
    assert stalls[0] >= 0.4
    assert "test_the_watchdog_dumps_all_stacks" in stacks and "Nothing has moved" in capsys.readouterr().err


def test_stacks_are_dumped_even_while_a_call_into_c_holds_the_interpreter():
    code = """
import ctypes
from cllm.runtime import progress
with progress.Watchdog(0.4):
    ctypes.PyDLL(None).usleep(1_000_000)
"""
    err = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "Timeout" in err and "line 5 in <module>" in err


def test_a_watchdog_of_zero_seconds_never_barks():
    with progress.Watchdog(0, lambda seconds: pytest.fail("barked")):
        time.sleep(0.05)


def test_steps_counted_in_bytes_are_passed_on_and_never_exceed_their_total():
    calls = []
    with progress.ByteProgress(lambda label, done, total: calls.append((label, done, total))) as bar:
        report = bar.step("Reading", 10)
        for count in (4, 4, 4):
            report(count)
        bar.heartbeat("Thinking")  # nothing to count: nothing to pass on
    assert calls == [("Reading", 4, 10), ("Reading", 8, 10), ("Reading", 10, 10)]


def test_a_step_that_takes_long_gets_a_line_of_its_own_and_a_short_one_none(capsys):
    with progress.ByteProgress() as bar:
        bar("Short", 1_000_000, 2_000_000)
        bar("Long", 1_000_000, 2_000_000)
        bar._started -= 2.0
        bar("Long", 2_000_000, 2_000_000)
    said = capsys.readouterr().err
    assert "Long 100%  2.0 of 2.0 MB" in said and "Short" not in said
