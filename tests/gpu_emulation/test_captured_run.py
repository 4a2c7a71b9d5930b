"""Whole runs whose steps are CUDA graphs, emulated: evaluations, checkpoints, samples, averages, a rollback and a resume between the replays leave
the files of the same run made one operation after the other."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU the step itself is captured, in tests/gpu", allow_module_level=True)

from gpu_emulation.graphs import EmulatedGraphs
from gpu_emulation.memory import Memory

from cllm import Model, ModelConfig, TrainConfig, TrainStep
from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore
from cllm.data.pipeline import prepare
from cllm.monitor.metrics import TIME_FIELDS, Metrics, read_metrics
from cllm.runtime.errors import UserError
from cllm.train.step_graph import DeviceStep
from cllm.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")

SETTINGS = {
    "steps": 4, "seq_len": 16, "batch_size": 2, "grad_accum": 2, "batch_ramp": 3, "learning_rate": 1e-2, "eval_every": 2, "checkpoint_every": 2,
    "sample_every": 3, "ema": 0.9, "threads": 1, "tensorboard": False, "layers_every": 2, "precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("one two three\n" * 60 + "four five six\n" * 60)
    return prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.1)


def run(monkeypatch, graphs, dataset, out, steps=4, spoil=None, **values):
    """The step of a run, a `DeviceStep` as on a GPU. Without graphs rows of metrics are written at once, as on a CPU."""
    made = []

    def graph_step(model, optimizer, precision, ema, *, allowed, **options):
        made.append(DeviceStep(model, optimizer, ema, **options, loss_scaling=precision == "fp16", graphs=graphs))
        return made[-1]

    monkeypatch.setattr("cllm.train.step.graph_step", graph_step)
    monkeypatch.setattr(TrainStep, "works_ahead", graphs is not None)
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=16))
    trainer = Trainer(model, dataset, TrainConfig(**SETTINGS | {"on_nonfinite": "rollback"} | values), out=out)
    if steps < SETTINGS["steps"]:
        save = trainer._save

        def leave_after_saving():
            save()
            if trainer.step == steps:
                trainer._checkpoints.finish()
                raise KeyboardInterrupt

        trainer._save = leave_after_saving
    if spoil is not None:
        judge, spoilt = trainer.state.faults.judge, []

        def judged(step, result):
            if step == spoil and not spoilt:
                spoilt.append(step)
                result = replace(result, loss=math.nan, updated=False)
            return judge(step, result)

        trainer.state.faults.judge = judged
    try:
        trainer.fit()
    except KeyboardInterrupt:
        assert steps < SETTINGS["steps"]
    return made[-1]


def noted_events(patch):
    """What happens while `patch` lasts: the steps of rows of training as they are written, and "computing" where a GPU has got a whole step to do."""
    events, write, finish = [], Metrics.write, DeviceStep._finish

    def writing(metrics, row):
        events.extend([row.step] if row.kind == "train" else [])
        write(metrics, row)

    def computing(step, *args):
        events.append("computing")
        return finish(step, *args)

    patch.setattr(Metrics, "write", writing)
    patch.setattr(DeviceStep, "_finish", computing)
    return events


def left(out):
    newest = CheckpointStore(out / "checkpoints").newest_good()
    files = {name: sha256_of(newest.path / name) for name in ("model.safetensors", "optimizer.safetensors")}
    rows = [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in read_metrics(out / "metrics.jsonl")]
    return newest.step, files, rows, (out / "samples.txt").read_text()


def test_a_captured_run_leaves_the_files_of_one_that_was_not_captured(dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        events = noted_events(patch)
        step = run(monkeypatch, EmulatedGraphs, dataset, tmp_path / "captured")
    assert events == ["computing", 1, "computing", 2, "computing", "computing", 3, 4], "row 3, which no checkpoint waits for, comes during step 4"
    assert step._graphs.replays > 4 and len(step._graphs.records) == 2
    run(monkeypatch, None, dataset, tmp_path / "plain")
    run(monkeypatch, EmulatedGraphs, dataset, tmp_path / "resumed", steps=2)
    run(monkeypatch, EmulatedGraphs, dataset, tmp_path / "resumed")
    assert left(tmp_path / "captured") == left(tmp_path / "plain") == left(tmp_path / "resumed")


def test_a_rollback_leads_captured_and_plain_runs_to_the_same_place(dataset, tmp_path, monkeypatch):
    for graphs, name in ((EmulatedGraphs, "captured"), (None, "plain")):
        run(monkeypatch, graphs, dataset, tmp_path / name, spoil=3)
    assert left(tmp_path / "captured") == left(tmp_path / "plain")
    assert "rollback" in (tmp_path / "captured" / "metrics.jsonl").read_text()


def test_wherever_memory_ends_the_run_says_what_to_change_and_goes_on_where_there_is_more(dataset, tmp_path, monkeypatch):
    """One run, which there is no room for four times: before its first checkpoint and after it."""
    run(monkeypatch, None, dataset, tmp_path / "whole", optimizer="lion")
    kept = CheckpointStore(tmp_path / "run" / "checkpoints")
    told = r"out of memory\..*--batch-size 1 with twice the --grad-accum.*train.recompute=blocks"
    for place, number, step in (("warm-up", 9, 0), ("capture", 50, 0), ("evaluation", 9, 2), ("step", 12, 2)):
        with pytest.raises(UserError, match=told), Memory(place, number):
            run(monkeypatch, EmulatedGraphs, dataset, tmp_path / "run", optimizer="lion")
        assert (kept.newest_good(pytest.fail).step if kept.steps() else 0) == step, place
    run(monkeypatch, EmulatedGraphs, dataset, tmp_path / "run", optimizer="lion")
    assert left(tmp_path / "run")[:3] == left(tmp_path / "whole")[:3]
