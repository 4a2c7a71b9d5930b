"""The command that `--find-lr` suggests: all that was given, with another learning rate."""

import pytest

from cllm.cli import train
from cllm.cli.app import main
from cllm.cli.train_looks import words_of


def parsed(arguments, monkeypatch):
    """What a command line gives to the training."""
    found = {}
    monkeypatch.setattr(train, "train_run", lambda console, **given: found.update(given))
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert ended.value.code == 0
    return {key: value for key, value in found.items() if key not in ("plan_only", "find_lr")}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--out", "o", "--config", "c.toml", "--steps", "1e3", "--overfit-one-batch", "--set", "optim.beta2=0.99", "--set", "data.separator= "),
        ("--learning-rate", "1", "--set", "optim.learning_rate=2", "--set", "learning_rate=3", "--from", "-model", "--tokenizer", "./-t.json"),
    ],
)
def test_the_same_command_with_another_rate_gives_the_same_settings(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = parsed(["train", "./-books", *options, "--find-lr"], monkeypatch)
    words = words_of(**{key: given[key] for key in ("flags", "sets", "file", "out", "resume")})
    again = parsed([*("./" * (str(each) == "-books") + str(each) for each in words), "--learning-rate", "5e-4"], monkeypatch)
    assert again["flags"].pop("optim.learning_rate") == "5e-4"
    given["flags"].pop("optim.learning_rate")
    given["sets"] = [each for each in given["sets"] if "learning_rate" not in each]
    flags = [{key: str(value).removeprefix("./") for key, value in each.pop("flags").items()} for each in (given, again)]
    assert flags[0] == flags[1] and given == again


def test_a_run_that_is_there_keeps_its_folder(tmp_path, monkeypatch):
    (tmp_path / "config.toml").touch()
    given = parsed(["train", "--resume", "--out", tmp_path, "--find-lr"], monkeypatch)
    words = words_of(**{key: given[key] for key in ("flags", "sets", "file", "out", "resume")})
    assert words == ["train", "--config", tmp_path / "config.toml"]
