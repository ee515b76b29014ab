"""A body is parsed as every parser would parse it, or refused with a message that says what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_edge_cache.canonical import MAX_DEPTH
from llm_edge_cache.gateway.protocols import BadRequestError, parse_body


def refusal(raw: bytes) -> BadRequestError:
    with pytest.raises(BadRequestError) as caught:
        parse_body(raw)
    assert caught.value.status == 400
    return caught.value


def canonical(fields: dict[str, Any]) -> bytes:
    return parse_body(json.dumps(fields).encode()).canonical


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"", "not valid JSON"),
        (b'{"a":', "not valid JSON"),
        (b'{"a":1}x', r"trailing characters \(byte 8\)"),
        (b"{'a':1}", r"\(byte 1\)"),
        (b'{"a":1,}', r"\(byte 7\)"),
        (b'{"a":NaN}', r"NaN and infinities are not JSON numbers \(byte 5\)"),
        (b'{"a":[Infinity]}', "NaN and infinities are not JSON numbers"),
        (b'{"a":-Infinity}', "NaN and infinities are not JSON numbers"),
        (b'{"a":1e999}', "a number is too large"),
        (b'{"a":' + b"9" * 5000 + b"}", "out of range"),
        (b'{"a":"\xff"}', "not valid UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "not valid UTF-8"),
        (b'{"a":"\\ud800"}', "lone surrogate"),
        (b'{"\\udc00":1}', "surrogate"),
        (b"\xef\xbb\xbf{}", r"\(byte 0\)"),
        (b'{"a":"\x00"}', "not valid JSON"),
    ],
)
def test_what_is_no_json_is_refused(raw: bytes, complaint: str) -> None:
    error = refusal(raw)
    assert error.code == "invalid_json"
    with pytest.raises(BadRequestError, match=complaint):
        parse_body(raw)


@pytest.mark.parametrize(
    ("raw", "kind"),
    [(b"[]", "an array"), (b'"x"', "a string"), (b"1.5", "a number"), (b"true", "true"), (b"null", "null")],
)
def test_what_is_no_object_is_refused(raw: bytes, kind: str) -> None:
    error = refusal(raw)
    assert error.code == "not_an_object"
    assert kind in error.message


def test_nesting_is_limited_whatever_the_interpreter_s_own_limit() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' * depth + b"1" + b"}" * depth

    assert parse_body(nested(MAX_DEPTH)).fields
    for depth in (MAX_DEPTH + 1, 900, 200_000):
        error = refusal(nested(depth))
        assert error.code == "too_deep"
        assert "nested" in error.message


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1,"a":2}',
        b'{"a":1,"a":1}',
        b'{"a":1,"b":{"c":[{"d":1,"d":2}]}}',
        b'{"a":1,"\\u0061":2}',
        b'{"\\u0022":1,"\\"":2}',
        b'{"":1,"":2}',
        # Quotes that are written as \u0022 would make up for those of the key that is dropped.
        b'{"a":1,"a":"\\u0022\\u0022"}',
        b'{"a":{"x":"y"},"a":"\\u0022\\u0022\\u0022\\u0022\\u0022\\u0022"}',
        b'{"user":1,"user":2}',
    ],
)
def test_a_key_twice_is_refused_at_any_depth_and_in_any_spelling(raw: bytes) -> None:
    error = refusal(raw)
    assert error.code == "duplicate_key"
    assert "twice" in error.message


def test_the_message_about_a_key_twice_quotes_no_more_than_its_beginning() -> None:
    assert len(refusal(b'{"%b":1,"%b":2}' % (b"k" * 9999, b"k" * 9999)).message) < 120


# Texts as clients write them: keys and strings in several spellings, members of one object that may share a key.
spelled = st.sampled_from(['"a"', '"\\u0061"', '"b"', '"\\""', '"\\u0022"', '"\\\\"', '"a\\"b"', '"\\/"', '"é"', '""'])
texts = st.recursive(
    spelled | st.sampled_from(["1", "1.0", "null", "-0", "1e2"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(st.tuples(spelled, inner), max_size=4).map(
            lambda members: "{" + ", ".join(f"{name} :{value}" for name, value in members) + "}"
        )
    ),
    max_leaves=12,
)


@given(texts)
@example('{"\\u0022":"\\u0022","\\u0022":"x"}')
def test_a_body_is_accepted_exactly_if_no_object_has_a_key_twice(text: str) -> None:
    raw = f'{{"x":{text}}}'.encode()
    found = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.append(len(dict(pairs)) < len(pairs))
        return dict(pairs)

    value = json.loads(raw, object_pairs_hook=note)
    if any(found):
        assert refusal(raw).code == "duplicate_key"
    else:
        assert parse_body(raw).fields == value


# ---- what counts ----


def test_spelling_order_and_spacing_do_not_count() -> None:
    texts = [
        b'{"model":"m","top_p":1.0,"messages":[{"role":"user","content":"\xc3\xa9"}]}',
        b' { "messages" : [{"content": "\\u00e9", "role": "user"}], "top_p": 1, "model": "m" } ',
        b'{"model":"\\u006d","top_p":1e0,"messages":[{"role":"user","content":"\\u00E9"}]}',
    ]
    assert len({parse_body(text).canonical for text in texts}) == 1


@pytest.mark.parametrize("name", ["user", "safety_identifier", "metadata", "prompt_cache_key", "service_tier"])
def test_excluded_fields_do_not_count_at_the_top_and_do_elsewhere(name: str) -> None:
    assert canonical({"a": 1, name: {"b": 2}}) == canonical({"a": 1})
    assert canonical({"a": {name: 1}}) != canonical({"a": {}})


def test_include_obfuscation_does_not_count_and_what_stands_beside_it_does() -> None:
    plain = canonical({"a": 1})
    assert canonical({"a": 1, "stream_options": {"include_obfuscation": False}}) == plain
    with_usage = canonical({"a": 1, "stream_options": {"include_usage": True}})
    assert canonical({"a": 1, "stream_options": {"include_usage": True, "include_obfuscation": True}}) == with_usage
    assert with_usage != plain
    assert canonical({"a": 1, "include_obfuscation": True}) != plain


def test_a_cache_object_does_not_count_and_anything_else_of_that_name_does() -> None:
    assert canonical({"a": 1, "cache": {"no-store": True}}) == canonical({"a": 1})
    assert canonical({"a": 1, "cache": True}) != canonical({"a": 1})
    assert canonical({"a": 1, "cache": None}) != canonical({"a": 1})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": None}, {}),
        ({"a": True}, {"a": 1}),
        ({"a": "1"}, {"a": 1}),
        ({"a": 0.7}, {"a": 0.7000001}),
        ({"a": 2**53}, {"a": 2**53 + 1}),
        ({"a": 2**70}, {"a": 2**70 + 1}),
        ({"a": [1, 2]}, {"a": [2, 1]}),
        ({"a": {}}, {"a": []}),
        ({"stream": False}, {}),
        ({"stream": True}, {"stream": False}),
        ({"unknown": 1}, {}),
        ({"temperature": 0.701}, {"temperature": 0.7}),
    ],
)
def test_everything_else_counts(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert canonical(one) != canonical(other)


def test_large_integers_have_one_encoding_however_they_are_written() -> None:
    assert parse_body(b'{"a":1e25}').canonical == parse_body(b'{"a":10000000000000000905969664}').canonical


# ---- what is forwarded, and read ----


def test_a_body_is_forwarded_as_it_came() -> None:
    for raw in (b' {"b" : 1.50, "a":"\\u0061","metadata":{"x":1}} ', b'{"cache":true}', b'{"cache":[{}]}'):
        assert parse_body(raw).forward() == raw


def test_without_its_cache_object_every_other_member_is_forwarded_byte_for_byte() -> None:
    body = parse_body(b'{"b" : [ 1.50,"\\u0061" ], "cache": {"ttl": 5}, "seed":12345678901234567890123, "z":-0.0}')
    assert body.cache_controls == {"ttl": 5}
    assert body.forward() == b'{"b":[ 1.50,"\\u0061" ],"seed":12345678901234567890123,"z":-0.0}'


def test_the_cache_object_is_found_however_its_name_is_spelled() -> None:
    assert parse_body(b'{"c\\u0061che":{},"a":1}').forward() == b'{"a":1}'


def test_a_cache_object_further_down_is_no_control() -> None:
    body = parse_body(b'{"a":{"cache":{"ttl":5}}}')
    assert body.cache_controls is None
    assert body.forward() == body.raw


def test_only_true_asks_for_a_stream() -> None:
    for value, is_stream in [("true", True), ("false", False), ("null", False), ("1", False), ('"true"', False)]:
        assert parse_body(f'{{"stream":{value}}}'.encode()).is_stream is is_stream
    assert not parse_body(b"{}").is_stream


def test_the_model_is_a_text_or_unknown() -> None:
    assert parse_body(b'{"model":"m"}').model == "m"
    assert parse_body(b'{"model":3}').model is None


def test_the_repr_shows_no_prompt() -> None:
    assert "secret" not in repr(parse_body(b'{"model":"m","messages":["secret"]}'))
