"""Evaluation by document: sums that add up to `evaluate`, sliding windows, bytes of what was scored, intervals, sources."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cllm import runtime
from cllm.config.model import ModelConfig
from cllm.data import Windows
from cllm.data.pipeline import prepare
from cllm.evaluate.documents import DocumentScores, score_documents
from cllm.evaluate.loss import evaluate
from cllm.model.model import Model
from cllm.runtime.errors import DataError, UserError


@pytest.fixture(autouse=True)
def one_thread():
    with runtime.use(threads=1):
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, text in {
        "fables/fox.txt": "the quick brown fox jumps over the lazy dog. " * 9,
        "fables/owl.txt": "caf\u00e9 for the \u00e9l\u00e9phant \U0001f418! " * 5,
        "notes/short.txt": "a",
        "notes/two.txt": "ab",
    }.items():
        (folder / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "text" / name).write_text(text, encoding="utf-8")
    lines = [{"text": f"line {number} of many, " * (number + 1)} for number in range(6)]
    (folder / "text" / "notes" / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return prepare(folder / "text", folder / "tokens", vocab_size=300, val_fraction=0.0)


@pytest.fixture(scope="module")
def model(dataset):
    return Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=32), seed=3)


def by_hand(model, split, seq_len, stride):
    """Hugging Face's loop: windows over the stream every `stride` tokens, each target scored by the first window that reaches it; here cut
    at documents. (document, nats) of every target, from logits."""
    tokens = torch.from_numpy(split.read(0, split.num_tokens))
    found, scored = [], 1
    for begin in range(0, split.num_tokens, stride):
        for target in range(scored, min(begin + seq_len, split.num_tokens - 1) + 1):
            document = split.document_at(target)
            start = max(begin, int(split.document_starts[document]))
            if target > start:  # not the first token of its document
                with torch.no_grad():
                    logits = model(tokens[None, start:target], last_only=True)[0, 0].double()
                found.append((document, float(torch.nn.functional.cross_entropy(logits, tokens[target]))))
        scored = max(scored, begin + seq_len + 1)
    return found


@pytest.mark.parametrize(("seq_len", "stride", "batch_size"), [(32, 32, 4), (32, 8, 3), (7, 3, 1000), (5, 1, 2)])
def test_each_target_is_scored_once_with_the_context_that_the_stride_promises(dataset, model, seq_len, stride, batch_size):
    split = dataset.train
    scores = score_documents(model, split, dataset.tokenizer, seq_len, batch_size, stride=stride)
    wanted = by_hand(model, split, seq_len, stride)
    assert int(scores.targets.sum()) == len(wanted) == split.num_tokens - split.num_documents
    for name, nats, targets in zip(scores.names, scores.nats, scores.targets):
        mine = [value for document, value in wanted if split.document_name(document) == name]
        assert targets == len(mine) and nats == pytest.approx(sum(mine), rel=1e-5)


def test_with_windows_side_by_side_the_total_is_what_evaluate_says(dataset, model):
    for mask in (True, False):
        total = score_documents(model, dataset.train, dataset.tokenizer, 16, 3, document_mask=mask).total()
        plain = evaluate(model, dataset.train, 16, 5, document_mask=mask)
        assert total.loss == pytest.approx(plain.loss, rel=1e-6)
        assert (total.accuracy, total.num_targets) == (pytest.approx(plain.accuracy), plain.num_targets)


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_windows_of_any_stride_have_every_token_but_the_first_as_a_target_once(num_tokens, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))

    class Split:
        document_starts = np.zeros(1, dtype=np.int64)
        num_documents = 1

        def read(self, start, count):
            return np.arange(start, start + count)

        def document_at(self, position):
            return 0

    Split.num_tokens = num_tokens
    windows = Windows(Split(), seq_len, data.draw(st.integers(1, 5)), stride=stride)
    targets = np.concatenate([[0], *(batch.targets[batch.targets != -100].numpy() for batch in windows)])
    assert targets[1:].tolist() == list(range(1, num_tokens)) and windows.num_targets == max(0, num_tokens - 1)
    for index, batch in enumerate(windows):
        row, column = (batch.targets != -100).nonzero(as_tuple=True)
        assert bool(((column + 1 > seq_len - stride) | (row + index == 0)).all())


def test_bytes_are_exactly_those_of_the_scored_tokens(dataset, model):
    split, tokenizer = dataset.train, dataset.tokenizer
    scores = score_documents(model, split, tokenizer, 32)
    for document in range(split.num_documents):
        start = int(split.document_starts[document])
        end = int(split.document_starts[document + 1]) if document + 1 < split.num_documents else split.num_tokens
        text = tokenizer.decode_bytes(split.read(start + 1, end - start - 1))
        if end - start > 1:
            assert scores.num_bytes[scores.names.index(split.document_name(document))] == len(text)
    total = scores.total()
    assert total.bits_per_byte == pytest.approx(scores.nats.sum() / math.log(2) / scores.num_bytes.sum())
    firsts = sum(len(tokenizer.token_bytes(int(split.read(int(start), 1)[0]))) for start in split.document_starts)
    assert scores.num_bytes.sum() == split.num_bytes - firsts


def made(losses, targets=None, names=None):
    losses = np.array(losses, dtype=float)
    targets = np.full(len(losses), 100) if targets is None else np.array(targets)
    return DocumentScores(names or [f"d{i}.txt" for i in range(len(losses))], losses * targets, targets // 2, targets, targets * 4)


def test_the_interval_is_repeatable_holds_the_estimate_and_widens_with_confidence():
    scores = made(np.random.default_rng(0).normal(3.0, 0.5, 60))
    narrow, wide = scores.interval(0.5), scores.interval(0.99)
    assert scores.interval(0.5) == narrow and scores.interval(0.5, seed=1) != narrow
    assert wide.loss[0] < narrow.loss[0] < scores.total().loss < narrow.loss[1] < wide.loss[1]
    assert narrow.perplexity == pytest.approx(tuple(map(math.exp, narrow.loss)))
    assert narrow.bits_per_byte == pytest.approx(tuple(edge / math.log(2) / 4 for edge in narrow.loss))
    assert narrow.accuracy == (0.5, 0.5)  # all documents alike in this


def test_a_95_percent_interval_holds_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(1)
    held = sum(low < 3.0 < high for low, high in (made(generator.normal(3.0, 0.5, 50)).interval(0.95, 300).loss for _ in range(200)))
    assert 178 <= held <= 198, held  # 95 % of 200 is 190; the percentile bootstrap is known to fall a little short


def test_one_document_has_no_interval_and_wrong_settings_are_refused(dataset, model):
    assert made([2.0]).interval() is None
    with pytest.raises(UserError, match="confidence"):
        made([2.0, 3.0]).interval(1.0)
    with pytest.raises(UserError, match="stride must be within 1 and seq_len"):
        score_documents(model, dataset.train, dataset.tokenizer, 16, stride=17)
    with pytest.raises(UserError, match="seq_len must be within 1 and 32"):
        score_documents(model, dataset.train, dataset.tokenizer, 64)
    with pytest.raises(UserError, match="file, folder"):
        made([2.0]).by_source("author")


def test_sources_are_files_or_top_folders_and_add_up(dataset, model):
    scores = score_documents(model, dataset.train, dataset.tokenizer, 16)
    folders = scores.by_source()
    assert {group.name for group in folders} == {"fables/", "notes/"}
    files = {group.name: group for group in scores.by_source("file")}
    assert files["notes/lines.jsonl"].num_documents == 6 and files["notes/lines.jsonl"].interval is not None
    assert files["fables/owl.txt"].interval is None
    for groups in (folders, list(files.values())):
        assert sum(group.evaluation.num_targets for group in groups) == scores.total().num_targets
        assert sum(group.num_bytes for group in groups) == scores.num_bytes.sum()
    assert made([2.0, 3.0], names=["a.txt", "b.txt"]).by_source()[0].name == "a.txt"


def test_the_worst_documents_come_first_and_short_ones_only_where_there_are_no_others():
    assert [group.name for group in made([1.0, 4.0, 2.0, 9.0], targets=[100, 50, 40, 3]).worst(2)] == ["d1.txt", "d2.txt"]
    assert [group.name for group in made([1.0, 4.0], targets=[3, 3]).worst(5)] == ["d1.txt", "d0.txt"]


def test_text_without_a_target_is_refused(model, tmp_path):
    from cllm.data import TokenSplit
    from cllm.data.tokens.shards import ShardWriter

    writer = ShardWriter(tmp_path, 300, "hash", None)
    writer.append(np.array([5]))
    writer.end_document("one.txt", 1, 1)
    writer.close()
    with pytest.raises(DataError, match="Give more text"):
        score_documents(model, TokenSplit(tmp_path), type("T", (), {"byte_lengths": np.ones(300, dtype=np.int64)})(), 8)
