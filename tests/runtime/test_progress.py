"""Nothing is silent: lines, the time left, and whose line it is."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from command import wait_for
from hypothesis import given
from hypothesis import strategies as st

from cllm.runtime import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Stands for the time in `progress`; passing time lets the work that is going on beat, as its thread does."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def pass_by(self, seconds):
        for _ in range(round(seconds)):
            self.now += 1.0
            for each in list(progress._going_on):
                each._beat()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "Ticker", lambda seconds, call: SimpleNamespace(stop=lambda: None))
    monkeypatch.setattr(progress, "compilation", progress._Compilation())
    return clock


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65, "1:05"), (7384, "2:03:04"), (3 * 86400 + 4 * 3600, "3d 4h")])
def test_durations_read_well(seconds, text):
    assert progress.duration(seconds) == text


def test_a_log_gets_lines_with_figures_share_and_the_time_left(clock):
    stream = io.StringIO()
    with progress.Progress(100, "working", log_seconds=0.0, stream=stream) as line:
        line.update(25, "loss 1.5")
        clock.now += 10
        line.update(50, "loss 1.2")
        clock.now += 20
        line.update(100, "loss 1.0")
    lines = stream.getvalue().splitlines()
    assert lines[-2:] == ["working  50%  loss 1.2  ETA 0:20", "working 100%  loss 1.0  in 0:30"]


def test_the_first_advance_which_compiles_does_not_count_in_the_time_left(clock):
    with progress.Progress(100, "training", stream=io.StringIO()) as line:
        clock.now += 300.0  # the first step
        line.update(1)
        assert line.seconds_left() is None and "ETA" not in line.line()
        for step in range(2, 5):
            clock.now += 2.0
            line.update(step)
            assert line.seconds_left() == pytest.approx(2.0 * (100 - step))


def test_steps_that_compile_later_do_not_count_either(clock):
    with progress.Progress(100, "training", stream=io.StringIO()) as line:
        for step in range(1, 10):
            progress.compilation.begin("compiling")
            clock.now += 50.0
            progress.compilation.end()
            clock.now += 2.0
            line.update(step)
        assert line.seconds_left() == pytest.approx(2.0 * 91)


def test_work_inside_is_not_the_pace_of_the_work_around_it(clock):
    with progress.Progress(100, "training", stream=io.StringIO()) as line:
        for step in range(1, 5):
            clock.now += 2.0
            line.update(step)
        with progress.Stage("evaluating"):
            clock.now += 600.0
            assert line.seconds_left() == pytest.approx(2.0 * 96)
        assert line.seconds_left() == pytest.approx(2.0 * 96)
        line.later_seconds = 1200.0  # two more of these
        assert line.seconds_left() == pytest.approx(2.0 * 96 + 1200.0)


def test_a_run_that_went_back_measures_its_pace_anew(clock):
    with progress.Progress(100, "training", stream=io.StringIO()) as line:
        for step in range(1, 50):
            clock.now += 2.0
            line.update(step)
        line.update(0)
        assert line.seconds_left() is None
        for step in (1, 2):
            clock.now += 2.0
            line.update(step)
        assert line.seconds_left() == pytest.approx(2.0 * 98)


def test_an_advance_that_is_on_its_way_is_counted_down_and_one_that_is_late_makes_the_time_left_grow(clock):
    with progress.Progress(10, "training", stream=io.StringIO()) as line:
        for step in (1, 2, 3):
            clock.now += 60.0
            line.update(step)
        assert line.seconds_left() == pytest.approx(7 * 60.0)
        clock.now += 30.0
        assert line.seconds_left() == pytest.approx(6 * 60.0 + 30.0)
        clock.now += 30.0
        assert line.seconds_left() == pytest.approx(6 * 60.0)
        clock.now += 60.0
        assert line.seconds_left() == pytest.approx(6 * 80.0)


def test_a_resumed_progress_counts_only_what_it_did_itself(clock):
    with progress.Progress(100, "working", initial=90, stream=io.StringIO()) as line:
        for step in (91, 92, 93):
            clock.now += 5.0
            line.update(step)
        assert line.seconds_left() == pytest.approx(7 * 5.0)


@given(
    steps=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    pace=st.floats(0.01, 100.0),
    warm=st.floats(0.0, 1e4),
    compiling=st.integers(0, 39),
)
def test_the_time_left_of_even_work_is_right_whatever_its_first_advance_took(steps, pace, warm, compiling):
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(progress, "time", clock)
        patch.setattr(progress, "Ticker", lambda seconds, call: SimpleNamespace(stop=lambda: None))
        total, done = sum(steps) + 7, 0
        with progress.Progress(total, "working", stream=io.StringIO()) as line:
            clock.now += warm
            for number, step in enumerate(steps):
                if number == compiling:
                    progress.compilation.begin("compiling")
                    clock.now += 1e5
                    progress.compilation.end()
                clock.now += pace * step
                done += step
                line.update(done)
                if number:
                    assert line.seconds_left() == pytest.approx(pace * (total - done), rel=1e-6)


@pytest.mark.parametrize("make", [lambda stream: progress.Progress(1000, "working", stream=stream), lambda stream: progress.Stage("working")])
def test_lines_of_a_log_become_rarer(make, clock, capsys):
    stream = io.StringIO()
    times = []
    with make(stream) as work:
        for second in range(1, 321):
            clock.pass_by(1)
            work.update(second, f"loss {1 / second}")
            if stream.getvalue() or capsys.readouterr().err:
                times.append(second)
                stream.truncate(0)
    assert times == [5, 15, 35, 75, 135, 195, 255, 315]


def test_no_line_of_a_log_says_what_the_one_before_has_said(clock):
    stream = io.StringIO()
    with progress.Progress(4, "working", log_seconds=0.0, stream=stream) as line:
        for step in (1, 1, 2, 2, 2, 3, 4, 4):
            line.update(step, f"loss {step}")
            line._beat()
    lines = stream.getvalue().splitlines()
    assert len(set(lines)) == len(lines) >= 3 and lines[-1] == "working 100%  loss 4  in 0:00"


@pytest.mark.parametrize("done", [3, 4], ids=["left early", "complete"])
def test_the_last_line_comes_once(done, clock):
    stream = io.StringIO()
    with progress.Progress(4, "working", log_seconds=0.0, stream=stream) as line:
        for step in range(1, done + 1):
            clock.now += 10
            line.update(step, f"step {step}")
        clock.now += 5  # a checkpoint is written
    assert stream.getvalue().count(f"step {done}") == 1


def test_work_that_was_left_early_says_after_how_long(clock):
    stream = io.StringIO()
    with progress.Progress(4, "working", stream=stream) as line:
        line.update(3)
        clock.now += 65
    assert stream.getvalue() == "working  75%  after 1:05\n"


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


def test_the_line_beats_while_the_caller_is_busy():
    stream = io.StringIO()
    with progress.Progress(10, "busy", log_seconds=0.05, stream=stream) as line:
        line.update(1)
        wait_for(lambda: stream.getvalue().count("busy") >= 2)


def test_a_stage_tells_that_it_still_runs_and_says_nothing_when_it_is_short(capsys):
    said = ""

    def heard():
        nonlocal said
        said += capsys.readouterr().err
        return "thinking ... " in said

    with progress.Stage("thinking", log_seconds=0.05):
        wait_for(heard)
    with progress.Stage("blinking"):
        pass
    assert capsys.readouterr().err == ""


def test_a_stage_that_can_tell_shows_its_share_and_the_time_left(capsys, clock):
    with progress.Stage("evaluating") as stage:
        clock.pass_by(5)
        stage.advance(500, 2000, "tokens")
        for done in (1000, 1500):
            clock.pass_by(12)
            stage.advance(done, 2000, "tokens")
        clock.pass_by(12)
        stage.advance(2000, 2000, "tokens")
    assert capsys.readouterr().err.splitlines() == [
        "evaluating ... 5 s",
        "evaluating  25%  500 of 2,000 tokens ... 15 s",
        "evaluating  75%  1,500 of 2,000 tokens  ETA 0:06",
    ]


# -- whose line it is -------------------------------------------------------------------------------------------------------


def test_work_that_waits_for_compilation_says_so_in_its_own_line(clock, capsys):
    with progress.Stage("first step"):
        for _ in range(10):
            progress.compilation.begin("compiling kernels")
            progress.compilation.begin("compiling kernels")  # one inside another
            clock.pass_by(7)
            progress.compilation.end()
            progress.compilation.end()
            clock.pass_by(3)
    assert capsys.readouterr().err.splitlines() == [f"first step: compiling kernels ... {seconds} s" for seconds in (5, 15, 35, 75)]


def test_figures_come_back_with_the_first_advance_after_compilation(clock):
    with progress.Progress(10, "evaluating", stream=io.StringIO()) as line:
        line.update(1, "1 of 10 windows")
        progress.compilation.begin("compiling kernels")
        assert line.line().startswith("evaluating  10%  compiling kernels")
        progress.compilation.end()
        assert line.line().startswith("evaluating  10%  compiling kernels")  # more of them may follow at once
        line.update(2, "2 of 10 windows")
        assert line.line().startswith("evaluating  20%  2 of 10 windows")


def test_compilation_that_nothing_waits_for_visibly_has_a_line_of_its_own_for_all_kernels_together(clock, capsys):
    for _ in range(20):
        progress.compilation.begin("compiling kernels")
        clock.pass_by(2)
        progress.compilation.end()
        clock.pass_by(3)
    assert capsys.readouterr().err.splitlines() == [f"compiling kernels ... {seconds} s" for seconds in (5, 15, 35)]


def test_the_innermost_work_owns_the_line(clock, capsys):
    with progress.Progress(100, "training") as line:
        line.update(1)
        with progress.Stage("evaluating"):
            clock.pass_by(40)
        said = capsys.readouterr().err.splitlines()
        assert said == [f"evaluating ... {seconds} s" for seconds in (5, 15, 35)]
        clock.pass_by(1)
        assert capsys.readouterr().err.startswith("training ")


def test_on_a_terminal_a_stage_stands_in_the_progress_line_instead_of_filling_the_screen(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress.Stage, "shown_after", 0.0)
    stream = Terminal()
    with progress.Progress(10, "training", stream=stream), progress.Stage("evaluating") as stage:
        stage.advance(1, 4, "tokens")
        wait_for(lambda: "evaluating  25%" in stream.getvalue())
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "evaluating" not in plain.splitlines()[-1] and plain.splitlines()[-1].startswith("training")


IN_PLACE = """
import os, sys
from cllm.runtime import progress
with progress.Stage("thinking"):
    sys.stdin.readline()
    print("to standard output")
    progress.say("a word")
    sys.stdin.readline()
    if len(sys.argv) > 1:
        progress.abandon()
        sys.stderr.flush()
        os._exit(0)
"""


def on_a_terminal(*arguments):
    """What a stage writes on standard error that is a terminal, and into a file on standard output; it goes on when its line was drawn."""
    leader, follower = pty.openpty()
    program = [sys.executable, "-c", IN_PLACE, *arguments]
    variables = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=follower, env=variables, text=True) as process:
        os.close(follower)
        shown = ""

        def read_until(count):
            nonlocal shown
            while shown.count("thinking ... ") < count:
                shown += os.read(leader, 1 << 16).decode()

        for _ in range(2):
            read_until(shown.count("thinking ... ") + 1)
            process.stdin.write("\n")
            process.stdin.flush()
        out, _ = process.communicate()
    with contextlib.suppress(OSError):  # which is how a terminal without a program ends
        while part := os.read(leader, 1 << 16):
            shown += part.decode()
    os.close(leader)
    return shown, out


def test_a_stage_alone_is_drawn_in_its_place_and_leaves_nothing_but_what_was_said():
    shown, out = on_a_terminal()
    assert out == "to standard output\n"
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.replace("\r\n", "\n")).split("\n")
    assert [line.rpartition("\r")[2] for line in lines if "a word" in line] == ["a word"]
    assert shown.endswith("\x1b[2K") and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_a_process_that_ends_where_it_is_gives_the_cursor_back():
    shown, _ = on_a_terminal("abandon")
    assert shown.endswith("\x1b[2K\x1b[?25h")


def test_said_lines_stand_above_the_progress_line():
    stream = io.StringIO()
    with progress.Progress(2, "outer", stream=stream):
        progress.say("a word")
    assert "a word\n" in stream.getvalue()


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
