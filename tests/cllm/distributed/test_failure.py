"""How the processes of a run end together: who reports, in which words, and what counts as the failure of another process."""

import io
import json
import os
import signal
import time
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cllm.distributed import failure, session
from cllm.distributed.failure import FAILED, Failure, PeerFailed, Terminated, claim_report, end_together, is_peer_error, peer_failure
from cllm.distributed.launch import environment_number
from cllm.distributed.world import World
from cllm.runtime.errors import CheckpointError, UserError

FULL = CheckpointError("could not write runs/a: the disk is full.")


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """The one that runs these tests keeps its connections and its handler of SIGTERM, and waits for nobody."""
    monkeypatch.setattr(failure, "close_connections", lambda: None)
    monkeypatch.setattr(failure, "PATIENCE", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def worlds():
    """Three processes that share a store."""
    store = dist.HashStore()
    store.set_timeout(timedelta(milliseconds=10))
    return [World(rank, 3, rank, 3, torch.device("cpu"), store, 60.0) for rank in range(3)]


def ended(world, error):
    """How a process ends: ("raises", its own error), ("peer", text, status), or (exit status, what it wrote)."""
    stderr = io.StringIO()
    try:
        end_together(world, error, stderr)
    except PeerFailed as other:
        return "peer", str(other), other.exit_status
    except SystemExit as end:
        return end.code, stderr.getvalue()
    return "raises", error


def lost(store):
    """What the library raises where the store does not answer."""
    with pytest.raises(dist.DistError) as raised:
        store.get("nothing")
    return raised.value


def fail(world):
    """Another process has failed and left its message."""
    world.store.set(FAILED, json.dumps(asdict(Failure(str(FULL), FULL.exit_status, world.rank))))


def test_the_first_process_reports_its_own_failure_and_the_others_end_silently(worlds):
    assert ended(worlds[0], FULL) == ("raises", FULL)
    assert ended(worlds[1], lost(worlds[1].store)) == (FULL.exit_status, "")


def test_the_first_process_reports_for_another_one(worlds):
    fail(worlds[1])
    assert ended(worlds[0], lost(worlds[0].store)) == ("peer", f"process 1 of 3: {FULL}", FULL.exit_status)
    assert ended(worlds[1], FULL) == (FULL.exit_status, "")


def test_where_the_first_process_is_gone_another_one_reports(worlds):
    assert ended(worlds[2], FULL) == (FULL.exit_status, f"error: process 2 of 3: {FULL}\n")
    assert ended(worlds[1], lost(worlds[1].store)) == (FULL.exit_status, "")


def test_an_error_that_all_meet_is_reported_once_without_a_rank(worlds):
    fail(worlds[1])
    assert ended(worlds[0], FULL) == ("raises", FULL)


def test_a_process_that_was_killed_is_said_to_have_ended_without_a_word(worlds):
    kind, text, status = ended(worlds[0], lost(worlds[0].store))
    assert (kind, status) == ("peer", 1)
    assert text.startswith("another process of this run ended without a word, or did not answer for 60 s (") and "go on from the newest" in text
    assert peer_failure(worlds[0]) is None


def test_without_a_store_the_process_still_reports(worlds):
    class Gone:
        def __getattr__(self, name):
            raise dist.DistNetworkError("Connection reset by peer")

    for world in worlds:
        world.store = Gone()
    assert ended(worlds[1], FULL) == (FULL.exit_status, f"error: process 1 of 3: {FULL}\n")
    assert claim_report(worlds[2])


def test_a_process_that_ends_well_agrees_with_nobody(worlds):
    end = SystemExit(0)
    assert ended(worlds[0], end) == ("raises", end) and not worlds[0].store.check([FAILED])


def test_a_fault_of_the_program_names_its_place(worlds):
    try:
        raise KeyError("x")
    except KeyError as error:
        status, text = ended(worlds[1], error)
    assert status == 1 and text.startswith("error: process 1 of 3: KeyError: 'x' (in test_failure.py, line ")


def test_errors_of_the_library_are_those_of_other_processes_and_no_others():
    with pytest.raises(dist.DistError) as store:
        dist.TCPStore("127.0.0.1", 0, 1, True, timeout=timedelta(milliseconds=10)).get("nothing")
    with pytest.raises(RuntimeError) as shapes:
        torch.zeros(2) + torch.zeros(3)
    with pytest.raises(RuntimeError) as allocation:
        torch.empty(1 << 60)
    assert is_peer_error(store.value)
    others = [shapes.value, allocation.value, FULL, OSError("Connection reset by peer"), RuntimeError("data/gloo/a.txt is empty"), Terminated("x")]
    assert not any(is_peer_error(error) for error in others)


def test_sigterm_that_arrives_while_another_error_is_handled_does_not_hide_it():
    ending = Terminated("ended by SIGTERM.")
    ending.__context__ = dist.DistNetworkError("Connection was likely closed")
    assert is_peer_error(ending)
    ending.__context__ = KeyError("met while the other error was on its way")
    assert not is_peer_error(ending)
    ending.__context__.__context__ = dist.DistNetworkError("Connection was likely closed")
    assert is_peer_error(ending)


def test_sigterm_of_torchrun_that_is_faster_than_the_broken_connection_is_no_failure_of_its_own(worlds, monkeypatch):
    class Watch:
        """Hears of the other process only once it is waited for."""

        def __init__(self, world, stderr):
            self.ended = False

        def loss(self, seconds):
            assert seconds > 0 and not self.ended
            return lost(worlds[0].store)

        def ending(self):
            self.ended = True

        def close(self):
            assert self.ended

    for name, value in {"RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(session, "_join", lambda device, timeout: worlds[0])
    monkeypatch.setattr(session, "PeerWatch", Watch)
    with pytest.raises(PeerFailed, match="another process of this run ended without a word") as failed, session.session("cpu", 60.0):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert "SIGTERM" not in str(failed.value)


def test_variables_of_the_launcher_are_numbers(monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match="RANK must be a whole number, got 'first'"):
        environment_number("RANK")
    assert environment_number("NOT_SET_BY_ANYBODY", 3) == 3
