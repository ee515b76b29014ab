"""Bad input is a specific error, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest

from llm_edge_cache import SharedSlab, SlabClosedError, SlabConfig

Call = Callable[[SharedSlab, Any], Any]

WITH_KEY: dict[str, Call] = {
    "get": lambda slab, key: slab.get(key),
    "gets": lambda slab, key: slab.gets(key),
    "get_or_token": lambda slab, key: slab.get_or_token(key),
    "get_many": lambda slab, key: slab.get_many([b"good", key]),
    "set": lambda slab, key: slab.set(key, b"value"),
    "set_many": lambda slab, key: slab.set_many(Pairs([(key, b"value")])),
    "add": lambda slab, key: slab.add(key, b"value"),
    "cas": lambda slab, key: slab.cas(key, b"value", 1),
    "fill": lambda slab, key: slab.fill(key, b"value", 1),
    "incr": lambda slab, key: slab.incr(key),
    "touch": lambda slab, key: slab.touch(key),
    "ttl": lambda slab, key: slab.ttl(key),
    "delete": lambda slab, key: slab.delete(key),
    "delete_many": lambda slab, key: slab.delete_many([key]),
    "pop": lambda slab, key: slab.pop(key),
    "in": lambda slab, key: key in slab,
}
WITH_TTL: dict[str, Call] = {
    "set": lambda slab, ttl: slab.set(b"key", b"value", ttl=ttl),
    "set_many": lambda slab, ttl: slab.set_many({b"key": b"value"}, ttl=ttl),
    "add": lambda slab, ttl: slab.add(b"key", b"value", ttl=ttl),
    "cas": lambda slab, ttl: slab.cas(b"key", b"value", 1, ttl=ttl),
    "fill": lambda slab, ttl: slab.fill(b"key", b"value", 1, ttl=ttl),
    "touch": lambda slab, ttl: slab.touch(b"key", ttl),
    "touch by keyword": lambda slab, ttl: slab.touch(b"key", ttl=ttl),
}


class Pairs:
    """A mapping of unhashable keys."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self._pairs = pairs

    def __getitem__(self, key: Any) -> Any:
        return dict(self._pairs)[key]

    def items(self) -> list[tuple[Any, Any]]:
        return self._pairs


@pytest.mark.parametrize("call", WITH_KEY.values(), ids=list(WITH_KEY))
def test_a_str_key_is_a_type_error(slab: SharedSlab, call: Call) -> None:
    with pytest.raises(TypeError, match="key must be bytes-like, not str"):
        call(slab, "key")


@pytest.mark.parametrize("key", [None, 1, 1.5, ["key"], object()], ids=lambda key: type(key).__name__)
def test_no_other_type_is_a_key(slab: SharedSlab, key: Any) -> None:
    with pytest.raises(TypeError, match="key must be bytes-like, not"):
        slab.get(key)


@pytest.mark.parametrize("call", WITH_KEY.values(), ids=list(WITH_KEY))
@pytest.mark.parametrize("length", [0, 1025, 5000])
def test_an_empty_or_over_long_key_is_a_value_error_that_names_the_length(
    slab: SharedSlab, call: Call, length: int
) -> None:
    with pytest.raises(ValueError, match=f"key must be 1 to 1024 bytes long, not {length}"):
        call(slab, b"k" * length)
    with pytest.raises(ValueError, match=f"not {length}"):
        call(slab, bytearray(length))


@pytest.mark.parametrize("method", ["set", "add"])
@pytest.mark.parametrize("value", ["text", None, 7, ["list"]], ids=repr)
def test_a_value_that_is_not_bytes_like_is_a_type_error(slab: SharedSlab, method: str, value: Any) -> None:
    slab.set(b"key", b"old")
    with pytest.raises(TypeError, match="value must be bytes-like, not"):
        getattr(slab, method)(b"key", value)
    assert slab.get(b"key") == b"old"


@pytest.mark.parametrize("call", WITH_TTL.values(), ids=list(WITH_TTL))
@pytest.mark.parametrize(
    "ttl", [0, 0.0, -0.0, -1, -0.5, math.nan, math.inf, -math.inf, 10**400], ids=lambda ttl: str(ttl)[:9]
)
def test_a_ttl_that_is_no_life_is_a_value_error_that_names_it(slab: SharedSlab, call: Call, ttl: float) -> None:
    with pytest.raises(ValueError, match="ttl must be a finite number of seconds above 0, or None, not ") as caught:
        call(slab, ttl)
    assert repr(ttl)[:20] in str(caught.value)


@pytest.mark.parametrize("call", WITH_TTL.values(), ids=list(WITH_TTL))
def test_a_ttl_of_another_type_is_a_type_error(slab: SharedSlab, call: Call) -> None:
    with pytest.raises(TypeError, match="ttl must be a number of seconds or None, not str"):
        call(slab, "300")


@pytest.mark.parametrize("tti", [0, -1, math.nan])
def test_a_tti_is_checked_likewise(slab: SharedSlab, tti: float) -> None:
    with pytest.raises(ValueError, match="tti must be"):
        slab.set(b"key", b"value", tti=tti)
    assert b"key" not in slab


def test_an_oversized_value_is_refused_not_raised(slab: SharedSlab) -> None:
    assert slab.set(b"key", bytes(3 << 20)) is False
    assert slab.add(b"key", bytes(3 << 20)) is False


def test_incr_of_an_absent_key_is_a_key_error(slab: SharedSlab) -> None:
    with pytest.raises(KeyError, match="absent"):
        slab.incr(b"absent")


@pytest.mark.parametrize("value", [b"", b"x", b"1x", b"--1", b"1.5", b"9223372036854775808", b"\xff"], ids=repr)
def test_incr_of_what_is_no_number_is_a_value_error(slab: SharedSlab, value: bytes) -> None:
    slab.set(b"key", value)
    with pytest.raises(ValueError, match="no decimal number of signed 64 bits"):
        slab.incr(b"key")
    assert slab.get(b"key") == value


def test_incr_beyond_64_bits_is_an_overflow_error(slab: SharedSlab) -> None:
    slab.set(b"key", b"9223372036854775807")
    with pytest.raises(OverflowError, match="leaves signed 64 bits"):
        slab.incr(b"key")
    with pytest.raises(OverflowError, match="delta must fit"):
        slab.incr(b"key", 2**63)
    assert slab.get(b"key") == b"9223372036854775807"


@pytest.mark.parametrize("delta", [1.0, "1", None])
def test_incr_takes_an_int(slab: SharedSlab, delta: Any) -> None:
    slab.set(b"key", b"1")
    with pytest.raises(TypeError, match="delta must be an int"):
        slab.incr(b"key", delta)


@pytest.mark.parametrize("method", ["cas", "fill"])
def test_a_version_or_token_that_was_never_handed_out_is_refused(slab: SharedSlab, method: str) -> None:
    slab.set(b"key", b"value")
    assert getattr(slab, method)(b"key", b"other", 2**64 - 1) is False
    for wrong in (-1, 2**64):
        with pytest.raises(ValueError, match="must be one that this slab handed out"):
            getattr(slab, method)(b"key", b"other", wrong)
    with pytest.raises(TypeError, match="must be an int"):
        getattr(slab, method)(b"key", b"other", b"1")


@pytest.mark.parametrize("method", ["get_many", "delete_many"])
@pytest.mark.parametrize("keys", [b"key", bytearray(b"key"), "key"])
def test_one_key_is_no_iterable_of_keys(slab: SharedSlab, method: str, keys: Any) -> None:
    with pytest.raises(TypeError, match="keys must be an iterable of bytes-like keys"):
        getattr(slab, method)(keys)


def test_set_many_takes_a_mapping(slab: SharedSlab) -> None:
    with pytest.raises(TypeError, match="mapping must have items"):
        slab.set_many(cast(Any, [(b"key", b"value")]))
    with pytest.raises(TypeError, match="pairs"):
        slab.set_many(Pairs(cast(Any, [(b"key",)])))


CALLS: dict[str, Callable[[SharedSlab], Any]] = {
    "no key": lambda slab: slab.get(),  # type: ignore[call-overload]
    "no value": lambda slab: slab.set(b"key"),  # type: ignore[call-arg]
    "ttl by position": lambda slab: slab.set(b"key", b"value", 5),  # type: ignore[call-arg]
    "unknown": lambda slab: slab.set(b"key", b"value", expire=5),  # type: ignore[call-arg]
    "twice": lambda slab: slab.get(b"key", key=b"key"),  # type: ignore[call-overload]
    "too many": lambda slab: slab.get(b"key", 1, 2),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_wrong_arguments_are_a_type_error_that_names_the_function(
    slab: SharedSlab, call: Callable[[SharedSlab], Any]
) -> None:
    with pytest.raises(TypeError, match=r"(get|set)\(\)"):
        call(slab)


CLOSED: dict[str, Callable[[SharedSlab], Any]] = {
    **{method: (lambda slab, call=call: call(slab, b"key")) for method, call in WITH_KEY.items()},  # type: ignore[misc]
    "len": len,
    "clear": lambda slab: slab.clear(),
    "reap": lambda slab: slab.reap(),
    "check": lambda slab: slab.check(),
    "stats": lambda slab: slab.stats(),
    "scan": lambda slab: list(slab.scan()),
    "chown": lambda slab: slab.chown(0, 0),
}


@pytest.mark.parametrize("call", CLOSED.values(), ids=list(CLOSED))
def test_a_closed_slab_says_so(slab: SharedSlab, call: Callable[[SharedSlab], Any]) -> None:
    slab.close()
    with pytest.raises(SlabClosedError, match="closed"):
        call(slab)


def test_closing_twice_does_nothing(slab: SharedSlab) -> None:
    slab.close()
    slab.close()


@pytest.mark.parametrize("bad", ["", "x" * 1025, "a\0b", "\ud800"], ids=repr)
def test_a_name_that_is_none_is_a_value_error(bad: str) -> None:
    for make in (SharedSlab, SharedSlab.attach, SharedSlab.exists):
        with pytest.raises(ValueError, match="name"):
            make(bad)


@pytest.mark.parametrize("bad", [b"name", None, 5])
def test_a_name_is_a_str(bad: Any) -> None:
    with pytest.raises(TypeError, match="name must be str"):
        SharedSlab(bad)


def test_a_config_is_a_slab_config(name: str) -> None:
    with pytest.raises(TypeError, match="config must be a SlabConfig or None, not dict"):
        SharedSlab(name, {"memory_bytes": 1 << 20})  # type: ignore[arg-type]
    assert not SharedSlab.exists(name)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"memory_bytes": 0}, ValueError),
        ({"memory_bytes": 1000}, ValueError),
        ({"memory_bytes": -1}, ValueError),
        ({"memory_bytes": 1e6}, TypeError),
        ({"memory_bytes": True}, TypeError),
        ({"max_entries": 0}, ValueError),
        ({"max_entries": 1 << 40}, ValueError),
        ({"max_entries": "many"}, TypeError),
        ({"max_value_bytes": 0}, ValueError),
        ({"max_value_bytes": 60 << 20}, ValueError),
        ({"ttl": 0}, ValueError),
        ({"ttl": math.nan}, ValueError),
        ({"ttl": math.inf}, ValueError),
        ({"ttl": -1}, ValueError),
        ({"ttl": "1"}, TypeError),
        ({"tti": 0}, ValueError),
    ],
    ids=str,
)
def test_a_configuration_that_no_slab_can_have_is_refused_by_field_and_value(
    fields: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(fields))):
        SlabConfig(**fields)


def test_too_little_memory_names_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"they need at least (\d+) bytes") as caught:
        SlabConfig(memory_bytes=200_000, max_value_bytes=100_000)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert SlabConfig(memory_bytes=least, max_entries=195, max_value_bytes=100_000).memory_bytes == least


@pytest.mark.parametrize("entries", [1, 1000, 1_000_000])
def test_what_would_do_does_even_where_more_memory_means_larger_tables(entries: int) -> None:
    with pytest.raises(ValueError, match="at least") as caught:
        SlabConfig(memory_bytes=1 << 20, max_entries=entries, max_value_bytes=1 << 20)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert SlabConfig(memory_bytes=least, max_entries=entries, max_value_bytes=1 << 20).memory_bytes == least


@pytest.mark.parametrize("seconds", [8.3, 16.1, 34570.69577046054, 1e-9, 86400 * 365.3, 1e300])
def test_times_survive_the_way_to_the_segment_and_back(seconds: float) -> None:
    config = SlabConfig(memory_bytes=8 << 20, ttl=seconds, tti=seconds)
    assert SlabConfig.from_native(config.to_native()).differences(config) == []


def test_what_is_none_is_derived() -> None:
    config = SlabConfig()
    assert (config.memory_bytes, config.max_entries, config.max_value_bytes) == (64 << 20, 65536, 8 << 20)
    assert (config.ttl, config.tti) == (300.0, None)
    assert SlabConfig(memory_bytes=1 << 30).max_value_bytes == 16 << 20


def test_a_configuration_is_frozen_and_comparable() -> None:
    config = SlabConfig(memory_bytes=8 << 20)
    with pytest.raises(AttributeError):
        config.ttl = 5  # type: ignore[misc]
    assert config == SlabConfig(memory_bytes=8 << 20, ttl=300, max_entries=8192)
    assert hash(config) == hash(SlabConfig(memory_bytes=8 << 20))
