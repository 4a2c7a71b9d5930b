"""Numbers in sentences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.runtime.quantities import counted, size


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.00 kB"), (9_994, "9.99 kB"), (9_996, "10.0 kB"),
                          (340_000, "340 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"), (8_000_000, "8.00 MB"), (2 * 10**15, "2,000 TB")]
)  # fmt: skip
def test_sizes_read_well(number, words):
    assert size(number) == words


@given(st.integers(0, 10**16))
def test_sizes_are_right_to_three_digits(number):
    value, unit = size(number).replace(",", "").split()
    scale = {"byte": 1, "bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert abs(float(value) * scale - number) <= 0.0051 * number


def test_one_is_singular():
    assert [counted(n, "token") for n in (0, 1, 2, 1200)] == ["0 tokens", "1 token", "2 tokens", "1,200 tokens"]
    assert counted(2, "entry", "entries") == "2 entries"
