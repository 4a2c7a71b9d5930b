"""The choice for a given time is a function: properties that hold for all times, speeds, texts and memories."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.config import recipe
from cllm.config.model import ModelConfig
from cllm.config.scaling_law import ERRORS, LAW
from cllm.config.time_choice import Candidate, Limits, Speed, Text, choose

ROOM = 1e12


def candidates(rate=1e11, overhead=0.002, vocab_size=2048):
    """The models of the recipe on a machine of `rate` floating-point operations a second. Each takes 16 bytes a parameter and 1 MB a sequence."""
    found = []
    for width in recipe.WIDTHS:
        sizes = ModelConfig.from_dict({**recipe.sizes(width), "vocab_size": vocab_size})
        parameters = sizes.num_parameters()
        speed = Speed(overhead * sizes.num_layers, sizes.flops_per_token() / rate)
        blocks = parameters - vocab_size * width
        found.append(Candidate(str(width), parameters, blocks, speed, lambda batch, parameters=parameters: 16 * parameters + batch * 10**6))
    return found


times = st.floats(5.0, 1e6)
texts = st.builds(Text, st.integers(1000, 10**10), st.floats(1.0, 6.0))
rates = st.floats(1e9, 1e15)


@settings(max_examples=150, deadline=None)
@given(times, times, texts, rates)
def test_more_time_never_gives_a_worse_prediction(one, other, text, rate):
    less, more = (choose(candidates(rate), text, Limits(seconds, ROOM)) for seconds in sorted((one, other)))
    # Whole updates: the last one that does not fit may cost as much as it is worth.
    assert more.bits_per_byte <= less.bits_per_byte * (1 + 1e-3) or less.steps < 100


@settings(max_examples=150, deadline=None)
@given(times, texts, rates)
def test_what_is_chosen_fits_into_the_time(seconds, text, rate):
    choice = choose(candidates(rate), text, Limits(seconds, ROOM))
    assert choice.steps == 1 or choice.seconds <= seconds * (1 + 1e-9)
    assert choice.tokens == choice.steps * choice.batch_size * choice.grad_accum * 256
    if not choice.limited_by_text and choice.steps > 100:
        assert choice.seconds >= 0.98 * seconds


@settings(max_examples=150, deadline=None)
@given(times, texts, rates, st.floats(1e6, 1e11))
def test_never_more_memory_than_there_is(seconds, text, rate, room):
    choice = choose(candidates(rate), text, Limits(seconds, room))
    least = min(each.memory(1) for each in candidates(rate))
    assert choice.candidate.memory(choice.batch_size) <= max(room, least)


@settings(max_examples=150, deadline=None)
@given(times, texts, rates)
def test_little_text_is_not_read_for_ever_and_more_text_is_never_predicted_to_harm(seconds, text, rate):
    choice = choose(candidates(rate), text, Limits(seconds, ROOM))
    assert choice.passes <= choice.most_passes + 1 or choice.steps == 1
    assert choice.with_more_text <= choice.bits_per_byte * (1 + 1e-3) or choice.steps < 100
    assert choice.low < choice.bits_per_byte < choice.high


def test_a_larger_model_for_more_time_and_the_text_as_the_limit():
    few, many = Text(100_000, 3.0), Text(10**9, 3.0)
    minutes, days = Limits(120.0, ROOM), Limits(3 * 86400.0, ROOM)
    assert choose(candidates(), many, minutes).candidate.parameters < choose(candidates(), many, days).candidate.parameters
    assert not choose(candidates(), many, minutes).limited_by_text
    limited = choose(candidates(), few, days)
    assert limited.limited_by_text and limited.with_more_text < limited.bits_per_byte
    assert choose(candidates(), few, replace(days, passes=2.0)).passes <= 2.0
    assert choose(candidates(), many, replace(minutes, batch_size=5)).batch_size == 5


def test_an_interval_is_wider_beyond_what_the_fit_has_seen():
    inside, outside = ERRORS.factor(1.0, ERRORS.most_work), ERRORS.factor(1.0, 1024 * ERRORS.most_work)
    assert 1.0 < inside < outside


@given(st.floats(1e3, 1e12), st.floats(1e3, 1e12))
def test_tokens_that_come_again_are_worth_less_each_time_and_never_nothing(tokens, unique):
    effective = LAW.effective(tokens, unique)
    assert effective <= tokens * (1 + 1e-9)
    assert effective <= unique * (1 + LAW.repeats) * (1 + 1e-9)
    assert LAW.effective(2 * tokens, unique) >= effective
    if tokens <= unique:
        assert effective == pytest.approx(tokens)


def test_the_sizes_of_the_recipe_are_models():
    sizes = [ModelConfig.from_dict({**recipe.sizes(width), "vocab_size": 512}).num_parameters() for width in recipe.WIDTHS]
    assert sizes == sorted(sizes)
