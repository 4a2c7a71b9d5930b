"""JSON of strangers: what Python's own reader lets through is refused in time, and all that is good is read as json reads it."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.serve.errors import Refused
from cllm.serve.strict_json import MOST_DEPTH, parse, parse_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.booleans())
def test_what_json_writes_is_read_as_json_reads_it(value, ascii):
    text = json.dumps(value, ensure_ascii=ascii)
    assert parse(text.encode("utf-8")) == json.loads(text)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_an_object_or_an_error_with_a_sentence(body):
    try:
        assert isinstance(parse_object(body), dict)
    except Refused as error:
        assert error.status == 400 and error.code == "invalid_json" and error.message.endswith(".") and error.body()["error"]["message"]


@pytest.mark.parametrize(
    "body, words",
    [
        (b"", "empty"),
        (b"[1]", "got a list"),
        (b'"x"', "got a text"),
        (b"7", "got a number"),
        (b"null", "got null"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"1" * 5000 + b"}", "5,000 digits"),
        (b'{"a": [12, "' + b"x" * 17 + b'", ' + b"1" * 41 + b"]}", "41 digits"),
        (b'{"a": 1.' + b"1" * 5000 + b"}", "too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' stands in one object twice"),
        (b'{"x": {"a": 1, "a": 1}}', "twice"),
        (rb'{"a": "\ud800"}', r"half of a surrogate pair \(\\ud800\)"),
        (rb'{"a": [{"\udfff": 1}]}', "surrogate"),
        (b'{"a": "\xff"}', "no UTF-8"),
        (b'{"a": \xed\xa0\x80}', "no UTF-8"),
        (b'{"a": 1,}', "at line 1, column"),
        (b"{'a': 1}", "at line 1, column"),
        (b'\xef\xbb\xbf{"a": 1}', "byte order mark|BOM"),
    ],
)
def test_what_is_no_strict_json_is_named(body, words):
    with pytest.raises(Refused, match=words):
        parse_object(body)


def test_words_that_look_like_keys_are_not_counted_as_such():
    value = {'a": ': '"b":', "c": [{'"': "x: 1", "\\": ':"'}, '"d" : ']}
    assert parse(json.dumps(value, separators=(",", " \n:")).encode()) == value
    with pytest.raises(Refused, match="'c' stands in one object twice"):
        parse_object(b'{"a": [{"c": ":", "b": "\\"", "c": 1}]}')


def test_a_surrogate_pair_is_a_character():
    assert parse(rb'["\ud83d\ude00"]') == ["\U0001f600"]


def test_depth_is_limited_and_deep_nesting_is_answered_at_once():
    assert parse(b"[" * MOST_DEPTH + b"]" * MOST_DEPTH)
    deep = (b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"[" * 100_000)
    for body in (b"[" * (MOST_DEPTH + 2) + b"]" * (MOST_DEPTH + 2), *deep):
        started = time.process_time()
        with pytest.raises(Refused, match=r"more than 64 deep|no valid JSON"):
            parse(body)
        assert time.process_time() - started < 5.0  # guards against quadratic work, which would take minutes


def test_a_long_body_is_no_deep_one():
    value = {"prompt": [[1, 2, 3]] * 1000, "stop": ["a"] * 1000}
    assert parse_object(json.dumps(value).encode()) == value
