"""Evaluations of a run: always the same part of the validation split, the whole of it at the end where that fits, the same after a resume."""

import random

import pytest

from cllm.checkpoint.store import CheckpointStore, read_checkpoint
from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data.pipeline import prepare
from cllm.evaluate.loss import evaluate, evaluate_part
from cllm.model.model import Model
from cllm.monitor.metrics import TIME_FIELDS, read_metrics
from cllm.report import write_report
from cllm.train.evaluations import predict_seconds
from cllm.train.trainer import Trainer

SETTINGS = {"steps": 40, "seq_len": 16, "batch_size": 8, "eval_every": 20, "checkpoint_every": 10, "precision": "fp32", "threads": 1,
            "tensorboard": False, "learning_rate": 1e-2, "layers_every": 0}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """About 3,000 validation tokens in documents of very different lengths: all of them are too many for the budget below."""
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(60):
        words = (generator.choice(["one", "two", "three", "many"]) for _ in range(generator.choice([3, 30, 300])))
        (folder / "texts" / f"{number:02}.txt").write_text(" ".join(words))
    return prepare(folder / "texts", folder / "tokens", tokenizer="char", val_fraction=0.1)


def trainer(dataset, out, tokenizer=None, **values):
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=16))
    return Trainer(model, dataset, TrainConfig(**{**SETTINGS, **values}), out=out, tokenizer=tokenizer)


def rows(out, *kinds):
    found = read_metrics(out / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in found if row["kind"] in (kinds or (row["kind"],))]


def test_each_evaluation_predicts_the_same_part_and_says_so(dataset, tmp_path, capfd):
    run = trainer(dataset, tmp_path / "run", eval_budget=0.3)
    result = run.fit()
    first, last = rows(tmp_path / "run", "eval")
    whole = dataset.val.windows(16, 8, document_mask=True)
    assert first["num_targets"] == last["num_targets"] == whole.part(run.state.evaluation_rows).num_targets < whole.num_targets
    assert first["split_targets"] == whole.num_targets
    assert f"on {first['num_targets']:,} of {whole.num_targets:,} tokens" in capfd.readouterr().err
    part = evaluate_part(run.model, whole.part(run.state.evaluation_rows), whole)
    assert part.loss == last["loss"] and result.best_loss == min(first["loss"], last["loss"])
    assert result.validation.loss == last["loss"] and not rows(tmp_path / "run", "final")


def test_the_whole_split_is_evaluated_once_at_the_end_where_that_fits(dataset, tmp_path, capfd):
    run = trainer(dataset, tmp_path / "run", eval_budget=0.9, eval_every=4)
    result = run.fit()
    (final,) = rows(tmp_path / "run", "final")
    assert result.validation == evaluate(run.model, dataset.val, 16, 8)
    assert (final["loss"], final["num_targets"], final["step"]) == (result.validation.loss, result.validation.split_targets, 40)
    assert result.unigram_loss == dataset.val.unigram_nats(dataset.train)
    assert result.best_loss == min(row["loss"] for row in rows(tmp_path / "run", "eval")), "the best is chosen by the part alone"
    page = write_report([tmp_path / "run"])[0].read_text()
    assert "step 40 (the weights left)" in page and f"{result.validation.split_targets:,}" in page
    written = rows(tmp_path / "run")
    assert trainer(dataset, tmp_path / "run", eval_budget=0.9, eval_every=4).fit().validation == result.validation
    assert rows(tmp_path / "run") == written


def test_a_large_budget_evaluates_everything_every_time(dataset, tmp_path):
    result = trainer(dataset, tmp_path / "run", eval_budget=1e6).fit()
    assert result.validation.extent == f"all {dataset.val.windows(16, 8, document_mask=True).num_targets:,} tokens"
    assert not rows(tmp_path / "run", "final")


def test_a_resumed_run_keeps_the_part_that_it_began_with(dataset, tmp_path):
    trainer(dataset, tmp_path / "straight", eval_budget=0.3).fit()
    broken = trainer(dataset, tmp_path / "run", eval_budget=0.3)
    record = broken._record

    def stopped(result):
        record(result)
        if broken.step == 27:
            raise KeyboardInterrupt

    broken._record = stopped
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    again = trainer(dataset, tmp_path / "run", eval_budget=0.01, threads=3).fit()
    assert again.resumed_from == 20 and rows(tmp_path / "run") == rows(tmp_path / "straight")


@pytest.fixture
def predictions(monkeypatch):
    """The steps at which text was predicted, and not only looked up."""
    seen = []

    def counted(*args, **kwargs):
        seen.append(args)
        return evaluate_part(*args, **kwargs)

    monkeypatch.setattr("cllm.train.evaluations.evaluate_part", counted)
    return seen


@pytest.mark.parametrize("values", [{}, {"activations": True}, {"restore_best": True, "learning_rate": 0.5}, {"ema": 0.9}], ids=str)
def test_what_a_finished_run_has_measured_is_not_measured_again(dataset, tmp_path, predictions, values):
    values = {"eval_budget": 0.9, "eval_every": 4, "tokenizer": dataset.tokenizer, **values}
    first = trainer(dataset, tmp_path / "run", **values).fit()
    written = rows(tmp_path / "run")
    assert len(predictions) == 11 and len(rows(tmp_path / "run", "final")) == 1
    again = trainer(dataset, tmp_path / "run", **values).fit()
    assert len(predictions) == 11, "a finished run has nothing to measure"
    assert (again.validation, again.best_loss, again.best_step) == (first.validation, first.best_loss, first.best_step)
    assert rows(tmp_path / "run") == written


def test_an_evaluation_is_measured_again_where_less_of_it_was_recorded(dataset, tmp_path, predictions):
    run = tmp_path / "run"
    trainer(dataset, run, tokenizer=dataset.tokenizer).fit()
    written = rows(run)
    for changes, expected in (({}, 0), ({"activations": True}, 1), ({"activations": True}, 0), ({}, 1)):
        predictions.clear()
        trainer(dataset, run, tokenizer=dataset.tokenizer, **changes).fit()
        assert len(predictions) == expected
    assert rows(run) == written
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if '"eval"' in line)
    for broken in ("", lines[last].replace('"loss"', '"less"'), lines[last].replace('"num_targets": ', '"num_targets": 1'), lines[last][:40]):
        (run / "metrics.jsonl").write_text("".join([*lines[:last], broken, *lines[last + 1 :]]))
        predictions.clear()
        trainer(dataset, run, tokenizer=dataset.tokenizer).fit()
        assert len(predictions) == 1 and rows(run) == written


def test_a_run_that_goes_on_from_an_evaluated_step_measures_later_ones_only(dataset, tmp_path, predictions):
    trainer(dataset, tmp_path / "straight").fit()
    broken = trainer(dataset, tmp_path / "run")
    sample = broken._check_stop

    def stopped():
        sample()
        if broken.step == 20 and rows(tmp_path / "run", "eval"):
            raise KeyboardInterrupt

    broken._check_stop = stopped
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    predictions.clear()
    assert trainer(dataset, tmp_path / "run").fit().resumed_from == 20
    assert len(predictions) == 1 and rows(tmp_path / "run") == rows(tmp_path / "straight")


def test_a_run_from_before_there_was_a_part_goes_on_with_the_whole_split(dataset, tmp_path, monkeypatch):
    from cllm.train.state import RunState

    to_dict = RunState.to_dict
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "to_dict", lambda self: {key: value for key, value in to_dict(self).items() if key != "evaluation_rows"})
        trainer(dataset, tmp_path / "run", steps=30).fit()
    newest = CheckpointStore(tmp_path / "run" / "checkpoints").newest_good()
    assert "evaluation_rows" not in read_checkpoint(newest.path).state
    assert trainer(dataset, tmp_path / "run", steps=30).fit().validation.num_targets == dataset.val.windows(16, document_mask=True).num_targets


def test_the_baseline_is_that_of_the_same_part(dataset, tmp_path):
    """A model that predicts the training frequencies of tokens has the baseline's loss, on the part as on the whole."""
    run = trainer(dataset, tmp_path / "run", eval_budget=0.3)
    run.fit()
    part = rows(tmp_path / "run", "eval")[0]["unigram_loss"]
    assert part != dataset.val.unigram_nats(dataset.train) and part == pytest.approx(dataset.val.unigram_nats(dataset.train), rel=0.1)


def test_the_time_of_all_evaluations_is_predicted(dataset):
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=16))
    config = TrainConfig(**SETTINGS, eval_budget=0.3)
    plan, seconds = predict_seconds(model, dataset.val, config)
    assert plan.num_evaluations == 2 and seconds > 0
    longer, more = predict_seconds(model, dataset.val, config.replace("", eval_budget=100.0))
    assert longer.forward_rows > plan.forward_rows and more > 0
