"""Every operation, forward and backward, on every backend: the rule of the float64 oracle."""

import pytest
import torch
from cllm_kernel_oracle import device  # loaded by conftest.py under this name
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import kernels, runtime


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_error_is_at_most_twice_that_of_plain_torch(case, backend_name, dtype, oracle, serve):
    serve(backend_name, case.op)
    oracle.check_case(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
def test_other_dtypes_are_served_by_the_reference(case, dtype, oracle):
    if case.op in ("attention", "matmul", "softmax", "linear_cross_entropy") or dtype == torch.float64:
        if "large_offset" in case.name and dtype == torch.float16:
            pytest.skip("an offset beyond the range of float16")
        oracle.check_case(case, dtype)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(
    rows=st.integers(0, 40), depth=st.integers(0, 70), columns=st.integers(1, 70), transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_matmul_of_any_shape(oracle, rows, depth, columns, transposed, dtype):
    i = oracle.Inputs(dtype, dtype)
    a, b = i.normal(rows, depth), i.normal(columns, depth).T if transposed else i.normal(depth, columns)
    oracle.check_rule(f"matmul {rows}x{depth}x{columns}", kernels.matmul(a, b), a @ b, a.double() @ b.double(), slack=2)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(
    queries=st.integers(1, 40), more_keys=st.integers(0, 40), group=st.integers(1, 3), half=st.integers(1, 40),
    causal=st.booleans(), window=st.one_of(st.none(), st.integers(1, 50)),
)  # fmt: skip
def test_attention_of_any_shape(oracle, queries, more_keys, group, half, causal, window):
    i = oracle.Inputs(torch.float32, torch.float32)
    keys = queries + more_keys
    q, k, v = i.normal(1, queries, 2 * group, 2 * half), i.normal(1, keys, 2, 2 * half), i.normal(1, keys, 2, 2 * half)
    options = {"causal": causal, "window": window, "return_lse": True}
    found = kernels.attention(q, k, v, **options)
    plain = oracle.plain_attention(q, k, v, **options)
    exact = oracle.plain_attention(q.double(), k.double(), v.double(), **options)
    for name, ours, base, truth in zip(("out", "lse"), found, plain, exact):
        oracle.check_rule(f"attention {name}", ours, base, truth, slack=4)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(rows=st.integers(1, 30), width=st.integers(1, 90), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_softmax_and_norm_of_any_shape(oracle, rows, width, scale):
    x = oracle.Inputs(torch.float32, torch.float32).normal(rows, width, scale=scale)
    oracle.check_rule("softmax", kernels.softmax(x), torch.softmax(x, -1), torch.softmax(x.double(), -1), slack=4)
    weight = torch.ones(width, device=device())
    exact = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-6)
    plain = torch.nn.functional.rms_norm(x, (width,), weight, 1e-6)
    oracle.check_rule("rms_norm", kernels.rms_norm(x, weight), plain, exact, slack=4)


def test_float32_weights_are_rounded_to_the_activations_dtype(backend_name, oracle, serve):
    serve(backend_name, "matmul")
    i = oracle.Inputs(torch.float32, torch.float32)
    a, weight = i.normal(9, 64).bfloat16(), i.normal(20, 64)
    assert torch.equal(kernels.matmul(a, weight.T), kernels.matmul(a, weight.bfloat16().T))


def test_loss_statistics_come_from_the_same_logits(backend_name, oracle, serve):
    serve(backend_name, "linear_cross_entropy")
    i = oracle.Inputs(torch.float32, torch.float32)
    x, weight, targets = i.normal(30, 24), i.normal(50, 24), oracle.with_ignored(i.integers(50, 30))
    logits = x @ weight.T
    targets[1::3] = logits.argmax(-1)[1::3]
    _, stats = kernels.linear_cross_entropy(x, weight, targets, z_loss=0.1, label_smoothing=0.1, return_stats=True)
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(stats.losses, plain)
    torch.testing.assert_close(stats.lse, torch.logsumexp(logits, -1))
    assert torch.equal(stats.correct, (logits.argmax(-1) == targets) & (targets != -100))
    assert stats.correct.sum() == 10
    x.requires_grad_()
    loss, stats = kernels.linear_cross_entropy(x, weight, targets, return_stats=True)
    assert loss.requires_grad and not any(part.requires_grad for part in stats)
    mean = (plain.sum() / (targets != -100).sum()).item()
    assert loss.item() == pytest.approx(mean, rel=1e-5)


def test_the_first_of_equal_logits_is_the_prediction(backend_name, serve):
    serve(backend_name, "linear_cross_entropy")
    x, weight = torch.ones(3, 4, device=device()), torch.ones(37, 4, device=device())
    _, stats = kernels.linear_cross_entropy(x, weight, torch.tensor([0, 1, 36], device=device()), return_stats=True)
    assert stats.correct.tolist() == [True, False, False]


def test_linear_cross_entropy_gradients_survive_a_second_backward(backend_name, oracle, serve):
    serve(backend_name, "linear_cross_entropy")
    i = oracle.Inputs(torch.float32, torch.float32)
    x, weight = i.normal(10, 8).requires_grad_(), i.normal(12, 8).requires_grad_()
    loss = kernels.linear_cross_entropy(x, weight, i.integers(12, 10))
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward(torch.tensor(2.0, device=device()))
    torch.testing.assert_close(weight.grad, 4 * once)


def test_a_backend_asked_for_by_name_that_cannot_serve_is_an_error():
    with runtime.use(backend="numba"), pytest.raises(runtime.errors.BackendError, match="float64"):
        kernels.softmax(torch.ones(3, dtype=torch.float64, device=device()))
