"""Each method of SharedSlab does what the contract says, in one process."""

from __future__ import annotations

import pytest

from llm_edge_cache import DEFAULT, EntryInfo, SharedSlab, SlabConfig, SlabStats

INLINE = 8192  # bytes; longer values are filled outside the lock


@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 100, 4096, INLINE, INLINE + 1, 100_000, 300_000])
def test_get_returns_the_bytes_that_were_set(slab: SharedSlab, size: int) -> None:
    value = bytes(range(256)) * (size // 256 + 1)
    assert slab.set(b"key", value[:size]) is True
    assert slab.get(b"key") == value[:size]


def test_get_of_an_absent_key_returns_the_default(slab: SharedSlab) -> None:
    assert slab.get(b"absent") is None
    assert slab.get(b"absent", b"other") == b"other"
    assert slab.get(b"absent", default=7) == 7
    assert slab.get(key=b"absent", default=7) == 7


def test_get_returns_a_fresh_object_each_time(slab: SharedSlab) -> None:
    slab.set(b"key", b"a value longer than one byte")
    assert slab.get(b"key") is not slab.get(b"key")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_keys_and_values_are_bytes_like(slab: SharedSlab, kind: type) -> None:
    assert slab.set(kind(b"key"), kind(b"value"))
    assert slab.get(b"key") == b"value"
    assert slab.get(kind(b"key")) == b"value"
    assert type(slab.get(b"key")) is bytes
    assert kind(b"key") in slab


def test_a_bytearray_may_change_after_the_call(slab: SharedSlab) -> None:
    value = bytearray(b"before")
    slab.set(b"key", value)
    value += b" and after"
    assert slab.get(b"key") == b"before"


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 64, 1023, 1024])
def test_keys_have_1_to_1024_bytes(slab: SharedSlab, length: int) -> None:
    assert slab.set(b"k" * length, b"value")
    assert slab.get(b"k" * length) == b"value"
    assert slab.get(b"k" * (length - 1) + b"j") is None


def test_set_replaces(slab: SharedSlab) -> None:
    slab.set(b"key", b"old")
    slab.set(b"key", b"new and longer")
    assert slab.get(b"key") == b"new and longer"
    assert len(slab) == 1


def test_a_value_that_is_too_large_is_refused_and_the_old_one_is_gone(slab: SharedSlab) -> None:
    slab.set(b"key", b"old")
    assert slab.set(b"key", bytes((slab.config.max_value_bytes or 0) + 1)) is False
    assert slab.get(b"key") is None
    assert slab.stats().refusals == 1


def test_the_largest_value_is_stored(slab: SharedSlab) -> None:
    value = b"x" * (slab.config.max_value_bytes or 0)
    assert slab.set(b"key", value)
    assert slab.get(b"key") == value


def test_get_many_returns_the_hits_only(slab: SharedSlab) -> None:
    slab.set(b"a", b"1")
    slab.set(b"b", b"2")
    assert slab.get_many([b"a", b"absent", b"b", b"a"]) == {b"a": b"1", b"b": b"2"}
    assert slab.get_many(()) == {}
    assert slab.get_many(key for key in (bytearray(b"a"),)) == {b"a": b"1"}


def test_set_many_returns_the_keys_that_were_refused(slab: SharedSlab) -> None:
    too_large = bytes((slab.config.max_value_bytes or 0) + 1)
    assert slab.set_many({b"a": b"1", b"b": too_large, b"c": b"3"}) == [b"b"]
    assert slab.get_many([b"a", b"b", b"c"]) == {b"a": b"1", b"c": b"3"}


def test_add_stores_only_what_is_absent(slab: SharedSlab) -> None:
    assert slab.add(b"key", b"first") is True
    assert slab.add(b"key", b"second") is False
    assert slab.get(b"key") == b"first"
    slab.delete(b"key")
    assert slab.add(b"key", b"third") is True


def test_cas_stores_over_the_version_that_gets_returned(slab: SharedSlab) -> None:
    assert slab.gets(b"key") is None
    slab.set(b"key", b"one")
    found = slab.gets(b"key")
    assert found is not None
    value, version = found
    assert value == b"one"
    assert slab.cas(b"key", b"two", version) is True
    assert slab.cas(b"key", b"three", version) is False
    assert slab.get(b"key") == b"two"


def test_cas_of_an_absent_key_is_refused(slab: SharedSlab) -> None:
    slab.set(b"key", b"one")
    found = slab.gets(b"key")
    assert found is not None
    slab.delete(b"key")
    assert slab.cas(b"key", b"two", found[1]) is False
    assert b"key" not in slab


def test_a_value_set_again_has_another_version(slab: SharedSlab) -> None:
    versions = set()
    for _ in range(3):
        slab.set(b"key", b"same")
        found = slab.gets(b"key")
        assert found is not None
        versions.add(found[1])
    assert len(versions) == 3


def test_fill_stores_what_get_or_token_missed(slab: SharedSlab) -> None:
    value, token = slab.get_or_token(b"key")
    assert value is None
    assert slab.fill(b"key", b"computed", token) is True
    assert slab.get_or_token(b"key")[0] == b"computed"


@pytest.mark.parametrize("event", ["set", "delete after set", "delete", "clear", "fill"])
def test_fill_is_refused_after(slab: SharedSlab, event: str) -> None:
    _, token = slab.get_or_token(b"key")
    if event.endswith("set"):
        slab.set(b"key", b"newer")
    if event.startswith("delete"):
        slab.delete(b"key")
    if event == "clear":
        slab.clear()
    if event == "fill":
        slab.fill(b"key", b"newer", token)
    before = slab.get(b"key")
    assert slab.fill(b"key", b"stale", token) is False
    assert slab.get(b"key") == before


def test_incr_adds_to_a_decimal(slab: SharedSlab) -> None:
    slab.set(b"counter", b"41")
    assert slab.incr(b"counter") == 42
    assert slab.incr(b"counter", -50) == -8
    assert slab.incr(b"counter", delta=0) == -8
    assert slab.get(b"counter") == b"-8"


def test_incr_reaches_both_ends_of_64_bits(slab: SharedSlab) -> None:
    slab.set(b"counter", b"0")
    assert slab.incr(b"counter", 2**63 - 1) == 2**63 - 1
    assert slab.incr(b"counter", -(2**63)) == -1
    assert slab.incr(b"counter", -(2**63) + 1) == -(2**63)


def test_delete_says_whether_it_was_there(slab: SharedSlab) -> None:
    slab.set(b"key", b"value")
    assert slab.delete(b"key") is True
    assert slab.delete(b"key") is False
    assert slab.get(b"key") is None


def test_delete_many_counts(slab: SharedSlab) -> None:
    slab.set_many({b"a": b"1", b"b": b"2", b"c": b"3"})
    assert slab.delete_many([b"a", b"absent", b"c"]) == 2
    assert [info.key for info in slab.scan()] == [b"b"]


def test_pop_returns_what_it_deletes(slab: SharedSlab) -> None:
    slab.set(b"key", b"value")
    assert slab.pop(b"key") == b"value"
    assert slab.pop(b"key") is None
    assert slab.pop(b"key", default=b"none") == b"none"


def test_contains_counts_neither_hit_nor_miss(slab: SharedSlab) -> None:
    slab.set(b"key", b"value")
    assert b"key" in slab
    assert b"absent" not in slab
    assert (slab.stats().hits, slab.stats().misses) == (0, 0)


def test_clear_leaves_nothing_at_once(slab: SharedSlab) -> None:
    for number in range(500):
        slab.set(b"%d" % number, b"value")
    slab.clear()
    stats = slab.stats()
    assert (len(slab), stats.entries, stats.payload_bytes) == (0, 0, 0)
    assert slab.get_many(b"%d" % number for number in range(500)) == {}
    assert slab.set(b"1", b"again")
    assert slab.get(b"1") == b"again"
    assert len(slab) == 1


def test_scan_yields_what_begins_with_the_prefix(slab: SharedSlab) -> None:
    for number in range(200):
        slab.set(b"a/%03d" % number, b"v" * number)
        slab.set(b"b/%03d" % number, b"v")
    found = {info.key: info for info in slab.scan(b"a/")}
    assert sorted(found) == [b"a/%03d" % number for number in range(200)]
    assert all(info.size == int(key[2:]) for key, info in found.items())
    assert len(list(slab.scan())) == 400


def test_scan_tells_lives_and_frequency(slab: SharedSlab) -> None:
    slab.set(b"mortal", b"12345", ttl=100, tti=50)
    slab.set(b"eternal", b"", ttl=None)
    slab.get(b"mortal")
    found = {info.key: info for info in slab.scan()}
    mortal, eternal = found[b"mortal"], found[b"eternal"]
    assert isinstance(mortal, EntryInfo)
    assert mortal.size == 5
    assert mortal.ttl_left == pytest.approx(100, abs=1)
    assert mortal.idle == pytest.approx(0, abs=1)
    assert mortal.frequency >= 1
    assert (eternal.ttl_left, eternal.idle) == (None, None)


def test_stats_count(slab: SharedSlab) -> None:
    slab.set(b"a", b"12345")
    slab.set(b"b", b"1")
    slab.get(b"a")
    slab.get_many([b"a", b"absent"])
    slab.gets(b"absent")
    slab.delete(b"b")
    stats = slab.stats()
    assert isinstance(stats, SlabStats)
    assert (stats.entries, stats.payload_bytes) == (1, 6)
    assert (stats.hits, stats.misses, stats.sets, stats.deletes) == (2, 2, 2, 1)
    assert (stats.max_entries, stats.memory_bytes) == (4096, 4 << 20)
    assert stats.attached_processes == 1
    assert stats.used_bytes >= stats.payload_bytes
    assert not hasattr(stats, "__dict__")
    with pytest.raises(AttributeError):
        stats.hits = 0  # type: ignore[misc]


def test_there_are_never_more_than_max_entries(name: str) -> None:
    with SharedSlab(name, SlabConfig(memory_bytes=4 << 20, max_entries=100)) as slab:
        for number in range(1000):
            assert slab.set(b"%d" % number, b"value")
            assert len(slab) <= 100
            assert slab.get(b"%d" % number) == b"value"  # a value just stored is readable
        assert slab.stats().evictions >= 900
        assert slab.check() == []


def test_a_full_slab_goes_on_taking_values_of_any_size(name: str) -> None:
    with SharedSlab(name, SlabConfig(memory_bytes=2 << 20)) as slab:
        for number in range(600):
            assert slab.set(b"%d" % number, b"v" * (100 << (number % 12)))
        assert slab.stats().evictions > 0
        assert slab.check() == []


def test_a_closed_slab_s_context_is_left(name: str) -> None:
    with SharedSlab(name) as slab:
        assert not slab.closed
    assert slab.closed


def test_its_name_config_and_repr_say_what_it_is(slab: SharedSlab, name: str) -> None:
    assert slab.name == name
    assert slab.config == SlabConfig(memory_bytes=4 << 20)
    assert repr(slab) == f"<SharedSlab {name!r}>"
    slab.close()
    assert repr(slab) == f"<SharedSlab {name!r}, closed>"


def test_default_reads_as_it_is_written() -> None:
    assert repr(DEFAULT) == "DEFAULT"
