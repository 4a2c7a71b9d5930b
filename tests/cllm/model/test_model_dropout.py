"""Dropout in the whole network: where it is, what it leaves alone, and that a mask is the same however and by whom it is drawn."""

import importlib.util

import pytest
import torch

from cllm import kernels, runtime
from cllm.config.model import ModelConfig
from cllm.model.memory import RECOMPUTE
from cllm.model.model import Model

SHAPE = {"vocab_size": 61, "embed_dim": 48, "num_layers": 2, "num_heads": 4, "max_seq_len": 24}
CONFIGS = {
    "llama": ModelConfig(**SHAPE, num_kv_heads=2, tie_embeddings=False),
    "qwen3": ModelConfig(**SHAPE, num_kv_heads=1, qk_norm=True, head_dim=16, sliding_window=5),
    "gpt2": ModelConfig(**SHAPE, norm="layer"),
}
LENGTH = 24
BOUNDS = [0, 7, 24, 30, 48, 72, 90, 96]  # documents in four rows


@pytest.fixture(autouse=True)
def one_thread():
    with runtime.use(threads=1):
        yield


def make(name):
    model = Model(CONFIGS[name], seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else parameter
    return model


def dropout_at(step=3, row=0, rate=0.2, seed=11):
    dropout = kernels.Dropout.of(rate, seed)
    dropout.go_to(step, row * LENGTH)
    return dropout


def text(rows=4):
    return torch.randint(0, 61, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def bounds(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def losses(model, rows=slice(None), packed=None, **drawn):
    tokens = text()[rows]
    dropout = dropout_at(**drawn) if drawn else None
    return model.loss(tokens, tokens, cu_seqlens=packed, return_stats=True, dropout=dropout)[1].losses.view(tokens.shape)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_row_has_the_losses_that_it_has_in_any_cut_of_the_batch(name, packed):
    model = make(name)
    with torch.no_grad():
        whole = losses(model, packed=bounds(*BOUNDS) if packed else None, row=5)
        parts = [
            losses(model, slice(0, 1), bounds(0, 7, 24) if packed else None, row=5),
            losses(model, slice(1, 4), bounds(0, 6, 24, 48, 66, 72) if packed else None, row=6),
        ]
        assert torch.equal(torch.cat(parts), whole)
        assert not torch.equal(losses(model, packed=bounds(*BOUNDS) if packed else None, row=6), whole)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_seed_and_row_has_other_masks_and_without_dropout_there_are_none(name):
    model = make(name)
    with torch.no_grad():
        plain, first = losses(model), losses(model, step=3)
        assert torch.equal(losses(model, step=3), first) and torch.equal(losses(model), plain)
        for other in (losses(model, step=4), losses(model, step=3, seed=12), losses(model, step=3, row=4), plain):
            assert (other != first).float().mean() > 0.9
        tokens = text()
        logits = model(tokens, last_only=True)
    training = model.loss(tokens, tokens, dropout=dropout_at())
    training.backward()
    with torch.no_grad():
        assert torch.equal(model(tokens, last_only=True), logits) and torch.equal(losses(model), plain)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_backward_computes_again_draws_the_same_masks(name, dtype):
    found = []
    for recompute in RECOMPUTE:
        model = make(name)
        model.compute_dtype, model.recompute = dtype, recompute
        loss = model.loss(text(), text(), cu_seqlens=bounds(*BOUNDS), dropout=dropout_at())
        loss.backward()
        found.append([loss.detach(), *(each.grad for each in model.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("name", "packed"), [("qwen3", True), ("gpt2", False)])
def test_all_backends_draw_the_same_masks(name, packed):
    backends = ["torch", *(each for each in ("numba", "triton") if importlib.util.find_spec(each))]
    found = []
    for backend in backends:
        model = make(name)
        with runtime.use(backend=backend):
            loss = model.loss(text(), text(), cu_seqlens=bounds(*BOUNDS) if packed else None, dropout=dropout_at(rate=0.4))
            loss.backward()
        found.append([loss.detach(), *(each.grad for each in model.parameters())])
    for other in found[1:]:
        for expected, each in zip(found[0], other, strict=True):
            torch.testing.assert_close(each, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropout_is_where_gpt2_has_it(name, monkeypatch):
    """Of the embedding, of the probabilities of each layer's attention, and of what each branch adds to the residual stream: each by itself."""
    drawn = []
    for module, names in ((kernels, ("rms_norm_dropout", "layer_norm_dropout", "attention_dropout")),):
        for each in names:
            original = getattr(module, each)

            def recorded(*args, each=each, original=original, **options):
                place = next(arg for arg in args if type(arg) is int)
                drawn.append((each.partition("_")[0], place))
                return original(*args, **options)

            monkeypatch.setattr(module, each, recorded)
    model = make(name)
    model.loss(text(), text(), dropout=dropout_at())
    norm = "rms" if name == "llama" else "layer"
    heads = [1 << 20, (1 << 20) + 4]
    assert drawn == [(norm, 0), ("attention", heads[0]), (norm, 1), (norm, 2), ("attention", heads[1]), (norm, 3), (norm, 4)]
