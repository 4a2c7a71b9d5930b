"""The Triton attention kernels beyond the shared cases: several blocks, head sizes, fp16, documents and windows across blocks, decoding, grids."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from cllm_kernel_oracle import device  # loaded by conftest.py under this name

pytest.importorskip("triton")

from cllm import kernels, runtime
from cllm.runtime import gpu


@pytest.fixture(autouse=True)
def triton_kernels(serve):
    serve("triton", "attention")


def check(oracle, dtype, shape, slack=2.0, **options):
    """q (B, T, H, D), k and v (B, S, Hkv, D): out, log-sum-exp and all gradients against the float64 oracle, by the rule."""
    batch, queries, keys, heads, kv_heads, dim = shape
    case = oracle.attention_case("here", oracle.qkv(batch, queries, keys, heads, kv_heads, dim), return_lse=True, **options)
    exact, plain = oracle.exact_and_plain(case, dtype)
    ours = oracle.run(case, case.ours, dtype, dtype)
    for name, expected in exact.items():
        oracle.check_rule(f"{name} {dtype} {shape} {options}", ours[name], plain[name], expected, slack, 8.0 if name.startswith("d_") else 0.0)


@pytest.mark.parametrize("dim", [16, 80, 96, 128, 200, 256])
def test_head_sizes(oracle, dim):
    check(oracle, torch.bfloat16, (1, 70, 70, 2, 1, dim), causal=True)


@pytest.mark.parametrize(("dim", "options"), [(256, {"causal": True}), (200, {"causal": True, "softcap": 5.0, "window": 40})])
def test_large_heads_whose_gradients_are_made_in_halves(oracle, dim, options):
    with nullcontext() if torch.cuda.is_available() else gpu.described(gpu.DESCRIBED["h200"]):
        check(oracle, torch.bfloat16, (1, 70, 90, 2, 1, dim), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_several_blocks_of_queries_and_keys(oracle, dtype):
    check(oracle, dtype, (1, 200, 300, 2, 1, 32), causal=True)


def test_documents_across_blocks(oracle):
    bounds = torch.tensor([0, 3, 130, 131, 131, 260], dtype=torch.int32, device=device())
    check(oracle, torch.float32, (1, 260, 260, 2, 1, 32), causal=True, cu_seqlens=bounds)
    check(oracle, torch.float32, (1, 260, 260, 1, 1, 32), cu_seqlens=bounds)


@pytest.mark.parametrize("window", [1, 64, 65, 199, 500])
def test_windows_at_and_across_the_edges_of_blocks(oracle, window):
    check(oracle, torch.float32, (1, 200, 200, 1, 1, 16), causal=True, window=window)


def test_a_negative_scale_and_a_scale_of_nothing(oracle):
    check(oracle, torch.float32, (1, 40, 40, 2, 2, 16), causal=True, scale=-0.5)
    check(oracle, torch.float32, (1, 40, 40, 2, 2, 16), scale=-0.2, softcap=3.0)
    check(oracle, torch.float32, (1, 40, 40, 2, 2, 16), causal=True, scale=0.0)


@pytest.mark.parametrize("queries", [1, 4])
def test_decoding_splits_the_keys_and_joins_them_in_order(oracle, queries):
    from cllm.kernels.triton import attention

    check(oracle, torch.float32, (1, queries, 3 * attention.SECTION + 40, 3, 1, 16), causal=True)
    keys = attention.SECTION + 40
    check(oracle, torch.float32, (2, queries, keys, 4, 2, 32), causal=True)
    check(oracle, torch.bfloat16, (1, queries, keys, 2, 2, 32), causal=True, window=700)
    check(oracle, torch.float32, (1, queries, keys, 2, 1, 32), causal=True, softcap=2.0)


def test_gradients_that_are_expanded_or_strided(oracle):
    i = oracle.Inputs(torch.float32, torch.float32)
    q, k, v = (i.normal(1, 30, 2, 16).requires_grad_() for _ in range(3))
    out = kernels.attention(q, k, v, causal=True)
    expanded = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    whole = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    strided = torch.autograd.grad(out, (q, k, v), torch.ones(1, 30, 16, 2, device=device()).transpose(2, 3))
    for a, b, c in zip(expanded, whole, strided):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_the_size_of_the_gpu_changes_no_bit(oracle):
    i = oracle.Inputs(torch.bfloat16, torch.bfloat16)
    q, k, v = i.normal(1, 150, 4, 32), i.normal(1, 150, 2, 32), i.normal(1, 150, 2, 32)
    found = []
    for num_sms in (1, 3, 1000):
        with gpu.described(dataclasses.replace(gpu.gpu_of(q.device), num_sms=num_sms)):
            leaves = [each.clone().requires_grad_() for each in (q, k, v)]
            out = kernels.attention(*leaves, causal=True)
            found.append([out.detach(), *torch.autograd.grad(out, leaves, out.detach())])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again))


# -- torch's own kernels, where the plan chooses them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"causal": True}, {}, {"causal": True, "window": 5}, {"softcap": 3.0}, {"causal": True, "return_lse": True}])
@pytest.mark.parametrize("grad", [False, True])
def test_the_library_backend_does_what_it_can_and_leaves_the_rest_to_triton(options, grad):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 12, heads, 16, generator=generator, device="cpu").to(device()).requires_grad_(grad) for heads in (4, 2, 2))
    found, gradients = [], []
    for backend, deterministic in (("torch", True), ("sdpa", True), ("sdpa", False)):
        with runtime.use(backend=backend, deterministic=deterministic):
            out = kernels.attention(q, k, v, **options)
            out = out[0] if isinstance(out, tuple) else out
            by_torch = out.grad_fn is not None and "cllm" not in type(out.grad_fn).__name__.lower()
            if grad:
                gradients.append(torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))
        found.append(out.detach())
        if grad and backend == "sdpa":  # a backward that adds in no fixed order is taken only where that is allowed
            assert by_torch == (not deterministic and set(options) <= {"causal"})
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], atol=1e-5, rtol=1e-5)
    for each in gradients[1:]:
        for ours, theirs in zip(each, gradients[0]):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_library_backend_says_why_it_cannot_serve():
    from cllm.kernels.sdpa.attention import can_serve

    q, k = torch.ones(1, 4, 2, 8, device=device()), torch.ones(1, 6, 2, 8, device=device())
    assert can_serve(q, q, q, True, 0, 0.0, None, True)[0]
    assert "diagonal" in can_serve(q, k, k, True, 0, 0.0, None, True)[1] and can_serve(q, k, k, False, 0, 0.0, None, True)[0]
    assert "window" in can_serve(q, q, q, True, 3, 0.0, None, True)[1]
    wants = q.clone().requires_grad_()
    assert "fixed order" in can_serve(wants, q, q, True, 0, 0.0, None, True)[1] and can_serve(wants, q, q, True, 0, 0.0, None, False)[0]


def test_what_torch_cannot_do_is_done_by_the_fastest_of_our_own(monkeypatch, tmp_path):
    from cllm.kernels.gluon import attention as gluon
    from cllm.kernels.sdpa.attention import _instead
    from cllm.kernels.triton import attention as triton
    from cllm.runtime import choice

    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path))
    q = SimpleNamespace(shape=(1, 64, 4, 64), dtype=torch.bfloat16, device=torch.device("cuda"))  # a GPU need not be there to be planned for
    single = SimpleNamespace(shape=q.shape, dtype=torch.float32, device=q.device)
    with gpu.described(gpu.DESCRIBED["h200"]):
        assert _instead(q, q) is triton  # nothing was measured
        choice.record("attention", "cuda", "bfloat16", (q.shape, q.shape), {"sdpa": 1.0, "gluon": 2.0, "triton": 3.0})
        choice.record("attention", "cuda", "float32", (q.shape, q.shape), {"sdpa": 1.0, "gluon": 2.0, "triton": 3.0})
        assert _instead(q, q) is gluon and _instead(single, single) is triton
        choice.record("attention", "cuda", "bfloat16", (q.shape, q.shape), {"sdpa": 1.0, "gluon": 4.0, "triton": 3.0})
        assert _instead(q, q) is triton
