"""metrics.jsonl: whole rows only, cut back to the checkpoint on resume, and the same numbers for TensorBoard."""

import json
import math

import pytest
import torch

from cllm.monitor.metrics import Metrics, read_metrics
from cllm.runtime.errors import OutputError


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write("train", 1, loss=2.5, updated=True)
    metrics.write("train", 2, loss=math.nan, gradient_norm=math.inf)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"kind": "train", "step": 1, "loss": 2.5, "updated": True}
    assert json.loads(lines[1], parse_constant=pytest.fail) == {"kind": "train", "step": 2, "loss": "nan", "gradient_norm": "inf"}


def test_rows_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path):
    metrics = Metrics(tmp_path)
    for step in range(1, 6):
        metrics.write("train", step, loss=1.0 / step)
    with open(metrics.path, "a") as file:
        file.write('{"kind": "train", "step": 1')
    metrics.close()
    metrics.truncate(lambda row: row["step"] <= 3)
    metrics.write("train", 4, loss=9.0)
    assert [(row["step"], row["loss"]) for row in read_metrics(metrics.path)] == [(1, 1.0), (2, 0.5), (3, 1.0 / 3), (4, 9.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path)
    metrics.path = tmp_path / "absent" / "metrics.jsonl"
    with pytest.raises(OutputError, match=r"could not write .*metrics.jsonl: No such file or directory. .* same command"):
        metrics.write("train", 1, loss=1.0)


def test_tensorboard_gets_every_tenth_step_evaluations_histograms_and_texts(tmp_path):
    pytest.importorskip("tensorboardX")
    metrics = Metrics(tmp_path, tensorboard=True)
    metrics.write("train", 1, rate=2.5)
    metrics.write("train", 10, loss=2.5, note="text")
    metrics.write("eval", 11, classes={"word": {"recall": 0.5, "f1": None}})
    metrics.histograms("gradients", 11, {"block 0": torch.ones(3)})
    metrics.text("sample", 11, "Once upon")
    metrics.hyperparameters({"optim.eps": 1e-8, "model.norm": "rms", "data.path": None}, {"validation_loss": 2.0})
    metrics.close()
    content = b"".join(path.read_bytes() for path in (tmp_path / "events").rglob("*") if path.is_file())
    for wanted in (b"train/loss", b"eval/classes/word/recall", b"gradients/block", b"Once upon", b"optim.eps", b"outcome/validation_loss"):
        assert wanted in content, wanted
    assert b"train/rate" not in content and b"note" not in content
