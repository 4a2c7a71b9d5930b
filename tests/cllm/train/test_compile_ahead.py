"""What is compiled before a training is what it needs."""

import json

import pytest
from command import Started, python

from cllm.config.train import TrainConfig
from cllm.train import compile_ahead

pytest.importorskip("numba")

COMPILE = "import runpy; runpy.run_module('cllm.train.compile_ahead', run_name='__main__')"
TRAIN = """
import torch
from cllm import Model, TrainStep
from cllm.config.model import ModelConfig
from cllm.config.sampling import Sampling
from cllm.generate.engine import Engine
from cllm.generate.request import Request
from numba.core import event

class Compiled(event.Listener):
    names = []
    def on_start(self, event): self.names.append(event.data["dispatcher"].__name__)
    def on_end(self, event): ...

step = TrainStep(Model(ModelConfig(**{sizes}), seed=0), precision="fp32", learning_rate=1e-3, grad_clip=1.0)
event.register("numba:compile", Compiled())
tokens = torch.zeros(2, 16, dtype=torch.int64)
for _ in range(3):
    step(tokens, tokens)
with torch.no_grad():
    step.model.loss(tokens, tokens, return_stats=True)
for prompt in ([1], [1] * 40):  # a sample, and a text that goes on with more tokens than one
    engine = Engine(step.model, vocab_size=64)
    engine.submit(Request(prompt, 2, Sampling(temperature=0.8, top_p=0.95)))
    while engine.step():
        pass
print(Compiled.names)
"""


def test_afterwards_a_training_compiles_nothing():
    """Also where the cache has all of them already: then nothing is compiled, and this is quick."""
    settings = {"train.precision": "fp32", "train.batch_size": 2, "train.seq_len": 16, "train.device": "cpu", "data.path": "text"}
    config = TrainConfig.from_layers(sets=[f"{key}={value}" for key, value in settings.items()])
    sizes = {"vocab_size": 64, "embed_dim": 32, "num_layers": 3, "num_heads": 2, "max_seq_len": 64}
    given = json.dumps({"config": config.to_dict(), "sizes": sizes})
    compiling = Started(program=COMPILE, stdin=given, CLLM_THREADS="2")
    told = compiling.communicate()[0].split()
    assert compiling.returncode == 0, compiling.err
    assert told[-1] == told[-2] and int(told[-1]) > 12
    assert not compile_ahead.is_cold()
    trained = python("-c", TRAIN.format(sizes=sizes), CLLM_THREADS="2")
    assert trained.out == "[]\n", trained.err


def test_a_cache_without_the_matrix_product_is_cold(tmp_path, monkeypatch):
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    assert compile_ahead.is_cold()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "chosen by the user, whose business it is"))
    assert not compile_ahead.is_cold()
