"""The run in a folder: what a refused command may not touch, which tokens belong to it, and where it may end elsewhere than it was to."""

import hashlib
import math
import os
import random
import subprocess
import sys

import pytest

from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore
from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data.pipeline import prepare
from cllm.model.model import Model
from cllm.monitor.guards import RunLock
from cllm.monitor.metrics import read_metrics
from cllm.runtime.errors import CheckpointError, CLLMError, DataError, UserError
from cllm.train.run_folder import StoredRun, how_to_train_longer, identity, own_tokens, prune_tokens, stored_run
from cllm.train.trainer import Trainer

SHORT, LONG = 8, 14
SETTINGS = {
    "seq_len": 16, "batch_size": 2, "learning_rate": 1e-2, "warmup": 2, "eval_every": 4, "checkpoint_every": 2, "precision": "fp32", "threads": 1,
    "tensorboard": False, "classes": False, "layers_every": 0,
}  # fmt: skip


def text(path, seed=0):
    generator = random.Random(seed)
    path.write_text(" ".join(generator.choice(["one", "two", "three", "many"]) for _ in range(300)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return prepare(text(folder / "text.txt"), folder / "tokens", tokenizer="char", val_fraction=0.1)


def trainer(dataset, out, **values):
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=16), seed=0)
    return Trainer(model, dataset, TrainConfig(**{**SETTINGS, "steps": SHORT, **values}), out=out)


def content(folder):
    """Every file of a folder, hidden ones too, with a digest of its bytes."""
    return {str(each.relative_to(folder)): hashlib.sha256(each.read_bytes()).hexdigest() for each in sorted(folder.rglob("*")) if each.is_file()}


def bits(out):
    newest = CheckpointStore(out / "checkpoints").newest_good()
    return newest.step, sha256_of(newest.path / "model.safetensors"), sha256_of(newest.path / "optimizer.safetensors")


def rates(out):
    return {row["step"]: row["learning_rate"] for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "train"}


# -- the lock --------------------------------------------------------------------------------------------------------------


def test_a_lock_leaves_nothing_behind_that_it_made(tmp_path):
    with RunLock(tmp_path / "runs" / "a", sign=False) as lock:
        assert lock.made_folder and (tmp_path / "runs" / "a" / ".lock").read_text() == ""
        with lock:  # the same holder may enter it again
            pass
        with pytest.raises(CheckpointError, match="by another process"), RunLock(tmp_path / "runs" / "a"):
            pass
        lock.sign()
        with pytest.raises(CheckpointError, match=f"by process {os.getpid()}"), RunLock(tmp_path / "runs" / "a"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_not_signed_leaves_the_file_of_a_killed_run_as_it_was(tmp_path):
    (tmp_path / ".lock").write_text("999999")
    with RunLock(tmp_path, sign=False):
        pass
    assert (tmp_path / ".lock").read_text() == "999999"


def test_processes_that_take_and_drop_a_lock_in_turn_are_never_two_at_once(tmp_path):
    """The file goes with the lock: a process that opened it before must not take the removed file for the run's."""
    code = (
        "import sys, time; from pathlib import Path; from cllm.monitor.guards import RunLock; from cllm.runtime.errors import CheckpointError\n"
        "run, inside = Path(sys.argv[1]), Path(sys.argv[2]); held = 0; until = time.monotonic() + 60\n"
        "while held < 60 and time.monotonic() < until:\n"
        "    try:\n"
        "        with RunLock(run):\n"
        "            inside.mkdir(); inside.rmdir(); held += 1\n"
        "    except CheckpointError: pass\n"
        "print(held)"
    )
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "inside")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        printed, errors = process.communicate(timeout=120)
        assert printed.strip() == "60", errors


# -- a refused training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["settings", "data", "tokenizer", "fewer steps", "no resume"])
def test_a_refused_training_leaves_every_byte_as_it_was(dataset, tmp_path, change):
    out = tmp_path / "run"
    trainer(dataset, out).fit()
    (out / ".lock").write_text("999999")  # of a process that was killed
    before = content(out)
    other = dataset
    if change in ("data", "tokenizer"):
        other = prepare(text(tmp_path / "b.txt", seed=5), tmp_path / "b", tokenizer=dataset.tokenizer if change == "data" else "bpe")
    values = {"settings": {"beta2": 0.5}, "fewer steps": {"steps": SHORT - 1}}.get(change, {})
    with pytest.raises(CLLMError):
        trainer(other, out, **values).fit(resume=False if change == "no resume" else True if change == "fewer steps" else "auto")
    assert content(out) == before


def test_other_text_is_named_in_words(dataset, tmp_path):
    trainer(dataset, tmp_path / "run", steps=2, warmup=1).fit()
    other = prepare(text(tmp_path / "b.txt", seed=5), tmp_path / "b", tokenizer=dataset.tokenizer)
    with pytest.raises(UserError) as refused:
        trainer(other, tmp_path / "run", steps=2, warmup=1).fit()
    assert "tokens for training" in str(refused.value) and "the text, or how it was packed, is another" in str(refused.value)
    assert "digest" not in str(refused.value) and "{" not in str(refused.value)


# -- the tokens of a run ---------------------------------------------------------------------------------------------------


def run_with_tokens(tmp_path, folder):
    """A short run whose tokens lie inside it, in the layout of this version or in the older one."""
    data = tmp_path / "run" / "data"
    dataset = prepare(text(tmp_path / "a.txt"), data, tokenizer="char")
    if folder != "tokens":
        dataset.folder.rename(data / folder)
        dataset = type(dataset).open(data / folder)
    trainer(dataset, tmp_path / "run", steps=2, warmup=1, path=str(tmp_path / "a.txt")).fit()
    return dataset


@pytest.mark.parametrize("folder", ["tokens", "tokens-0123456789abcdef"])
def test_a_run_finds_the_tokens_that_it_began_with_in_both_layouts(tmp_path, folder):
    dataset = run_with_tokens(tmp_path, folder)
    prepare(text(tmp_path / "b.txt", seed=3), tmp_path / "other", tokenizer="char").folder.rename(tmp_path / "run" / "data" / "tokens-other")
    (tmp_path / "a.txt").unlink()
    stored = stored_run(tmp_path / "run")
    assert stored.step == 2 and stored.finished
    found = own_tokens(stored)
    assert found.folder.name == folder and identity(found) == identity(dataset) == stored.data
    prune_tokens(tmp_path / "run", found.folder)
    assert (tmp_path / "run" / "data" / "tokens-other").is_dir(), "where there are checkpoints nothing is pruned"


def test_missing_or_other_tokens_are_told_exactly(tmp_path):
    dataset = run_with_tokens(tmp_path, "tokens-0123456789abcdef")
    stored = stored_run(tmp_path / "run")
    dataset.folder.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"began with \([\d,]+ tokens for training, [\d,]+ for validation\) are missing: .*data holds no packed"):
        own_tokens(stored)
    prepare(text(tmp_path / "b.txt", seed=3), tmp_path / "run" / "data", tokenizer=dataset.tokenizer)
    with pytest.raises(DataError, match=r"tokens holds others \([\d,]+ tokens"):
        own_tokens(stored)
    (tmp_path / "elsewhere").rename(dataset.folder)
    shard = dataset.folder / "train" / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"shard-00000.bin has .* bytes"):
        own_tokens(stored)


def test_only_tokens_that_nothing_refers_to_are_pruned(tmp_path):
    data = tmp_path / "run" / "data"
    needed = prepare(text(tmp_path / "a.txt"), data, tokenizer="char").folder
    prepare(text(tmp_path / "b.txt", seed=3), tmp_path / "b", tokenizer="char").folder.rename(data / "tokens-old")
    (data / ".tokens-old.0123456789abcdef.tmp").mkdir()  # half-written by a process that was killed
    (data / "mine").mkdir()
    prune_tokens(tmp_path / "run", needed)
    assert sorted(each.name for each in data.iterdir()) == ["mine", "sources.bin", "sources.json", "tokenizer.json", "tokens", "training.json"]


def test_the_newest_checkpoint_that_can_be_read_describes_the_run(dataset, tmp_path):
    assert stored_run(tmp_path) is None
    trainer(dataset, tmp_path / "run", keep=3).fit()
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    newest, *others = reversed(store.steps())
    (store.path(newest) / "state.json").write_text("{}")
    assert stored_run(tmp_path / "run").step == others[0]
    for step in others:
        (store.path(step) / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        stored_run(tmp_path / "run")


# -- another end -----------------------------------------------------------------------------------------------------------

LONGER = {
    "constant": {"schedule": "constant"},
    "warm-up as a share": {"schedule": "constant", "warmup": None},
    "plateau": {"schedule": "plateau", "plateau_patience": 1},
    "schedule free": {"optimizer": "schedule_free"},
    "average": {"schedule": "constant", "ema": 0.9},
    "restored best": {"schedule": "constant", "restore_best": True},
    "batch ramp": {"schedule": "constant", "grad_accum": 3, "batch_ramp": 10},
    "early stopping": {"schedule": "constant", "patience": 50},
}


@pytest.mark.parametrize("settings", LONGER.values(), ids=LONGER)
def test_a_finished_run_made_longer_is_bit_by_bit_the_run_that_was_to_be_as_long(dataset, tmp_path, settings):
    trainer(dataset, tmp_path / "run", **settings).fit()
    stored = stored_run(tmp_path / "run")
    assert f"cllm train --resume --out {tmp_path / 'run'} --steps" in how_to_train_longer(stored)
    result = trainer(dataset, tmp_path / "run", **settings, steps=LONG).fit(resume=True)
    assert (result.resumed_from, result.step) == (SHORT, LONG)
    warmup = stored.config.optim.warmup  # was derived from the first number of steps, and stays
    straight = {**settings, "steps": LONG, "warmup": warmup, "eval_every": 4}
    trainer(dataset, tmp_path / "straight", **straight).fit()
    if "restore_best" in settings:  # which evaluation was the best one may differ: the former end was evaluated as well
        assert result.validation.loss == result.best_loss
        return
    assert bits(tmp_path / "run") == bits(tmp_path / "straight")
    assert rates(tmp_path / "run") == rates(tmp_path / "straight")


@pytest.mark.parametrize("done", [4, 6])
def test_a_run_stopped_while_it_becomes_longer_still_ends_with_the_same_bits(dataset, tmp_path, done, monkeypatch):
    settings = {"schedule": "constant"}
    trainer(dataset, tmp_path / "straight", **settings).fit()
    trainer(dataset, tmp_path / "straight", **settings, steps=LONG).fit(resume=True)
    trainer(dataset, tmp_path / "run", **settings).fit()
    run = trainer(dataset, tmp_path / "run", **settings, steps=LONG)
    loss, calls = run.model.loss, 0

    def killed(*args, **kwargs):
        nonlocal calls
        calls += not kwargs.get("return_stats")
        if calls == done:
            raise KeyboardInterrupt
        return loss(*args, **kwargs)

    monkeypatch.setattr(run.model, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        run.fit(resume=True)
    trainer(dataset, tmp_path / "run", **settings, steps=LONG).fit(resume=True)
    assert bits(tmp_path / "run") == bits(tmp_path / "straight")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step"])
def test_a_finished_run_whose_learning_rates_depended_on_its_length_names_the_other_way(dataset, tmp_path, schedule):
    trainer(dataset, tmp_path / "run", schedule=schedule).fit()
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match=rf"{schedule} schedule was made for {SHORT} steps.*cllm train DATA --from .* --out NEW"):
        trainer(dataset, tmp_path / "run", schedule=schedule, steps=LONG).fit(resume=True)
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize(("schedule", "steps"), [("wsd", 60), ("step", 60), ("cosine", 60)])
def test_an_unfinished_run_may_end_later_where_its_past_stays_the_same(dataset, tmp_path, schedule, steps):
    """The first 80 % of wsd and step do not depend on the number of steps; of cosine only the warm-up does not."""
    warmup = 2 if schedule != "cosine" else SHORT
    settings = {"schedule": schedule, "warmup": warmup, "eval_every": 100}
    long = trainer(dataset, tmp_path / "run", **settings, steps=steps)
    _stop_after(long, SHORT)
    stored = stored_run(tmp_path / "run")
    assert stored.step == SHORT and not stored.finished
    result = trainer(dataset, tmp_path / "run", **settings, steps=SHORT + 20).fit(resume=True)
    trainer(dataset, tmp_path / "straight", **settings, steps=SHORT + 20).fit()
    assert result.resumed_from == SHORT and bits(tmp_path / "run") == bits(tmp_path / "straight")


def _stop_after(run, step):
    record = run._record

    def stopping(result):
        record(result)
        if run.step == step + 1:
            raise KeyboardInterrupt

    run._record = stopping
    with pytest.raises(KeyboardInterrupt):
        run.fit()


def test_a_decayed_wsd_run_goes_on_at_the_full_rate_and_says_so(dataset, tmp_path, capfd):
    trainer(dataset, tmp_path / "run", schedule="wsd").fit()
    trainer(dataset, tmp_path / "run", schedule="wsd", steps=40).fit(resume=True)
    assert "had begun to decay, to 0.001, and continues at 0.01" in capfd.readouterr().err
    found = rates(tmp_path / "run")
    assert found[SHORT] == pytest.approx(1e-3) and found[SHORT + 1] == found[30] == 1e-2 and found[40] == pytest.approx(1e-3)


def test_without_resume_another_number_of_steps_is_refused_with_the_command(dataset, tmp_path):
    trainer(dataset, tmp_path / "run", schedule="constant").fit()
    with pytest.raises(UserError, match=rf"train.steps: 8 there, 14 here. To train it longer: cllm train --resume --out {tmp_path / 'run'} --steps"):
        trainer(dataset, tmp_path / "run", schedule="constant", steps=LONG).fit()
    with pytest.raises(UserError, match="8 steps are done already"):
        trainer(dataset, tmp_path / "run", schedule="constant", steps=6).fit(resume=True)


def test_epochs_ask_for_steps_too(dataset, tmp_path):
    settings = {"schedule": "constant", "steps": None, "batch_size": 16, "warmup": None, "eval_every": 100}
    first = trainer(dataset, tmp_path / "run", **settings, epochs=1).fit()
    again = trainer(dataset, tmp_path / "run", **settings, epochs=1).fit()
    longer = trainer(dataset, tmp_path / "run", **settings, epochs=2).fit(resume=True)
    assert again.step == first.step == again.resumed_from
    assert longer.step == math.ceil(2 * dataset.train.num_tokens / 256) > first.step
    with pytest.raises(UserError, match=f"train.steps: {longer.step} there, {first.step} here"):
        trainer(dataset, tmp_path / "run", **settings, epochs=1).fit()


def test_a_run_that_stopped_early_goes_on_with_more_patience(dataset, tmp_path):
    settings = {"schedule": "constant", "learning_rate": 5.0, "grad_clip": 0.0, "warmup": 0, "eval_every": 1, "steps": 40}
    first = trainer(dataset, tmp_path / "run", **settings, patience=2).fit()
    assert first.stopped_early and first.step < 40
    with pytest.raises(UserError, match=r"train.patience: 2 there, 0 here"):
        trainer(dataset, tmp_path / "run", **settings).fit()
    assert trainer(dataset, tmp_path / "run", **settings).fit(resume=True).step == 40


def test_a_place_written_in_another_way_is_the_same_setting(dataset, tmp_path, monkeypatch):
    dataset.tokenizer.save(tmp_path / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    trainer(dataset, tmp_path / "run", tokenizer="tokenizer.json").fit()
    assert trainer(dataset, tmp_path / "run", tokenizer=str(tmp_path / "tokenizer.json")).fit().resumed_from == SHORT


def test_a_state_of_another_shape_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"step 3 in .* is not that of a run"):
        StoredRun.of(tmp_path, 3, {"config": {}, "sources": {}})
