"""Runs with every optimizer, with averages, ramp and plateau: killed they go on bit by bit, and what is stored is what was evaluated."""

import random

import pytest
import torch
from command import Started, lines, wait_until

from cllm import runtime
from cllm.checkpoint.folder import read_checkpoint
from cllm.checkpoint.model_file import load
from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore
from cllm.config.model import ModelConfig
from cllm.config.schema import OPTIMIZERS
from cllm.config.train import TrainConfig
from cllm.data.pipeline import prepare
from cllm.evaluate.loss import evaluate
from cllm.model.memory import predict
from cllm.model.model import Model
from cllm.monitor.metrics import TIME_FIELDS, read_metrics
from cllm.runtime.errors import UserError
from cllm.train.step import TrainStep
from cllm.train.trainer import Trainer

STEPS = 40
SETTINGS = {
    "steps": STEPS, "seq_len": 16, "batch_size": 2, "eval_every": 5, "checkpoint_every": 7, "precision": "fp32", "threads": 1, "tensorboard": False,
    "learning_rate": 5e-3,
}  # fmt: skip
SIZES = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 16, "bigram_rows": 30}
VARIANTS = {name: {"optimizer": name} for name in OPTIMIZERS} | {
    "average, ramp, noise scale": {"ema": 0.9, "grad_accum": 3, "batch_ramp": 15, "noise_scale_every": 2},
    "plateau": {"schedule": "plateau", "plateau_patience": 1, "learning_rate": 0.3, "warmup": 3, "min_lr": 1e-3},
}

CHILD = """
import sys, time
from cllm.config.model import ModelConfig
from cllm.data import Dataset
from cllm.model.memory import predict
from cllm.model.model import Model
from cllm.train.step import TrainStep
from cllm.train.trainer import Trainer
from cllm.config.train import TrainConfig
data, out, sizes, settings, last = sys.argv[1], sys.argv[2], eval(sys.argv[3]), eval(sys.argv[4]), int(sys.argv[5])
dataset = Dataset.open(data)
trainer = Trainer(Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, **sizes)), dataset, TrainConfig(**settings), out=out)
microbatches = trainer.data.microbatches
trainer.data.microbatches = lambda step: time.sleep(600 if step == last else 0) or microbatches(step)  # waits there to be killed
trainer.fit()
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    (folder / "text.txt").write_text(" ".join(generator.choice(["one", "two", "three", "many"]) for _ in range(800)), encoding="utf-8")
    return prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.05)


def trainer(dataset, out, **values):
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, **SIZES))
    return Trainer(model, dataset, TrainConfig(**{**SETTINGS, **values}), out=out)


def outcome(out):
    newest = CheckpointStore(out / "checkpoints").newest_good()
    rows = [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in read_metrics(out / "metrics.jsonl")]
    return newest.step, sha256_of(newest.path / "model.safetensors"), sha256_of(newest.path / "optimizer.safetensors"), rows


def killed(dataset, out, at, settings):
    """Trains in a process of its own for `at` steps, then kills it."""
    process = Started(dataset.folder, out, SIZES, {**SETTINGS, **settings}, at, program=CHILD)
    wait_until(lambda: lines(out / "metrics.jsonl") >= at, process)
    assert process.poll() is None, process.communicate()[1]
    process.kill()
    process.wait()


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_in_the_middle_and_resumed_with_other_threads_a_run_gives_the_same_bits(dataset, tmp_path, variant):
    settings = VARIANTS[variant]
    trainer(dataset, tmp_path / "straight", **settings).fit()
    killed(dataset, tmp_path / "run", 12 + len(variant) % 9, settings)
    result = trainer(dataset, tmp_path / "run", **settings, **({"threads": 2} if "threads" not in settings else {})).fit()
    assert result.resumed_from is not None and 0 < result.resumed_from < STEPS
    assert outcome(tmp_path / "run") == outcome(tmp_path / "straight")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns(dataset, tmp_path, variant):
    result = trainer(dataset, tmp_path / "run", **VARIANTS[variant]).fit()
    assert result.best_loss < result.unigram_loss and result.skipped_steps == 0  # behind a plateau the loss may rise for some steps


@pytest.mark.parametrize("settings", [{"ema": 0.9}, {"optimizer": "schedule_free"}], ids=["ema", "schedule-free"])
def test_what_is_stored_and_left_in_memory_is_the_average_that_was_evaluated(dataset, tmp_path, settings):
    run = trainer(dataset, tmp_path / "run", **settings)
    result = run.fit()
    loaded, _ = load(tmp_path / "run")
    found = evaluate(loaded, dataset.val, seq_len=16, batch_size=2)
    assert found.loss == result.validation.loss
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), run.model.parameters()))
    stored = CheckpointStore(tmp_path / "run" / "checkpoints").newest_good()
    training = {name.removeprefix("training."): tensor for name, tensor in stored.optimizer.items() if name.startswith("training.")}
    assert training.keys() == dict(loaded.named_parameters()).keys()
    assert any(not torch.equal(training[name], stored.weights[name]) for name in training)


def test_the_ramp_reaches_the_data_and_takes_each_window_once(dataset, tmp_path):
    run = trainer(dataset, tmp_path / "run", grad_accum=3, batch_ramp=6)
    sizes, taken = [], []
    for step in range(9):
        microbatches = run.data.microbatches(step)
        sizes.append(len(microbatches))
        taken += [each.tokens for each in microbatches]
    assert sizes == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(torch.equal(tokens, run.data.batches.batch(index).tokens) for index, tokens in enumerate(taken))


def test_the_plateau_lowers_the_rate_where_the_loss_no_longer_falls(dataset, tmp_path, capfd):
    trainer(dataset, tmp_path / "run", **VARIANTS["plateau"] | {"steps": 80}).fit()
    rows = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    rates = [row["learning_rate"] for row in rows if row["kind"] == "train"]
    assert rates[0] == pytest.approx(0.3 / 4) and max(rates) == 0.3 and rates[-1] < 0.3
    best, expected = float("inf"), 0.3
    for row in rows:
        if row["kind"] == "eval":
            if row["loss"] < best * (1 - 1e-4):
                best = row["loss"]
            else:
                expected /= 2
        elif row["kind"] == "train" and row["step"] > 4:
            assert row["learning_rate"] == pytest.approx(expected)
    assert "the learning rate falls to 0.15" in capfd.readouterr().err


@pytest.mark.parametrize("settings", [{}, {"ema": 0.5}], ids=["plain", "ema"])
def test_the_best_weights_are_restored_and_training_could_still_go_on(dataset, tmp_path, settings, capfd):
    options = {"steps": 60, "eval_every": 1, "checkpoint_every": 100, "patience": 3, "learning_rate": 1.0, "grad_clip": 0.0, "warmup": 0, **settings}
    last = trainer(dataset, tmp_path / "plain", **options).fit()
    run = trainer(dataset, tmp_path / "run", restore_best=True, **options)
    result = run.fit()
    assert result.stopped_early and result.step == last.step and result.best_step == last.best_step == result.step - 3
    assert result.validation.loss == result.best_loss < last.validation.loss
    assert f"restored the weights of step {result.best_step}" in capfd.readouterr().err
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    best, newest = read_checkpoint(store.path(result.best_step)), store.newest_good()
    assert newest.step == result.step and all(torch.equal(newest.weights[name], best.weights[name]) for name in best.weights)
    loaded, _ = load(tmp_path / "run")
    assert evaluate(loaded, dataset.val, seq_len=16, batch_size=2).loss == result.best_loss
    # The weights that the last step left are there as well: the next step from them is that of the run that restored nothing.
    plain = CheckpointStore(tmp_path / "plain" / "checkpoints").newest_good()
    raw = {name: plain.optimizer.get(f"training.{name}", tensor) for name, tensor in plain.weights.items()}
    assert all(torch.equal(newest.optimizer[f"training.{name}"], raw[name]) for name in raw)
    assert newest.state["best"] == plain.state["best"]
    again = trainer(dataset, tmp_path / "run", restore_best=True, **options).fit()
    assert again.validation.loss == result.best_loss and again.step == result.step


def test_another_optimizer_does_not_go_on_with_a_run(dataset, tmp_path):
    trainer(dataset, tmp_path / "run", optimizer="lion", steps=2).fit()
    with pytest.raises(UserError, match=r"optim\.optimizer: 'lion' there, 'adamw' here"):
        trainer(dataset, tmp_path / "run", steps=2).fit()


def test_the_noise_scale_is_among_the_metrics(dataset, tmp_path):
    trainer(dataset, tmp_path / "run", steps=12, grad_accum=4, noise_scale_every=3).fit()
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert {row["step"] for row in rows if "noise_scale" in row} <= {1, 4, 7, 10}
    assert any(row["noise_scale"] > 0 for row in rows if "noise_scale" in row)


@pytest.mark.parametrize("settings", [*({"optimizer": name} for name in OPTIMIZERS), {"ema": 0.9}], ids=str)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_predicted_memory_of_the_optimizer_is_that_of_its_state(settings, norm):
    config = ModelConfig(vocab_size=512, embed_dim=64, num_layers=3, num_heads=2, max_seq_len=32, norm=norm, tie_embeddings=norm == "layer")
    step = TrainStep(Model(config), **settings)
    state = [tensor for name, tensor in step.state_dict().items() if not name.startswith("training.")]
    predicted = predict(config, 1, 32, "fp32", "none", settings.get("optimizer", "adamw"), average="ema" in settings).optimizer
    assert predicted == pytest.approx(sum(tensor.numel() * tensor.element_size() for tensor in state), rel=0.02)


# One group of matrices, several, and groups of one matrix.
@pytest.mark.parametrize(("norm", "embed_dim", "threads"), [("rms", 32, 3), ("rms", 256, 1), ("layer", 320, 3)])
def test_the_predicted_memory_of_an_update_with_muon_is_what_it_keeps_for_its_work(norm, embed_dim, threads):
    pytest.importorskip("numba")
    config = ModelConfig(vocab_size=64, embed_dim=embed_dim, num_layers=3, num_heads=2, max_seq_len=8, norm=norm)
    with runtime.use(threads=threads):
        step = TrainStep(Model(config), optimizer="muon")
        step(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))
        found = predict(config, 1, 8, optimizer="muon")
    assert found.update == step.optimizer._again._places.bytes > 0
    assert found.update in [size for _, size, _ in found.rows()] and found.total == sum(size for _, size, _ in found.rows())
    assert predict(config, 1, 8).update == predict(config, 1, 8, optimizer="muon", device=torch.device("meta")).update == 0
