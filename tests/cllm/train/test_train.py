"""The training loop: it learns, reports the truth, stops when it should, and a resumed run is bit by bit the uninterrupted one."""

import json
import math
import os
import random
import signal
import threading

import pytest
import torch

from cllm import runtime
from cllm.checkpoint.model_file import load
from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore
from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data.pipeline import prepare
from cllm.model.model import Model
from cllm.monitor.guards import RunLock
from cllm.monitor.metrics import TIME_FIELDS, read_metrics
from cllm.monitor.stop_signals import Interrupted
from cllm.runtime.errors import CheckpointError, CLLMError, DataError, UserError
from cllm.train.trainer import Trainer

WORDS = ["def", "return", "self", "import", "for", "in", "range", "print", "while", "True", "None", "class"]


def write_text(path, words=4000, seed=0):
    generator = random.Random(seed)
    path.write_text(" ".join(generator.choice(WORDS) for _ in range(words)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return prepare(write_text(folder / "text.txt"), folder / "tokens", tokenizer="char", val_fraction=0.1)


def settings(**values):
    base = {"steps": 8, "seq_len": 16, "batch_size": 4, "learning_rate": 1e-2, "eval_every": 4, "checkpoint_every": 2, "precision": "fp32"}
    return TrainConfig(**{**base, "threads": 1, "tensorboard": False, **values})


def tiny(dataset, seed=0, **values):
    sizes = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 32, **values}
    return Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, **sizes), seed=seed)


def trainer(dataset, out, model=None, **values):
    return Trainer(model or tiny(dataset), dataset, settings(**values), out=out)


def final_hashes(out):
    newest = CheckpointStore(out / "checkpoints").newest_good()
    return newest.step, {name: sha256_of(newest.path / name) for name in ("model.safetensors", "optimizer.safetensors")}


def rows(out):
    return [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in read_metrics(out / "metrics.jsonl")]


def test_a_run_learns_and_leaves_everything_that_it_promises(dataset, tmp_path):
    result = trainer(dataset, tmp_path / "run", steps=60, eval_every=30, checkpoint_every=30, sample_every=60).fit()
    assert result.step == 60 and result.better_than_unigram and result.best_step == 60
    assert result.validation.loss < 0.9 * result.unigram_loss
    assert result.validation.perplexity == pytest.approx(math.exp(result.validation.loss))
    assert json.loads(json.dumps(result.to_dict()))["validation"]["loss"] == result.validation.loss
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.toml", "metrics.jsonl", "log.txt", "tokenizer.json", "samples.txt", "checkpoints"} <= names
    _, tokenizer = load(tmp_path / "run")
    assert tokenizer.hash == dataset.tokenizer.hash
    assert (tmp_path / "run" / "samples.txt").read_text().startswith("=== step 60\n")
    written = rows(tmp_path / "run")
    assert [row["step"] for row in written if row["kind"] == "eval"] == [30, 60]
    assert [row["step"] for row in written if row["kind"] == "train"] == list(range(1, 61))
    assert written[0]["loss"] == pytest.approx(math.log(dataset.tokenizer.vocab_size), rel=0.1)  # nats: an untrained model guesses
    assert written[-1]["unigram_loss"] == result.unigram_loss
    assert TrainConfig.from_toml(tmp_path / "run" / "config.toml").train.steps == 60


def test_training_never_generates_unless_asked(dataset, tmp_path, monkeypatch):
    import cllm.generate.decoding

    monkeypatch.setattr(cllm.generate.decoding, "generate", lambda *args, **kwargs: pytest.fail("training called generation"))
    trainer(dataset, tmp_path / "run", steps=2).fit()
    assert not (tmp_path / "run" / "samples.txt").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_twice_gives_the_same_bits_and_the_same_metrics(dataset, tmp_path, precision, monkeypatch):
    options = {"precision": precision, "grad_accum": 2, "patience": 50}
    trainer(dataset, tmp_path / "straight", **options).fit()

    class Stop(Exception):
        pass

    for stop_at in (3, 7):  # after the checkpoint of steps 2 and 6, and one step whose row must go again
        run = trainer(dataset, tmp_path / "resumed", tiny(dataset, seed=stop_at if stop_at > 3 else 0), **options)
        record = run._record

        def stop(result, run=run, record=record, stop_at=stop_at):
            record(result)
            if run.step == stop_at:
                raise Stop

        monkeypatch.setattr(run, "_record", stop)
        with pytest.raises(Stop):
            run.fit()
    result = trainer(dataset, tmp_path / "resumed", tiny(dataset, seed=99), **options).fit(resume=True)
    assert result.resumed_from == 6
    assert final_hashes(tmp_path / "straight") == final_hashes(tmp_path / "resumed")
    assert rows(tmp_path / "straight") == rows(tmp_path / "resumed")


def test_a_run_that_learns_middles_has_the_same_bits_after_a_stop_and_on_other_workers(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / "text").mkdir(exist_ok=True)
        write_text(tmp_path / "text" / f"{number}.txt", words=300, seed=number)
    dataset = prepare(tmp_path / "text", tmp_path / "tokens", tokenizer="char", val_fraction=0.3, fim=True)
    options = {"fim_rate": 0.5, "grad_accum": 2}
    straight = trainer(dataset, tmp_path / "straight", **options)
    straight.fit()
    prefix = dataset.tokenizer.fim_tokens.prefix
    assert any((batch.tokens == prefix).any() for batch in straight.data.microbatches(7))

    class Stop(Exception):
        pass

    def stop(fault):
        raise Stop

    run = trainer(dataset, tmp_path / "resumed", threads=2, **options)
    monkeypatch.setattr(run.data, "microbatches", lambda update, make=run.data.microbatches: stop(None) if update == 5 else make(update))
    with pytest.raises(Stop):
        run.fit()
    assert trainer(dataset, tmp_path / "resumed", tiny(dataset, seed=9), threads=3, **options).fit(resume=True).resumed_from == 4
    assert final_hashes(tmp_path / "straight") == final_hashes(tmp_path / "resumed") and rows(tmp_path / "straight") == rows(tmp_path / "resumed")
    assert load(tmp_path / "resumed")[1].fim == dataset.tokenizer.fim_tokens
    with pytest.raises(UserError, match="fim_rate"):
        trainer(dataset, tmp_path / "resumed", grad_accum=2).fit(resume=True)


def test_a_stop_between_checkpoint_and_evaluation_loses_no_evaluation(dataset, tmp_path, monkeypatch):
    import cllm.train.evaluations

    trainer(dataset, tmp_path / "straight").fit()
    with monkeypatch.context() as patch:
        patch.setattr(cllm.train.evaluations, "evaluate_part", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError):
            trainer(dataset, tmp_path / "resumed").fit()
    assert CheckpointStore(tmp_path / "resumed" / "checkpoints").latest() == 4  # saved first, evaluated after
    trainer(dataset, tmp_path / "resumed").fit()
    assert rows(tmp_path / "straight") == rows(tmp_path / "resumed")
    assert final_hashes(tmp_path / "straight") == final_hashes(tmp_path / "resumed")


def test_a_long_update_is_left_between_two_microbatches_and_made_anew(dataset, tmp_path):
    options = {"grad_accum": 6, "eval_every": 8, "checkpoint_every": 8, "noise_scale_every": 1}
    trainer(dataset, tmp_path / "straight", **options).fit()
    run = trainer(dataset, tmp_path / "run", **options)
    loss, calls = run.model.loss, 0

    def signalled(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3 * 6 + 2:  # in the second microbatch of the fourth update
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args, **kwargs)

    run.model.loss = signalled
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 3 of 8; the checkpoint is"):
        run.fit()
    assert calls == 3 * 6 + 2
    assert trainer(dataset, tmp_path / "run", **options).fit().resumed_from == 3
    assert final_hashes(tmp_path / "straight") == final_hashes(tmp_path / "run")
    assert rows(tmp_path / "straight") == rows(tmp_path / "run")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_number_of_threads_never_changes_a_bit(dataset, tmp_path, precision):
    found = set()
    for threads in (1, 2, 3, 64):
        trainer(dataset, tmp_path / f"threads-{threads}", threads=threads, steps=4, precision=precision).fit()
        found.add(str(final_hashes(tmp_path / f"threads-{threads}")))
    assert len(found) == 1


def test_a_finished_run_gives_its_result_again_without_training(dataset, tmp_path):
    first = trainer(dataset, tmp_path / "run").fit()
    written = rows(tmp_path / "run")
    again = trainer(dataset, tmp_path / "run").fit()
    assert (again.step, again.resumed_from) == (8, 8)
    assert again.validation == first.validation and again.best_step == first.best_step
    assert rows(tmp_path / "run") == written


def test_another_configuration_is_refused_with_the_differences_listed(dataset, tmp_path):
    trainer(dataset, tmp_path / "run", steps=2).fit()
    with pytest.raises(UserError, match=r"another configuration:\n  optim.beta2: 0.95 there, 0.5 here"):
        trainer(dataset, tmp_path / "run", steps=2, beta2=0.5).fit()
    with pytest.raises(UserError, match=r"model.num_layers: 1 there, 2 here"):
        trainer(dataset, tmp_path / "run", tiny(dataset, num_layers=2), steps=2).fit()
    with pytest.raises(UserError, match="already holds a run"):
        trainer(dataset, tmp_path / "run", steps=2).fit(resume=False)
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        trainer(dataset, tmp_path / "fresh", steps=2).fit(resume=True)
    assert trainer(dataset, tmp_path / "run", steps=2, threads=3, keep=7).fit().resumed_from == 2


def test_other_data_or_another_tokenizer_is_refused(dataset, tmp_path):
    trainer(dataset, tmp_path / "run", steps=2).fit()
    same_tokens = prepare(write_text(tmp_path / "b.txt", seed=5), tmp_path / "b", tokenizer=dataset.tokenizer, val_fraction=0.1)
    with pytest.raises(UserError, match=r"data: .* there, .* here"):
        Trainer(tiny(dataset), same_tokens, settings(steps=2), out=tmp_path / "run").fit()
    (tmp_path / "c.txt").write_text("other letters XYZ " * 200)
    other = prepare(tmp_path / "c.txt", tmp_path / "c", tokenizer="char", val_fraction=0.1)
    with pytest.raises(CLLMError, match=r"tokenizer"):
        Trainer(tiny(dataset), other, settings(steps=2), out=tmp_path / "x", tokenizer=dataset.tokenizer).fit()


def test_two_trainings_never_write_the_same_run(dataset, tmp_path):
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run"), pytest.raises(CheckpointError, match="is being trained by process"):
        trainer(dataset, tmp_path / "run", steps=2).fit()
    assert trainer(dataset, tmp_path / "run", steps=2).fit().step == 2


def test_early_stopping_waits_for_patience_and_keeps_the_best(dataset, tmp_path):
    options = {"steps": 40, "eval_every": 1, "checkpoint_every": 100, "patience": 3, "learning_rate": 5.0, "grad_clip": 0.0, "warmup": 0}
    result = trainer(dataset, tmp_path / "run", **options).fit()
    assert result.stopped_early and result.step < 40
    evaluations = [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "eval"]
    assert result.best_loss == min(evaluations) == evaluations[-4]
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert store.best() == result.best_step and {result.best_step, result.step} <= set(store.steps())
    assert trainer(dataset, tmp_path / "run", **options).fit().step == result.step


def test_a_run_that_ends_no_better_than_token_frequencies_says_so(dataset, tmp_path, capfd):
    result = trainer(dataset, tmp_path / "run", steps=1, learning_rate=1e-9).fit()
    assert result.better_than_unigram is False
    assert "no better than token frequencies alone" in capfd.readouterr().err
    assert "no better than token frequencies alone" in (tmp_path / "run" / "log.txt").read_text()


def test_one_batch_is_learnt_by_heart_when_asked(dataset, tmp_path):
    options = {"steps": 150, "batch_size": 2, "eval_every": 150, "weight_decay": 0.0, "overfit_one_batch": True}
    result = trainer(dataset, tmp_path / "run", tiny(dataset, embed_dim=32), **options).fit()
    assert result.train_loss < 0.1


def test_data_smaller_than_a_batch_and_more_threads_than_work_finish(tmp_path):
    (tmp_path / "small.txt").write_text("abc abc abc abc abd abc")
    small = prepare(tmp_path / "small.txt", tmp_path / "tokens", tokenizer="char", val_fraction=0.2)
    for epochs in (1.0, 25.0):
        result = trainer(small, tmp_path / f"run-{epochs}", steps=None, epochs=epochs, seq_len=4, batch_size=64, threads=300).fit()
        assert result.step == max(1, math.ceil(epochs * small.train.num_tokens / 256))
    with pytest.raises(DataError, match="--seq-len"):
        trainer(small, tmp_path / "long", seq_len=32)


def test_a_run_without_validation_text_finishes_and_says_so(tmp_path, capfd):
    (tmp_path / "small.txt").write_text("abc abc abc abc abd abc")
    small = prepare(tmp_path / "small.txt", tmp_path / "tokens", tokenizer="char", val_fraction=0.0)
    result = trainer(small, tmp_path / "run", steps=2, seq_len=4).fit()
    assert result.validation is None and result.better_than_unigram is None
    assert "no validation text" in capfd.readouterr().err


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_non_finite_gradient_follows_the_policy_and_is_recorded(dataset, tmp_path, policy, monkeypatch):
    run = trainer(dataset, tmp_path / "run", steps=6, on_nonfinite=policy)
    loss, calls = run.model.loss, 0

    def sometimes_infinite(*args, **kwargs):
        nonlocal calls
        value = loss(*args, **kwargs)
        if kwargs.get("return_stats"):
            return value
        calls += 1
        return value * math.inf if calls == 3 else value

    monkeypatch.setattr(run.model, "loss", sometimes_infinite)
    if policy == "stop":
        with pytest.raises(CLLMError, match=r"step 3: the loss is .*Lower learning_rate.*--on-nonfinite skip"):
            run.fit()
        assert CheckpointStore(tmp_path / "run" / "checkpoints").latest() == 2
    else:
        result = run.fit()
        assert result.step == 6 and result.skipped_steps == 1
    written = [row for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert [row["updated"] for row in written[:3]] == [True, True, False]
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())


def test_a_run_that_only_skips_ends_as_diverged(dataset, tmp_path, monkeypatch):
    run = trainer(dataset, tmp_path / "run", steps=100, on_nonfinite="skip", eval_every=100)
    monkeypatch.setattr(run.model, "loss", lambda *args, **kwargs: sum(p.sum() for p in run.model.parameters()) * math.nan)
    with pytest.raises(CLLMError, match="has diverged"):
        run.fit()
    assert run.step == 21


def test_the_trainer_uses_the_threads_of_its_configuration_and_puts_them_back(dataset, tmp_path):
    before = runtime.settings().threads
    seen = []
    run = trainer(dataset, tmp_path / "run", steps=1, threads=3)
    loss = run.model.loss
    run.model.loss = lambda *args, **kwargs: seen.append(runtime.settings().threads) or loss(*args, **kwargs)
    run.fit()
    assert set(seen) == {3} and runtime.settings().threads == before
    assert threading.current_thread() is threading.main_thread()
