"""Keys: equal requests have one, different requests never, here and on every other Python."""

from __future__ import annotations

import ctypes
import decimal
import hashlib
import json
import math
import random
import sys
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from key_vectors import REQUESTS, VECTORS

from llm_edge_cache import CacheableRequest, generate_cache_key, generate_short_key
from llm_edge_cache.canonical import MAX_DEPTH, temperature_text

GOLDEN: list[dict[str, Any]] = json.loads(VECTORS.read_text())


def key(**fields: Any) -> str:
    return generate_cache_key(CacheableRequest(**{"model": "m", **fields}))


def of(value: Any) -> str:
    return key(parameters={"x": value})


# ---- the golden file ----


def test_the_golden_file_has_every_vector_and_at_least_forty() -> None:
    assert [vector["name"] for vector in GOLDEN] == list(REQUESTS)
    assert len(GOLDEN) >= 40


@pytest.mark.parametrize("vector", GOLDEN, ids=lambda vector: str(vector["name"]))
def test_the_encoding_is_pinned(vector: dict[str, Any]) -> None:
    request = CacheableRequest(**vector["request"])
    assert request.canonical.hex() == vector["encoding"]
    assert generate_cache_key(request) == vector["key"]


@pytest.mark.parametrize("hash_seed", ["0", "1", "random"])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_hash_seed_and_locale_do_not_matter(
    hash_seed: str, locale: str, monkeypatch: pytest.MonkeyPatch, run_python: Any
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
    monkeypatch.setenv("LC_ALL", locale)
    program = """
import json, pathlib, sys
from llm_edge_cache import CacheableRequest, generate_cache_key
vectors = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
print(all(generate_cache_key(CacheableRequest(**v["request"])) == v["key"] for v in vectors))
"""
    assert run_python(program, str(VECTORS)) == "True"


# ---- keys ----


def test_a_key_is_the_sha_256_of_the_encoding() -> None:
    request = CacheableRequest("m", "p")
    assert generate_cache_key(request) == hashlib.sha256(request.canonical).hexdigest()
    assert len(generate_cache_key(request)) == 64


def test_a_short_key_is_the_first_16_digits() -> None:
    request = CacheableRequest("m", "p")
    assert generate_short_key(request) == generate_cache_key(request)[:16]


@pytest.mark.parametrize("other", [None, "text", {"model": "m"}, object()])
def test_only_requests_have_keys(other: Any) -> None:
    with pytest.raises(TypeError, match="a key needs a CacheableRequest"):
        generate_cache_key(other)


# ---- what is equal ----


@pytest.mark.parametrize(
    "spellings",
    [(0, 0.0, -0.0), (1, 1.0), (2**53, 2.0**53), (2**64, 2.0**64), (int(1e300), 1e300), ([1, 2], (1, 2))],
    ids=str,
)
def test_spellings_of_one_value_have_one_key(spellings: tuple[Any, ...]) -> None:
    assert len({of(value) for value in spellings}) == 1
    assert len({of([{"deep": value}]) for value in spellings}) == 1
    assert len({key(messages=[{"content": value}]) for value in spellings}) == 1


@pytest.mark.parametrize(
    "values",
    [
        (1, True, "1", "1.0", [1], {"1": 1}),
        (0, False, None, "", [], {}),
        (2**53, 2**53 + 1, 2**53 + 2),
        (2**64, 2**64 + 1, -(2**64), "18446744073709551616"),
        (-(2**63), -(2**63) - 1),
        (0.1, 0.10000000000000002, Fraction(1, 10).limit_denominator(3).numerator),
        ([1, 2], [2, 1], [[1], 2], [1, [2]], [[1, 2]]),
        ([{"a": 1}, {"b": 2}], [{"a": 1, "b": 2}], [{"b": 2}, {"a": 1}]),
        ("\u00e9", "e\u0301"),
        ("a", "a ", " a", "A"),
    ],
    ids=str,
)
def test_different_values_have_different_keys(values: tuple[Any, ...]) -> None:
    assert len({of(value) for value in values}) == len(values)


def test_what_stands_on_both_sides_of_a_separator_is_not_confused() -> None:
    requests = [
        CacheableRequest("a|b", "c"),
        CacheableRequest("a", "b|c"),
        CacheableRequest("a", "b", namespace="c"),
        CacheableRequest("c", "b", namespace="a"),
        CacheableRequest("a", parameters={"prompt": "b|c"}),
    ]
    assert len({generate_cache_key(request) for request in requests}) == len(requests)


def test_null_is_not_absent_and_unknown_fields_count() -> None:
    assert (
        len({key(), key(parameters={"seed": None}), key(parameters={"seed": 0}), key(parameters={"other": None})}) == 4
    )
    assert key(temperature=None) != key(temperature=0)
    assert key(max_tokens=None) != key(max_tokens=0)
    assert key(prompt=None) != key(prompt="")


def test_no_number_but_the_temperature_is_rounded() -> None:
    assert key(temperature=0.701) == key(temperature=0.7)
    assert key(parameters={"temperature": 0.701}) != key(parameters={"temperature": 0.7})
    assert key(parameters={"top_p": 0.901}) != key(parameters={"top_p": 0.9})


def test_the_order_of_parameters_does_not_matter() -> None:
    assert key(parameters={"a": 1, "b": {"c": 2, "d": 3}}) == key(parameters={"b": {"d": 3, "c": 2}, "a": 1})


class Name(str, Enum):
    MODEL = "m"


class Level(IntEnum):
    LOW = 1


class Text(str):
    __slots__ = ()


class Lists(list):  # type: ignore[type-arg]
    pass


class Real(float):
    pass


def test_subclasses_count_as_what_json_would_write() -> None:
    assert of(Name.MODEL) == of("m")
    assert of({Name.MODEL: Level.LOW}) == of({"m": 1})
    assert of(Text("a")) == of("a")
    assert of(Lists([Real(0.5), Real(2.0)])) == of([0.5, 2])
    assert key(model=Name.MODEL, prompt=Text("p")) == key(model="m", prompt="p")
    assert key(max_tokens=Level.LOW) == key(max_tokens=1) == key(max_tokens=1.0)
    assert key(messages=Lists([{"content": Text("a")}])) == key(messages=({"content": "a"},))


# ---- temperature ----


@pytest.mark.parametrize(
    ("temperature", "text"),
    [
        (0.995, "1.00"),
        (0.125, "0.12"),
        (0.375, "0.38"),
        (0.625, "0.62"),
        (0.7, "0.70"),
        (0.005, "0.00"),
        (0.015, "0.01"),
        (1, "1.00"),
        (2.0, "2.00"),
        (-0.0, "0.00"),
        (-0.004, "0.00"),
        (-1.5, "-1.50"),
        (16777217, "16777216.00"),
        (3.4028234663852886e38, "340282346638528859811704183484516925440.00"),
    ],
)
def test_the_temperature_is_written_as_binary32_with_two_decimals(temperature: float, text: str) -> None:
    assert temperature_text(temperature) == text


@given(st.floats(-1e9, 1e9) | st.floats(0, 2) | st.integers(-2000, 2000).map(lambda n: n / 1000))
def test_the_temperature_is_rounded_once_exactly_ties_to_even(temperature: float) -> None:
    exact = Decimal(ctypes.c_float(temperature).value)
    with decimal.localcontext() as context:
        context.prec = 60
        expected = exact.quantize(Decimal("0.01"), rounding=decimal.ROUND_HALF_EVEN)
    assert Decimal(temperature_text(temperature)) == expected
    assert temperature_text(temperature).strip("0.") or not temperature_text(temperature).startswith("-")


# ---- the encoding against an independent account of what a request is ----

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**53, 2**53 + 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 255, 256, 65535, 65536])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-(2**70), 2**70).map(float)
    | st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('|"\\,:{}[]\0\u00a1\u00c0\u0098'), max_size=6)
)
names = st.sampled_from(["", "a", "b", "ab", "a|b"]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)
mappings = st.dictionaries(names, values, max_size=4)


def identity(value: Any) -> Any:
    """What a value is, in other words than the encoder's."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number", Fraction(value)
    if isinstance(value, (list, tuple)):
        return "list", tuple(identity(item) for item in value)
    if isinstance(value, dict):
        return "map", frozenset((name, identity(item)) for name, item in value.items())
    return type(value).__name__, value


def spelled_otherwise(value: Any, rng: random.Random) -> Any:
    """The same value in another spelling."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return float(value) if abs(value) < 2**1000 and int(float(value)) == value else value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, (list, tuple)):
        items = [spelled_otherwise(item, rng) for item in value]
        return tuple(items) if rng.random() < 0.5 else items
    if isinstance(value, dict):
        entries = [(name, spelled_otherwise(item, rng)) for name, item in value.items()]
        rng.shuffle(entries)
        return dict(entries)
    return value


@given(values, values)
@settings(max_examples=200)
def test_keys_are_equal_exactly_when_values_are(one: Any, other: Any) -> None:
    assert (of(one) == of(other)) == (identity(one) == identity(other))


@given(mappings, st.lists(mappings, max_size=3), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_another_spelling_has_the_same_key(parameters: Any, messages: Any, rng: random.Random) -> None:
    otherwise = {"parameters": spelled_otherwise(parameters, rng), "messages": spelled_otherwise(messages, rng)}
    assert key(parameters=parameters, messages=messages) == key(**otherwise)


@given(values)
@settings(max_examples=200)
def test_an_encoding_can_be_read_back(value: Any) -> None:
    def integer(code: int, data: memoryview) -> int:
        assert code == 1
        return int.from_bytes(data, "big", signed=True)

    request = CacheableRequest("m", "p", temperature=0.5, max_tokens=9, parameters={"x": value}, namespace="n")
    read = msgspec.msgpack.decode(request.canonical, ext_hook=integer)
    assert read[:7] == [1, "n", "m", "p", None, "0.50", 9]
    assert identity(read[7]) == identity({"x": value})


@given(st.text(max_size=5), st.text(max_size=5), st.text(max_size=5), st.text(max_size=5))
def test_no_way_to_cut_a_text_gives_the_same_key(a: str, b: str, c: str, d: str) -> None:
    assume(not any(0xD800 <= ord(character) <= 0xDFFF for character in a + b + c + d))
    assume(a and (a, b) != (c, d) and c)
    assert key(model=a, prompt=b) != key(model=c, prompt=d)


# ---- what is refused ----


def refused(error: type[Exception], match: str, **fields: Any) -> None:
    with pytest.raises(error, match=match):
        CacheableRequest(**{"model": "m", **fields})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities_are_refused_wherever_they_are(number: float) -> None:
    refused(ValueError, "temperature", temperature=number)
    refused(ValueError, "max_tokens", max_tokens=number)
    refused(ValueError, r"parameters\['x'\] must be a finite number", parameters={"x": number})
    refused(ValueError, r"parameters\['x'\]\[1\]\['y'\] must be a finite", parameters={"x": [0, {"y": number}]})
    refused(ValueError, r"messages\[1\]\['c'\]\[0\] must be a finite", messages=[{}, {"c": (number,)}])


@pytest.mark.parametrize(
    "value",
    [
        b"x",
        bytearray(b"x"),
        memoryview(b"x"),
        {1},
        frozenset(),
        object(),
        1j,
        Decimal(1),
        UUID(int=1),
        msgspec.UNSET,
        msgspec.Raw(b"\x01"),
        msgspec.msgpack.Ext(1, b"\x01"),
        range(3),
        iter([1]),
        int,
        CacheableRequest("m"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_json_does_not_know_is_refused_with_its_place(value: Any) -> None:
    refused(TypeError, r"parameters\['x'\] must be a JSON value, not", parameters={"x": value})
    refused(TypeError, r"messages\[0\]\['c'\]\[2\] must be a JSON value", messages=[{"c": [1, 2.5, value]}])


@pytest.mark.parametrize("name", [1, None, True, b"a", (), Level.LOW, 1.5])
def test_keys_that_are_no_strings_are_refused_with_their_place(name: Any) -> None:
    refused(TypeError, "parameters must have strings for keys", parameters={name: 1})
    refused(TypeError, r"parameters\['x'\]\[0\] must have strings for keys", parameters={"x": [{name: 1}]})
    refused(TypeError, r"messages\[0\] must have strings for keys", messages=[{name: 1}])


def test_lone_surrogates_are_refused_with_their_place() -> None:
    refused(ValueError, "model contains a lone surrogate", model="\ud800")
    refused(ValueError, "prompt contains a lone surrogate", prompt="a\udfff")
    refused(ValueError, "namespace contains a lone surrogate", namespace="\ud800")
    refused(ValueError, r"parameters\['x'\]\[0\] contains a lone surrogate", parameters={"x": ["\ud83d"]})
    refused(ValueError, r"messages\[0\] contains a lone surrogate", messages=[{"\ud83d": 1}])


def nested(levels: int, kind: type) -> Any:
    value: Any = kind()
    for _ in range(levels - 1):
        value = {"x": value} if kind is dict else kind([value])
    return value


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_containers_may_be_nested_up_to_a_bound(kind: type) -> None:
    of(nested(MAX_DEPTH, kind))
    of([0.0, nested(MAX_DEPTH - 1, kind)])  # rebuilt, since 0.0 is not in normal form
    key(messages=[{"c": nested(MAX_DEPTH - 1, kind)}])
    refused(ValueError, "is nested more than 100 deep", parameters={"x": nested(MAX_DEPTH + 1, kind)})
    refused(ValueError, "is nested more than 100 deep", messages=[{"c": nested(MAX_DEPTH, kind)}])
    refused(ValueError, "is nested more than 100 deep", parameters={"x": nested(3000, kind)})


def test_a_list_that_contains_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    refused(ValueError, "is nested more than 100 deep", parameters={"x": endless})


def test_a_key_that_seems_to_be_there_twice_is_refused() -> None:
    class Unequal(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            return self is other

        __hash__ = str.__hash__

    refused(ValueError, "has a key twice", parameters={"x": {Unequal("a"): 0.0, Unequal("a"): 1}})


def test_errors_do_not_show_what_was_said() -> None:
    with pytest.raises(TypeError) as caught:
        CacheableRequest("m", messages=[{"content": ["secret", {"secret"}]}])
    assert "secret" not in str(caught.value)


def test_errors_shorten_long_names() -> None:
    refused(TypeError, r"parameters\['a{40}'\.\.\.\] must", parameters={"a" * 100: b""})
