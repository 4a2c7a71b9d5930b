"""What dropout draws: the generator against its authors' numbers, the masks of every backend against the definition, and their statistics."""

import itertools

import numpy as np
import pytest
import torch
from cllm_kernel_oracle import device  # loaded by conftest.py under this name

from cllm import kernels, runtime
from cllm.kernels import philox
from cllm.runtime.errors import UserError

# counter, key and words of philox4x32_R(10), from the known answers of Random123 (Salmon et al. 2011)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_generator_gives_the_published_words(counter, key, words, oracle):
    found = philox.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, found)) == words
    if counter[0] < 16:  # the oracle of the tests numbers elements, not calls
        draws = oracle.drawn(key[0] | key[1] << 32, counter[3], counter[2], counter[1], counter[0] + 16 * np.arange(8))
        assert [int(low) | int(high) << 16 for low, high in zip(draws[::2], draws[1::2])] == list(words)


@pytest.mark.parametrize(("rate", "threshold"), [(0.5, 32768), (0.1, 6554), (1e-9, 1), (1 - 1e-9, 65535)])
def test_the_expected_value_of_an_element_stays_what_it_was(rate, threshold):
    assert philox.threshold_of(rate) == threshold
    assert (1 - threshold / 65536) * philox.scale_of(rate) == 1.0


@pytest.mark.parametrize("columns", [5, 16, 64, 130, 256, 700])
def test_elements_of_a_branch_are_kept_by_the_definition(columns, backend_name, oracle, serve):
    serve(backend_name, "norm_dropout")
    x, weight = (torch.ones(size, device=device()) for size in ((19, columns), (columns,)))
    _, h = kernels.rms_norm_dropout(x, weight, oracle.dropout_at(oracle.Inputs(torch.float32, torch.float32), 0.3), 12)
    assert torch.equal(h.cpu(), oracle.dropout_factors(0.3, 12, np.arange(19)[:, None], np.arange(columns)).float())


def test_a_row_longer_than_registers_is_kept_by_the_definition(oracle, serve):
    serve("triton", "norm_dropout")
    columns = 20_000
    x, weight = (torch.ones(size, device=device()) for size in ((2, columns), (columns,)))
    x.requires_grad_()
    _, h = kernels.rms_norm_dropout(x, weight, oracle.dropout_at(oracle.Inputs(torch.float32, torch.float32), 0.3), 2**20 + 5)
    expected = oracle.dropout_factors(0.3, 2**20 + 5, np.arange(2)[:, None], np.arange(columns)).float()
    assert torch.equal(h.detach().cpu(), expected)
    oracle.backward([h], [torch.ones_like(h)])
    assert torch.equal(x.grad.cpu(), expected)


@pytest.mark.parametrize(
    ("rows", "tokens", "documents", "period", "dtype"),
    [
        (1, 200, None, 0, torch.float32),
        (1, 200, None, 0, torch.bfloat16),
        (2, 70, None, 0, torch.float32),
        (1, 200, [0, 70, 110, 200], 0, torch.float32),
        (1, 200, [0, 30, 100, 130, 200], 100, torch.bfloat16),
        (1, 200, [0, 128, 131, 200], 128, torch.float32),
    ],
)
def test_probabilities_are_kept_by_the_definition(rows, tokens, documents, period, dtype, backend_name, oracle, serve):
    """Of equal scores, and with values that are the columns of an identity, the output shows which are kept, and so does the values' gradient."""
    serve(backend_name, "attention_dropout")
    width = 32 if backend_name == "triton" else min(128, tokens)  # the interpreter of Triton's kernels takes its time
    q, k = (torch.zeros(rows, tokens, 2, width, dtype=dtype, device=device()) for _ in range(2))
    bounds = None if documents is None else torch.tensor(documents, dtype=torch.int32, device=device())
    dropout = oracle.dropout_at(oracle.Inputs(dtype, dtype), 0.25)
    seen = oracle.visible_keys(tokens, tokens, True, None, bounds)
    factors = oracle.attention_factors(q, k, 0.25, 7, bounds, period).cpu() * seen
    for shown in (slice(0, width), slice(tokens - width, tokens)):  # the keys whose values the columns are
        columns = torch.eye(tokens, dtype=dtype, device=device())[:, shown].view(1, tokens, 1, width)
        v = columns.repeat(rows, 1, 2, 1).requires_grad_()
        out = kernels.attention_dropout(q, k, v, dropout, 7, causal=True, cu_seqlens=bounds, period=period)
        found = out.detach().transpose(1, 2).cpu().double()
        assert torch.equal(found > 0, factors[..., shown] > 0)
        torch.testing.assert_close(found, (factors / seen.sum(-1, keepdim=True))[..., shown], rtol=1e-2, atol=0)
        oracle.backward([out], [columns.expand_as(out)])
        assert torch.equal(v.grad.transpose(1, 2).cpu() > 0, factors.transpose(-1, -2)[..., shown] > 0)


def test_rows_keep_the_same_wherever_a_batch_is_cut(backend_name, oracle, serve):
    """Rows that are laid end to end, cut into documents: three of them at once, and the last two by themselves."""
    serve(backend_name, "attention_dropout")
    i = oracle.Inputs(torch.float32, torch.float32)
    q, k, v = (i.normal(1, 3 * 40, 2, 16) for _ in range(3))
    dropout = kernels.Dropout.of(0.3, 5, i.device)
    dropout.go_to(3, 7 * 40)
    whole = kernels.attention_dropout(q, k, v, dropout, 9, causal=True, cu_seqlens=_bounds([0, 9, 40, 70, 80, 120]), period=40)
    dropout.go_to(3, 8 * 40)
    part = kernels.attention_dropout(*(each[:, 40:] for each in (q, k, v)), dropout, 9, causal=True, cu_seqlens=_bounds([0, 30, 40, 80]), period=40)
    torch.testing.assert_close(part, whole[:, 40:])
    if backend_name == "numba":
        assert torch.equal(part, whole[:, 40:])


def _bounds(numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=device())


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_masks_have_their_rate_and_nothing_to_do_with_each_other(rate):
    """By the normal approximation, within five standard deviations: the rate over all elements, over each row and column, and how often two masks
    drop the same, for masks of other steps, places, seeds and tokens, and for the mask moved by a few elements."""
    token, element = torch.arange(256).unsqueeze(1), torch.arange(1024)

    def mask(seed=3, step=0, place=0, token=token):
        return ~philox.kept(torch.tensor([seed, step, 0]), rate, place, token, element)

    def plausible(counts, size, expected):
        spread = (size * expected * (1 - expected)) ** 0.5
        assert (counts - size * expected).abs().max() < 5 * spread, (counts, size * expected, spread)

    base = mask()
    plausible(base.sum(), base.numel(), rate)
    plausible(base.sum(0), 256, rate)
    plausible(base.sum(1), 1024, rate)
    others = [mask(seed=4), mask(seed=3 + 2**32), mask(step=1), mask(place=1), mask(place=1 << 20), mask(token=token + 256)]
    for first, second in itertools.combinations([base, *others], 2):
        plausible((first & second).sum(), base.numel(), rate * rate)
    for moved in (1, 2, 8, 16, 17, 128):
        plausible((base[:, moved:] & base[:, :-moved]).sum(), 256 * (1024 - moved), rate * rate)
        plausible((base[moved:] & base[:-moved]).sum(), (256 - moved) * 1024, rate * rate)


def test_a_gradient_is_that_of_the_mask_that_was_drawn(oracle):
    """Also where the key has gone on to another step for another graph, as long as it did so in a copy."""
    i = oracle.Inputs(torch.float32, torch.float32)
    x, weight = i.normal(7, 40).requires_grad_(), i.normal(40)
    for step in (0, 1):
        dropout = oracle.dropout_at(i, 0.5)
        dropout.go_to(step, 0)
        _, h = kernels.rms_norm_dropout(x, weight, dropout, 0)
        (gradient,) = torch.autograd.grad(h, x, torch.ones_like(h))
        assert torch.equal(gradient != 0, h != 0) and set(gradient.unique().tolist()) == {0.0, 2.0}


def test_a_key_that_has_gone_on_before_the_backward_is_an_error(oracle):
    i = oracle.Inputs(torch.float32, torch.float32)
    dropout = oracle.dropout_at(i, 0.5)
    _, h = kernels.rms_norm_dropout(i.normal(7, 40).requires_grad_(), i.normal(40), dropout, 0)
    dropout.go_to(5, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_a_rate_must_leave_something_and_drop_something(rate):
    with pytest.raises(UserError, match=r"dropout must be within \(0, 1\)"):
        kernels.Dropout.of(rate, 0)


def test_backends_that_cannot_drop_are_named_with_the_reason():
    said = str(runtime.explain("attention_dropout", (1, 1024, 8, 64), dtype="bfloat16", device="cuda"))
    assert said.startswith("attention_dropout on cuda: triton")
    assert "not sdpa: it has no kernel for attention_dropout" in said and "not gluon: " in said
    said = str(runtime.explain("attention_dropout", (1, 1024, 8, 256), dtype="bfloat16", device="cuda"))
    assert said.startswith("attention_dropout on cuda: torch") and "not triton: with dropout its kernels take heads of up to 128, not 256" in said
