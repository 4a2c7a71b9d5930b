"""Beside a training: new requests are answered by the better checkpoint, and those that run end with the one that they began with."""

import threading

import pytest
from command import wait_for
from served_model import make_model, running, served_as

from cllm.checkpoint.model_file import load
from cllm.checkpoint.parts import WEIGHTS
from cllm.checkpoint.store import CheckpointStore
from cllm.checkpoint.weights import weights_of
from cllm.generate.decoding import generate
from cllm.model.model import Model
from cllm.runtime.errors import CheckpointError, UserError
from cllm.serve.follow import Follower, newest

ASKED = {"prompt": "What is", "max_tokens": 12, "temperature": 0}


@pytest.fixture
def run(tmp_path):
    """A run as its training leaves it, with two checkpoints, the first of them the best."""
    model, tokenizer = make_model()
    tokenizer.save(tmp_path / "tokenizer.json")
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 2):
        weights = weights_of(Model(model.config, seed=step))
        store.save(step, weights, {}, {"model": model.config.to_dict(), "tokenizer_hash": tokenizer.hash})
    store.mark_best(1)
    return tmp_path


def text_of(place):
    model, tokenizer = load(place)
    return generate(model, tokenizer, ASKED["prompt"], max_tokens=12, temperature=0)[0].text


def test_a_better_checkpoint_answers_new_requests_and_the_old_one_those_that_run(run):
    store = CheckpointStore(run / "checkpoints")
    texts = {step: text_of(store.path(step)) for step in (1, 2)}
    assert texts[1] != texts[2] and newest(run) == store.path(1)
    told = []
    with running([served_as("run", *load(store.path(1)))]) as server:
        follower = Follower(run, "run", newest(run), lambda name, path: served_as(name, *load(path)), server.service, told.append)
        assert server.ask("/v1/completions", ASKED)[1]["choices"][0]["text"] == texts[1]
        assert not follower.look()
        answers = []
        long = {**ASKED, "max_tokens": 2000, "model": "run"}
        asking = threading.Thread(target=lambda: answers.append(server.ask("/v1/completions", long)))
        asking.start()
        wait_for(lambda: server.metric("requests_running") == 1)
        before = server.metric("generation_tokens_total")
        store.mark_best(2)
        assert follower.look() and not follower.look()
        assert server.ask("/v1/completions", ASKED)[1]["choices"][0]["text"] == texts[2]
        asking.join()
        model, tokenizer = load(store.path(1))
        assert answers[0][1]["choices"][0]["text"] == generate(model, tokenizer, "What is", max_tokens=2000, temperature=0)[0].text
        wait_for(lambda: len(server.service.stats()) == 1)  # the old one is let go of
        assert server.metric("generation_tokens_total") > before
        assert len(server.ask("/v1/models")[1]["data"]) == 1 and len(told) == 1 and "step-00000002" in told[0]


def test_a_damaged_checkpoint_leaves_what_is_served(run):
    store = CheckpointStore(run / "checkpoints")
    follower = Follower(run, "run", newest(run), lambda name, path: load(path), None, print)
    (store.path(2) / WEIGHTS).write_bytes(b"no weights")
    store.mark_best(2)
    with pytest.raises(CheckpointError):
        follower.look()


def test_before_its_first_evaluation_a_run_is_followed_by_its_latest(run, tmp_path):
    (run / "checkpoints" / "best").unlink()
    assert newest(run).name == "step-00000002"
    with pytest.raises(UserError, match=r"--follow .* is no run"):
        newest(tmp_path / "nothing")
