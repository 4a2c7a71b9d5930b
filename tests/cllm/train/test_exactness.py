"""Stopped anywhere, by anything, and resumed with any number of threads, a run ends with the bits of one that was not stopped."""

import random

import pytest

from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore
from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data.pipeline import prepare
from cllm.model.model import Model
from cllm.monitor.metrics import TIME_FIELDS, read_metrics
from cllm.runtime.errors import UserError
from cllm.train.trainer import Trainer

STEPS, ACCUMULATED = 9, 3
DROPOUT = 0.2  # in bf16
SETTINGS = {
    "steps": STEPS, "seq_len": 16, "batch_size": 2, "grad_accum": ACCUMULATED, "eval_every": 4, "checkpoint_every": 2, "tensorboard": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Fewer tokens than the run reads: it goes through several epochs and stops in the middle of one."""
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    (folder / "text.txt").write_text(" ".join(generator.choice(["one", "two", "three", "many"]) for _ in range(60)), encoding="utf-8")
    return prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.1)


def trainer(dataset, out, **values):
    values = {"dropout": DROPOUT if values.get("precision") == "bf16" else 0.0} | values
    sizes = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 16, "bigram_rows": 30, "trigram_rows": 50}
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, **sizes))
    return Trainer(model, dataset, TrainConfig(**{**SETTINGS, **values}), out=out)


def outcome(out):
    newest = CheckpointStore(out / "checkpoints").newest_good()
    rows = [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] != "machine"]  # that a disk was slow, for example
    rows = [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in rows]
    return newest.step, sha256_of(newest.path / "model.safetensors"), sha256_of(newest.path / "optimizer.safetensors"), rows


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def straight(request, dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    run = trainer(dataset, out, precision=request.param, threads=2)
    run.fit()
    assert run.data.batches.num_batches < STEPS * ACCUMULATED
    replayed = run._train_step._programs.num_replayed
    assert replayed > ACCUMULATED, "most of a run is replayed; what breaks off below runs by operations"
    return request.param, outcome(out)


def broken(run, call, error):
    """Raises `error` in the forward pass number `call` (from 1) of a run: ACCUMULATED of them make a step."""
    loss, calls = run.model.loss, 0

    def failing(*args, **kwargs):
        nonlocal calls
        if not kwargs.get("return_stats"):
            calls += 1
            if calls == call:
                raise error
        return loss(*args, **kwargs)

    run.model.loss = failing
    return run


@pytest.mark.parametrize("call", range(1, STEPS * ACCUMULATED + 1, 2))
def test_stopped_in_any_microbatch_and_resumed_with_other_threads(dataset, straight, tmp_path, call):
    precision, expected = straight
    with pytest.raises(KeyboardInterrupt):
        broken(trainer(dataset, tmp_path / "run", precision=precision, threads=1), call, KeyboardInterrupt()).fit()
    again = trainer(dataset, tmp_path / "run", precision=precision, threads=1 + call % 5).fit()
    assert again.resumed_from == ((call - 1) // ACCUMULATED // 2 * 2 or None)
    assert outcome(tmp_path / "run") == expected


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")])
def test_out_of_memory_is_explained_and_the_run_goes_on_where_there_is_more(dataset, straight, tmp_path, error):
    precision, expected = straight
    with pytest.raises(UserError, match=r"out of memory. A step needs about .*What helps"):
        broken(trainer(dataset, tmp_path / "run", precision=precision), 5 * ACCUMULATED - 1, error).fit()
    assert trainer(dataset, tmp_path / "run", precision=precision).fit().resumed_from == 4
    assert outcome(tmp_path / "run") == expected


def test_written_at_once_or_in_the_background_checkpoints_are_the_same_files(dataset, straight, tmp_path):
    precision, expected = straight
    trainer(dataset, tmp_path / "run", precision=precision, async_checkpoint=False).fit()
    assert outcome(tmp_path / "run") == expected
