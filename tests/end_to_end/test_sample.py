"""The small model that comes with CLLM answers at once, in every command, until something of one's own has its name."""

from pathlib import Path

import pytest
from command import cllm

from cllm import load
from cllm.checkpoint.place import SAMPLE_FILE, kind_of, place_of
from cllm.config.train import TrainConfig
from cllm.runtime.errors import CheckpointError


def test_the_sample_goes_on_with_a_text_and_is_small(tmp_path):
    ran = cllm("generate", "sample", "--prompt", "It is a truth universally acknowledged, that", "--max-tokens", 30, "--json", cwd=tmp_path)
    assert ran.status == 0, ran.err
    words = ran.json["texts"][0].split()
    assert len(words) > 5 and len(set(words)) > 5 and SAMPLE_FILE.stat().st_size <= 8_000_000
    assert not list(tmp_path.iterdir()), "nothing is written for it"


def test_it_says_that_it_was_not_taught_to_chat(tmp_path):
    ran = cllm("chat", "sample", cwd=tmp_path, stdin="Hello\n")
    assert ran.status == 2 and "was not taught to chat, and goes on with a text instead (cllm generate)" in ran.err


def test_it_can_be_exported_inspected_and_trained_further(tmp_path, text):
    ran = cllm("export", "sample", "--to", "cllm", "--type", "int8", "--out", "copy.cllm", cwd=tmp_path)
    assert ran.status == 0, ran.err
    assert cllm("checkpoint", "diff", "sample", "copy.cllm", "--json", cwd=tmp_path).json["identical"]
    assert cllm("checkpoint", "verify", "sample", "--json", cwd=tmp_path).json["damaged"] == []
    more = ("--steps", 1, "--seq-len", 16, "--batch-size", 1, "--threads", 2)
    ran = cllm("train", text / "bisect.py", "--from", "sample", "--out", "run", *more, cwd=tmp_path)
    assert ran.status == 0, ran.err


def test_the_settings_that_its_card_gives_are_those_of_the_model():
    settings = TrainConfig.from_toml(Path(__file__).parents[2] / "examples" / "production" / "sample.toml")
    model, tokenizer = load("sample")
    assert settings.model_config(tokenizer.vocab_size) == model.config and settings.train.pace is not None and not settings.clocked


def test_what_is_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place_of("sample") == SAMPLE_FILE and str(place_of("./sample.cllm")) == "sample.cllm"
    (tmp_path / "runs" / "sample").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="sample does not exist"):
        kind_of(place_of("sample"))  # somebody who has a run of that name means it
    (tmp_path / "sample" / "checkpoints").mkdir(parents=True)
    assert kind_of(place_of("sample")) == "run" and place_of("sample").absolute() == tmp_path / "sample"
