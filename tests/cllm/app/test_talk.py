"""Models that are loaded when they are first asked for, and the surprise of a text, against the model's own figures."""

import asyncio
import os
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from served_model import TEXT, write_model

from cllm.app import talk as talking
from cllm.app.talk import Talk
from cllm.app.workspace import Workspace
from cllm.checkpoint import model_file
from cllm.runtime.progress import compilation
from cllm.serve.errors import Refused
from cllm.serve.served import Served


@pytest.fixture(scope="module")
def loop():
    found = asyncio.new_event_loop()
    thread = threading.Thread(target=found.run_forever, daemon=True)
    thread.start()
    yield found
    found.call_soon_threadsafe(found.stop)
    thread.join()
    found.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def parts(place):
    return write_model(place / "tiny.cllm", context=64)


@pytest.fixture
def talk(place, parts):
    app = SimpleNamespace(workspace=Workspace(place), threads=1, closing=[])
    yield Talk(app)
    for close in app.closing:
        close()


def surprise(talk, loop, model, text):
    return asyncio.run_coroutine_threadsafe(talk.surprise(model, text), loop).result(120)


def test_a_model_is_loaded_once_and_again_when_its_file_has_changed(talk, loop, place):
    found = talk.load("tiny.cllm", loop)
    assert found.items() >= {"id": "tiny.cllm", "context": 64, "has_chat": True}.items() and found["parameters"] > 1000
    assert talk.load("./tiny.cllm", loop) == found == talk.loaded()[0]
    assert talk.let_go(place / "other") and talk.loaded() == [found]
    os.utime(place / "tiny.cllm", (1, 1))
    assert talk.load("tiny.cllm", loop)["seconds"] != found["seconds"]
    talk.unload("tiny.cllm")
    assert talk.loaded() == []
    with pytest.raises(Refused):
        talk.unload("tiny.cllm")
    with pytest.raises(Refused):
        talk.load("../tiny.cllm", loop)


def test_what_is_waited_for_is_told(talk, loop, monkeypatch):
    seen = []

    def spied(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **more: seen.append(talk.waiting()["words"]) or real(*given, **more))

    spied(model_file, "load_on")
    spied(Served, "warm_up")
    assert talk.waiting() == {"path": None, "words": "", "seconds": 0} == talk.waiting()
    talk.load("tiny.cllm", loop)
    assert seen == ["reading its weights", "computing its first tokens"]
    compilation.begin("compiling")
    assert talk.waiting()["words"] == "compiling kernels for this machine, which happens once"
    compilation.end()
    assert talk.waiting() == {"path": None, "words": "", "seconds": 0}


def test_the_model_that_was_asked_least_recently_makes_room(talk, loop, place, monkeypatch):
    monkeypatch.setattr(talking, "MOST_LOADED", 2)
    for name in ("a.cllm", "b.cllm"):
        shutil.copy(place / "tiny.cllm", place / name)
        talk.load(name, loop)
    talk.load("a.cllm", loop)
    talk.load("tiny.cllm", loop)
    assert [each["id"] for each in talk.loaded()] == ["a.cllm", "tiny.cllm"]


@pytest.mark.parametrize("text", [TEXT, "What is ä 🦉? " + TEXT * 12], ids=["within the context", "in windows"])
def test_surprise_is_that_of_the_model_for_every_token(talk, loop, parts, text):
    model, tokenizer = parts
    talk.load("tiny.cllm", loop)
    found = surprise(talk, loop, "tiny.cllm", text)
    tokens = tokenizer.encode(text)
    assert len(found["tokens"]) == len(tokens)
    assert b"".join(tokenizer.token_bytes(each) for each in tokens) == text.encode()
    stride, ids = 32, [tokenizer.eot_id, *tokens]
    for at in range(1, len(ids)):
        window = 0 if at < 64 else (at - 64) // stride + 1  # the first that holds it with half of the context before it
        first = window * stride
        with torch.no_grad():
            logits = model(torch.tensor([ids[first:at]]))[0, -1, : tokenizer.vocab_size].float()
        expected = torch.log_softmax(logits, -1)[ids[at]].item()
        assert found["tokens"][at - 1]["logprob"] == pytest.approx(expected, abs=2e-3)
    mean = sum(each["logprob"] for each in found["tokens"]) / len(tokens)
    assert found["perplexity"] == pytest.approx(2.718281828459045**-mean, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(-mean * len(tokens) / 0.6931471805599453 / len(text.encode()), rel=1e-6)


def test_a_text_that_is_empty_or_far_too_long_is_refused(talk, loop):
    talk.load("tiny.cllm", loop)
    for text, words in (("", "there is no text"), ("a b c d " * 2000, "Shorten it")):
        with pytest.raises(Refused, match=words):
            surprise(talk, loop, "tiny.cllm", text)
