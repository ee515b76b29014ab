"""How much is in Redis: exact while it is little, never more than a bounded look, void values not counted."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from redis_parts import HostParts, hosts, key_of
from redis_servers import RedisServer

from llm_edge_cache import CachedResponse
from llm_edge_cache.codec import Entry
from llm_edge_cache.deferred import Write, write_all
from llm_edge_cache.redis_client import Call
from llm_edge_cache.regions import Word
from llm_edge_cache.sizing import INTERVAL_NS, Size, Sizer


@pytest.fixture
def host(redis_server: RedisServer) -> Iterator[HostParts]:
    with hosts(redis_server) as (made,):
        yield made


def fill(host: HostParts, *names: str) -> int:
    """Store values; returns the bytes of their records."""
    data = host.codec.encode(Entry(CachedResponse("42", "model")))
    begin, now = host.word(Word.BEGIN), time.monotonic_ns()
    writes = [Write(key_of(name), data, begin, now, time.time() + 60) for name in names]
    host.perform(write_all(host.tier, host.slab, list(writes)))
    lengths = [host.client.run(Call((b"STRLEN", host.tier.names.value(key_of(name))))) for name in names]
    return sum(lengths)


def test_values_are_counted_with_their_bytes_and_nothing_else_is(host: HostParts) -> None:
    size = fill(host, "a", "b", "c")
    host.invalidate("key", key_of("d").decode())  # a tombstone
    host.invalidate("tag", "t")
    host.perform(host.tier.claim(key_of("e"), b"1" * 32))
    assert host.perform(Sizer(host.slab, host.tier).sample(5)) == Size(3, size)
    assert (host.word(Word.L2_ENTRIES), host.word(Word.L2_BYTES), host.word(Word.L2_SIZED_AT)) == (3, size, 5)


def test_what_a_clear_all_made_void_is_not_counted(host: HostParts) -> None:
    fill(host, "a", "b")
    host.invalidate("all")
    size = fill(host, "c")
    assert host.perform(Sizer(host.slab, host.tier).sample(5)) == Size(1, size)


def test_another_prefix_is_another_cache(redis_server: RedisServer, host: HostParts) -> None:
    with hosts(redis_server) as (other,):
        fill(other, "a")
        assert host.perform(Sizer(host.slab, host.tier).sample(5)) == Size(0, 0)


def test_it_is_due_once_a_minute(host: HostParts) -> None:
    sizer = Sizer(host.slab, host.tier)
    now = 10 * INTERVAL_NS
    host.perform(sizer.sample(now))
    assert not sizer.is_due(now + INTERVAL_NS - 1)
    assert sizer.is_due(now + INTERVAL_NS)
