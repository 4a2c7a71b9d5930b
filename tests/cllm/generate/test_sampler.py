"""One continuation's choices: the tokens of the plain functions, whatever the settings, and what is told beside them."""

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.config.sampling import Sampling
from cllm.generate import compiled_draw, sampler
from cllm.generate.compiled_draw import UNDECIDED, draw_token, likeliest, log_of_sum
from cllm.generate.sampler import Sampler
from cllm.generate.sampling import draw_at, filtered, sample
from cllm.runtime.errors import CLLMError, UserError


def settings_of(**changes):
    return st.builds(
        Sampling,
        temperature=st.sampled_from([1e-300, 1e-6, 0.3, 0.8, 1.0, 3.0, 1e6]),
        top_k=st.one_of(st.none(), st.integers(1, 400)),
        top_p=st.one_of(st.none(), st.sampled_from([1e-12, 1e-9, 0.1, 0.25, 0.5, 0.9, 0.95, 1 - 1e-12, 1.0]), st.floats(1e-6, 1.0)),
        min_p=st.one_of(st.none(), st.sampled_from([0.0, 1e-300, 0.05, 0.5, 1.0])),
        **changes,
    )


@st.composite
def logits_of(draw, smallest=1, largest=300):
    size = draw(
        st.integers(smallest, largest) if largest < 100 else st.one_of(st.integers(smallest, largest), st.sampled_from([511, 512, 513, 1500]))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    row = draw(st.sampled_from([0.0, 0.1, 3.0, 40.0, 900.0])) * torch.randn(size, generator=generator)
    row = draw(st.sampled_from([torch.Tensor.float, torch.Tensor.round, lambda each: each.bfloat16().float()]))(row)  # ties, and bfloat16's
    if draw(st.booleans()):
        row[torch.rand(size, generator=generator) < draw(st.sampled_from([0.1, 0.9, 1.0]))] = -torch.inf
        row[draw(st.integers(0, size - 1))] = 1.0
    return row


@settings(max_examples=600, derandomize=True, deadline=None)
@given(row=logits_of(), sampling=settings_of(), uniform=st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1 - 2**-53]), st.floats(0, 1, exclude_max=True)))
def test_a_compiled_draw_is_the_plain_one_or_undecided(row, sampling, uniform):
    x = row.double()
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    token = draw_token(x.numpy().copy(), float(x.max()), sampling.temperature, sampling.top_k or 0, top_p, sampling.min_p or 0.0, uniform)
    assert token in (UNDECIDED, draw_at(filtered(x, sampling), uniform))


def test_a_compiled_draw_is_seldom_undecided():
    """Otherwise nothing would be gained, and the test above would hold for one that never decides."""
    generator = torch.Generator().manual_seed(0)
    for sampling in (Sampling(), Sampling(top_p=0.9), Sampling(top_k=40), Sampling(min_p=0.05), Sampling(top_k=300, top_p=0.7, min_p=0.01)):
        rows = 4 * torch.randn(200, 1000, generator=generator)
        uniforms = torch.rand(200, dtype=torch.float64, generator=generator).tolist()
        options = sampling.top_k or 0, sampling.top_p or 1.0, sampling.min_p or 0.0
        drawn = [draw_token(row.double().numpy(), float(row.max()), 0.8, *options, uniform) for row, uniform in zip(rows, uniforms)]
        assert UNDECIDED not in drawn and drawn == [draw_at(filtered(row.double(), sampling), uniform) for row, uniform in zip(rows, uniforms)]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    data=st.data(), seed=st.integers(0, 2**40), steps=st.integers(1, 12), prompt=st.lists(st.integers(0, 7), max_size=6),
    sampling=settings_of(
        typical_p=st.one_of(st.none(), st.sampled_from([0.3, 0.9, 1.0])), repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.3]),
        presence_penalty=st.sampled_from([0.0, -1.0, 0.6]), frequency_penalty=st.sampled_from([0.0, -1.0, 0.6]),
        logit_bias=st.sampled_from([{}, {0: 3.0, 7: -5.0}]),
    ),
    greedy=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_choices_are_those_of_sample_token_for_token(data, seed, steps, prompt, sampling, greedy, dtype):
    if greedy:
        sampling = Sampling(**{**vars(sampling), "temperature": 0.0})
    ours = Sampler(sampling, prompt=prompt, vocab_size=8, seed=seed, index=2)
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + 2) % 2**63)
    generated = []
    for _ in range(steps):
        logits = data.draw(logits_of(8, 8)).repeat(2)[:10].to(dtype)  # what lies behind the vocabulary is ignored
        expected = sample(logits[:8].float(), prompt + generated, sampling, generator, generated)
        assert ours.choose(logits.float().numpy()).token == expected
        generated.append(expected)


def test_what_rounding_could_tip_is_decided_by_the_plain_functions(monkeypatch):
    asked = []
    monkeypatch.setattr(sampler, "filtered", lambda x, sampling: asked.append(1) or filtered(x, sampling))
    equal = torch.zeros(10)  # the mass before the sixth token is one half, give or take a rounding
    ours = Sampler(Sampling(temperature=1.0, top_p=0.5), prompt=(), vocab_size=10, seed=1)
    generator = torch.Generator().manual_seed(0x9E3779B97F4A7C15 % 2**63)
    assert [ours.choose(equal.numpy()).token for _ in range(30)] == [
        sample(equal, (), Sampling(temperature=1.0, top_p=0.5), generator) for _ in range(30)
    ]
    assert len(asked) == 30


def test_log_probabilities_are_the_models_own():
    row = 5 * torch.randn(3000, generator=torch.Generator().manual_seed(4))
    row[[7, 99]] = row.max() + 1  # a tie, which the lower id wins
    row[1000:1100] = -torch.inf
    exact = row[:2990].double().log_softmax(0)
    ours = Sampler(Sampling(temperature=0.3, top_k=2, logit_bias={5: 100}), prompt=(), vocab_size=2990, seed=0, logprobs=4)
    token, logprob, top = ours.choose(row.numpy())
    assert token == 5 and logprob == pytest.approx(float(exact[5]), abs=1e-10)
    order = sorted(range(2990), key=lambda each: (-float(row[each]), each))[:4]
    assert [each for each, _ in top] == order and order[:2] == [7, 99]
    assert [value for _, value in top] == pytest.approx(exact[order].tolist(), abs=1e-10)
    assert Sampler(Sampling(), prompt=(), vocab_size=5, seed=0, logprobs=0).choose(row.numpy()).top == []
    assert Sampler(Sampling(), prompt=(), vocab_size=5, seed=0).choose(row.numpy())[1:] == (None, [])
    assert len(Sampler(Sampling(), prompt=(), vocab_size=2990, seed=0, logprobs=2990).choose(row.numpy()).top) == 2990
    with pytest.raises(UserError, match="logprobs"):
        Sampler(Sampling(), prompt=(), vocab_size=5, seed=0, logprobs=6)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(row=logits_of(), count=st.integers(0, 30))
def test_the_likeliest_tokens_are_in_order(row, count):
    count = min(count, len(row))
    assert likeliest(row.double().numpy(), count).tolist() == sorted(range(len(row)), key=lambda each: (-float(row[each]), each))[:count]
    assert log_of_sum(row.double().numpy()) == pytest.approx(float(row.double().logsumexp(0)), rel=1e-12, abs=1e-12)


def test_an_end_cannot_be_chosen_before_the_fewest_tokens():
    row = torch.tensor([0.0, 1.0, 9.0, 8.0])
    for temperature in (0.0, 0.7):
        ours = Sampler(Sampling(temperature=temperature), prompt=(), vocab_size=4, seed=0, end_tokens=frozenset({2, 3}), min_tokens=20)
        tokens = [ours.choose(row.numpy()).token for _ in range(40)]
        assert set(tokens[:20]) <= {0, 1} and set(tokens[20:]) <= {2, 3}


class Only:
    """A constraint that allows the given tokens, one set for each step."""

    def __init__(self, *sets):
        self.sets, self.taken, self.finished = list(sets), [], False

    def mask(self):
        return np.isin(np.arange(6), self.sets[len(self.taken)])

    def advance(self, token):
        self.taken.append(token)


def test_a_constraint_holds_and_is_told_what_was_chosen():
    row = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, -torch.inf])
    for temperature in (0.0, 1.0):
        rule = Only([3], [2, 4], [5, 1], [0])
        ours = Sampler(
            Sampling(temperature=temperature, top_k=1), prompt=(), vocab_size=6, seed=0, end_tokens=frozenset({0, 2}), min_tokens=9, constraint=rule
        )
        # The end tokens are too early at first; where the constraint allows nothing else, the text may end.
        assert [ours.choose(row.numpy()).token for _ in range(4)] == rule.taken == [3, 4, 1, 0]
    with pytest.raises(CLLMError, match="allowed"):
        Sampler(Sampling(), prompt=(), vocab_size=6, seed=0, constraint=Only([5])).choose(row.numpy())


@pytest.mark.parametrize("bad", [[0.0, torch.nan, 1.0], [torch.inf, 0.0, 1.0], [-torch.inf] * 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad, temperature):
    ours = Sampler(Sampling(temperature=temperature), prompt=(), vocab_size=3, seed=0)
    with pytest.raises(CLLMError, match="not finite"):
        ours.choose(np.array(bad, np.float32))


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(UserError, match="logit_bias names token 9"):
        Sampler(Sampling(logit_bias={9: 1.0}), prompt=(), vocab_size=9, seed=0)


@numba.njit
def weigh(x, top, temperature, weights):
    compiled_draw._weigh(x, top, temperature, weights)


def test_the_exponential_is_exact_to_a_few_units():
    x = -np.abs(np.random.default_rng(0).normal(size=5000)) * np.geomspace(1e-9, 600, 5000)
    weights = np.empty_like(x)
    weigh(x, 0.0, 1.0, weights)
    np.testing.assert_allclose(weights, np.exp(np.maximum(x, -700)), rtol=1e-14)
