"""Choosing a token: exact sets of the filters, frequencies of the draw, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.generate.sampling import (
    Sampling,
    adjust,
    dense_bias,
    distribution,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    penalise_repetition,
    sample,
    sample_rows,
)
from cllm.runtime.errors import CLLMError, UserError

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.05, 0.15], dtype=torch.float64)
LOGITS = PROBABILITIES.log() + 3.0


def kept(logits):
    return torch.isfinite(logits).nonzero().flatten().tolist()


def test_top_k_keeps_exactly_k_with_ties_to_the_lower_id():
    assert kept(keep_top_k(LOGITS, 1)) == [1]
    assert kept(keep_top_k(LOGITS, 3)) == [1, 3, 5]
    assert kept(keep_top_k(LOGITS, 5)) == [0, 1, 2, 3, 5]
    assert kept(keep_top_k(LOGITS, 100)) == [0, 1, 2, 3, 4, 5]
    assert kept(keep_top_k(torch.zeros(8, dtype=torch.float64), 3)) == [0, 1, 2]


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    for p, tokens in (
        (0.01, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.6, [1, 3]),
        (0.66, [1, 3, 5]),
        (0.79, [1, 3, 5]),
        (0.81, [1, 2, 3, 5]),
    ):
        assert kept(keep_top_p(LOGITS, p)) == tokens, p
    assert kept(keep_top_p(torch.zeros(4, dtype=torch.float64), 0.6)) == [0, 1, 2]


def test_min_p_keeps_tokens_relative_to_the_best():
    assert kept(keep_min_p(LOGITS, 0.3)) == [1, 3, 5]
    assert kept(keep_min_p(LOGITS, 0.9)) == [1]
    assert kept(keep_min_p(LOGITS, 0.01)) == [0, 1, 2, 3, 4, 5]


def test_typical_p_keeps_the_tokens_nearest_to_the_entropy_first():
    entropy = float(-(PROBABILITIES * PROBABILITIES.log()).sum())
    distance = (-PROBABILITIES.log() - entropy).abs()
    order = sorted(range(6), key=lambda token: (float(distance[token]), token))
    assert order[:3] == [3, 5, 1]  # the likeliest token tells less than the average does
    for p, count in ((0.2, 1), (0.3, 2), (0.41, 3), (0.79, 3), (0.81, 4), (1 - 1e-12, 6)):
        assert kept(keep_typical(LOGITS, p)) == sorted(order[:count]), p
    assert kept(keep_typical(torch.tensor([0.0, -torch.inf, 0.0, -torch.inf], dtype=torch.float64), 0.9)) == [0, 2]


def test_filters_agree_with_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    history = torch.tensor([[5, 17, 17, 200]])
    ours = distribution(
        logits[0], [5, 17, 17, 200], Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, typical_p=0.8, repetition_penalty=1.3)
    )
    theirs = process.RepetitionPenaltyLogitsProcessor(1.3)(history, logits)
    warpers = (
        process.TemperatureLogitsWarper(0.7),
        process.TopKLogitsWarper(40),
        process.TopPLogitsWarper(0.9),
        process.MinPLogitsWarper(0.02),
        process.TypicalLogitsWarper(0.8),
    )
    for warper in warpers:
        theirs = warper(history, theirs)
    torch.testing.assert_close(ours, torch.softmax(theirs[0], 0), rtol=1e-9, atol=1e-12)


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits = torch.tensor([2.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    assert penalise_repetition(logits, [0, 1, 0], 2.0).tolist() == [1.0, -4.0, 0.5, 0.0]
    assert penalise_repetition(logits, [], 2.0) is logits


def test_presence_and_frequency_count_what_was_generated_and_not_the_prompt():
    """OpenAI's formula: logit - count * frequency_penalty - (count > 0) * presence_penalty."""
    logits = torch.tensor([2.0, -2.0, 0.5, 0.0], dtype=torch.float32)
    sampling = Sampling(presence_penalty=0.25, frequency_penalty=0.5)
    assert adjust(logits, [3, 3, 0, 1, 0], sampling, [0, 1, 0]).tolist() == [2.0 - 1.0 - 0.25, -2.0 - 0.5 - 0.25, 0.5, 0.0]
    assert adjust(logits, [3, 3], sampling, []).tolist() == logits.tolist()
    together = Sampling(repetition_penalty=2.0, presence_penalty=0.25, logit_bias={"3": -1, 1: 4.0})
    assert adjust(logits, [3, 1], together, [1]).tolist() == [2.0, (-2.0 + 4.0) / 2 - 0.25, 0.5, -2.0]


def test_a_bias_forbids_and_forces_tokens():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    assert {sample(logits, (), Sampling(logit_bias={17: 100}), generator) for _ in range(50)} == {17}
    assert 3 not in {sample(logits, (), Sampling(temperature=2.0, logit_bias={3: -100}), generator) for _ in range(500)}
    assert dense_bias(Sampling(logit_bias={2: 1.5}), 4).tolist() == [0.0, 0.0, 1.5, 0.0] and dense_bias(Sampling(), 4) is None
    with pytest.raises(UserError, match="logit_bias names token 4"):
        dense_bias(Sampling(logit_bias={4: 1.0}), 4)


@pytest.mark.parametrize(
    "bias",
    [[1, 2], {-1: 1.0}, {"a": 1.0}, {1.5: 1.0}, {True: 1.0}, {"": 1}, {"9" * 30: 1}, {1: 100.1}, {1: float("nan")}, {1: "2"}, {1: None}, {1: True}],
)  # fmt: skip
def test_a_wrong_bias_is_refused(bias):
    with pytest.raises(UserError, match="logit_bias"):
        Sampling(logit_bias=bias)


def test_draws_have_the_frequencies_of_the_distribution():
    generator = torch.Generator().manual_seed(7)
    probabilities = distribution(LOGITS, (), Sampling(temperature=1.0))
    torch.testing.assert_close(probabilities, PROBABILITIES)
    num_draws = 20_000
    counts = torch.bincount(torch.tensor([draw(probabilities, generator) for _ in range(num_draws)]), minlength=6)
    chi_square = ((counts - num_draws * PROBABILITIES) ** 2 / (num_draws * PROBABILITIES)).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded once in 1000 seeds; the seed is fixed


def test_temperature_sharpens_and_zero_is_greedy():
    sharp = distribution(LOGITS, (), Sampling(temperature=0.5))
    torch.testing.assert_close(sharp, PROBABILITIES**2 / (PROBABILITIES**2).sum())
    assert distribution(LOGITS, (), Sampling(temperature=1e-300)).tolist() == [0, 1, 0, 0, 0, 0]
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert sample(torch.tensor([1.0, 4.0, 4.0]), (), Sampling(temperature=0), generator) == 1
    assert torch.equal(generator.get_state(), before)


def test_an_excluded_token_is_never_drawn():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    assert {draw(probabilities, generator) for _ in range(500)} == {1, 3}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -1.0),
        ("repetition_penalty", 0.0),
        ("typical_p", 0.0),
        ("typical_p", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=name):
        Sampling(**{name: value})


def test_logits_that_are_not_finite_are_an_error():
    for bad in (torch.tensor([0.0, torch.nan]), torch.tensor([torch.inf, 0.0]), torch.full((3,), -torch.inf)):
        with pytest.raises(CLLMError, match="not finite"):
            distribution(bad, (), Sampling())


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000), size=st.integers(1, 60), ties=st.booleans(), temperature=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    top_k=st.one_of(st.none(), st.integers(1, 70)), top_p=st.one_of(st.none(), st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1.0])),
    min_p=st.one_of(st.none(), st.sampled_from([0.0, 0.05, 0.5, 1.0])), typical_p=st.one_of(st.none(), st.sampled_from([1e-9, 0.4, 0.9, 1.0])),
    penalty=st.sampled_from([1.0, 1.0, 0.7, 1.3]), presence=st.sampled_from([0.0, 0.0, -1.0, 0.6]), frequency=st.sampled_from([0.0, 0.0, -1.0, 0.6]),
    bias=st.booleans(),
)  # fmt: skip
def test_all_rows_at_once_choose_what_one_after_the_other_does(
    seed, size, ties, temperature, top_k, top_p, min_p, typical_p, penalty, presence, frequency, bias
):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, size, generator=generator)
    if ties:
        logits = logits.round()
    logits[1, : size // 2] = -torch.inf
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, repetition_penalty=penalty, presence_penalty=presence,
        frequency_penalty=frequency, logit_bias={token: token - 2.0 for token in range(0, min(size, 6), 2)} if bias else {},
    )  # fmt: skip
    counts = torch.randint(0, 3, logits.shape, generator=generator)
    generated = [[token for token in range(size) for _ in range(int(row[token]))] for row in counts]
    seen = (torch.rand(logits.shape, generator=generator) < 0.3) | (counts > 0)
    histories = [row.nonzero()[:, 0].tolist() for row in seen]
    expected = [
        sample(row, histories[number], sampling, torch.Generator().manual_seed(seed + number), generated[number]) for number, row in enumerate(logits)
    ]
    uniforms = torch.stack([torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed + number)) for number in range(4)])
    assert sample_rows(logits, sampling, uniforms, seen, counts, dense_bias(sampling, size)).tolist() == expected


def test_a_row_that_is_not_finite_is_marked_and_the_others_are_not():
    logits = torch.zeros(4, 5)
    logits[0, 2], logits[1], logits[2, 1] = torch.nan, -torch.inf, torch.inf
    for temperature in (0.0, 1.0):
        assert sample_rows(logits, Sampling(temperature=temperature), torch.full((4,), 0.5, dtype=torch.float64))[:3].tolist() == [-1, -1, -1]
        assert sample_rows(logits, Sampling(temperature=temperature), torch.full((4,), 0.5, dtype=torch.float64))[3] >= 0
