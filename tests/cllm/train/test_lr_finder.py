"""The learning-rate finder: what it tries, when it stops, what it suggests, the table and the picture."""

import builtins
import math
import random

import pytest

from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data.pipeline import prepare
from cllm.model.model import Model
from cllm.runtime.errors import UserError
from cllm.train.lr_finder import HIGHEST, LOWEST, MARGIN, NUM_UPDATES, LearningRates, as_rows, draw, find_learning_rate


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    (folder / "text.txt").write_text(" ".join(generator.choice(["one", "two", "three", "many"]) for _ in range(2000)), encoding="utf-8")
    return prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.05)


def find(dataset, **values):
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=16))
    settings = {"steps": 100, "seq_len": 16, "batch_size": 4, "precision": "fp32", "threads": 1, **values}
    config = TrainConfig(**settings).resolve(model.config, dataset.train.num_tokens)
    return find_learning_rate(model, dataset.train, config)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "schedule_free"])
def test_a_rate_from_the_falling_part_is_suggested(dataset, optimizer):
    found = find(dataset, optimizer=optimizer)
    assert found.rates[0] == LOWEST and all(b / a == pytest.approx(10 ** (6 / 99)) for a, b in zip(found.rates, found.rates[1:]))
    assert len(found.rates) == len(found.losses) == len(found.smoothed) <= NUM_UPDATES
    assert LOWEST < found.suggestion < found.lowest < HIGHEST and found.suggestion <= found.lowest / MARGIN * 1.05
    assert found.losses[0] == pytest.approx(math.log(dataset.tokenizer.vocab_size), rel=0.1)  # nats of an untrained model
    at = [found.smoothed[min(range(len(found.rates)), key=lambda i: abs(math.log(found.rates[i] / rate)))] for rate in (LOWEST, found.suggestion)]
    assert at[1] < 0.9 * at[0]  # it has learnt by then
    assert find(dataset, optimizer=optimizer).losses == found.losses


def test_a_loss_that_rises_or_is_not_finite_ends_the_test(dataset, monkeypatch):
    rising = find(dataset, optimizer="lion", grad_clip=0.0)
    assert rising.diverged and len(rising.rates) < NUM_UPDATES and rising.smoothed[-1] > 1.3 * min(rising.smoothed)
    monkeypatch.setenv("CLLM_STEP_PROGRAM", "0")  # a step that is replayed would not call what is put in the place of `loss`
    loss, calls = Model.loss, 0

    def infinite_from_the(number):
        def changed(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            return loss(self, *args, **kwargs) * (math.inf if calls >= number else 1.0)

        return changed

    monkeypatch.setattr(Model, "loss", infinite_from_the(10))
    found = find(dataset)
    assert found.diverged and len(found.rates) == 9 and all(math.isfinite(each) for each in found.losses)
    monkeypatch.setattr(Model, "loss", infinite_from_the(0))
    with pytest.raises(UserError, match="very first loss is not finite"):
        find(dataset)


def test_a_ruined_model_that_still_learns_how_frequent_tokens_are_moves_no_suggestion():
    """A run on tinyshakespeare: fast down to 5.7 nats (frequencies alone), a bump at 0.01, and slowly on down up to a rate of 1."""
    rates = [10 ** (-6 + 6 * i / 99) for i in range(100)]
    losses = [6.92 - 1.2 / (1 + 10 ** (-2.5 * (math.log10(rate) + 2.9))) - 0.15 * max(0.0, math.log10(rate) + 1.5) for rate in rates]
    found = LearningRates(rates, losses, losses, diverged=False)
    assert found.lowest == 1.0 and found.suggestion == pytest.approx(10**-2.9, rel=0.1)


def curve():
    rates = [10 ** (-6 + 6 * i / 99) for i in range(100)]
    losses = [4.0 - 2.0 * math.exp(-((math.log10(rate) + 2) ** 2)) for rate in rates]
    return LearningRates(rates, losses, losses, diverged=False)


def test_the_suggestion_is_where_the_loss_falls_fastest_and_the_table_marks_the_lowest():
    found = curve()
    assert found.lowest == pytest.approx(1e-2, rel=0.1) and found.suggestion == pytest.approx(10 ** -(2 + 0.5**0.5), rel=0.1)
    rows = as_rows(found)
    assert rows[0][0] == "learning rate" and 20 <= len(rows) <= 30
    (marked,) = [row for row in rows if row[3].endswith("lowest")]
    assert marked[0] == f"{found.lowest:.2e}" and marked[3].startswith("# ")
    assert max(len(row[3]) for row in rows[1:]) == 40


def test_the_picture_is_a_png_and_without_matplotlib_there_is_none(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the picture needs the extra [plot]")
    assert draw(curve(), tmp_path / "new" / "curve.png")
    assert (tmp_path / "new" / "curve.png").read_bytes().startswith(b"\x89PNG")
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert not draw(curve(), tmp_path / "none.png") and not (tmp_path / "none.png").exists()
