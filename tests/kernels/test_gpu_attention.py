"""The Triton attention kernels beyond the shared cases: several blocks, head sizes, fp16, documents and windows across blocks, decoding, grids."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from cllm import kernels, runtime
from cllm.runtime import gpu

if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the kernels on the GPU", allow_module_level=True)


@pytest.fixture(autouse=True)
def triton_kernels():
    with runtime.use(backend="triton"):
        yield


def check(oracle, dtype, shape, slack=2.0, **options):
    """q (B, T, H, D), k and v (B, S, Hkv, D): out, log-sum-exp and all gradients against the float64 oracle, by the rule."""
    batch, queries, keys, heads, kv_heads, dim = shape
    case = oracle.attention_case("here", oracle.qkv(batch, queries, keys, heads, kv_heads, dim), return_lse=True, **options)
    exact = oracle.run(case, case.plain, dtype, torch.float64)
    plain = oracle.run(case, case.plain, dtype, dtype)
    ours = oracle.run(case, case.ours, dtype, dtype)
    for name, expected in exact.items():
        oracle.check_rule(f"{name} {dtype} {shape} {options}", ours[name], plain[name], expected, slack, 8.0 if name.startswith("d_") else 0.0)


@pytest.mark.parametrize("dim", [16, 80, 96, 128, 256])
def test_head_sizes(oracle, dim):
    check(oracle, torch.bfloat16, (1, 70, 70, 2, 1, dim), causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_several_blocks_of_queries_and_keys(oracle, dtype):
    check(oracle, dtype, (1, 200, 300, 2, 1, 32), causal=True)


def test_documents_across_blocks(oracle):
    bounds = torch.tensor([0, 3, 130, 131, 131, 260], dtype=torch.int32)
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
    from cllm.kernels.gpu import attention

    keys = 3 * attention.SECTION + 40
    check(oracle, torch.float32, (2, queries, keys, 6, 2, 32), causal=True)
    check(oracle, torch.bfloat16, (1, queries, keys, 2, 2, 32), causal=True, window=700)
    check(oracle, torch.float32, (1, queries, keys, 2, 1, 32), causal=True, softcap=2.0)


def test_gradients_that_are_expanded_or_strided(oracle):
    i = oracle.Inputs(torch.float32, torch.float32)
    q, k, v = (i.normal(1, 30, 2, 16).requires_grad_() for _ in range(3))
    out = kernels.attention(q, k, v, causal=True)
    expanded = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    whole = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    strided = torch.autograd.grad(out, (q, k, v), torch.ones(1, 30, 16, 2).transpose(2, 3))
    for a, b, c in zip(expanded, whole, strided):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_the_size_of_the_gpu_changes_no_bit(oracle):
    i = oracle.Inputs(torch.bfloat16, torch.bfloat16)
    q, k, v = i.normal(1, 150, 4, 32), i.normal(1, 150, 2, 32), i.normal(1, 150, 2, 32)
    found = []
    for num_sms in (1, 3, 1000):
        with gpu.described(dataclasses.replace(gpu.INTERPRETED, num_sms=num_sms)):
            leaves = [each.clone().requires_grad_() for each in (q, k, v)]
            out = kernels.attention(*leaves, causal=True)
            found.append([out.detach(), *torch.autograd.grad(out, leaves, out.detach())])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again))
