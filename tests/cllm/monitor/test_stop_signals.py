"""What a signal does inside a program: it raises where the work may be left, asks where it may not, and is never lost."""

import os
import signal
import threading
import time

import pytest

from cllm.monitor import stop_signals
from cllm.monitor.stop_signals import Interrupted, StopRequested, StopSignals


@pytest.fixture(autouse=True)
def every_signal_counts(monkeypatch):
    monkeypatch.setattr(stop_signals, "SAME", 0.0)


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    for _ in range(1000):  # a handler runs between two bytecodes
        pass


def free(name):
    return Interrupted(f"left by {name}")


def busy(name):
    return None


def test_work_that_may_be_left_is_left_wherever_it_is_and_handlers_come_back():
    before = [signal.getsignal(number) for number in stop_signals.STOPPING]
    for number in stop_signals.STOPPING:
        with pytest.raises(StopRequested, match=f"left by {signal.Signals(number).name}") as raised, StopSignals(free):
            send(number)
            pytest.fail("it went on")
        assert isinstance(raised.value, KeyboardInterrupt) and raised.value.ends_with.exit_status == 130
    assert [signal.getsignal(number) for number in stop_signals.STOPPING] == before


def test_other_work_is_only_asked_except_where_it_says_that_it_may_be_interrupted(capfd):
    with StopSignals(busy) as stop:
        send()
        assert stop.asked == "SIGTERM"
        with pytest.raises(StopRequested) as raised:
            stop.check()
        assert raised.value.ends_with is None
        with pytest.raises(StopRequested), stop.at_once():
            pytest.fail("it began anew")
    assert "SIGTERM: finishing this step and writing a checkpoint" in capfd.readouterr().err
    with StopSignals(busy) as stop:
        stop.check()
        with pytest.raises(StopRequested), stop.at_once():
            send(signal.SIGINT)
            pytest.fail("it went on")


@pytest.mark.parametrize("signals", [[signal.SIGINT] * 2, [signal.SIGTERM, signal.SIGINT, signal.SIGINT], [signal.SIGTERM] * 3])
def test_who_insists_is_not_kept_waiting(signals, capfd):
    with StopSignals(busy):
        for number in signals[:-1]:
            send(number)
        with pytest.raises(KeyboardInterrupt, match="ended at once") as raised:
            send(signals[-1])
    assert not isinstance(raised.value, StopRequested)
    assert capfd.readouterr().err.count("\nSIG") == len(signals) - 1, "each of the others got an answer"


def test_one_ctrl_c_that_arrives_twice_is_one(monkeypatch):
    monkeypatch.setattr(stop_signals, "SAME", 60.0)
    with StopSignals(busy) as stop:
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert stop.asked == "SIGINT"


def test_a_request_that_a_destructor_swallowed_is_made_again(recwarn):
    class Destroyed:
        def __del__(self):
            send()

    with StopSignals(free) as stop:
        Destroyed()  # "Exception ignored in __del__"
        with pytest.raises(StopRequested, match="left by SIGTERM"):
            stop.check()


def test_work_outside_is_on_its_way_out_and_not_interrupted_anew():
    with StopSignals(lambda name: Interrupted("from outside")), pytest.raises(Interrupted, match="from inside"):
        try:
            with StopSignals(lambda name: Interrupted("from inside")):
                send()
        except StopRequested as request:
            send()  # while the message is on its way
            raise request.ends_with from None


def test_the_process_is_ended_in_another_thread_where_nothing_would_be_lost_and_the_main_thread_does_not_answer(monkeypatch):
    monkeypatch.setattr(stop_signals, "GRACE", 0.05)
    told, left = [], threading.Event()

    def leave(error):
        told.append(str(error))
        left.set()
        threading.Event().wait()

    lost = True

    def nothing_to_lose(name):
        return None if lost else Interrupted("nothing is lost")

    with stop_signals.ending_the_process(leave), StopSignals(nothing_to_lose):
        send()
        assert not left.wait(0.3), "something would be lost"
        lost = False
        assert left.wait(60) and told == ["nothing is lost"]
    with stop_signals.ending_the_process(lambda error: told.append(str(error))), StopSignals(busy):
        pass
    time.sleep(0.1)
    assert told == ["nothing is lost"], "without a signal nothing is ended"
