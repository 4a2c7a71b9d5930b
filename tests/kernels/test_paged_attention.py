"""Attention over pages: the float64 oracle, the bits of `attention` of each sequence alone, and memory that nobody may look at."""

import math
from copy import copy

import numpy as np
import pytest
import torch
from cllm_kernel_oracle import device  # loaded by conftest.py under this name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cllm import kernels, runtime
from cllm.kernels.paged_attention import PAGE
from cllm.kernels.quantization import dequantize_rows, quantize_rows
from cllm.runtime.errors import UserError

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
NAN = float("nan")


class Pool:
    """A pool of pages, NaN where no sequence has written, and the sequences in it."""

    def __init__(self, num_pages: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.kv_heads, self.dim = dtype, kv_heads, dim
        shape = (num_pages, PAGE, kv_heads, dim)
        self.keys, self.values = (torch.full(shape, NAN, dtype=dtype, device=device()) for _ in range(2))
        self.free = torch.randperm(num_pages, generator=self.generator, device="cpu").tolist()
        self.rows: list[list[int]] = []
        self.alone: list[tuple[torch.Tensor, torch.Tensor]] = []

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu").to(device(), self.dtype)

    def add(self, length: int, shared: int = 0) -> None:
        """A sequence; its first `shared` pages are those of the sequence before."""
        pages = self.rows[-1][:shared] if shared else []
        pages = pages + [self.free.pop() for _ in range(-(-length // PAGE) - len(pages))]
        new = length - shared * PAGE
        k, v = self.normal(new, self.kv_heads, self.dim), self.normal(new, self.kv_heads, self.dim)
        if shared:
            k, v = (torch.cat((old[: shared * PAGE], x)) for old, x in zip(self.alone[-1], (k, v)))
        for pool, x in ((self.keys, k), (self.values, v)):
            for number, page in enumerate(pages):
                part = x[number * PAGE : (number + 1) * PAGE]
                pool[page, : len(part)] = part
        self.rows.append(pages)
        self.alone.append((k, v))

    def table(self) -> torch.Tensor:
        width = max(map(len, self.rows)) + 1
        filled = [row + [-(2**31)] * (width - len(row)) for row in self.rows]  # numbers that nobody may follow
        return torch.tensor(filled, dtype=torch.int32, device=device())

    def attention(self, q: torch.Tensor, queries: list[int], **options) -> torch.Tensor:
        lengths = torch.tensor([len(k) for k, _ in self.alone], device=device())
        return kernels.paged_attention(q, self.keys, self.values, self.table(), lengths, torch.tensor(queries, device=device()), **options)

    def in_int8(self) -> "Pool":
        """The same, to be asked with its `scales`; what nobody has written stays NaN."""
        other = copy(self)
        (other.keys, of_keys), (other.values, of_values) = quantize_rows(self.keys), quantize_rows(self.values)
        other.scales = of_keys, of_values
        return other

    def of_dtype(self, dtype: torch.dtype) -> "Pool":
        other = copy(self)
        other.keys, other.values = self.keys.to(dtype), self.values.to(dtype)
        return other

    def of_int8(self, dtype: torch.dtype) -> "Pool":
        """What lies in a pool of int8, in numbers of `dtype`."""
        other = copy(self)
        other.keys, other.values = (dequantize_rows(*each, dtype) for each in zip((self.keys, self.values), self.scales))
        return other


def _alone(pool: Pool, q: torch.Tensor, queries: list[int], dtype: torch.dtype, **options) -> torch.Tensor:
    parts = zip(q.split(queries), pool.alone)
    return torch.cat([kernels.attention(x[None].to(dtype), k[None].to(dtype), v[None].to(dtype), causal=True, **options)[0] for x, (k, v) in parts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])  # the backend stays
@given(data=st.data())
def test_each_row_is_that_of_attention_in_float64(serve, backend_name, dtype, data):
    if backend_name == "numba" and dtype == torch.float16:
        return
    serve(backend_name, "paged_attention")
    kv_heads, group, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.sampled_from([8, 16, 40]))
    lengths = data.draw(st.lists(st.sampled_from([1, 5, PAGE, PAGE + 1, 2 * PAGE + 70]), min_size=1, max_size=3))
    many = (17,) if backend_name == "triton" else (70, max(lengths))  # the interpreter takes its time for each query
    queries = [data.draw(st.sampled_from(sorted({min(count, length) for count in (1, 3, *many)}))) for length in lengths]
    window, scale = data.draw(st.sampled_from([None, 1, 33, 150])), data.draw(st.sampled_from([None, -0.3]))
    pool = Pool(12, kv_heads, dim, dtype)
    for length in lengths:
        pool.add(length)
    q = pool.normal(sum(queries), kv_heads * group, dim)
    found = pool.attention(q, queries, window=window, scale=scale)
    assert found.dtype == dtype and found.is_contiguous()
    with runtime.use(backend="torch"):
        exact = _alone(pool, q, queries, torch.float64, window=window, scale=scale)
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("window", [None, 1, 190])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 1, 16), (4, 2, 64), (3, 3, 20), (2, 1, 256), (66, 1, 16)])
def test_rows_have_the_bits_of_attention_of_their_sequence_alone(serve, dtype, window, heads, kv_heads, dim):
    serve("numba", "paged_attention")
    pool = Pool(20, kv_heads, dim, dtype)
    for length, shared in ((300, 0), (290, 2), (1, 0), (PAGE, 0), (400, 1), (PAGE + 1, 0)):
        pool.add(length, shared)
    for queries in ([1] * 6, [200, 1, 1, 64, 65, 2], [300, 290, 1, PAGE, 400, PAGE + 1]):
        q = pool.normal(sum(queries), heads, dim)
        expected = _alone(pool, q, queries, dtype, window=window)
        for threads in (1, 2, 64):
            with runtime.use(threads=threads):
                assert torch.equal(pool.attention(q, queries, window=window), expected), (queries, threads)


@DTYPES
def test_queries_in_pieces_and_of_strided_memory_get_the_same_bits(serve, dtype):
    serve("numba", "paged_attention")
    pool = Pool(4, 2, 32, dtype)
    pool.add(330)
    q = pool.normal(150, 8, 32)
    whole, (k, v) = pool.attention(q, [150]), pool.alone[0]
    assert torch.equal(pool.attention(q.transpose(0, 1).contiguous().transpose(0, 1), [150]), whole)
    for begin, end in ((0, 1), (17, 100), (100, 150)):
        pool.alone = [(k[: 330 - 150 + end], v[: 330 - 150 + end])]
        assert torch.equal(pool.attention(q[begin:end], [end - begin]), whole[begin:end]), begin


def test_a_row_of_a_gpus_tiles_has_the_same_bits_in_any_company_and_room(serve, monkeypatch):
    """The interpreter multiplies by BLAS, whose bits depend on the place of a row in a matrix; those of a GPU's matrix units do not."""
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("mk,kn->mn", a, b, dtype=dtype))
    serve("triton", "paged_attention")
    for heads, kv_heads, window in ((4, 2, None), (18, 1, 150)):
        pool, queries = Pool(9, kv_heads, 16, torch.float32), [6, 1, 2]
        for length in (530, 70, PAGE + 1):
            pool.add(length)
        q = pool.normal(sum(queries), heads, 16)
        whole = pool.attention(q, queries, window=window)
        alone, rows = pool.alone, pool.rows
        for row, begin, end in ((0, 2, 6), (1, 6, 7), (2, 7, 8)):
            seen = len(alone[row][0]) - (sum(queries[: row + 1]) - end)
            pool.alone, pool.rows = [(alone[row][0][:seen], alone[row][1][:seen])], [rows[row]]
            assert torch.equal(pool.attention(q[begin:end], [end - begin], window=window), whole[begin:end]), (heads, row, begin)


def test_neither_pages_before_the_window_nor_memory_behind_the_length_are_looked_at(serve, backend_name):
    serve(backend_name, "paged_attention")
    pool, queries = Pool(9, 1, 16, torch.float32), [1, 20]
    pool.add(500)
    pool.add(2 * PAGE + 102)
    q = pool.normal(21, 2, 16)
    expected = pool.attention(q, queries, window=100)
    assert expected.isfinite().all()
    for row, first in ((0, 3), (1, 1)):  # of the newest queries' windows
        for place in range(first):
            pool.keys[pool.rows[row][place]] = NAN
            pool.rows[row][place] = 12345
    assert torch.equal(pool.attention(q, queries, window=100), expected)


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(4, 2, 64, None), (3, 3, 20, 190), (66, 1, 16, None)])
def test_a_pool_of_int8_gives_what_its_numbers_give_on_a_cpu_bit_for_bit(serve, backend_name, dtype, heads, kv_heads, dim, window):
    if backend_name == "triton" and window is None:
        return  # the interpreter takes its time
    serve(backend_name, "paged_attention")
    pool = Pool(20, kv_heads, dim, dtype)
    for length, shared in ((300, 0), (290, 2), (1, 0)):
        pool.add(length, shared)
    pool = pool.in_int8()
    for queries in ([1] * 3, [200, 1, 1], [3, 70, 1])[: 1 if backend_name == "triton" else 3]:
        q = pool.normal(sum(queries), heads, dim)
        expected = pool.of_int8(dtype).attention(q, queries, window=window)
        for threads in (1, 3) if backend_name == "numba" else (1,):
            with runtime.use(threads=threads):
                found = pool.attention(q, queries, window=window, scales=pool.scales)
            tolerance = 4 * torch.finfo(dtype).eps if backend_name == "triton" else 0.0  # whose blocks of keys are smaller
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=str((queries, threads)))


@DTYPES
def test_int8_is_as_near_to_float64_as_the_dtype_and_to_the_numbers_before_as_its_steps_allow(serve, backend_name, dtype):
    serve(backend_name, "paged_attention")
    pool, queries, dim = Pool(12, 2, 40, dtype), [1, 3 if backend_name == "triton" else 70], 40
    for length in (PAGE + 1, 2 * PAGE + 70):
        pool.add(length)
    q = pool.normal(sum(queries), 4, dim)
    of_int8 = pool.in_int8()
    found = of_int8.attention(q, queries, scales=of_int8.scales).double()
    with runtime.use(backend="torch"):
        exact, before = (each.of_dtype(torch.float64).attention(q.double(), queries) for each in (of_int8.of_int8(torch.float64), pool))
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)
    # A score moves by at most d, so a probability by a factor of e^(2 d) at most, and an output by that share of the largest value and half a step.
    of_keys, of_values = (each.nan_to_num(0.0).amax().item() for each in of_int8.scales)
    d = dim**-0.5 * q.double().abs().sum(-1).amax().item() * of_keys / 2
    moved = (exact - before).abs().amax().item()
    assert 0 < moved <= math.expm1(2 * d) * pool.values.nan_to_num(0.0).abs().amax().item() + of_values / 2


def test_no_tokens_are_no_rows(serve, backend_name):
    serve(backend_name, "paged_attention")
    pool = torch.zeros(2, PAGE, 1, 8, device=device())
    none = torch.zeros(0, dtype=torch.int64, device=device())
    found = kernels.paged_attention(pool[0, :0, :].expand(0, 4, 8), pool, pool, torch.zeros(0, 3, dtype=torch.int32, device=device()), none, none)
    assert found.shape == (0, 4, 8)


def test_the_operator_is_traced_as_one(serve):
    serve("numba", "paged_attention")
    pool = Pool(4, 2, 32, torch.float32)
    pool.add(200)
    q, one = pool.normal(1, 4, 32), torch.ones(1, dtype=torch.int64)
    torch.library.opcheck(torch.ops.cllm.paged_attention.default, (q, pool.keys, pool.values, pool.table(), one * 200, one, 0, 0.1))


INT8 = {name: torch.zeros(5, PAGE, 2, 8, dtype=torch.int8) for name in ("keys", "values")} | {"scales": (torch.ones(5, PAGE, 2),) * 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": torch.zeros(1, 3, 4, 8)}, "Expected q"),
        ({"q": torch.zeros(3, 4, 16)}, "do not fit"),
        ({"q": torch.zeros(3, 3, 8)}, "multiple of"),
        ({"q": torch.zeros(3, 4, 8, dtype=torch.bfloat16)}, "must agree"),
        ({"values": torch.zeros(5, PAGE, 1, 8)}, "do not fit"),
        ({"keys": torch.zeros(5, 64, 2, 8), "values": torch.zeros(5, 64, 2, 8)}, "pages, 128"),
        ({"keys": torch.zeros(5, PAGE, 8, 2).transpose(2, 3)}, "contiguous"),
        ({"pages": torch.zeros(2, 2, dtype=torch.int64)}, "int32"),
        ({"lengths": torch.tensor([1, 2], dtype=torch.int32)}, "lengths must be int64"),
        ({"queries": torch.tensor([3])}, r"queries must be int64 \(2,\)"),
        ({"window": 0}, "window must be >= 1"),
        ({"scales": (torch.ones(5, PAGE, 2), torch.ones(5, PAGE, 2))}, "belong to keys and values of int8"),
        ({**INT8, "keys": torch.zeros(5, PAGE, 2, 8)}, "belong to keys and values of int8"),
        ({**INT8, "scales": (torch.ones(5, PAGE, 2), torch.ones(5, PAGE, 1))}, r"scales must be float32 \(5, 128, 2\)"),
        ({**INT8, "scales": (torch.ones(5, PAGE, 2, dtype=torch.float64), torch.ones(5, PAGE, 2))}, "scales must be float32"),
        ({**INT8, "q": torch.zeros(3, 4, 8, dtype=torch.int8)}, "q must be floating point"),
        ({**INT8, "scales": None}, "must agree"),
        ({"queries": torch.tensor([3, 0])}, "queries must be >= 1 and 3 together"),
        ({"queries": torch.tensor([1, 1])}, "queries must be >= 1 and 3 together"),
        ({"lengths": torch.tensor([1, 5])}, "must be >= queries"),
        ({"lengths": torch.tensor([257, 5])}, "257 keys need 3 pages"),
        ({"pages": torch.tensor([[5, 1], [3, 9]], dtype=torch.int32)}, "pages holds 5, expected 0 <= page < 5"),
        ({"pages": torch.tensor([[0, -1], [3, 9]], dtype=torch.int32)}, "pages holds -1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, said):
    with runtime.use(backend="numba"):
        arguments = {
            "q": torch.zeros(3, 4, 8),
            "keys": torch.zeros(5, PAGE, 2, 8),
            "values": torch.zeros(5, PAGE, 2, 8),
            "pages": torch.tensor([[0, 1], [2, 9]], dtype=torch.int32),
            "lengths": torch.tensor([200, 5]),
            "queries": torch.tensor([2, 1]),
        }
        assert not kernels.paged_attention(**arguments).any()
        with pytest.raises(UserError, match=said):
            kernels.paged_attention(**arguments | change)
