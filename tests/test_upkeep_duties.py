"""What runs beside requests: leases renewed, Redis probed and found again, the stream read by one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fault_proxy import FaultProxy
from redis_parts import HostParts, hosts, key_of
from redis_servers import RedisServer, wait_for

from llm_edge_cache import SharedSlab
from llm_edge_cache.flight import Flights, Lead
from llm_edge_cache.invalidation import Invalidator
from llm_edge_cache.redis_client import Call, RedisClient, Script, parse_redis_url
from llm_edge_cache.redis_records import CLAIM
from llm_edge_cache.regions import Word
from llm_edge_cache.upkeep import Upkeep

KEY = key_of()
LEASE = b"1" * 32
LIVENESS = 10.0

Start = Callable[..., Upkeep]


@pytest.fixture
def host(redis_server: RedisServer) -> Iterator[HostParts]:
    with hosts(redis_server, follows=False) as (made,):
        yield made


@pytest.fixture
def start(host: HostParts) -> Iterator[Start]:
    started: list[tuple[Upkeep, RedisClient]] = []

    def begin(url: str, flights: Flights | None = None) -> Upkeep:
        client = RedisClient(parse_redis_url(url), operation_timeout=1.0, connection_timeout=1.0)
        upkeep = Upkeep(host.slab, flights or Flights(host.slab), client, host.tier, host.invalidator)
        started.append((upkeep, client))
        upkeep.start()
        return upkeep

    yield begin
    for upkeep, client in started:
        upkeep.stop(LIVENESS)
        client.close()


def test_it_finds_its_place_in_the_stream_and_says_so(host: HostParts, redis_server: RedisServer, start: Start) -> None:
    upkeep = start(redis_server.url)
    assert upkeep.wait_established(LIVENESS)
    assert host.tier.is_usable()
    assert host.word(Word.READER) != 0


def test_nobody_waits_long_for_a_redis_that_is_away(host: HostParts, fault_proxy: FaultProxy, start: Start) -> None:
    fault_proxy.refuse()
    assert start(fault_proxy.url).wait_established(LIVENESS)
    assert not host.tier.is_usable()


def test_an_open_breaker_closes_when_redis_is_back(host: HostParts, fault_proxy: FaultProxy, start: Start) -> None:
    fault_proxy.refuse()
    start(fault_proxy.url)
    wait_for(lambda: not host.tier.breaker.is_closed(), "the breaker opens", timeout=LIVENESS)
    fault_proxy.pass_on()
    wait_for(host.tier.is_usable, "Redis is used again", timeout=LIVENESS)


def test_an_unreachable_redis_is_probed_by_one_process_an_interval(
    host: HostParts, fault_proxy: FaultProxy, start: Start
) -> None:
    fault_proxy.reset_mid_reply(0)
    for _ in range(3):
        start(fault_proxy.url)
    wait_for(lambda: not host.tier.breaker.is_closed(), "the breaker opens", timeout=LIVENESS)
    before, since = fault_proxy.accepted, time.monotonic()
    time.sleep(1.2)
    probes = fault_proxy.accepted - before
    assert probes <= (time.monotonic() - since) / 0.5 + 2  # one may have been claimed before, and be sent only now


def test_the_journal_is_delivered(host: HostParts, redis_server: RedisServer, start: Start) -> None:
    host.is_cut = True
    host.invalidate("key", KEY.decode())
    start(redis_server.url)
    wait_for(lambda: host.word(Word.UNDELIVERED) == 0, "it is delivered", timeout=LIVENESS)
    assert host.client.run(Call((b"GET", host.tier.names.value(KEY))))[:1] == b"X"


def test_who_stops_lets_another_read_at_once(host: HostParts, redis_server: RedisServer, start: Start) -> None:
    one = start(redis_server.url)
    assert one.wait_established(LIVENESS)
    other = start(redis_server.url)
    first = host.word(Word.READER)
    one.stop(LIVENESS)
    wait_for(lambda: host.word(Word.READER) not in (0, first), "the other reads", timeout=LIVENESS)
    other.stop(LIVENESS)
    assert host.word(Word.READER) == 0


def test_flights_and_leases_are_kept_for_as_long_as_it_takes(
    host: HostParts, redis_server: RedisServer, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_edge_cache.redis_tier.LEASE_MS", 1500)
    monkeypatch.setattr("llm_edge_cache.flight.FLIGHT_LEASE_NS", 1_500_000_000)
    flights = Flights(host.slab)
    assert start(redis_server.url, flights).wait_established(LIVENESS)
    lead = flights.join(KEY)
    assert isinstance(lead, Lead)
    lead.lease = LEASE
    host.client.run(Script(CLAIM, host.tier.names.value(KEY), (LEASE, 1500, b"")))
    time.sleep(2.5)
    assert host.slab._flight_state(lead.record, lead.token) >= 0
    assert host.client.run(Script(CLAIM, host.tier.names.value(KEY), (b"2" * 32, 1500, b""))) < 0
    flights.end(lead)
    assert not flights.has_leads()


def test_without_redis_it_renews_flights(slab: SharedSlab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_edge_cache.flight.FLIGHT_LEASE_NS", 1_500_000_000)
    flights = Flights(slab)
    upkeep = Upkeep(slab, flights, None, None, Invalidator(slab, None))
    upkeep.start()
    lead = flights.join(KEY)
    assert isinstance(lead, Lead)
    time.sleep(2.0)
    assert slab._flight_state(lead.record, lead.token) >= 0
    flights.end(lead)
    upkeep.stop(LIVENESS)


def test_it_goes_on_after_whatever_went_wrong(
    host: HostParts, redis_server: RedisServer, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_failed = threading.Event()
    deliver = Invalidator.deliver

    def fail_once(self: Invalidator) -> Any:
        if not has_failed.is_set():
            has_failed.set()
            raise KeyError("a bug")
        return deliver(self)

    monkeypatch.setattr(Invalidator, "deliver", fail_once)
    host.slab._word_add(Word.UNDELIVERED, 1)
    start(redis_server.url)
    wait_for(lambda: host.word(Word.UNDELIVERED) == 0, "it went on", timeout=LIVENESS)
    assert has_failed.is_set()


def test_it_ends_with_its_slab(host: HostParts, redis_server: RedisServer, start: Start, name: str) -> None:
    upkeep = start(redis_server.url)
    assert upkeep.wait_established(LIVENESS)
    host.slab._bind(None)
    try:
        wait_for(lambda: not upkeep._thread.is_alive(), "the thread ends", timeout=LIVENESS)
    finally:
        assert host.slab._segment is not None
        host.slab._bind(host.slab._segment.mapping)


def test_it_starts_once_and_not_after_its_end(host: HostParts, redis_server: RedisServer, start: Start) -> None:
    upkeep = start(redis_server.url)
    upkeep.start()
    upkeep.stop(LIVENESS)
    upkeep.start()
    assert not upkeep._thread.is_alive()
