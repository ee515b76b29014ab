"""What is read of a whole slab for its operator: entries with values, tags, processes."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from llm_edge_cache import SharedSlab
from llm_edge_cache._native import MAX_KEY_BYTES

END = (1 << 64) - 1


def everything(slab: SharedSlab, limit: int = 1 << 20) -> dict[bytes, tuple[bytes, float | None, float | None]]:
    cursor, found = 0, {}
    while cursor != END:
        cursor, rows = slab._scan_entries(cursor, limit)
        found.update({key: (value, ttl, tti) for key, value, ttl, tti in rows})
    return found


@pytest.mark.parametrize("limit", [1, 1000, 1 << 30])
def test_every_entry_comes_with_its_value_whatever_the_limit(slab: SharedSlab, limit: int) -> None:
    wanted = {b"key %d" % number: os.urandom(number % 700) for number in range(500)}
    wanted |= {b"k" * MAX_KEY_BYTES: b"", b"large": os.urandom(300_000)}
    slab.set_many(wanted)
    assert {key: value for key, (value, _, _) in everything(slab, limit).items()} == wanted


def test_a_limit_ends_a_step_soon(slab: SharedSlab) -> None:
    slab.set_many({b"key %d" % number: bytes(1000) for number in range(500)})
    _, rows = slab._scan_entries(0, 10_000)
    assert len(rows) == 10


def test_lives_come_along(slab: SharedSlab) -> None:
    slab.set(b"mortal", b"1", ttl=100, tti=2.5)
    slab.set(b"eternal", b"2", ttl=None)
    found = everything(slab)
    assert found[b"mortal"] == (b"1", pytest.approx(100, abs=1), 2.5)
    assert found[b"eternal"] == (b"2", None, None)


def test_what_has_expired_is_left_out(slab: SharedSlab) -> None:
    slab.set(b"old", b"1", ttl=10)
    slab.set(b"idle", b"1", ttl=None, tti=10)
    slab.set(b"young", b"1", ttl=30)
    slab._advance_clock(20)
    assert list(everything(slab)) == [b"young"]


def test_reading_everything_counts_and_touches_nothing(slab: SharedSlab) -> None:
    slab.set(b"key", b"value", tti=50)
    before = (slab.stats(), next(slab.scan()).frequency)
    everything(slab)
    assert (slab.stats(), next(slab.scan()).frequency) == before


def test_a_slab_that_is_gone_has_no_entries_and_no_tags(slab: SharedSlab) -> None:
    slab.set(b"key", b"value")
    slab.unlink()
    assert everything(slab) == {}
    assert slab._tags() == (0, {})


def test_the_tags_that_were_raised_are_told(slab: SharedSlab) -> None:
    count, tags = slab._tags()
    assert tags == {}
    slab._tag_raise(count + 3, 7)
    slab._tag_raise(4, 9)
    assert slab._tags() == (count, {3: 7, 4: 9})


def test_each_process_has_its_own_hits_and_misses(slab: SharedSlab, run_python: Callable[..., str]) -> None:
    slab.set(b"key", b"value")
    slab.get(b"key")
    program = "import os, sys; from llm_edge_cache import SharedSlab; s = SharedSlab.attach(sys.argv[1]); "
    other = int(run_python(program + "s.get(b'absent'); s.get(b'gone'); print(os.getpid())", slab.name))
    rows = {pid: (hits, misses) for pid, _, hits, misses in slab._mapping.processes()}
    assert rows[os.getpid()] == (1, 0)
    # At its end it gave its record back: what it counted stays.
    assert sorted(rows.values()) == [(0, 2), (1, 0)]
    assert other not in rows or not next(alive for pid, alive, *_ in slab._mapping.processes() if pid == other)
