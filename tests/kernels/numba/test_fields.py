"""Tables of numbers are made and read by name: a number cannot get into another one's place."""

import ast
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.launch import Kernel, put_float32

KERNELS = Path(__file__).parents[3] / "kernels" / "numba"


class _Three(NamedTuple):
    first: int
    second: int
    third: int = 7


class _More(NamedTuple):
    fourth: int
    out: int


P, _three = fields(_Three)
Q, _more = fields(_More, start=len(P))


def _write(p, f, task, worker):
    put_float32(p[Q.out], task, np.float32(1000 * p[P.first] + 100 * p[P.second] + 10 * p[P.third] + p[Q.fourth]))


def test_a_table_is_in_the_order_of_the_fields_however_it_is_written():
    assert _three(second=2, first=1) == (1, 2, 7) == _three(third=7, first=1, second=2)
    assert P == (0, 1, 2) and Q == (3, 4) and (P.third, Q.fourth) == (2, 3)


@pytest.mark.parametrize(
    ("positional", "named", "message"),
    [
        ((), {"first": 1}, "second"),
        ((), {"first": 1, "second": 2, "thrid": 3}, "thrid"),
        ((1, 2, 3), {}, "positional"),
        ((1,), {"second": 2}, "positional"),
    ],
)
def test_a_field_that_is_missing_unknown_or_without_its_name_is_refused(positional, named, message):
    with pytest.raises(TypeError, match=rf"_Three\(\).*{message}"):
        _three(*positional, **named)


def test_a_kernel_reads_every_field_in_its_place():
    out = torch.zeros(2)
    Kernel(_write)(2, 1, (*_three(first=1, second=2, third=3), *_more(out=out.data_ptr(), fourth=4)))
    assert out.tolist() == [1234.0, 1234.0]


def _launches():
    """(file, line, the expression of the table) of every launch of a kernel in the package."""
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and len(node.args) >= 3 and ast.unparse(node.func).endswith(("_kernel", "kernel", "_kernel)")):
                yield path.name, node.lineno, node.args[2]


def test_no_launch_in_the_package_passes_numbers_by_position():
    launches = list(_launches())
    assert len(launches) >= 15
    for file, line, table in launches:
        by_name = isinstance(table, (ast.Name, ast.Attribute)) or (isinstance(table, ast.Call) and not table.args)
        joined = isinstance(table, ast.Tuple) and all(isinstance(each, ast.Starred) for each in table.elts)
        assert by_name or joined, f"{file}:{line} launches with {ast.unparse(table)}"
