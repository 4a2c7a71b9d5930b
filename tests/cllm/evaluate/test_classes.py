"""Classes of tokens, their confusion matrix, top-5 accuracy and calibration, against sums by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cllm import runtime
from cllm.config.model import ModelConfig
from cllm.data import Windows
from cllm.data.pipeline import prepare
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.evaluate.classes import BINS, CLASSES, class_of_text, classify, report_classes
from cllm.model.model import Model


@pytest.mark.parametrize("text, name", [
    (" ", "whitespace"), ("\n\n", "whitespace"), ("", "whitespace"), (" the", "word"), ("é", "word"), ("\ufffd", "word"), (" 42", "number"),
    ("½", "number"), ("(", "punctuation"), (" +=", "punctuation"), ("_x", "punctuation"),
])  # fmt: skip
def test_the_class_is_that_of_the_first_character_that_is_no_blank(text, name):
    assert class_of_text(text) == name


@given(st.text(max_size=12))
def test_every_text_has_a_class(text):
    assert class_of_text(text) in CLASSES


def test_the_last_percent_of_the_training_text_is_rare():
    tokenizer = Tokenizer.train(["abcdefghij 1."], vocab_size=300, kind="char")
    counts = np.full(tokenizer.vocab_size + 3, 1000)
    letter, digit = tokenizer.encode("b")[0], tokenizer.encode("1")[0]
    counts[letter], counts[digit] = 3, 0
    classes = [CLASSES[each] for each in classify(tokenizer, counts)]
    assert classes[letter] == classes[digit] == "rare" and classes[-3:] == ["rare"] * 3  # the last rows of the embedding are no token
    assert classes[tokenizer.encode("c")[0]] == "word" and classes[tokenizer.encode(".")[0]] == "punctuation"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("It was 1 of 2, or 3 (of 44)? " * 60)
    return prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.3)


def test_the_report_is_what_the_logits_say_and_the_same_for_any_number_of_threads(dataset):
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=16), seed=1)
    classes = classify(dataset.tokenizer, dataset.train.token_counts())
    reports = []
    for threads in (1, 3):
        with runtime.use(threads=threads):
            reports.append(report_classes(model, dataset.val, classes, 16, 4, max_targets=10**9))
    found = reports[0]
    assert reports[0].to_dict() == reports[1].to_dict()

    confusion, top5, confidence, hits = np.zeros((5, 5), int), [], [], []
    for batch in Windows(dataset.val, 16, 4, document_mask=True):
        logits = model.double()(batch.tokens, cu_seqlens=batch.cu_seqlens).detach()
        for row, target in zip(logits.reshape(-1, logits.shape[-1]), batch.targets.reshape(-1).tolist()):
            if target >= 0:
                order = row.argsort(descending=True)[:5].tolist()
                confusion[classes[target], classes[order[0]]] += 1
                top5.append(target in order)
                confidence.append(float(row.softmax(0).max()))
                hits.append(order[0] == target)
    assert (found.confusion == confusion).all() and found.num_targets == len(hits)
    assert found.top5 == pytest.approx(np.mean(top5))
    which = np.minimum((np.array(confidence) * BINS).astype(int), BINS - 1)
    error = sum(abs(np.array(confidence)[which == b].mean() - np.array(hits)[which == b].mean()) * (which == b).mean() for b in set(which))
    assert found.calibration_error == pytest.approx(error, abs=1e-5)


def test_precision_recall_and_f1_are_those_of_the_confusion_matrix():
    from cllm.evaluate.classes import ClassReport

    confusion = np.zeros((5, 5), int)
    confusion[1] = [1, 6, 0, 2, 1]
    confusion[3] = [0, 3, 0, 3, 0]
    scores = ClassReport(confusion, 0.0, 0.0, 16).scores()
    assert scores["word"]["recall"] == pytest.approx(0.6) and scores["word"]["precision"] == pytest.approx(6 / 9)
    assert scores["word"]["f1"] == pytest.approx(2 * 6 / 19) and scores["punctuation"]["recall"] == 0.5
    assert scores["number"] == {"precision": None, "recall": None, "f1": None, "targets": 0}
    assert scores["whitespace"]["recall"] is None and scores["whitespace"]["precision"] == 0.0


def test_a_part_of_the_split_is_spread_over_all_of_it(dataset):
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=16))
    classes = classify(dataset.tokenizer, dataset.train.token_counts())
    some = report_classes(model.to(torch.float32), dataset.val, classes, 16, 4, max_targets=130)
    assert 64 < some.num_targets <= 130
