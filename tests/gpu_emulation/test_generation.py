"""Generation on a GPU: one graph of a whole decoding step writes what the host writes token by token."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from gpu_emulation.graphs import EmulatedGraphs

from cllm import Model, ModelConfig, runtime
from cllm.config.sampling import Sampling
from cllm.generate import decoding, device_decoding
from cllm.generate.decoding import generate
from cllm.generate.engine import Engine
from cllm.generate.request import Request
from cllm.model import device_steps
from cllm.model import model as models
from cllm.model.pages import PAGE, page_bytes
from cllm.runtime.errors import CLLMError

VOCAB = 60


class Letters:
    """A tokenizer of one character a token; token 0 ends a text."""

    vocab_size, eot_id = VOCAB, 0

    def encode(self, text):
        return [ord(each) - 64 for each in text]

    def decode(self, tokens):
        return "".join(chr(64 + each) for each in tokens)

    def stream_decoder(self):
        return self

    def push(self, token):
        return chr(64 + token)

    def finish(self):
        return ""


SIZES = {"vocab_size": 64, "embed_dim": 32, "num_layers": 2, "max_seq_len": 40}
FAMILIES = {
    "cllm": ModelConfig(**SIZES, num_heads=4, num_kv_heads=2, qk_norm=True),
    "gpt2": ModelConfig(**SIZES, num_heads=2, norm="layer"),
    "window": ModelConfig(**SIZES, num_heads=2, sliding_window=7, softcap=20.0, tie_embeddings=False, bigram_rows=50, trigram_rows=70),
}
CALLS = {
    "greedy": {"temperature": 0, "max_tokens": 30},
    "sampled": {"temperature": 1.3, "max_tokens": 30, "samples": 3, "seed": 5},
    "filtered": {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "max_tokens": 30, "samples": 2, "seed": 1},
    "penalised": {"temperature": 0, "repetition_penalty": 1.5, "max_tokens": 30},
    "penalised and sampled": {"temperature": 1.0, "repetition_penalty": 1.3, "max_tokens": 25, "samples": 2},
    "all settings": {
        "temperature": 1.2, "top_k": 50, "typical_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.4, "frequency_penalty": 0.7,
        "logit_bias": {3: 2.5, 9: -100.0}, "max_tokens": 25, "samples": 2,
    },
    "penalised counts": {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": -0.5, "max_tokens": 30},
    "beyond the context": {"temperature": 1.0, "max_tokens": 75, "samples": 2, "seed": 3},
    "ends at different times": {"temperature": 1.5, "max_tokens": 60, "samples": 5, "seed": 2, "stop": ("A", "BC")},
    "too few for a graph": {"temperature": 1.0, "max_tokens": 4},
}  # fmt: skip


@pytest.fixture
def graphs(monkeypatch):
    """What was recorded. Generation takes the way that it takes on a GPU; the kernels are plain torch."""
    made = []
    for module in (device_decoding, device_steps):
        monkeypatch.setattr(module, "CudaGraphs", lambda device: made.append(EmulatedGraphs(device)) or made[-1])
    with runtime.use(backend="torch"):
        yield made


def model_of(family, dtype=torch.float32):
    """Weights as large as those of a trained model, so that tokens depend on what was written before."""
    model = Model(FAMILIES[family], seed=3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("grams.weight"):
                parameter.normal_(0, 0.01, generator=torch.Generator().manual_seed(1))
            if parameter.dim() == 2:
                parameter.mul_(3 if parameter is model.embedding_weight else 8)
    return model.to(dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("call", CALLS)
def test_a_graph_writes_the_tokens_that_the_host_writes(monkeypatch, graphs, family, call):
    model, options = model_of(family), CALLS[call]
    expected = generate(model, Letters(), "HELLO", **options)
    assert not graphs
    monkeypatch.setattr(decoding, "_computes_on_a_gpu", lambda model: True)
    found = generate(model, Letters(), "HELLO", **options)
    assert [(each.tokens, each.text, each.finish_reason) for each in found] == [(each.tokens, each.text, each.finish_reason) for each in expected]
    if options["max_tokens"] > device_decoding.WORTH_A_GRAPH:
        (graph,) = graphs  # recorded once, also where the context was left behind
        assert len(graph.records) == 1 and graph.replays >= max(len(each.tokens) for each in found) - 5
    else:
        assert not graphs


def test_a_sample_is_the_same_among_any_others(monkeypatch, graphs):
    monkeypatch.setattr(decoding, "_computes_on_a_gpu", lambda model: True)
    model = model_of("cllm", torch.bfloat16)
    alone, *_ = generate(model, Letters(), "HELLO", temperature=1.0, max_tokens=30, seed=7)
    among = generate(model, Letters(), "HELLO", temperature=1.0, max_tokens=30, seed=7, samples=4)
    assert among[0].tokens == alone.tokens and len({tuple(each.tokens) for each in among}) > 1


def test_with_keys_and_values_in_int8_a_text_is_written_as_the_server_writes_it(monkeypatch, graphs):
    monkeypatch.setattr(decoding, "_computes_on_a_gpu", lambda model: True)
    model = model_of("cllm")
    model.kv_cache = "int8"
    found, expected = (generate(model, Letters(), "HELLO", temperature=0, max_tokens=30, use_cache=each)[0] for each in (True, False))
    assert found.tokens == expected.tokens and not graphs


def test_damaged_weights_are_told(monkeypatch, graphs):
    monkeypatch.setattr(decoding, "_computes_on_a_gpu", lambda model: True)
    model = model_of("gpt2")
    with torch.no_grad():
        model.backbone.blocks[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(CLLMError, match="logits are not finite"):
        generate(model, Letters(), "HELLO", max_tokens=20)


def answers(model):
    """What an engine makes of requests that come one by one: one whose answer needs another page and has guesses, sampled ones, and a short one."""
    engine = Engine(model, vocab_size=VOCAB, memory=8 * page_bytes(model.config, model.compute_dtype), chunk=70)
    greedy, sampled = {"sampling": Sampling(temperature=0)}, {"sampling": Sampling(temperature=1.2), "samples": 2}
    asked = [([3, 1, 4, 1, 5] * 24, 20, greedy), ([9, 2, 6], 12, sampled), ([5, 3], 2, greedy)]
    tokens: dict[tuple[int, int], list[int]] = {}
    reasons, steps = [], 0
    for number, (prompt, most, options) in enumerate(asked):

        def told(sample, chosen, number=number):
            tokens.setdefault((number, sample), []).append(chosen.token)
            return True

        engine.submit(Request(prompt, most, on_token=told, on_finish=lambda _, reason: reasons.append(reason), **options))
        engine.step()
        steps += 1
    while engine.step():
        steps += 1
    return tokens, reasons, steps


@pytest.mark.parametrize("family", FAMILIES)
def test_many_requests_by_graphs_get_the_tokens_of_the_same_operations_one_by_one(monkeypatch, graphs, family):
    model = Model(replace(FAMILIES[family], max_seq_len=PAGE + 30), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.kv_cache = "int8" if family == "gpt2" else None
    expected = answers(model)
    assert not graphs and expected[1] == ["length"] * 4
    monkeypatch.setattr(models, "_is_on_a_gpu", lambda pool: True)
    assert answers(model) == expected
    (recorded,) = graphs
    assert recorded.replays >= expected[2] - 3 and len(recorded.records) < 10, "but for the steps that read much of a prompt"
