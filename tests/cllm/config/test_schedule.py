"""Learning rate schedules, the plateau, the batch's ramp: properties that hold for all inputs, and the values that each one promises."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.config.schedule import KINDS, BatchRamp, Plateau, Schedule, lr
from cllm.runtime.errors import UserError

rates = st.floats(min_value=1e-12, max_value=10.0)


@st.composite
def schedules(draw):
    high = draw(rates)
    low = draw(st.floats(min_value=0.0, max_value=1.0)) * high
    steps = draw(st.integers(1, 10**7))
    return Schedule(high, min(low, high), draw(st.integers(0, steps)), steps, draw(st.sampled_from(KINDS)))


@settings(max_examples=300, deadline=None)
@given(schedules(), st.integers(0, 2 * 10**7))
def test_the_rate_stays_between_min_lr_and_learning_rate_at_every_step(schedule, step):
    assert schedule.min_lr <= lr(step, schedule) <= schedule.learning_rate


@settings(max_examples=300, deadline=None)
@given(schedules(), st.data())
def test_warm_up_never_decreases(schedule, data):
    last = max(0, schedule.warmup - 1)
    first, second = sorted(data.draw(st.tuples(st.integers(0, last), st.integers(0, last))))
    if schedule.warmup:
        assert lr(first, schedule) <= lr(second, schedule) <= lr(schedule.warmup, schedule)


@settings(max_examples=300, deadline=None)
@given(schedules(), st.data())
def test_decay_never_increases(schedule, data):
    steps = st.integers(schedule.warmup, 2 * schedule.steps)
    first, second = sorted(data.draw(st.tuples(steps, steps)))
    assert lr(first, schedule) >= lr(second, schedule)
    assert lr(schedule.warmup, schedule) == schedule.learning_rate


@settings(max_examples=100, deadline=None)
@given(schedules(), st.integers(0, 10**7))
def test_neighbouring_steps_of_the_decay_never_increase(schedule, offset):
    step = schedule.warmup + offset
    assert lr(step, schedule) >= lr(step + 1, schedule)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_last_update_runs_at_min_lr(kind):
    schedule = Schedule(1e-3, 1e-4, 10, 100, kind)
    assert lr(99, schedule) == pytest.approx(1e-4, rel=1e-6)
    assert lr(10, schedule) == 1e-3
    assert lr(10**9, schedule) == lr(99, schedule)


def test_each_shape_is_what_its_name_says():
    assert lr(50, Schedule(1.0, 0.0, 0, 101, "cosine")) == pytest.approx(0.5)
    assert lr(25, Schedule(1.0, 0.0, 0, 101, "linear")) == pytest.approx(0.75)
    assert [lr(step, Schedule(1.0, 0.0, 0, 101, "step")) for step in (79, 80, 90)] == [1.0, 0.316, 0.1]
    assert lr(80, Schedule(1.0, 0.0, 0, 101, "wsd")) == 1.0
    assert lr(85, Schedule(1.0, 0.0, 0, 101, "wsd")) == pytest.approx(1 - math.sqrt(0.25))
    assert lr(100, Schedule(1.0, 0.1, 0, 101, "constant")) == 1.0
    assert lr(0, Schedule(1.0, 0.0, 9, 101, "constant")) == pytest.approx(0.1)


def test_a_schedule_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="min_lr must be within"):
        Schedule(1e-3, 1e-2, 0, 10)
    with pytest.raises(UserError, match="schedule must be one of"):
        Schedule(1e-3, 1e-4, 0, 10, "cosinus")
    with pytest.raises(UserError, match="steps >= 1"):
        Schedule(1e-3, 1e-4, 0, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=40), st.integers(1, 4), st.sampled_from([0.1, 0.5, 0.9]))
def test_the_plateau_falls_when_torchs_does(losses, patience, factor):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=factor, patience=patience - 1, threshold=1e-4, eps=0.0)
    ours = Plateau(factor, patience)
    for loss in losses:
        reference.step(loss)
        ours.update(loss)
        assert ours.scaled(1.0, 0.0) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_the_plateau_goes_on_from_its_state_and_stays_above_min_lr():
    ours = Plateau(0.5, 2)
    assert [ours.update(loss) for loss in (1.0, 1.0)] == [False, False]
    again = Plateau(0.5, 2)
    again.restore(json.loads(json.dumps(ours.to_dict())))
    assert again == ours and again.update(0.99995)  # not lower by one part in ten thousand
    assert again.scaled(1e-3, 1e-5) == 5e-4 and again.scaled(1e-3, 8e-4) == 8e-4
    assert again.scaled(1e-6, 8e-4) == 1e-6  # a warm-up below min_lr is not raised
    fresh = Plateau(0.5, 2)
    fresh.restore(json.loads(json.dumps(Plateau(0.5, 2).to_dict())))
    assert fresh.best == math.inf


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 120), st.integers(1, 3000))
def test_the_ramp_rises_evenly_and_every_microbatch_is_taken_once(grad_accum, steps, step, microbatches):
    ramp = BatchRamp(grad_accum, steps)
    assert 1 <= ramp.size(step) <= ramp.size(step + 1) <= grad_accum and ramp.size(steps) == grad_accum
    assert ramp.before(0) == 0 and ramp.before(step + 1) == ramp.before(step) + ramp.size(step)
    needed = ramp.steps_for(microbatches)
    assert ramp.before(needed) >= microbatches > ramp.before(needed - 1)


def test_without_a_ramp_every_update_has_all_microbatches():
    assert [BatchRamp(3).size(step) for step in (0, 1, 9)] == [3, 3, 3] and BatchRamp(3).before(7) == 21 and BatchRamp(3).steps_for(7) == 3
    assert [BatchRamp(4, 6).size(step) for step in range(8)] == [1, 1, 2, 2, 3, 3, 4, 4]
