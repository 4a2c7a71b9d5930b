"""Records: what a writer constructs is what a reader gets back, whatever version or accident came between."""

import dataclasses
import inspect
import json
import math
import types
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.config.schema import field_docs
from cllm.monitor.records import (
    ROWS,
    TIME_FIELDS,
    Device,
    Environment,
    Sample,
    StepResult,
    StepTiming,
    TrainResult,
    UnknownKindError,
    row_from_dict,
)
from cllm.monitor.typed_json import number, plain

TYPES = [*ROWS.values(), Environment, Sample, StepResult]


SIMPLE = {int: st.integers(-(2**63) + 1, 2**63 - 1), float: st.floats(), bool: st.booleans(), str: st.text(max_size=8)}


def values_of(hint):
    """A strategy for values of a field's type."""
    inner = [each for each in typing.get_args(hint) if each is not Ellipsis]
    if hint in SIMPLE:
        return SIMPLE[hint]
    if typing.get_origin(hint) is dict:
        return st.dictionaries(values_of(inner[0]), values_of(inner[1]), max_size=3)
    if typing.get_origin(hint) is tuple:
        return st.lists(values_of(inner[0]), max_size=3).map(tuple)
    if typing.get_origin(hint) is types.UnionType:
        return st.none() | values_of(inner[0])
    return records_of(hint)


def records_of(record):
    hints = typing.get_type_hints(record)
    return st.builds(record, **{each.name: values_of(hints[each.name]) for each in dataclasses.fields(record)})


any_record = st.one_of([records_of(each) for each in TYPES])


@given(any_record)
@settings(max_examples=200, deadline=None)
def test_a_record_comes_back_from_json_as_it_was(record):
    content = json.dumps(record.to_dict(), allow_nan=False)
    again = type(record).from_dict(json.loads(content))
    assert repr(again) == repr(record)  # equal, also where NaN is not equal to itself
    if type(record) in ROWS.values():
        assert json.loads(content)["kind"] == record.kind and repr(row_from_dict(json.loads(content))) == repr(record)


ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2) | st.just({"a": {}})


@given(any_record, st.data())
@settings(max_examples=200, deadline=None)
def test_an_unknown_field_is_ignored_and_an_odd_one_left_out_or_refused(record, data):
    values = json.loads(json.dumps(record.to_dict()))
    assert repr(type(record).from_dict({**values, "of a newer version": [1, {}]})) == repr(record)
    each = data.draw(st.sampled_from(dataclasses.fields(record)))
    optional = each.default is not dataclasses.MISSING or each.default_factory is not dataclasses.MISSING
    values[each.name] = data.draw(ODD)
    try:
        found = type(record).from_dict(values)
    except ValueError:
        assert not optional
    else:
        others = [other.name for other in dataclasses.fields(record) if other.name != each.name]
        assert all(repr(getattr(found, name)) == repr(getattr(record, name)) for name in others)
    values.pop(each.name)
    if optional:
        default = each.default_factory() if each.default is dataclasses.MISSING else each.default
        assert getattr(type(record).from_dict(values), each.name) == default
    else:
        with pytest.raises(ValueError, match=f"without {each.name}"):
            type(record).from_dict(values)


@pytest.mark.parametrize("values", [{}, {"kind": 3, "step": 1}, {"kind": "train"}, {"kind": "train", "step": 1}, {"kind": "layers", "step": "1"}])
def test_what_is_no_row_is_refused(values):
    with pytest.raises(ValueError):
        row_from_dict(values)
    with pytest.raises(UnknownKindError, match="router"):
        row_from_dict({"kind": "router", "step": 1})


def test_a_whole_number_that_no_counter_reaches_is_refused():
    row = {"kind": "machine", "step": 2**63, "event": "slow_disk", "action": "wait", "text": "", "seconds": 10**400}
    assert row_from_dict({**row, "step": 2**63 - 1}).seconds == math.inf
    with pytest.raises(ValueError, match="9223372036854775808"):
        row_from_dict(row)


def test_numbers_are_read_as_they_are_written():
    assert math.isnan(number("nan")) and number("-inf") == -math.inf and number(3) == 3.0
    assert number(10**400) == math.inf and number(-(10**400)) == -math.inf
    assert all(number(value) is None for value in (True, "3", "", None, [], {}))
    assert plain({"a": [math.nan, -math.inf, (1, True)], 2: None}) == {"a": ["nan", "-inf", [1, True]], "2": None}


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="=\r"), max_size=20)), max_size=4)
)
def test_samples_are_read_as_they_are_written(samples):
    written = [Sample(step=step, text=text.rstrip("\n")) for step, text in samples]
    assert Sample.all_in("cut off\n" + "".join(each.to_text() for each in written)) == written


def test_every_field_is_documented():
    """The reference of the file formats is made from these sentences."""
    for record in [*TYPES, Device, StepTiming, TrainResult]:
        assert record.__doc__ and record.__doc__ != f"{record.__name__}{inspect.signature(record)}"
        known = {name: text for base in record.__mro__ if dataclasses.is_dataclass(base) for name, text in field_docs(base).items()}
        for each in dataclasses.fields(record):
            assert known.get(each.name, "").endswith("."), f"{record.__name__}.{each.name}"


def test_fields_that_depend_on_the_hour_are_marked():
    assert {"seconds", "tokens_per_second", "memory_bytes", "data_seconds", "gpu_share"} <= TIME_FIELDS
    assert not TIME_FIELDS & {"step", "loss", "tokens", "gradient_norms", "text", "noise_scale"}
