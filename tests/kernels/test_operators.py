"""Registration: opcheck on every operator, compiled equals eager, analytic gradients against finite differences."""

import subprocess
import sys

import pytest
import torch
from cllm_kernel_oracle import device  # loaded by conftest.py under this name
from torch.library import opcheck

from cllm import kernels, runtime


def _normal(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype).to(device).requires_grad_(grad)


def _operator_calls() -> dict[str, list[tuple]]:
    q, k, v = _normal(1, 5, 4, 8), _normal(1, 5, 2, 8), _normal(1, 5, 2, 8).detach().requires_grad_()
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    x, weight, bias = _normal(2, 3, 8), _normal(8), _normal(8)
    w_gate, w_up, w_down = _normal(16, 8), _normal(16, 8), _normal(8, 16)
    logits, targets = _normal(2, 3, 9), torch.tensor([[0, 8, -100], [3, 3, 1]])
    vocabulary, tokens = _normal(9, 8), torch.tensor([[1, 0], [8, 1]])
    cos, sin, head_weight = _normal(7, 4, grad=False), _normal(7, 4, grad=False), _normal(4, 8)
    loss_options = (-100, 0.1, 1e-3, 5.0)
    flat = [t.detach() for t in (x, w_gate, w_up, w_down, weight, logits, vocabulary)]
    x_, gate_, up_, down_, weight_, logits_, vocabulary_ = flat
    rows, row_targets = _normal(6, grad=False), targets
    params = [_normal(3, 4, grad=False), _normal(5, grad=False)]
    moments = [[torch.rand_like(p) for p in params] for _ in range(2)]
    hidden_bias, key, z = _normal(16), kernels.Dropout.of(0.5, 3).key, torch.zeros
    with torch.no_grad(), runtime.use(backend="torch"):
        out, lse = kernels.attention(q, k, v, causal=True, return_lse=True)
    return {
        "attention": [(q, k, v, True, 0.3, 3, 2.0, None), (q, k, v, True, 0.3, 0, 0.0, bounds)],
        "attention_backward": [
            (out, lse, q.detach(), k.detach(), v.detach(), out, lse, True, 8**-0.5, 0, 0.0, None),
            (out, None, q.detach(), k.detach(), v.detach(), out, lse, True, 8**-0.5, 0, 0.0, bounds),
        ],
        "attention_dropout": [(q, k, v, True, 0.3, 3, 2.0, bounds, key, 0.5, 2, 4), (q, k, v, True, 0.3, 0, 0.0, None, key, 0.5, 2, 0)],
        "attention_dropout_backward": [
            (out, lse, q.detach(), k.detach(), v.detach(), out, lse, True, 8**-0.5, 0, 0.0, None, key, 0.5, 2, 0),
            (out, None, q.detach(), k.detach(), v.detach(), out, lse, True, 8**-0.5, 0, 0.0, bounds, key, 0.5, 2, 4),
        ],
        "norm_dropout": [(x, None, weight, None, False, 1e-6, key, 0.5, 1), (x, (x_ * 2).requires_grad_(), weight, bias, True, 1e-5, key, 0.5, 1)],
        "norm_dropout_backward": [
            (x_, None, x_, weight_, False, z(0), torch.rand(2, 3), False, False, key, 0.5, 1),
            (x_, x_, x_, weight_, True, torch.rand(2, 3), torch.rand(2, 3), True, True, key, 0.5, 1),
        ],
        "feed_forward": [
            (x, w_gate, w_up, w_down, "silu", None, None, True),
            (x, None, w_up, w_down, "gelu", hidden_bias, bias, True),
            (x, None, w_up, w_down, "gelu", hidden_bias, bias, False),
        ],
        "feed_forward_backward": [
            (x_, x_, gate_, up_, down_, "silu", None, None, None, None),
            (x_, x_, None, up_, down_, "relu2", hidden_bias.detach(), bias.detach(), x_ @ up_.T, None),
        ],
        "rms_norm": [(x, weight, 1e-6)],
        "rms_norm_residual": [(x, x_, weight, 1e-6)],
        "rms_norm_backward": [(x_, None, x_, weight_, torch.ones(2, 3)), (x_, x_, x_, weight_, torch.ones(2, 3))],
        "layer_norm": [(x, weight, bias, 1e-5), (x, weight, None, 1e-5)],
        "layer_norm_residual": [(x, x_, weight, bias, 1e-5)],
        "layer_norm_backward": [(x_, x_, x_, weight_, True, torch.zeros(2, 3), torch.ones(2, 3))],
        "rotary": [(q, cos, sin, None, False), (q, cos, sin, torch.tensor([[0, 3, 6, 1, 1]]), True)],
        "norm_rotary": [(q, head_weight, 1e-6, cos, sin, None), (q, head_weight, 1e-6, cos, sin, torch.tensor([[0, 3, 6, 1, 1]]))],
        "norm_rotary_backward": [(q.detach(), q.detach(), head_weight.detach(), torch.ones(1, 5, 4), cos, sin, None)],
        "softmax": [(x,)],
        "softmax_backward": [(x_, torch.softmax(x_, -1))],
        "embedding": [(tokens, vocabulary, torch.float32)],
        "embedding_backward": [(_normal(2, 2, 8, grad=False), tokens, 9, torch.float32)],
        "cross_entropy": [(logits, targets, *loss_options, "mean"), (logits, targets, *loss_options, "none")],
        "cross_entropy_backward": [(rows, logits_, row_targets, torch.logsumexp(logits_, -1).reshape(-1), *loss_options)],
        "linear_cross_entropy": [
            (x, vocabulary, targets, *loss_options, "mean", None, True),
            (x, vocabulary, targets, *loss_options, "sum", None, False),
            (x, vocabulary, targets, *loss_options, "none", None, False),
        ],
        "linear_cross_entropy_backward": [(rows, x_, vocabulary_, targets, rows, *loss_options)],
        "matmul": [(x, vocabulary.T, None), (x, w_down, hidden_bias)],
        "matmul_backward": [
            (logits_, x_, vocabulary_.T, None, True, True, False),
            (_normal(2, 3, 16, grad=False), x_, down_, hidden_bias.detach(), True, False, True),
        ],
        "adamw_": [(params, [p * 2 for p in params], *moments, 1e-3, 0.9, 0.99, 1e-8, [0.1, 0.0], 3, 1.0, True)],
        "gradient_statistics": [(params,)],
    }


@pytest.mark.parametrize("name", list(_operator_calls()))
def test_opcheck(name):
    """The first call goes through the compiler too, which is most of the time; what the others differ in, the other checks see."""
    first, *others = _operator_calls()[name]
    opcheck(getattr(torch.ops.cllm, name).default, first)
    for arguments in others:
        opcheck(getattr(torch.ops.cllm, name).default, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def _layer(x, norm, w_qkv, cos, sin, gate, up, down, table, targets, key):
    dropout = kernels.Dropout(0.2, key)
    h = kernels.matmul(kernels.rms_norm(x, norm), w_qkv.T)
    q, k, v = h.view(*h.shape[:2], 4, 8).split([2, 1, 1], dim=2)
    out = kernels.attention(kernels.rotary(q, cos, sin, None, norm.view(2, 8)), kernels.rotary(k, cos, sin), v, causal=True)
    y, x = kernels.rms_norm(out.flatten(2), norm, residual=x)
    out = kernels.attention_dropout(q, k, v, dropout, 3, causal=True)
    y, x = kernels.rms_norm_dropout(y + out.flatten(2), norm, dropout, 1, residual=x)
    x = x + kernels.feed_forward(y, gate, up, down)
    x = kernels.layer_norm(x, norm) + kernels.embedding(targets.clamp(min=0), table) + kernels.softmax(x)
    loss = kernels.linear_cross_entropy(x, table, targets, z_loss=1e-3)
    return loss + kernels.cross_entropy(kernels.matmul(x, table.T), targets)


def test_compiled_equals_eager_forward_and_backward():
    arguments = [
        _normal(2, 6, 16), _normal(16), _normal(32, 16), _normal(6, 4, grad=False), _normal(6, 4, grad=False),
        _normal(24, 16), _normal(24, 16), _normal(16, 24), _normal(11, 16),
    ]  # fmt: skip
    targets = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))
    targets[0, 0] = -100
    leaves, key = [t for t in arguments if t.requires_grad], kernels.Dropout.of(0.2, 5).key
    eager = _layer(*arguments, targets, key)
    eager_grads = torch.autograd.grad(eager, leaves)
    torch._dynamo.reset()
    compiled = torch.compile(_layer, fullgraph=True, backend="aot_eager")(*arguments, targets, key)
    compiled_grads = torch.autograd.grad(compiled, leaves)
    assert torch.equal(eager, compiled)
    for index, (expected, found) in enumerate(zip(eager_grads, compiled_grads)):
        assert torch.equal(expected, found), index
    with torch.no_grad():
        assert torch.equal(torch.compile(_layer, fullgraph=True, backend="aot_eager")(*arguments, targets, key), eager)


def test_fake_and_meta_tensors_get_shapes_without_computing():
    from torch._subclasses import FakeTensorMode

    with torch.no_grad():
        assert kernels.softmax(torch.empty(3, 4, device="meta")).is_meta
        with FakeTensorMode():
            assert kernels.matmul(torch.empty(3, 4), torch.empty(4, 5)).shape == (3, 5)


def test_an_operator_that_changes_tensors_counts_their_versions():
    tensors = [_normal(5, grad=False) for _ in range(4)]
    lists = [[tensor] for tensor in tensors]
    kernels.adamw_(*lists, learning_rate=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decays=[0.0], step=1)
    assert [tensor._version for tensor in tensors] == [1, 0, 1, 1]


def test_a_call_does_not_load_the_compiler():
    script = (
        "import sys, torch; from cllm.kernels import softmax; softmax(torch.zeros(2, 3, requires_grad=True)); print('torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def _gradcheck_calls():
    def normal(*shape):
        return _normal(*shape, dtype=torch.float64)

    targets = torch.tensor([2, 0, -100, 4])
    cos, sin = _normal(4, 2, dtype=torch.float64, grad=False), _normal(4, 2, dtype=torch.float64, grad=False)
    bounds = torch.tensor([0, 1, 4], dtype=torch.int32)
    attention_inputs = (normal(1, 4, 2, 4), normal(1, 4, 1, 4), normal(1, 4, 1, 4) * 0.7)
    loss_options, dropout = {"label_smoothing": 0.1, "z_loss": 0.05, "softcap": 3.0}, kernels.Dropout.of(0.3, 2)
    return {
        "attention": (lambda q, k, v: kernels.attention(q, k, v, causal=True, softcap=2.0, return_lse=True), attention_inputs),
        "attention_packed": (lambda q, k, v: kernels.attention(q, k, v, window=2, cu_seqlens=bounds), attention_inputs),
        "gated": (
            lambda x, g, u, d: kernels.feed_forward(x, g, u, d, activation="gelu_tanh"),
            (normal(3, 4), normal(5, 4), normal(5, 4), normal(4, 5)),
        ),
        "gated_recomputed": (
            lambda x, g, u, d: kernels.feed_forward(x, g, u, d, recompute=True),
            (normal(3, 4), normal(5, 4), normal(5, 4), normal(4, 5)),
        ),
        "mlp": (
            lambda x, u, d, bu, bd: kernels.feed_forward(x, None, u, d, activation="gelu", b_up=bu, b_down=bd),
            (normal(3, 4), normal(5, 4), normal(4, 5), normal(5), normal(4)),
        ),
        "rms_norm": (lambda x, w, r: kernels.rms_norm(x, w, residual=r), (normal(3, 4), normal(4), normal(3, 4))),
        "layer_norm": (lambda x, w, b, r: kernels.layer_norm(x, w, b, residual=r), (normal(3, 4), normal(4), normal(4), normal(3, 4))),
        "attention_dropout": (
            lambda q, k, v: kernels.attention_dropout(q, k, v, dropout, 1, causal=True, softcap=2.0, return_lse=True), attention_inputs,
        ),
        "norm_dropout": (lambda x, w, r: kernels.rms_norm_dropout(x, w, dropout, 0, residual=r), (normal(3, 4), normal(4), normal(3, 4))),
        "layer_norm_dropout": (lambda x, w, b: kernels.layer_norm_dropout(x, w, b, dropout, 0), (normal(3, 4), normal(4), normal(4))),
        "rotary": (lambda x: kernels.rotary(x, cos, sin), (normal(1, 4, 2, 4),)),
        "rotary_norm": (lambda x, w: kernels.rotary(x, cos, sin, None, w, 1e-3), (normal(1, 4, 2, 4), normal(2, 4))),
        "softmax": (lambda x: kernels.softmax(x, 0), (normal(3, 4),)),
        "embedding": (lambda w: kernels.embedding(torch.tensor([0, 2, 2]), w), (normal(3, 4),)),
        "cross_entropy": (lambda x: kernels.cross_entropy(x, targets, **loss_options), (normal(4, 5),)),
        "linear_cross_entropy": (lambda x, w: kernels.linear_cross_entropy(x, w, targets, **loss_options), (normal(4, 3), normal(5, 3))),
        "linear_cross_entropy_rows": (
            lambda x, w: kernels.linear_cross_entropy(x, w, targets, reduction="none", **loss_options),
            (normal(4, 3), normal(5, 3)),
        ),
        "matmul": (lambda a, b, c: kernels.matmul(a, b.T, c), (normal(3, 4), normal(5, 4), normal(5))),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(_gradcheck_calls()))
def test_gradients_of_the_reference_agree_with_finite_differences(name):
    function, inputs = _gradcheck_calls()[name]
    with runtime.use(backend="torch"):
        assert torch.autograd.gradcheck(function, tuple(t.detach().requires_grad_() for t in inputs))


def test_gradients_have_the_layout_of_their_weights(backend_name, serve):
    """Autograd copies a gradient of another layout than its leaf's, which for GPT-2's transposed weights cost a third of a short step."""
    serve(backend_name, "feed_forward")
    x, up, down = (_normal(*shape, device=device()) for shape in ((3, 8), (8, 16), (16, 8)))
    seen = []
    for weight in (up, down):
        weight.register_hook(lambda gradient: seen.append(gradient.is_contiguous()))
    kernels.feed_forward(x, None, up.T, down.T, activation="gelu").sum().backward()
    kernels.matmul(x, up).sum().backward()
    assert seen == [True] * 3


def test_no_zeros_of_a_vocabularys_size_are_made_for_the_loss():
    x, table = _normal(4, 8), _normal(31, 8)
    loss = kernels.linear_cross_entropy(x, table, torch.tensor([1, 2, 3, 4]))
    with torch.profiler.profile(record_shapes=True) as recorded:
        loss.backward()
    fills = [event.input_shapes for event in recorded.events() if event.name in ("aten::fill_", "aten::zero_", "aten::zeros")]
    assert not any([31, 8] in shapes for shapes in fills), fills


def test_gradients_are_made_only_where_they_are_needed():
    a, b, bias = _normal(3, 4, grad=False), _normal(5, 4), _normal(5, grad=False)
    kernels.matmul(a, b.T, bias).sum().backward()
    assert a.grad is None and bias.grad is None
    torch.testing.assert_close(b.grad, a.sum(0).expand(5, 4))


def test_reference_of_linear_cross_entropy_never_holds_all_logits(monkeypatch, oracle):
    from cllm.kernels.torch import linear_cross_entropy as reference

    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 100)
    largest = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (out := matmul(a, b), largest.append(out.numel()))[0])
    case = oracle.linear_cross_entropy_case("chunks", lambda i: {"x": i.normal(50, 3), "weight": i.normal(30, 3), "targets": i.integers(30, 50)})
    with runtime.use(backend="torch"):
        ours = oracle.run(case, case.ours, torch.float64, torch.float64)
    assert max(largest) <= 100
    monkeypatch.undo()
    exact = oracle.run(case, case.plain, torch.float64, torch.float64)
    for key, value in exact.items():
        torch.testing.assert_close(ours[key], value)
