"""The gradient noise scale: its two estimates from given gradients, their truth on average, and that measuring changes nothing."""

import math

import pytest
import torch

from cllm import runtime
from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data import IGNORE, Batch
from cllm.model.model import Model
from cllm.runtime.errors import UserError
from cllm.train.noise_scale import SMOOTHING, NoiseScale
from cllm.train.step import TrainStep

TINY = ModelConfig(vocab_size=40, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=16)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny operations: more threads bring nothing, and on a busy machine they wait for each other."""
    with runtime.use(threads=1):
        yield


def batch(seed=0, targets=64):
    text = torch.randint(0, 40, (4, 17), generator=torch.Generator().manual_seed(seed))
    wanted = text[:, 1:].clone()
    wanted.reshape(-1)[targets:] = IGNORE
    return Batch(text[:, :-1].contiguous(), wanted)


def test_one_measurement_is_the_papers_formula_on_the_gradients_of_each_microbatch():
    microbatches = [batch(1), batch(2, targets=40), batch(3, targets=10)]
    counts, total = [64, 40, 10], 114
    model = Model(TINY).double()
    means = []
    for each in microbatches:
        model.zero_grad()
        model.loss(each.tokens, each.targets).backward()
        means.append(torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()]))
    whole = sum(count / total * mean for count, mean in zip(counts, means))
    big, small = float(whole.square().sum()), sum(float(mean.square().sum()) for mean in means) / 3
    b, B = 3 / sum(1 / count for count in counts), total
    signal, noise = (B * big - b * small) / (B - b), (small - big) / (1 / b - 1 / B)

    step = TrainStep(Model(TINY), noise_scale_every=1)
    result = step.run(microbatches)
    found_signal, found_noise, count = step.noise_scale.state.tolist()
    assert found_signal == pytest.approx(signal, rel=1e-3) and found_noise == pytest.approx(noise, rel=1e-4) and count == 1
    assert result.noise_scale == (pytest.approx(noise / signal, rel=1e-3) if signal > 0 else None)


def test_known_noise_around_a_known_gradient_is_found():
    """Per-token gradients N(G, I) in 200 dimensions: S = 200, |G|^2 = 2, so the noise scale is 100 tokens."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(200))
    true_gradient = torch.full((200,), math.sqrt(2 / 200))
    scale = NoiseScale([weight])
    estimates = []
    for _ in range(300):
        microbatches = [batch(targets=count) for count in (16, 32, 64)]
        weight.grad = None
        scale.begin(microbatches)
        for count in (16, 32, 64):
            mean = true_gradient + torch.randn(200, generator=generator) / math.sqrt(count)
            part = mean * count / 112
            weight.grad = part if weight.grad is None else weight.grad + part
            scale.observe()
        scale.end()
        estimates.append(scale.state[:2].clone())
    signal, noise = torch.stack(estimates).mean(0).tolist()
    assert noise == pytest.approx(200, rel=0.03) and signal == pytest.approx(2, rel=0.1)
    assert noise / signal == pytest.approx(100, rel=0.12)


def test_measurements_are_smoothed_and_a_non_finite_one_is_left_out():
    weight = torch.nn.Parameter(torch.zeros(2))
    scale = NoiseScale([weight])

    def measure(*gradients):
        weight.grad = None
        scale.begin([batch(), batch()])
        for gradient in gradients:
            part = torch.tensor(gradient) / 2
            weight.grad = part if weight.grad is None else weight.grad + part
            scale.observe()
        return scale.end()

    # small = 4, big = 2.5 with b = 64 and B = 128: |G|^2 = 2 * 2.5 - 4 = 1 and S = 1.5 * 128
    assert measure([2.0, 1.0], [1.0, -math.sqrt(2.0)]) == pytest.approx(scale.value)
    first = scale.state.clone()
    assert first[2] == 1
    assert measure([math.inf, 1.0], [1.0, 1.0]) is None and torch.equal(scale.state, first)
    assert measure([1.0, 0.0], [1.0, 0.0]) == pytest.approx(SMOOTHING * float(first[1]) / (SMOOTHING * float(first[0]) + (1 - SMOOTHING)), rel=1e-6)


def test_measuring_changes_no_bit_of_the_training_and_goes_on_after_a_resume():
    microbatches = [[batch(3 * update + each) for each in range(3)] for update in range(6)]
    plain, measured = TrainStep(Model(TINY)), TrainStep(Model(TINY), noise_scale_every=2)
    results = [(plain.run(each), measured.run(each)) for each in microbatches]
    assert all(a.loss == b.loss and a.gradient_norm == b.gradient_norm for a, b in results)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), measured.model.parameters()))
    assert [int(b.noise_scale is not None) for _, b in results][1::2] == [0, 0, 0] and measured.noise_scale.state[2] == 3
    half = TrainStep(Model(TINY), noise_scale_every=2)
    for each in microbatches[:3]:
        half.run(each)
    resumed = TrainStep(half.model, noise_scale_every=2)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in half.state_dict().items()})
    assert [resumed.run(each).noise_scale for each in microbatches[3:]] == [b.noise_scale for _, b in results[3:]]
    assert torch.equal(resumed.noise_scale.state, measured.noise_scale.state)


def test_what_a_checkpoint_holds_changes_only_after_it_was_waited_for():
    """A checkpoint of the step before may still be copied until `before_update` has returned."""
    step = TrainStep(Model(TINY), noise_scale_every=1)

    def held():
        return {name: tensor.clone() for name, tensor in step.state_dict(training_weights=True).items()}

    seen = []
    for done in range(2):
        before = held()
        step.run([batch(1), batch(2)], before_update=lambda: seen.append(held()))
        assert before.keys() == seen[done].keys() and all(torch.equal(before[name], seen[done][name]) for name in before)
        assert step.noise_scale.state[2] == done + 1


def test_one_microbatch_alone_says_nothing():
    step = TrainStep(Model(TINY), noise_scale_every=1)
    assert step.run([batch()]).noise_scale is None and step.noise_scale.state[2] == 0
    with pytest.raises(UserError, match="noise_scale_every needs grad_accum of at least 2"):
        TrainConfig(noise_scale_every=5)
