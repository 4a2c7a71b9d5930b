"""A program that stands still shows where."""

import subprocess
import sys
import time

import pytest
from command import wait_for

from cllm.runtime.watchdog import Watchdog


def test_the_watchdog_dumps_all_stacks_when_nothing_moves_and_is_quiet_while_it_does(tmp_path, capsys):
    stalls = []
    with open(tmp_path / "stacks", "w+") as stream:
        with Watchdog(60, stalls.append) as quiet:
            quiet.beat()
            quiet._look()
        assert stalls == []
        with Watchdog(0.4, stalls.append, stream):
            wait_for(lambda: stalls)
        stream.seek(0)
        stacks = stream.read()
    assert stalls[0] >= 0.4
    assert "test_the_watchdog_dumps_all_stacks" in stacks and "Nothing has moved" in capsys.readouterr().err


def test_stacks_are_dumped_even_while_a_call_into_c_holds_the_interpreter():
    code = """
import ctypes
from cllm.runtime.watchdog import Watchdog
with Watchdog(0.4):
    ctypes.PyDLL(None).usleep(1_000_000)
"""
    err = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "Timeout" in err and "line 5 in <module>" in err


def test_a_watchdog_of_zero_seconds_never_barks():
    with Watchdog(0, lambda seconds: pytest.fail("barked")):
        time.sleep(0.05)
