"""Evaluation: every target of the split once, the cross entropy of the model's own logits, memory predicted before a run."""

import math

import numpy as np
import pytest
import torch

from cllm import runtime
from cllm.config.model import ModelConfig
from cllm.data import TokenSplit
from cllm.data.pipeline import prepare
from cllm.data.tokens.shards import ShardWriter
from cllm.evaluate.loss import evaluate
from cllm.model.memory import predict
from cllm.model.model import Model
from cllm.runtime.errors import DataError, UserError


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny operations: more threads bring nothing, and on a busy machine they wait for each other."""
    with runtime.use(threads=1):
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 12, encoding="utf-8")
    return prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.3)


@pytest.fixture(scope="module")
def model(dataset):
    return Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=32))


def by_hand(model, tokens, seq_len):
    """Nats and hits, one window after the other, by plain torch from the logits."""
    nats, hits = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, seq_len):
            window = tokens[start : start + seq_len + 1]
            logits = model(window[None, :-1])[0].double()
            nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            hits += int((logits.argmax(-1) == window[1:]).sum())
    return nats, hits


@pytest.mark.parametrize(("seq_len", "batch_size"), [(32, 4), (7, 3), (32, 1000)])
def test_the_loss_is_the_mean_cross_entropy_of_the_logits_over_the_whole_split(dataset, model, seq_len, batch_size):
    split = dataset.val
    result = evaluate(model, split, seq_len, batch_size, document_mask=False)
    nats, hits = by_hand(model, torch.from_numpy(split.read(0, split.num_tokens)), seq_len)
    assert result.num_targets == split.num_tokens - 1
    assert result.loss == pytest.approx(nats / result.num_targets, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / split.num_bytes, rel=1e-5)
    assert result.accuracy == pytest.approx(hits / result.num_targets, abs=1e-3)


def test_the_batch_size_does_not_change_the_result(dataset, model):
    first, second = (evaluate(model, dataset.val, 16, batch_size) for batch_size in (1, 5))
    assert first.loss == pytest.approx(second.loss, rel=1e-6) and first.accuracy == second.accuracy


def test_wrong_sizes_and_splits_without_targets_are_refused(dataset, model, tmp_path):
    with pytest.raises(UserError, match="seq_len must be within 1 and 32"):
        evaluate(model, dataset.val, 64)
    writer = ShardWriter(tmp_path, 300, "hash", None)
    writer.append(np.array([5]))
    writer.end_document("one.txt", 1, 1)
    writer.close()
    with pytest.raises(DataError, match="Give more text"):
        evaluate(model, TokenSplit(tmp_path), 8)


def test_predicted_memory_counts_parameters_exactly_and_grows_with_the_batch():
    config = ModelConfig.preset("cllm-5m")
    small, large = predict(config, 1, 128), predict(config, 8, 512, "bf16")
    assert small.weights == small.gradients == 4 * config.num_parameters() == small.optimizer // 2
    assert large.activations > 8 * small.activations
    assert sum(size for _, size, _ in large.rows()) == large.total
    assert predict(config, 8, 512, "bf16").activations < predict(config, 8, 512).activations
