"""The training step as recorded programs against the same step operation by operation: equal bit for bit, whatever happens between the steps."""

import gc
import weakref

import pytest
import torch

pytest.importorskip("numba")

from cllm import Model, ModelConfig, TrainStep, runtime
from cllm.data import IGNORE, Batch
from cllm.model import memory, programs
from cllm.runtime import profiler
from cllm.runtime.errors import UserError

SIZES = {"vocab_size": 37, "embed_dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48, "max_seq_len": 16}
LLAMA = SIZES | {"num_kv_heads": 1}
GPT2 = SIZES | {"norm": "layer"}
OFF = "CLLM_STEP_PROGRAM"


@pytest.fixture(autouse=True)
def few_threads():
    with runtime.use(threads=2):
        yield


def microbatches(seed, count=1, packed=True, shape=(2, 8)):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        tokens, targets = (torch.randint(0, 37, shape, generator=generator) for _ in range(2))
        targets[0, : 1 + number] = IGNORE
        cut = 1 + (3 + seed) % (shape[1] - 1)
        bounds = [0, cut, cut, *([cut + 1] if seed % 2 else []), *range(shape[1], tokens.numel() + 1, shape[1])]  # one document is empty
        made.append(Batch(tokens, targets, torch.tensor(bounds, dtype=torch.int32) if packed else None))
    return made


class Pair:
    """The same step twice: replayed, and operation by operation. What one of them does the other one does too."""

    def __init__(self, monkeypatch, sizes=LLAMA, recompute="none", **options):
        self.monkeypatch = monkeypatch
        self.steps = [TrainStep(Model(ModelConfig(**sizes)), learning_rate=1e-2, **options) for _ in range(2)]
        for step in self.steps:
            step.model.recompute = recompute

    def each(self):
        """Both of them, each as it is to run."""
        for step, on in zip(self.steps, "10"):
            self.monkeypatch.setenv(OFF, on)
            yield step

    def run(self, microbatches, rate=1e-2, **options):
        replayed, plain = (step.run(microbatches, rate, **options) for step in self.each())
        assert repr(replayed) == repr(plain)  # NaN is not equal to itself
        return replayed

    def check(self, replayed):
        """replayed: how many microbatches a program alone has computed."""
        ours, theirs = (step.state_dict(training_weights=True) for step in self.steps)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
        assert [step._programs.num_replayed for step in self.steps] == [replayed, 0], self.steps[0]._programs.reasons


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (LLAMA | {"qk_norm": True}, {}),
        (LLAMA, {"recompute": "blocks"}),
        (LLAMA | {"tie_embeddings": False, "attention_bias": True, "trigram_rows": 70}, {"recompute": "feed_forward", "packed": False}),
        (LLAMA | {"sliding_window": 4, "softcap": 20.0, "bigram_rows": 19, "trigram_rows": 70}, {}),
        (GPT2, {"recompute": "blocks"}),
        (GPT2, {"packed": False}),
    ],
)
def test_replayed_training_is_equal_bit_for_bit(monkeypatch, sizes, precision, options):
    packed = options.get("packed", True)
    pair = Pair(monkeypatch, sizes, options.get("recompute", "none"), precision=precision, label_smoothing=0.1, z_loss=1e-3)
    for number in range(5):
        assert pair.run(microbatches(number, packed=packed), 1e-2 / (number + 1)).updated
    pair.check(replayed=2)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [(LLAMA, {"recompute": "blocks"}), (GPT2, {"packed": False, "precision": "bf16"})],
)
def test_replayed_steps_draw_the_masks_of_their_update_and_of_their_rows(monkeypatch, sizes, options):
    packed = options.pop("packed", True)
    pair = Pair(monkeypatch, sizes, dropout=0.3, seed=2**63 + 5, **options)
    for number in range(4):
        one, two = microbatches(number, count=2, packed=packed)
        pair.run([one, two._replace(first_row=1000 * number)])
    pair.check(replayed=4)
    for step in pair.steps:
        step.dropout.key[0] += 1  # another seed: other masks, from the same program
    pair.run(microbatches(9, packed=packed))
    pair.check(replayed=5)


def test_accumulated_microbatches_are_replayed_within_one_step(monkeypatch):
    pair = Pair(monkeypatch)
    beats = []
    for number in range(3):
        pair.run(microbatches(number, count=1) * 4, beat=lambda: beats.append(0))
    pair.check(replayed=2 + 4)
    assert len(beats) == 2 * 3 * 4
    pair.run(microbatches(7, count=1, packed=False) + microbatches(8, count=1))  # one that has no program, another number of targets
    pair.check(replayed=7)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "schedule_free"])
def test_every_optimizer_with_averages_and_the_noise_scale(monkeypatch, optimizer):
    pair = Pair(monkeypatch, GPT2, optimizer=optimizer, ema=0.0 if optimizer == "schedule_free" else 0.9, noise_scale_every=2, precision="bf16")
    for number in range(4):
        result = pair.run(microbatches(number, count=1) * 3)
        assert (result.noise_scale is None) == (number % 2 == 1)
    pair.check(replayed=1 + 2 * 3)


def test_shapes_and_settings_that_change_have_programs_of_their_own(monkeypatch):
    pair = Pair(monkeypatch)
    for number in range(4):
        for kind in ({"shape": (1, 8)}, {"shape": (3, 8)}, {"packed": False}):
            pair.run(microbatches(number, **kind))
    pair.check(replayed=3)
    for name, value in (("compute_dtype", torch.bfloat16), ("recompute", "blocks"), ("compute_dtype", torch.float32), ("recompute", "none")):
        for step in pair.steps:
            setattr(step.model, name, value)
        pair.run(microbatches(0, shape=(1, 8)))
    pair.check(replayed=4)  # the last one of them is as at the beginning
    for threads in (1, 3, 2):
        with runtime.use(threads=threads):
            pair.run(microbatches(1, shape=(1, 8)))
    pair.check(replayed=5)
    with runtime.use(backend="torch"):
        pair.run(microbatches(1, shape=(1, 8)))
    pair.check(replayed=5)


def test_many_threads_replay_the_bits_of_one(monkeypatch):
    ends = []
    for threads in (1, 7):
        pair = Pair(monkeypatch, GPT2, precision="bf16")
        with runtime.use(threads=threads):
            for number in range(4):
                pair.run(microbatches(number))
        pair.check(replayed=1)
        ends.append(pair.steps[0].state_dict(training_weights=True))
    assert all(torch.equal(one, ends[1][name]) for name, one in ends[0].items())


def test_evaluations_checkpoints_and_a_resume_between_replays_change_nothing(monkeypatch):
    pair, whole = Pair(monkeypatch, ema=0.9), Pair(monkeypatch, ema=0.9)
    for number in range(5):
        whole.run(microbatches(number))
        pair.run(microbatches(number))
        for step in pair.each():
            with step.evaluation_weights(), torch.no_grad():
                assert torch.isfinite(step.model.loss(*microbatches(9)[0][:2]))
    states = [{name: each.clone() for name, each in step.state_dict(training_weights=True).items()} for step in pair.steps]
    resumed = Pair(monkeypatch, ema=0.9)
    for other in (pair, resumed):  # one goes back to where it is, with its programs, the other one begins there
        for step, state in zip(other.steps, states):
            step.load_state_dict(state)
    for number in range(5, 9):
        for each in (pair, resumed, whole):
            each.run(microbatches(number))
    for each, replayed in ((pair, 6), (resumed, 1), (whole, 6)):
        each.check(replayed)
        for name, tensor in whole.steps[0].state_dict(training_weights=True).items():
            assert torch.equal(tensor, each.steps[0].state_dict(training_weights=True)[name]), name


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_others_take_away_or_leave_behind_change_nothing(monkeypatch, to_none):
    pair = Pair(monkeypatch)
    for number in range(5):
        pair.run(microbatches(number))
        for step in pair.each():
            step.model.zero_grad(set_to_none=to_none)
            batch = microbatches(7)[0]
            step.model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens).backward()
        gc.collect()
    pair.check(replayed=2)


def test_a_step_that_broke_off_anywhere_leaves_nothing_to_the_next_one(monkeypatch):
    pair = Pair(monkeypatch)

    def fail():
        raise KeyboardInterrupt

    for number in range(5):
        for options in ({"before_update": fail}, {"beat": fail}):
            for step in pair.each():
                with pytest.raises(KeyboardInterrupt):
                    step.run(microbatches(11 + number), 1e-2, **options)
        pair.run(microbatches(number))
    pair.check(replayed=3 * 5 - 3)


def test_what_is_not_finite_is_left_out_as_it_is_without_programs(monkeypatch):
    pair = Pair(monkeypatch)
    for number in range(5):
        kept = [step.model.backbone.norm.weight.detach().clone() for step in pair.steps]
        if number == 3:
            for step in pair.steps:
                step.model.backbone.norm.weight.detach()[1] = float("inf")
        assert pair.run(microbatches(number)).updated == (number != 3)
        for step, weight in zip(pair.steps, kept) if number == 3 else ():
            step.model.backbone.norm.weight.detach().copy_(weight)
    pair.check(replayed=2)


@pytest.mark.parametrize("wrong", [-1, 37])
def test_tokens_outside_of_the_vocabulary_are_refused_as_ever(monkeypatch, wrong):
    pair = Pair(monkeypatch)
    for number in range(4):
        pair.run(microbatches(number))
    for name in ("tokens", "targets"):
        batch = microbatches(5)[0]
        getattr(batch, name)[1, 3] = wrong
        for step in pair.each():
            with pytest.raises(UserError, match=rf"{name} holds {wrong}"):
                step.run([batch])
    pair.run(microbatches(6))
    pair.check(replayed=2)


def test_weights_in_another_place_are_not_those_of_the_program(monkeypatch):
    pair = Pair(monkeypatch)
    for number in range(4):
        pair.run(microbatches(number))
    for step in pair.steps:
        weight = step.model.backbone.norm.weight
        weight.data = weight.data.clone()
    for number in range(4):
        pair.run(microbatches(number))
    pair.check(replayed=1 + 1)


@pytest.mark.parametrize("watch", ["module", "gradient", "loss", "profiler"])
def test_whoever_watches_the_operations_sees_them(monkeypatch, watch):
    pair, seen = Pair(monkeypatch), []
    step = pair.steps[0]
    for number in range(4):
        pair.run(microbatches(number))
    assert step._programs.num_replayed == 1
    if watch == "module":
        step.model.backbone.blocks[0].register_forward_hook(lambda *_: seen.append(0))
    elif watch == "gradient":
        step.model.backbone.norm.weight.register_hook(lambda _: seen.append(0))
    elif watch == "loss":
        loss = step.model.loss
        monkeypatch.setattr(step.model, "loss", lambda *args, **options: (seen.append(0), loss(*args, **options))[1])
    if watch == "profiler":
        with torch.autograd.profiler.profile() as found:
            pair.run(microbatches(5))
        seen = [each for each in found.function_events if each.name == "cllm::rms_norm_residual"]
        assert len(seen) >= 2
    else:
        pair.run(microbatches(5))
        assert len(seen) == 1
    pair.check(replayed=1)


def test_our_profiler_sees_the_kernels_of_a_replay_by_name(monkeypatch):
    pair, seen = Pair(monkeypatch, GPT2), []
    for number in range(4):
        pair.run(microbatches(number))
    for step in pair.each():
        with profiler.record() as recording:
            step.run(microbatches(4), 1e-2)
        seen.append([each.name for each in recording.kernels()])
    assert seen[0] == seen[1] and {"attention backward", "adamw"} <= set(seen[0])
    pair.check(replayed=2)


def test_a_program_that_gives_other_bits_is_not_believed(monkeypatch, capsys):
    pair = Pair(monkeypatch)
    for step in pair.steps:
        loss, calls = step._loss_of, iter(range(1, 100))
        monkeypatch.setattr(step, "_loss_of", lambda *args, loss=loss, calls=calls: loss(*args) + float(next(calls)))
    for number in range(5):
        pair.run(microbatches(number))
    pair.check(replayed=0)
    assert pair.steps[0]._programs.reasons == ["it gives other bits than its operations one by one"]
    assert capsys.readouterr().err.count("operation by operation") == 1


def test_steps_that_need_much_memory_are_not_recorded(monkeypatch):
    config = ModelConfig(**LLAMA)
    needed = memory.predict(config, 2, 8).program
    pair = Pair(monkeypatch)
    for number in range(4):
        pair.run(microbatches(number))
    assert 0 < pair.steps[0]._programs.bytes < 1 << 20
    monkeypatch.setattr(memory, "MOST_PROGRAM_BYTES", needed - 1)
    assert memory.predict(config, 2, 8).program == 0
    pair = Pair(monkeypatch)
    for number in range(4):
        pair.run(microbatches(number))
    pair.check(replayed=0)
    monkeypatch.undo()

    def full(*_):
        raise MemoryError

    monkeypatch.setattr("cllm.runtime.workers.program.Arena", full)
    pair = Pair(monkeypatch)
    for number in range(4):
        pair.run(microbatches(number))
    pair.check(replayed=0)
    monkeypatch.undo()
    monkeypatch.setattr(programs, "MOST_PROGRAM_BYTES", 20_000)  # more is needed than was predicted
    pair = Pair(monkeypatch)
    for number in range(4):
        pair.run(microbatches(number))
    pair.check(replayed=0)


def test_shapes_that_always_differ_leave_little_behind(monkeypatch):
    monkeypatch.setattr(programs, "MOST_KINDS", 3)
    pair = Pair(monkeypatch)
    for number in range(7):
        pair.run(microbatches(number, shape=(1 + number, 8)))
    assert len(pair.steps[0]._programs._kinds) <= 3
    pair.check(replayed=0)


@pytest.mark.parametrize("bounds", [[0, 16], [0, *[0] * 20, 16]])
def test_documents_that_a_program_has_no_room_for_run_by_operations(monkeypatch, bounds):
    pair = Pair(monkeypatch)
    for number in range(4):
        pair.run(microbatches(number))
    pair.run([microbatches(5)[0]._replace(cu_seqlens=torch.tensor(bounds, dtype=torch.int32))])
    pair.check(replayed=1)
    pair.run(microbatches(6))
    pair.check(replayed=2)


def test_a_step_is_freed_with_its_last_reference():
    """Its memory must not wait for the collector of cycles."""
    step = TrainStep(Model(ModelConfig(**LLAMA)))
    for number in range(4):
        step.run(microbatches(number))
    assert step._programs.num_replayed == 1
    gone = weakref.ref(next(each for each in step._programs._kinds.values()).program)
    gc.disable()
    try:
        del step
        assert gone() is None
    finally:
        gc.enable()
