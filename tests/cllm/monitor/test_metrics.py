"""metrics.jsonl: whole rows only, cut back to the checkpoint on resume, and the same numbers for TensorBoard."""

import json
import math

import pytest
import torch
from disk import file_size_limit

from cllm.monitor.metrics import Metrics, read_metrics
from cllm.monitor.records import EvaluationRow, StepResult, StepTiming, TrainRow
from cllm.runtime.errors import OutputError


def row(step, loss, norm=1.0, **timing):
    return TrainRow.of(step, StepResult(loss, norm, 0.5, 0, 8, 1e-3, True), 8 * step, 0.5 * step, StepTiming(**timing))


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write(row(1, 2.5))
    metrics.write(row(2, math.nan, norm=math.inf, forward_seconds=0.25))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "kind": "train", "step": 1, "loss": 2.5, "learning_rate": 1e-3, "gradient_norm": 1.0, "largest_gradient": 0.5, "num_nonfinite": 0,
        "updated": True, "tokens": 8, "seconds": 0.5,
    }  # fmt: skip
    second = json.loads(lines[1], parse_constant=pytest.fail)
    assert (second["loss"], second["gradient_norm"], second["forward_seconds"]) == ("nan", "inf", 0.25)


def test_rows_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path):
    metrics = Metrics(tmp_path)
    for step in range(1, 6):
        metrics.write(row(step, 1.0 / step))
    with open(metrics.path, "a") as file:
        file.write('{"kind": "train", "step": 1')
    metrics.close()
    metrics.truncate(lambda each: each["step"] <= 3)
    metrics.write(row(4, 9.0))
    assert [(each["step"], each["loss"]) for each in read_metrics(metrics.path)] == [(1, 1.0), (2, 0.5), (3, 1.0 / 3), (4, 9.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path)
    metrics.path = tmp_path / "absent" / "metrics.jsonl"
    with pytest.raises(OutputError, match=r"could not write .*metrics.jsonl: No such file or directory. .* same command"):
        metrics.write(row(1, 1.0))


def test_a_row_that_the_disk_takes_only_in_part_is_taken_back(tmp_path):
    """The real system call fails here, in the middle of a row."""
    metrics = Metrics(tmp_path)
    metrics.write(row(1, 1.0))
    before = metrics.path.read_bytes()
    with file_size_limit(len(before) + 30), pytest.raises(OutputError, match=r"File too large .* MB are free\)\. .* same command"):
        metrics.write(row(2, 1.0))
    assert metrics.path.read_bytes() == before
    metrics.write(row(2, 1.0))
    metrics.close()
    assert [each["step"] for each in read_metrics(metrics.path)] == [1, 2]


def test_tensorboard_gets_every_tenth_step_evaluations_histograms_and_texts(tmp_path):
    pytest.importorskip("tensorboardX")
    metrics = Metrics(tmp_path, tensorboard=True)
    metrics.write(row(1, 2.5, cpu_share=0.5))
    metrics.write(row(10, 2.5))
    evaluation = {"loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.0, "accuracy": 0.5, "num_targets": 8, "best": True}
    metrics.write(EvaluationRow(step=11, classes={"word": {"recall": 0.5, "f1": None}}, **evaluation))
    metrics.histograms("gradients", 11, {"block 0": torch.ones(3)})
    metrics.text("sample", 11, "Once upon")
    metrics.hyperparameters({"optim.eps": 1e-8, "model.norm": "rms", "data.path": None}, {"validation_loss": 2.0})
    metrics.close()
    content = b"".join(path.read_bytes() for path in (tmp_path / "events").rglob("*") if path.is_file())
    for wanted in (b"train/loss", b"eval/classes/word/recall", b"gradients/block", b"Once upon", b"optim.eps", b"outcome/validation_loss"):
        assert wanted in content, wanted
    assert b"train/cpu_share" not in content and b"train/step" not in content and b"f1" not in content
