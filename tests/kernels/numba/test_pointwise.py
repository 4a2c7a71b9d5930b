"""The numba kernels of norms, rotary, softmax, embedding, cross entropy and AdamW: oracle, strides, bits for any workers."""

import math

import pytest
import torch

from cllm import kernels, runtime
from cllm.kernels.embedding import tied_embedding
from cllm.kernels.numba import adamw, cross_entropy, embedding, norm, rotary, softmax
from cllm.kernels.torch import adamw as reference_adamw
from cllm.kernels.torch import cross_entropy as reference_cross_entropy
from cllm.kernels.torch import embedding as reference_embedding
from cllm.kernels.torch import norm as reference_norm
from cllm.kernels.torch import rotary as reference_rotary
from cllm.kernels.torch import softmax as reference_softmax

DTYPES = [torch.float32, torch.bfloat16]
WORKERS = (1, 2, 3, 64)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def compare(what, oracle, ours, theirs, *args, slack=1.0):
    """Run a kernel for every number of workers, and its twin in plain torch in the same dtype and in float64."""
    results = []
    for workers in WORKERS:
        with runtime.use(threads=workers):
            found = ours(*args)
        results.append(found if isinstance(found, tuple) else (found,))
    plain, exact = theirs(*args), theirs(*map(wide, args))
    plain, exact = (x if isinstance(x, tuple) else (x,) for x in (plain, exact))
    for index, true in enumerate(exact):
        found = results[0][index]
        assert (found is None) == (true is None), f"{what} {index}"
        if found is None:
            continue
        assert all(torch.equal(found, other[index]) for other in results[1:]), f"{what} {index}: workers change the bits"
        assert found.dtype == plain[index].dtype and found.is_contiguous()
        oracle.check_rule(f"{what} {index}", found, plain[index], true, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns", [(7, 5), (530, 100)])  # 530 rows: 34 partial sums, two levels of the tree
def test_norms_follow_the_oracle(rows, columns, dtype, oracle):
    x, residual, dy, dh = (normal(rows, columns, dtype=dtype, seed=seed) for seed in range(4))
    x = x + 1.0
    weight, bias = normal(columns), normal(columns, dtype=dtype, seed=1)
    _, h, rstd = norm.rms_norm_forward(x, weight, 1e-6, residual)
    assert torch.equal(h, x + residual)
    compare("rms", oracle, norm.rms_norm_forward, reference_norm.rms_norm_forward, x, weight, 1e-6, None)
    compare("rms backward", oracle, norm.rms_norm_backward, reference_norm.rms_norm_backward, dy, dh, h, weight, rstd)
    *_, mean, rstd = norm.layer_norm_forward(x, weight, bias, 1e-5, None)
    compare("layer", oracle, norm.layer_norm_forward, reference_norm.layer_norm_forward, x, weight, bias, 1e-5, None)
    compare("layer backward", oracle, norm.layer_norm_backward, reference_norm.layer_norm_backward, dy, None, x, weight, True, mean, rstd)


def test_norms_of_strided_rows_and_without_bias(oracle):
    x = normal(4, 6, 3, 40)[:, :, 1, 3:33]
    weight = normal(60)[::2]
    compare("layer", oracle, norm.layer_norm_forward, reference_norm.layer_norm_forward, x, weight, None, 1e-5, None)
    compare("rms", oracle, norm.rms_norm_forward, reference_norm.rms_norm_forward, x.transpose(0, 1), weight, 1e-6, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_follows_the_oracle_and_its_inverse_undoes_it(dtype, oracle):
    x = normal(2, 21, 3, 2, 52, dtype=dtype)[:, :, :, 1, 2:42]
    angles = torch.arange(50)[:, None] * 0.9 ** torch.arange(20)
    cos, sin = angles.cos().float(), angles.sin().float()
    for positions in (None, torch.randint(0, 50, (21,)), torch.randint(0, 50, (2, 21))):
        for inverse in (False, True):
            compare("rotary", oracle, rotary.apply, reference_rotary.apply, x, cos, sin, positions, inverse)
    back = rotary.apply(rotary.apply(x.float(), cos, sin, None, False), cos, sin, None, True)
    torch.testing.assert_close(back, x.float())


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("head_dim", [2, 10, 64, 136])  # less than a vector, ragged, whole, and more than four vectors
def test_rotary_with_a_norm_gives_the_bits_of_the_norm_and_then_the_rotary(head_dim, weight_dtype, dtype):
    x, weight = normal(2, 281, 5, head_dim, dtype=dtype)[:, :, 1:4].requires_grad_(), normal(3, head_dim, dtype=weight_dtype).requires_grad_()
    angles = normal(300, head_dim // 2)
    tables = angles.cos(), angles.sin()
    dy = normal(2, 281, 3, head_dim, dtype=dtype, seed=1)
    for positions in (None, torch.randint(0, 300, (2, 281), generator=torch.Generator().manual_seed(0))):
        fused = kernels.rotary(x, *tables, positions, weight, 1e-5)
        normed = torch.stack([kernels.rms_norm(head, each, 1e-5) for head, each in zip(x.unbind(2), weight.unbind(0))], 2)
        composed = kernels.rotary(normed, *tables, positions)
        assert torch.equal(fused, composed)
        for ours, theirs in zip(torch.autograd.grad(fused, (x, weight), dy), torch.autograd.grad(composed, (x, weight), dy)):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_follows_the_oracle(dtype, oracle):
    for shape in ((3, 1), (40, 301)):
        x, dy = normal(*shape, dtype=dtype) * 3, normal(*shape, dtype=dtype, seed=1)
        compare("softmax", oracle, softmax.forward, reference_softmax.forward, x)
        compare("softmax backward", oracle, softmax.backward, reference_softmax.backward, dy, softmax.forward(x))


def test_softmax_keeps_the_meaning_of_infinity_and_nan():
    inf, nan = math.inf, math.nan
    x = torch.tensor([[1.0, -inf, 2.0], [-inf, -inf, -inf], [inf, 1.0, 0.0], [nan, 1.0, 2.0], [200.0, -200.0, 0.0]])
    assert torch.allclose(softmax.forward(x), torch.softmax(x, -1), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_sums_each_row_in_the_order_of_the_tokens(dtype, oracle):
    tokens = torch.randint(0, 40, (5, 33), generator=torch.Generator().manual_seed(0))
    tokens[tokens == 7] = 8  # a row that no token names
    weight, dy = normal(50, 37), normal(5, 33, 37, dtype=dtype)
    compare("embedding", oracle, embedding.forward, reference_embedding.forward, tokens, weight, dtype)
    for weight_dtype in {torch.float32, dtype}:
        dweight = embedding.backward(dy, tokens, 50, weight_dtype)
        expected = torch.zeros(50, 37)
        for token, row in zip(tokens.view(-1).tolist(), dy.float().view(-1, 37)):
            expected[token] += row
        assert torch.equal(dweight, expected.to(weight_dtype))
        for workers in WORKERS:
            with runtime.use(threads=workers):
                assert torch.equal(embedding.backward(dy, tokens, 50, weight_dtype), dweight)
        for module in (embedding, reference_embedding):
            before = normal(50, 37, dtype=weight_dtype)
            before[7] = -0.0
            total = before.clone()
            module.add_rows(dy, tokens, total)
            assert torch.equal(total, before + module.backward(dy, tokens, 50, weight_dtype))
            assert torch.signbit(total[7]).all(), "a row that no token names stays as it is"


def test_no_tokens_add_nothing_to_the_gradient_of_an_embedding():
    for module in (embedding, reference_embedding):
        total = normal(5, 8)
        before = total.clone()
        module.add_rows(normal(0, 8), torch.zeros(0, dtype=torch.int64), total)
        assert torch.equal(total, before)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_tied_weight_gets_the_gradient_of_its_two_uses(backend):
    tokens = torch.randint(0, 40, (2, 33), generator=torch.Generator().manual_seed(0))
    upstream = normal(2, 33, 24)

    def gradient(tied, use):
        weight = normal(50, 24).requires_grad_()
        x, again = tied_embedding(tokens, weight, torch.float32) if tied else (kernels.embedding(tokens, weight), weight)
        loss = use(x, again)
        loss.backward(retain_graph=True)
        loss.backward()  # what is added in place is nobody else's
        return weight.grad

    with runtime.use(backend=backend):
        for use in (
            lambda x, w: kernels.linear_cross_entropy(x, w, tokens),
            lambda x, w: 2 * kernels.linear_cross_entropy(x, w, tokens, reduction="none").sum(),
            lambda x, w: (x * upstream).sum(),
            lambda x, w: kernels.linear_cross_entropy(upstream, w, tokens),
            lambda x, w: (x * upstream).sum() + w.sum(),  # a gradient that is no matrix of its own
        ):
            found, expected = gradient(True, use), gradient(False, use)
            assert found.layout == torch.strided and torch.equal(found, expected)
        with torch.no_grad():
            weight = normal(50, 24)
            assert tied_embedding(tokens, weight, torch.float32)[1] is weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing, z_loss, softcap", [(0.0, 0.0, 0.0), (0.1, 1e-2, 3.0)])
def test_cross_entropy_follows_the_oracle(smoothing, z_loss, softcap, dtype, oracle):
    logits = normal(90, 301, dtype=dtype) * 2
    targets = torch.randint(0, 301, (90,), generator=torch.Generator().manual_seed(0))
    targets[:30] = logits[:30].float().argmax(-1)
    targets[::4] = -100
    options = (-100, smoothing, z_loss, softcap)
    compare("cross entropy", oracle, cross_entropy.forward, reference_cross_entropy.forward, logits, targets, *options, slack=2.0)
    *_, lse = cross_entropy.forward(logits, targets, *options)
    dlosses = normal(90)
    compare("backward", oracle, cross_entropy.backward, reference_cross_entropy.backward, dlosses, logits, targets, lse, *options, slack=2.0)


def test_of_equal_largest_logits_the_first_is_the_prediction():
    logits = torch.zeros(3, 40)
    logits[:, [5, 20, 39]] = 1.0
    *_, correct, _ = cross_entropy.forward(logits, torch.tensor([5, 20, 39]), -100, 0.0, 0.0, 0.0)
    assert correct.tolist() == [True, False, False]


SIZES = [(130, 150), (7,), (), (40000,)]  # a block holds 16384 elements


def adamw_state(dtype):
    params = [normal(*size, seed=1) if size else torch.tensor(0.5) for size in SIZES]
    grads = [normal(*size, dtype=dtype, seed=2) if size else torch.tensor(-2.0, dtype=dtype) for size in SIZES]
    return params, grads, [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw_follows_the_oracle_for_any_workers(dtype, oracle):
    decays = [0.1, 0.0, 0.0, 0.3]
    results = []
    for workers in WORKERS:
        state = adamw_state(dtype)
        with runtime.use(threads=workers):
            for step in (1, 2, 3):
                stats = adamw.step(*state, 1e-2, 0.9, 0.95, 1e-8, decays, step, 1.0, True)
        results.append([stats, *state[0], *state[2], *state[3]])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    plain, exact = adamw_state(dtype), [[x.double() for x in tensors] for tensors in adamw_state(dtype)]
    for step in (1, 2, 3):
        plain_stats = reference_adamw.step(*plain, 1e-2, 0.9, 0.95, 1e-8, decays, step, 1.0, True)
        exact_stats = reference_adamw.step(*exact, 1e-2, 0.9, 0.95, 1e-8, decays, step, 1.0, True)
    theirs, true = [plain_stats, *plain[0], *plain[2], *plain[3]], [exact_stats.double(), *exact[0], *exact[2], *exact[3]]
    for index, (a, b, c) in enumerate(zip(results[0], theirs, true)):
        oracle.check_rule(f"adamw {index}", a, b, c, slack=2.0)


def test_adamw_counts_non_finite_gradients_and_changes_nothing():
    state, untouched = adamw_state(torch.float32), adamw_state(torch.float32)
    state[1][3][20000], state[1][0][0, 0] = math.inf, math.nan
    stats = adamw.step(*state, 1e-2, 0.9, 0.95, 1e-8, [0.1] * 4, 1, 1.0, True)
    assert stats[2] == 2 and math.isnan(stats[0]) and math.isnan(stats[1])
    assert all(torch.equal(a, b) for tensors in (0, 2, 3) for a, b in zip(state[tensors], untouched[tensors]))


def test_adamw_updates_tensors_that_are_not_contiguous():
    base = normal(60, 40)
    param, same = base.T, base.T.contiguous()
    grad = normal(40, 60, seed=3)
    for p in (param, same):
        adamw.step([p], [grad], [torch.zeros_like(p)], [torch.zeros(40, 60)], 1e-2, 0.9, 0.95, 1e-8, [0.1], 1, 0.0, True)
    assert torch.equal(param, same) and torch.equal(base, same.T)
