"""Evaluations as recorded programs against the same operation by operation: equal bit for bit."""

import pytest
import torch

pytest.importorskip("numba")

from cllm import Model, ModelConfig, TrainStep, runtime
from cllm.data.tokens.batch import IGNORE, Batch
from cllm.evaluate.programs import EvaluationPrograms
from cllm.model.memory import predict

SIZES = {"vocab_size": 37, "embed_dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48, "max_seq_len": 16}
OFF = "CLLM_STEP_PROGRAM"


def batch(seed, packed=True, shape=(2, 8)):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(0, 37, shape, generator=generator) for _ in range(2))
    targets[0, : 1 + seed] = IGNORE
    bounds = [0, 1 + seed, *range(shape[1], tokens.numel() + 1, shape[1])]
    return Batch(tokens, targets, torch.tensor(bounds, dtype=torch.int32) if packed else None)


class Pair:
    """One model, whose evaluations are compared with those that run operation by operation."""

    def __init__(self, monkeypatch, **sizes):
        self.monkeypatch, self.model = monkeypatch, Model(ModelConfig(**SIZES | sizes))
        self.programs, self.plain = EvaluationPrograms(self.model), EvaluationPrograms(self.model)

    def check(self, batch):
        with torch.no_grad(), runtime.use(threads=2):
            found = [each.clone() for each in self.programs.losses(batch)]
            with self.monkeypatch.context() as patched:
                patched.setenv(OFF, "0")
                expected = self.plain.losses(batch)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("sizes", "dtype", "packed"),
    [
        ({"num_kv_heads": 1, "qk_norm": True}, torch.bfloat16, True),
        ({"tie_embeddings": False, "sliding_window": 4, "softcap": 20.0}, torch.float32, True),
        ({"norm": "layer"}, torch.bfloat16, False),
        ({"norm": "layer"}, torch.float32, True),
    ],
)
def test_replayed_evaluations_are_equal_bit_for_bit_while_the_weights_go_on(monkeypatch, sizes, dtype, packed):
    pair = Pair(monkeypatch, **sizes)
    pair.model.compute_dtype = dtype
    for number in range(5):
        pair.check(batch(number, packed))
        for parameter in pair.model.parameters():
            parameter.detach().mul_(1.25)
    assert (pair.programs.num_replayed, pair.plain.num_replayed) == (2, 0), pair.programs.reasons


def test_the_predicted_memory_holds_that_of_a_replayed_step_and_evaluation(monkeypatch):
    sizes = {"embed_dim": 128, "ffn_dim": 352, "vocab_size": 512, "max_seq_len": 64}
    pair, step = Pair(monkeypatch, **sizes), TrainStep(Model(ModelConfig(**SIZES | sizes)))
    for number in range(3):
        pair.check(batch(number, shape=(4, 64)))
        step.run([batch(number, shape=(4, 64))])
    taken = step._programs.bytes, pair.programs.bytes
    assert all(taken) and sum(taken) <= predict(pair.model.config, 4, 64).program


def test_what_a_program_does_not_hold_for_runs_by_operations(monkeypatch):
    pair = Pair(monkeypatch)
    for number in range(4):
        pair.check(batch(number))
    assert pair.programs.num_replayed == 1
    pair.check(batch(1, shape=(1, 8)))
    pair.model.backbone.norm.weight.data = pair.model.backbone.norm.weight.data.clone()
    pair.check(batch(1))
    pair.model.quantize_()
    for number in range(4):
        pair.check(batch(number))
    assert pair.programs.num_replayed == 1


def test_an_evaluation_is_watched_and_refuses_tokens_outside_of_the_vocabulary_as_ever(monkeypatch):
    pair, seen = Pair(monkeypatch), []
    for number in range(4):
        pair.check(batch(number))
    wrong = batch(5)
    wrong.tokens[1, 3] = 37
    with torch.no_grad(), pytest.raises(runtime.UserError, match="tokens holds 37"):
        pair.programs.losses(wrong)
    pair.model.backbone.blocks[0].register_forward_hook(lambda *_: seen.append(0))
    pair.check(batch(5))
    assert len(seen) == 2 and pair.programs.num_replayed == 1
