"""TTL and TTI, exact to the coarse clock; the clock of the slab object is moved, nobody sleeps."""

from __future__ import annotations

import pytest

from llm_edge_cache import DEFAULT, SharedSlab, SlabConfig


def test_an_entry_expires_after_its_ttl(slab: SharedSlab) -> None:
    slab.set(b"key", b"value", ttl=10)
    slab._advance_clock(9.9)
    assert slab.get(b"key") == b"value"
    slab._advance_clock(0.2)
    assert slab.get(b"key") is None
    assert b"key" not in slab
    assert slab.get_many([b"key"]) == {}
    assert slab.gets(b"key") is None
    assert list(slab.scan()) == []


def test_the_slab_s_ttl_holds_where_none_is_given(slab: SharedSlab) -> None:
    slab.set(b"default", b"value")
    slab.set(b"the same", b"value", ttl=DEFAULT)
    assert slab.ttl(b"default") == pytest.approx(300, abs=1)
    slab._advance_clock(301)
    assert slab.get_many([b"default", b"the same"]) == {}


def test_ttl_none_never_expires(slab: SharedSlab) -> None:
    slab.set(b"key", b"value", ttl=None)
    assert slab.ttl(b"key") is None
    slab._advance_clock(1e9)
    assert slab.get(b"key") == b"value"


def test_ttl_of_an_absent_key_is_none(slab: SharedSlab) -> None:
    assert slab.ttl(b"absent") is None


@pytest.mark.parametrize("ttl", [1e-12, 0.001, 0.5])
def test_the_shortest_ttl_ends(slab: SharedSlab, ttl: float) -> None:
    slab.set(b"key", b"value", ttl=ttl)
    slab._advance_clock(ttl + 0.02)
    assert slab.get(b"key") is None


@pytest.mark.parametrize("ttl", [1e9, 1e12, 1e300, 10**30])
def test_a_very_long_ttl_is_as_good_as_its_word(slab: SharedSlab, ttl: float) -> None:
    slab.set(b"key", b"value", ttl=ttl)
    slab._advance_clock(9e8)
    assert slab.get(b"key") == b"value"


def test_touch_gives_a_new_life(slab: SharedSlab) -> None:
    slab.set(b"key", b"value", ttl=1000)
    slab._advance_clock(900)
    assert slab.touch(b"key", 2000) is True
    slab._advance_clock(1900)
    assert slab.ttl(b"key") == pytest.approx(100, abs=50)
    assert slab.get(b"key") == b"value"
    slab._advance_clock(200)
    assert slab.touch(b"key") is False
    assert slab.get(b"key") is None


def test_touch_may_take_the_expiry_away_and_bring_the_default(slab: SharedSlab) -> None:
    slab.set(b"key", b"value", ttl=10)
    assert slab.touch(b"key", None)
    assert slab.ttl(b"key") is None
    assert slab.touch(b"key")
    assert slab.ttl(b"key") == pytest.approx(300, abs=1)


def test_incr_keeps_the_expiry(slab: SharedSlab) -> None:
    slab.set(b"counter", b"1", ttl=1000)
    slab._advance_clock(400)
    slab.incr(b"counter")
    assert slab.ttl(b"counter") == pytest.approx(600, abs=50)
    slab._advance_clock(700)
    with pytest.raises(KeyError):
        slab.incr(b"counter")


def test_add_stores_over_an_expired_entry(slab: SharedSlab) -> None:
    slab.set(b"key", b"old", ttl=1)
    slab._advance_clock(2)
    assert slab.add(b"key", b"new") is True
    assert slab.get(b"key") == b"new"


def test_delete_and_pop_of_an_expired_entry_find_nothing(slab: SharedSlab) -> None:
    slab.set_many({b"a": b"1", b"b": b"2"}, ttl=1)
    slab._advance_clock(2)
    assert slab.delete(b"a") is False
    assert slab.pop(b"b") is None


def test_an_entry_unread_for_its_tti_expires(slab: SharedSlab) -> None:
    slab.set(b"key", b"value", tti=10, ttl=None)
    for _ in range(5):
        slab._advance_clock(8)
        assert slab.get(b"key") == b"value"
    slab._advance_clock(11)
    assert slab.get(b"key") is None


def test_a_ttl_ends_what_a_tti_keeps(slab: SharedSlab) -> None:
    slab.set(b"key", b"value", ttl=20, tti=10)
    for _ in range(2):
        slab._advance_clock(8)
        assert slab.get(b"key") == b"value"
    slab._advance_clock(5)
    assert slab.get(b"key") is None


def test_looking_without_reading_does_not_keep_an_entry(slab: SharedSlab) -> None:
    slab.set(b"key", b"value", ttl=None, tti=10)
    slab._advance_clock(6)
    assert b"key" in slab
    assert len(list(slab.scan())) == 1
    slab._advance_clock(6)
    assert slab.get(b"key") is None


def test_the_slab_s_tti_holds_where_none_is_given(name: str) -> None:
    with SharedSlab(name, SlabConfig(memory_bytes=4 << 20, ttl=None, tti=10)) as slab:
        slab.set(b"idle", b"value")
        slab.set(b"kept", b"value", tti=None)
        slab._advance_clock(11)
        assert slab.get_many([b"idle", b"kept"]) == {b"kept": b"value"}


def test_expired_memory_is_reclaimed_before_anything_live_is_evicted(name: str) -> None:
    with SharedSlab(name, SlabConfig(memory_bytes=4 << 20, max_entries=100, ttl=None)) as slab:
        for number in range(50):
            slab.set(b"live %d" % number, b"value")
            slab.set(b"dead %d" % number, b"value", ttl=1)
        slab._advance_clock(2)
        for number in range(50):
            slab.set(b"new %d" % number, b"value")
        stats = slab.stats()
        assert (stats.expirations, stats.evictions, stats.entries) == (50, 0, 100)
        assert len(slab.get_many(b"live %d" % number for number in range(50))) == 50
        assert slab.check() == []


def test_the_time_left_is_read_from_the_same_clock(slab: SharedSlab) -> None:
    slab.set(b"key", b"value", ttl=1000)
    slab._advance_clock(400)
    assert slab.ttl(b"key") == pytest.approx(600, abs=50)
    assert next(slab.scan()).ttl_left == pytest.approx(600, abs=50)
