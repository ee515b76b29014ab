"""The canonical encoding of a single JSON value; that of whole requests is tested through keys, in test_keys.py."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_edge_cache.canonical import MAX_DEPTH, encode_json

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab/"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)


def distinct(value: object) -> object:
    """The same, but True is not 1, and 1.0 is 1."""
    if isinstance(value, dict):
        return {name: distinct(item) for name, item in value.items()}
    if isinstance(value, list):
        return [distinct(item) for item in value]
    return (type(value) is bool, value)


@given(json_values, json_values)
def test_values_share_an_encoding_exactly_if_they_are_equal(one: object, other: object) -> None:
    assert (encode_json(one, "x") == encode_json(other, "x")) == (distinct(one) == distinct(other))


@given(json_values)
def test_an_encoding_is_one_messagepack_value(value: object) -> None:
    """So it ends where its value ends, and encodings one after another are unambiguous."""
    decoder = msgspec.msgpack.Decoder()
    decoder.decode(encode_json(value, "x"))
    with pytest.raises(msgspec.DecodeError):
        decoder.decode(encode_json(value, "x") + encode_json(None, "x"))


def test_the_order_of_keys_does_not_count_and_numbers_are_not_rounded() -> None:
    assert encode_json({"a": 1, "b": [{"c": 2, "d": 0.0}]}, "x") == encode_json(
        {"b": [{"d": 0, "c": 2}], "a": 1.0}, "x"
    )
    assert encode_json({"temperature": 0.701}, "x") != encode_json({"temperature": 0.7}, "x")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"a": [math.nan]}, r"body\['a'\]\[0\] must be a finite number"),
        ({"a": "\ud800"}, r"body\['a'\] contains a lone surrogate"),
        ({"a": math.inf}, "finite"),
    ],
)
def test_the_message_of_a_refusal_names_the_place(value: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        encode_json(value, "body")


def test_what_is_no_json_value_is_refused() -> None:
    with pytest.raises(TypeError, match=r"body\['a'\] must be a JSON value, not bytes"):
        encode_json({"a": b"x"}, "body")


def test_nesting_is_limited() -> None:
    value: object = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    encode_json(value, "body")
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        encode_json([value], "body")
