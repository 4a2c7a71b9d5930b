"""Steps that go wrong: each kind is found, recorded with its documents, and handled as its policy says; a rollback survives a kill."""

import json
import math
import random
import time

import pytest
import torch
from command import Started
from hypothesis import given
from hypothesis import strategies as st

from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore
from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data.pipeline import prepare
from cllm.model.model import Model
from cllm.monitor.metrics import TIME_FIELDS, read_metrics
from cllm.monitor.records import StepResult
from cllm.train.faults import IN_A_ROW, ROLLBACKS, FaultError, Faults, NonFiniteError
from cllm.train.trainer import Trainer


def result(loss=3.0, norm=1.0, nonfinite=0, targets=10):
    return StepResult(loss, norm, norm, nonfinite, targets, 1e-3, nonfinite == 0)


def steady(faults, count=40, seed=0):
    generator = random.Random(seed)
    for step in range(1, count + 1):
        assert faults.judge(step, result(generator.gauss(3.0, 0.05), generator.uniform(0.5, 2.0))) is None
    return faults


# -- what is found -----------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.floats(0.001, 12.0), st.floats(0.0, 0.1))
def test_a_loss_that_falls_with_noise_is_no_fault(seed, start, noise):
    generator, faults = random.Random(seed), Faults()
    for step in range(200):
        loss = start * (0.99**step) * (1 + noise * generator.uniform(-1, 1))
        assert faults.judge(step, result(loss, generator.uniform(0.1, 3.0))) is None


WRONG = {"spike": result(loss=6.0), "explosion": result(norm=500.0), "vanishing": result(norm=1e-9), "nonfinite": result(loss=math.nan, nonfinite=1)}


@pytest.mark.parametrize("kind, wrong", WRONG.items())
def test_each_kind_of_fault_is_found_and_a_lasting_one_is_told_once(kind, wrong):
    faults = steady(Faults(on_nonfinite="skip"))
    found = faults.judge(41, wrong)
    assert found.kind == kind and found.action == ("skip" if kind == "nonfinite" else "warn") and "step 41" in found.text
    again = faults.judge(42, wrong)
    assert (again is not None) == (kind == "nonfinite")
    assert faults.judge(43, result()) is None
    assert faults.judge(44, wrong).kind == kind


def test_a_loss_that_stays_high_becomes_the_usual_one():
    faults = steady(Faults())
    assert faults.judge(41, result(loss=6.0)).kind == "spike"
    for step in range(42, 120):
        faults.judge(step, result(loss=6.0))
    assert faults.judge(120, result(loss=3.0)) is None and faults.judge(121, result(loss=6.0)) is None


def test_a_step_without_targets_says_nothing():
    assert Faults().judge(1, result(loss=0.0, norm=0.0, targets=0)) is None


@given(st.lists(st.sampled_from([2.9, 3.0, 3.1, 9.0, math.nan]), max_size=60), st.integers(0, 60))
def test_verdicts_are_the_same_after_a_checkpoint(losses, cut):
    straight, first = Faults(on_nonfinite="skip"), Faults(on_nonfinite="skip")
    wanted = [straight.judge(step, result(loss, nonfinite=int(math.isnan(loss)))) for step, loss in enumerate(losses)]
    got = [first.judge(step, result(loss, nonfinite=int(math.isnan(loss)))) for step, loss in enumerate(losses[:cut])]
    second = Faults(on_nonfinite="skip")
    second.load(json.loads(json.dumps(first.to_dict())))
    got += [second.judge(cut + step, result(loss, nonfinite=int(math.isnan(loss)))) for step, loss in enumerate(losses[cut:])]
    assert got == wanted and second.to_dict() == straight.to_dict()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=8))
def test_rollbacks_leave_out_data_and_repeat_none(moves):
    faults, checkpoint = Faults(), 0
    left_out = set()
    for forward, further in moves:
        checkpoint += forward
        update = checkpoint + further
        bad = [faults.data_of(each) for each in range(checkpoint, update + 1)]
        if faults.roll_back(update, checkpoint):
            left_out |= set(bad)
    used = [faults.data_of(update) for update in range(400)]
    assert used == sorted(set(used)) and not left_out & set(used)
    assert set(range(used[-1] + 1)) == left_out | set(used)


def test_many_steps_in_a_row_that_are_left_out_end_the_run():
    faults = Faults(on_nonfinite="skip")
    for step in range(IN_A_ROW):
        assert faults.judge(step, result(loss=math.inf, nonfinite=3)).action == "skip"
    assert faults.judge(IN_A_ROW, result(loss=math.inf, nonfinite=3)).action == "stop"


# -- in a run ------------------------------------------------------------------------------------------------------------------------

STEPS, EVERY = 40, 5
SETTINGS = {
    "steps": STEPS, "seq_len": 16, "batch_size": 2, "eval_every": 20, "checkpoint_every": EVERY, "precision": "fp32", "threads": 1,
    "tensorboard": False, "shuffle": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(30):
        (folder / "texts" / f"{number:02}.txt").write_text(" ".join(generator.choice(["one", "two", "three", "many"]) for _ in range(60)))
    return prepare(folder / "texts", folder / "tokens", tokenizer="char", val_fraction=0.1)


def trainer(dataset, out, poison=None, factor=math.nan, **values):
    """A run in which the loss of the batch `poison` comes out `factor` times as large."""
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=16))
    run = Trainer(model, dataset, TrainConfig(**{**SETTINGS, **values}), out=out)
    if poison is not None:
        bad, loss = [run.data.batches.batch(each).tokens for each in poison], model.loss

        def poisoned(tokens, *args, **kwargs):
            value = loss(tokens, *args, **kwargs)
            harmed = not kwargs.get("return_stats") and any(torch.equal(tokens, each) for each in bad)
            return value * factor if harmed else value

        model.loss = poisoned
    return run


def outcome(out):
    newest = CheckpointStore(out / "checkpoints").newest_good()
    rows = [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in read_metrics(out / "metrics.jsonl")]
    return newest.step, sha256_of(newest.path / "model.safetensors"), sha256_of(newest.path / "optimizer.safetensors"), rows


def events(out):
    return [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "event"]


ROLLED_BACK = [("nonfinite", math.nan, "on_nonfinite"), ("spike", 50.0, "on_spike"), ("explosion", 1e6, "on_gradient")]


@pytest.mark.parametrize("kind, factor, policy", ROLLED_BACK)
def test_a_rollback_goes_back_to_the_checkpoint_and_on_with_other_data(dataset, tmp_path, kind, factor, policy, capfd):
    values = {policy: "rollback", **({"spike_sigmas": 0.0} if kind == "explosion" else {})}
    run = trainer(dataset, tmp_path / "run", [22], factor, **values)
    final = run.fit()
    assert final.step == STEPS and final.resumed_from is None
    (event,) = events(tmp_path / "run")
    assert (event["event"], event["action"], event["step"], event["fault_step"], event["data"]) == (kind, "rollback", 20, 23, 22)
    assert event["documents"] and all(name.endswith(".txt") for name in event["documents"])
    assert [run.state.faults.data_of(update) for update in (19, 20, 21)] == [19, 23, 24]
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"] == list(range(1, STEPS + 1))
    said = capfd.readouterr().err
    assert "back to step 20, and on with other data" in said and event["documents"][0] in said
    # The same as a run that never had the poisoned data, but for having begun the step anew: the weights say so.
    clean = trainer(dataset, tmp_path / "clean", **values)
    clean.state.faults.rollbacks = [(20, 3)]
    clean.fit()
    assert outcome(tmp_path / "clean")[1:3] == outcome(tmp_path / "run")[1:3]


def test_a_run_stopped_after_a_rollback_goes_on_with_the_same_bits(dataset, tmp_path):
    trainer(dataset, tmp_path / "straight", [22], on_nonfinite="rollback").fit()
    broken = trainer(dataset, tmp_path / "run", [22], on_nonfinite="rollback")
    save, saves = broken._save, []

    def killed_after_the_rollback():
        save()
        saves.append(broken.step)
        if saves.count(20) > 1 and broken.step == 25:
            broken._checkpoints.finish()
            raise KeyboardInterrupt

    broken._save = killed_after_the_rollback
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    again = trainer(dataset, tmp_path / "run", [22], on_nonfinite="rollback").fit()
    assert again.resumed_from == 25 and outcome(tmp_path / "run") == outcome(tmp_path / "straight")


def test_a_fault_before_the_first_checkpoint_goes_back_to_the_beginning(dataset, tmp_path):
    final = trainer(dataset, tmp_path / "run", [1], on_nonfinite="rollback").fit()
    assert final.step == STEPS
    assert [(row["step"], row["data"]) for row in events(tmp_path / "run")] == [(0, 1)]


def test_rollbacks_that_do_not_help_end_the_run(dataset, tmp_path):
    run = trainer(dataset, tmp_path / "run", range(7, 40), on_nonfinite="rollback")
    with pytest.raises(FaultError, match=f"after {ROLLBACKS} rollbacks to step 5.*Lower learning_rate"):
        run.fit()
    assert len(events(tmp_path / "run")) == ROLLBACKS


@pytest.mark.parametrize("policy, factor, error", [("on_nonfinite", math.inf, NonFiniteError), ("on_spike", 50.0, FaultError)])
def test_stop_ends_the_run_with_the_documents_and_leaves_the_checkpoint(dataset, tmp_path, policy, factor, error):
    with pytest.raises(error, match=r"step 23: .*data 22 from .*\.txt.*The last good checkpoint is (\S*step-00000020);") as stopped:
        trainer(dataset, tmp_path / "run", [22], factor, **{policy: "stop"}).fit()
    assert f"--from {tmp_path / 'run' / 'checkpoints' / 'step-00000020'} --out NEW" in str(stopped.value)
    assert CheckpointStore(tmp_path / "run" / "checkpoints").newest_good().step == 20
    assert [(row["action"], row["step"]) for row in events(tmp_path / "run")] == [("stop", 23)]


def test_stop_before_the_first_checkpoint_names_none_and_the_run_begins_anew_with_other_settings(dataset, tmp_path):
    with pytest.raises(NonFiniteError, match="has no checkpoint yet: it starts from the beginning, also with other settings") as stopped:
        trainer(dataset, tmp_path / "run", [1]).fit()
    assert "step-" not in str(stopped.value) and not CheckpointStore(tmp_path / "run" / "checkpoints").steps()
    assert trainer(dataset, tmp_path / "run", learning_rate=1e-4).fit().step == STEPS


def test_a_warning_is_recorded_and_changes_no_bit(dataset, tmp_path, capfd):
    trainer(dataset, tmp_path / "run", [22], 50.0).fit()
    assert [(row["event"], row["action"]) for row in events(tmp_path / "run")] == [("spike", "warn")]
    assert "median" in capfd.readouterr().err
    trainer(dataset, tmp_path / "other", [22], 50.0, spike_sigmas=0.0, on_gradient="warn").fit()
    assert outcome(tmp_path / "run")[:3] == outcome(tmp_path / "other")[:3]


def test_a_slow_disk_is_recorded_and_loses_nothing(dataset, tmp_path, capfd, monkeypatch):
    save = CheckpointStore.save
    monkeypatch.setattr("cllm.train.checkpoints.SLOW_DISK_SECONDS", 0.1)
    monkeypatch.setattr(CheckpointStore, "save", lambda self, *args: time.sleep(0.4) or save(self, *args))
    run = trainer(dataset, tmp_path / "run", steps=11)
    run.fit()
    slow = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "machine"]
    assert slow and {row["event"] for row in slow} == {"slow_disk"} and "the disk is slow" in capfd.readouterr().err
    assert CheckpointStore(tmp_path / "run" / "checkpoints").newest_good().step == 11


STALL = """
import sys, time
from cllm.config.model import ModelConfig
from cllm.data import Dataset
from cllm.model.model import Model
from cllm.train.trainer import Trainer
from cllm.config.train import TrainConfig
dataset = Dataset.open(sys.argv[1])
def run_in(out, **values):
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=16))
    return Trainer(model, dataset, TrainConfig(**{**eval(sys.argv[3]), **values}), out=out)
run_in(sys.argv[2] + "-warm", steps=2).fit()  # on a busy machine the kernels may load for longer than the watchdog waits
run = run_in(sys.argv[2], watchdog_seconds=6.0, on_stall="stop")
rows = run.data.batches.rows
run.data.batches.rows = lambda first, count: time.sleep(60) if first == 14 else rows(first, count)
run.fit()
"""


def test_stalled_data_is_located_and_may_end_the_process(dataset, tmp_path):
    process = Started(dataset.folder, tmp_path / "run", SETTINGS, program=STALL)
    _, errors = process.communicate()
    assert process.wait() == 1
    assert "while reading the data of step 8. The run ends (on_stall = stop). Go on with: cllm train --resume" in errors
    assert "in microbatches" in errors  # the stack
    assert trainer(dataset, tmp_path / "run").fit().resumed_from == 5
