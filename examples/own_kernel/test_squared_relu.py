"""How a kernel is tested: against float64, with the same bits for any number of workers, and as an operator of PyTorch.

pytest examples/own_kernel
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from squared_relu import squared_relu

from cllm import runtime

SHAPES = [(1,), (7, 13), (3, 5, 4096), (0, 4)]


def both(x, dy):
    x = x.clone().requires_grad_()
    y = squared_relu(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def plain(x, dy):
    x = x.clone().requires_grad_()
    y = torch.clamp(x, min=0) ** 2
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_are_within_the_rounding_of_the_dtype(shape, dtype):
    x, dy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for ours, exact in zip(both(x, dy), plain(x.double(), dy.double())):
        torch.testing.assert_close(ours.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_any_number_of_workers_gives_the_same_bits():
    x, dy = torch.randn(2, 50, 1001)
    results = []
    for threads in (1, 2, 3, 64):
        with runtime.use(threads=threads):
            results.append(both(x, dy))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_it_is_a_proper_operator():
    torch.library.opcheck(squared_relu, (torch.randn(5, 9, requires_grad=True),))
