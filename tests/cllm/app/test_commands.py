"""An object of a request becomes the arguments of a process by declarations alone."""

import os
import re
from pathlib import Path

import pytest
from app_client import COMMANDS
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.app.workspace import Workspace
from cllm.cli.app import parser
from cllm.cli.declared import NAMES
from cllm.config.schema import SETTINGS
from cllm.config.train import TrainConfig
from cllm.serve.errors import Refused

ROOT = parser()
DESCRIBED = COMMANDS.describe()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("around") / "workspace"
    (root / "books").mkdir(parents=True)
    (root / "link").symlink_to("/etc")
    return Workspace(root)


@pytest.fixture(autouse=True)
def inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace.root)


def parsed(words):
    """What the real command line makes of some words."""
    command = ROOT
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command.make_context("cllm", list(words)).params


def test_every_command_of_the_contract_is_declared_with_a_sentence_for_each_option():
    assert tuple(DESCRIBED) == NAMES
    for name, command in DESCRIBED.items():
        assert command["help"], name
        names = [each["name"] for each in (*command["arguments"], *command["options"])]
        assert len(names) == len(set(names))
        for each in (*command["arguments"], *command["options"]):
            assert each["help"] and each["type"] in ("integer", "number", "boolean", "text", "choice", "path", "list"), (name, each)
            assert (each["type"] == "choice") == bool(each["choices"] and each["of"] is None)


def test_every_setting_of_a_training_can_be_given():
    keys = {each["key"] for each in (*DESCRIBED["train"]["arguments"], *DESCRIBED["train"]["options"])}
    assert keys - {None} >= SETTINGS.keys()


# Shares, factors and names: numbers that count nothing.
PURE = {
    "beta1", "beta2", "confidence", "dropout", "ema", "eps", "eval-budget", "fim-rate", "grad-clip", "label-smoothing", "learning-rate", "lora-alpha",
    "lora-rank", "min-lr", "momentum", "norm-eps", "plateau-factor", "prometheus-port", "replay", "rope-attention-factor", "rope-factor",
    "rope-fast", "rope-slow", "rope-theta", "seed", "softcap", "tolerance", "val-fraction", "weight-decay", "z-loss",
}  # fmt: skip


@pytest.mark.parametrize("command", NAMES)
def test_every_number_says_what_it_counts_or_counts_nothing(command):
    numbers = [each for each in (*DESCRIBED[command]["arguments"], *DESCRIBED[command]["options"]) if each["type"] in ("integer", "number")]
    assert {each["name"] for each in numbers if each["unit"] is None} <= PURE
    assert not [each["name"] for each in numbers if each["unit"] and each["name"] in PURE]
    for each in numbers:
        if re.match(r"(With --follow: )?[Ss]econds", each["help"]):
            assert each["unit"] == "s", each["name"]


def test_options_arrive_as_on_the_command_line(workspace):
    given_options = {
        "data": "books", "steps": 100, "embed_dim": "32", "learning-rate": 3e-4, "schedule": "wsd", "out": "runs/x", "resume": False, "threads": 2,
        "weight-decay": 0.2, "separator": ' "\n=', "document-mask": False, "exclude": "a,b", "qk_norm": True, "patience": None, "preset": "cllm-1m",
    }  # fmt: skip
    asked = COMMANDS.ask("train", given_options, workspace)
    found = parsed(asked.words)
    assert found["data"] == "books" and found["out"] == Path("runs/x") and found["as_json"] and not found["resume"]
    flags = {"data.path": found["data"]} | {key: found[each.name] for key, each in SETTINGS.items() if each.name in found and key != "data.path"}
    config = TrainConfig.from_layers(flags=flags, sets=found["set_"])
    assert (config.train.steps, config.model.embed_dim, config.optim.learning_rate, config.optim.schedule) == (100, 32, 3e-4, "wsd")
    assert (config.optim.weight_decay, config.data.separator, config.data.document_mask, config.data.exclude) == (0.2, ' "\n=', False, "a,b")
    assert config.model.qk_norm is True and config.model.preset == "cllm-1m"
    assert (asked.run, asked.out, asked.device, asked.title) == ("runs/x", "runs/x", asked.device, "train books")
    assert asked.line.startswith("cllm train ") and "--json" not in asked.line


def test_a_training_without_a_name_gets_that_of_the_command_line(workspace):
    asked = COMMANDS.ask("train", {"data": "books"}, workspace)
    assert asked.run == "runs/books" and "--out=runs/books" in asked.words


def test_lists_and_flags_that_say_no(workspace):
    asked = COMMANDS.ask(
        "crawl", {"urls": ["http://127.0.0.1:1/a", "https://x.org"], "out": "pages", "sitemaps": False, "allow": ["/a", "/b"]}, workspace
    )
    found = parsed(asked.words)
    assert found["urls"] == ["http://127.0.0.1:1/a", "https://x.org"] and found["sitemaps"] is False and found["feeds"] is None
    assert found["allow"] == ["/a", "/b"] and (asked.out, asked.run, asked.device) == ("pages", None, None)


@pytest.mark.parametrize("command, options", [("export", {"checkpoint": "runs/x", "to": "hf"}), ("checkpoint average", {"checkpoints": ["runs/x"]})])
def test_a_model_is_written_over_nothing(workspace, command, options):
    (workspace.root / "exports" / "full").mkdir(parents=True, exist_ok=True)
    (workspace.root / "exports" / "full" / "config.json").write_text("{}")
    (workspace.root / "exports" / "empty").mkdir(exist_ok=True)
    for out in ("exports/full", "exports/full/config.json"):
        with pytest.raises(Refused, match="exists already") as caught:
            COMMANDS.ask(command, options | {"out": out}, workspace)
        assert (caught.value.status, caught.value.param) == (400, "out")
    for out in ("exports/empty", "exports/new"):
        assert COMMANDS.ask(command, options | {"out": out}, workspace).out == out


LONG = "x" * 10_000
NO_PATHS = ["../x", "/etc/passwd", "link/passwd", "-x", "--resume", "a\0b", LONG, "\ud800", ".cllm/secret", "", [], 3.5, {}, "http://x/y"]
HOSTILE = [("train", {"data": value}, "data") for value in NO_PATHS] + [
    ("train", {"data": "books", "out": "../runs"}, "out"), ("train", {"data": "books", "out": "."}, "out"),
    ("train", {"data": "books", "out": ""}, "out"), ("prepare", {"sources": ["books"], "out": "./"}, "out"),
    ("crawl", {"urls": ["https://x.org"], "out": "runs/.."}, "out"),
    ("train", {"data": "books", "out": "--resume"}, "out"),
    ("train", {"data": "books", "no-such": 1}, "no-such"),
    ("train", {"data": "books", "--steps": 1}, "--steps"),
    ("train", {"data": "books", "steps=1 --resume": 1}, "steps=1 --resume"),
    ("train", {"data": "books", "config": "x.toml"}, "config"),
    ("train", {"data": "books", "set": ["data.path=/etc"]}, "set"),
    ("train", {"data": "books", "data.path": "/etc"}, "data.path"),
    ("train", {"data": "books", "json": False}, "json"),
    ("train", {"data": "books", "help": True}, "help"),
    ("train", {"data": "books", "steps": -1}, "steps"),
    ("train", {"data": "books", "steps": "-1"}, "steps"),
    ("train", {"data": "books", "steps": True}, "steps"),
    ("train", {"data": "books", "steps": 1.5}, "steps"),
    ("train", {"data": "books", "steps": 10**30}, "steps"),
    ("train", {"data": "books", "steps": [1]}, "steps"),
    ("train", {"data": "books", "resume": "yes please"}, "resume"),
    ("train", {"data": "books", "resume": 1}, "resume"),
    ("train", {"data": "books", "schedule": "nonsense"}, "schedule"),
    ("train", {"data": "books", "tokenizer": "../../tokenizer.json"}, "tokenizer"),
    ("train", {"data": "books", "from": "/etc/run"}, "from"),
    ("train", {"data": "books", "embed-dim": 32, "embed_dim": 64}, "embed-dim"),
    ("train", {"data": "books", "exclude": " -x"}, "exclude"),
    ("train", {"data": "books", "exclude": "a\x1b[31m"}, "exclude"),
    ("train", {"out": "runs/x", "data": None, "steps": LONG}, "steps"),
    ("train", {}, "data"),
    ("prepare", {"sources": ["books", "../x"], "out": "p"}, "sources"),
    ("prepare", {"sources": ["books"], "out": "p", "runner": "dask://evil:1"}, "runner"),
    ("prepare", {"sources": ["books"]}, "out"),
    ("prepare", {"sources": ["books"] * 1000, "out": "p"}, "sources"),
    ("prepare", {"sources": [["books"]], "out": "p"}, "sources"),
    ("crawl", {"urls": ["status", "../x"], "out": "p"}, "urls"),
    ("crawl", {"urls": ["file:///etc/passwd"], "out": "p"}, "urls"),
    ("crawl", {"urls": "--out=/tmp/x", "out": "p"}, "urls"),
    ("evaluate", {"checkpoint": "runs/x", "tasks": "a", "task-path": "books"}, "tasks"),
    ("export", {"checkpoint": "link/x", "to": "hf", "out": "x"}, "checkpoint"),
    ("bench", {"benchmark": "../x"}, "benchmark"),
    ("doctor", {"threads": 3}, "threads"),
    ("generate", {"checkpoint": "x"}, "command"),
    ("app", {}, "command"),
    ("serve", {}, "command"),
    ("train --resume", {}, "command"),
    (None, {}, "command"),
    (["train"], {}, "command"),
    ("train", ["--resume"], "options"),
    ("train", None, "options"),
]  # fmt: skip


@pytest.mark.parametrize("command, options, param", HOSTILE, ids=lambda value: str(value)[:60].encode("ascii", "replace").decode())
def test_hostile_values_are_refused_by_name(workspace, command, options, param):
    with pytest.raises(Refused) as caught:
        COMMANDS.ask(command, options, workspace)
    assert caught.value.status == 400 and caught.value.param == param, caught.value.message
    assert len(caught.value.message) < 1_000 and "\x1b" not in caught.value.message


WORDS = st.sampled_from(
    ["books", "a", "-x", "--resume", "--out=/etc", "../x", "/etc", "1", "true", "none", "", "a=b", "--", "-", "x --resume", "http://a/b"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**20) | st.floats() | WORDS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
NAMES_OF = {name: [each["name"] for each in (*command["arguments"], *command["options"])] for name, command in DESCRIBED.items()}


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_no_options_make_a_word_that_was_not_declared(data, workspace):
    os.chdir(workspace.root)
    name = data.draw(st.sampled_from(NAMES))
    keys = (
        st.sampled_from([*NAMES_OF[name], "no-other"]) | st.sampled_from(["--resume", "set", "config", "no-such", "data.path"]) | st.text(max_size=10)
    )
    valid = {
        "data": "books",
        "checkpoint": "runs/x",
        "to": "hf",
        "out": "runs/x",
        "sources": ["books"],
        "checkpoints": ["a"],
        "runs": ["a"],
        "benchmark": "kernels",
    }
    options = {key: value for key, value in valid.items() if key in NAMES_OF[name]} | data.draw(st.dictionaries(keys, VALUES, max_size=3))
    try:
        words = COMMANDS.ask(name, options, workspace).words
    except Refused as error:
        assert error.status == 400
        return
    flags = {option for each in _leaf(name).params if each.param_type_name == "option" for option in (*each.opts, *each.secondary_opts)}
    split = words.index("--") if "--" in words else len(words)
    head, tail = words[len(name.split()) : split], words[split + 1 :]
    assert words[: len(name.split())] == name.split() and head[-1] == "--json"
    for word in head:
        flag, _, value = word.partition("=")
        assert flag in flags and not value.startswith("-"), word
        assert flag != "--set" or value.partition("=")[0] in SETTINGS
    assert not any(word.startswith("-") for word in tail)
    parsed(words)


def _leaf(name):
    command = ROOT
    for word in name.split():
        command = command.commands[word]
    return command
