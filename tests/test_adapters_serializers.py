"""What each serializer brings back, what it refuses, and how it says so."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import math
import pickle
import uuid
import zoneinfo
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_edge_cache.adapters.serializers import (
    Extension,
    JsonSerializer,
    MsgspecSerializer,
    PickleSerializer,
    serializer_of,
)

MSGSPEC = MsgspecSerializer()
JSON = JsonSerializer()
PARIS = zoneinfo.ZoneInfo("Europe/Paris")

atoms = st.deferred(
    lambda: (
        st.none()
        | st.booleans()
        | st.integers()
        | st.integers(min_value=-(2**70), max_value=2**70)
        | st.floats(allow_nan=False)
        | st.text()
        | st.binary()
        | st.dates()
        | st.datetimes(timezones=st.none() | st.sampled_from([dt.timezone.utc, PARIS]))
        | st.times()
        | st.timedeltas()
        | st.decimals(allow_nan=False)
        | st.uuids()
    )
)
hashables = atoms | st.tuples(atoms, atoms) | st.frozensets(atoms, max_size=2)
objects = st.recursive(
    hashables | st.sets(hashables, max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(hashables, inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=12,
)


def shape(value: Any) -> Any:
    """The types all the way down; repr() tells 1 from True, 1.0 and Decimal(1), and one zone from another."""
    if isinstance(value, dict):
        return [(shape(key), shape(one)) for key, one in value.items()]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(repr, map(shape, value)))
    if isinstance(value, (list, tuple)):
        return type(value), [shape(one) for one in value]
    return type(value), repr(value), getattr(value, "fold", None)


@given(objects)
def test_msgspec_brings_every_object_back_with_every_type(value: Any) -> None:
    assert shape(MSGSPEC.loads(MSGSPEC.dumps(value))) == shape(value)


@pytest.mark.parametrize(
    "value",
    [
        2**64 - 1,
        -(2**63),
        2**64,
        -(2**63) - 1,
        10**4000,
        -0.0,
        math.inf,
        {1: 2, None: 3, (1, 2): {4}},
        {2**80: 1},
        dt.datetime(2026, 10, 25, 2, 30, tzinfo=PARIS, fold=1),
        dt.datetime(2026, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=-3, minutes=-30))),
        dt.datetime(2026, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1), "CET")),
        dt.time(1, 2, 3, 4, tzinfo=dt.timezone.utc),
        dt.timedelta(days=-1, microseconds=1),
        decimal.Decimal("1.10"),
        decimal.Decimal("-Infinity"),
        decimal.Decimal("NaN"),
        uuid.UUID(int=1),
        [(), set(), frozenset(), {}, [], b"", ""],
        {"a": [{"b": (1, [{2, 3}])}]},
    ],
    ids=lambda value: type(value).__name__,
)
def test_msgspec_keeps_the_odd_ones(value: Any) -> None:
    assert shape(MSGSPEC.loads(MSGSPEC.dumps(value))) == shape(value)


def test_msgspec_keeps_a_nan() -> None:
    assert math.isnan(MSGSPEC.loads(MSGSPEC.dumps([math.nan]))[0])


def test_plain_data_is_plain_messagepack() -> None:
    assert MSGSPEC.dumps({"a": [1, None]}) == b"\x81\xa1a\x92\x01\xc0"


class Colour(enum.IntEnum):
    RED = 1


class Loud(str):
    __slots__ = ()


Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Author:
    name: str


class OddZone(dt.tzinfo):
    def utcoffset(self, moment: dt.datetime | None) -> dt.timedelta:
        return dt.timedelta(0)


LOOK_ALIKES = [
    (Colour.RED, "Colour"),
    (Loud("x"), "Loud"),
    (Point(1, 2), "Point"),
    (Author("x"), "Author"),
    (collections.OrderedDict(a=1), "collections.OrderedDict"),
    (collections.defaultdict(int), "collections.defaultdict"),
    (bytearray(b"x"), "bytearray"),
    (1j, "complex"),
    (object, "type"),
    (dt.datetime(2026, 1, 1, tzinfo=OddZone()), "OddZone"),
]


@pytest.mark.parametrize(("value", "name"), LOOK_ALIKES, ids=[name for _, name in LOOK_ALIKES])
@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: {"a": [one]}, lambda one: {(1, 2): (one,)}])
def test_msgspec_refuses_what_would_come_back_as_something_else(value: Any, name: str, wrap: Any) -> None:
    with pytest.raises(TypeError, match=rf'"msgspec" cannot carry \S*{name}: .*serializer="pickle"'):
        MSGSPEC.dumps(wrap(value))


@pytest.mark.parametrize("serializer", [MSGSPEC, JSON])
def test_an_object_in_itself_is_a_clear_error(serializer: Any) -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(ValueError, match="so deep"):
        serializer.dumps(circle)


@pytest.mark.parametrize("serializer", [MSGSPEC, JSON])
def test_a_lone_surrogate_is_a_clear_error(serializer: Any) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        serializer.dumps({"a": "\ud800"})


@given(st.binary())
def test_any_bytes_are_an_exception_or_an_object_that_can_be_carried(data: bytes) -> None:
    try:
        value = MSGSPEC.loads(data)
    except Exception:
        return
    assert shape(MSGSPEC.loads(MSGSPEC.dumps(value))) == shape(value) or value != value  # noqa: PLR0124 - NaN


# ---- extensions ----


def test_an_extension_carries_one_more_type() -> None:
    serializer = MsgspecSerializer([Extension(64, Loud, str.encode, lambda data: Loud(data.decode()))])
    assert type(serializer.loads(serializer.dumps(["x", Loud("y")]))[1]) is Loud


def test_an_extension_s_code_may_not_be_one_of_ours() -> None:
    with pytest.raises(ValueError, match="64 to 127"):
        MsgspecSerializer([Extension(1, Loud, str.encode, Loud)])


# ---- json, pickle, others ----


@pytest.mark.parametrize("value", [None, True, 1, 2**70, 1.5, "ü", [1, ["a"]], {"a": {"b": None}}])
def test_json_brings_back_what_json_has(value: Any) -> None:
    assert shape(JSON.loads(JSON.dumps(value))) == shape(value)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (b"x", "bytes"),
        ((1,), "tuple"),
        ({"a": [{1}]}, "set"),
        ({"a": {1: 2}}, "int as a key of a dict"),
        ([dt.date(2026, 1, 1)], "datetime.date"),
    ],
)
def test_json_refuses_what_would_come_back_as_something_else(value: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf'"json" cannot carry {name}: .*serializer="pickle"'):
        JSON.dumps(value)


def test_json_refuses_a_nan() -> None:
    with pytest.raises(ValueError, match='"json"'):
        JSON.dumps([math.nan])


def test_pickle_brings_objects_back() -> None:
    serializer = PickleSerializer()
    assert serializer.loads(serializer.dumps(Author("x"))) == Author("x")


def test_pickle_names_what_it_cannot_carry() -> None:
    with pytest.raises(pickle.PicklingError, match='"pickle" cannot carry function'):
        PickleSerializer().dumps(lambda: None)


def test_the_default_is_msgspec() -> None:
    assert type(serializer_of()) is type(serializer_of("msgspec")) is MsgspecSerializer


def test_every_tag_is_one_byte_of_its_own_and_never_begins_a_number() -> None:
    tags = [serializer_of(choice).tag for choice in ("msgspec", "json", "pickle", pickle)]
    assert len(set(tags)) == 4
    assert all(len(tag) == 1 and tag not in b"-0123456789" for tag in tags)


def test_an_object_with_dumps_and_loads_is_a_serializer() -> None:
    assert serializer_of(pickle).loads(serializer_of(pickle).dumps((1,))) == (1,)


def test_dumps_that_returns_no_bytes_is_a_clear_error() -> None:
    class Silent:
        def dumps(self, value: object) -> None: ...

        def loads(self, data: bytes) -> None: ...

    with pytest.raises(TypeError, match=r"Silent cannot carry int: its dumps\(\) returned NoneType"):
        serializer_of(Silent()).dumps(1)


@pytest.mark.parametrize(("choice", "error"), [("yaml", ValueError), (1, TypeError), (object(), TypeError)])
def test_a_serializer_that_is_none_is_a_clear_error(choice: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="serializer must be"):
        serializer_of(choice)
