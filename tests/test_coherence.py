"""Invalidation and expiry between real processes of two hosts, over a real Redis that fails.

The figures (100 ms, 1 s) are measured by bench/invalidation.py and tests/stress/recycling.py; here are only deadlines.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fault_proxy import FaultProxy
from host_agent import HostAgent
from redis_servers import RedisServer, wait_for

from llm_edge_cache import CacheableRequest, CachedResponse, L1Config, L2Config, SharedSlab, SyncCacheManager
from llm_edge_cache.regions import Counter, Word

TEXT = "what?"
LIVENESS = 30.0
"""Thirty times what takes a second."""

Start = Callable[..., HostAgent]


@pytest.fixture
def prefix() -> str:
    return f"coherence-{secrets.token_hex(4)}:"


@pytest.fixture
def start(prefix: str) -> Iterator[Start]:
    """Start a process: host ("a", "b"), URL of its Redis, options of L2Config."""
    names: set[str] = set()
    with ExitStack() as stack:

        def started(host: str, url: str, **options: Any) -> HostAgent:
            name = f"test-{prefix[:-1]}-{host}"
            names.add(name)
            return stack.enter_context(HostAgent(name, url, prefix, **{"operation_timeout_ms": 10_000, **options}))

        yield started
    for name in names:
        SharedSlab.attach(name).unlink()


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A Redis that this test may kill, and that keeps its data over that."""
    with RedisServer(appendonly=True) as server:
        yield server


def is_gone(agent: HostAgent, text: str = TEXT) -> Callable[[], bool]:
    return lambda: agent.get(text) is None


# ---- while connected ----


@pytest.mark.parametrize("kind", ["key", "tag", "all"])
def test_an_invalidation_is_heard_of_on_the_other_host(redis_server: RedisServer, start: Start, kind: str) -> None:
    # Not by asking Redis, as a host does that has heard nothing for too long.
    here, there = (start(host, redis_server.url, staleness_seconds=600) for host in "ab")
    there.do("store", TEXT, "old", tags=["t"])
    there.do("flush")
    assert here.get(TEXT) == "old"  # promoted
    command = {"key": ("invalidate", TEXT), "tag": ("invalidate_tag", "t"), "all": ("clear_all",)}[kind]
    here.do(*command)
    assert here.get(TEXT) is None  # here at once
    wait_for(is_gone(there), f"{kind} is void on the other host", timeout=LIVENESS)
    assert there.count(Counter.STREAM_FLUSHES) == 0


def test_all_processes_of_the_host_are_told_before_it_returns(redis_server: RedisServer, start: Start) -> None:
    one, other = start("a", redis_server.url), start("a", redis_server.url)
    for number in range(50):
        other.do("store", TEXT, f"old {number}")
        one.do("invalidate", TEXT)
        assert other.get(TEXT) is None
        assert other.do("fetch", TEXT, "new") == "new"
        one.do("invalidate", TEXT)


# ---- partitions ----


def test_a_host_that_was_cut_off_serves_nothing_old_once_it_has_redis_again(
    redis_server: RedisServer, fault_proxy: FaultProxy, start: Start
) -> None:
    here, there = start("a", redis_server.url), start("b", fault_proxy.url, staleness_seconds=0.3)
    here.do("store", TEXT, "old")
    here.do("flush")
    assert there.get(TEXT) == "old"
    fault_proxy.refuse()
    wait_for(lambda: there.word(Word.BREAKER) > 1000, "the breaker opens", timeout=LIVENESS)
    here.do("invalidate", TEXT)
    assert there.get(TEXT) == "old"  # better than nothing: nobody can tell
    time.sleep(0.4)  # longer than staleness_seconds
    fault_proxy.pass_on()
    end = time.monotonic() + LIVENESS
    has_noticed = False
    while time.monotonic() < end:
        has_noticed = there.word(Word.BREAKER) == 0
        found = there.get(TEXT)
        assert not (has_noticed and found == "old")
        if found is None:
            has_noticed = there.word(Word.BREAKER) == 0  # it may have been noticed since the look above
            break
    assert has_noticed
    assert there.count(Counter.STREAM_FLUSHES) == 0


def test_without_a_reader_nothing_is_served_unasked_for_longer_than_staleness_seconds(
    redis_server: RedisServer, start: Start, prefix: str, name: str
) -> None:
    here = start("a", redis_server.url)
    l2 = L2Config(redis_server.url, key_prefix=prefix, staleness_seconds=0.5, operation_timeout_ms=10_000)
    with SyncCacheManager(L1Config(memory_bytes=4 << 20, name=name), l2) as there:
        request = CacheableRequest("model", TEXT)
        there.store(request, CachedResponse("old", "model"))
        there._engine.upkeep.stop(LIVENESS)  # nobody follows the stream from here on; Redis answers
        assert there._engine.queue is not None
        assert there._engine.queue.flush(LIVENESS)
        assert there.lookup(request).is_hit
        here.do("invalidate", TEXT)
        since = time.monotonic()
        last_old = since
        while time.monotonic() < since + 1.5:
            asked = time.monotonic()
            if there.lookup(request).is_hit:
                last_old = asked
        assert last_old - since <= 0.5
        assert not there.lookup(request).is_hit


@pytest.mark.parametrize("loss", ["FLUSHALL", "XTRIM"])
def test_a_stream_that_lost_the_place_clears_l1_and_replays_nothing(
    own_server: RedisServer, start: Start, prefix: str, loss: str
) -> None:
    there = start("b", own_server.url)
    there.do("store", TEXT, "perhaps old")
    there.do("flush")
    own_server.ask(*(["FLUSHALL"] if loss == "FLUSHALL" else ["XTRIM", f"{prefix}events", "MAXLEN", 0]))
    wait_for(lambda: there.count(Counter.STREAM_FLUSHES) == 1, "the loss is noticed", timeout=LIVENESS)
    wait_for(lambda: not there.do("is_in_l1", TEXT), "L1 is cleared", timeout=LIVENESS)
    assert there.count(Counter.INVALIDATED_REMOTE) == 0
    assert there.get(TEXT) == (None if loss == "FLUSHALL" else "perhaps old")  # which Redis knows to be good


# ---- Redis away during an invalidation ----


def test_what_could_not_be_delivered_is_and_redis_is_not_believed_before(own_server: RedisServer, start: Start) -> None:
    here = start("a", own_server.url)
    here.do("store", TEXT, "old")
    here.do("flush")
    own_server.kill()
    here.do("invalidate", TEXT)
    assert here.get(TEXT) is None
    own_server.start()  # with the old value
    end = time.monotonic() + LIVENESS
    while here.word(Word.UNDELIVERED) and time.monotonic() < end:
        assert here.get(TEXT) is None
    assert here.word(Word.UNDELIVERED) == 0
    assert here.get(TEXT) is None
    assert start("b", own_server.url).get(TEXT) is None


def test_another_process_delivers_what_a_killed_one_could_not(own_server: RedisServer, start: Start) -> None:
    victim, heir, there = start("a", own_server.url), start("a", own_server.url), start("b", own_server.url)
    there.do("store", TEXT, "old")
    there.do("flush")
    own_server.kill()
    victim.do("invalidate", TEXT)
    victim.kill()
    own_server.start()
    wait_for(is_gone(there), "it is void on the other host", timeout=LIVENESS)
    assert heir.word(Word.UNDELIVERED) == 0
    assert heir.get(TEXT) is None


def test_what_all_processes_left_undelivered_the_next_one_delivers(own_server: RedisServer, start: Start) -> None:
    victim = start("a", own_server.url)
    victim.do("store", TEXT, "old")
    victim.do("flush")
    own_server.kill()
    victim.do("invalidate", TEXT)
    victim.kill()
    own_server.start()
    heir = start("a", own_server.url)
    assert heir.get(TEXT) is None
    wait_for(lambda: heir.word(Word.UNDELIVERED) == 0, "it is delivered", timeout=LIVENESS)
    assert heir.get(TEXT) is None


# ---- the reader ----


@pytest.mark.parametrize("fate", ["killed", "stopped"])
def test_a_reader_that_is_gone_is_replaced_and_nothing_flushed(
    redis_server: RedisServer, start: Start, fate: str
) -> None:
    reader, other, here = start("b", redis_server.url), start("b", redis_server.url), start("a", redis_server.url)
    first = other.word(Word.READER)
    assert first != 0
    reader.kill() if fate == "killed" else reader.stop()
    wait_for(lambda: other.word(Word.READER) != first, "another reads", timeout=LIVENESS)
    other.do("store", TEXT, "old")
    here.do("invalidate", TEXT)
    wait_for(is_gone(other), "the new reader applies it", timeout=LIVENESS)
    if fate == "stopped":
        reader.go_on()
        assert reader.get(TEXT) is None
    assert other.count(Counter.STREAM_FLUSHES) == 0


def test_a_recycled_host_goes_on_from_its_place(redis_server: RedisServer, start: Start) -> None:
    there, here = start("b", redis_server.url), start("a", redis_server.url)
    for text in ("void", "sound"):
        there.do("store", text, text)
    there.do("flush")
    there.kill()  # the last process of its host
    here.do("invalidate", "void")
    there = start("b", redis_server.url)
    wait_for(is_gone(there, "void"), "what was missed is applied", timeout=LIVENESS)
    assert there.do("is_in_l1", "sound")
    assert there.count(Counter.STREAM_FLUSHES) == 0


# ---- expiry ----


def test_a_short_life_ends_in_both_tiers_however_it_was_promoted(redis_server: RedisServer, start: Start) -> None:
    here, there = start("a", redis_server.url), start("b", redis_server.url)
    since = time.time()
    here.do("store", TEXT, "short", l2_ttl=0.6)
    stored_at = time.time()
    here.do("flush")
    time.sleep(0.2)
    assert there.get(TEXT) == "short" or time.time() > since + 0.6  # promoted, with a third of its life gone
    while time.time() < stored_at + 0.62:
        time.sleep(0.02)
    assert here.get(TEXT) is None
    assert there.get(TEXT) is None
    assert not there.do("is_in_l1", TEXT)


def test_l1_may_forget_sooner_than_redis(redis_server: RedisServer, start: Start) -> None:
    here = start("a", redis_server.url)
    here.do("store", TEXT, "long", l1_ttl=0.1)
    here.do("flush")
    time.sleep(0.15)
    assert not here.do("is_in_l1", TEXT)
    assert here.get(TEXT) == "long"
    assert here.do("is_in_l1", TEXT)


def test_an_entry_that_nobody_reads_leaves_l1_and_not_redis(redis_server: RedisServer, prefix: str, name: str) -> None:
    l1 = L1Config(memory_bytes=4 << 20, tti_seconds=40.0, name=name)
    l2 = L2Config(redis_server.url, key_prefix=prefix, operation_timeout_ms=10_000)
    with SyncCacheManager(l1, l2) as manager:
        request = CacheableRequest("model", TEXT)
        manager.store(request, CachedResponse("idle", "model"))
        assert manager._engine.queue is not None
        assert manager._engine.queue.flush(LIVENESS)
        for _ in range(6):  # read again and again it stays beyond that time
            manager.slab._advance_clock(8.0)
            assert manager.lookup(request).tier == "l1"
        manager.slab._advance_clock(41.0)
        assert manager.lookup(request).tier == "l2"
