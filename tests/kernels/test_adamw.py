"""adamw_ against torch.optim.AdamW in float64, its statistics, clipping, and what it does with non-finite gradients."""

import pytest
import torch

from cllm import kernels, runtime
from cllm.kernels.adamw import AdamWAgain, adamw_
from cllm.runtime.errors import UserError

SHAPES = [(33, 17), (5,), (1,), (0, 4), (2, 3, 40)]
DECAYS = [0.1, 0.0, 0.0, 0.1, 0.3]


def _inputs(oracle, dtype=torch.float32, grad_dtype=torch.float32, scale=1.0):
    i = oracle.Inputs(torch.float32, dtype)
    params = [i.normal(*shape[::-1]).T if len(shape) == 2 else i.normal(*shape) for shape in SHAPES]  # views too
    j = oracle.Inputs(grad_dtype, dtype, seed=5)
    return params, [[j.normal(*shape, scale=scale) for shape in SHAPES] for _ in range(4)]


def _torch_adamw(params, grads_of_steps, max_norm):
    params = [p.clone().requires_grad_() for p in params]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(params, DECAYS)]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6, foreach=False)
    for grads in grads_of_steps:
        for p, g in zip(params, grads):
            p.grad = g.clone()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
    return [p.detach() for p in params]


def _ours(params, grads_of_steps, max_norm, skip_nonfinite=True):
    params = [p.clone() for p in params]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    stats = [
        kernels.adamw_(
            params, grads, *moments, learning_rate=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decays=DECAYS, step=step,
            max_norm=max_norm, skip_nonfinite=skip_nonfinite,
        )
        for step, grads in enumerate(grads_of_steps, 1)
    ]  # fmt: skip
    return params, moments, stats


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_update_is_that_of_torch_in_float64(backend_name, max_norm, grad_dtype, oracle, serve):
    serve(backend_name, "adamw")
    exact = _torch_adamw(*_inputs(oracle, torch.float64, grad_dtype), max_norm)
    params, grads = _inputs(oracle, torch.float32, grad_dtype)
    plain = _torch_adamw(params, grads, max_norm)
    ours, _, _ = _ours(params, [[g.to(grad_dtype) for g in step] for step in grads], max_norm)
    for index, (found, base, truth) in enumerate(zip(ours, plain, exact)):
        oracle.check_rule(f"parameter {index}", found, base, truth)


def test_statistics_are_the_norm_the_largest_and_the_non_finite(backend_name, oracle, serve):
    serve(backend_name, "adamw")
    params, grads = _inputs(oracle)
    *_, stats = _ours(params, grads[:1], 0.5)
    flat = torch.cat([g.reshape(-1) for g in grads[0]]).double()
    expected = torch.stack([flat.norm(), flat.abs().max(), torch.zeros_like(flat[0])]).float()
    assert stats[0].dtype == torch.float32
    torch.testing.assert_close(stats[0], expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nothing_changes_when_a_gradient_is_not_finite(backend_name, bad, oracle, serve):
    serve(backend_name, "adamw")
    params, grads = _inputs(oracle)
    grads[0][0][3, 4] = bad
    grads[0][4][1, 1, 1] = bad
    updated, moments, stats = _ours(params, grads[:1], 1.0)
    assert stats[0][2] == 2
    assert all(torch.equal(a, b) for a, b in zip(updated, params))
    assert not any(m.any() for group in moments for m in group)
    updated, _, _ = _ours(params, grads[:1], 0.0, skip_nonfinite=False)
    assert not torch.isfinite(updated[0][3, 4]) and not torch.equal(updated[1], params[1])


def test_gradients_too_large_to_square_in_float32_are_measured_and_clipped(backend_name, oracle, serve):
    serve(backend_name, "adamw")
    params, grads = _inputs(oracle, scale=1e30)
    updated, _, stats = _ours(params, grads[:1], 1.0)
    assert torch.isfinite(stats[0]).all() and stats[0][0] > 1e30 and stats[0][2] == 0
    assert all(torch.isfinite(p).all() for p in updated)


def test_any_number_of_threads_gives_the_same_update(oracle, serve):
    serve("numba", "adamw")
    i = oracle.Inputs(torch.float32, torch.float32)
    params, grads = [i.normal(300, 501), i.normal(77), i.normal(900, 64)], [i.normal(300, 501), i.normal(77), i.normal(900, 64)]
    results = []
    for threads in (1, 2, 3, 64):
        updated, moments = [p.clone() for p in params], [[torch.zeros_like(p) for p in params] for _ in range(2)]
        with runtime.use(threads=threads):
            stats = kernels.adamw_(
                updated, grads, *moments, learning_rate=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decays=[0.1, 0, 0], step=1, max_norm=1.0
            )
        results.append([stats, *updated, *moments[0], *moments[1]])
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0]))


def test_parameters_that_require_gradients_are_updated_in_place():
    param = torch.nn.Parameter(torch.ones(4))
    version = param._version
    moments = torch.zeros(4), torch.zeros(4)
    kernels.adamw_([param], [torch.ones(4)], *[[m] for m in moments], learning_rate=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decays=[0.0], step=1)
    torch.testing.assert_close(param.detach(), torch.full((4,), 0.9))
    assert param._version > version


def test_lists_that_do_not_match_are_refused():
    p = [torch.zeros(3)]
    options = {"learning_rate": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decays": [0.0], "step": 1}
    with pytest.raises(ValueError, match="lists of one length"):
        kernels.adamw_(p, [], p, p, **options)
    with pytest.raises(ValueError, match="tensor 0 has shapes"):
        kernels.adamw_(p, [torch.zeros(4)], [torch.zeros(3)], [torch.zeros(3)], **options)
    with pytest.raises(ValueError, match="step >= 1"):
        kernels.adamw_(p, p, p, p, **{**options, "step": 0})


def test_the_statistics_alone_are_those_of_the_update_for_any_number_of_threads(backend_name, oracle, serve):
    serve(backend_name, "adamw")
    params, (grads, *_) = _inputs(oracle)
    *_, (expected,) = _ours(params, [grads], 0.0)
    assert torch.equal(kernels.gradient_statistics(grads), expected)
    large = [oracle.Inputs(torch.float32, torch.float32).normal(300_001), *grads]
    found = []
    for threads in (1, 2, 5):
        with runtime.use(threads=threads):
            found.append(kernels.gradient_statistics(large))
    assert all(torch.equal(each, found[0]) for each in found)
    norm = torch.cat([each.double().reshape(-1) for each in large]).norm()
    assert float(found[0][0]) == pytest.approx(float(norm), rel=1e-6) and found[0][2] == 0
    large[0][7] = float("nan")
    assert kernels.gradient_statistics(large)[2] == 1 and torch.equal(kernels.gradient_statistics([]), torch.zeros(3, device="cpu"))


def test_tensors_that_stay_where_they_are_get_the_bits_of_a_first_update():
    """Their addresses are looked up once; moved, of another kind or with other decays they are new."""
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(0)
    shapes = (7, 5), (40,)
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "max_norm": 0.5}
    ours, theirs = ([[torch.zeros(shape) for shape in shapes] for _ in range(3)] for _ in range(2))
    grads, again, served = [torch.empty(shape) for shape in shapes], AdamWAgain(), []
    for step in range(1, 8):
        for grad in grads:
            grad.copy_(torch.randn(grad.shape, generator=generator))
        if step == 4:
            grads = [grad.to(torch.bfloat16) for grad in grads]
        numbers = {"learning_rate": 0.1 / step, "weight_decays": [0.1 if step < 6 else 0.2, 0.0], "step": step}
        params, *moments = theirs
        expected = adamw_(params, grads, *moments, **numbers, **options)
        params, *moments = ours
        found = again.call(params, grads, *moments, **numbers, **options)
        served.append(found is not None)
        if found is None:
            found = adamw_(params, grads, *moments, **numbers, **options)
        assert torch.equal(found, expected)
        for mine, other in zip(ours, theirs):
            assert all(map(torch.equal, mine, other))
    assert served == [False, True, True, False, True, False, True]
    with pytest.raises(UserError, match="learning_rate"):
        again.call(ours[0], grads, *ours[1:], learning_rate=-1.0, weight_decays=[0.2, 0.0], step=8, **options)
