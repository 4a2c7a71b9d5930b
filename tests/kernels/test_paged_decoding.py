"""Tokens of any sequences through a whole transformer in one call: the bits of the operations called one by one, in any company."""

import numpy as np
import pytest
import torch

from cllm import kernels, runtime
from cllm.kernels.decoding import make_paged_decoder
from cllm.kernels.paged_attention import PAGE
from cllm.kernels.quantization import quantize, quantize_rows
from cllm.kernels.quantized import quantized_feed_forward, quantized_matmul
from cllm.kernels.stack import Layer, Linear, Norm, Stack

matvec = pytest.importorskip("cllm.kernels.numba.matvec")

LLAMA = {"embed": 64, "heads": 6, "kv_heads": 2, "dim": 16, "hidden": 100, "activation": "silu", "rotary": True}
GPT2 = {"embed": 72, "heads": 3, "kv_heads": 3, "dim": 24, "hidden": 96, "activation": "gelu_tanh", "rotary": False}
KINDS = {
    "llama": LLAMA, "qk_norm_and_biases": LLAMA | {"qk_norm": True, "biases": True}, "window": LLAMA | {"window": 70, "ngrams": (30, 50)},
    "gpt2": GPT2,
}  # fmt: skip
POSITIONS, VOCABULARY = 400, 90


def make_stack(kind: str, dtype: torch.dtype, weights: str) -> Stack:
    about, generator = KINDS[kind], torch.Generator().manual_seed(3)
    embed, dim, kv, gpt2 = about["embed"], about["dim"], about["kv_heads"] * about["dim"], not about["rotary"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def linear(outputs: int, inputs: int, bias: bool) -> Linear:
        weight = normal(outputs, inputs) / inputs**0.5
        stored = quantize(weight) if weights == "int8" else weight.to(dtype) if weights == "same" else weight
        if gpt2 and weights != "int8":
            stored = stored.T.contiguous().T  # as GPT-2 keeps them
        return Linear(stored, normal(outputs) if bias else None)

    def norm(size: int) -> Norm:
        return Norm(1 + normal(size) / 10, normal(size) / 10 if gpt2 else None)

    def layer() -> Layer:
        some = gpt2 or "biases" in about
        q, k, v = (linear(size, embed, some) for size in (about["heads"] * dim, kv, kv))
        of_heads = [Norm(1 + normal(dim) / 10) if "qk_norm" in about else None for _ in range(2)]
        return Layer(
            norm(embed), q, k, v, linear(embed, about["heads"] * dim, gpt2), norm(embed), None if gpt2 else linear(about["hidden"], embed, False),
            linear(about["hidden"], embed, gpt2), linear(embed, about["hidden"], gpt2), *of_heads,
        )  # fmt: skip

    angles = torch.arange(POSITIONS).unsqueeze(1) * 10_000 ** -(torch.arange(dim // 2) / (dim // 2))
    tables = (angles.cos(), angles.sin()) if about["rotary"] else None
    layers = [layer(), layer()]
    final, output = norm(embed), linear(VOCABULARY, embed, False)
    embeddings = [normal(size, embed).to(dtype if weights == "same" else torch.float32) for size in (VOCABULARY, POSITIONS)]
    of_positions = embeddings[1] if gpt2 else None
    of_ngrams = [normal(rows, embed).to(dtype if weights == "same" else torch.float32) for rows in about.get("ngrams", ())]
    return Stack(layers, final, output, dim, about["activation"], 1e-5, tables, about.get("window", 0), embeddings[0], of_positions, of_ngrams)


def one_by_one(stack, dtype, pools, *given):
    """What a decoder does, with the operations of this package. pools: `Sequences`, to store into."""
    tokens, positions, slots, pages = map(torch.tensor, given[:4])
    pages = pages.int()
    x = kernels.embedding(tokens, stack.embedding, dtype)
    if stack.position_embedding is not None:
        x = x + kernels.embedding(positions, stack.position_embedding, dtype)
    for rows, table in zip(given[4], stack.ngram_embeddings, strict=True):
        x = x + kernels.embedding(torch.tensor(rows), table, dtype) / 4

    def product(x, linear):
        if isinstance(linear.weight, torch.Tensor):
            return kernels.matmul(x, linear.weight.T, linear.bias)
        return quantized_matmul(x, linear.weight, linear.bias)

    def norm(x, h, weights):
        if weights.bias is None:
            return kernels.rms_norm(x, weights.weight, stack.eps, residual=h)
        return kernels.layer_norm(x, weights.weight, weights.bias, stack.eps, residual=h)

    def of_heads(x, weights):
        x = x.view(len(x), -1, stack.head_dim)
        if stack.rotary is None:
            return x
        repeated = None if weights is None else weights.weight.expand(x.shape[1], -1)
        return kernels.rotary(x[None], *stack.rotary, positions, repeated, stack.eps)[0]

    h = torch.zeros_like(x)
    for layer, k_pool, v_pool, scales in zip(stack.layers, pools.keys, pools.values, pools.scales or [None] * len(stack.layers)):
        y, h = norm(x, h, layer.attention_norm)
        q, k = of_heads(product(y, layer.q), layer.q_norm), of_heads(product(y, layer.k), layer.k_norm)
        v = product(y, layer.v).view(k.shape)
        if scales is not None:
            (k, of_k), (v, of_v) = quantize_rows(k), quantize_rows(v)
            scales[0].flatten(0, 1)[slots], scales[1].flatten(0, 1)[slots] = of_k, of_v
        k_pool.flatten(0, 1)[slots], v_pool.flatten(0, 1)[slots] = k, v
        mixed = kernels.paged_attention(
            q, k_pool, v_pool, pages, positions + 1, torch.ones_like(positions), window=stack.window or None, scales=scales
        )
        y, h = norm(product(mixed.flatten(1), layer.out), h, layer.mlp_norm)
        forward = kernels.feed_forward if isinstance(layer.up.weight, torch.Tensor) else quantized_feed_forward
        gate = None if layer.gate is None else layer.gate.weight
        biases = {"b_up": layer.up.bias, "b_down": layer.down.bias}
        x = forward(y, gate, layer.up.weight, layer.down.weight, activation=stack.activation, **biases)
    return product(norm(x, h, stack.norm)[0], stack.output)


class Sequences:
    """Three sequences of one pool, which hold `HELD` tokens each; the first two share a page."""

    HELD = (PAGE - 5, PAGE, 2 * PAGE - 3)
    PAGES = torch.tensor([[5, 0, 3], [5, 2, -9], [6, 1, 4]], dtype=torch.int32)

    def __init__(self, stack: Stack, dtype: torch.dtype, in_int8: bool = False):
        shape = (7, PAGE, stack.layers[0].k.weight.shape[0] // stack.head_dim, stack.head_dim)
        generator = torch.Generator().manual_seed(4)
        self.text = torch.randint(VOCABULARY, (3, 2 * PAGE + 20), generator=generator)
        self.ngram_rows = [torch.randint(len(table), self.text.shape, generator=generator) for table in stack.ngram_embeddings]
        self.keys, self.values = ([torch.full(shape, float("nan"), dtype=dtype) for _ in stack.layers] for _ in range(2))
        for pool in (*self.keys, *self.values):
            for held, row in zip(self.HELD, self.PAGES.tolist()):
                for begin in range(0, held, PAGE):
                    part = pool[row[begin // PAGE], : held - begin]
                    part.copy_(torch.randn(part.shape, generator=generator))
        self.scales = None
        if in_int8:
            (self.keys, of_keys), (self.values, of_values) = (zip(*map(quantize_rows, pools)) for pools in (self.keys, self.values))
            self.scales = list(zip(of_keys, of_values))

    def tokens(self, places: list[tuple[int, int]]):
        """Tokens, positions, slots, pages and rows of n-grams of these (sequence, position)."""
        sequence, position = torch.tensor(places).unbind(1)
        pages = self.PAGES[sequence]
        page = pages.gather(1, (position // PAGE).unsqueeze(1))[:, 0]
        given = (self.text[sequence, position], position, page * PAGE + position % PAGE, pages)
        return (*(each.tolist() for each in given), [rows[sequence, position].tolist() for rows in self.ngram_rows])


def calls() -> list[list[tuple[int, int]]]:
    """The tokens of each call: of one sequence and of several, any number of them, over the end of a page."""
    first, second, third = ([(each, held + i) for i in range(20)] for each, held in enumerate(Sequences.HELD))
    several = [*first[1:5], *third[:1], *first[5:8], *third[1:20], *first[8:14]]
    return [first[:1], second[:2], several[: matvec.MOST_ROWS], [(0, PAGE - 6), (1, PAGE + 2), *second[3:6]], second[6:7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["master", "same", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_get_the_bits_of_the_operations_called_one_by_one(kind, weights, dtype):
    stack = make_stack(kind, dtype, weights)
    for threads in (1, 3):
        with runtime.use(threads=threads):
            ours, other = Sequences(stack, dtype), Sequences(stack, dtype)
            decoder = make_paged_decoder(stack, ours.keys, ours.values, dtype, matvec.MOST_ROWS)
            assert decoder is not None and decoder.most_tokens == matvec.MOST_ROWS
            for places in calls():
                found = decoder(*ours.tokens(places))
                expected = one_by_one(stack, dtype, other, *other.tokens(places))
                assert found.dtype == dtype and expected.isfinite().all() and torch.equal(found, expected), (threads, places)
            for pools in ((ours.keys, other.keys), (ours.values, other.values)):
                assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(*pools))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["qk_norm_and_biases", "window", "gpt2"])
def test_so_do_tokens_over_a_pool_of_int8_which_holds_the_same(kind, dtype):
    stack = make_stack(kind, dtype, "master")
    ours, other = Sequences(stack, dtype, in_int8=True), Sequences(stack, dtype, in_int8=True)
    decoder = make_paged_decoder(stack, ours.keys, ours.values, dtype, matvec.MOST_ROWS, ours.scales)
    for places in calls():
        expected = one_by_one(stack, dtype, other, *other.tokens(places))
        assert expected.isfinite().all() and torch.equal(decoder(*ours.tokens(places)), expected), places
    assert all(map(torch.equal, (*ours.keys, *ours.values), (*other.keys, *other.values)))
    for pairs in zip(ours.scales, other.scales):
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(*pairs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_token_has_the_same_bits_in_any_company(dtype):
    stack = make_stack("qk_norm_and_biases", dtype, "same")
    together, alone = Sequences(stack, dtype), Sequences(stack, dtype)
    first, second = (make_paged_decoder(stack, each.keys, each.values, dtype, 999) for each in (together, alone))
    kept = []
    for places in calls():
        whole = first(*together.tokens(places))
        kept.append((whole, whole.clone()))
        for place, row in zip(places, whole):
            assert torch.equal(second(*alone.tokens([place]))[0], row), place
    assert all(torch.equal(whole, copy) for whole, copy in kept), "a later call changed what an earlier one returned"


def test_no_decoder_where_no_backend_offers_one():
    stack = make_stack("llama", torch.float32, "master")
    sequences = Sequences(stack, torch.float64)
    assert make_paged_decoder(stack, sequences.keys, sequences.values, torch.float64, 4) is None
    with runtime.use(backend="torch"):
        sequences = Sequences(stack, torch.float32)
        assert make_paged_decoder(stack, sequences.keys, sequences.values, torch.float32, 4) is None


def test_numbers_that_lead_out_of_memory_are_refused():
    stack = make_stack("window", torch.float32, "master")
    sequences = Sequences(stack, torch.float32)
    decoder = make_paged_decoder(stack, sequences.keys, sequences.values, torch.float32, 4)
    *given, ngram_rows = map(np.array, sequences.tokens([(0, 0), (2, 0)]))
    decoder(*given, ngram_rows)
    tokens, positions, slots, pages = given
    wrong = [
        (tokens - VOCABULARY, positions, slots, pages),
        (tokens + VOCABULARY, positions, slots, pages),
        (tokens, positions - 1, slots, pages),
        (tokens, positions + 3 * PAGE, slots, pages),
        (tokens, positions, slots - 5 * PAGE - 1, pages),
        (tokens, positions, slots + 7 * PAGE, pages),
        (tokens, positions, slots, pages + 1),
        (tokens, positions, slots, pages - 6),
        (tokens[:1], positions, slots, pages),
        (tokens, positions[:1], slots, pages),
        (tokens, positions, slots[:1], pages),
        (tokens, positions, slots, pages[:1]),
        tuple(np.concatenate([each] * 3) for each in given),
    ]
    for arguments in wrong:
        with pytest.raises(AssertionError):
            decoder(*arguments, ngram_rows[:, [0, 1, 0, 1, 0, 1][: len(arguments[0])]])
    for rows in (ngram_rows - 50, ngram_rows + [[0], [50]], ngram_rows[:1]):
        with pytest.raises(AssertionError):
            decoder(*given, rows)
