"""What recorded work does by launches instead of operations of torch: the same bits, or not at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from cllm import runtime
from cllm.kernels.numba import copies

DTYPES = [torch.float32, torch.bfloat16, torch.int64]


def made(generator, shape, dtype):
    return torch.randint(-1000, 1000, shape, generator=generator).to(dtype) / (8 if dtype.is_floating_point else 1)


def laid_out(generator, tensor):
    """The same values in a layout of another kind."""
    kind = int(torch.randint(0, 3, (), generator=generator))
    if kind == 0 or tensor.dim() < 2:
        return tensor
    if kind == 1:  # rows of a wider matrix
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype)
        wide[..., : tensor.shape[-1]] = tensor
        return wide[..., : tensor.shape[-1]]
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    number=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 3]),
)
def test_copies_have_the_bits_of_torch_in_every_layout(seed, shape, number, dtype, threads):
    generator = torch.Generator().manual_seed(seed)
    dim = seed % len(shape)
    parts = []
    for _ in range(number):
        sizes = list(shape)
        sizes[dim] = int(torch.randint(0, 9, (), generator=generator))
        parts.append(laid_out(generator, made(generator, sizes, dtype)))
    equal = [laid_out(generator, made(generator, shape, dtype)) for _ in range(number)]
    cases = [
        (copies.cat, torch.cat, parts, dim),
        (copies.cat, torch.cat, parts, dim - len(shape)),
        (copies.stack, torch.stack, equal, dim),
        (copies.stack, torch.stack, equal, dim - len(shape) - 1),
    ]
    with runtime.use(threads=threads):
        for ours, theirs, tensors, place in cases:
            expected = theirs(tensors, place)
            out = torch.full_like(expected, 7)
            if ours(out, tensors, place):
                assert torch.equal(out, expected)
            else:
                assert not all(each.is_contiguous() for each in tensors) or out.dim() > 3
                assert (out == 7).all()
        out = torch.full(shape, 7).to(dtype)
        if copies.clone(out, equal[0]):
            assert torch.equal(out, equal[0])


@pytest.mark.parametrize("size", [1, 37, 40_000])
def test_a_long_stretch_is_copied_in_parts(size):
    for tensors in ([torch.randn(size)], [torch.randn(5, size), torch.randn(3, size)]):
        out = torch.empty_like(torch.cat(tensors))
        assert copies.cat(out, tensors) and torch.equal(out, torch.cat(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 8192, 20_011])
def test_sums_have_the_bits_of_torch(size, dtype):
    a, b = (torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(2))
    out = torch.empty_like(a)
    assert copies.add(out, a, b) and torch.equal(out, a + b)


def test_what_is_no_plain_sum_is_left_to_torch():
    a = torch.zeros(4, 6)
    for b, options in ((2.0, {}), (a[0], {}), (a.bfloat16(), {}), (a, {"alpha": 2}), (a.T.contiguous().T, {})):
        assert not copies.add(torch.empty_like(a), a, b, **options)
    assert not copies.add(torch.empty(4, dtype=torch.int64), torch.ones(4).long(), torch.ones(4).long())
