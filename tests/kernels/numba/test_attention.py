"""The numba attention kernel: against the float64 oracle, and the bits that no worker, batch or cache may change."""

import pytest
import torch

from cllm import runtime
from cllm.kernels.numba import attention as cpu
from cllm.kernels.numba import attention_backward
from cllm.kernels.torch import attention as reference

DTYPES = [torch.float32, torch.bfloat16]
WORKERS = (1, 2, 3, 64)

# name: (B, T, S, H, Hkv, D), options (causal, window, softcap), document bounds
CASES = {
    "several_tiles_and_blocks": ((1, 150, 150, 2, 2, 64), (True, 0, 0.0), None),
    "grouped_window_and_longer_keys": ((2, 37, 75, 6, 2, 20), (True, 9, 0.0), None),
    "one_query_softcap": ((2, 1, 70, 6, 2, 40), (True, 0, 2.0), None),
    "not_causal_window": ((1, 70, 70, 2, 1, 33), (False, 12, 0.0), None),
    "more_queries_than_keys": ((1, 30, 7, 2, 2, 32), (True, 0, 0.0), None),
    "documents": ((1, 150, 150, 4, 2, 32), (True, 0, 0.0), [0, 3, 3, 80, 150]),
    "documents_softcap_window": ((1, 90, 90, 2, 2, 16), (True, 20, 3.0), [0, 1, 90]),
    "head_of_one": ((1, 9, 9, 2, 2, 1), (True, 0, 0.0), None),
    "head_of_256": ((1, 20, 20, 2, 1, 256), (True, 0, 0.0), None),
}


def make(shape, dtype, seed=0):
    batch, queries, keys, heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim), (batch, queries, heads, dim)]
    q, k, v, dout = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return q, k, v, dout, torch.randn(batch, heads, queries, generator=generator)


def options_of(shape, options, bounds):
    causal, window, softcap = options
    return causal, shape[-1] ** -0.5, window, softcap, None if bounds is None else torch.tensor(bounds, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_follow_the_float64_oracle(name, dtype, oracle):
    shape, options, bounds = CASES[name]
    q, k, v, dout, dlse = make(shape, dtype)
    call = options_of(shape, options, bounds)
    wide = [x.double() for x in (q, k, v)]
    exact_out, exact_lse = reference.forward(*wide, *call)
    seen = torch.isfinite(exact_lse)
    dlse = torch.where(seen, dlse, 0.0)  # what the gradient of -inf would be is nobody's business
    exact = reference.backward(dout.double(), dlse.double(), *wide, exact_out, exact_lse, *call)

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    causal, window, softcap = options
    plain_out, plain_lse = oracle.plain_attention(
        *leaves, causal=causal, window=window or None, softcap=softcap or None, cu_seqlens=call[-1], return_lse=True
    )
    if seen.all():  # plain torch makes NaN of a row that sees nothing
        plain = torch.autograd.grad((plain_out, plain_lse), leaves, (dout, dlse))
    else:
        plain = [x.to(dtype) for x in exact]
        plain_out = exact_out.to(dtype)

    out, lse = cpu.forward(q, k, v, *call)
    oracle.check_rule("out", out, plain_out, exact_out)
    oracle.check_rule("lse", lse, plain_lse, exact_lse)
    found = cpu.backward(dout, dlse, q, k, v, out, lse, *call)
    for what, ours, theirs, true in zip(("dq", "dk", "dv"), found, plain, exact):
        oracle.check_rule(what, ours, theirs, true, slack=2.0, float32_slack=8.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["grouped_window_and_longer_keys", "documents"])
def test_any_number_of_workers_gives_the_same_bits(name, dtype):
    shape, options, bounds = CASES[name]
    q, k, v, dout, dlse = make(shape, dtype)
    call = options_of(shape, options, bounds)
    results = []
    for workers in WORKERS:
        with runtime.use(threads=workers):
            out, lse = cpu.forward(q, k, v, *call)
            results.append((out, lse, *cpu.backward(dout, dlse, q, k, v, out, lse, *call)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_backward_cut_by_heads_and_by_blocks_gives_the_same_bits(monkeypatch):
    shape = (1, 150, 170, 4, 2, 24)
    q, k, v, dout, dlse = make(shape, torch.float32)
    call = options_of(shape, (True, 40, 0.0), None)
    out, lse = cpu.forward(q, k, v, *call)
    with runtime.use(threads=1):
        together = cpu.backward(dout, dlse, q, k, v, out, lse, *call)
        monkeypatch.setattr(attention_backward, "MAX_GATHERED_BYTES", 0)
        apart = cpu.backward(dout, dlse, q, k, v, out, lse, *call)
    assert all(torch.equal(a, b) for a, b in zip(together, apart))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 50])
def test_a_row_has_the_same_bits_in_prefill_chunks_and_decoding(dtype, window):
    tokens, shape = 140, (2, 140, 140, 4, 2, 40)
    q, k, v, _, _ = make(shape, dtype)
    out, lse = cpu.forward(q, k, v, True, 0.2, window, 0.0, None)
    for t in (0, 1, 47, 48, 63, 64, 65, 128, 139):
        row, row_lse = cpu.forward(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], True, 0.2, window, 0.0, None)
        assert torch.equal(row, out[:, t : t + 1]) and torch.equal(row_lse, lse[:, :, t : t + 1])
    chunk, _ = cpu.forward(q[:, 90:], k, v, True, 0.2, window, 0.0, None)
    assert torch.equal(chunk, out[:, 90:])
    alone, _ = cpu.forward(q[1:, :, 2:], k[1:, :, 1:], v[1:, :, 1:], True, 0.2, window, 0.0, None)
    assert torch.equal(alone, out[1:, :, 2:])
    bounds = torch.tensor([0, 3, tokens, tokens + 21], dtype=torch.int32)
    before, after = [torch.randn(1, 3, x.shape[2], 40).to(dtype) for x in (q, k, v)], make((1, 18, 18, 4, 2, 40), dtype, seed=1)
    packed = [torch.cat((b, x[:1, 3:], a, x[:1, :3]), 1) for b, x, a in zip(before, (q, k, v), after)]
    document = [x[:, 3:tokens] for x in packed]
    in_document, _ = cpu.forward(*packed, True, 0.2, window, 0.0, bounds)
    by_itself, _ = cpu.forward(*document, True, 0.2, window, 0.0, None)
    assert torch.equal(in_document[:, 3:tokens], by_itself)


def test_strided_views_give_the_bits_of_their_copies():
    fused = torch.randn(2, 30, 3, 4, 48)[..., 3:35]
    q, k, v = fused.unbind(2)
    dout = torch.randn(2, 4, 30, 32).transpose(1, 2)
    call = (True, 0.2, 0, 0.0, None)
    views, copies = (q, k, v, dout), [x.contiguous() for x in (q, k, v, dout)]
    for a, b in ((views, copies), ([x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2) for x in views], copies)):
        results = []
        for q, k, v, dout in (a, b):
            out, lse = cpu.forward(q, k, v, *call)
            results.append((out, *cpu.backward(dout, None, q, k, v, out, lse, *call)))
        assert all(torch.equal(x, y) for x, y in zip(*results))


def test_nan_and_infinity_reach_every_row_that_sees_them_and_no_row_before():
    q, k, v, _, _ = make((1, 100, 100, 1, 1, 16), torch.float32)
    k[0, 70, 0, 3] = float("nan")
    out, lse = cpu.forward(q, k, v, True, 0.25, 0, 0.0, None)
    assert torch.isnan(out[0, 70:]).all() and torch.isnan(lse[0, 0, 70:]).all()
    assert torch.isfinite(out[0, :70]).all()
    k[0, 70, 0, 3] = float("inf")
    out, _ = cpu.forward(q, k, v, True, 0.25, 0, 0.0, None)
    assert torch.isfinite(out[0, :70]).all()
    assert torch.isnan(out[0, 70:][q[0, 70:, 0, 3] > 0]).all()


def test_large_scores_neither_overflow_nor_lose_the_winner():
    q, k, v, _, _ = make((1, 64, 64, 1, 1, 16), torch.float32)
    out, lse = cpu.forward(q * 1e4, k * 1e4, v, False, 1.0, 0, 0.0, None)
    winner = (q[0, :, 0].double() @ k[0, :, 0].double().T).argmax(-1)
    torch.testing.assert_close(out[0, :, 0], v[0, winner, 0])
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale, dtype, oracle):
    q, k, v, dout, _ = make((1, 70, 70, 2, 1, 24), dtype)
    wide = [x.double() for x in (q, k, v)]
    call = (True, scale, 30, 0.0, None)
    exact = reference.forward(*wide, *call)
    out, lse = cpu.forward(q, k, v, *call)
    plain = reference.forward(q, k, v, *call)
    oracle.check_rule("out", out, plain[0], exact[0])
    gradients = cpu.backward(dout, None, q, k, v, out, lse, *call)
    plain_gradients = reference.backward(dout, None, q, k, v, *plain, *call)
    for ours, theirs, true in zip(gradients, plain_gradients, reference.backward(dout.double(), None, *wide, *exact, *call)):
        oracle.check_rule("gradient", ours, theirs, true, slack=2.0, float32_slack=8.0)


def test_no_tokens_and_no_keys():
    empty = torch.zeros(1, 0, 2, 8)
    out, lse = cpu.forward(empty, empty, empty, True, 1.0, 0, 0.0, None)
    assert out.shape == (1, 0, 2, 8) and lse.shape == (1, 2, 0)
    q = torch.randn(1, 3, 2, 8)
    out, lse = cpu.forward(q, empty, empty, False, 1.0, 0, 0.0, None)
    assert torch.equal(out, torch.zeros_like(q)) and (lse == -torch.inf).all()
    dq, dk, dv = cpu.backward(torch.ones_like(q), None, q, empty, empty, out, lse, False, 1.0, 0, 0.0, None)
    assert torch.equal(dq, torch.zeros_like(q)) and dk.shape == dv.shape == empty.shape


def test_bfloat16_without_tile_instructions_follows_the_oracle(monkeypatch, oracle):
    monkeypatch.setenv("CLLM_BF16_KERNEL", "widened")
    q, k, v, _, _ = make((1, 100, 100, 4, 2, 40), torch.bfloat16)
    call = (True, 0.2, 0, 0.0, None)
    exact, _ = reference.forward(*[x.double() for x in (q, k, v)], *call)
    out, _ = cpu.forward(q, k, v, *call)
    oracle.check_rule("out", out, reference.forward(q, k, v, *call)[0], exact)
    row, _ = cpu.forward(q[:, 70:71], k[:, :71], v[:, :71], *call)
    assert torch.equal(row, out[:, 70:71])
