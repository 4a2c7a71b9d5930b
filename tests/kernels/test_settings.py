"""The settings of `runtime.use` reach everything that a call of a kernel leads to, also its gradient in another thread."""

import pytest
import torch

from cllm import kernels, runtime
from cllm.runtime import gpu


def _recorded(call) -> set[tuple[str, str]]:
    with runtime.profiler.record() as recording:
        call()
    return {(kernel.name, kernel.backend) for kernel in recording.kernels()}


def test_a_gradient_is_computed_by_the_backend_of_the_forward_pass(case, oracle):
    """`oracle.run` computes gradients in a thread of their own, as autograd does on a GPU."""
    with runtime.use(backend="torch"):
        served = _recorded(lambda: oracle.run(case, case.ours, torch.float32, torch.float32))
    assert {backend for _, backend in served} == {"torch"}, served


def test_a_gradient_keeps_the_settings_of_the_forward_pass_and_not_those_around_it(oracle):
    x = torch.ones(3, 5, requires_grad=True)
    with runtime.use(backend="torch"):
        y = kernels.softmax(x)
    with runtime.use(backend="numba"):
        served = _recorded(lambda: oracle.backward([y], [torch.ones_like(y)]))
    assert {backend for _, backend in served} == {"torch"}


def test_a_gradient_is_planned_for_the_gpu_of_the_forward_pass(oracle, monkeypatch):
    from cllm.kernels.torch import softmax

    seen = []
    monkeypatch.setattr(softmax, "backward", lambda dy, y: seen.append(gpu.gpu_of(y.device)) or torch.zeros_like(y))
    with runtime.use(backend="torch"), gpu.described(gpu.DESCRIBED["h200"]):
        y = kernels.softmax(torch.ones(3, 5, requires_grad=True))
    oracle.backward([y], [torch.ones_like(y)])
    assert seen == [gpu.DESCRIBED["h200"]]


@pytest.mark.parametrize("retain", [False, True])
def test_settings_are_kept_for_a_second_backward_and_end_with_it(oracle, retain):
    x = torch.ones(3, 5, requires_grad=True)
    with runtime.use(backend="torch"):
        y = kernels.softmax(x)
    before = runtime.settings()
    for _ in range(1 + retain):
        y.backward(torch.ones_like(y), retain_graph=retain)
        assert runtime.settings() == before
