"""The GPU's training step, run operation by operation under Triton's interpreter, against the CPU's; its graphs: tests/gpu_emulation."""

import math

import pytest
import torch

pytest.importorskip("triton")

from cllm import Model, ModelConfig, TrainStep, runtime
from cllm.data import IGNORE, Batch
from cllm.train.faults import Faults
from cllm.train.step_graph import FIRST_LOSS_SCALE, DeviceStep

SIZES = {"vocab_size": 61, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "max_seq_len": 32}


@pytest.fixture(autouse=True)
def plain_kernels():
    """The step is under test here, not the kernels: all but AdamW are plain torch."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the step itself is tested, in tests/gpu")
    with runtime.use(backend="torch"):
        yield


def microbatches(seed: int, count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        tokens, targets = (torch.randint(0, 61, (2, 16), generator=generator) for _ in range(2))
        targets[0, : 1 + number] = IGNORE
        made.append(Batch(tokens, targets, torch.tensor([0, 5, 16, 20 + number, 32], dtype=torch.int32)))
    return made


def device_step(model: Model, loss_scaling: bool = False) -> tuple[DeviceStep, TrainStep]:
    owner = TrainStep(model, learning_rate=1e-2)
    step = DeviceStep(model, owner.optimizer, grad_clip=1.0, label_smoothing=0.0, z_loss=0.0, loss_scaling=loss_scaling, graphs=None)
    return step, owner


def test_it_does_what_the_step_on_the_cpu_does():
    here, there = Model(ModelConfig(**SIZES)), Model(ModelConfig(**SIZES))
    step, _ = device_step(there)
    reference = TrainStep(here, learning_rate=1e-2)
    for number in range(4):
        expected = reference.run(microbatches(number), 1e-2)
        found = step.run(microbatches(number), 1e-2)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)
        assert (found.num_targets, found.updated) == (expected.num_targets, True)
    for (name, ours), theirs in zip(there.named_parameters(), here.parameters()):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0, msg=name)


def test_a_gradient_that_is_not_finite_changes_no_weight():
    model = Model(ModelConfig(**SIZES))
    step, owner = device_step(model)
    step.run(microbatches(0), 1e-2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        model.backbone.norm.weight[3] = float("inf")
    result = step.run(microbatches(1), 1e-2)
    assert not result.updated and not result.finite and owner.optimizer.num_updates == 1
    with torch.no_grad():
        model.backbone.norm.weight.copy_(before[-1] if before[-1].shape == model.backbone.norm.weight.shape else torch.ones(32))
    assert step.run(microbatches(1), 1e-2).updated and owner.optimizer.num_updates == 2


def test_a_loss_that_is_not_finite_changes_no_weight_though_every_gradient_is(monkeypatch):
    model = Model(ModelConfig(**SIZES))
    step, owner = device_step(model)
    step.run(microbatches(0), 1e-2)
    before = [each.detach().clone() for each in (*model.parameters(), *owner.optimizer.exp_avg.values())]
    accumulate = step._accumulate
    monkeypatch.setattr(step, "_accumulate", lambda batch: (accumulate(batch), step._loss.fill_(math.inf)))
    step._accumulations.clear()
    result = step.run(microbatches(1), 1e-2)
    assert not result.updated and not result.finite and owner.optimizer.num_updates == 1
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.parameters(), *owner.optimizer.exp_avg.values()), strict=True))


def test_batches_without_a_target_change_nothing():
    model = Model(ModelConfig(**SIZES))
    step, owner = device_step(model)
    empty = [Batch(each.tokens, torch.full_like(each.targets, IGNORE), each.cu_seqlens) for each in microbatches(0)]
    result = step.run(empty, 1e-2)
    assert (result.updated, result.num_targets, result.loss) == (False, 0, 0.0) and owner.optimizer.num_updates == 0


def test_fp16_halves_its_loss_scale_when_gradients_overflow_and_resumes_with_it():
    model = Model(ModelConfig(**SIZES))
    step, _ = device_step(model, loss_scaling=True)
    model.compute_dtype = torch.float16
    assert step.state()[1] == FIRST_LOSS_SCALE
    step._state[1] = 2.0**24
    lost = step.run(microbatches(0), 1e-2)
    assert not lost.updated and lost.rescaled and step.state()[1] == 2.0**23
    assert Faults(on_nonfinite="stop").judge(1, lost) is None  # looking for the scale is no fault
    step._state[1] = 1.0
    with torch.no_grad():
        model.embedding_weight[0] = math.inf
    broken = step.run(microbatches(0), 1e-2)
    assert not broken.updated and not broken.rescaled and Faults(on_nonfinite="stop").judge(1, broken).action == "stop"
    with torch.no_grad():
        model.embedding_weight.copy_(Model(ModelConfig(**SIZES)).embedding_weight)
    step._state[3] = 1.0
    step._state[1] = 1024.0
    good = step.run(microbatches(0), 1e-2)
    assert good.updated and step.state().tolist() == [1.0, 1024.0, 1.0, 1.0]
    wide = TrainStep(Model(ModelConfig(**SIZES))).run(microbatches(0), 1e-2)
    assert good.gradient_norm == pytest.approx(wide.gradient_norm, rel=2e-2)
    resumed, owner = device_step(Model(ModelConfig(**SIZES)), loss_scaling=True)
    owner.optimizer.num_updates = 1
    resumed.resume(1, step.state())
    assert resumed.state().tolist() == step.state().tolist()


def test_fp16_on_a_cpu_is_refused_with_what_to_do():
    with pytest.raises(runtime.UserError, match=r"fp16.*on a GPU only.*bf16"):
        TrainStep(Model(ModelConfig(**SIZES)), precision="fp16")
