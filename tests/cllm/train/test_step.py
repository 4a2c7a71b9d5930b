"""One training step: accumulation equals the big batch, clipping and decay have their effect, the numbers that it reports are true."""

import inspect
import math

import pytest
import torch

from cllm import runtime
from cllm.config.model import ModelConfig
from cllm.model.model import Model
from cllm.runtime.errors import UserError
from cllm.train.step import IGNORED, Microbatch, TrainStep

TINY = ModelConfig(vocab_size=40, embed_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, max_seq_len=16, qk_norm=True)
GPT2 = ModelConfig(vocab_size=40, embed_dim=32, num_layers=2, num_heads=2, max_seq_len=16, norm="layer")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny operations: more threads bring nothing, and on a busy machine they wait for each other."""
    with runtime.use(threads=1):
        yield


def batch(rows=6, length=16, seed=0, holes=False):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 40, (rows, length + 1), generator=generator)
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].clone()
    if holes:  # very different numbers of targets per row
        for row in range(rows):
            targets[row, 2 + 2 * row :] = IGNORED
    return tokens, targets


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", [TINY, GPT2], ids=["cllm", "gpt2"])
def test_accumulated_microbatches_equal_the_big_batch_in_float64(config):
    tokens, targets = batch(holes=True)
    big, small = (TrainStep(Model(config, seed=1).double()) for _ in range(2))
    loss, count = big.accumulate([Microbatch(tokens, targets)])
    parts = [Microbatch(tokens[i : i + size], targets[i : i + size]) for i, size in ((0, 1), (1, 2), (3, 3))]
    assert small.accumulate(parts) == (pytest.approx(loss, rel=1e-12), count)
    assert count == int((targets != IGNORED).sum())
    for name, gradient in gradients(big.model).items():
        torch.testing.assert_close(gradients(small.model)[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("config", [TINY, GPT2], ids=["cllm", "gpt2"])
def test_accumulated_microbatches_draw_the_masks_of_the_big_batch(config, numbered):
    """Of rows that were numbered, and of rows that are counted within the update; and the masks follow the count of updates."""
    tokens, targets = batch(holes=True)
    first = 9 if numbered else None
    big, small = (TrainStep(Model(config, seed=1).double(), dropout=0.3, seed=5) for _ in range(2))
    loss, _ = big.accumulate([Microbatch(tokens, targets, first_row=first)])
    parts = [
        Microbatch(tokens[i : i + size], targets[i : i + size], first_row=first + i if numbered else None) for i, size in ((0, 1), (1, 2), (3, 3))
    ]
    assert small.accumulate(parts)[0] == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients(big.model).items():
        torch.testing.assert_close(gradients(small.model)[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    small.optimizer.num_updates = 1
    assert small.accumulate(parts)[0] != pytest.approx(loss, rel=1e-6)


def test_no_dropout_is_no_dropout_and_a_model_is_evaluated_without_it():
    tokens, targets = batch()
    with_none, without = TrainStep(Model(TINY), dropout=0.0), TrainStep(Model(TINY))
    assert with_none.dropout is None and with_none(tokens, targets) == without(tokens, targets)
    dropped = TrainStep(Model(TINY), dropout=0.5)
    with torch.no_grad():
        evaluated = dropped.model.loss(tokens, targets)
    assert evaluated == pytest.approx(without.last.loss, rel=1e-5) and dropped(tokens, targets) != pytest.approx(without.last.loss, rel=1e-5)
    with pytest.raises(UserError, match=r"dropout must be within \[0, 1\), got 1"):
        TrainStep(Model(TINY), dropout=1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [TINY, GPT2], ids=["cllm", "gpt2"])
def test_every_trainable_tensor_gets_a_finite_non_zero_float32_gradient(config, precision):
    step = TrainStep(Model(config), precision=precision)
    step.accumulate([Microbatch(*batch(seed=3)), Microbatch(*batch(seed=4))])
    for name, gradient in gradients(step.model).items():
        assert gradient is not None and gradient.dtype == torch.float32, name
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0, name


@pytest.mark.parametrize(("backend", "inside"), [(None, 1), ("torch", 3)])
def test_torch_has_one_thread_in_a_step_of_our_kernels_and_all_of_its_own_in_others(backend, inside):
    if backend is None:
        pytest.importorskip("numba")
    step, seen = TrainStep(Model(TINY)), []
    with runtime.use(backend=backend):
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            step.run([Microbatch(*batch())], before_update=lambda: seen.append(torch.get_num_threads()))
            assert seen == [inside] and torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_batch_is_overfitted_below_a_tenth(precision):
    step = TrainStep(Model(TINY), precision=precision, learning_rate=1e-2, weight_decay=0.0)
    tokens, targets = batch(rows=2)
    for _ in range(80):
        loss = step(tokens, targets)
    assert loss < 0.1
    assert all(parameter.dtype == torch.float32 for parameter in step.model.parameters())


def test_the_returned_loss_is_the_cross_entropy_in_nats_of_the_logits_before_the_update():
    step = TrainStep(Model(TINY))
    tokens, targets = batch(holes=True)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(step.model(tokens).flatten(0, 1), targets.flatten())
    loss = step(tokens, targets)
    assert loss == pytest.approx(float(expected), rel=1e-5) and loss.shape == ()
    assert step.last.num_targets == int((targets != IGNORED).sum()) and step.last.updated


def test_clipping_bounds_what_reaches_the_optimizer():
    tokens, targets = batch()
    free, clipped = (TrainStep(Model(TINY), grad_clip=clip) for clip in (0.0, 1e-3))
    free(tokens, targets), clipped(tokens, targets)
    assert free.last.gradient_norm == pytest.approx(clipped.last.gradient_norm, rel=1e-5) and free.last.gradient_norm > 1e-2

    def seen(step):  # after one update the first moment is (1 - beta1) x the gradient that it was given
        return math.sqrt(sum(float((tensor / 0.1).square().sum()) for tensor in step.optimizer.exp_avg.values()))

    assert seen(free) == pytest.approx(free.last.gradient_norm, rel=1e-4)
    assert seen(clipped) == pytest.approx(1e-3, rel=1e-2)


def test_weight_decay_shrinks_matrices_only():
    tokens, targets = batch()
    with_decay, without = (TrainStep(Model(TINY), learning_rate=1e-2, weight_decay=decay) for decay in (0.5, 0.0))
    before = {name: parameter.detach().clone() for name, parameter in with_decay.model.named_parameters()}
    with_decay(tokens, targets), without(tokens, targets)
    plain = dict(without.model.named_parameters())
    for name, parameter in with_decay.model.named_parameters():
        expected = plain[name] - 1e-2 * 0.5 * before[name] if parameter.dim() >= 2 else plain[name]
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_smoothing_and_z_loss_reach_the_loss():
    tokens, targets = batch()
    plain, smoothed, z = (float(TrainStep(Model(TINY), **more)(tokens, targets)) for more in ({}, {"label_smoothing": 0.2}, {"z_loss": 0.1}))
    assert smoothed != pytest.approx(plain, rel=1e-6) and z > plain + 0.5


@pytest.mark.parametrize("config", [TINY, GPT2], ids=["cllm", "gpt2"])
def test_loss_and_gradients_with_smoothing_and_z_loss_are_those_of_torch_in_float64(config):
    tokens, targets = batch(holes=True)
    ours, plain = TrainStep(Model(config, seed=2).double(), label_smoothing=0.2, z_loss=0.1), Model(config, seed=2).double()
    loss, _ = ours.accumulate([Microbatch(tokens[:2], targets[:2]), Microbatch(tokens[2:], targets[2:])])
    logits, flat = plain(tokens).flatten(0, 1), targets.flatten()
    z = torch.logsumexp(logits[flat != IGNORED], -1).square().mean()
    expected = torch.nn.functional.cross_entropy(logits, flat, label_smoothing=0.2) + 0.1 * z
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(ours.model)[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_batch_without_targets_changes_nothing():
    step = TrainStep(Model(TINY))
    tokens, targets = batch()
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    assert step(tokens, torch.full_like(targets, IGNORED)) == 0.0
    assert not step.last.updated and step.last.finite
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters()))


def test_a_non_finite_loss_leaves_weights_and_moments_alone():
    step = TrainStep(Model(TINY))
    with torch.no_grad():
        step.model.embedding_weight[3, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in step.optimizer.state_dict().items()}
    weights = {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}
    step(*batch())
    assert not step.last.finite and not step.last.updated
    assert all(torch.equal(before[name], tensor) for name, tensor in step.optimizer.state_dict().items())
    assert all(torch.equal(weights[name].nan_to_num(7), parameter.nan_to_num(7)) for name, parameter in step.model.named_parameters())


WRONG = [
    ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
    ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
    ({"learning_rate": math.nan}, "learning_rate must be > 0, got nan"),
    ({"grad_clip": -1.0}, "grad_clip must be >= 0, got -1.0"),
    ({"weight_decay": -0.1}, "weight_decay must be >= 0, got -0.1"),
    ({"betas": (0.9, 1.0)}, r"betas must be two numbers within \[0, 1\), got \(0.9, 1.0\)"),
    ({"eps": 0.0}, "eps must be > 0, got 0.0"),
    ({"label_smoothing": 1.0}, r"label_smoothing must be within \[0, 1\), got 1.0"),
    ({"z_loss": -1e-4}, "z_loss must be >= 0, got -0.0001"),
    ({"optimizer": "adam"}, "optimizer must be one of adamw, muon, lion, schedule_free, got 'adam'"),
    ({"momentum": 1.0}, r"momentum must be within \[0, 1\), got 1.0"),
    ({"ema": -0.5}, r"ema must be within \[0, 1\), got -0.5"),
    ({"noise_scale_every": -1}, "noise_scale_every must be >= 0, got -1"),
    ({"dropout": 1.0}, r"dropout must be within \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=str)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TrainStep(Model(TINY), **settings)


def test_every_parameter_is_documented_and_has_its_refusal_tested():
    parameters = set(inspect.signature(TrainStep).parameters) - {"model"}
    assert all(f"\n    {name}: " in TrainStep.__doc__ for name in parameters | {"model"})
    assert parameters - {"seed"} == {name for settings, _ in WRONG for name in settings}, "any seed will do"


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, {"exp_avg", "exp_avg_sq", "num_updates"}),
        ({"ema": 0.5, "noise_scale_every": 2}, {"exp_avg", "exp_avg_sq", "num_updates", "ema", "training", "noise_scale"}),
        ({"optimizer": "schedule_free"}, {"z", "exp_avg_sq", "num_updates", "weights", "training"}),
    ],
)
def test_the_names_of_the_state_are_those_of_checkpoints(settings, kinds):
    step = TrainStep(Model(TINY), **settings)
    assert {name.partition(".")[0] for name in step.state_dict()} == kinds
    parameters = {name for name, _ in step.model.named_parameters()}
    for kind in kinds & {"exp_avg", "ema", "training", "z"}:
        assert {name.removeprefix(f"{kind}.") for name in step.state_dict() if name.startswith(f"{kind}.")} == parameters
