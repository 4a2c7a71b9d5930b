"""A run that was given its time, through the trainer: what its clock decided is on record, so that a resume and a replay compute the same bits."""

import random
from pathlib import Path

import pytest
from command import python

from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore
from cllm.config.model import ModelConfig
from cllm.config.pace import COOLDOWN, Pace
from cllm.config.schedule import Schedule, lr
from cllm.config.train import TrainConfig
from cllm.data import Dataset
from cllm.data.pipeline import prepare
from cllm.model.model import Model
from cllm.monitor.metrics import TIME_FIELDS, read_metrics
from cllm.runtime.errors import UserError
from cllm.train import clock
from cllm.train.run_folder import stored_run
from cllm.train.trainer import Trainer

FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # where a program finds this module and those of all tests
WORDS = ["def", "return", "self", "import", "for", "in", "range", "print", "while", "True", "None", "class"]
# A clock that passes a second each time it is read, and two when the run is in its second half: the machine becomes busy.
CLOCK = """
import itertools, os, signal
from cllm.train import clock
ticks = itertools.count()
clock.now = lambda: (lambda n: n if n < 150 else 2 * n - 150)(next(ticks)) / 1.0
"""
KILLED = (
    CLOCK
    + """
import sys
from cllm.train.trainer import Trainer
sys.path[:0] = {folders!r}
import test_timed_end as test
def killed(self, *arguments, save=Trainer._save):
    save(self)
    if self._end.pace.share(self.step) >= {share}:
        self._checkpoints.finish()
        os.kill(os.getpid(), signal.SIGKILL)
Trainer._save = killed
test.trainer(test.Dataset.open({data!r}), {out!r}, minutes=8.0, schedule="wsd", restore_best=True).fit()
"""
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    (folder / "text.txt").write_text(" ".join(generator.choice(WORDS) for _ in range(4000)))
    return prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.1)


@pytest.fixture
def seconds_pass(monkeypatch):
    """Time passes by a second each time that the clock is read."""
    state = {"now": 0.0}

    def now():
        state["now"] += 1.0
        return state["now"]

    monkeypatch.setattr(clock, "now", now)


def trainer(dataset, out, began=0.0, **values):
    base = {"seq_len": 16, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "threads": 1, "tensorboard": False, "classes": False}
    base |= {"checkpoint_every": 5, "eval_every": 20, "warmup": 2}
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=32), seed=0)
    return Trainer(model, dataset, TrainConfig(**{**base, **values}), out=out, began=began)


def weights(out):
    newest = CheckpointStore(Path(out) / "checkpoints").newest_good()
    return newest.step, {name: sha256_of(newest.path / name) for name in ("model.safetensors", "optimizer.safetensors")}


def rows(out):
    return [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in read_metrics(Path(out) / "metrics.jsonl")]


def test_a_run_made_again_from_its_record_has_the_same_bits(dataset, tmp_path, seconds_pass):
    trainer(dataset, tmp_path / "run", minutes=8.0, schedule="wsd").fit()
    kept = TrainConfig.from_toml(tmp_path / "run" / "config.toml")
    pace = Pace.of_text(kept.train.pace)
    assert len(pace.decisions) > 1 and kept.train.steps is None and kept.train.minutes == 8.0
    again = trainer(dataset, tmp_path / "again", minutes=8.0, schedule="wsd", pace=kept.train.pace)
    result = again.fit()
    assert result.step == pace.steps(10**9) and weights(tmp_path / "again") == weights(tmp_path / "run")
    assert rows(tmp_path / "again") == rows(tmp_path / "run")
    decided = [row for row in rows(tmp_path / "run") if row["kind"] == "pace"]
    assert [(row["step"], row["share"], row["steps"]) for row in decided] == [(each.step, each.share, each.steps) for each in pace.decisions[1:]]
    schedule = Schedule(1e-2, 1e-3, 2, result.step, "wsd", pace)
    assert [row["learning_rate"] for row in rows(tmp_path / "run") if row["kind"] == "train"] == [lr(step, schedule) for step in range(result.step)]


@pytest.mark.parametrize("share", [0.3, COOLDOWN + 0.02])
def test_a_run_that_was_killed_goes_on_by_its_record(dataset, tmp_path, seconds_pass, share):
    """Killed before and in its cooldown, and made again in one piece by the record of both lives."""
    words = KILLED.format(folders=FOLDERS, data=str(dataset.folder), out=str(tmp_path / "run"), share=share)
    done = python("-c", words)
    assert done.status == -9, done.err
    before = Pace.of_text(stored_run(tmp_path / "run").config.train.pace)
    killed_at = stored_run(tmp_path / "run").step
    assert before.share(killed_at) >= share
    resumed = trainer(dataset, tmp_path / "run", minutes=8.0, schedule="wsd", restore_best=True)
    result = resumed.fit()
    assert result.resumed_from == killed_at
    after = Pace.of_text(stored_run(tmp_path / "run").config.train.pace)
    assert after.until(killed_at).decisions[: len(before.decisions)] == before.decisions  # what was decided stays
    trainer(dataset, tmp_path / "again", minutes=8.0, schedule="wsd", restore_best=True, pace=after.to_text()).fit()
    assert weights(tmp_path / "again") == weights(tmp_path / "run")
    assert [row for row in rows(tmp_path / "again") if row["kind"] == "train"] == [row for row in rows(tmp_path / "run") if row["kind"] == "train"]


def test_the_time_of_a_run_that_was_killed_counts(dataset, tmp_path, monkeypatch):
    words = KILLED.format(folders=FOLDERS, data=str(dataset.folder), out=str(tmp_path / "run"), share=0.3)
    assert python("-c", words).status == -9
    found = CheckpointStore(tmp_path / "run" / "checkpoints").newest_good()
    assert found.state["spent"] > 0.2 * 480
    monkeypatch.setattr(clock, "now", lambda: 480 - found.state["spent"])  # the second life begins with what is left, and reads it all
    resumed = trainer(dataset, tmp_path / "run", minutes=8.0, schedule="wsd", restore_best=True)
    assert resumed.fit().step == found.step


def test_more_time_for_a_finished_run(dataset, tmp_path, seconds_pass):
    trainer(dataset, tmp_path / "run", minutes=4.0, schedule="wsd").fit()
    done = stored_run(tmp_path / "run")
    assert done.finished
    longer = trainer(dataset, tmp_path / "run", began=clock.now(), minutes=8.0, schedule="wsd").fit(resume=True)
    assert longer.step > done.step
    after = [row["learning_rate"] for row in rows(tmp_path / "run") if row["kind"] == "train" and row["step"] > done.step]
    assert after[0] == 1e-2 and after[-1] < 2e-3  # at the full rate again, and down again: WSD-S
    with pytest.raises(UserError, match=r"minutes: 8\.0 there, 16\.0 here"):
        trainer(dataset, tmp_path / "run", minutes=16.0, schedule="wsd").fit()


def test_a_text_that_teaches_no_more_ends_the_run_early_with_the_best_weights(dataset, tmp_path, seconds_pass):
    """Words drawn at random: after the first hundred updates there is nothing more to be learnt, and a high rate overfits them."""
    few = trainer(dataset, tmp_path / "run", minutes=120.0, schedule="wsd", restore_best=True, learning_rate=3e-2, epochs=1000).fit()
    stored = stored_run(tmp_path / "run")
    early = [row for row in rows(tmp_path / "run") if row["kind"] == "pace" and row["early"]]
    assert early and early[0]["share"] == COOLDOWN and few.step == stored.config.train.steps
    losses = [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "eval"]
    assert few.best_loss == min(losses)
    assert few.validation.loss == pytest.approx(few.best_loss, rel=1e-6)


def test_hours_and_minutes_and_steps_exclude_each_other():
    with pytest.raises(UserError, match="hours and minutes exclude each other"):
        TrainConfig(hours=1.0, minutes=1.0)
    with pytest.raises(UserError, match="steps and minutes exclude each other"):
        TrainConfig(minutes=1.0, steps=10)
    with pytest.raises(UserError, match="hours must be > 0"):
        TrainConfig(hours=0)
    with pytest.raises(UserError, match="pace must be the record"):
        TrainConfig(hours=1, pace="what")
    assert TrainConfig(hours=2).seconds == 7200 and TrainConfig(minutes=2).seconds == 120 and TrainConfig().seconds is None


def test_a_command_that_names_minutes_replaces_the_hours_of_its_file(tmp_path):
    (tmp_path / "settings.toml").write_text("[train]\nhours = 2\n")
    config = TrainConfig.from_layers(file=tmp_path / "settings.toml", flags={"train.minutes": "5"})
    assert config.seconds == 300 and config.train.hours is None


assert Dataset  # the killed process takes it from here
