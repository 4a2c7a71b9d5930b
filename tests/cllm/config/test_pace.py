"""The pace of a run whose end the clock decides: what was decided can be told from its record alone, and no decision lets a learning rate rise."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.config.pace import COOLDOWN, Decision, Pace
from cllm.config.schedule import KINDS, Schedule, lr
from cllm.runtime.errors import UserError


@st.composite
def paces(draw):
    """A run during which its end was moved some times, as a clock does it."""
    pace, step = Pace.first(draw(st.integers(1, 2000))), 0
    for _ in range(draw(st.integers(0, 6))):
        step += draw(st.integers(1, 300))
        if step >= pace.steps(step):
            break
        pace = pace.decide(step, step + draw(st.integers(1, 2000)))
    return pace


@settings(max_examples=200, deadline=None)
@given(paces())
def test_a_record_read_back_is_the_same_pace_to_the_last_bit(pace):
    again = Pace.of_text(pace.to_text())
    assert again == pace
    assert [again.share(step) for step in range(50)] == [pace.share(step) for step in range(50)]


@settings(max_examples=200, deadline=None)
@given(paces(), st.sampled_from(KINDS), st.integers(0, 30))
def test_the_share_and_with_it_the_decay_goes_one_way_and_comes_to_its_end(pace, kind, warmup):
    steps = pace.steps(10**9)
    schedule = Schedule(1.0, 0.1, warmup, steps, kind, pace)
    shares = [pace.share(step) for step in range(steps)]
    rates = [lr(step, schedule) for step in range(steps)]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] == pytest.approx(1.0, abs=1e-9 if steps - 1 > pace.decisions[-1].step else 1.0)
    assert all(one >= other for one, other in zip(rates[warmup:], rates[warmup + 1 :]))


@settings(max_examples=200, deadline=None)
@given(paces(), st.integers(1, 3000), st.integers(1, 3000))
def test_a_decision_changes_nothing_that_was_before_it(pace, step, steps):
    step = min(step, pace.steps(10**9) - 1) or 1
    changed = pace.decide(step, step + steps)
    assert [changed.share(each) for each in range(step + 1)] == [pace.share(each) for each in range(step + 1)]
    assert changed.until(step) == changed and changed.steps(step) == step + steps


def test_a_cooldown_before_its_time_is_told_from_the_usual_one():
    usual = Pace.first(100).decide(40, 90).decide(85, 95)
    early = usual.decide(60, 75, COOLDOWN)
    assert usual.most_steps is None and early.most_steps == 75
    assert early.share(59) < COOLDOWN == early.share(60)


@pytest.mark.parametrize("text", ["", "x", "0:0", "5:0.0:10", "0:0.0:10 0:0.1:20", "0:1.5:10", "0:0.0:10 20:0.5:15", "0:nan:10"])
def test_a_text_that_is_no_record_is_refused(text):
    with pytest.raises(UserError, match="pace must be the record of a run"):
        Pace.of_text(text)


def test_the_words_of_a_record():
    assert Pace((Decision(0, 0.0, 1000), Decision(400, 0.5, 700))).to_text() == "0:0.0:1000 400:0.5:700"
