"""The Triton kernels for products, feed-forward, losses and embedding beyond the shared cases: fp16, several tiles and chunks, long runs."""

import pytest
import torch
from cllm_kernel_oracle import device  # loaded by conftest.py under this name

pytest.importorskip("triton")

from cllm import kernels, runtime
from cllm.kernels.triton import cross_entropy, embedding, linear_cross_entropy, matmul

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def triton_kernels(serve):
    serve("triton", "matmul")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_products_of_several_tiles(oracle, dtype):
    i = oracle.Inputs(dtype, dtype)
    a, b, bias = i.normal(150, 90), i.normal(200, 90), i.normal(200)
    found = matmul.matmul(a, b.T, bias, dtype)
    oracle.check_rule("product", found, torch.addmm(bias, a, b.T), a.double() @ b.double().T + bias.double(), slack=2)
    wide = matmul.matmul(a, b.T, None, torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), a.double() @ b.double().T, atol=2e-4, rtol=0)


def test_a_second_pair_is_added_to_the_same_sums(oracle):
    i = oracle.Inputs(torch.bfloat16, torch.bfloat16)
    a, b, c, d = i.normal(70, 40), i.normal(40, 80), i.normal(70, 40), i.normal(40, 80)
    found = matmul.product(a, b, None, torch.bfloat16, second=(c, d.T.contiguous().T))
    exact = a.double() @ b.double() + c.double() @ d.double()
    oracle.check_rule("pair", found, (a @ b) + (c @ d), exact, slack=1)


def test_a_product_over_nothing_is_its_bias():
    a, b, bias = torch.randn(20, 0, device=device()), torch.randn(0, 40, device=device()), torch.randn(40, device=device())
    assert torch.equal(matmul.product(a, b, None, torch.float32), torch.zeros(20, 40, device=device()))
    assert torch.equal(matmul.product(a, b, bias, torch.float32), bias.expand(20, 40))


def test_sums_of_columns_over_many_groups_of_rows():
    x = torch.randn(70_000, 5, generator=torch.Generator().manual_seed(0), device="cpu").to(device())
    found = matmul.column_sums(x.T.contiguous().T, torch.float32)
    torch.testing.assert_close(found, x.double().sum(0).float(), atol=1e-3, rtol=0)
    assert torch.equal(found, matmul.column_sums(x, torch.float32))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("dtype", HALVES)
def test_feed_forward_of_several_tiles(oracle, activation, dtype):
    case = oracle.feed_forward_case("here", oracle.gated(72, 136, 130), activation)
    exact, plain = oracle.exact_and_plain(case, dtype)
    ours = oracle.run(case, case.ours, dtype, dtype)
    for name, expected in exact.items():
        oracle.check_rule(f"{activation} {name}", ours[name], plain[name], expected, 1.0)


def test_recomputing_gives_the_bits_of_keeping(oracle):
    i = oracle.Inputs(torch.bfloat16, torch.bfloat16)
    x, gate, up, down = (i.normal(*shape).requires_grad_() for shape in ((40, 32), (48, 32), (48, 32), (32, 48)))
    gradients = []
    for recompute in (False, True):
        y = kernels.feed_forward(x, gate, up, down, recompute=recompute)
        gradients.append(torch.autograd.grad(y, (x, gate, up, down), torch.ones_like(y)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("columns", [1, 31, cross_entropy.MOST_COLUMNS, cross_entropy.MOST_COLUMNS + 3, 5000, 20_000])
def test_losses_of_rows_longer_and_shorter_than_a_block(columns):
    generator = torch.Generator().manual_seed(columns)
    logits = (4 * torch.randn(6, columns, generator=generator, device="cpu").to(device())).requires_grad_()
    targets = torch.randint(columns, (6,), generator=generator, device="cpu").to(device())
    loss = kernels.cross_entropy(logits, targets, label_smoothing=0.1, z_loss=1e-3)
    (gradient,) = torch.autograd.grad(loss, logits)
    wide = logits.detach().double().requires_grad_()
    lse = torch.logsumexp(wide, -1)
    exact = torch.nn.functional.cross_entropy(wide, targets, label_smoothing=0.1) + 1e-3 * lse.square().mean()
    (expected,) = torch.autograd.grad(exact, wide)
    torch.testing.assert_close(loss.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_equal_logits_is_the_prediction_wherever_they_stand_in_a_long_row(dtype):
    """Ties within a lane of a tile, between lanes, and between tiles; and a row of nothing but the smallest number."""
    ties = [(0, 1), (7, 4096 + 7), (4095, 4096), (5000, 19_999), (8191, 8192, 16_384), (300, 1324, 2348), (19_999,), (3, 17_000)]
    logits = torch.zeros(len(ties), 20_000, dtype=dtype, device=device())
    for row, places in enumerate(ties):
        logits[row, list(places)] = 3.0
    targets = torch.tensor([places[0] for places in ties], device=device())
    *_, correct, _ = cross_entropy.forward(logits, targets, -100, 0.0, 0.0, 0.0)
    assert correct.all()
    assert not cross_entropy.forward(logits, targets + 1 - 2 * (targets == 19_999).long(), -100, 0.0, 0.0, 0.0)[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_rows_give_what_one_chunk_gives(dtype, monkeypatch, oracle):
    i = oracle.Inputs(dtype, dtype)
    x, weight = i.normal(50, 24), i.master(61, 24)
    targets = oracle.with_ignored(i.integers(61, 50))
    options = (-100, 0.1, 1e-3, 0.0)
    whole = linear_cross_entropy.forward_with_grads(x, weight, targets, *options, 0.02)
    monkeypatch.setattr(linear_cross_entropy, "LOGIT_BYTES", 64 * 16 * dtype.itemsize)
    monkeypatch.setattr(linear_cross_entropy, "FEWEST_ROWS", 1)
    assert len(linear_cross_entropy.row_chunks(50, 61, dtype, runtime.gpu.gpu_of(x.device))) == 4
    parts = linear_cross_entropy.forward_with_grads(x, weight, targets, *options, 0.02)
    for one, many in zip(whole[:5], parts[:5]):
        torch.testing.assert_close(one, many)  # to a rounding: the library that multiplies may add up few rows in another order than many
    torch.testing.assert_close(whole[5], parts[5], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 257])
def test_rows_of_logits_begin_at_whole_vectors_for_any_vocabulary(vocabulary, monkeypatch, oracle):
    seen = []
    run_rows = linear_cross_entropy.run_rows
    monkeypatch.setattr(linear_cross_entropy, "run_rows", lambda z, *more: (seen.append((z.shape, z.stride())), run_rows(z, *more))[1])
    case = oracle.linear_cross_entropy_case(
        "here", lambda i: {"x": i.normal(20, 24), "weight": i.master(vocabulary, 24), "targets": i.integers(vocabulary, 20)}
    )
    oracle.check_case(case, torch.bfloat16)
    assert seen and all(shape == (20, vocabulary) and stride == (-(-vocabulary // 64) * 64, 1) for shape, stride in seen)


def test_the_gradient_of_an_embedding_adds_long_and_short_runs_in_order():
    generator = torch.Generator().manual_seed(0)
    piece = embedding.PIECE
    lengths = [1, 2 * piece, 3, piece, piece - 1, 5 * piece + 7, 1, 1]
    tokens = torch.cat([torch.full((length,), 3 * index, device=device()) for index, length in enumerate(lengths)])
    tokens = tokens[torch.randperm(tokens.numel(), generator=generator, device="cpu").to(device())]
    dy = torch.randn(tokens.numel(), 20, generator=generator, device="cpu").to(device())
    found = embedding.backward(dy, tokens, 30, torch.float32)
    expected = torch.zeros(30, 20, dtype=torch.float64, device=device()).index_add_(0, tokens, dy.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    assert torch.equal(found, embedding.backward(dy, tokens, 30, torch.float32))
    assert (found[1] == 0).all() and (found[29] == 0).all()
