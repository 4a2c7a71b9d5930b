"""A run that was given its time ends in it on a machine that becomes busy or quiet, as a simulated clock shows."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.config.evaluation_plan import EvaluationPlan
from cllm.config.pace import COOLDOWN, Pace
from cllm.config.train import TrainConfig
from cllm.train import clock
from cllm.train.clock import Clock
from cllm.train.timed_end import TimedEnd

PLAN = EvaluationPlan(num_evaluations=10, rows=10, class_rows=0, whole_at_end=False, split_rows=10)


class Machine:
    """Time that passes as work is done. `slow(t)`: how many times slower than usual the machine is at the share `t` of the whole time."""

    def __init__(self, seconds, slow):
        self.seconds, self.slow, self.time = seconds, slow, 0.0

    def work(self, seconds):
        """Seconds of an idle machine, in small pieces."""
        for _ in range(10):
            self.time += seconds / 10 * self.slow(self.time / self.seconds)


def train(machine, monkeypatch, *, step_seconds, eval_seconds, estimate, prepared=0.05, schedule="wsd"):
    """What the trainer does with the clock. Gives the seconds that it took, and the pace."""
    monkeypatch.setattr(clock, "now", lambda: machine.time)
    config = TrainConfig(minutes=machine.seconds / 60, schedule=schedule, restore_best=True)
    config = config.replace("derived: the test", steps=estimate)
    machine.work(prepared * machine.seconds)
    end = TimedEnd(config, 0.0, None, None, PLAN)
    step, steps, every = 0, estimate, max(1, estimate // 10)

    def follow(found):
        nonlocal steps
        if found is not None:
            end.pace, steps = found, found.steps(step)

    follow(end.begin(step, steps))
    machine.work(3 * step_seconds)  # kernels
    while step < steps:
        machine.work(step_seconds)
        step += 1
        follow(end.updated(step, steps))
        if step % every == 0 or step == steps:
            with end.aside():
                machine.work(eval_seconds)
    machine.work(eval_seconds)  # of the best weights
    return machine.time, end.pace, step


@st.composite
def loads(draw):
    """A machine that becomes up to three times slower, and quicker again, at some moments."""
    changes = sorted(draw(st.lists(st.floats(0.0, 1.0), max_size=4)))
    factors = draw(st.lists(st.floats(0.5, 3.0), min_size=len(changes) + 1, max_size=len(changes) + 1))
    return lambda t: factors[sum(t >= each for each in changes)]


@settings(max_examples=60, deadline=None)
@given(loads(), st.floats(0.1, 10.0), st.floats(100.0, 5000.0), st.sampled_from(["wsd", "cosine"]))
def test_a_run_ends_within_five_percent_of_its_time(slow, wrong, seconds, schedule):
    """The estimate that it begins with may be ten times too large or too small."""
    step_seconds = seconds / 1500
    estimate = max(10, int(1500 * wrong))
    with pytest.MonkeyPatch.context() as patched:
        machine = Machine(seconds, slow)
        took, pace, step = train(machine, patched, step_seconds=step_seconds, eval_seconds=0.003 * seconds, estimate=estimate, schedule=schedule)
    assert 0.95 * seconds <= took <= 1.05 * seconds
    assert pace.steps(step) == step and pace.share(step - 1) > 0.9


def test_on_a_steady_machine_the_cooldown_takes_a_fifth_of_the_time(monkeypatch):
    took, pace, step = train(Machine(1000.0, lambda t: 1.0), monkeypatch, step_seconds=0.5, eval_seconds=2.0, estimate=6000)
    first = next(each for each in range(step) if pace.share(each) >= COOLDOWN)
    assert 0.15 <= 1 - first / step <= 0.25
    assert len(pace.decisions) < 12  # each one is a line in the record
    assert 950 <= took <= 1000


def test_an_update_is_made_even_where_the_time_is_over_and_no_more(monkeypatch):
    _, pace, step = train(Machine(60.0, lambda t: 1.0), monkeypatch, step_seconds=5.0, eval_seconds=1.0, estimate=100, prepared=1.2)
    assert step == 1 and pace.steps(1) == 1


def test_a_loss_that_no_longer_falls_brings_the_cooldown_forward_and_the_clock_lets_it_stand(monkeypatch):
    time = SimpleNamespace(now=0.0)
    monkeypatch.setattr(clock, "now", lambda: time.now)
    end = TimedEnd(TrainConfig(minutes=100, schedule="wsd", restore_best=True).replace("derived: the test", steps=6000), 0.0, None, None, PLAN)
    assert end.begin(0, 6000) is None
    steps = 6000
    for step in range(1, 401):
        time.now += 1.0
        end.pace = end.updated(step, steps) or end.pace
        steps = end.pace.steps(step)
    assert end.no_longer_falls(400, steps, 2) is None
    end.pace = end.no_longer_falls(400, steps, 3)
    assert end.pace.share(400) == COOLDOWN and end.pace.most_steps == 500
    assert end.no_longer_falls(410, 500, 4) is None  # it falls already
    steps = 500
    for step in range(401, 501):
        time.now += 0.5  # the machine is quicker now: that makes it no longer
        end.pace = end.updated(step, steps) or end.pace
        steps = end.pace.steps(step)
    assert steps == 500 and end.pace.share(499) == 1.0


def test_time_that_earlier_starts_took_is_gone(monkeypatch):
    monkeypatch.setattr(clock, "now", lambda: 10.0)
    assert Clock(100.0, began=4.0, spent=50.0).elapsed == 56.0
    assert not Clock(100.0, began=4.0, spent=93.5).has_time_for(1)


def test_the_record_is_followed_without_a_clock():
    pace = Pace.first(10).decide(3, 8).decide(6, 9)
    config = TrainConfig(minutes=1.0, pace=pace.to_text())
    assert not config.clocked
    end = TimedEnd(config.replace("derived: the test", steps=10), 0.0, None, None, PLAN)
    assert end.clock is None and end.begin(0, 10) is None
    assert [step for step in range(1, 10) if end.updated(step, 10) is not None] == [3, 6]
