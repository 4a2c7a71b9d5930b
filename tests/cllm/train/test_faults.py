"""A run in an unkind world: killed, interrupted, a full disk, damage, a stall. Each time it goes on, bit by bit the same."""

import os
import random
import signal
import subprocess
import threading
import time

import pytest
from command import PATIENCE, Started, lines, wait_until

from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore
from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data.pipeline import prepare
from cllm.model.model import Model
from cllm.monitor.guards import RunLock
from cllm.monitor.metrics import TIME_FIELDS, read_metrics
from cllm.runtime.errors import CheckpointError
from cllm.train.trainer import Trainer

STEPS = 60
SETTINGS = {
    "steps": STEPS,
    "seq_len": 16,
    "batch_size": 2,
    "eval_every": 20,
    "checkpoint_every": 7,
    "precision": "fp32",
    "threads": 1,
    "tensorboard": False,
}
SIZES = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 16}

CHILD = """
import sys, time
from cllm.config.model import ModelConfig
from cllm.data import Dataset
from cllm.model.model import Model
from cllm.runtime.errors import CLLMError
from cllm.train.trainer import Trainer
from cllm.config.train import TrainConfig
data, out, sizes, settings = sys.argv[1], sys.argv[2], eval(sys.argv[3]), eval(sys.argv[4])
dataset = Dataset.open(data)
trainer = Trainer(Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, **sizes)), dataset, TrainConfig(**settings), out=out)
microbatches = trainer.data.microbatches
trainer.data.microbatches = lambda step: time.sleep(0.03) or microbatches(step)  # slow enough to be met in the middle
try:
    trainer.fit()
except CLLMError as error:
    print(error)
    sys.exit(error.exit_status)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    (folder / "text.txt").write_text(" ".join(generator.choice(["one", "two", "three", "many"]) for _ in range(800)), encoding="utf-8")
    return prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.05)


def train(dataset, out, **values):
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, **SIZES))
    return Trainer(model, dataset, TrainConfig(**{**SETTINGS, **values}), out=out).fit()


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory):
    """The run that nobody disturbed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train(dataset, out)
    return outcome(out)


def outcome(out):
    newest = CheckpointStore(out / "checkpoints").newest_good()
    rows = [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in read_metrics(out / "metrics.jsonl")]
    return newest.step, sha256_of(newest.path / "model.safetensors"), sha256_of(newest.path / "optimizer.safetensors"), rows


def signalled(dataset, out, number):
    """Trains in a process of its own and signals it at a random step; returns its exit status and what it printed."""
    process = Started(dataset.folder, out, SIZES, SETTINGS, program=CHILD)
    at = random.randint(8, 45)
    wait_until(lambda: lines(out / "metrics.jsonl") >= at, process)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(number)
    printed, errors = process.communicate()
    return process.returncode, printed + errors


def test_killed_at_a_random_step_and_resumed_a_run_gives_the_same_bits(dataset, straight, tmp_path):
    status, _ = signalled(dataset, tmp_path / "run", signal.SIGKILL)
    assert status == -signal.SIGKILL
    result = train(dataset, tmp_path / "run")
    assert result.resumed_from is not None and 0 < result.resumed_from < STEPS
    assert outcome(tmp_path / "run") == straight
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_a_run_writes_a_checkpoint_exits_with_130_and_goes_on_from_there(dataset, straight, tmp_path, number):
    status, printed = signalled(dataset, tmp_path / "run", number)
    assert status == 130
    stopped_at = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    assert f"after step {stopped_at} of {STEPS}" in printed and "cllm train --resume --out" in printed
    assert train(dataset, tmp_path / "run").resumed_from == stopped_at
    assert outcome(tmp_path / "run") == straight


def test_a_damaged_newest_checkpoint_is_passed_over_and_trained_again(dataset, straight, tmp_path, capfd):
    train(dataset, tmp_path / "run")
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    (store.path(STEPS) / "optimizer.safetensors").write_bytes(b"gone")
    assert train(dataset, tmp_path / "run").resumed_from == STEPS - STEPS % 7
    assert "optimizer.safetensors is damaged" in capfd.readouterr().err
    assert outcome(tmp_path / "run") == straight


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_ends_the_run_with_its_checkpoints_whole_and_it_goes_on_when_there_is_room(dataset, straight, small_disk):
    with pytest.raises(CheckpointError, match=r"No space left on device .* Earlier checkpoints are untouched. Free some space"):
        train(dataset, small_disk / "run", keep=50)
    store = CheckpointStore(small_disk / "run" / "checkpoints")
    newest = store.newest_good()
    assert newest.step == store.steps()[-1] < STEPS and not list(store.folder.glob(".*"))
    for step in store.steps()[:-2]:
        subprocess.run(["rm", "-r", store.path(step)], check=True)
    assert train(dataset, small_disk / "run", keep=1).resumed_from == newest.step
    assert outcome(small_disk / "run")[:3] == straight[:3]


def test_a_lock_that_its_holder_left_behind_does_not_stop_a_run(tmp_path):
    (tmp_path / ".lock").write_text("999999")
    with RunLock(tmp_path), pytest.raises(CheckpointError, match=f"process {os.getpid()}"), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass


def test_a_training_works_outside_the_main_thread(dataset, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(dataset, tmp_path / "run", steps=2)))
    thread.start()
    thread.join(timeout=PATIENCE)
    assert results and results[0].step == 2


def test_a_stall_shows_the_stacks_of_all_threads(dataset, tmp_path, monkeypatch, capfd):
    import cllm.train.evaluations

    evaluate = cllm.train.evaluations.evaluate_part

    def slow_evaluation(*args, **kwargs):
        deadline = time.monotonic() + PATIENCE
        while "most recent call first" not in seen() and time.monotonic() < deadline:
            time.sleep(0.05)
        return evaluate(*args, **kwargs)

    shown = ""

    def seen():
        nonlocal shown
        shown += capfd.readouterr().err
        return shown

    monkeypatch.setattr(cllm.train.evaluations, "evaluate_part", slow_evaluation)
    train(dataset, tmp_path / "run", steps=2, watchdog_seconds=0.3)
    assert "Nothing has moved" in seen() and "slow_evaluation" in shown
