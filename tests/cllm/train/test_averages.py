"""Averaged weights: the numbers of the average, and that evaluating it leaves training as it was."""

import pytest
import torch

from cllm import runtime
from cllm.config.model import ModelConfig
from cllm.model.model import Model
from cllm.runtime.errors import CheckpointError
from cllm.train.averages import Ema, put, swapped
from cllm.train.step import Microbatch, TrainStep

TINY = ModelConfig(vocab_size=40, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=16)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny operations: more threads bring nothing, and on a busy machine they wait for each other."""
    with runtime.use(threads=1):
        yield


def batch(seed=0):
    text = torch.randint(0, 40, (4, 17), generator=torch.Generator().manual_seed(seed))
    return Microbatch(text[:, :-1].contiguous(), text[:, 1:].contiguous())


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_average_is_that_of_its_formula_in_float64():
    step = TrainStep(Model(TINY), learning_rate=1e-2, ema=0.8)
    truth = {name: weight.double() for name, weight in weights(step.model).items()}
    for update in range(1, 60):
        step.run([batch(update)])
        decay = min(0.8, (1 + update) / (10 + update))  # reaches 0.8 at update 35
        truth = {name: decay * truth[name] + (1 - decay) * weight.double() for name, weight in weights(step.model).items()}
    for name, average in step.averages().items():
        assert average.dtype == torch.float32
        assert (average.double() - truth[name]).norm() < 1e-6 * truth[name].norm(), name
        assert not torch.equal(average, weights(step.model)[name]), name


def test_an_update_that_is_left_out_is_not_averaged():
    step = TrainStep(Model(TINY), ema=0.5)
    step.run([batch()])
    before = {name: average.clone() for name, average in step.averages().items()}
    with torch.no_grad():
        step.model.embedding_weight[3] = float("nan")
    assert not step.run([batch(1)]).updated
    assert same(step.averages(), before)


@pytest.mark.parametrize("settings", [{"ema": 0.5}, {"optimizer": "schedule_free"}], ids=["ema", "schedule-free"])
def test_evaluating_the_average_leaves_the_weights_bit_by_bit_also_after_an_error(settings):
    step = TrainStep(Model(TINY), learning_rate=1e-2, **settings)
    for update in range(5):
        step.run([batch(update)])
    own, averages = weights(step.model), step.averages()
    with step.evaluation_weights():
        assert same(weights(step.model), averages) and not same(own, averages)
    assert same(weights(step.model), own)
    with pytest.raises(RuntimeError), step.evaluation_weights():
        raise RuntimeError("evaluation failed")
    assert same(weights(step.model), own)


def test_without_averages_the_weights_to_evaluate_are_the_models_own():
    step = TrainStep(Model(TINY))
    own = weights(step.model)
    with step.evaluation_weights():
        assert same(weights(step.model), own)
    assert step.averages() is None and not any(name.startswith(("ema.", "training.")) for name in step.state_dict())


def test_averages_of_another_model_are_refused():
    step = TrainStep(Model(TINY), ema=0.5)
    state = step.state_dict()
    with pytest.raises(CheckpointError, match="no average of this model's weights"):
        step.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("ema.")})
    with pytest.raises(CheckpointError, match="do not fit this model: a has shape"):
        put({"a": torch.zeros(3)}, {"a": torch.zeros(4)})
    with pytest.raises(CheckpointError, match="do not fit this model: b has"):
        put({"a": torch.zeros(3)}, {"b": torch.zeros(3)})
    with swapped({}, {}):
        pass
    assert Ema({}, 0.5).weights == {}
