"""What a run tells beside its loss: right, the same for any number of threads, and without a changed bit of training."""

import math
import socket
import urllib.error
import urllib.request

import pytest
import torch
from command import PATIENCE

from cllm.checkpoint.safetensors import sha256_of
from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data.pipeline import prepare
from cllm.model.model import Model
from cllm.monitor.layers import LayerStats, activation_stats
from cllm.monitor.metrics import TIME_FIELDS, Metrics, read_metrics
from cllm.monitor.prometheus import PrometheusEndpoint
from cllm.monitor.records import MachineRow, StepResult, StepTiming, TrainRow
from cllm.runtime.errors import UserError
from cllm.train.trainer import Trainer

SETTINGS = {"steps": 12, "seq_len": 16, "batch_size": 4, "eval_every": 6, "checkpoint_every": 6, "precision": "fp32"}
QUIET = {"layers_every": 0, "classes": False, "tensorboard": False, "metrics_every": 12}
LOUD = {"layers_every": 1, "classes": True, "activations": True, "tensorboard": True, "sample_every": 4}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("It was 1 of 2, or 3 (of 44)? " * 100)
    return prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.2)


def train(dataset, out, **values):
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=32, num_layers=2, num_heads=2, max_seq_len=16))
    run = Trainer(model, dataset, TrainConfig(**{**SETTINGS, **values}), out=out)
    run.fit()
    return run


def rows(out, kind):
    found = [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == kind]
    return [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in found]


def test_looking_changes_no_bit_of_training(dataset, tmp_path):
    digests = set()
    for name, values in (("quiet", QUIET), ("loud", LOUD)):
        run = train(dataset, tmp_path / name, threads=2, **values)
        path = run._checkpoints.store.path(12)
        digests.add((sha256_of(path / "model.safetensors"), sha256_of(path / "optimizer.safetensors")))
    assert len(digests) == 1
    assert [len(rows(tmp_path / "loud", kind)) for kind in ("train", "layers", "eval", "activations")] == [12, 12, 2, 2]
    assert [len(rows(tmp_path / "quiet", kind)) for kind in ("train", "layers", "eval", "activations")] == [1, 0, 2, 0]


def test_evaluations_tell_classes_of_tokens_and_calibration(dataset, tmp_path):
    train(dataset, tmp_path / "run", **LOUD)
    row = rows(tmp_path / "run", "eval")[-1]
    assert row["accuracy"] <= row["top5_accuracy"] <= 1 and 0 <= row["calibration_error"] <= 1
    assert sum(sum(each.values()) for each in row["confusion"].values()) == row["class_targets"]
    assert row["classes"]["number"]["targets"] > 0


def test_what_is_told_does_not_depend_on_the_number_of_threads(dataset, tmp_path):
    for threads in (1, 3):
        train(dataset, tmp_path / str(threads), threads=threads, **LOUD)
    for kind in ("train", "layers", "eval", "activations"):
        assert rows(tmp_path / "1", kind) == rows(tmp_path / "3", kind)


def test_a_resumed_run_leaves_the_same_rows(dataset, tmp_path):
    train(dataset, tmp_path / "straight", **LOUD)
    short = Trainer(
        Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=32, num_layers=2, num_heads=2, max_seq_len=16)),
        dataset, TrainConfig(**SETTINGS, **LOUD), out=tmp_path / "run",
    )  # fmt: skip
    record = short._record

    def broken_off(result):
        record(result)
        if short.step == 8:
            raise KeyboardInterrupt

    short._record = broken_off
    with pytest.raises(KeyboardInterrupt):
        short.fit()
    train(dataset, tmp_path / "run", **LOUD)
    for kind in ("train", "layers", "eval", "activations"):
        assert rows(tmp_path / "run", kind) == rows(tmp_path / "straight", kind)


def test_the_norms_of_the_layers_make_up_that_of_all_and_ratios_are_those_of_the_update():
    torch.manual_seed(0)
    parameters = {"a": torch.nn.Parameter(torch.randn(40, 30)), "b": torch.nn.Parameter(torch.randn(7)), "c": torch.nn.Parameter(torch.randn(20, 20))}
    for each in parameters.values():
        each.grad = torch.randn_like(each)
    parameters["c"].grad *= 1e6
    stats = LayerStats(parameters)
    stats.before()
    with torch.no_grad():
        for each in parameters.values():
            each -= 0.01 * each
    row = stats.after(7)
    whole = math.sqrt(sum(norm**2 for norm in row.gradient_norms.values()))
    assert whole == pytest.approx(float(torch.cat([each.grad.double().reshape(-1) for each in parameters.values()]).norm()), rel=1e-5)
    assert row.update_ratios == {name: pytest.approx(0.01, rel=1e-4) for name in parameters}
    assert row.step == 7 and row.exploding == ("c",) and row.vanishing == ()
    assert sum(row.gradient_histogram.values()) == 40 * 30 + 7 + 400 and row.gradient_histogram["1e2"] > 300  # and all above


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_gradients_of_zero_nan_and_infinity_are_told_too(value):
    parameters = {"a": torch.nn.Parameter(torch.ones(4, 4)), "b": torch.nn.Parameter(torch.ones(4, 4)), "c": torch.nn.Parameter(torch.zeros(4, 4))}
    for name, each in parameters.items():
        each.grad = torch.full_like(each, value if name == "a" else 1.0)
    stats = LayerStats(parameters)
    stats.before()
    row = stats.after(7)
    assert row.vanishing == (("a",) if value == 0 else ()) and row.exploding == (() if value == 0 else ("a",))
    assert row.update_ratios == {"a": 0.0, "b": 0.0, "c": 0.0}


def test_activations_are_those_of_the_blocks():
    model = Model(ModelConfig(vocab_size=20, embed_dim=16, num_layers=3, num_heads=2, max_seq_len=8))
    with activation_stats(model) as found:
        model.hidden(torch.zeros(2, 8, dtype=torch.int64))
    assert list(found) == ["block 0", "block 1", "block 2"] and all(each["std"] > 0 and each["largest"] >= each["std"] for each in found.values())
    stream = stream_after_first_block(model, torch.zeros(2, 8, dtype=torch.int64))
    assert found["block 0"]["std"] == pytest.approx(float(stream.std(unbiased=False)), rel=1e-4)
    model.hidden(torch.zeros(1, 4, dtype=torch.int64))  # nobody is looking any more
    assert not any(block._forward_hooks for block in model.backbone.blocks)


def stream_after_first_block(model, tokens):
    """From what the following block's norm sees: the sum of branch and stream."""
    from cllm.model.layers import Context

    context = Context(None, model.rotary_tables(tokens.device), None, None, None)
    x = model.backbone.embed(tokens, context, torch.float32)
    branch, stream = model.backbone.blocks[0](x, None, context)
    return (branch + stream).detach()


def test_prometheus_finds_the_newest_numbers_on_this_machine_alone(tmp_path):
    metrics = Metrics(tmp_path, prometheus_port=free_port())
    with metrics:
        for step, loss in ((3, 2.5), (4, 2.25)):
            metrics.write(TrainRow.of(step, StepResult(loss, math.inf, 1.0, 0, 8, 1e-3, True), 8 * step, 1.0, StepTiming()))
        metrics.write(MachineRow(step=4, event="slow_disk", action="wait", text="note", seconds=1.0))
        assert metrics.prometheus._server.server_address[0] == "127.0.0.1"
        address = f"http://127.0.0.1:{metrics.prometheus.port}"
        with urllib.request.urlopen(f"{address}/metrics", timeout=PATIENCE) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = answer.read().decode()
        assert "# TYPE cllm_train_loss gauge\ncllm_train_loss 2.25\n" in text and "cllm_train_step 4.0\n" in text
        assert "cllm_train_gradient_norm +Inf" in text and "note" not in text
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/etc/passwd", timeout=PATIENCE)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{address}/metrics", timeout=PATIENCE)


def test_a_taken_port_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot be opened"):
        PrometheusEndpoint(taken.getsockname()[1])


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as place:
        return place.getsockname()[1]
