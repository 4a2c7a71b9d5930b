"""What a command refuses without any work: before the machine is measured, a model is built or loaded, or a large library imported."""

import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest

import cllm.checkpoint.model_file
import cllm.model.model
import cllm.train.finetune
from cllm import runtime
from cllm.cli.app import main

TEXT = "There was a king, and he had three daughters. " * 60
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
DETERMINISTIC = ("--set", "train.deterministic=true", "--set", "train.batch_ramp=2", "--grad-accum", "2")


def work(*_, **__):
    raise AssertionError("work was begun")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder with some of everything, in which nothing can be computed."""
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "text.txt": TEXT.encode(), "one.txt": b"x", "binary.bin": bytes(range(256)) * 8, "chat.jsonl": CHAT.encode() * 9,
        "model.cllm": struct.pack("<Q", 2) + b"{}", "noise.cllm": bytes(range(99, 0, -1)), "short.cllm": struct.pack("<Q", 99) + b"{}",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    for module, name in [
        (runtime, "describe"),
        (cllm.model.model.Model, "__init__"),
        (cllm.checkpoint.model_file, "_load_file"),
        (cllm.train.finetune, "load"),
    ]:
        monkeypatch.setattr(module, name, work)


REFUSED = [
    (("train", "nowhere"), 1, "nowhere does not exist. Give a folder of text"),
    (("train", "empty"), 1, "empty is empty. Text, Markdown"),
    (("train", "binary.bin"), 1, "binary.bin holds no text"),
    (("train", "one.txt"), 1, "1 character of text"),
    (("train", "chat.jsonl"), 2, "chat.jsonl holds chats"),
    (("train", "nowhere", "--plan"), 1, "nowhere does not exist"),
    (("train", "nowhere", "--find-lr"), 1, "nowhere does not exist"),
    (("train", "--resume", "--out", "nowhere"), 2, "nowhere holds no run to continue"),
    (("train", "text.txt", "--from", "nowhere"), 1, "nowhere does not exist. Expected a run folder"),
    (("train", "text.txt", "--from", "empty"), 1, "empty is not a checkpoint"),
    (("train", "text.txt", "--from", "text.txt"), 1, "text.txt is a text file."),
    (("train", "text.txt", "--from", "noise.cllm"), 1, "noise.cllm is not a readable safetensors file"),
    (("train", "text.txt", "--lora-rank", "4"), 2, "lora_rank needs a model to adapt"),
    (("train", "text.txt", "--tokenizer", "no.json"), 1, "There is no tokenizer at "),
    (("train", "text.txt", "--seq-len", "1e6"), 1, "one window of --seq-len 1000000 needs"),
    (("train", "text.txt", "--embed-dim", "100", "--num-heads", "7"), 2, "embed_dim must be a multiple of num_heads"),
    (("train", "text.txt", "--num-layers", "100000"), 2, "num_layers must be at most 10,000, got 100,000."),
    (("train", "text.txt", "--num-layers", "100000", "--plan"), 2, "num_layers must be at most 10,000, got 100,000."),
    (("train", "text.txt", "--embed-dim", "1e6", "--num-heads", "1e4"), 2, "the weights of this model ("),
    (("train", "text.txt", "--embed-dim", "1e6", "--num-heads", "1e4", "--plan"), 2, "the weights of this model ("),
    (("train", "text.txt", "--ffn-dim", "1e12"), 2, "the weights of this model ("),
    (("train", "text.txt", *DETERMINISTIC), 2, "train.batch_ramp works in one process that is not deterministic"),
    (("train", "text.txt", "--device", "cpu", "--precision", "fp16"), 2, "precision fp16, with its loss scaling, works on a GPU only."),
    (("generate", "nowhere", "--prompt", "x"), 1, "nowhere does not exist. Expected a run folder"),
    (("chat", "short.cllm"), 1, "short.cllm is not a readable safetensors file"),
    (("evaluate", "model.cllm", "nowhere"), 1, "nowhere does not exist. Give a folder of text"),
    (("evaluate", "model.cllm", "empty"), 1, "empty is empty"),
    (("evaluate", "model.cllm", "--tasks", "one", "--task-path", "nowhere"), 2, ""),
    (("export", "text.txt", "--to", "hf", "--out", "x"), 1, "text.txt is a text file."),
    (("tokenizer", "train", "nowhere"), 1, "nowhere does not exist"),
    (("pack", "nowhere", "--tokenizer", "no.json", "--out", "x"), 1, "nowhere does not exist"),
    (("checkpoint", "diff", "model.cllm", "nowhere"), 1, "nowhere does not exist. Expected a run folder"),
    (("checkpoint", "average", "model.cllm", "nowhere", "--out", "x.cllm"), 1, "nowhere does not exist. Expected a run folder"),
    (("export", "model.cllm", "--to", "hf", "--out", "text.txt/x"), 1, "could not write text.txt/x: Not a directory."),
    (("import", "empty", "--out", "text.txt/x.cllm"), 1, "could not write text.txt/x.cllm: Not a directory."),
    (("checkpoint", "average", "model.cllm", "model.cllm", "--out", "text.txt/x.cllm"), 1, "could not write text.txt/x.cllm: Not a directory."),
    (("tokenizer", "train", "text.txt", "--out", "one.txt/x.json"), 1, "could not write one.txt/x.json: Not a directory."),
    (("pack", "text.txt", "--tokenizer", "no.json", "--out", "one.txt/x"), 1, "could not write one.txt/x: Not a directory."),
    (("checkpoint", "verify", "text.txt"), 1, "text.txt is a text file."),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "status", "words"), REFUSED, ids=lambda each: " ".join(each) if isinstance(each, tuple) else "")
def test_what_can_be_refused_at_once_is(arguments, status, words, places, capsys):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == status and error.startswith("error: ") and words in error


@pytest.mark.parametrize("look", [(), ("--plan",), ("--find-lr",)])
def test_a_training_that_cannot_fit_is_refused_before_a_model_is_built(look, places, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "describe", lambda: SimpleNamespace(brief=lambda: "a machine"))
    with pytest.raises(SystemExit) as ended:
        main(["train", "text.txt", "--seq-len", "32", "--batch-size", "1e6", *look])
    told = capsys.readouterr()
    assert ended.value.code == 2 and "error: out of memory. A step needs about " in told.err and "--batch-size 500000" in told.err
    assert ("predicted memory:" in told.out) == (look == ("--plan",))


def test_a_wrong_name_and_a_preset_beside_a_model_are_answered_before_a_large_library_is_imported(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    commands = [
        ["generate", "nowhere", "--prompt", "x"],
        ["chat", "nowhere"],
        ["evaluate", "nowhere", "x"],
        ["export", "nowhere", "--to", "hf", "--out", "x"],
        ["checkpoint", "inspect", "nowhere"],
        ["train", "nowhere"],
    ]
    beside = ["train", str(text), "--from", str(text), "--preset", "cllm-1m"]
    script = "import sys\nsys.modules['torch'] = None\nfrom cllm.cli.app import main\n"
    script += f"for words in {[*commands, beside]}:\n    try: main(words)\n    except SystemExit: pass\n"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stderr.count("nowhere does not exist.") == len(commands) and ran.stderr.count("\n") == len(commands) + 1, ran.stderr
    assert ran.stderr.endswith(f"--from {text} gives the model's sizes and its tokenizer. Leave out: preset='cllm-1m'.\n")
