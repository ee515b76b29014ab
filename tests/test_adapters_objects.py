"""Objects by text keys: absence, expiry, counting, keys of any length, and values of other serializers."""

from __future__ import annotations

import multiprocessing
import time
from decimal import Decimal
from typing import Any

import pytest

from llm_edge_cache import SharedSlab, SlabConfig, SlabConfigError
from llm_edge_cache.adapters.objects import HASHED, MISSING, ObjectStore, open_slab
from llm_edge_cache.adapters.serializers import serializer_of


@pytest.fixture
def store(slab: SharedSlab) -> ObjectStore:
    return ObjectStore(slab, serializer_of())


@pytest.fixture(params=["msgspec", "json", "pickle"])
def any_store(request: pytest.FixtureRequest, slab: SharedSlab) -> ObjectStore:
    return ObjectStore(slab, serializer_of(request.param))


def test_none_is_a_value(store: ObjectStore) -> None:
    store.set("k", None, None)
    assert store.get("k", MISSING) is None
    assert store.has("k")


def test_what_is_missing_is_the_default(store: ObjectStore) -> None:
    assert store.get("k", 5) == 5
    assert not store.has("k")


def test_many_are_set_and_got(store: ObjectStore) -> None:
    assert store.set_many({"a": 1, "b": [2], "c": True}, None) == []
    assert store.get_many(["a", "b", "c", "d"]) == {"a": 1, "b": [2], "c": True}
    store.delete_many(["a", "b", "d"])
    assert store.get_many(["a", "b", "c"]) == {"c": True}


def test_a_value_that_is_too_large_is_refused_and_the_old_one_is_gone(store: ObjectStore) -> None:
    store.set("k", "old", None)
    assert store.set("k", "x" * (5 << 20), None) is False
    assert store.set_many({"k": "x" * (5 << 20), "l": 1}, None) == ["k"]
    assert store.get("k") is None


# ---- what cannot be carried ----


def test_after_an_error_the_old_value_is_gone(any_store: ObjectStore) -> None:
    any_store.set("k", "old", None)
    with pytest.raises(Exception, match="cannot carry function"):
        any_store.set("k", lambda: None, None)
    assert any_store.get("k") is None


def test_after_an_error_no_value_of_the_call_is_there(store: ObjectStore) -> None:
    store.set_many({"a": "old", "b": "old"}, None)
    with pytest.raises(TypeError):
        store.set_many({"a": "new", "b": object()}, None)
    assert store.get_many(["a", "b"]) == {}


# ---- life ----


@pytest.mark.parametrize("ttl", [0, -1, -0.5])
def test_a_life_of_0_and_less_is_over_at_once(store: ObjectStore, ttl: float) -> None:
    store.set("k", "old", None)
    store.set("k", "new", ttl)
    assert store.get("k") is None
    assert store.add("k", "new", ttl) is True
    assert store.get("k") is None
    store.set("k", "old", None)
    assert store.touch("k", ttl) is True
    assert store.get("k") is None
    assert store.touch("k", ttl) is False


def test_a_touch_changes_the_life(store: ObjectStore) -> None:
    store.set("k", 1, 100)
    assert store.touch("k", None) is True
    assert store.slab.ttl(b"k") is None
    assert store.touch("l", 100) is False


# ---- add ----


def test_add_stores_where_nothing_is(store: ObjectStore) -> None:
    assert store.add("k", "first", None) is True
    assert store.add("k", "second", None) is False
    assert store.get("k") == "first"


def test_add_that_is_refused_stores_nothing(store: ObjectStore) -> None:
    assert store.add("k", "x" * (5 << 20), None) is False
    assert store.get("k") is None


# ---- counting ----


def test_numbers_are_kept_as_decimal_under_every_serializer(any_store: ObjectStore) -> None:
    any_store.set("k", -41, 100)
    assert any_store.slab.get(b"k") == b"-41"
    assert any_store.incr("k", 42) == 1
    assert any_store.get("k") == 1


@pytest.mark.parametrize(
    ("value", "delta", "total"),
    [(2**63 - 1, 1, 2**63), (2**70, -1, 2**70 - 1), (1, 2**70, 1 + 2**70), (1.5, 1, 2.5), (1, 0.5, 1.5), (True, 1, 2)],
)
def test_any_number_can_be_added_to_and_keeps_its_life(
    any_store: ObjectStore, value: Any, delta: Any, total: Any
) -> None:
    any_store.set("k", value, 100)
    assert any_store.incr("k", delta) == total
    assert any_store.get("k") == total
    assert 90 < (any_store.slab.ttl(b"k") or 0) <= 100


def test_without_a_life_it_stays_so(store: ObjectStore) -> None:
    store.set("k", Decimal("0.1"), None)
    assert store.incr("k", Decimal("0.2")) == Decimal("0.3")
    assert store.slab.ttl(b"k") is None


@pytest.mark.parametrize("delta", [1, 1.5])
def test_counting_what_is_missing_is_a_key_error(store: ObjectStore, delta: Any) -> None:
    with pytest.raises(KeyError):
        store.incr("k", delta)


@pytest.mark.parametrize("value", [None, "x", [1]])
def test_counting_what_is_no_number_is_a_type_error_and_changes_nothing(store: ObjectStore, value: Any) -> None:
    store.set("k", value, None)
    with pytest.raises(TypeError):
        store.incr("k", 1)
    assert store.get("k") == value


def _count(name: str, serializer: str, delta: Any, times: int) -> None:
    store = ObjectStore(SharedSlab.attach(name), serializer_of(serializer))
    for _ in range(times):
        store.incr("k", delta)


@pytest.mark.parametrize("serializer", ["msgspec", "pickle"])
@pytest.mark.parametrize(("start", "delta"), [(0, 1), (2**64, 1), (0.0, 0.5)])
def test_counting_loses_nothing_across_processes(slab: SharedSlab, serializer: str, start: Any, delta: Any) -> None:
    store = ObjectStore(slab, serializer_of(serializer))
    store.set("k", start, None)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_count, args=(slab.name, serializer, delta, 500)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert store.get("k") == start + 1500 * delta


# ---- keys ----


def test_keys_of_any_length_and_text_are_told_apart(store: ObjectStore) -> None:
    hashed = HASHED.decode() + "x" * 32
    keys = ["", "a", "a" * 1024, "a" * 1025, "ü" * 512, "ü" * 513, "\ud800", "\ud801", "?", hashed]
    store.set_many({key: number for number, key in enumerate(keys)}, None)
    assert store.get_many(keys) == {key: number for number, key in enumerate(keys)}
    assert len(store.slab) == len(keys)


def test_no_plain_key_equals_a_hashed_one(store: ObjectStore) -> None:
    store.set("k" * 2000, "long", None)
    (entry,) = store.slab.scan()
    assert entry.key.startswith(HASHED)
    imitation = HASHED.decode() + "x" * 32
    store.set(imitation, "plain", None)
    assert HASHED + b"x" * 32 not in store.slab
    assert store.get(imitation) == "plain"


def test_a_prefix_keeps_stores_apart(slab: SharedSlab) -> None:
    here, there = (ObjectStore(slab, serializer_of(), prefix) for prefix in ("here:", "there:"))
    for store in (here, there):
        store.set_many({"a": 1, "b" * 2000: 2}, None)
    here.clear()
    assert here.get_many(["a", "b" * 2000]) == {}
    assert there.get_many(["a", "b" * 2000]) == {"a": 1, "b" * 2000: 2}


@pytest.mark.parametrize("prefix", ["x" * 513, "\0llm-edge-cache:sha256:"])
def test_a_prefix_that_cannot_be_is_a_clear_error(slab: SharedSlab, prefix: str) -> None:
    with pytest.raises(ValueError, match="a key prefix is"):
        ObjectStore(slab, serializer_of(), prefix)


# ---- values of others ----


class Boom:
    """Unpickled, it leaves a trace."""

    unpickled = 0

    def __reduce__(self) -> Any:
        return _unpickled, ()


def _unpickled() -> int:
    Boom.unpickled += 1
    return 1


@pytest.mark.parametrize("writer", ["msgspec", "json", "pickle"])
@pytest.mark.parametrize("reader", ["msgspec", "json", "pickle"])
def test_a_value_of_another_serializer_is_a_miss_that_can_be_stored_over(
    slab: SharedSlab, writer: str, reader: str
) -> None:
    theirs, ours = (ObjectStore(slab, serializer_of(choice)) for choice in (writer, reader))
    theirs.set("k", ["theirs"], None)
    if writer == reader:
        return
    assert ours.get("k") is None
    assert ours.get_many(["k"]) == {}
    assert not ours.has("k")
    with pytest.raises(KeyError):
        ours.incr("k", 1)
    assert ours.add("k", ["ours"], None) is True
    assert ours.get("k") == ["ours"]


def test_nothing_is_unpickled_unless_the_reader_says_so(slab: SharedSlab) -> None:
    ObjectStore(slab, serializer_of("pickle")).set("k", Boom(), None)
    for choice in ("msgspec", "json"):
        assert ObjectStore(slab, serializer_of(choice)).get("k") is None
    assert Boom.unpickled == 0


@pytest.mark.parametrize("data", [b"", b"M", b"M\xc1", b"M\xc7", b"J{", b"P", b"Pgarbage", b"-", b"1x", b"\xff", b"Z"])
def test_bytes_that_are_nobody_s_are_misses(any_store: ObjectStore, data: bytes) -> None:
    any_store.slab.set(b"k", data, ttl=None)
    assert any_store.get("k", 5) == 5


# ---- one slab per process ----


def test_a_process_opens_a_slab_once(name: str) -> None:
    config = SlabConfig(memory_bytes=4 << 20)
    assert open_slab(name, config) is open_slab(name, SlabConfig(memory_bytes=4 << 20))
    assert open_slab(name, None) is open_slab(name, None)


def test_a_configuration_that_differs_from_the_live_one_is_an_error(name: str) -> None:
    open_slab(name, SlabConfig(memory_bytes=4 << 20))
    with pytest.raises(SlabConfigError, match="memory_bytes"):
        open_slab(name, SlabConfig(memory_bytes=8 << 20))


def test_an_expired_value_is_a_miss(store: ObjectStore) -> None:
    store.set("k", 1, 0.05)
    deadline = time.monotonic() + 30
    while store.has("k"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
