"""Values at the edge: NaN, infinities, rows that see nothing, batches with nothing to predict."""

import pytest
import torch
from cllm_kernel_oracle import device  # loaded by conftest.py under this name

from cllm import kernels

NAN, INF = float("nan"), float("inf")


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(device())


def test_queries_that_see_nothing_get_zero_and_pass_no_gradient(backend_name, serve):
    serve(backend_name, "attention")
    q, k, v = (_x(1, 9, 2, 16).requires_grad_(), _x(1, 5, 2, 16).requires_grad_(), _x(1, 5, 2, 16).requires_grad_())
    out, lse = kernels.attention(q, k, v, causal=True, return_lse=True)  # the first four queries come before the first key
    assert torch.equal(out[:, :4], torch.zeros(1, 4, 2, 16, device=device())) and (lse[:, :, :4] == -INF).all()
    assert torch.isfinite(lse[:, :, 4:]).all()
    (out.sum() + lse[:, :, 4:].sum()).backward()
    assert torch.equal(q.grad[:, :4], torch.zeros(1, 4, 2, 16, device=device()))
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


def test_attention_over_no_keys_is_zero(backend_name, serve):
    serve(backend_name, "attention")
    q, k = _x(1, 3, 2, 16).requires_grad_(), _x(1, 0, 2, 16).requires_grad_()
    out, lse = kernels.attention(q, k, k, return_lse=True)
    assert torch.equal(out, torch.zeros(1, 3, 2, 16, device=device())) and (lse == -INF).all()
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q)) and k.grad.shape == k.shape


def test_attention_with_large_scores_is_finite(backend_name, serve):
    serve(backend_name, "attention")
    q, k, v = _x(1, 40, 2, 32) * 300, _x(1, 40, 2, 32) * 300, _x(1, 40, 2, 32)
    out, lse = kernels.attention(q, k, v, causal=True, return_lse=True)
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v)), is_causal=True)
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), atol=1e-2, rtol=1e-2)
    assert torch.isfinite(lse).all()


def test_nan_in_a_row_reaches_that_row_and_no_other(backend_name, serve):
    for op in ("softmax", "rms_norm", "layer_norm", "matmul", "feed_forward", "cross_entropy", "linear_cross_entropy", "rotary", "attention"):
        serve(backend_name, op)
    x = _x(6, 32)
    x[2, 5] = NAN
    weight, square, targets = torch.ones(32, device=device()), _x(32, 32), torch.arange(6, device=device())
    results = {
        "softmax": kernels.softmax(x),
        "rms_norm": kernels.rms_norm(x, weight),
        "layer_norm": kernels.layer_norm(x, weight),
        "matmul": kernels.matmul(x, square),
        "gated": kernels.feed_forward(x, square, square, square),
        "gelu": kernels.feed_forward(x, None, square, square, activation="gelu"),
        "gelu_tanh": kernels.feed_forward(x, None, square, square, activation="gelu_tanh"),
        "relu2": kernels.feed_forward(x, None, square, square, activation="relu2"),
        "cross_entropy": kernels.cross_entropy(x, targets, reduction="none").unsqueeze(1),
        "linear_cross_entropy": kernels.linear_cross_entropy(x, square, targets, reduction="none").unsqueeze(1),
        "attention": kernels.attention(x.view(1, 6, 1, 32), _x(1, 4, 1, 32), _x(1, 4, 1, 32)).view(6, 32),
    }
    for name, found in results.items():
        assert torch.isnan(found).any(-1).tolist() == [False, False, True, False, False, False], name
    assert torch.isnan(kernels.rotary(x.view(1, 6, 1, 32), _x(6, 16), _x(6, 16))).sum() == 2
    normed = kernels.rotary(x.view(1, 3, 2, 32), _x(3, 16), _x(3, 16), None, torch.ones(2, 32, device=device())).view(6, 32)
    assert torch.isnan(normed).any(-1).tolist() == [False, False, True, False, False, False]
    key = _x(1, 6, 1, 32)
    key[0, 3, 0, 1] = NAN
    out = kernels.attention(_x(1, 6, 1, 32), key, _x(1, 6, 1, 32), causal=True)
    assert torch.isnan(out).any(-1).flatten()[3:].all(), "a key that is NaN reaches every query that sees it"


def test_nan_and_infinite_rows_of_softmax_are_those_of_torch(backend_name, serve):
    serve(backend_name, "softmax")
    x = _x(5, 35)
    x[0] = -INF
    x[1, :34] = -INF
    x[2, 3] = INF
    x[3, 7] = NAN
    x[4] = -3e38
    torch.testing.assert_close(kernels.softmax(x), torch.softmax(x, -1), equal_nan=True)


def test_infinite_logits_give_the_losses_of_torch(backend_name, serve):
    serve(backend_name, "cross_entropy")
    logits, targets = _x(4, 35), torch.tensor([0, 1, 2, 3], device=device())
    logits[0, 5:] = -INF  # impossible classes, not the target
    logits[1, 1] = -INF  # an impossible target
    logits[2] = -INF
    logits[3, 4] = NAN
    found = kernels.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, targets, reduction="none"), equal_nan=True)


def test_ignored_rows_pass_nothing_even_when_they_are_nan(backend_name, serve):
    serve(backend_name, "cross_entropy")
    logits = _x(4, 20)
    logits[1] = NAN
    logits.requires_grad_()
    loss = kernels.cross_entropy(logits, torch.tensor([3, -100, 4, 5], device=device()))
    loss.backward()
    assert torch.isfinite(loss) and torch.equal(logits.grad[1], torch.zeros(20, device=device())) and torch.isfinite(logits.grad).all()


def test_a_batch_with_nothing_to_predict_has_loss_zero_and_zero_gradients(backend_name, serve):
    serve(backend_name, "linear_cross_entropy")
    serve(backend_name, "cross_entropy")
    targets = torch.full((5,), -100, device=device())
    x, weight = _x(5, 8).requires_grad_(), _x(12, 8).requires_grad_()
    loss, stats = kernels.linear_cross_entropy(x, weight, targets, return_stats=True)
    loss.backward()
    assert loss == 0 and not x.grad.any() and not weight.grad.any() and not stats.correct.any()
    empty = kernels.linear_cross_entropy(x[:0], weight, targets[:0])
    empty.backward()
    assert empty == 0 and kernels.cross_entropy(x, targets) == 0


def test_norm_of_a_constant_or_zero_row_is_finite(backend_name, serve):
    serve(backend_name, "rms_norm")
    x = torch.tensor([0.0, 1e4, 1e-20], device=device()).unsqueeze(1).expand(3, 40).clone().requires_grad_()
    weight = torch.ones(40, device=device())
    rotated = kernels.rotary(x[None, None], _x(1, 20), _x(1, 20), None, weight.expand(3, 40))
    results = kernels.rms_norm(x, weight), kernels.layer_norm(x, weight), rotated
    for result in results:
        assert torch.isfinite(result).all()
    sum(result.sum() for result in results).backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_activations_far_from_zero_are_finite(backend_name, dtype, serve):
    serve(backend_name, "feed_forward")
    x = torch.tensor([[-1e4], [-80.0], [0.0], [80.0], [1e4]], dtype=dtype, device=device()).requires_grad_()
    one = torch.ones(1, 1, dtype=dtype, device=device())
    for activation, limit in (("silu", x), ("gelu", x), ("gelu_tanh", x), ("relu2", x.square())):
        y = kernels.feed_forward(x, None, one, one, activation=activation)
        torch.testing.assert_close(y, torch.where(x > 0, limit, 0.0), atol=1e-30, rtol=1e-2)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.isfinite(grad).all(), activation
