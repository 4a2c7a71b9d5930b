"""Attention over a key-value cache with lengths on the device: what `attention` says of each row alone, and bits that nothing else changes."""

import pytest
import torch
from cllm_kernel_oracle import device  # loaded by conftest.py under this name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cllm import kernels, runtime
from cllm.kernels.triton.cached_attention import SECTION
from cllm.runtime.errors import UserError

BACKENDS = ["torch", "triton"]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(device(), dtype)


def inputs(batch: int, places: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32):
    """q, keys and values; the cache as `KVCache` lays it out."""
    return (
        drawn(batch, 1, heads, dim, dtype=dtype),
        drawn(batch, places, kv_heads, dim, dtype=dtype, seed=1),
        drawn(batch, places, kv_heads, dim, dtype=dtype, seed=2),
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])  # the backend stays
@given(data=st.data())
def test_each_row_is_that_of_attention_in_float64(serve, name, dtype, data):
    serve(name, "cached_attention")
    batch, kv_heads, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    places, dim = data.draw(st.sampled_from([1, 5, SECTION, SECTION + 1, 2 * SECTION + 70])), data.draw(st.sampled_from([8, 16, 40]))
    lengths = [data.draw(st.integers(0, places)) for _ in range(batch)]
    window, scale = data.draw(st.sampled_from([None, 1, 33, 300])), data.draw(st.sampled_from([None, -0.3]))
    q, keys, values = inputs(batch, places, kv_heads * group, kv_heads, dim, dtype)
    found = kernels.cached_attention(q, keys, values, torch.tensor(lengths, device=device()), window=window, scale=scale)
    assert found.dtype == dtype and found.is_contiguous()
    for row, length in enumerate(lengths):
        if not length:
            assert not found[row].any()
            continue
        alone = (x[row : row + 1, :length].double() for x in (keys, values))
        with runtime.use(backend="torch"):
            exact = kernels.attention(q[row : row + 1].double(), *alone, causal=True, window=window, scale=scale)
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(found[row : row + 1].double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_depends_on_what_lies_behind_the_length_the_room_or_other_rows(serve, dtype):
    serve("triton", "cached_attention")
    q, keys, values = inputs(3, 3 * SECTION, 6, 2, 16, dtype)
    lengths = torch.tensor([1, SECTION, SECTION + 9], device=device())
    whole = kernels.cached_attention(q, keys, values, lengths)
    for row, length in enumerate(lengths.tolist()):
        keys[row, length:], values[row, length:] = float("nan"), float("inf")
        for places in (length, length + 1, 3 * SECTION):
            part = slice(row, row + 1)
            alone = kernels.cached_attention(q[part], keys[part, :places], values[part, :places], lengths[part])
            assert torch.equal(alone, whole[part]), (row, places)
    assert torch.equal(kernels.cached_attention(q, keys, values, lengths), whole)


def test_reference_is_untouched_by_memory_that_was_never_written(serve):
    serve("torch", "cached_attention")
    q, keys, values = inputs(1, 4, 2, 1, 8)
    keys[:, 2:], values[:, 2:] = float("nan"), float("inf")
    assert kernels.cached_attention(q, keys, values, torch.tensor([2], device=device())).isfinite().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": torch.zeros(2, 2, 4, 8)}, "Expected q"),
        ({"q": torch.zeros(2, 1, 3, 8)}, "multiple of"),
        ({"values": torch.zeros(2, 6, 2, 8)}, "do not fit"),
        ({"lengths": torch.tensor([1, 2], dtype=torch.int32)}, "int64"),
        ({"lengths": torch.tensor([1])}, "int64"),
        ({"window": 0}, "window must be >= 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, said):
    q, keys, values = inputs(2, 5, 4, 2, 8)
    change = {name: value.to(device()) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    arguments = {"q": q, "keys": keys, "values": values, "lengths": torch.tensor([1, 2], device=device())} | change
    with pytest.raises(UserError, match=said):
        kernels.cached_attention(**arguments)
