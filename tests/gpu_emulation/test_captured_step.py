"""The training step as CUDA graphs, emulated, against the same operations one by one: equal bit for bit, whatever happens between the steps."""

import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU the step itself is captured, in tests/gpu", allow_module_level=True)

from gpu_emulation.graphs import EmulatedGraphs
from gpu_emulation.memory import Memory

from cllm import Model, ModelConfig, TrainStep, runtime
from cllm.data import IGNORE, Batch
from cllm.train.averages import Ema
from cllm.train.step_graph import DeviceStep

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")

SIZES = {"vocab_size": 37, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "max_seq_len": 16}
LLAMA = SIZES | {"num_kv_heads": 1}
GPT2 = SIZES | {"norm": "layer"}


def microbatches(seed, count=2, packed=True, shape=(2, 8)):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        tokens, targets = (torch.randint(0, 37, shape, generator=generator) for _ in range(2))
        targets[0, : 1 + number] = IGNORE
        cut = 1 + (3 + seed) % (shape[1] - 1)
        bounds = [0, cut, cut, *range(shape[1], tokens.numel() + 1, shape[1])]  # one document is empty
        made.append(Batch(tokens, targets, torch.tensor(bounds, dtype=torch.int32) if packed else None))
    return made


class Pair:
    """The same step twice: as emulated graphs, and one operation after the other. What one of them does the other one does too."""

    def __init__(self, sizes=LLAMA, precision="fp32", recompute="none", **options):
        self.steps = [self.step(sizes, precision, recompute, graphs, **options) for graphs in (EmulatedGraphs, None)]
        self.graphs = self.steps[0]._graphs._graphs

    @staticmethod
    def step(sizes, precision, recompute, graphs, **options):
        model = Model(ModelConfig(**sizes))
        model.recompute = recompute
        step = TrainStep(model, learning_rate=1e-2, **options)
        model.compute_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        step._graphs = DeviceStep(
            model, step.optimizer, step.ema, grad_clip=step.grad_clip, label_smoothing=step.label_smoothing, z_loss=step.z_loss,
            loss_scaling=precision == "fp16", dropout=step.dropout, graphs=graphs,
        )  # fmt: skip
        step._state._graphs = step._graphs
        return step

    def run(self, microbatches, rate=1e-2, **options):
        captured, plain = (each.run(microbatches, rate, **options) for each in self.steps)
        assert captured == plain or (repr(captured) == repr(plain) and not plain.finite)  # NaN is not equal to itself
        return captured

    def check(self):
        captured, plain = (each.state_dict(training_weights=True) for each in self.steps)
        assert captured.keys() == plain.keys()
        for name, tensor in captured.items():
            assert torch.equal(tensor, plain[name]), name
            assert torch.isfinite(tensor.double()).all(), name


@pytest.mark.parametrize(
    ("sizes", "precision", "options"),
    [
        (LLAMA | {"qk_norm": True}, "fp32", {}),
        (LLAMA, "bf16", {"recompute": "blocks"}),
        (LLAMA | {"tie_embeddings": False}, "fp32", {"recompute": "feed_forward", "packed": False}),
        (LLAMA, "fp16", {}),
        (GPT2, "fp32", {"recompute": "blocks"}),
        (GPT2, "bf16", {"packed": False}),
        (GPT2, "fp16", {"recompute": "feed_forward"}),
    ],
)
def test_captured_training_is_equal_bit_for_bit(sizes, precision, options):
    options = dict(options)
    packed = options.pop("packed", True)
    pair = Pair(sizes, precision, **options, label_smoothing=0.1, z_loss=1e-3)
    for number in range(2):  # the second step replays what the first one captured, on other tokens and at another rate
        assert pair.run(microbatches(number, packed=packed), 1e-2 / (number + 1)).updated
    pair.check()
    assert pair.graphs.replays == 2 * (2 + 1)


def test_a_graph_draws_other_masks_at_every_replay():
    """The same two microbatches at a rate that changes nothing: losses differ with the step, and are those of operations one by one."""
    pair, resumed = (Pair(LLAMA, "bf16", "blocks", dropout=0.2, seed=3, weight_decay=0.0) for _ in range(2))
    losses = [pair.run(microbatches(0), 1e-30).loss for _ in range(2)]
    for step, state in zip(resumed.steps, [step.state_dict(training_weights=True) for step in pair.steps]):
        step.load_state_dict({name: each.clone() for name, each in state.items()})
    assert resumed.run(microbatches(0), 1e-30).loss == pair.run(microbatches(0), 1e-30).loss not in losses and losses[0] != losses[1]
    assert pair.graphs.replays == 3 * (2 + 1) and len(pair.graphs.records) == 2
    pair.check()


@pytest.mark.parametrize(("optimizer", "precision", "ema"), [("muon", "bf16", 0.9), ("lion", "fp16", 0.0), ("schedule_free", "fp32", 0.0)])
def test_the_update_of_every_optimizer_is_captured(optimizer, precision, ema):
    """The bits of the same operations one by one, about what the step of a CPU comes to, and steps that are left out change nothing."""
    pair, reference = (
        Pair(precision=precision, optimizer=optimizer, ema=ema), TrainStep(Model(ModelConfig(**LLAMA)), learning_rate=1e-2, optimizer=optimizer)
    )  # fmt: skip
    for number in range(3):
        found, expected = pair.run(microbatches(number), 1e-2 / (number + 1)), reference.run(microbatches(number), 1e-2 / (number + 1))
        assert found.updated and found.loss == pytest.approx(expected.loss, rel=1e-2)
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=5e-2)
    pair.check()
    assert len(pair.graphs.records) == 2 and pair.graphs.replays == 3 * (2 + 1)
    if precision == "fp32":
        for (name, ours), theirs in zip(pair.steps[0].model.named_parameters(), reference.model.parameters()):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0, msg=name)
    for step in pair.steps:
        step.model.embedding_weight.detach()[0] = float("inf")
    kept = {name: each.clone() for name, each in pair.steps[0].state_dict(training_weights=True).items() if name != "loss_scale"}
    broken = pair.run(microbatches(0, count=1))
    assert not broken.updated and not broken.finite and pair.steps[0]._graphs.state()[[0, 3]].tolist() == [3, 1]
    assert all(torch.equal(pair.steps[0].state_dict(training_weights=True)[name], each) for name, each in kept.items())


def test_the_gradient_noise_scale_is_measured_on_captured_gradients():
    pair = Pair(precision="fp16", noise_scale_every=2)
    reference = TrainStep(Model(ModelConfig(**LLAMA)), learning_rate=1e-2, noise_scale_every=2)
    for number in range(3):
        found, expected = pair.run(microbatches(number, count=3)), reference.run(microbatches(number, count=3), 1e-2)
        assert (found.noise_scale is None) == (expected.noise_scale is None)
        state = pair.steps[0].noise_scale.state
        torch.testing.assert_close(state, reference.noise_scale.state, rtol=5e-2, atol=0)
        assert state[2] == 1 + number // 2
    pair.check()


def test_every_shape_is_captured_once_however_often_shapes_change():
    """Five kinds of batches, each twice, two kinds mixed within a step, and the update's graph is common to them all."""
    pair = Pair()
    kinds = [{"shape": (rows, 8), "packed": packed} for rows, packed in ((1, True), (1, False), (2, True), (2, False), (3, False))]
    for number in range(2):
        for kind in kinds:
            pair.run(microbatches(number, count=1, **kind))
        pair.run(microbatches(number, count=1) + microbatches(number, count=1, shape=(3, 8), packed=False))
        assert len(pair.graphs.records) == len(kinds) + 1
    pair.check()


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_others_take_away_or_leave_behind_change_nothing(to_none):
    pair = Pair()
    for number in range(2):
        pair.run(microbatches(number))
        for step in pair.steps:
            step.model.zero_grad(set_to_none=to_none)
            batch = microbatches(7, count=1)[0]
            step.model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens).backward()
        gc.collect()
    pair.check()
    alone = Pair.step(LLAMA, "fp32", "none", None)
    for number in range(2):
        alone.run(microbatches(number))
    for mine, theirs in zip(pair.steps[0].model.parameters(), alone.model.parameters()):
        assert torch.equal(mine, theirs)


def test_a_step_that_broke_off_leaves_no_gradient_to_the_next_one():
    pair, alone = Pair(), Pair.step(LLAMA, "fp32", "none", None)

    def fail():
        raise KeyboardInterrupt

    for each in (pair, alone):
        each.run(microbatches(0))
    for step in pair.steps:
        with pytest.raises(KeyboardInterrupt):
            step.run(microbatches(5), before_update=fail)
    for each in (pair, alone):
        each.run(microbatches(1))
    for mine, theirs in zip(pair.steps[0].model.parameters(), alone.model.parameters()):
        assert torch.equal(mine, theirs)


def test_the_graphs_follow_precision_recomputation_and_backend():
    """What a script changes between steps is not left to a graph that was captured before."""
    pair = Pair()
    changes = [("compute_dtype", torch.bfloat16), ("recompute", "blocks"), ("compute_dtype", torch.float32), ("recompute", "none")]
    for number, (name, value) in enumerate(changes):
        pair.run(microbatches(number % 3))
        for step in pair.steps:
            setattr(step.model, name, value)
    with runtime.use(deterministic=False):
        pair.run(microbatches(0))
    pair.run(microbatches(1))
    pair.check()
    assert len(pair.graphs.records) == 1 + 5


def test_evaluations_and_checkpoints_between_replays_and_a_resume_change_nothing():
    pair, whole = Pair(optimizer="schedule_free"), Pair(optimizer="schedule_free")
    for number in range(2):
        whole.run(microbatches(number, count=1 + number))
        pair.run(microbatches(number, count=1 + number))
        for step in pair.steps:
            with step.evaluation_weights(), torch.no_grad():
                assert torch.isfinite(step.model.loss(*microbatches(9, count=1)[0][:2]))
    states = [{name: each.clone() for name, each in step.state_dict(training_weights=True).items()} for step in pair.steps]
    resumed = Pair(optimizer="schedule_free")
    for step, state in zip(resumed.steps, states):
        step.load_state_dict(state)
    for pair in (resumed, whole):
        pair.run(microbatches(2, count=3))
        pair.check()
    for name, tensor in whole.steps[0].state_dict(training_weights=True).items():
        assert torch.equal(tensor, resumed.steps[0].state_dict(training_weights=True)[name]), name


def test_a_checkpoint_restored_between_two_replays_is_what_the_graphs_go_on_from():
    pair = Pair()
    pair.run(microbatches(0))
    states = [{name: each.clone() for name, each in step.state_dict(training_weights=True).items()} for step in pair.steps]
    first = pair.run(microbatches(1))
    for step, state in zip(pair.steps, states):
        step.load_state_dict(state)
    assert pair.run(microbatches(1)) == first
    pair.check()


def test_the_average_of_the_weights_is_part_of_the_graph_and_knows_updates_that_were_left_out():
    pair = Pair(ema=0.9)
    step = pair.steps[0]
    average, expected = step.ema, Ema(step.optimizer.parameters, 0.9)
    for number in range(3):
        if number == 1:
            kept = step.model.backbone.norm.weight.detach().clone()
            for each in pair.steps:
                each.model.backbone.norm.weight.detach()[1] = float("inf")
        found = [each.run(microbatches(number, count=1), 1e-2) for each in pair.steps]
        assert all(each.updated == (number != 1) for each in found)
        for each in pair.steps if number == 1 else ():
            each.model.backbone.norm.weight.detach().copy_(kept)
        if number != 1:
            expected.update(step.optimizer.num_updates)
        for name, weights in average.weights.items():
            assert torch.equal(weights, expected.weights[name]), name
    pair.check()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_steps_with_and_without_a_finite_loss_agree(precision):
    pair = Pair(precision=precision)
    assert pair.run(microbatches(0)).updated
    for step in pair.steps:
        weight = step.model.backbone.norm.weight
        kept = weight.detach().clone()
        weight.detach()[1] = float("inf")
        lost = step.run(microbatches(1), 1e-2)
        assert not lost.updated and not lost.finite
        weight.detach().copy_(kept)
    assert pair.run(microbatches(2)).updated
    pair.check()


def test_batches_made_ahead_are_those_of_the_next_step():
    pair, plain = Pair(), Pair.step(LLAMA, "fp32", "none", None)
    coming = microbatches(0)
    for number in range(2):
        following = microbatches(number + 1)
        assert pair.run(coming, ahead=lambda following=following: following) == plain.run(microbatches(number))
        assert pair.steps[0]._graphs._staging.ahead[0] is following
        coming = following


def test_a_step_is_freed_with_its_last_reference():
    """Its gradients and graphs are gigabytes: they must not wait for the collector of cycles."""
    step = Pair().steps[0]
    step.run(microbatches(0), 1e-2)
    gone = weakref.ref(step._graphs)
    gc.disable()
    try:
        del step
        assert gone() is None
    finally:
        gc.enable()


def test_a_capture_changes_no_weight_no_moment_and_no_counter(monkeypatch):
    step = Pair(precision="fp16").steps[0]
    captured, checked = step._graphs._captured, []

    def unchanged(accumulate):
        before = {name: each.clone() for name, each in step.state_dict(training_weights=True).items()}
        graph = captured(accumulate)
        for name, each in step.state_dict(training_weights=True).items():
            assert torch.equal(each, before[name]), name
        checked.append(len(step._graphs._graphs.records))
        return graph

    monkeypatch.setattr(step._graphs, "_captured", unchanged)
    for number in range(2):
        step.run(microbatches(number, count=1, shape=(1 + number, 8)), 1e-2)
    assert checked == [2, 3]  # that of the update comes with the first


def test_memory_that_ends_during_a_capture_leaves_a_step_that_goes_on():
    """First of all, and again where another shape comes."""
    pair = Pair(precision="fp16", optimizer="lion")
    for shape in ((2, 8), (1, 8)):
        before = {name: each.clone() for name, each in pair.steps[0].state_dict(training_weights=True).items()}
        for place in ("warm-up", "capture"):
            with pytest.raises(RuntimeError), Memory(place, 20):
                pair.steps[0].run(microbatches(0, count=1, shape=shape), 1e-2)
            for name, each in pair.steps[0].state_dict(training_weights=True).items():
                assert torch.equal(each, before[name]), name
        assert pair.run(microbatches(0, count=1, shape=shape)).updated
    pair.check()


def test_memory_that_ends_during_the_capture_of_the_update_leaves_its_counters_alone(monkeypatch):
    step = Pair(precision="fp16").steps[0]
    before = step._graphs.state()

    def failing():
        step._graphs._state.mul_(0.5)  # as the kernels do where they leave out an update
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(step._graphs, "_update", failing)
    with pytest.raises(torch.OutOfMemoryError):
        step.run(microbatches(0), 1e-2)
    assert torch.equal(step._graphs.state(), before)
